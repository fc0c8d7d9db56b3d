"""Step caches: a skipped call of the denoiser is answered from what it gave for the same row before.

:class:`StepCache` works on every denoiser, since it looks at whole calls only: the output of a skipped one is
extrapolated by finite differences over the outputs kept, the idea of TaylorSeer (arXiv 2503.06923) at the level of the
denoiser. Which calls are skipped is fixed before the run, or decided for each row by how far its input has moved, as in
TeaCache (2411.19108) and cached drafts (2607.23159). What is kept belongs to the rows: it is saved, selected and
resumed with them, so a row ends the same whatever its companions and its stops.

diffusers' own caches (``MagCacheConfig``, ``TaylorSeerCacheConfig``, ...) keep their state in the model instead;
:class:`HookCache` enables one for the time of a single call of the pipeline, which then has to run from noise to end.

Shapes: B = rows of a run, k = entries of a model call a row (2 where both guidance branches are one batch), H = outputs
kept.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visearch.pipelines.prompts import map_tree
from visearch.protocols import RowState

__all__ = ["HookCache", "ModelCall", "Reuse", "StepCache", "computed", "resolve"]

PREFIX = "cache."
ROUNDING = 1e-9  # 0.55 * 20 is 11.000000000000002
BATCHED = ("MagCacheConfig", "TaylorSeerCacheConfig")  # what these skip is fixed by the step alone


@dataclass(frozen=True)
class StepCache:
    """Which stages of a run skip their model calls, and how the outputs are extrapolated.

    Of the stages from ``warmup`` to ``T - tail``, the first ``every - 1`` of each ``every`` are skipped. With ``tau``,
    a stage there is skipped while its row's input has moved by less than ``tau`` since the last call that ran: the sum
    of ``mean |x_j - x_{j-1}| / mean |x_{j-1}|`` over stages. Rows may differ in that, so they run one by one, and
    ``nfe`` is the most that a row can cost; fixed patterns run in batches and cost exactly what ``nfe`` says. Cached
    drafts (2607.23159) took tau = .10 for Wan, .05 for CogVideoX and HunyuanVideo, .02 for LTX.

    The defaults skip about half of the steps. Of the patterns tried on emoji-64 at 15 steps they lost least by the rows
    they saved: guided outputs change fast in the first third, where repeating them is wrong and extrapolating worse.

    Args:
        every: of how many stages one runs, at least 1.
        warmup: first stages that all run, at least 1; a float in (0, 1) is a share of T, rounded up.
        tail: last stages that all run, at least 0.
        order: of the extrapolation over stages: 0 repeats the last output, 1 and 2 follow its differences; less while
            fewer outputs are there.
        skip: the skipped stages themselves, each in [1, T - 1], in place of ``every``, ``warmup`` and ``tail``.
        tau: at least 0; 0 skips nothing.

    Raises:
        ValueError: a field out of range, or both ``skip`` and ``tau``.
    """

    every: int = 5
    warmup: int | float = 1 / 3
    tail: int = 1
    order: int = 0
    skip: tuple[int, ...] | None = None
    tau: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("warmup", 1), ("tail", 0)):
            value = getattr(self, name)
            share = name == "warmup" and isinstance(value, float) and 0 < value < 1
            if not share and not (type(value) is int and value >= least):
                also = ", or a share of the steps in (0, 1)" * (name == "warmup")
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{also}")
        if self.order not in (0, 1, 2):
            raise ValueError(f"order={self.order!r} must be 0 (repeat), 1 or 2 (extrapolate)")
        if self.tau is not None and not self.tau >= 0:
            raise ValueError(f"tau={self.tau!r} must be at least 0; 0 skips nothing")
        if self.skip is not None:
            if self.tau is not None:
                raise ValueError("skip names the stages, tau lets each row decide; give one of them")
            object.__setattr__(self, "skip", tuple(sorted({int(s) for s in self.skip})))
            if self.skip and self.skip[0] < 1:
                raise ValueError(f"skip={self.skip} begins before stage 1; the first stage has no output to repeat")

    @property
    def fixed(self) -> bool:
        """Whether it is known before the run what is skipped."""
        return not self.tau

    @property
    def batched(self) -> bool:
        """Whether rows of a batch skip the same calls."""
        return self.fixed

    def stages(self, num_stages: int) -> frozenset[int]:
        """The stages of T whose model calls are skipped; with ``tau``, those that may be.

        Raises:
            ValueError: ``skip`` names a stage beyond T - 1.
        """
        if self.skip is not None:
            if self.skip and self.skip[-1] >= num_stages:
                raise ValueError(f"skip={self.skip} goes beyond the last of {num_stages} stages, {num_stages - 1}")
            return frozenset(self.skip)
        first = self.warmup if isinstance(self.warmup, int) else math.ceil(self.warmup * num_stages - ROUNDING)
        within = range(first, num_stages - self.tail)
        if self.tau is not None:
            return frozenset(within if self.tau else ())
        return frozenset(j for j in within if (j - first) % self.every != self.every - 1)


def resolve(cache: Any, num_stages: int) -> StepCache | HookCache:
    """What ``view(cache=)`` is given, as a cache.

    Args:
        cache: a :class:`StepCache`, its fields as a mapping or a text (``"every=2,order=1"``, ``"tau=0.1"``), one of
            diffusers' cache configs, or ``"auto"``: ``StepCache()``, but nothing is skipped of at most 4 stages.
        num_stages: T.

    Raises:
        ValueError: none of these, or an unknown field.
    """
    if isinstance(cache, (StepCache, HookCache)):
        return cache
    if isinstance(cache, str):
        if cache == "auto":
            return StepCache() if num_stages > 4 else StepCache(skip=())
        pairs = [part.partition("=") for part in cache.split(",")]
        cache = {k.strip(): _number(v) for k, _, v in pairs} if all(equals for _, equals, _ in pairs) else cache
    if isinstance(cache, Mapping):
        known = [f.name for f in fields(StepCache)]
        if unknown := [k for k in cache if k not in known]:
            raise ValueError(f"a step cache has no field {unknown[0]!r}; use 'auto' or {', '.join(known)}")
        return StepCache(**cache)
    if type(cache).__module__.startswith("diffusers.hooks") and type(cache).__name__.endswith("Config"):
        return HookCache(cache)
    raise ValueError(
        f"cache={cache!r} is no step cache; give 'auto', a text such as 'every=2,order=1', a StepCache, or a cache "
        "config of diffusers (MagCacheConfig)"
    )


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{text!r} is no number; write a step cache as 'every=2,order=1' or 'tau=0.1'")


# --- what a fixed pattern costs ---------------------------------------------------------------------------------


class ModelCall(NamedTuple):
    """A model call of one candidate's run: the scheduler steps done before it, which model, its rows."""

    clock: int
    name: str
    rows: int


