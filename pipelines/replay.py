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
import time
import types
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from tqdm.auto import tqdm

from visearch.pipelines.flow import Level, eta_step, noise_levels, predict, prediction_type, sde_step
from visearch.pipelines.prompts import COUNTS, PromptCache, map_tree
from visearch.protocols import EtaStep, Meter, NullMeter, RowState, Sde, Transition

__all__ = ["Replay", "Schedule"]

_ABSENT = object()


class _Stop(BaseException):
    """Leaves a pipeline's loop. Not an Exception, so that no handler inside a pipeline swallows it."""


class _Shadow:
    """Stands in for a bound method as an instance attribute, and follows its owner through ``copy.deepcopy``.

    Some pipelines deep-copy their scheduler inside the call; the copy's shadow belongs to the copy.
    """

    def __init__(self, owner: Any, name: str, function: Callable, real: Callable | None = None) -> None:
        self.owner, self.name, self.function = owner, name, function
        # pipelines inspect the signature of step and set_timesteps
        self.__wrapped__ = getattr(owner, name) if real is None else real

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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


# --- trees of tensors -------------------------------------------------------------------------------------------


def _clone(value: Any) -> Any:
    """A copy whose tensors and containers are its own; other leaves are shared."""
    return map_tree(lambda v: v.clone() if torch.is_tensor(v) else v, value)


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
    return type(a) is type(b) and bool(a == b)


def _rows_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, int]:
    """The batch that a model is called with, and its number of rows."""
    named = [kwargs[k] for k in ("hidden_states", "sample", "x") if k in kwargs]
    for value in (*args, *named, *kwargs.values()):
        if torch.is_tensor(value) and value.ndim:
            return value, value.shape[0]
        if isinstance(value, (list, tuple)) and value and torch.is_tensor(value[0]):
            return value, len(value)
    raise TypeError("a denoiser was called without a tensor; cannot tell how many rows it ran")


# --- scheduler fields <-> RowState ------------------------------------------------------------------------------


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
            return type(value)(map(fit, value))
        if isinstance(value, dict):
            made = {k: fit(v) for k, v in value.items()}
            return made if type(value) is dict else type(value)(**made)
        return value

    return fit(shapes)


