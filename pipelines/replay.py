"""Stop and resume the denoising loop of a stock diffusers pipeline, with any rows, without touching its code.

A pipeline's loop variables are locals, so it can neither stop at step k nor resume there. Replay calls the pipeline
itself again: until the resume point the denoisers are stubs and ``scheduler.step`` returns recorded tensors, so the
loop runs through its own index-dependent code in microseconds; at the resume point the saved latents, scheduler
fields and random streams are put in; past the stop point a private exception leaves the loop. For the duration of a
call, and on the instances only, these are shadowed: ``scheduler.step`` and ``set_timesteps``, the components'
``forward``, and the pipeline's ``encode_prompt``, ``prepare_latents``, ``progress_bar`` and
``maybe_free_model_hooks``. All of it, and whatever the call changed on the pipeline and its schedulers, is restored
afterwards, also after an exception.

Shapes: B = rows of a run. Clock: completed calls of ``step``, counted flat over all schedulers of the pipeline.
Slot: number of a scheduler object in the order of first calls (most pipelines have one).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import time
import types
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm.auto import tqdm

from visearch.pipelines import components
from visearch.pipelines.cache import HookCache, ModelCall, Reuse, StepCache
from visearch.pipelines.flow import Level, noise_levels, predict, prediction_type, transit
from visearch.pipelines.previews import Decode
from visearch.pipelines.prompts import COUNTS, Memo, PromptCache, clone_tree
from visearch.pipelines.stubs import Stubs, rows_of
from visearch.protocols import Meter, NullMeter, Ode, RowState, Transition, stable_hash

__all__ = ["Layout", "NoBatch", "Replay", "Schedule"]

_ABSENT = object()


class _Stop(BaseException):
    """Leaves a pipeline's loop. Not an Exception, so that no handler inside a pipeline swallows it."""


_signatures: weakref.WeakKeyDictionary[Callable, inspect.Signature] = weakref.WeakKeyDictionary()


def _signature(method: Callable) -> inspect.Signature:
    """Of a bound method; reading it at every step would cost more than the step."""
    function = getattr(method, "__func__", None)
    if function is None:
        return inspect.signature(method)
    if function not in _signatures:
        _signatures[function] = inspect.signature(method)
    return _signatures[function]