def computed(calls: Sequence[ModelCall], ends: Sequence[int], skipped: frozenset[int], start: int = 0) -> list[bool]:
    """Which calls of a run from stage ``start`` run for real: in a skipped stage, those with nothing to repeat.

    Args:
        calls: of a whole run, in order.
        ends: clock at the end of each stage, from stage 0.
        skipped: stages that skip.
        start: where rows begin that have no outputs yet; earlier calls do not run.
    """
    stage, seen, kept, real = -1, Counter(), set(), []
    for clock, name, rows in calls:
        now = bisect_right(ends, clock) - 1
        if now != stage:
            stage, seen = now, Counter()
        key = (name, seen[name], rows)
        seen[name] += 1
        real.append(stage >= start and not (stage in skipped and key in kept))
        if real[-1]:
            kept.add(key)
    return real


# --- the outputs of one run -------------------------------------------------------------------------------------


class Reuse:
    """The outputs that the rows of one run carry with them, and what is made of them.

    Of the calls within a stage, the n-th of each model repeats the n-th of earlier stages: a scheduler of order 2, two
    guidance branches in turn, and several models each have their own.

    Args:
        cache: what to skip and how to extrapolate.
        ends: clock at the end of each stage, from stage 0.
        rows: B.
        rows_first: model -> whether a row's entries are neighbours in its batch, or lie one block apart.
    """

    def __init__(self, cache: StepCache, ends: Sequence[int], rows: int, rows_first: Mapping[str, bool]) -> None:
        self.cache, self.ends, self.rows, self.rows_first = cache, ends, rows, rows_first
        self.skipped = cache.stages(len(ends) - 1)
        self.tensors: dict[str, Tensor] = {}  # (B, H, k, ...) outputs, (B, H) stages; rows come first
        self._stage, self._seen = -1, Counter()

    def load(self, state: RowState) -> None:
        """Go on with what the rows of a state carry."""
        self.tensors = {k: v for k, v in state.tensors.items() if k.startswith(PREFIX)}

    def begin(self, name: str, clock: int, batch: Any, count: int) -> tuple[str, bool]:
        """A model is called: the name of this call, and whether it is skipped."""
        stage = bisect_right(self.ends, clock) - 1
        if stage != self._stage:
            self._stage, self._seen = stage, Counter()
        key = f"{PREFIX}{name}.{self._seen[name]}.{count // self.rows}"
        self._seen[name] += 1
        moved = self._moved(key, name, batch) if self.cache.tau else 0.0
        held = f"{key}.at" in self.tensors
        return key, held and stage in self.skipped and (not self.cache.tau or moved < self.cache.tau)

    def recall(self, key: str, name: str, like: Any, listed: bool) -> Any:
        """The output of a skipped call, extrapolated, in the structure of ``like``."""
        weights = torch.tensor([self._weights(at) for at in self.tensors[f"{key}.at"].tolist()])
        leaves = itertools.count()

        def made(_: Tensor) -> Tensor:
            kept = self.tensors[f"{key}.out.{next(leaves)}"]
            # a sum in a fixed order, so that a row's last bit does not depend on the number of rows
            parts = (
                kept[:, h].to(torch.promote_types(kept.dtype, torch.float32))
                * weights[:, h].to(kept.device).reshape(-1, *[1] * (kept.ndim - 2))
                for h in range(kept.shape[1])
            )
            return self._join(name, functools.reduce(torch.add, parts).to(kept.dtype))

        return _map_batches(made, like, listed)

    def keep(self, key: str, name: str, output: Any, listed: bool) -> None:
        """A call ran: its output is the latest of each row's."""
        stage = torch.full((self.rows, 1), self._stage)
        depth = self.cache.order + 1
        old = self.tensors.get(f"{key}.at")
        self.tensors[f"{key}.at"] = _push(stage, torch.full((self.rows, depth), -1) if old is None else old)
        count = 0

        def put(leaf: Tensor) -> Tensor:
            nonlocal count
            place, count = f"{key}.out.{count}", count + 1
            new = self._split(name, leaf.detach())[:, None]
            kept = self.tensors.get(place)
            self.tensors[place] = _push(new, new.new_zeros(self.rows, depth, *new.shape[2:]) if kept is None else kept)
            return leaf

        _map_batches(put, output, listed)
        if self.cache.tau:
            self.tensors[f"{key}.moved"] = torch.zeros(self.rows)

    def _moved(self, key: str, name: str, batch: Any) -> float:
        """How far the (one) row's input has moved since the last call that ran."""
        now = self._split(name, batch if torch.is_tensor(batch) else torch.stack(list(batch)))
        before, total = self.tensors.get(f"{key}.input"), self.tensors.get(f"{key}.moved")
        self.tensors[f"{key}.input"] = now.clone()
        if before is None or total is None:
            return math.inf
        total = total + float((now.float() - before.float()).abs().mean() / before.float().abs().mean())
        self.tensors[f"{key}.moved"] = total
        return float(total)

    def _weights(self, at: Sequence[int]) -> list[float]:
        """Lagrange's weights of the outputs at stages ``at`` for the current stage; 0 where there is none."""
        known = [a for a in at if a >= 0]
        return [math.prod((self._stage - b) / (a - b) for b in known if b != a) if a >= 0 else 0.0 for a in at]

    def _split(self, name: str, value: Tensor) -> Tensor:
        """(k B, ...) -> (B, k, ...)."""
        blocks, rest = divmod(len(value), self.rows)
        if rest:
            raise ValueError(
                f"{name} gave a tensor of shape {tuple(value.shape)} for {self.rows} rows; a step cache cannot tell "
                "its rows apart: use the sampler without cache"
            )
        if 1 in (blocks, self.rows) or self.rows_first[name]:
            return value.unflatten(0, (self.rows, blocks))
        return value.unflatten(0, (blocks, self.rows)).transpose(0, 1)

    def _join(self, name: str, value: Tensor) -> Tensor:
        """Inverse of :meth:`_split`."""
        if 1 in value.shape[:2] or self.rows_first[name]:
            return value.flatten(0, 1)
        return value.transpose(0, 1).flatten(0, 1)


