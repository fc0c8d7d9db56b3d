"""One measurement of ``visearch compare``: a search, or best-of-N's pool, on one prompt, and all that is told of it."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visearch.budget import Budget, Ledger, MeteredReward
from visearch.comparison import CLOCKS, POOL
from visearch.monitor import exam
from visearch.prompts import request_of
from visearch.protocols import Request, Reward, Sampler, Search, identity, leaves, stable_hash
from visearch.rewards.features import FeaturesLike, resolve_features
from visearch.rewards.images import to_uint8
from visearch.run import SearchResult, run_search
from visearch.runs import Key
from visearch.search.best_of_n import BestOfN

__all__ = ["Bench", "Entry", "World", "fields_of"]


def fields_of(search: Search) -> str:
    """All fields of a search as text, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(search))


@dataclass(frozen=True)
class Entry:
    """A search at a budget; ``unit`` is "images", "seconds" or, for best-of-N's pool, "pool"."""

    label: str
    search: Search
    budget: float
    unit: str


@dataclass
class World:
    """The generator and the prompts.

    Args:
        lines: with ``prompt`` and what judges need.
        call: of a pipeline.
    """

    generator: Any
    lines: list[dict[str, Any]]
    call: dict[str, Any]
    seed: int
    model: str | None = None

    def __post_init__(self) -> None:
        from visearch.wrap import Samplers

        self.is_pipeline = not isinstance(self.generator, Sampler)
        self._samplers = Samplers()
        texts = tuple(line["prompt"] for line in self.lines)
        self.ids = Request(texts).prompt_ids  # fixed for the whole file, whatever part of it is run

    def of(self, index: int) -> tuple[Sampler, Request]:
        """A sampler and the request for one prompt."""
        from visearch.wrap import Job

        alone = request_of(self.lines[index], self.ids[index], self.seed)
        if not self.is_pipeline:
            return self.generator, replace(alone, call=self.call)
        generator = torch.Generator().manual_seed(alone.seed)
        job = Job.of(
            self.generator, BestOfN(n=2), *alone.prompts, generator=generator, samplers=self._samplers, **self.call
        )
        return job.sampler, replace(job.request, metadata=alone.metadata, prompt_ids=alone.prompt_ids)

    @property
    def recorded(self) -> bool:
        """Whether candidates are read from a pool: they have scores, and no pixels."""
        from visearch.pipelines.recorded import RecordedSampler

        return isinstance(self.generator, RecordedSampler)

    @cached_property
    def description(self) -> str:
        """What kind of generator it is, for the configuration."""
        if self.recorded:
            pool = self.generator.pool
            drawn = stable_hash(pool.seeds.tobytes().hex(), *(a.tobytes().hex() for a in pool.scores.values()))
            return f"pool {drawn:016x}, {len(pool.prompts)} prompts x {pool.size}"
        if self.is_pipeline:
            own, source = self.generator, self.generator.config.get("_name_or_path", "")
            if Path(source).is_absolute():  # where a folder lies is another thing elsewhere
                source = Path(source).name
            return f"{type(own).__name__} {source} {own.dtype} {own.device}"
        return f"{type(self.generator).__name__}, {self.generator.num_stages} stages"