class _Shadow:
    """Stands in for a bound method as an instance attribute, and follows its owner through ``copy.deepcopy``.

    Some pipelines deep-copy their scheduler inside the call; the copy's shadow belongs to the copy.

    Raises:
        RuntimeError: called from another thread than the one whose run set it up.
    """

    def __init__(self, owner: Any, name: str, function: Callable, real: Callable | None = None) -> None:
        self.owner, self.name, self.function = owner, name, function
        # pipelines inspect the signature of step and set_timesteps
        self.__wrapped__ = getattr(owner, name) if real is None else real
        self.thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            raise RuntimeError(
                f"{type(self.owner).__name__} is in use by a search in another thread; call the pipeline when that is "
                "over, or give each thread a pipeline of its own (from_pipe shares the weights)"
            )
        return self.function(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> _Shadow:
        owner = memo.get(id(self.owner), self.owner)
        return _Shadow(owner, self.name, self.function, getattr(type(owner), self.name).__get__(owner))


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute past ``__setattr__``; afterwards the previous one is back, or none."""
    attributes = vars(owner)
    previous = attributes.get(name, _ABSENT)
    attributes[name] = value
    try:
        yield
    finally:
        if previous is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = previous


@contextmanager
def _unchanged(owner: Any, but: tuple[str, ...] = ()) -> Iterator[None]:
    """Undo changes of an object's attributes, and of lists that it holds, except of names that begin with ``but``."""
    attributes = vars(owner)
    saved = dict(attributes)
    lists = [(v, list(v)) for v in saved.values() if isinstance(v, list)]
    try:
        yield
    finally:
        kept = {k: v for k, v in attributes.items() if but and k.startswith(but)}
        attributes.clear()
        attributes.update({k: v for k, v in saved.items() if not (but and k.startswith(but))} | kept)
        for value, content in lists:
            value[:] = content


@contextmanager
def _global_stream(state: Tensor | None) -> Iterator[None]:
    """Torch's global stream on the CPU stands at ``state``, if given; afterwards it is where it was."""
    found = torch.get_rng_state()
    if state is not None:
        torch.set_rng_state(state.cpu().clone())  # torch crashes on a view that does not begin its storage
    try:
        yield
    finally:
        torch.set_rng_state(found)


def _ambient(state: Tensor) -> Tensor:
    """A state of the global stream that depends on a row's stream only."""
    seed = stable_hash(state.cpu().numpy().tobytes().hex())
    return torch.Generator().manual_seed(seed).get_state()


# --- trees of tensors -------------------------------------------------------------------------------------------


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if torch.is_tensor(a) or torch.is_tensor(b):
        both = torch.is_tensor(a) and torch.is_tensor(b)
        return both and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


# --- scheduler fields <-> RowState ------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the rows of a tensor lie that a step takes or gives.

    Args:
        axis: of the pipeline's tensor, with ``blocks * B`` entries along it.
        blocks: entries a row: 1, or 2 where a pipeline steps on both guidance branches, or frames.
        rows_first: whether a row's entries are neighbours, or lie one block apart.
    """

    axis: int = 0
    blocks: int = 1
    rows_first: bool = False

    @property
    def row_axis(self) -> int:
        """Axis of the rows in what :meth:`split` gives."""
        return self.axis if self.blocks == 1 or self.rows_first else self.axis + 1

    def split(self, value: Tensor, rows: int) -> Tensor:
        """The tensor with an axis of its own for the rows."""
        if value.ndim <= self.axis or value.shape[self.axis] != rows * self.blocks:
            raise ValueError(
                f"a step gave a tensor of shape {tuple(value.shape)} for {rows} rows with {self.blocks} entries each "
                f"along axis {self.axis}; pipelines whose loop does not keep its rows apart cannot be replayed"
            )
        if self.blocks == 1:
            return value
        return value.unflatten(self.axis, (rows, self.blocks) if self.rows_first else (self.blocks, rows))

    def join(self, value: Tensor) -> Tensor:
        """Inverse of :meth:`split`."""
        return value if self.blocks == 1 else value.flatten(self.axis, self.axis + 1)


def _layout(alone: torch.Size, together: torch.Size, rows: int, rows_first: bool) -> Layout:
    """Where rows lie, from the shapes for one row and for several."""
    for axis, (one, many) in enumerate(zip(alone, together, strict=True)):
        if many == rows * one and alone[:axis] == together[:axis] and alone[axis + 1 :] == together[axis + 1 :]:
            return Layout(axis, one, rows_first)
    raise ValueError(f"a step gave shape {tuple(alone)} for one row and {tuple(together)} for {rows}")


def _pack(
    value: Any, name: str, rows: int, layout: Layout, tensors: dict[str, Tensor], axes: dict[str, int | None]
) -> Any:
    """JSON form of a scheduler field; its tensors move to ``tensors`` under ``name``, history by row."""
    if torch.is_tensor(value):
        own = value.ndim > 1 and value.ndim > layout.axis and value.shape[layout.axis] == rows * layout.blocks
        tensors[name] = layout.split(value, rows).clone() if own else value.clone()
        axes[name] = layout.row_axis if own else None
        return {"tensor": name, "rows": own}
    if isinstance(value, (list, tuple)):
        return [_pack(v, f"{name}.{i}", rows, layout, tensors, axes) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"scheduler field {name} holds a {type(value).__name__}, which cannot be saved; expected a tensor, "
        "number, string or list of them"
    )


def _unpack(value: Any, layout: Layout, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        held = tensors[value["tensor"]]
        return (layout.join(held) if value["rows"] else held).clone()
    return [_unpack(v, layout, tensors) for v in value] if isinstance(value, list) else value


# --- what is known of a pipeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """What a dry run tells about a pipeline's loop.

    Args:
        slots: per call of ``step``, which loop it belonged to.
        ends: clock at the end of each stage, from stage 0; one stage is one pass of the loop, or two for schedulers
            of order 2, whose full step takes two model calls.
        model_rows: per clock, model rows that one candidate costs in the loop's pass before that call.
        levels: per slot, the levels before each of its calls and after the last, or ``None`` where unknown.
        first_index: per slot, the ``_step_index`` at its first call, or ``None`` where the scheduler has none.
        order: of the first scheduler.
        live: clocks whose model call has to run for real whenever rows are resumed later: it fills a key/value cache.
        models: the model calls of one candidate within the loop, in order.
    """

    slots: tuple[int, ...]
    ends: tuple[int, ...]
    model_rows: tuple[int, ...]
    levels: tuple[list[Level] | None, ...]
    first_index: tuple[int | None, ...]
    order: int
    live: tuple[int, ...] = ()
    models: tuple[ModelCall, ...] = ()

    @property
    def calls(self) -> int:
        return len(self.slots)

    @property
    def stages(self) -> int:
        return len(self.ends) - 1

    def nfe(self, start: int, stop: int) -> int:
        """Model rows that one candidate costs from one stage to another."""
        again = [c for c in self.live if c < self.ends[start] < self.calls]
        return sum(self.model_rows[self.ends[start] : self.ends[stop]]) + sum(self.model_rows[c] for c in again)

    @property
    def preview_from(self) -> int:
        """First stage at which every loop has begun, so that there is something to decode."""
        begun = max(self.slots.index(slot) for slot in set(self.slots)) + 1
        return next(stage for stage, end in enumerate(self.ends) if end >= begun)

    @functools.cached_property
    def between(self) -> frozenset[int]:
        """Clocks at which one loop is over and another follows."""
        return frozenset(c for c in range(1, self.calls) if not set(self.slots[:c]) & set(self.slots[c:]))

    def level(self, clock: int, slot: int = 0) -> Level | None:
        """Level of a slot's sample at a clock."""
        levels = self.levels[slot]
        return None if levels is None else levels[self.slots[:clock].count(slot)]


class Replay:
    """Runs parts of one pipeline's loop.

    How rows may be run is found at construction by a self-check: the pipeline's own loop runs with stand-ins for its
    models (:class:`visearch.pipelines.stubs.Stubs`), once for one row, once for two, and again resumed from the middle
    with the second row alone. Where all three end in the same latents, rows are replayed together (``"batch"``); where
    only the resumed row agrees with itself, one by one (``"rows"``): some image-conditioned pipelines refuse batches,
    or draw what all rows share from the first row's generator. Where not even that holds, only whole runs are left
    (``"whole"``), and a warning says so.

    Args:
        pipe: any diffusers pipeline whose ``__call__`` loops over ``scheduler.step``.
        call: keyword arguments of a call that hold for all rows, without generator and number of images.
        example: keyword arguments that hold for one prompt, for the dry runs.

    Attributes:
        strategy: ``"batch"``, ``"rows"`` or ``"whole"``.
        reason: why it is not ``"batch"``.
        schedule: the loop's stages and what they cost.
        number: the argument that sets images or videos a prompt, or ``None`` where the call does not honour it: some
            pipelines take it and set it to 1, so their batch is made by repeating the prompt.
        spent: real model calls that the self-check could not avoid: (rows, seconds) each.
        left: attributes that the latest finished call would have left on the pipeline (``_guidance_scale``).

    Raises:
        ValueError: the pipeline has no scheduler, or its call makes no step.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], example: Mapping[str, Any]) -> None:
        self.pipe = pipe
        parts = components(pipe)
        self.modules = {k: m for k, m in parts.items() if isinstance(m, nn.Module)}
        self.schedulers = [s for s in parts.values() if hasattr(s, "step") and hasattr(s, "set_timesteps")]
        if not self.schedulers:
            raise ValueError(
                f"{type(pipe).__name__} has no scheduler with step and set_timesteps; it cannot be replayed"
            )
        self.guiders = {k: c for k, c in parts.items() if hasattr(c, "momentum_buffer")}
        if any(getattr(m, "is_cache_enabled", False) for m in self.modules.values()):
            warnings.warn(
                "a step cache is enabled: it decides for all rows of a batch at once and starts cold when a row is "
                "resumed, so results depend on the search's path; call disable_cache() for exact replay",
                stacklevel=3,
            )
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        names = inspect.unwrap(type(pipe).__call__).__code__.co_names
        self.has_bar = "progress_bar" in names
        self.prompts, self.memo, self.stubs = PromptCache(), Memo(), Stubs()
        self.layouts: dict[tuple[int, str], Layout] = {}
        self.shapes: dict[tuple[int, str], torch.Size] = {}  # of what steps gave for one row
        self.schedule: Schedule | None = None
        self.number: str | None = None
        self.inputs: dict[str, Tensor] = {}  # model -> what its first call took for one row
        self.rows_first: dict[str, bool] = {}  # model -> whether a row's entries are neighbours in its batch
        self.spent: list[tuple[int, float]] = []
        self.left: dict[str, Any] = {}
        self._held = 0
        self.proved = False  # whether the models have run several rows
        example = {k: v for k, v in example.items() if k in self.parameters}
        self.strategy, self.reason = self._check({**call}, example)
        if self.strategy == "whole":
            self.schedule = Schedule((0,), (0, 1), (sum(self.schedule.model_rows),), (None,), (None,), 1)
            warnings.warn(
                f"{type(pipe).__name__} cannot be stopped and resumed ({self.reason}): candidates are drawn as whole "
                "runs, so a search can choose between finished ones only",
                stacklevel=3,
            )

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within, models stay on the device between calls; at the end they go where the pipeline keeps them."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if getattr(self.pipe, "_all_hooks", None) and not self._held:
                self.pipe.maybe_free_model_hooks()

    def release(self) -> None:
        """After each call: forget what step caches hold of its rows, and let go of the device."""
        for module in self.modules.values():
            if hasattr(module, "_reset_stateful_cache"):
                module._reset_stateful_cache()
        if getattr(self.pipe, "_all_hooks", None) and not self._held:
            self.pipe.maybe_free_model_hooks()

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The models that run in the loop."""
        return {name: self.modules[name] for name in dict.fromkeys(call.name for call in self.schedule.models)}

    @property
    def together(self) -> bool:
        """Whether rows of a batch leave each other alone."""
        return self.strategy == "batch"

    def refuse_batch(self, error: NoBatch, call: dict[str, Any], example: dict[str, Any]) -> None:
        """After a model refused a batch: make it by repeating the prompt where that works, else rows run one by one."""
        if self.number and not self._fails_together(
            call, {k: v for k, v in example.items() if k in self.parameters}, None
        ):
            return
        self.strategy, self.reason = "rows", _first_line(f"a batch fails: {error}")
        self.number = next((n for n in COUNTS if n in self.parameters), None)
        self.layouts.clear()
        warnings.warn(
            f"{type(self.pipe).__name__} fails on a batch of rows ({self.reason}); they run one by one from now on",
            stacklevel=4,
        )

    def run(self, call: Mapping[str, Any], rng_start: Sequence[Tensor], **options: Any) -> _Run:
        """One call of the pipeline, or the part of it between two clocks; see :class:`_Run` for the options."""
        run = _Run(self, rng_start, **options)
        run.execute(dict(call))
        return run

    # --- the self-check ---

    def _check(self, call: dict[str, Any], example: dict[str, Any]) -> tuple[str, str]:
        second = _probe_streams()[1]
        try:
            run, call = self._explore(call, example, second)
        except _NoSteps:
            raise
        except Exception as error:
            self._whole(call, example, second, error)
            return "whole", f"its loop does not run with stand-ins: {type(error).__name__}: {error}"
        self.schedule = _schedule(run)
        if run.reading and not run.live:
            return "whole", "its models keep key/value caches between steps in a way that is not known here"
        number = next((n for n in COUNTS if n in self.parameters), None)
        reason = ""
        for name in (number, None) if number else (None,):
            reason = self._fails_together(call, example, name)
            if not reason:
                return "batch", ""
        self.layouts.clear()
        self.number = number
        marks = self._marks()
        try:
            alone = self._dry({**call, **example}, [second], marks=marks)
            if all(alone.ends_like(self._resumed(call, example, alone, m, 0), exact=True) for m in marks):
                return "rows", _first_line(reason)
            why = "a resumed row does not end where the uninterrupted one does"
        except Exception as error:
            why = f"resuming fails: {type(error).__name__}: {error}"
        return "whole", _first_line(why)

    def _fails_together(self, call: dict[str, Any], example: dict[str, Any], number: str | None) -> str:
        """Why rows of a batch that is made in one way do not end like single rows; empty if they do."""
        self.number, (first, second), marks = number, _probe_streams(), self._marks()
        rows = {**example, number: 2} if number else {k: batch([v, v]) for k, v in example.items() if v is not None}
        for rows_first in (False, True):
            self.layouts.clear()
            try:
                pair = self._dry({**call, **rows}, [first, second], learn=rows_first, marks=marks)
                alone = self._dry({**call, **example}, [second])
                resumed = [self._resumed(call, example, pair, m, 1) for m in marks]
            except Exception as error:  # pipelines that cannot take a batch fail in many ways
                return _first_line(f"a batch of two rows fails: {type(error).__name__}: {error}")
            if all(alone.ends_like(run) for run in resumed) and alone.ends_like(pair, row=1):
                return ""
            if all(layout.blocks == 1 for layout in self.layouts.values()):
                break
        return "a batch of rows does not end in the latents of its single rows"

    def _marks(self) -> list[int]:
        """Where the self-check resumes: after the first stage, half-way, and around the last loop's beginning."""
        schedule = self.schedule
        last_loop = max(schedule.between, default=0)
        within = next(end for end in schedule.ends if end > last_loop)
        marks = {schedule.ends[1], schedule.ends[schedule.stages // 2], last_loop, within}
        return sorted(m for m in marks if 0 < m < schedule.calls)

    def _explore(self, call: dict[str, Any], example: dict[str, Any], start: Tensor) -> tuple[_Run, dict[str, Any]]:
        """The first dry run, and the arguments with which it works: without decoding where the pipeline allows."""
        kinds = [{"output_type": "latent"}, {}] if "output_type" in self.parameters else [{}]
        failure: Exception | None = None
        for output_type, observe in itertools.product(kinds, (False, True)):
            try:
                run = self._dry({**call, **example, **output_type}, [start], observe=observe)
                if not run.slots:
                    raise _NoSteps(
                        f"{type(self.pipe).__name__} made no call of scheduler.step; check num_inference_steps"
                    )
                return run, {**call, **output_type}
            except Exception as error:
                failure = failure or error
        raise failure

    def _dry(self, call: Mapping[str, Any], rng_start: Sequence[Tensor], **options: Any) -> _Run:
        # later dry runs know the loop's end and need no decoding
        stop = None if self.schedule is None else self.schedule.calls
        return self.run(call, rng_start, dry=True, callbacks=False, stop=stop, **options)

    def _resumed(self, call: dict[str, Any], example: dict[str, Any], run: _Run, mark: int, row: int) -> _Run:
        state, streams = run.marked[mark]
        index = torch.tensor([row])
        return self._dry({**call, **example}, [run.rng_start[row]], state=state.select(index), rng=[streams[row]])

    def _whole(self, call: dict[str, Any], example: dict[str, Any], start: Tensor, error: Exception) -> None:
        """Count what a plain run costs, by one; a call that fails by itself raises its own error here."""
        begin = time.perf_counter()
        run = self.run({**call, **example}, [start], plain=True, callbacks=False)
        self.spent.append((run.spent, time.perf_counter() - begin))
        self.schedule = Schedule((0,), (0, 1), (run.spent,), (None,), (None,), 1)


def _probe_streams() -> list[Tensor]:
    return [torch.Generator().manual_seed(seed).get_state() for seed in range(2)]


class NoBatch(Exception):
    """A model that refused several rows before it ever ran them: the stand-ins take any."""


class _NoSteps(ValueError):
    """A call that never steps."""


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:200]


def batch(values: Sequence[Any]) -> Any:
    """Arguments of single prompts as the argument of a call for all of them."""
    return torch.cat(list(values)) if torch.is_tensor(values[0]) else list(values)


def _schedule(run: _Run) -> Schedule:
    order = getattr(run.first, "order", 1)
    passes = _passes(run.slots)
    ends = passes[order - 1 :: order]
    # a model that runs after one loop and before the next sets its timesteps belongs to neither
    models = tuple(
        ModelCall(clock, name, rows)
        for clock, loops, rows, name in run.seen
        if clock < len(run.slots) and loops == run.loop_of[clock]
    )
    return Schedule(
        slots=tuple(run.slots),
        ends=(0, *ends) if ends and ends[-1] == passes[-1] else (0, *ends, passes[-1]),
        model_rows=tuple(sum(call.rows for call in models if call.clock == c) for c in range(len(run.slots))),
        levels=tuple(run.levels),
        first_index=tuple(run.first_index),
        order=order,
        live=tuple(sorted(run.live)),
        models=models,
    )


def _stacked(batch: Any) -> Tensor | None:
    """A model's batch as one tensor, where its rows have one shape."""
    if torch.is_tensor(batch):
        return batch
    return torch.stack(list(batch)) if len({v.shape for v in batch}) == 1 else None


def _passes(slots: Sequence[int]) -> list[int]:
    """Clock after each pass of a loop in which each of its schedulers steps once, or of several loops in turn."""
    ends: list[int] = []
    current: set[int] = set()
    for clock, slot in enumerate(slots):
        if slot in current or (ends and slot not in slots[:clock]):
            ends.append(clock)
            current = set()
        current.add(slot)
    return [*ends, len(slots)]


class _Run:
    """One call of a pipeline under shadows.

    Args:
        replay: the pipeline and what is known of it.
        rng_start: per row, the state of its random stream when the call begins.
        rng: per row, its state at the resume point; default: wherever the call has brought it.
        ambient: state of torch's global stream when the call begins; it is left as it was found.
        device: of the random streams.
        state: what :meth:`capture` recorded at the resume point, or ``None`` to run from the beginning.
        stop: clock at which to leave, 0 for right before the loop, or ``None`` to finish and return an output.
        transition: the step to take; the scheduler's own by default.
        cache: step cache that answers some model calls.
        meter: told about real model calls and encodes.
        callbacks: whether the user's step callback hears of live steps.
        plain: let everything run for real and only count: a whole run.
        dry: stand-ins instead of all model calls.
        observe: in a dry run, find the shapes of each model's output by the model itself.
        learn: in a dry run of several rows, find where steps keep rows; whether a row's entries are neighbours.
        marks: clocks at which to record what :meth:`capture` gives, in ``marked``, and to go on.
        events: clock -> function of what :meth:`capture` gives and the streams; the loop goes on with what it returns.
        decode: answers calls of the components' ``decode`` after the loop.
    """

    def __init__(
        self,
        replay: Replay,
        rng_start: Sequence[Tensor],
        *,
        rng: Sequence[Tensor] | None = None,
        ambient: Tensor | None = None,
        device: str = "cpu",
        state: RowState | None = None,
        stop: int | None = None,
        transition: Transition | None = None,
        cache: StepCache | HookCache | None = None,
        meter: Meter | None = None,
        callbacks: bool = True,
        plain: bool = False,
        dry: bool = False,
        observe: bool = False,
        learn: bool | None = None,
        marks: Sequence[int] = (),
        events: Mapping[int, Callable[[RowState, list[Tensor]], tuple[RowState, Sequence[Tensor]]]] | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.replay, self.rng_start, self.rng, self.state, self.stop = replay, rng_start, rng, state, stop
        self.transition, self.cache, self.callbacks, self.plain = transition or Ode(), cache, callbacks, plain
        self.dry, self.observe, self.learn, self.marks = dry, observe, learn, marks
        self.events, self.decode = events or {}, decode
        self.meter = NullMeter() if meter is None else meter
        self.rows = len(rng_start)
        self.seeded = "generator" in replay.parameters
        # a pipeline that takes no generator draws from the global stream, which is the row's for the time of the call
        self.generators = [torch.Generator(device) if self.seeded else torch.default_generator for _ in rng_start]
        self.ambient = _ambient(rng_start[0]) if ambient is None else ambient
        self.begin = 0 if state is None else int(state.fields["clock"])
        self.noise = None if state is None or self.begin else state.tensors.get("noise")

        self.active = True
        self.drew = False
        self.drawn: Tensor | None = None  # initial noise, as the pipeline's first draw gave it
        self.clock = 0
        self.timed = False  # set_timesteps was called
        self.entered = False  # the loop has begun
        self.described: list[Any] = []  # of each prompt, what encode_prompt gave
        self.slots: list[int] = []
        self.owners: list[tuple[Any, torch.Size]] = []  # slot -> scheduler and shape of its samples
        self.first: Any = None  # scheduler that stepped first
        self.fresh: dict[int, dict[str, Any]] = {}  # slot -> its fields before stepping
        self.sample: Tensor | None = None  # that the latest step was given
        self.last: dict[int, tuple[dict[str, Tensor], Tensor | None]] = {}  # slot -> outputs and x0 of its last call
        self.loops = 0  # calls of set_timesteps
        self.loop_of: list[int] = []  # the same at each step
        self.seen: list[tuple[int, int, int, str]] = []  # of each model call of a dry run: clock, loops, rows, model
        self.reuse: Reuse | None = None
        if isinstance(cache, StepCache):
            self.reuse = Reuse(cache, replay.schedule.ends, self.rows, replay.rows_first)
        self.live: set[int] = set()  # clocks at which a model fills a cache
        self.reading: set[int] = set()  # clocks at which a model is given a cache
        self.attributes: dict[str, Any] = {} if state is None else dict(state.fields.get("attributes", {}))
        self.spent = 0  # model rows that ran
        self.shares = 0.0  # of model rows, that a cache of diffusers left to compute
        self.marked: dict[int, tuple[RowState, list[Tensor]]] = {}
        self.ended: dict[int, list[Tensor]] = {}  # slot -> streams when its loop ended
        self.levels: list[list[Level] | None] = []
        self.first_index: list[int | None] = []
        self.output: Any = None
        self.captured: RowState | None = None

    # --- the call ---

    def execute(self, call: dict[str, Any]) -> None:
        """Call the pipeline; afterwards ``output`` or ``captured`` is set, and ``rng`` says where the streams are."""
        pipe = self.replay.pipe
        if self.seeded:
            call["generator"] = self.generators if self.rows > 1 else self.generators[0]
        self._guard_callback(call)
        with ExitStack() as stack:
            stack.enter_context(_global_stream(self.ambient if self.seeded else None))
            for generator, start in zip(self.generators, self.rng_start, strict=True):
                generator.set_state(start.cpu().clone())  # torch crashes on a view that does not begin its storage
            # last to be undone: with model offload it takes hooks off and puts them on again
            stack.callback(self.replay.release)
            # offload hooks are renewed by that call, also inside the pipeline's own code
            stack.enter_context(_unchanged(pipe, but=("_all_hooks", "_offload")))
            if isinstance(self.cache, HookCache):
                stack.enter_context(self.cache.enabled(self.replay.denoisers))
            for changing in (*self.replay.schedulers, *self.replay.guiders.values()):
                stack.enter_context(_unchanged(changing))
            for shadow in self._shadows():
                stack.enter_context(_attribute(shadow.owner, shadow.name, shadow))
            stack.enter_context(self._prepared_noise())
            before = dict(vars(pipe))
            try:
                self.output = pipe(**call)
                if self.stop is not None and self.captured is None and self.slots:
                    self.clock = self.stop  # interrupted by a callback: the sample stays what it is
                    self.captured = self.capture()
                self.replay.left = {k: v for k, v in vars(pipe).items() if before.get(k, _ABSENT) is not v}
            except _Stop:
                pass
            finally:
                self.active = False
            self.rng = [g.get_state() for g in self.generators]

    def _shadows(self) -> list[_Shadow]:
        pipe = self.replay.pipe
        made = [_Shadow(pipe, "progress_bar", self._bar), _Shadow(pipe, "maybe_free_model_hooks", lambda _: None)]
        if hasattr(pipe, "encode_prompt"):
            made.append(_Shadow(pipe, "encode_prompt", self._encode))
        for scheduler in self.replay.schedulers:
            made += [_Shadow(scheduler, "step", self._step), _Shadow(scheduler, "set_timesteps", self._set_timesteps)]
        for name, module in self.replay.modules.items():
            made.append(_Shadow(module, "forward", functools.partial(self._forward, name)))
            if hasattr(module, "encode") and hasattr(module, "decode"):
                made.append(_Shadow(module, "encode", functools.partial(self._once, name)))
                if self.decode is not None:
                    made.append(_Shadow(module, "decode", functools.partial(self._decode, name)))
        return made

    def _guard_callback(self, call: dict[str, Any]) -> None:
        older = call.get("callback")
        if older is not None and "callback_steps" in self.replay.parameters:

            def live_older(*args: Any) -> Any:
                return older(*args) if self.clock >= self.begin and self.callbacks else None

            call["callback"] = live_older
        callback = call.get("callback_on_step_end")
        if callback is None:
            return
        setting = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
        if setting:
            call["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

        def live(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # the call at the resume point is due: stopping there left the loop before the callback
            if self.clock >= self.begin and (self.callbacks or setting):
                before = dict(vars(pipe))
                made = callback(pipe, step, timestep, tensors)
                # what it sets on the pipeline (guidance, interrupt) holds for the steps to come, also when resumed
                self.attributes |= {
                    k: v
                    for k, v in vars(pipe).items()
                    if before.get(k, _ABSENT) is not v and isinstance(v, (bool, int, float, str))
                }
                return made
            if setting:
                # diffusers' own callbacks set the loop up for later steps (guidance off), so they also hear of stubs
                return {k: v for k, v in callback(pipe, step, timestep, tensors).items() if k != "latents"}
            return {}

        call["callback_on_step_end"] = live

    def _bar(self, shadow: _Shadow, iterable: Any = None, total: int | None = None, **_: Any) -> tqdm:
        if self.timed:
            self._enter()
        return tqdm(iterable, total=total, disable=True)

    def _enter(self) -> None:
        """The pipeline is about to loop: its latents and timesteps are made."""
        if self.entered:
            return
        self.entered = True
        if self.begin == 0 and self.rng is not None:
            self._set_streams()
        if self.stop == 0:
            raise _Stop

    def _set_streams(self, states: Sequence[Tensor] | None = None) -> None:
        for generator, state in zip(self.generators, self.rng if states is None else states, strict=True):
            generator.set_state(state.cpu().clone())

    # --- noise ---

    @contextmanager
    def _prepared_noise(self) -> Iterator[None]:
        """Record the first draw of ``prepare_latents``, or replace it by the noise given."""
        pipe = self.replay.pipe
        own = getattr(type(pipe), "prepare_latents", None)
        if not isinstance(own, types.FunctionType) or "prepare_latents" in vars(pipe):
            yield
            return
        # a copy of the function that sees another randn_tensor: the module's own stays as it is for everyone else
        copy = types.FunctionType(
            own.__code__,
            own.__globals__ | {"randn_tensor": self._draw},
            own.__name__,
            own.__defaults__,
            own.__closure__,
        )
        copy.__kwdefaults__ = own.__kwdefaults__
        with _attribute(pipe, "prepare_latents", types.MethodType(copy, pipe)):
            yield

    def _draw(self, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        made = randn_tensor(shape, *args, **kwargs)  # also when replaced: the streams must move as in a plain call
        # only a first draw with a row axis is the noise of the rows; some pipelines draw sample by sample
        if not self.drew and made.ndim and made.shape[0] == self.rows:
            if self.noise is not None:
                if self.noise.shape != made.shape:
                    raise ValueError(f"noise has shape {tuple(self.noise.shape)}; this call draws {tuple(made.shape)}")
                made = self.noise.to(made).clone()  # some pipelines write into their latents
            self.drawn = made.clone()
        self.drew = True
        return made

    def _encode(self, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return shadow.__wrapped__(*args, **kwargs)
        result, described = self.replay.prompts.encode(shadow.__wrapped__, args, kwargs, self.rows, self.meter)
        self.described += described
        return result

    # --- models ---

    def _once(self, name: str, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        """A model outside the loop (image encoders, the VAE's encoder): each input goes through it once a request."""
        real = shadow.__wrapped__
        if shadow.owner.training or not self.active:
            return real(*args, **kwargs)
        return self.replay.memo.call((name, shadow.name), real, args, kwargs, self.meter)

    def _decode(self, name: str, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        real = shadow.__wrapped__
        over = self.clock >= self.replay.schedule.calls
        return self.decode(name, real, args, kwargs) if self.active and over else real(*args, **kwargs)

    def _forward(self, name: str, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        real, replay = shadow.__wrapped__, self.replay
        if not self.active:
            return real(*args, **kwargs)
        if replay.prompts.encoding:
            return replay.prompts.encoder(name, real, args, kwargs)
        if not self.entered and self.timed and not replay.has_bar:
            self._enter()
        schedule = replay.schedule
        resting = schedule is not None and self.clock in schedule.between and self.loops == self.loop_of[-1]
        if not self.entered or resting:
            return self._once(name, shadow, *args, **kwargs)
        if schedule is not None and self.clock >= schedule.calls and not self.plain:
            return real(*args, **kwargs)
        batch, rows = rows_of(args, kwargs)
        if self.dry:
            return self._stand_in(name, shadow, batch, rows, args, kwargs)
        filling = schedule is not None and self.clock in schedule.live and self.begin < schedule.calls
        if self.clock < self.begin and not filling:
            return replay.stubs.zeros(name, shadow.owner, batch, rows, kwargs)
        key, skipped, listed = "", False, not torch.is_tensor(batch)
        if self.reuse is not None:
            key, skipped = self.reuse.begin(name, self.clock, batch, rows)
        if skipped:
            self.meter.skipped(rows)
            return self.reuse.recall(key, name, replay.stubs.zeros(name, shadow.owner, batch, rows, kwargs), listed)
        begin, part = time.perf_counter(), 1.0
        try:
            if isinstance(self.cache, HookCache):
                output, part = self.cache.run(name, rows, real, args, kwargs)
            else:
                output = real(*args, **kwargs)
        except Exception as error:
            if self.rows > 1 and not replay.proved and not isinstance(error, torch.OutOfMemoryError):
                raise NoBatch(f"{type(error).__name__}: {error}") from error
            raise
        seconds = time.perf_counter() - begin
        if self.reuse is not None:
            self.reuse.keep(key, name, output, listed)
        replay.proved = replay.proved or self.rows > 1
        self.shares += part * rows
        ran = round(self.shares) - self.spent  # of calls that ran in part, whole rows as they add up
        self.spent += ran
        if ran < rows:
            self.meter.skipped(rows - ran)
        share = part * rows / sum(schedule.model_rows) if schedule is not None else 0.0
        self.meter.forward(ran, seconds, "denoiser", share)
        return output

    def _stand_in(self, name: str, shadow: _Shadow, batch: Any, rows: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        stubs, clock = self.replay.stubs, self.clock
        self.seen.append((clock, self.loops, rows, name))
        if self.observe:
            spent = stubs.observe(name, shadow.__wrapped__, args, kwargs, rows)
            if spent is not None:
                self.replay.spent.append(spent)
        use = stubs.cache_use(name, kwargs)
        if use is not None:
            (self.live if use == "fills" else self.reading).add(clock)
        if clock < self.begin:
            return stubs.zeros(name, shadow.owner, batch, rows, kwargs)
        if self.replay.schedule is None:
            stubs.measure(name, args, kwargs)
            self.replay.inputs.setdefault(name, _stacked(batch))
        elif self.learn is not None:
            stubs.compare(name, args, kwargs, self.rows)
            self._compare_entries(name, _stacked(batch))
        return stubs.mixed(name, shadow.owner, batch, rows, args, kwargs)

    def _compare_entries(self, name: str, together: Tensor | None) -> None:
        """Find where a batch of two rows keeps the entries of the second, which is the row that ran alone."""
        alone = self.replay.inputs.get(name)
        first = sum(seen == name for *_, seen in self.seen) == 1
        if not first or alone is None or together is None or len(together) != 2 * len(alone):
            return
        for rows_first, entries in ((True, together[len(alone) :]), (False, together[1::2])):
            if torch.equal(entries, alone):
                self.replay.rows_first[name] = rows_first

    # --- schedulers ---

    def _set_timesteps(self, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            self.timed = True
            self.loops += 1
            for slot, (owner, _) in enumerate(self.owners):
                if owner is shadow.owner:
                    # its loop is over; what it steps next is another (chunks of a video)
                    self.owners[slot] = None, torch.Size()
        return shadow.__wrapped__(*args, **kwargs)

    def _slot(self, scheduler: Any, shape: torch.Size) -> int:
        for slot, known in enumerate(self.owners):
            if known == (scheduler, shape):
                return slot
        self.owners.append((scheduler, shape))
        return len(self.owners) - 1

    def _step(self, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        scheduler, real = shadow.owner, shadow.__wrapped__
        if not self.active:
            return real(*args, **kwargs)
        self.entered = True
        if self.plain:
            self.clock += 1
            return real(*args, **kwargs)
        bound = _signature(real).bind(*args, **kwargs)
        sample = bound.arguments["sample"]
        slot = self._slot(scheduler, sample.shape if torch.is_tensor(sample) else torch.Size())
        call = self.slots.count(slot)
        if self.first is None:
            self.first = scheduler
        if slot not in self.fresh:
            self.fresh[slot] = {
                k: clone_tree(v) for k, v in vars(scheduler).items() if k not in ("step", "set_timesteps")
            }
            self._learn(scheduler, bound.arguments["timestep"])
        self.slots.append(slot)
        self.loop_of.append(self.loops)
        self.clock += 1
        if self.clock <= self.begin:
            values = self._recorded(slot)
            ended = self.state.tensors.get(f"ended.{slot}")
            if ended is not None and self.clock < self.begin and self.clock in self.replay.schedule.between:
                self._set_streams(ended)
            if self.clock == self.begin:
                self._resume()
        else:
            values = self._live_step(scheduler, real, bound, slot, call)
            if self.replay.schedule is not None and self.clock in self.replay.schedule.between:
                self.ended[slot] = [g.get_state() for g in self.generators]
        if self.clock in self.events and self.clock > self.begin:
            values = self._exchange(slot)
        if self.clock in self.marks:
            self.marked[self.clock] = self.capture(), [g.get_state() for g in self.generators]
        if self.clock == self.stop:
            self.captured = self.capture()
            raise _Stop
        if bound.arguments.get("return_dict", "return_dict" in bound.signature.parameters):
            return namedtuple("SchedulerOutput", values)(**values)
        return tuple(values.values())

    def _learn(self, scheduler: Any, timestep: Any) -> None:
        """Levels of a scheduler that is called for the first time."""
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        if index is None:
            match = (scheduler.timesteps.cpu() == torch.as_tensor(timestep).flatten()[0].cpu()).nonzero()
            index = int(match[0]) if len(match) else 0
        levels = noise_levels(scheduler)
        self.levels.append(None if levels is None else levels[index:])
        self.first_index.append(index if hasattr(scheduler, "_step_index") else None)

    def _live_step(
        self, scheduler: Any, real: Callable, bound: inspect.BoundArguments, slot: int, call: int
    ) -> dict[str, Tensor]:
        arguments, known = bound.arguments, bound.signature.parameters
        sample, output = arguments["sample"], arguments["model_output"]
        returns_dict = arguments.get("return_dict", True)
        if "return_dict" in known:
            arguments["return_dict"] = True
        if "generator" in known and arguments.get("generator") is None:
            # flow pipelines pass none, and a stochastic scheduler would draw from the global stream
            arguments["generator"] = self.generators if self.rows > 1 else self.generators[0]
        result = real(*bound.args, **bound.kwargs)
        arguments["return_dict"] = returns_dict
        if isinstance(result, Mapping):
            values = {k: v for k, v in result.items() if v is not None}
        else:
            values = {"prev_sample" if i == 0 else f"extra_{i}": v for i, v in enumerate(result)}
        levels = self.levels[slot]
        x0 = values.get("pred_original_sample") if isinstance(result, Mapping) else None
        if x0 is None and levels is not None and torch.is_tensor(output) and output.shape == sample.shape:
            x0 = predict(prediction_type(scheduler), output.float(), sample.float(), levels[call]).to(sample.dtype)
        if not isinstance(self.transition, Ode):
            moved = self._transit(sample, x0, levels[call], levels[call + 1], call)
            values["prev_sample"] = moved.to(values["prev_sample"])
        self._locate(slot, values)
        self.last[slot], self.sample = (values, x0), sample
        return values

    def _locate(self, slot: int, values: Mapping[str, Any]) -> None:
        """Find where a step's tensors keep their rows."""
        if not self.dry or self.clock <= self.begin:
            return
        for name, value in values.items():
            if not torch.is_tensor(value):
                continue
            if self.rows == 1:
                self.replay.shapes.setdefault((slot, name), value.shape)
            elif self.learn is not None and (slot, name) not in self.replay.layouts:
                alone = self.replay.shapes[slot, name]
                self.replay.layouts[slot, name] = _layout(alone, value.shape, self.rows, self.learn)

    def _layout_of(self, slot: int, name: str, value: Tensor) -> Layout:
        known = self.replay.layouts.get((slot, name))
        return Layout(0, value.shape[0] // self.rows) if known is None else known

    def _transit(self, sample: Tensor, x0: Tensor, now: Level, after: Level, stage: int) -> Tensor:
        x, noise = sample.float(), torch.zeros(())  # a step that ends clean draws none
        if after.sigma > 0:
            noise = randn_tensor(x.shape, generator=self.generators, device=x.device, dtype=x.dtype)
        return transit(self.transition, x, x0.float(), noise, now, after, stage)

    def _recorded(self, slot: int) -> dict[str, Any]:
        kept = self.state.fields["outputs"][str(slot)]
        layouts = {name: Layout(*layout) for name, layout in kept["layouts"].items()}
        return {
            name: layouts[name].join(self.state.tensors[f"out.{slot}.{name}"]).clone() if name in layouts else value
            for name, value in kept["values"].items()
        }

    def _exchange(self, slot: int) -> dict[str, Any]:
        """Go on with other rows, as many as there are, without leaving the loop."""
        state, streams = self.capture(), [g.get_state() for g in self.generators]
        self.active = False  # the event may use the pipeline, to decode previews
        try:
            self.state, self.rng = self.events[self.clock](state, streams)
        finally:
            self.active = True
        self._resume()
        values, x0 = self._recorded(slot), self.state.tensors.get(f"x0.{slot}")
        self.last[slot] = values, None if x0 is None else self._layout_of(slot, "prev_sample", x0).join(x0)
        return values

    def _resume(self) -> None:
        """Put fields, guidance momentum and streams in, before the loop's next ``scale_model_input`` reads them."""
        vars(self.replay.pipe).update(self.attributes)
        for slot, saved in self.state.fields.get("schedulers", {}).items():
            layout, tensors = Layout(*saved["layout"]), self.state.tensors
            fields = {k: _unpack(v, layout, tensors) for k, v in saved["fields"].items()}
            vars(self.owners[int(slot)][0]).update(fields)
        for name, guider in self.replay.guiders.items():
            if guider.momentum_buffer is not None:
                average = self.state.tensors.get(f"guider.{name}")
                guider.momentum_buffer.running_average = 0 if average is None else average.clone()
        if self.reuse is not None:
            self.reuse.load(self.state)
        if self.rng is not None:
            self._set_streams()

    def capture(self) -> RowState:
        """Everything that a later run needs to go on from here; without scheduler fields once the loop is over."""
        tensors: dict[str, Tensor] = {}
        axes: dict[str, int | None] = {}
        fields: dict[str, Any] = {"clock": self.clock, "outputs": {}}
        if self.attributes:
            fields["attributes"] = dict(self.attributes)
        over = self.replay.schedule is not None and self.clock == self.replay.schedule.calls
        schedulers = {}

        def put(name: str, value: Tensor, layout: Layout) -> None:
            tensors[name], axes[name] = layout.split(value, self.rows).detach(), layout.row_axis

        for slot, (owner, _) in enumerate(self.owners):
            live = slot in self.last
            values, x0 = self.last[slot] if live else (self._recorded(slot), None)
            layouts = {n: self._layout_of(slot, n, v) for n, v in values.items() if torch.is_tensor(v)}
            plain = {n: None if n in layouts else v for n, v in values.items()}
            fields["outputs"][str(slot)] = {"values": plain, "layouts": {n: list(v) for n, v in layouts.items()}}
            for name, layout in layouts.items():
                put(f"out.{slot}.{name}", values[name], layout)
            streams = self.ended.get(slot)
            if streams is not None:
                tensors[f"ended.{slot}"] = torch.stack(streams)
            elif self.state is not None and f"ended.{slot}" in self.state.tensors:
                tensors[f"ended.{slot}"] = self.state.tensors[f"ended.{slot}"]
            if over or owner is None:
                continue
            layout = layouts["prev_sample"]
            if x0 is not None:
                put(f"x0.{slot}", x0, layout)
            elif not live and f"x0.{slot}" in self.state.tensors:
                tensors[f"x0.{slot}"], axes[f"x0.{slot}"] = self.state.tensors[f"x0.{slot}"], layout.row_axis
            fresh = self.fresh[slot]
            changed = {
                k: v
                for k, v in vars(owner).items()
                if k not in ("step", "set_timesteps") and not (k in fresh and _same(fresh[k], v))
            }
            if live and slot == self.slots[-1]:
                # a sample that is a view (one frame of a video) is overwritten with what the step gives
                sample = self.sample
                held = sample.untyped_storage().nbytes() > sample.numel() * sample.element_size()
                for k, v in changed.items():
                    if held and torch.is_tensor(v) and v.data_ptr() == sample.data_ptr() and v.shape == sample.shape:
                        changed[k] = values["prev_sample"].to(v)
            packed = {
                k: _pack(v, f"scheduler.{slot}.{k}", self.rows, layout, tensors, axes) for k, v in changed.items()
            }
            schedulers[str(slot)] = {"layout": list(layout), "fields": packed}
        if not over:
            fields["schedulers"] = schedulers
            if self.reuse is not None:
                tensors |= self.reuse.tensors
            for name, guider in self.replay.guiders.items():
                average = getattr(guider.momentum_buffer, "running_average", None)
                if torch.is_tensor(average):
                    tensors[f"guider.{name}"] = average.detach()
        tensors["rng_start"] = torch.stack(list(self.rng_start))
        return RowState(tensors, dict.fromkeys(tensors, 0) | axes, fields)

    def ends_like(self, other: _Run, row: int | None = None, exact: bool = False) -> bool:
        """Whether another run (or a row of it) gave the same last samples, up to what kernels of other shapes differ.

        Args:
            other: a run of one row, or of several.
            row: which of several.
            exact: the runs had equal shapes, so no bit may differ.
        """
        if not other.last or max(other.last) != max(self.last):
            return False
        for slot, (values, _) in other.last.items():  # a run that was resumed in a later loop has no steps of earlier
            mine, theirs = self.last[slot][0]["prev_sample"], values["prev_sample"]
            if row is not None:
                layout = self.replay.layouts[slot, "prev_sample"]
                index = torch.tensor([row], device=theirs.device)
                theirs = layout.join(layout.split(theirs, other.rows).index_select(layout.row_axis, index))
            if mine.shape != theirs.shape:
                return False
            scale = float(mine.float().abs().nan_to_num(posinf=0, neginf=0).max()) if mine.numel() else 0.0
            limits = {"atol": 0.0, "rtol": 0.0} if exact else {"atol": 1e-4 * scale, "rtol": 1e-4}
            if not torch.allclose(mine.float(), theirs.float(), equal_nan=True, **limits):
                return False
        ends = other.rng if row is None else [other.rng[row]]
        return all(torch.equal(a, b) for a, b in zip(self.rng, ends, strict=True))