def _push(new: Tensor, kept: Tensor) -> Tensor:
    """The latest comes first, the oldest goes."""
    return torch.cat([new, kept[:, :-1]], 1)


def _map_batches(function: Callable[[Tensor], Tensor], output: Any, listed: bool) -> Any:
    """Apply to each tensor of a model's output; of models that take and give rows in lists, to the rows as one tensor.

    Raises:
        ValueError: listed rows of different shapes.
    """

    def visit(value: Any) -> Any:
        if listed and isinstance(value, list) and value and all(map(torch.is_tensor, value)):
            if len({v.shape for v in value}) > 1:
                raise ValueError("rows of different shapes have no step cache; use the sampler without cache")
            return list(function(torch.stack(value)).unbind())
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(visit, value))
        return map_tree(lambda v: function(v) if torch.is_tensor(v) else v, value)

    return visit(output)


# --- diffusers' own caches --------------------------------------------------------------------------------------


class HookCache:
    """One of diffusers' caches, enabled on a pipeline's denoisers for the time of one call.

    Its state lives in the model, so rows run from noise to end without a stop. Rules that look at the batch as a whole
    run row by row; those of MagCache and TaylorSeer go by the step alone and run in batches. What a call still computed
    is the share of its floating-point operations, counted by ``torch.utils.flop_counter``, in those of a full one.

    Args:
        config: such as ``MagCacheConfig(...)``.
    """

    fixed = False

    def __init__(self, config: Any) -> None:
        self.config = config
        self.batched = type(config).__name__ in BATCHED
        self._full: dict[tuple[str, int], int] = {}  # model and rows -> operations of a whole call

    def __repr__(self) -> str:
        return f"HookCache({self.config!r})"

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Raise a ValueError if a model has no such cache."""
        for module in models.values():
            name, kind = type(module).__name__, type(self.config).__name__
            other = f"use StepCache, which works on every denoiser, in place of {kind}"
            if not hasattr(module, "enable_cache"):
                raise ValueError(f"{name} has no step caches of diffusers (it is no CacheMixin); {other}")
            if module.is_cache_enabled:
                raise ValueError(
                    f"{name} has a cache enabled already, {type(module._cache_config).__name__}; call disable_cache() "
                    "on it, or leave cache out to run with that one"
                )
            before = _hooks(module)
            try:
                with self.enabled({"": module}):
                    hooked = _hooks(module) != before
            except Exception as error:  # diffusers looks its hooks up in tables of classes, in many ways
                raise ValueError(f"{name} cannot take {kind} ({type(error).__name__}: {error}); {other}") from error
            if not hooked:
                raise ValueError(f"{kind} finds nothing to skip in {name}; {other}")

    @contextmanager
    def enabled(self, models: Mapping[str, nn.Module]) -> Iterator[None]:
        """Within, the cache is on and empty; afterwards the models are as they were, whatever happened."""
        parts = [part for module in models.values() for part in module.modules()]
        before = {part: (vars(part).get("forward"), _names(part), vars(part).get("_cache_config")) for part in parts}
        try:
            for module in models.values():
                module.enable_cache(self.config)
            yield
        finally:
            for part, (forward, names, config) in before.items():
                registry = vars(part).get("_diffusers_hook")
                if registry is None:
                    continue
                for name in [n for n in reversed(registry._hook_order) if n not in (names or ())]:
                    registry.remove_hook(name, recurse=False)
                registry._child_registries_cache = None
                for key, value in (("forward", forward), ("_cache_config", config)):
                    vars(part).pop(key, None) if value is None else vars(part).update({key: value})
                if names is None:
                    del part._diffusers_hook

    def run(self, name: str, rows: int, real: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, float]:
        """A model call, and the share of it that was computed."""
        with FlopCounterMode(display=False) as counter:
            output = real(*args, **kwargs)
        done = counter.get_total_flops()
        full = self._full[name, rows] = max(done, self._full.get((name, rows), 1))
        return output, done / full


def _names(module: nn.Module) -> tuple[str, ...] | None:
    """diffusers' hooks on one module; ``None`` where it never had any."""
    registry = vars(module).get("_diffusers_hook")
    return None if registry is None else tuple(registry._hook_order)


def _hooks(module: nn.Module) -> int:
    return sum(len(_names(part) or ()) for part in module.modules())