class Bench:
    """Measures one search, or best-of-N's pool, on one prompt."""

    def __init__(
        self,
        world: World,
        guides: Sequence[Reward],
        judges: Sequence[Reward],
        features: FeaturesLike | None,
        returned: int,
        batch: int,
        rows: int | None,
    ) -> None:
        self.world, self.guides, self.judges = world, guides, judges
        self.returned, self.batch, self.rows = returned, batch, rows
        self.pixels = not world.recorded
        self.features_name = getattr(features, "__name__", features)
        self.features = [resolve_features(features, guide) for guide in guides]
        self._seconds: float | None = None

    def config(self) -> dict[str, Any]:
        """What must be equal for results to stand in one table."""
        plain = (str, int, float, type(None))
        return {
            "model": self.world.model or self.world.description,
            "generator": self.world.description,
            "call": {k: v if isinstance(v, plain) else repr(v) for k, v in self.world.call.items()},
            "seed": self.world.seed,
            "judges": [judge.name for judge in self.judges],
            "features": self.features_name,
            "returned": self.returned,
            "batch": self.batch,
            "rows": self.rows,
        }

    def weights(self) -> dict[str, str]:
        """Reward or judge -> what tells it from others of its name."""
        return {reward.name: identity(reward) for reward in (*self.guides, *self.judges)}

    def notes(self) -> list[str]:
        """What readers of the tables must know of rewards and judges."""
        notes = [f"{j.name} is {j.note}" for j in self.judges if getattr(j, "note", "")]
        for guide in self.guides:
            if known := getattr(guide, "not_held_out_for", ()):
                notes.append(
                    f"{guide.name} guides to its own exam: before judges of {', '.join(known)} it is not held-out"
                )
        return notes

    def exams(self) -> dict[str, list[str]]:
        """Reward -> judges before whose benchmark it is not held out."""
        return {guide.name: [judge.name for judge in self.judges if exam(guide, judge)] for guide in self.guides}

    def entries(
        self, searches: Mapping[str, Search], limits: Sequence[tuple[float, str]], strict: bool
    ) -> tuple[list[Entry], dict[str, str]]:
        """What can run within (budget, unit) each, and why the rest cannot.

        Raises:
            ValueError: something cannot run, and ``strict`` is set.
        """
        sampler, request = self.world.of(0)
        found, refused = [], {}
        for label, search in searches.items():
            for budget, unit in limits:
                try:
                    if getattr(search, "across_prompts", False):
                        raise ValueError("shares its budget over prompts, and here each prompt runs alone")
                    most = _max_nfe(sampler, budget) if unit == "images" else None
                    search.plan(sampler, most).search.init(sampler, request)
                except ValueError as error:
                    if strict:
                        raise ValueError(f"{label} at {budget:g} {unit}: {error}") from error
                    refused[label] = str(error)
                else:
                    found.append(Entry(label, search, budget, unit))
        return [entry for entry in found if entry.label not in refused], refused

    def largest(self, budgets: Sequence[float], seconds: Sequence[float]) -> float:
        """Of all budgets, in candidates; seconds are converted by a run that also warms up."""
        if not seconds:
            return max(budgets)
        self.warm_up(0)
        return max(*budgets, max(seconds) / self._seconds, 1.0)

    def warm_up(self, index: int) -> None:
        """Best-of-N once with each reward; nothing of it is kept but the seconds of one candidate."""
        if self._seconds is not None:
            return
        sampler, request = self.world.of(index)
        for guide in (*range(len(self.guides)), 0):  # the last one runs warm
            _, clock = self._run(sampler, request, guide, BestOfN(n=self.batch, batch=self.batch), Budget())
            self._seconds = clock["wall"][-1] / self.batch

    def key(self, index: int, guide: int, entry: Entry) -> Key:
        """Fields and label: defaults may change, and one search may be shown twice."""
        prompt, guided = str(self.world.ids[index]), self.guides[guide].name
        return prompt, guided, entry.label, fields_of(entry.search), entry.budget, entry.unit

    def measure(self, index: int, guide: int, entry: Entry) -> dict[str, Any]:
        """The record of one run: of a search that failed, its error.

        Raises:
            RuntimeError: best-of-N failed.
            KeyboardInterrupt: nothing is recorded.
        """
        sampler, request = self.world.of(index)
        budget = Budget()
        if entry.unit == "images":
            budget = Budget(max_nfe=_max_nfe(sampler, entry.budget))
        elif entry.unit == "seconds":
            budget = Budget(max_seconds=entry.budget)
        line = self.world.lines[index]
        prompt, reward, *_ = self.key(index, guide, entry)
        record = {
            "prompt": line["prompt"],
            "prompt_id": prompt,
            "tag": line.get("tag", ""),
            "reward": reward,
            "search": entry.label,
            "budget": entry.budget,
            "unit": entry.unit,
        }
        try:
            result, clock = self._run(sampler, request, guide, entry.search, budget)
        except Exception as error:
            if entry.unit == POOL:
                raise RuntimeError(f"best-of-n failed on {line['prompt']!r}: {error}") from error
            warnings.warn(f"{entry.label} failed on {line['prompt']!r}: {error!r}", stacklevel=2)
            return {**record, "error": f"{type(error).__name__}: {error}"}
        if entry.unit == POOL:
            one = sampler.nfe(0, sampler.num_stages)
            return {**record, "one": one, "clock": clock, **self._pool(result, guide)}
        seconds = {name: clock[name][-1] for name in CLOCKS}
        return {**record, "seconds": seconds, **self._winner(result, guide)}

    def _run(
        self, sampler: Sampler, request: Request, guide: int, search: Search, budget: Budget
    ) -> tuple[SearchResult, dict[str, list[float]]]:
        """The result, and after each round the finished candidates and the seconds so far by both clocks."""
        clock: dict[str, list[float]] = {"n": [], **{name: [] for name in CLOCKS}}
        sizes = {"rows": self.rows, "features": self.features[guide]}
        begin = time.process_time()
        for step in run_search(sampler, self.guides[guide], search, request, budget, **sizes):
            done = step.state.finished
            clock["n"].append(0 if done is None else len(done))
            spent = step.ledger.seconds
            clock["wall"].append(spent["total"] - spent["probe"])
            clock["cpu"].append(time.process_time() - begin)
            clock["model"].append(sum(spent.values()) - spent["total"] - spent["probe"])
        result = step.result
        if result.error is not None:
            raise result.error
        if result.finished is None:
            raise RuntimeError(f"stopped ({result.stopped}) before one candidate was finished")
        return result, clock

    def _pool(self, result: SearchResult, guide: int) -> dict[str, Any]:
        rows = result.finished
        order = sorted(range(len(rows)), key=lambda r: rows.candidate[r])
        samples = _stack(result, [rows.id[r] for r in order])
        scores = [float(rows.score[r]) for r in order]
        best = [sorted(range(n), key=lambda k: (-scores[k], k))[: self.returned] for n in range(1, len(order) + 1)]
        return {
            "score": [_finite(s) for s in scores],
            "judges": self._judge(samples, result.request),
            "nuisance": _nuisance(samples) if self.pixels else {},
            "diversity": self._diversity(samples, best, guide),
            "returned": self.returned,
            "seed": [rows.seed[r] for r in order],
            "ledger": _ledger(result.ledger, self.guides[guide]),
        }

    def _winner(self, result: SearchResult, guide: int) -> dict[str, Any]:
        best = result.winners(self.returned)
        samples = _stack(result, best.id)
        single = {name: values[0] for name, values in self._judge(samples[:1], result.request).items()}
        return {
            "score": _finite(float(best.score[0])),
            "judges": single,
            "nuisance": {name: v[0] for name, v in _nuisance(samples[:1]).items()} if self.pixels else {},
            "diversity": self._diversity(samples, [range(len(best))], guide)[0],
            "returned": len(best),
            "ancestors": len(set(best.candidate)),
            "winner": best.id[0],
            "seed": best.seed[0],
            "stopped": result.stopped,
            "ledger": _ledger(result.ledger, self.guides[guide]),
        }

    def _diversity(self, samples: Tensor, sets: Sequence[Sequence[int]], guide: int) -> list[float | None]:
        """Mean pairwise 1 - cosine in each set; a single one has no diversity."""
        if not self.pixels:
            return [None] * len(sets)
        features = torch.nn.functional.normalize(self.features[guide](samples).double().cpu(), dim=1)
        distance = (1 - features @ features.T).triu(1)
        return [float(distance[s][:, s].sum()) / max(1, math.comb(len(s), 2)) for s in map(list, sets)]

    def _judge(self, samples: Tensor, request: Request) -> dict[str, list[float | None]]:
        """Judge -> its scores, higher is better; ``None`` where it failed."""
        texts, lines = request.reward_prompts * len(samples), request.metadata * len(samples)
        scored = {j.name: MeteredReward(j, Ledger())(samples, texts, metadata=lines) for j in self.judges}
        return {name: [_finite(v) for v in values.tolist()] for name, values in scored.items()}


def _max_nfe(sampler: Sampler, images: float) -> int:
    return int(images * sampler.nfe(0, sampler.num_stages) + 1e-6)


def _ledger(ledger: Ledger, reward: Reward) -> dict[str, Any]:
    """Without the probes, which find out what fits in memory."""
    kinds = {k: round(v, 5) for k, v in ledger.seconds.items() if k != "probe"}
    kinds["total"] -= ledger.seconds["probe"]
    scores = max(ledger.rewards[leaf.name] for leaf in leaves(reward))
    return {"nfe": ledger.nfe, "decodes": ledger.decodes, "scores": scores, "seconds": kinds}


def _stack(result: SearchResult, ids: Sequence[str]) -> Tensor:
    return torch.stack([torch.as_tensor(result.samples[0, name]) for name in ids])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nuisance(samples: Tensor) -> dict[str, list[float]]:
    """What rewards are easily taken in by, mean over pixels in [0, 1], of samples (N, ..., 3, H, W)."""
    pixels = to_uint8(samples).float().cpu() / 255
    saturation = pixels.amax(-3) - pixels.amin(-3)
    return {
        "saturation": saturation.flatten(1).mean(1).tolist(),
        "brightness": pixels.flatten(1).mean(1).tolist(),
    }
