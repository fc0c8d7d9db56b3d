"""What a run will hold in memory, known before it runs.

Probes on the user's own sampler and reward (two stages, a decode and a score of one, two and three rows) tell what a
row costs while the model, the decoder or the reward works, and what a row holds between them. A rehearsal then
drives the search itself with stand-ins that hold tensors of those sizes without memory (on the meta device), so that
whatever a search keeps, joins and splits is counted by its own code and by the code that splits it.

Units: bytes. B = rows.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from visearch.budget import (
    Budget,
    Evaluator,
    Ledger,
    MeteredFeatures,
    MeteredReward,
    MeteredSampler,
    OutOfMemory,
    is_out_of_memory,
    release_cached_memory,
)
from visearch.diversity import compares_features
from visearch.protocols import (
    Event,
    Population,
    Request,
    Reward,
    RowsInPopulation,
    RowState,
    Sampler,
    Scores,
    Search,
    Seed,
    leaves,
)

__all__ = ["Footprint", "Plan", "TensorMemory", "plan", "probe", "tracked"]

FREE_SHARE = 0.9  # of the free device memory; the rest is for the allocator's rounding and fragments
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


# --- measuring ------------------------------------------------------------------------------------------------


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensor storages that operators create inside a ``with`` block, like ``tracemalloc`` for tensors.

    Views share their storage and count once; what existed before counts nothing. Not seen: scratch memory inside a
    kernel, memory of other libraries (NumPy, images), and the allocator's rounding and caching.

    Args:
        devices: types of device that count; ``None`` is all.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
        peak_at: name of the :meth:`spike` that reached the peak, or ``"held"``.
    """

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        super().__init__()
        self.devices = devices
        self.live = self.peak = 0
        self.peak_at = "held"
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        # tensors made from Python data come into being outside of any operator and are lifted into the program
        known = set() if func is torch.ops.aten.lift_fresh.default else before
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (self.devices is None or tensor.device.type in self.devices):
                self._see(tensor.untyped_storage(), known)
        return result

    def _see(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:  # perhaps resized
            self._grow(size - self._sizes[key])
            self._sizes[key] = size
        elif key not in known:
            self._sizes[key] = size
            weakref.finalize(storage, self._forget, key).atexit = False
            self._grow(size)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _grow(self, size: int) -> None:
        self.live += size
        self.spike(0, "held")

    def spike(self, size: float, name: str) -> None:
        """Count ``size`` more bytes, alive for a moment only."""
        if self.live + size > self.peak:
            self.peak, self.peak_at = self.live + size, name


class _CudaMemory:
    """The same two numbers from the allocator of a CUDA device, which also sees scratch memory."""

    live = peak = 0


@contextmanager
def tracked(device: torch.device | str = "cpu") -> Iterator[TensorMemory | _CudaMemory]:
    """Measure what is allocated on a device inside the block: ``live`` and ``peak``, in bytes, from 0 at its start."""
    device = torch.device(device)
    if device.type != "cuda":
        with TensorMemory() as memory:
            yield memory
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    memory, before = _CudaMemory(), torch.cuda.memory_allocated(device)
    yield memory
    torch.cuda.synchronize(device)
    memory.live = torch.cuda.memory_allocated(device) - before
    memory.peak = torch.cuda.max_memory_allocated(device) - before


# --- probes ---------------------------------------------------------------------------------------------------


PROBE_SHARE = 0.9  # of a limit; the rows that wait for their probe are held beside it
PROBED_ROWS = 3  # kernels and pipelines skip copies for a single row, so the line goes through two and three


@dataclass(frozen=True)
class Line:
    """Peak of an operation on B rows: what was measured, and on from there in a straight line.

    Fewer than three were measured where more would not have fitted: those are infinite.
    """

    measured: tuple[float, ...]

    @property
    def complete(self) -> bool:
        return len(self.measured) == PROBED_ROWS

    def __call__(self, rows: int) -> float:
        if rows <= len(self.measured):
            return self.measured[rows - 1]
        if not self.complete:
            return math.inf
        slope = max(0.0, self.measured[-1] - self.measured[-2])
        return self.measured[-1] + (rows - PROBED_ROWS) * slope


@dataclass(frozen=True)
class Footprint:
    """What the probes measured of a sampler and a reward.

    Attributes:
        encode: peak while one prompt is encoded.
        kept: what stays with the sampler of each encoded prompt.
        advance, decode, reward: peaks of model, decoder and reward, results included.
        states: a row at stage 0, under way and at the last stage, without memory.
        sample: one decoded row, (1, ...), without memory.
        decode_batch: most rows that the sampler itself decodes at once, or ``None``.
    """

    encode: int
    kept: int
    advance: Line
    decode: Line
    reward: Line
    states: tuple[RowState, RowState, RowState]
    sample: Tensor
    decode_batch: int | None = None

    @property
    def complete(self) -> bool:
        """Whether all probes were made."""
        return self.advance.complete and self.decode.complete and self.reward.complete


# what was measured, under which limit, and the reward: kept, so that its id stays its own
_PROBED: weakref.WeakKeyDictionary[Sampler, dict[Any, tuple[Footprint, float, Reward]]] = weakref.WeakKeyDictionary()


class _ProbeMeter:
    """Books probes in a ledger, apart from the search; encoded prompts are kept and used: booked as usual."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        self._book("nfe", rows, seconds)

    def decode(self, rows: int, seconds: float) -> None:
        self._book("decodes", rows, seconds)

    def encode(self, rows: int, seconds: float) -> None:
        self.ledger.encode(rows, seconds)

    def skipped(self, rows: int) -> None: ...

    def scored(self, rows: int, seconds: float) -> None:
        self._book("rewards", rows, seconds)

    def _book(self, what: str, count: int, seconds: float) -> None:
        self.ledger.probes[what] += count
        self.ledger.seconds["probe"] += seconds


def probe(
    sampler: Sampler, reward: Reward, request: Request, ledger: Ledger | None = None, limit: float | None = None
) -> Footprint:
    """Measure one, two and three rows of the request's first prompt: two stages, a decode and a score of each.

    Later stages are taken to need what the second does. Measured once for a sampler, a reward and the shapes of a
    request.

    Args:
        sampler, reward, request: as in the search.
        ledger: books what the probes cost, in ``probes`` and ``seconds["probe"]``.
        limit: bytes; two or three rows are left out where they would not fit, going by fewer.

    Raises:
        OutOfMemory: one row does not fit in the memory there is.
        ValueError: the sampler does not decode to a tensor.
    """
    known = _PROBED.setdefault(sampler, {})
    key = (id(reward), repr(_shapes(request.call)), repr(_shapes({k: v[0] for k, v in request.per_prompt.items()})))
    limit = math.inf if limit is None else limit
    footprint, under, _ = known.get(key, (None, 0.0, None))
    if footprint is None or (limit > under and not footprint.complete):
        meter, before = _ProbeMeter(ledger or Ledger()), sampler.meter
        sampler.meter = meter
        try:
            with torch.no_grad():
                footprint = _probe(sampler, reward, request, meter, limit)
        finally:
            sampler.meter = before
        known[key] = footprint, limit, reward
    return footprint


def _shapes(value: Any) -> Any:
    """What of an argument decides how much memory a call takes."""
    if isinstance(value, Mapping):
        return {k: _shapes(v) for k, v in sorted(value.items())}
    if isinstance(value, (list, tuple)):
        return [_shapes(v) for v in value]
    if isinstance(value, str):
        return "text"
    return getattr(value, "shape", None) or getattr(value, "size", None) or repr(value)


def _probe(sampler: Sampler, reward: Reward, request: Request, meter: _ProbeMeter, limit: float) -> Footprint:
    device = getattr(sampler, "device", "cpu")
    to = sampler.milestones[min(1, len(sampler.milestones) - 1)]  # multistep schedulers have their history by then
    with tracked(device) as encoding:
        noise = sampler.init(request, request.seeds(0, 1, [0]))
    starts = [noise, *(sampler.init(request, request.seeds(0, n, [0])) for n in range(2, PROBED_ROWS + 1))]
    advance, rows = _line(device, lambda n: sampler.advance(starts[n - 1], to), "the model", limit)
    final = rows if to == sampler.num_stages else _preview(sampler, rows)
    finals = [final.select([0] * n) for n in range(1, PROBED_ROWS + 1)]
    decode, sample = _line(device, lambda n: sampler.decode(finals[n - 1]), "decoding", limit)
    if not torch.is_tensor(sample):
        raise ValueError(f"decode gave a {type(sample).__name__}; memory can be planned for samplers that give tensors")
    samples, text, context = torch.cat([sample] * PROBED_ROWS), request.reward_prompts[0], request.metadata[0]

    def score(count: int) -> None:
        begin = time.perf_counter()
        for leaf in leaves(reward):
            plain = getattr(leaf, "uncached", leaf)  # the samples are copies of one: a cache would know them
            plain.score(samples[:count], [text] * count, noise_level=math.inf, metadata=[context] * count)
        meter.scored(count, time.perf_counter() - begin)

    scoring, _ = _line(device, score, "the reward", limit)
    kept = encoding.live - sum(_size(t) for t in noise.state.tensors.values())
    states = tuple(_blank(p.state, device) for p in (noise, rows, final))
    batch = getattr(sampler, "decode_batch", None)
    return Footprint(encoding.peak, max(0, kept), advance, decode, scoring, states, _without_memory(sample), batch)


def _line(device: Any, run: Callable[[int], Any], what: str, limit: float) -> tuple[Line, Any]:
    """Peaks of ``run`` on one row and more, and its result for one."""
    peaks: list[float] = []
    first = None
    for rows in range(1, PROBED_ROWS + 1):
        if peaks and 2 * peaks[-1] - sum(peaks[-2:-1]) > PROBE_SHARE * limit:
            break
        try:
            with tracked(device) as memory:
                result = run(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release_cached_memory()
            if rows == 1:
                raise OutOfMemory(
                    f"out of memory: {what} cannot hold one row; use a smaller size, half precision or offload"
                ) from error
            break
        peaks.append(memory.peak)
        first = result if rows == 1 else first
    return Line(tuple(peaks)), first


def _preview(sampler: Sampler, rows: Population) -> Population:
    if hasattr(sampler, "previews"):  # results need more memory than previews by a cheaper decoder
        sampler = sampler.view(previews=sampler.previews.in_full())
    try:
        return sampler.predict_x0(rows)
    except ValueError:  # no previews with this scheduler: a whole candidate tells
        return sampler.advance(rows, sampler.num_stages)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _blank(state: RowState, device: Any) -> RowState:
    """The same shapes without memory, of the tensors that lie where the model runs."""
    kind = torch.device(device).type
    tensors = {k: _without_memory(t) for k, t in state.tensors.items() if t.device.type == kind}
    return RowState(tensors, state.axes)


# --- the rehearsal --------------------------------------------------------------------------------------------


class _StandIn(RowsInPopulation):
    """A sampler that computes nothing, holds what the real one would, and tells the peaks of its operations."""

    def __init__(self, sampler: Sampler, footprint: Footprint, memory: TensorMemory) -> None:
        self.inner, self.footprint, self.memory = sampler, footprint, memory
        self.kept: dict[int, Tensor] = {}
        self.drawn: Tensor | None = None
        self.most = {"model": 0, "decoder": 0, "reward": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # stages, levels and costs are the real ones

    def init(self, request: Request, seeds: Sequence[Seed]) -> Population:
        self.request = request
        for prompt in {s.prompt for s in seeds} - set(self.kept):
            self.memory.spike(self.footprint.encode, "encoder")
            self.kept[prompt] = torch.empty(self.footprint.kept, dtype=torch.uint8, device="meta")
        return Population(
            stage=0,
            prompt=torch.tensor([s.prompt for s in seeds]),
            lineage=tuple((Event("init", 0, s.value, s.candidate),) for s in seeds),
            rng=(torch.Generator().get_state(),) * len(seeds),
            state=self._state(0, len(seeds)),
        )

    def advance(self, population: Population, to: int) -> Population:
        self._work("model", len(population), self.footprint.advance(len(population)))
        return replace(population, stage=to, state=self._state(to, len(population)))

    def predict_x0(self, population: Population) -> Population:
        return replace(population, stage=self.num_stages)  # the estimate is part of the state

    def renoise(self, population: Population, to_stage: int, seeds: Sequence[int]) -> Population:
        moved = self._moved(population, "renoise", to_stage, seeds)
        return replace(moved, stage=to_stage, state=self._state(to_stage, len(population)))

    def perturb(self, population: Population, strength: float, seeds: Sequence[int]) -> Population:
        moved = self._moved(population, "perturb", strength, seeds)
        return replace(moved, state=self._state(population.stage, len(population)))

    def noise(self, population: Population) -> Tensor:
        """Of the shape that the sampler itself draws, or refused as it refuses."""
        if self.drawn is None:
            self.drawn = self.inner.noise(self.inner.init(self.request, self.request.seeds(0, 1, [0]))).cpu()
        return self.drawn.expand(len(population), *self.drawn.shape[1:])

    def set_noise(self, population: Population, noise: Tensor, seeds: Sequence[int]) -> Population:
        return population.begun_from(noise, seeds, self._state(0, len(population)))

    def decode(self, population: Population) -> Tensor:
        rows = len(population)
        together = min(rows, self.footprint.decode_batch or rows)
        earlier = (rows - together) * _size(self.footprint.sample)
        self._work("decoder", rows, self.footprint.decode(together) + earlier)
        return self.footprint.sample.new_empty((rows, *self.footprint.sample.shape[1:]))

    def view(self, **changes: Any) -> _StandIn:
        """The same tally, with the stages and costs of the view."""
        made = _StandIn(self.inner.view(**changes), self.footprint, self.memory)
        made.kept, made.most = self.kept, self.most
        return made

    def _work(self, name: str, rows: int, size: float) -> None:
        self.most[name] = max(self.most[name], rows)
        self.memory.spike(size, name)

    def _state(self, stage: int, rows: int) -> RowState:
        blank = self.footprint.states[0 if stage == 0 else 2 if stage == self.num_stages else 1]
        made = {}
        for name, tensor in blank.tensors.items():
            shape, axis = list(tensor.shape), blank.axes[name]
            if axis is not None:
                shape[axis] *= rows
            made[name] = tensor.new_empty(shape)
        return replace(blank, tensors=made)

    def _moved(self, population: Population, op: str, value: float, seeds: Sequence[int]) -> Population:
        pairs = zip(population.lineage, seeds, strict=True)
        return replace(
            population, lineage=tuple((*old, Event(op, population.stage, s, float(value))) for old, s in pairs)
        )


class _StandInReward:
    """Scores everything 0."""

    name, higher_is_better, relative = "stand-in", True, True

    def __init__(self, sampler: _StandIn) -> None:
        self.sampler = sampler

    def score(self, samples: Tensor, prompts: Sequence[str], **context: Any) -> Scores:
        self.sampler._work("reward", len(prompts), self.sampler.footprint.reward(len(prompts)))
        return Scores(torch.zeros(len(prompts)))


@dataclass(frozen=True)
class _Rehearsed:
    peak: float
    peak_at: str
    most: Mapping[str, int]


def _rehearse(
    sampler: Sampler,
    search: Search,
    request: Request,
    footprint: Footprint,
    sizes: Mapping[str, int | None],
    batch_buckets: Sequence[int] | None,
) -> _Rehearsed:
    """Drive the planned search with stand-ins."""
    on_cpu = torch.device(getattr(sampler, "device", "cpu")).type == "cpu"
    memory = TensorMemory(["meta", "cpu"] if on_cpu else ["meta"])
    stand_in, ledger = _StandIn(sampler, footprint, memory), Ledger()
    metered = MeteredSampler(stand_in, ledger, None, sizes["rows"], sizes["decode_rows"], batch_buckets)
    reward = MeteredReward(_StandInReward(stand_in), ledger, sizes["reward_rows"])
    alike = MeteredFeatures(lambda samples: torch.zeros(len(samples), 1), ledger)
    evaluate = Evaluator(metered, reward, request, alike if compares_features(search) else None)
    with memory, torch.no_grad():
        state = search.init(metered, request)
        while not search.done(state):
            state = search.step(state, metered, evaluate)
            evaluate.forget()
    return _Rehearsed(memory.peak, memory.peak_at, stand_in.most)


# --- the plan -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a search will cost over all prompts; ``print`` it.

    Attributes:
        nfe, images, decodes, rewards: as in :class:`visearch.Ledger`; most that it can be where a deadline, target or
            patience may end the search sooner.
        peak_memory: bytes held at most beyond what is there before the run (the weights).
        rows, decode_rows, reward_rows: most rows at once in the model, the decoder and the reward.
        peak_at: what reaches the peak: ``"model"``, ``"decoder"``, ``"reward"``, ``"encoder"`` or ``"held"``, the rows
            that the search holds between operations.
        max_memory: the limit that the sizes were chosen for, or ``None``.
    """

    nfe: int
    images: float
    decodes: int
    rewards: int
    peak_memory: int
    rows: int
    decode_rows: int
    reward_rows: int
    peak_at: str
    max_memory: int | None = None

    def __str__(self) -> str:
        where = {"held": "by the candidates between operations"}.get(self.peak_at, f"in the {self.peak_at}")
        limit = "" if self.max_memory is None else f", limit {human(self.max_memory)}"
        return (
            f"work:   {self.nfe} model rows (as much as {self.images:.1f} plain generations), {self.decodes} decodes, "
            f"{self.rewards} scores\n"
            f"memory: {human(self.peak_memory)} beyond the weights, reached {where}{limit}\n"
            f"at once: {self.rows} rows in the model, {self.decode_rows} in the decoder, {self.reward_rows} in the "
            "reward"
        )


def human(size: float) -> str:
    """Bytes as a person reads them: ``"1.5 GiB"``."""
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def plan(
    sampler: Sampler,
    reward: Reward,
    search: Search,
    request: Request,
    budget: Budget | None = None,
    *,
    rows: int | None = None,
    decode_rows: int | None = None,
    reward_rows: int | None = None,
    batch_buckets: Sequence[int] | None = None,
    ledger: Ledger | None = None,
) -> Plan:
    """What a search will cost and how its batches fit in memory, before it runs; see :func:`probe` for its own cost.

    Several prompts are counted as if they all shared batches, so the peak is an upper bound where their encoded
    shapes differ. A search that decides by scores is rehearsed with equal ones.

    Args:
        sampler, reward, search, request, budget: as for :func:`visearch.run_search`.
        rows, decode_rows, reward_rows: no more rows at once than these.
        batch_buckets: as for :func:`visearch.run_search`.
        ledger: books the probes.

    Raises:
        ValueError: the budget is too small for one candidate, or the memory for one row.
        OutOfMemory: one row does not fit in the memory there is.
    """
    budget = budget or Budget()
    prompts, device = len(request.prompts), torch.device(getattr(sampler, "device", "cpu"))
    cut = search.plan(sampler, budget.rows_a_prompt(sampler, prompts))
    limit = budget.max_memory
    if limit is None and device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = int(FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
    footprint = probe(sampler, reward, request, ledger, limit)
    sizes = {"rows": rows, "decode_rows": decode_rows, "reward_rows": reward_rows}
    part = {"model": "rows", "decoder": "decode_rows", "reward": "reward_rows"}

    def rehearse() -> _Rehearsed:
        return _rehearse(sampler, cut.search, request, footprint, sizes, batch_buckets)

    found = rehearse()
    sizes = {part[name]: most for name, most in found.most.items()}
    whole = dict(sizes)
    while limit is not None and found.peak > limit:
        name = part.get(found.peak_at)
        if name is None or sizes[name] == 1:
            _refuse(limit, found)
        parts = -(-whole[name] // sizes[name]) + 1
        sizes[name] = min(sizes[name] - 1, -(-whole[name] // parts))
        found = rehearse()
    counts = {k: prompts * getattr(cut, k) for k in ("nfe", "images", "decodes", "rewards")}
    return Plan(**counts, peak_memory=int(found.peak), **sizes, peak_at=found.peak_at, max_memory=limit)


def _refuse(limit: int, found: _Rehearsed) -> None:
    remedy = {
        "held": "the candidates that the search holds at once; ask for fewer of them",
        "encoder": "encoding one prompt; use a smaller text encoder or pass embeddings",
    }.get(found.peak_at, f"one row in the {found.peak_at}; use a smaller size or half precision")
    raise ValueError(
        f"max_memory={human(limit)} is too small: {human(found.peak)} are needed for {remedy}, or allow more"
    )