def _pack(value: Any, name: str, rows: int, tensors: dict[str, Tensor], axes: dict[str, int | None]) -> Any:
    """JSON form of a scheduler field; its tensors move to ``tensors`` under ``name``, history by row on axis 0."""
    if torch.is_tensor(value):
        tensors[name], axes[name] = value.clone(), 0 if value.ndim > 1 and value.shape[0] == rows else None
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return [_pack(v, f"{name}.{i}", rows, tensors, axes) for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"scheduler field {name} holds a {type(value).__name__}, which cannot be saved; expected a tensor, "
        "number, string or list of them"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        return tensors[value["tensor"]].clone()
    return [_unpack(v, tensors) for v in value] if isinstance(value, list) else value


# --- what is known of a pipeline --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """What a dry run tells about a pipeline's loop.

    Args:
        slots: per call of ``step``, which scheduler object was called.
        ends: clock at the end of each stage, from stage 0; one stage is one pass of the loop, or two for schedulers
            of order 2, whose full step takes two model calls.
        model_rows: per clock, model rows that one candidate costs in the loop's pass before that call.
        levels: per slot, the levels before each of its calls and after the last, or ``None`` where unknown.
        first_index: per slot, the ``_step_index`` at its first call, or ``None`` where the scheduler has none.
        order: of the first scheduler.
    """

    slots: tuple[int, ...]
    ends: tuple[int, ...]
    model_rows: tuple[int, ...]
    levels: tuple[list[Level] | None, ...]
    first_index: tuple[int | None, ...]
    order: int

    @property
    def calls(self) -> int:
        return len(self.slots)

    @property
    def stages(self) -> int:
        return len(self.ends) - 1

    def nfe(self, start: int, stop: int) -> int:
        """Model rows that one candidate costs from one stage to another."""
        return sum(self.model_rows[self.ends[start] : self.ends[stop]])

    def level(self, clock: int, slot: int = 0) -> Level | None:
        """Level of a slot's sample at a clock."""
        levels = self.levels[slot]
        return None if levels is None else levels[self.slots[:clock].count(slot)]


class Replay:
    """Runs parts of one pipeline's loop.

    Args:
        pipe: any diffusers pipeline whose ``__call__`` loops over ``scheduler.step``.
        call: keyword arguments of a call that hold for all rows, without generator and number of images.
        example: keyword arguments that hold for one prompt, for the dry runs.

    Attributes:
        schedule: the loop's stages and what they cost.
        number: the argument that sets images or videos a prompt, or ``None`` where the call does not honour it: some
            pipelines take it and set it to 1, so their batch is made by repeating the prompt.
        together: whether rows of a batch leave each other alone. Some image-conditioned pipelines refuse batches, or
            draw what all rows share from the first row's generator: there, rows have to run one by one.

    Raises:
        ValueError: the pipeline has no scheduler, or its call makes no step.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], example: Mapping[str, Any]) -> None:
        self.pipe = pipe
        components = pipe.components
        self.modules = {k: m for k, m in components.items() if isinstance(m, nn.Module)}
        self.schedulers = [s for s in components.values() if hasattr(s, "step") and hasattr(s, "set_timesteps")]
        if not self.schedulers:
            raise ValueError(
                f"{type(pipe).__name__} has no scheduler with step and set_timesteps; it cannot be replayed"
            )
        self.guiders = {k: c for k, c in components.items() if hasattr(c, "momentum_buffer")}
        if any(getattr(m, "is_cache_enabled", False) for m in self.modules.values()):
            warnings.warn(
                "a step cache is enabled: it decides for all rows of a batch at once and starts cold when a row is "
                "resumed, so results depend on the search's path; call disable_cache() for exact replay",
                stacklevel=3,
            )
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        names = inspect.unwrap(type(pipe).__call__).__code__.co_names
        self.has_bar = "progress_bar" in names
        self.prompts = PromptCache()
        self.outputs: dict[str, tuple[int, Any]] = {}  # module -> rows and shapes of a real output
        self.schedule: Schedule | None = None
        first, second = (torch.Generator().manual_seed(seed).get_state() for seed in range(2))
        alone = self._dry_run({**call, **example}, [second])
        self.schedule = _schedule(alone)
        number = next((n for n in COUNTS if n in self.parameters), None)
        repeated = {k: batch([v, v]) for k, v in example.items() if v is not None}
        ways = [(number, {**example, number: 2})] if number else []
        self.number, self.together = number, False
        for name, rows in [*ways, (None, repeated)]:
            if self._independent({**call, **rows}, [first, second], alone):
                self.number, self.together = name, True
                break

    def run(self, call: Mapping[str, Any], rng_start: Sequence[Tensor], **options: Any) -> _Run:
        """One call of the pipeline, or the part of it between two clocks; see :class:`_Run` for the options."""
        run = _Run(self, rng_start, **options)
        run.execute(dict(call))
        return run

    def _dry_run(self, call: Mapping[str, Any], rng_start: Sequence[Tensor]) -> _Run:
        if "output_type" in self.parameters:
            call = {**call, "output_type": "latent"}
        try:
            return self.run(call, rng_start, dry=True, callbacks=False)
        except Exception:
            # a denoiser whose output is not shaped like its input: let each run once and copy the shapes
            return self.run(call, rng_start, dry=True, observe=True, callbacks=False)

    def _independent(self, call: Mapping[str, Any], rng_start: Sequence[Tensor], alone: _Run) -> bool:
        """Whether the second of two rows draws as it does alone."""
        try:
            run = self._dry_run(call, rng_start)
        except Exception:  # pipelines that cannot take a batch fail in many ways
            return False
        noise = alone.drawn is None or torch.equal(run.drawn[1:], alone.drawn)
        return noise and torch.equal(run.rng[1], alone.rng[0])


def batch(values: Sequence[Any]) -> Any:
    """Arguments of single prompts as the argument of a call for all of them."""
    return torch.cat(list(values)) if torch.is_tensor(values[0]) else list(values)


def _schedule(run: _Run) -> Schedule:
    name = type(run.replay.pipe).__name__
    if not run.slots:
        raise ValueError(f"{name} made no call of scheduler.step; check num_inference_steps")
    order = getattr(run.owners[0], "order", 1)
    passes = _passes(run.slots)
    ends = passes[order - 1 :: order]
    return Schedule(
        slots=tuple(run.slots),
        ends=(0, *ends) if ends and ends[-1] == passes[-1] else (0, *ends, passes[-1]),
        model_rows=tuple(run.model_rows.get(c, 0) for c in range(len(run.slots))),
        levels=tuple(run.levels),
        first_index=tuple(run.first_index),
        order=order,
    )


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
        device: of the random streams.
        state: what :meth:`capture` recorded at the resume point, or ``None`` to run from the beginning.
        stop: clock at which to leave, 0 for right before the loop, or ``None`` to finish and return an output.
        transition: stochastic step to take instead of the scheduler's own.
        meter: told about real model calls and encodes.
        callbacks: whether the user's step callback hears of live steps.
        dry: stub all model calls.
        observe: in a dry run, make each model's first call real and remember its output's shapes.
    """

    def __init__(
        self,
        replay: Replay,
        rng_start: Sequence[Tensor],
        *,
        rng: Sequence[Tensor] | None = None,
        device: str = "cpu",
        state: RowState | None = None,
        stop: int | None = None,
        transition: Transition | None = None,
        meter: Meter | None = None,
        callbacks: bool = True,
        dry: bool = False,
        observe: bool = False,
    ) -> None:
        self.replay, self.rng_start, self.rng, self.state, self.stop = replay, rng_start, rng, state, stop
        self.transition, self.callbacks, self.dry, self.observe = transition, callbacks, dry, observe
        self.meter = NullMeter() if meter is None else meter
        self.rows = len(rng_start)
        self.generators = [torch.Generator(device) for _ in rng_start]
        for generator, start in zip(self.generators, rng_start, strict=True):
            generator.set_state(start.cpu().clone())  # torch crashes on a view that does not begin its storage
        self.begin = 0 if state is None else int(state.fields["clock"])
        self.noise = None if state is None or self.begin else state.tensors.get("noise")

        self.active = True
        self.drawn: Tensor | None = None  # initial noise, as the pipeline's first draw gave it
        self.clock = 0
        self.timed = False  # set_timesteps was called
        self.entered = False  # the loop has begun
        self.described: list[Any] = []  # of each prompt, what encode_prompt gave
        self.slots: list[int] = []
        self.owners: list[Any] = []  # slot -> scheduler
        self.fresh: dict[int, dict[str, Any]] = {}  # slot -> its fields before stepping
        self.last: dict[int, tuple[dict[str, Tensor], Tensor | None]] = {}  # slot -> outputs and x0 of its last call
        self.model_rows: dict[int, int] = {}
        self.levels: list[list[Level] | None] = []
        self.first_index: list[int | None] = []
        self.output: Any = None
        self.captured: RowState | None = None

    # --- the call ---

    def execute(self, call: dict[str, Any]) -> None:
        """Call the pipeline; afterwards ``output`` or ``captured`` is set, and ``rng`` says where the streams are."""
        pipe, parameters = self.replay.pipe, self.replay.parameters
        if "generator" in parameters:
            call["generator"] = self.generators
        self._guard_callback(call)
        with ExitStack() as stack:
            # last to be undone: with model offload it takes hooks off and puts them on again
            stack.callback(pipe.maybe_free_model_hooks)
            # offload hooks are renewed by that call, also inside the pipeline's own code
            stack.enter_context(_unchanged(pipe, but=("_all_hooks", "_offload")))
            for changing in (*self.replay.schedulers, *self.replay.guiders.values()):
                stack.enter_context(_unchanged(changing))
            for shadow in self._shadows():
                stack.enter_context(_attribute(shadow.owner, shadow.name, shadow))
            stack.enter_context(self._prepared_noise())
            try:
                self.output = pipe(**call)
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
        return made

    def _guard_callback(self, call: dict[str, Any]) -> None:
        callback = call.get("callback_on_step_end")
        if callback is None:
            return
        setting = isinstance(callback, (PipelineCallback, MultiPipelineCallbacks))
        if setting:
            call["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs

        def live(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # the call at the resume point is due: stopping there left the loop before the callback
            if self.clock >= self.begin and (self.callbacks or setting):
                return callback(pipe, step, timestep, tensors)
            if setting:
                # diffusers' own callbacks set the loop up for later steps (guidance off), so they also hear of stubs
                return {k: v for k, v in callback(pipe, step, timestep, tensors).items() if k != "latents"}
            return {}

        call["callback_on_step_end"] = live

    def _bar(self, shadow: _Shadow, iterable: Any = None, total: int | None = None) -> tqdm:
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

    def _set_streams(self) -> None:
        for generator, state in zip(self.generators, self.rng, strict=True):
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
        if self.drawn is None:
            if self.noise is not None:
                if self.noise.shape != made.shape:
                    raise ValueError(f"noise has shape {tuple(self.noise.shape)}; this call draws {tuple(made.shape)}")
                made = self.noise.to(made)
            self.drawn = made
        return made

    def _encode(self, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        result, described = self.replay.prompts.encode(shadow.__wrapped__, args, kwargs, self.rows, self.meter)
        self.described += described
        return result

    # --- models ---

    def _forward(self, name: str, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        real, schedule = shadow.__wrapped__, self.replay.schedule
        if self.replay.prompts.encoding:
            return self.replay.prompts.encoder(name, real, args, kwargs)
        if not self.entered and self.timed and not self.replay.has_bar:
            self._enter()
        if not self.entered or (schedule is not None and self.clock >= schedule.calls):
            return real(*args, **kwargs)
        batch, rows = _rows_of(args, kwargs)
        if self.dry:
            self.model_rows[self.clock] = self.model_rows.get(self.clock, 0) + rows
        if self.dry and self.observe and name not in self.replay.outputs:
            output = real(*args, **kwargs)
            self.replay.outputs[name] = rows, map_tree(lambda v: v.to("meta") if torch.is_tensor(v) else v, output)
            return output
        if self.dry or self.clock < self.begin:
            return self._stub(name, shadow.owner, batch, rows, kwargs)
        begin = time.perf_counter()
        output = real(*args, **kwargs)
        self.meter.forward(rows, time.perf_counter() - begin, "denoiser", rows / sum(schedule.model_rows))
        return output

    def _stub(self, name: str, module: nn.Module, batch: Any, rows: int, kwargs: Mapping[str, Any]) -> Any:
        """Zeros in the shape of the model's output; nothing reads their values."""
        if name in self.replay.outputs:
            seen, shapes = self.replay.outputs[name]
            return _zeros(shapes, seen, batch, rows)
        config = getattr(module, "config", {})
        channels, given = config.get("out_channels"), config.get("in_channels")
        shape = list(batch.shape)
        if isinstance(channels, int) and batch.ndim > 3 and shape[1] == given:
            shape[1] = channels
        zeros = batch.new_zeros(shape)
        return namedtuple("Output", ["sample"])(zeros) if kwargs.get("return_dict", True) else (zeros,)

    # --- schedulers ---

    def _set_timesteps(self, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            self.timed = True
            slot = self._slot(shadow.owner, add=False)
            if slot in self.fresh:
                raise ValueError(
                    f"{type(self.replay.pipe).__name__} sets its timesteps anew inside its loop (chunks of a video); "
                    "replay cannot resume in later chunks: draw whole samples with the plain pipeline instead"
                )
        return shadow.__wrapped__(*args, **kwargs)

    def _slot(self, scheduler: Any, add: bool = True) -> int:
        for slot, owner in enumerate(self.owners):
            if owner is scheduler:
                return slot
        if add:
            self.owners.append(scheduler)
        return len(self.owners) - 1 if add else -1

    def _step(self, shadow: _Shadow, *args: Any, **kwargs: Any) -> Any:
        scheduler, real = shadow.owner, shadow.__wrapped__
        if not self.active:
            return real(*args, **kwargs)
        self.entered = True
        bound = inspect.signature(real).bind(*args, **kwargs)
        slot = self._slot(scheduler)
        call = self.slots.count(slot)
        if slot not in self.fresh:
            self.fresh[slot] = {k: _clone(v) for k, v in vars(scheduler).items() if k not in ("step", "set_timesteps")}
            self._learn(scheduler, bound.arguments["timestep"])
        self.slots.append(slot)
        self.clock += 1
        if self.clock <= self.begin:
            if self.clock == self.begin:
                self._resume()
            values = self._recorded(slot)
        else:
            values = self._live_step(scheduler, real, bound, slot, call)
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
        if isinstance(self.transition, (Sde, EtaStep)):
            values["prev_sample"] = self._transit(sample, x0, levels[call], levels[call + 1]).to(values["prev_sample"])
        self.last[slot] = values, x0
        return values

    def _transit(self, sample: Tensor, x0: Tensor, now: Level, after: Level) -> Tensor:
        x, clean = sample.float(), x0.float()
        if after.sigma == 0:
            return eta_step(x, clean, torch.zeros_like(x), now, after, eta=0.0)
        noise = randn_tensor(x.shape, generator=self.generators, device=x.device, dtype=x.dtype)
        if isinstance(self.transition, Sde):
            return sde_step(x, clean, noise, now, after, self.transition.a)
        return eta_step(x, clean, noise, now, after, self.transition.eta)

    def _recorded(self, slot: int) -> dict[str, Tensor]:
        names = self.state.fields["outputs"][str(slot)]
        return {name: self.state.tensors[f"out.{slot}.{name}"].clone() for name in names}

    def _resume(self) -> None:
        """Put fields, guidance momentum and streams in, before the loop's next ``scale_model_input`` reads them."""
        for slot, fields in self.state.fields.get("schedulers", {}).items():
            vars(self.owners[int(slot)]).update({k: _unpack(v, self.state.tensors) for k, v in fields.items()})
        for name, guider in self.replay.guiders.items():
            if guider.momentum_buffer is not None:
                average = self.state.tensors.get(f"guider.{name}")
                guider.momentum_buffer.running_average = 0 if average is None else average.clone()
        if self.rng is not None:
            self._set_streams()

    def capture(self) -> RowState:
        """Everything that a later run needs to go on from here; without scheduler fields once the loop is over."""
        tensors: dict[str, Tensor] = {}
        axes: dict[str, int | None] = {}
        fields: dict[str, Any] = {"clock": self.clock, "outputs": {}}
        over = self.clock == self.replay.schedule.calls
        schedulers = {}
        for slot, owner in enumerate(self.owners):
            values, x0 = self.last.get(slot) or (self._recorded(slot), self.state.tensors.get(f"x0.{slot}"))
            fields["outputs"][str(slot)] = list(values)
            for name, value in values.items():
                if value.shape[:1] != (self.rows,):
                    raise ValueError(
                        f"{type(owner).__name__}.step gave {name} of shape {tuple(value.shape)} for {self.rows} rows; "
                        "pipelines whose loop does not keep one sample a row cannot be replayed"
                    )
                tensors[f"out.{slot}.{name}"] = value.detach()
            if over:
                continue
            if x0 is not None:
                tensors[f"x0.{slot}"] = x0.detach()
            fresh = self.fresh[slot]
            changed = {
                k: v
                for k, v in vars(owner).items()
                if k not in ("step", "set_timesteps") and not (k in fresh and _same(fresh[k], v))
            }
            schedulers[str(slot)] = {
                k: _pack(v, f"scheduler.{slot}.{k}", self.rows, tensors, axes) for k, v in changed.items()
            }
        if not over:
            fields["schedulers"] = schedulers
            for name, guider in self.replay.guiders.items():
                average = getattr(guider.momentum_buffer, "running_average", None)
                if torch.is_tensor(average):
                    tensors[f"guider.{name}"] = average.detach()
        tensors["rng_start"] = torch.stack(list(self.rng_start))
        return RowState(tensors, dict.fromkeys(tensors, 0) | axes, fields)
