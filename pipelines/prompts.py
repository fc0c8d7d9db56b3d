"""Encode each prompt alone and once, and serve any batch of rows from it.

Stock pipelines encode a batch of prompts together, which pads them to the longest, and encode again at every call.
Here ``encode_prompt`` of a pipeline runs once for each set of arguments, with one copy; the rows of a batch are put
together from those results. Where a result's rows lie is found by encoding two copies and seeing which axis doubles.

Shapes: B = rows of a batch.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers.utils import ModelOutput

from visearch.protocols import Meter, NullMeter

__all__ = ["COUNTS", "PLAIN", "Memo", "PromptCache", "clone_tree", "map_tree"]

COUNTS = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
    "num_designs_per_prompt",
    "num_images",
    "batch_size",
)
PLAIN = (bool, int, float, str, torch.device, torch.dtype, type(None))


def map_tree(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists, dicts and model outputs."""
    if type(value) is dict:
        return {k: map_tree(function, v) for k, v in value.items()}
    if isinstance(value, BaseOutput | ModelOutput):
        return type(value)(**{k: map_tree(function, v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        made = [map_tree(function, v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return function(value)


def clone_tree(value: Any) -> Any:
    """A copy whose tensors and containers are its own; other leaves are shared."""
    return map_tree(lambda v: v.clone() if torch.is_tensor(v) else v, value)


class Memo:
    """Outputs of models by the content of their inputs: encoders of images run once, not at every re-entry."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._outputs: dict[tuple, Any] = {}

    def clear(self) -> None:
        self._outputs.clear()

    def call(self, name: Any, real: Callable, args: tuple, kwargs: dict[str, Any], meter: Meter) -> Any:
        """``real(*args, **kwargs)``, computed once; inputs other than tensors and plain values are never remembered."""
        key = None if watched(real) else plain_key([("", name), *enumerate(args), *kwargs.items()], by_value=True)
        if key is None:
            return real(*args, **kwargs)
        if key not in self._outputs:
            if len(self._outputs) >= self._most:
                self._outputs.pop(next(iter(self._outputs)))
            begin = time.perf_counter()
            self._outputs[key] = real(*args, **kwargs)
            meter.encode(1, time.perf_counter() - begin)
        # a copy, since a pipeline may write into what it got
        return clone_tree(self._outputs[key])


class PromptCache:
    """Results of one pipeline's ``encode_prompt``, by arguments.

    Attributes:
        encoding: whether a prompt is being encoded right now, so that models that run are encoders.
    """

    def __init__(self) -> None:
        self.encoding = False
        self._results: dict[tuple, tuple[tuple, Any]] = {}  # arguments -> (what keeps their ids alive, result)
        self._axes: dict[str, Any] = {}  # structure of a result -> row axis of each leaf
        self._encoders = Memo()  # of encoders, while one prompt is encoded

    def clear(self) -> None:
        """Forget all prompts; the row axes stay, they belong to the pipeline."""
        self._results.clear()

    def encode(self, real: Callable, args: tuple, kwargs: dict[str, Any], rows: int, meter: Meter) -> tuple[Any, list]:
        """What ``real(*args, **kwargs)`` gives, from prompts encoded alone; and a description of each prompt's part.

        Prompts whose descriptions are equal can share a batch.

        Args:
            real: a pipeline's own ``encode_prompt``.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            rows: B; lists of that length hold one entry a row.
            meter: told about each prompt that is really encoded.
        """
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments, prompt = bound.arguments, bound.arguments.get("prompt")
        count = next((c for c in COUNTS if c in arguments), None)
        listed = isinstance(prompt, (list, tuple))
        if listed and len(prompt) not in (1, rows):
            return real(*args, **kwargs), []
        length = len(prompt) if listed else 1
        per_row = {k for k, v in arguments.items() if listed and isinstance(v, (list, tuple)) and len(v) == length}
        parts, seen = [], []
        for row in range(length):
            own = {k: v[row] if k in per_row else v for k, v in arguments.items()}
            result, axes = self._encode_one(real, bound.signature, own, count, per_row, meter)
            parts += [result] * (arguments[count] if count else 1)
            seen.append(_describe(result, axes))
        return (parts[0] if len(parts) == 1 else _join(parts, axes)), seen

    def _encode_one(
        self,
        real: Callable,
        signature: inspect.Signature,
        arguments: dict[str, Any],
        count: str | None,
        per_row: set[str],
        meter: Meter,
    ) -> tuple[Any, Any]:
        def encode(copies: int) -> Any:
            changes = {count: copies} if count else {k: [arguments[k]] * copies for k in per_row}
            call = inspect.BoundArguments(signature, arguments | changes)
            # a copy, since a pipeline may write into what it got
            return clone_tree(real(*call.args, **call.kwargs))

        # where the rows lie can be seen only if there is a way to ask for two
        key = (
            bool(count or per_row),
            plain_key(arguments.items() if count is None else (arguments | {count: 1}).items()),
        )
        if key not in self._results:
            self.encoding = True
            try:
                begin = time.perf_counter()
                result = encode(1)
                meter.encode(1, time.perf_counter() - begin)
                parts = map_tree(lambda v: v.ndim if torch.is_tensor(v) else type(v).__name__, result)
                structure = repr((bool(count or per_row), parts))
                if structure not in self._axes:
                    self._axes[structure] = _row_axes(result, encode(2)) if count or per_row else None
            finally:
                self.encoding = False
                self._encoders.clear()
            self._results[key] = tuple(arguments.values()), (result, self._axes[structure])
        return self._results[key][1]

    def encoder(self, name: str, real: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A text encoder's forward; the pass that finds the row axes reuses the output of the first."""
        return self._encoders.call(name, real, args, kwargs, NullMeter())


def watched(real: Callable) -> bool:
    """Whether a module has hooks that read what passes through it: pipelines take hidden states that way."""
    module = getattr(real, "__self__", None)
    return isinstance(module, nn.Module) and any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def plain_key(items: Iterable[tuple[Any, Any]], by_value: bool = False) -> tuple | None:
    """Hashable form of arguments: plain values as they are, other objects by identity.

    With ``by_value``, tensors by their content, and ``None`` if there is any other object.
    """
    known = True

    def one(value: Any) -> Any:
        nonlocal known
        if isinstance(value, PLAIN):
            return type(value), value
        if isinstance(value, (list, tuple)):
            return tuple(map(one, value))
        if by_value and torch.is_tensor(value):
            content = value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
            return value.shape, value.dtype, hashlib.sha256(content).digest()
        known = known and not by_value
        return "id", id(value)

    key = tuple((name, one(value)) for name, value in items)
    return key if known else None


def _row_axes(one: Any, two: Any) -> Any:
    """Per leaf of an encoder's result, the axis that doubles with its rows, or ``None``; "list" for lists of rows."""
    if torch.is_tensor(one):
        return next((i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if b == 2 * a), None)
    if isinstance(one, list) and len(two) == 2 * len(one):
        return "list"
    return [_row_axes(a, b) for a, b in zip(one, two, strict=True)] if isinstance(one, (list, tuple)) else None


def _describe(value: Any, axes: Any) -> Any:
    """Equal for results that can be joined: shapes of what has rows, content of what all rows share."""
    if isinstance(axes, list):
        return [_describe(v, a) for v, a in zip(value, axes, strict=True)]
    if axes == "list":
        return "list"
    if isinstance(axes, int):
        return tuple(value.shape)
    return plain_key([("", value)], by_value=True) or id(value)


def _join(parts: Sequence[Any], axes: Any) -> Any:
    """Results of encoding single rows as the result of encoding them together; blocks (CFG) stay in front of rows."""
    if axes is None:
        return parts[0]
    if axes == "list":
        return [value for part in parts for value in part]
    if isinstance(axes, int):
        stacked: Tensor = torch.stack(list(parts), axes + 1)
        return stacked.flatten(axes, axes + 1)
    return type(parts[0])(_join([p[i] for p in parts], axis) for i, axis in enumerate(axes))
