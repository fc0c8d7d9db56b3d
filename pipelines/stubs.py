"""Stand-ins for a pipeline's models: outputs of the right shape without the computation.

Two kinds. *Zeros* take the place of model calls whose result is already known (the loop before a resume point).
*Mixed* outputs take the place of a model in a self-check: each row of the output is a fixed function of that row of
every input, so a loop that mixes rows up, or loses what belongs to a row, ends in other latents, as with the real
model, at no cost.

Shapes: n = rows of a model call (B, or a multiple of it under guidance).
"""

from __future__ import annotations

import math
import time
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import ModelOutput

from visearch.pipelines.prompts import PLAIN, map_tree

__all__ = ["Stubs", "rows_of"]


def rows_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    """The batch that a model is called with, a tensor or a list of rows, and its number of rows.

    Raises:
        TypeError: no tensor among the arguments.
    """
    named = [kwargs[k] for k in ("hidden_states", "sample", "x") if k in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if torch.is_tensor(value) and value.ndim:
            return value, value.shape[0]
        if isinstance(value, (list, tuple)) and value and torch.is_tensor(value[0]):
            return value, len(value)
    raise TypeError("a denoiser was called without a tensor; cannot tell how many rows it ran")


class Stubs:
    """Shapes of what the models of one pipeline take and give, and outputs made from them.

    Attributes:
        opaque: calls whose output holds other objects than tensors (key/value caches).
    """

    def __init__(self) -> None:
        self._outputs: dict[Any, tuple[int, Any]] = {}  # call -> rows and shapes of its output
        self._sizes: dict[Any, dict[str, int]] = {}  # call -> input -> length of its first axis, for one candidate
        self._scaling: dict[Any, set[str]] = {}  # call -> inputs that hold one entry a row
        self.opaque: set[Any] = set()

    def key(self, name: str, kwargs: Mapping[str, Any]) -> Any:
        """Calls with one key give outputs of one structure."""
        return name, tuple((k, v) for k, v in sorted(kwargs.items()) if isinstance(v, (str, bool)))

    def observe(
        self, name: str, real: Callable, args: tuple, kwargs: dict[str, Any], rows: int
    ) -> tuple[int, float] | None:
        """Learn the output's structure from a call on shapes alone, or, where a model resists that, from a real one.

        Returns:
            Rows and seconds of a real call, if there was one.
        """
        key, spent = self.key(name, kwargs), None
        if key in self._outputs:
            return spent
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)

            def fake(value: Any) -> Any:
                return mode.from_tensor(value) if torch.is_tensor(value) else value

            with mode:
                output = real(*map_tree(fake, args), **map_tree(fake, kwargs))
        except Exception:  # data-dependent shapes and foreign kernels fail in many ways
            begin = time.perf_counter()
            output = real(*args, **kwargs)
            spent = rows, time.perf_counter() - begin
        self._outputs[key] = rows, map_tree(_meta, output)
        if not all(torch.is_tensor(v) or isinstance(v, PLAIN) for _, v in _leaves(output)):
            self.opaque.add(key)
        return spent

    def zeros(self, name: str, module: nn.Module, batch: Any, rows: int, kwargs: Mapping[str, Any]) -> Any:
        """An output whose values nobody reads."""
        key = self.key(name, kwargs)
        if key in self._outputs:
            seen, shapes = self._outputs[key]
            return _zeros(shapes, seen, batch, rows)
        if not torch.is_tensor(batch):
            raise TypeError(f"{name} takes a list of rows; its output has to be observed")
        config = getattr(module, "config", {})
        channels, given = config.get("out_channels"), config.get("in_channels")
        shape = list(batch.shape)
        if isinstance(channels, int) and batch.ndim > 3 and shape[1] == given:
            shape[1] = channels
        zeros = batch.new_zeros(shape)
        return namedtuple("Output", ["sample"])(zeros) if kwargs.get("return_dict", True) else (zeros,)

    def measure(self, name: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Remember the lengths of a call's inputs when there is one candidate."""
        sizes = {path: len(value) for path, value in _rowed((args, dict(kwargs)))}
        self._sizes.setdefault(self.key(name, kwargs), sizes)

    def compare(self, name: str, args: tuple, kwargs: Mapping[str, Any], candidates: int) -> None:
        """Find the inputs whose length grows with the number of candidates."""
        key = self.key(name, kwargs)
        alone = self._sizes.get(key, {})
        grown = {p for p, v in _rowed((args, dict(kwargs))) if len(v) == candidates * alone.get(p, 0)}
        self._scaling.setdefault(key, grown)

    def mixed(self, name: str, module: nn.Module, batch: Any, rows: int, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """An output each row of which depends on that row of every input, and on nothing else."""
        scaling = self._scaling.get(self.key(name, kwargs))
        device = batch.device if torch.is_tensor(batch) else batch[0].device
        marks = torch.zeros(rows, device=device)
        for path, value in _rowed((args, dict(kwargs))):
            if len(value) == rows and (scaling is None or path in scaling):
                means = [v.float().nan_to_num().mean() if v.numel() else v.new_zeros(()).float() for v in value]
                marks = marks + math.cos(zlib.crc32(path.encode())) * torch.stack(means).to(device)
        marks = torch.tanh(marks)

        def mix(zeros: Any) -> Any:
            if not torch.is_tensor(zeros) or not zeros.is_floating_point() or not zeros.ndim:
                return zeros
            if zeros.shape[0] % rows:
                return zeros
            own = marks.repeat_interleave(zeros.shape[0] // rows).reshape(-1, *[1] * (zeros.ndim - 1))
            return (zeros + own + 0.5 * _cut(batch, zeros)).to(zeros.dtype)

        zeros = self.zeros(name, module, batch, rows, kwargs)
        if torch.is_tensor(batch):
            return map_tree(mix, zeros)

        def mix_lists(value: Any) -> Any:
            if isinstance(value, list) and len(value) == rows and all(map(torch.is_tensor, value)):
                return [z + marks[i] + 0.5 * _cut(batch[i], z) for i, z in enumerate(value)]
            if isinstance(value, tuple):
                return type(value)(map(mix_lists, value))
            if isinstance(value, dict):
                mixed = {k: mix_lists(v) for k, v in value.items()}
                return type(value)(**mixed) if isinstance(value, (BaseOutput, ModelOutput)) else mixed
            return value

        return mix_lists(zeros)

    def cache_use(self, name: str, kwargs: Mapping[str, Any]) -> str | None:
        """Whether a call ``"fills"`` or ``"reads"`` a key/value cache that lives on between steps."""
        held = [k for k, v in kwargs.items() if "cache" in k and v is not None and not isinstance(v, PLAIN)]
        if self.key(name, kwargs) in self.opaque or (held and "extract" in kwargs.values()):
            return "fills"
        return "reads" if held else None


def _meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if torch.is_tensor(value) else value


def _cut(batch: Tensor, like: Tensor) -> Tensor | float:
    """The part of a model's input that is shaped like its output."""
    if batch.ndim != like.ndim or any(b < s for b, s in zip(batch.shape, like.shape, strict=True)):
        return 0.0
    return batch[tuple(slice(0, s) for s in like.shape)].to(like.device, torch.float32)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}.{i}")
    else:
        yield path, value


def _rowed(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors with axes, and lists of tensors, with the paths to them: what may hold one entry a row."""
    if torch.is_tensor(value):
        if value.ndim:
            yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _rowed(part, f"{path}.{key}")
    elif isinstance(value, list) and value and all(map(torch.is_tensor, value)):
        yield path, value
        yield from ((f"{path}.{i}", v) for i, v in enumerate(value) if v.ndim)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _rowed(part, f"{path}.{i}")


def _zeros(shapes: Any, seen: int, batch: Any, rows: int) -> Any:
    """An output like one that was seen, for another number of rows: along first axes, or in lists as the batch is."""
    listed = not torch.is_tensor(batch)
    device = batch[0].device if listed else batch.device

    def fit(value: Any, scale: bool = True) -> Any:
        if torch.is_tensor(value):
            shape = (value.shape[0] * rows // seen, *value.shape[1:]) if scale and value.ndim else value.shape
            return torch.zeros(shape, dtype=value.dtype, device=device)
        if listed and isinstance(value, list):
            return [fit(value[0], scale=False) for _ in range(rows)]
        if isinstance(value, (list, tuple)):
            made = [fit(v) for v in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            made = {k: fit(v) for k, v in value.items()}
            return type(value)(**made) if isinstance(value, (BaseOutput, ModelOutput)) else made
        return value

    return fit(shapes)
