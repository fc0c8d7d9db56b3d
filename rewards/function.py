"""Rewards of your own: any function, and any class by its import path.

    SearchPipeline(pipe, reward=lambda images, prompts: [...])          # N PIL images (of videos, lists of frames)
    SearchPipeline(pipe, reward={"class": "my_rewards:HPSv3", "model": "/models/hpsv3"})
    visearch run "..." --reward my_rewards:sharpness                    # a function by its path
    visearch run "..." --reward my_rewards:HPSv3                        # a class, made without arguments

A class has what :class:`visearch.protocols.Reward` asks for. Models that need their authors' code (HPSv3, VideoAlign's
VideoReward) come in this way; none of them is part of this package:

    class HPSv3:
        name, higher_is_better, range = "hpsv3", True, (-math.inf, math.inf)
        licence, source, needs = "MIT", "MizzenAI/HPSv3", frozenset({"pixels"})

        def __init__(self, model="MizzenAI/HPSv3", device="cpu"): ...

        def score(self, samples, prompts, *, noise_level=None, metadata=None):
            return Scores(torch.tensor([...]))  # N numbers, NaN where a sample failed

    def test_hpsv3():
        visearch.rewards.check(HPSv3())

Shapes: N samples.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from visearch.protocols import Scores
from visearch.rewards.base import texts_for
from visearch.rewards.combine import Operators
from visearch.rewards.images import to_pil

__all__ = ["FunctionReward", "is_path", "path_of", "plug_in"]


class FunctionReward(Operators):
    """A function ``(images, prompts) -> N floats``, higher is better.

    Args:
        function: gets N PIL images (for video N lists of them) and N prompts.
        name: how tables call it; default the function's own name.
    """

    higher_is_better = True
    range = (-math.inf, math.inf)
    licence = "the caller's"
    needs = frozenset({"pixels"})

    def __init__(
        self, function: Callable[[list[Any], Sequence[str]], Sequence[float]], name: str | None = None
    ) -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.source = f"{getattr(function, '__module__', '?')}:{self.name}"

    def score(
        self,
        samples: Any,
        prompts: str | Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        images = to_pil(samples)
        values = self.function(images, texts_for(prompts, len(images)))
        return Scores(torch.as_tensor(values, dtype=torch.float32))


# --- by import path -------------------------------------------------------------------------------------------

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_path(text: str) -> bool:
    """Whether a text is ``"package.module:Name"``."""
    return PATH.fullmatch(text) is not None


def plug_in(description: str | Mapping[str, Any], device: torch.device | str = "cpu") -> Any:
    """What stands at ``"package.module:Name"``: a class is called first, as is anything that has options.

    Importing runs the module, so descriptions may come from the user's own code and command line alone.

    Args:
        description: the path, or ``{"class": path, **options}``.
        device: given to a class that takes one.

    Raises:
        ValueError: no ``"class"``, no such module, or no such name in it.
        TypeError: options that it does not take.
    """
    options = dict(description) if isinstance(description, Mapping) else {"class": description}
    path = options.pop("class", None)
    if not isinstance(path, str) or not is_path(path):
        raise ValueError(f"reward {description!r}: 'class' must be a text such as 'package.module:Name'")
    target = imported(path)
    if not (options or isinstance(target, type)):
        return target
    if "device" not in options and _takes(target, "device"):
        options["device"] = device
    return target(**options)


def imported(path: str) -> Any:
    """The object at ``"package.module:name"``.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path!r}: there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(found, name):
        near = get_close_matches(name, dir(found), n=3, cutoff=0.5)
        raise ValueError(
            f"{path!r}: {module} has no {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    return getattr(found, name)


def path_of(function: Callable[..., Any]) -> str:
    """``"package.module:name"`` of a function, which tells it from all others.

    Raises:
        AttributeError: it has none: a lambda, a function within another, an object.
    """
    name = function.__qualname__
    if "<" in name:
        raise AttributeError(f"{name} has no name of its own that would tell it from others; define it in a module")
    return f"{function.__module__}:{name}"


def _takes(function: Callable[..., Any], option: str) -> bool:
    parameters = inspect.signature(function).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
