"""Any callable as a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from visearch.protocols import Scores
from visearch.rewards.images import to_pil

__all__ = ["FunctionReward"]


class FunctionReward:
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
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        values = self.function(to_pil(samples), list(prompts))
        return Scores(torch.as_tensor(values, dtype=torch.float32))
