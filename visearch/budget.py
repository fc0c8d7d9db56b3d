"""What a search may spend, what it did spend, and the proxies that count it.

Searches and drivers hold :class:`MeteredSampler` and :class:`MeteredReward` only. The sampler itself reports every real
model call to the ledger from inside its forward wrapper, so a search cannot spend without it being seen.
"""

from __future__ import annotations

import copy
import math
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from visearch.protocols import Ensemble, Population, Request, Reward, RewardError, RowState, Sampler, Scores, Seed

__all__ = [
    "Budget",
    "BudgetSpent",
    "Evaluator",
    "Ledger",
    "MeteredFeatures",
    "MeteredReward",
    "MeteredSampler",
    "OutOfMemory",
    "RewardError",
    "memory_bytes",
]


ROUNDING = 1e-6  # image-equivalents are sums of shares
NO_FEATURES = (
    "this search compares candidates by features and none are given; pass features=, a function of N samples that "
    "returns (N, D), such as visearch.rewards.features.thumbnails"
)


class BudgetSpent(Exception):
    """The next operation would go beyond the budget; nothing of it was run."""


class OutOfMemory(RuntimeError):
    """Not even one row fits in memory."""


def memory_bytes(given: int | str) -> int:
    """Bytes of ``"8GiB"``, ``"512 MB"`` or a plain number.

    Raises:
        ValueError: neither a positive number nor one with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", str(given))
    size = 0
    if match:
        number, prefix, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix) + 1 if prefix else 0))
    if size < 1:
        raise ValueError(
            f"max_memory={given!r} is no amount of memory; give bytes, or a text such as '8GiB' or '500MB'"
        )
    return size


@dataclass(frozen=True)
class Budget:
    """Limits of one search, per call. ``None`` is no limit.

    Args:
        max_nfe: model rows over all prompts, both CFG branches counted; never exceeded.
        max_images: image-equivalents over all prompts; never exceeded.
        max_seconds: wall-clock seconds; overrun by at most one operation.
        target: a prompt whose best finished candidate scores at least this gets no more candidates. Neither this nor
            ``min_gain`` goes with a relative reward.
        patience: a prompt gets no more candidates after this many finished ones in a row without a new best.
        max_memory: bytes, or a text such as ``"8GiB"``: most that the run may hold at once beyond what was there
            before (the weights). Batches are cut to fit by a prediction (:func:`visearch.plan`), whose probes are
            counted apart from ``max_nfe``. Default: 0.9 of what is free on a CUDA device, no limit elsewhere.
        min_gain: a prompt gets no more candidates once the next one is expected to raise its best score by less: with
            n >= 4 finished, independent candidates that gain is estimated without bias by (best - second) / n.

    Raises:
        ValueError: a limit that is not positive.
    """

    max_nfe: int | None = None
    max_seconds: float | None = None
    target: float | None = None
    patience: int | None = None
    max_images: float | None = None
    max_memory: int | str | None = None
    min_gain: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_nfe", "max_seconds", "patience", "max_images", "min_gain"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be greater than 0; leave it out for no limit")
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", memory_bytes(self.max_memory))

    def rows_a_prompt(self, sampler: Sampler, prompts: int) -> int | None:
        """Model rows that each prompt may cost at most; ``None`` is no limit."""
        limits = [] if self.max_nfe is None else [self.max_nfe // prompts]
        if self.max_images is not None:
            limits.append(int((self.max_images + ROUNDING) / prompts * sampler.nfe(0, sampler.num_stages)))
        return min(limits, default=None)


@dataclass
class Ledger:
    """What was spent, counted where it happened. Implements :class:`visearch.protocols.Meter`.

    Attributes:
        nfe: model rows, both CFG branches counted.
        forwards: model calls.
        images: image-equivalents; 1 is one whole plain generation.
        decodes, encodes: rows through the pipeline's own decoder and the text encoders.
        previews: rows whose preview a cheaper decoder made, by its name; not among ``decodes``.
        rewards: samples scored, by reward; those of an ensemble by its members.
        cached: how many of them a cache answered: the others were evaluated.
        skipped: model rows that a step cache saved.
        retries: operations repeated after a failure or out of memory.
        probes: what finding out shapes and memory took, outside of all other counts: ``"nfe"``, ``"decodes"``,
            ``"rewards"``.
        seconds: by kind of work (``"probe"`` for the probes), plus ``"total"``.
        prompts: prompt -> what its rows took of ``"nfe"``, ``"decodes"`` and ``"rewards"``, as far as a search asked.
    """

    nfe: int = 0
    forwards: int = 0
    images: float = 0.0
    decodes: int = 0
    encodes: int = 0
    skipped_rows: int = 0
    retries: int = 0
    rewards: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    probes: Counter[str] = field(default_factory=Counter)
    previews: Counter[str] = field(default_factory=Counter)
    prompts: dict[int, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._resident = _peak_resident()

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        if kind == "probe":
            self.probes["nfe"] += rows
            self.seconds["probe"] += seconds
            return
        self.nfe += rows
        self.forwards += 1
        self.images += images
        self.seconds[kind] += seconds

    def decode(self, rows: int, seconds: float) -> None:
        self.decodes += rows
        self.seconds["decode"] += seconds

    def preview(self, rows: int, seconds: float, decoder: str) -> None:
        self.previews[decoder] += rows
        self.seconds["preview"] += seconds

    def encode(self, rows: int, seconds: float) -> None:
        self.encodes += rows
        self.seconds["encode"] += seconds

    def skipped(self, rows: int) -> None:
        self.skipped_rows += rows

    def scored(self, reward: str, samples: int, seconds: float, cached: int = 0) -> None:
        self.rewards[reward] += samples
        self.seconds["reward"] += seconds
        if cached:
            self.cached[reward] += cached

    def share(self, population: Population, what: str, each: int = 1) -> None:
        """Book work on the rows of a population with their prompts."""
        for prompt, rows in Counter(population.prompt.tolist()).items():
            self.prompts.setdefault(prompt, Counter())[what] += rows * each

    def begin_memory(self) -> None:
        """A run begins: its peak is counted from here."""
        if _on_cuda():
            torch.cuda.reset_peak_memory_stats()
        self._resident = _peak_resident()

    @property
    def peak_memory(self) -> int:
        """Bytes at the peak, weights included; :attr:`peak_memory_of` says of what."""
        return torch.cuda.max_memory_allocated() if _on_cuda() else _peak_resident()

    @property
    def peak_memory_of(self) -> str:
        """What :attr:`peak_memory` is: a CPU has no peak of a run alone, only that of the process's resident memory."""
        if _on_cuda():
            return "run: allocations on the CUDA device"
        if _peak_resident() > self._resident:
            return "run: resident memory of the process"
        return "process: resident memory, reached before this run, which stayed below it"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able copy."""
        return {
            "nfe": self.nfe,
            "forwards": self.forwards,
            "images": round(self.images, 6),
            "decodes": self.decodes,
            "previews": dict(self.previews),
            "encodes": self.encodes,
            "skipped_rows": self.skipped_rows,
            "retries": self.retries,
            "rewards": dict(self.rewards),
            "cached": dict(self.cached),
            "probes": dict(self.probes),
            "prompts": [[prompt, dict(took)] for prompt, took in self.prompts.items()],
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory,
            "peak_memory_of": self.peak_memory_of,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Ledger:
        plain = {k: saved[k] for k in ("nfe", "forwards", "images", "decodes", "encodes", "skipped_rows", "retries")}
        counters = {k: Counter(saved[k]) for k in ("rewards", "cached", "seconds", "probes", "previews")}
        return cls(**plain, **counters, prompts={prompt: Counter(took) for prompt, took in saved["prompts"]})


def _on_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the CPU allocator ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def release_cached_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class MeteredSampler:
    """A sampler that counts into a ledger, refuses what the budget forbids, and splits work to fit in memory.

    Args:
        inner: the sampler.
        ledger: told about every real model call by ``inner`` itself.
        budget: ``max_nfe`` is enforced here, before each model run.
        rows: most rows the model runs at once; ``None`` is all, halved whenever memory runs out.
        decode_rows: most rows decoded at once, independent of ``rows``; ``None`` is all on CPU, 1 on an accelerator.
        batch_buckets: the only sizes of batches that the model may see, 1 among them: with (1, 2, 4), 7 rows run as
            4 + 2 + 1, without padding. For compiled models, which are compiled anew for each size.

    Attributes:
        limits: ``rows`` and ``decode_rows`` as they are now; one and the same mapping for a sampler and its views, so
            that a search that asks for a view in each round does not run out of memory in each.
        regroup: what is done to rows that a search joined; an :class:`Evaluator` sets it where scores hang on them.

    Raises:
        ValueError: a limit below 1, or buckets without 1.
    """

    def __init__(
        self,
        inner: Sampler,
        ledger: Ledger,
        budget: Budget | None = None,
        rows: int | None = None,
        decode_rows: int | None = None,
        batch_buckets: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("rows", rows), ("decode_rows", decode_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; leave it out to use as many as fit")
        if batch_buckets is not None and (1 not in batch_buckets or min(batch_buckets) < 1):
            raise ValueError(
                f"batch_buckets={tuple(batch_buckets)} must be sizes of at least 1 and hold 1, so that every number of "
                "rows is a sum of them; e.g. (1, 2, 4, 8)"
            )
        self.inner, self.ledger, self.budget = inner, ledger, budget or Budget()
        self.limits = {"rows": rows, "decode_rows": decode_rows}
        self.batch_buckets = None if batch_buckets is None else tuple(sorted(batch_buckets))
        self.regroup: Callable[[Population], Population] = _as_they_are
        inner.meter = ledger

    num_stages = property(lambda self: self.inner.num_stages)
    stochastic = property(lambda self: getattr(self.inner, "stochastic", False))
    milestones = property(lambda self: self.inner.milestones)
    meter = property(lambda self: self.ledger)
    device = property(lambda self: torch.device(getattr(self.inner, "device", "cpu")))
    exact_nfe = property(lambda self: getattr(self.inner, "exact_nfe", True))

    def noise_level(self, stage: int) -> float:
        return self.inner.noise_level(stage)

    def nfe(self, start: int, stop: int) -> int:
        return self.inner.nfe(start, stop)

    def cost(self, start: int, stop: int) -> float:
        return self.inner.cost(start, stop)

    def init(self, request: Request, seeds: Sequence[Seed]) -> Population:
        return self.inner.init(request, seeds)

    def advance(self, population: Population, to: int) -> Population:
        if to not in self.milestones or to <= population.stage:
            raise ValueError(
                f"cannot advance from stage {population.stage} to {to}; milestones ahead: "
                f"{[m for m in self.milestones if m > population.stage]}"
            )

        def afford_and_advance(part: Population) -> Population:
            self._afford(part, to)  # again for each part: runs that ended out of memory were spent too
            carried = self.inner.advance(part, to).carried(part.stage)
            self.ledger.share(carried, "nfe", self.nfe(part.stage, to))
            return carried

        self._afford(population, to)
        parts = self._split(population, "rows", afford_and_advance)
        return parts[0] if len(parts) == 1 else self.inner.concat(parts)

    def _afford(self, population: Population, to: int) -> None:
        need, cap = len(population) * self.nfe(population.stage, to), self.budget.max_nfe
        if cap is not None and self.ledger.nfe + need > cap:
            raise BudgetSpent(f"{need} more model rows would exceed max_nfe={cap} ({self.ledger.nfe} spent)")
        images, most = len(population) * self.cost(population.stage, to), self.budget.max_images
        if most is not None and self.ledger.images + images > most + ROUNDING:
            raise BudgetSpent(f"{images:.2f} more image-equivalents would exceed max_images={most}")

    def predict_x0(self, population: Population) -> Population:
        return self.inner.predict_x0(population)

    def renoise(self, population: Population, to_stage: int, seeds: Sequence[int]) -> Population:
        return self.inner.renoise(population, to_stage, seeds)

    def check_moves(self, stage: int) -> None:
        self.inner.check_moves(stage)

    def perturb(self, population: Population, strength: float, seeds: Sequence[int]) -> Population:
        return self.inner.perturb(population, strength, seeds)

    def noise(self, population: Population) -> Tensor:
        return self.inner.noise(population)

    def set_noise(self, population: Population, noise: Tensor, seeds: Sequence[int]) -> Population:
        return self.inner.set_noise(population, noise, seeds)

    def select(self, population: Population, index: Sequence[int]) -> Population:
        return self.inner.select(population, index)

    def concat(self, populations: Sequence[Population]) -> Population:
        return self.regroup(self.inner.concat(populations))

    def decode(self, population: Population) -> Any:
        if self.limits["decode_rows"] is None and self.device.type != "cpu":
            self.limits["decode_rows"] = 1
        parts = self._split(population, "decode_rows", self.inner.decode)
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if torch.is_tensor(parts[0]) else [s for part in parts for s in part]

    def view(self, **changes: Any) -> MeteredSampler:
        made = copy.copy(self)
        made.inner = self.inner.view(**changes)
        made.inner.meter = self.ledger
        return made

    def _split(self, population: Population, limit: str, run: Callable[[Population], Any]) -> list[Any]:
        """Run in parts of at most ``limits[limit]`` rows; out of memory halves the limit and repeats that part only."""
        with getattr(self.inner, "resident", nullcontext)():  # offloaded models come once, not once a part
            return self._parts(population, limit, run)

    def _parts(self, population: Population, limit: str, run: Callable[[Population], Any]) -> list[Any]:
        parts, start, total = [], 0, len(population)
        while start < total:
            size = self._size(population, start, limit)
            whole = start == 0 and size == total
            part = population if whole else population.select(range(start, start + size))
            try:
                parts.append(run(part))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemory(
                        f"out of memory with {limit}=1 at stage {population.stage}; use a smaller size, "
                        "half precision or offload"
                    ) from error
                self.limits[limit] = size // 2
                self.ledger.retries += 1
                release_cached_memory()
                continue
            start += size
        return parts

    def _size(self, population: Population, start: int, limit: str) -> int:
        """Rows of the part that begins at ``start``."""
        left = len(population) - start
        if limit == "rows" and self.batch_buckets is not None:
            left = min(left, self._companions(population, start))
        size = min(self.limits[limit] or left, left)
        if limit == "rows" and self.batch_buckets is not None:
            size = max(b for b in self.batch_buckets if b <= size)
        return size

    def _companions(self, population: Population, start: int) -> int:
        """Rows from ``start`` on that the sampler would run in one batch: prompts of other shapes run apart."""
        key_of = getattr(self.inner, "batch_key", lambda prompt, candidate: None)
        pairs = zip(population.prompt[start:].tolist(), population.candidate[start:], strict=True)
        keys = [key_of(p, k) for p, k in pairs]
        return next((i for i, key in enumerate(keys) if key != keys[0]), len(keys))


def _as_they_are(rows: Population) -> Population:
    return rows


class MeteredReward:
    """A reward that counts into a ledger, checks its contract, and turns failures into -inf.

    Scores come back "higher is better" whatever the published direction. A batch that raises is retried once, then
    sample by sample, a sample that is NaN once; one that still fails scores -inf and leaves a warning with the reason.
    Members of an ensemble are asked, counted and retried one after the other, each on its own. A reward whose model is
    on its device for its calls alone keeps it there until all batches are scored.

    Args:
        inner: the reward.
        ledger: counts samples and seconds.
        batch_size: most samples a call; ``None`` is all.

    Attributes:
        members: of an ensemble, by name.
        warnings: what was warned of.
    """

    def __init__(self, inner: Reward, ledger: Ledger, batch_size: int | None = None) -> None:
        self.inner, self.name = inner, inner.name
        self.warnings: list[str] = []
        members = inner.members if isinstance(inner, Ensemble) else ()
        self.members = {m.name: MeteredReward(m, ledger) for m in members}
        for member in self.members.values():
            member.warnings = self.warnings
        self.relative = bool(getattr(inner, "relative", False))
        self._order_checked = self.relative
        self.count_in(ledger)
        self.limit(batch_size)

    def count_in(self, ledger: Ledger) -> None:
        """Count into another ledger from here on."""
        self.ledger = ledger
        for member in self.members.values():
            member.count_in(ledger)

    def limit(self, batch_size: int | None) -> None:
        """Give the reward at most so many samples a call."""
        self.batch_size = batch_size
        for member in self.members.values():
            member.limit(batch_size)

    def __call__(
        self,
        samples: Any,
        prompts: Sequence[str],
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Tensor:
        """(N,) float32 on CPU, higher is better, -inf where a sample failed.

        Raises:
            RewardError: wrong number of scores, or scores that belong to other samples.
        """
        if self.members:
            return self.inner.combine(self.components(samples, prompts, noise_level, metadata), prompts)
        count, size = len(prompts), self.batch_size or len(prompts)
        metadata = metadata or [None] * count
        values = []
        with getattr(self.inner, "resident", nullcontext)():
            for i in range(0, count, size):
                part = slice(i, i + size)
                values.append(self._score(samples[part], prompts[part], noise_level, metadata[part]))
            result = torch.cat(values)
            if not self._order_checked and count > 1:
                self._check_order(samples, prompts, noise_level, metadata, result)
        sign = 1.0 if self.inner.higher_is_better else -1.0
        return torch.where(torch.isnan(result), -math.inf, sign * result)

    def components(self, *asked: Any) -> dict[str, Tensor]:
        """Member -> (N,) its scores, for the arguments of a call."""
        return {name: member(*asked) for name, member in self.members.items()}

    def _score(self, samples: Any, prompts: Sequence[str], level: float | None, metadata: Sequence[Any]) -> Tensor:
        for last in (False, True):
            try:
                return self._filled(samples, prompts, level, metadata)
            except RewardError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    release_cached_memory()
                failure = error
                self.ledger.retries += 1
                if last and len(prompts) == 1:
                    self._warn(f"reward {self.name!r} failed on a sample of {prompts[0]!r}: {failure!r}; scored -inf")
                    return torch.tensor([math.nan])
        one = [slice(i, i + 1) for i in range(len(prompts))]
        return torch.cat([self._score(samples[i], prompts[i], level, metadata[i]) for i in one])

    def _filled(self, samples: Any, prompts: Sequence[str], level: float | None, metadata: Sequence[Any]) -> Tensor:
        """One call, and one more for each sample that was NaN."""
        values, _ = self._call(samples, prompts, level, metadata)
        for i in torch.isnan(values).nonzero().flatten().tolist():
            self.ledger.retries += 1
            one = slice(i, i + 1)
            values[one], reasons = self._call(samples[one], prompts[one], level, metadata[one])
            if values[i].isnan():
                reason = reasons.get(0, "it returned NaN")
                self._warn(f"reward {self.name!r} failed on a sample of {prompts[i]!r}: {reason}; scored -inf")
        return values

    def _call(
        self, samples: Any, prompts: Sequence[str], level: float | None, metadata: Sequence[Any]
    ) -> tuple[Tensor, Mapping[int, str]]:
        """(N,) values, and reasons."""
        begin = time.perf_counter()
        scores = self.inner.score(samples, list(prompts), noise_level=level, metadata=metadata)
        seconds = time.perf_counter() - begin
        if not isinstance(scores, Scores):
            raise RewardError(f"reward {self.name!r} returned {type(scores).__name__}, expected visearch Scores")
        self.ledger.scored(self.name, len(prompts), seconds, scores.cached)
        values = torch.as_tensor(scores.values, dtype=torch.float32).detach().cpu().clone()
        if values.shape != (len(prompts),):
            raise RewardError(
                f"reward {self.name!r} returned scores of shape {tuple(values.shape)} for {len(prompts)} samples; "
                "return one number a sample, in order"
            )
        return values, scores.reasons

    def _check_order(
        self, samples: Any, prompts: Sequence[str], level: float | None, metadata: Sequence[Any], values: Tensor
    ) -> None:
        """Score the best and the worst again, each alone: a reward that mixes up rows would crown the wrong image."""
        finite = torch.isfinite(values).nonzero().flatten()
        if len(finite) < 2 or values[finite].max() == values[finite].min():
            return
        rows = [int(finite[values[finite].argmax()]), int(finite[values[finite].argmin()])]
        self._order_checked = True
        plain = MeteredReward(getattr(self.inner, "uncached", self.inner), self.ledger)  # a cache would repeat a fault
        plain.name, plain.warnings = f"{self.name} (order check)", self.warnings
        one = [slice(r, r + 1) for r in rows]
        again = torch.cat([plain._score(samples[r], prompts[r], level, metadata[r]) for r in one])
        scale = float(values[finite].max() - values[finite].min())
        if not torch.allclose(again, values[rows], atol=0.25 * scale, equal_nan=True):
            first, second = ([round(v, 4) for v in t.tolist()] for t in (values[rows], again))
            raise RewardError(
                f"reward {self.name!r} gave two samples the scores {first} in one batch and {second} alone; "
                "scores must come back in input order and not depend on the other samples"
                + "; its cache holds wrong ones, delete it"
                * hasattr(self.inner, "uncached")
            )

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)
            warnings.warn(message, stacklevel=2)


class MeteredFeatures:
    """Features that are counted like a reward by the name of ``"features"``, and checked.

    Args:
        inner: gets N samples as a reward does, returns (N, D): rows of similar samples have a large cosine.
        ledger: counts samples and seconds.
        batch_size: most samples a call; ``None`` is all.
    """

    def __init__(self, inner: Callable[[Any], Tensor], ledger: Ledger, batch_size: int | None = None) -> None:
        self.inner, self.ledger, self.batch_size = inner, ledger, batch_size

    def __call__(self, samples: Any) -> Tensor:
        """(N, D) float32 on CPU.

        Raises:
            RewardError: not one row of finite numbers a sample.
        """
        count, size = len(samples), self.batch_size or len(samples)
        return torch.cat([self._part(samples[i : i + size]) for i in range(0, count, size)])

    def _part(self, samples: Any) -> Tensor:
        begin = time.perf_counter()
        made = torch.as_tensor(self.inner(samples)).detach().to("cpu", torch.float32)
        self.ledger.scored("features", len(samples), time.perf_counter() - begin)
        if made.ndim != 2 or len(made) != len(samples) or not made.isfinite().all():
            raise RewardError(
                f"features returned shape {tuple(made.shape)} for {len(samples)} samples; return finite numbers, (N, D)"
            )
        return made


class Evaluator:
    """Decodes rows (before the last stage: their previews) and scores them; the only way for a search to see them.

    Args:
        sampler: decodes.
        reward: scores.
        request: the rows' texts and metadata.
        features: what searches may compare rows by, if any.
        previews: whether to keep what was seen of all rows, not of finished ones alone.

    Attributes:
        samples: (prompt, id) -> decoded sample of each row that was scored at the last stage.
        previews: (prompt, id) -> decoded sample of each row that was scored since :meth:`forget`, where they are kept.
        scored: those rows, in the order in which they were scored, without the sampler's tensors.
    """

    def __init__(
        self,
        sampler: MeteredSampler,
        reward: MeteredReward,
        request: Request,
        features: MeteredFeatures | None = None,
        previews: bool = False,
    ) -> None:
        self.sampler, self.reward, self.request, self._features = sampler, reward, request, features
        self.samples: dict[tuple[int, str], Any] = {}
        self._keeps = previews
        if reward.relative and reward.members:
            sampler.regroup = self._regroup
        self.forget()

    def __call__(self, population: Population) -> Population:
        final = population.stage == self.sampler.num_stages
        level = self.sampler.noise_level(population.stage)
        decoded = self._decode(population)
        prompts = population.prompt.tolist()
        texts = [self.request.reward_prompts[p] for p in prompts]
        metadata = [self.request.metadata[p] for p in prompts]
        if self.reward.members:
            components = self.reward.components(decoded, texts, level, metadata)
            scored = population.scored(self.reward.inner.combine(components, prompts), components)
        else:
            scored = population.scored(self.reward(decoded, texts, level, metadata))
        self.sampler.ledger.share(population, "rewards")
        seen = {key: decoded[i] for i, key in enumerate(zip(prompts, scored.id, strict=True))}
        if final:
            self.samples.update(seen)
        if self._keeps:
            self.previews.update(seen)
            self.scored += (replace(scored, state=RowState()),)
        return scored

    def _regroup(self, rows: Population) -> Population:
        """Rows that were all scored at the last stage, with their scores among each other."""
        end = self.sampler.num_stages
        if rows.stage != end or not all(history and history[-1][0] == end for history in rows.history):
            return rows
        return rows.rescored(self.reward.inner.combine(rows.components, rows.prompt.tolist()))

    def features(self, population: Population) -> Tensor:
        """(B, D) float32; rows that were just scored are not decoded again.

        Raises:
            ValueError: the run was given no features.
        """
        if self._features is None:
            raise ValueError(NO_FEATURES)
        return self._features(self._decode(population))

    def forget(self) -> None:
        """Let go of what is kept of the rows scored last: their samples for features, and their previews."""
        self._decoded: tuple[Any, Any] = (None, None)
        self.previews: dict[tuple[int, str], Any] = {}
        self.scored: tuple[Population, ...] = ()

    def _decode(self, population: Population) -> Any:
        state, decoded = self._decoded
        if state is not population.state:
            final = population.stage == self.sampler.num_stages
            decoded = self.sampler.decode(population if final else self.sampler.predict_x0(population))
            self.sampler.ledger.share(population, "decodes")
            if self._features is not None:
                self._decoded = population.state, decoded
        return decoded
