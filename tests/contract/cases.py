"""One small case per registered search and sampler; a new registry entry without a case fails the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from visearch.allocation import assign, spreads
from visearch.pipelines import SAMPLERS
from visearch.protocols import Population, Request, Sampler, Scores
from visearch.run import SearchResult
from visearch.search import SEARCHES
from visearch.search.best_of_n import BestOfN
from visearch.search.successive_halving import SuccessiveHalving
from visearch.search.zero_order import ZeroOrder

PROMPTS = ("a photo of a cow", "a photo of two cats")


class PixelReward:
    """Linear in the pixels, computed row by row: exact on any batch split."""

    name, higher_is_better, range = "pixel", True, (-10.0, 10.0)
    licence, source, needs = "Apache-2.0", "tests", frozenset({"pixels"})

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, samples: Tensor, prompts: Sequence[str], *, noise_level=None, metadata=None) -> Scores:
        self.calls.append(len(prompts))
        flat = samples.double().flatten(1)
        weights = torch.linspace(-1, 1, flat.shape[1], dtype=torch.float64)
        return Scores(torch.tensor([float((row * weights).sum()) for row in flat]))


def toy_case(name: str) -> Case:
    cls = SAMPLERS.load(name)
    return Case(make=lambda: cls(), bare=lambda sampler, prompt, seed: sampler.sample(prompt, generator(seed)))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """How to build a sampler and to run its generator without visearch.

    ``bare(sampler, prompt, seed)`` returns what ``outcome`` picks from a finished row.
    """

    make: Callable[[], Sampler]
    bare: Callable[[Sampler, str, int], Tensor]
    call: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    decoded: bool = False

    def request(self, prompts: Sequence[str] = PROMPTS, seed: int = 7) -> Request:
        return Request(tuple(prompts), seed=seed, call=self.call)

    def same(self, a: Tensor, b: Tensor) -> bool:
        return torch.equal(a, b) if self.tolerance == 0 else torch.allclose(a, b, rtol=0, atol=self.tolerance)


KINDS = {"flow": "cogview4", "epsilon": "sd", "v": "pixart", "video": "wan"}


def diffusion_case(kind: str) -> Case:
    """A tiny pipeline driven by replay; the outcome is what it decodes.

    Flow matching and an epsilon model on DDIM; a v-prediction whose schedule begins at pure noise; a video flow model
    with two denoisers and a multistep scheduler.
    """
    import tiny
    from diffusers import DDIMScheduler

    from visearch.pipelines.diffusion import DiffusionSampler

    name = KINDS[kind]
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(clip_sample=False, **options) if kind == "v" else None
    pipe, call = tiny.build(name, scheduler), {"num_inference_steps": 4, **tiny.FAMILIES[name].call}

    def bare(sampler: Sampler, prompt: str, seed: int) -> Tensor:
        return pipe(prompt, generator=generator(seed), output_type="pt", **call)[0][0]

    return Case(make=lambda: DiffusionSampler(pipe, call), bare=bare, tolerance=1e-4, decoded=True)


def recorded_case() -> Case:
    """A pool of its own kind of samples: each says which prompt, stage and candidate it is."""
    from visearch.pool import Pool

    request = Request((*PROMPTS, "a"), seed=7)
    seeds = np.array([[request.seed_of(p, k) for k in range(16)] for p in range(3)])
    levels = {"noise_levels": [-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}
    pool = Pool.from_arrays(
        np.zeros((3, 16, 8)), seeds=seeds, prompts=request.prompts, rows=range(2, 17, 2), meta=levels
    )

    def bare(sampler: Sampler, prompt: str, seed: int) -> Tensor:
        p = pool.prompts.index(prompt)
        return torch.tensor([p, 7, pool.seeds[p].tolist().index(seed)])[:, None, None] / 2**20

    return Case(make=lambda: SAMPLERS.load("recorded")(pool), bare=bare, decoded=True)


# --- samplers that misbehave ------------------------------------------------------------------------------------


def changed(sampler: Sampler, **wrappers: Callable[..., Any]) -> Sampler:
    """The sampler with methods that go through a wrapper, ``wrapper(method, *args)``; so do those of its views."""
    cls = type(sampler)

    def method(name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: wrapper(partial(getattr(cls, name), self), *args)

    sampler.__class__ = type(cls.__name__, (cls,), {name: method(name, w) for name, w in wrappers.items()})
    return sampler


def tight(limit: int) -> Callable[..., Any]:
    """A wrapper for :func:`changed`: out of memory with more than ``limit`` rows."""

    def call(method: Callable[..., Any], rows: Population, *args: Any) -> Any:
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return method(rows, *args)

    return call


class FakeClock:
    """The driver's clock: it stands still but while a sampler that goes :meth:`by_cost` advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("visearch.run.time", "visearch.budget.time"):
            monkeypatch.setattr(f"{module}.perf_counter", lambda: self.now)

    def by_cost(self, sampler: Sampler) -> Sampler:
        """The sampler, taking one second an image-equivalent; so do its views."""

        def slow(advance: Callable[..., Population], rows: Population, to: int) -> Population:
            self.now += len(rows) * sampler.cost(rows.stage, to)
            return advance(rows, to)

        return changed(sampler, advance=slow)


# --- searches ---------------------------------------------------------------------------------------------------

# Hyperparameters that make each search small; what is not named here runs with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "allocated": {"n": 5, "first": 3, "width": 2},
    "best-of-n": {"n": 5, "batch": 2},
    "cached-drafts": {"search": BestOfN(n=5, batch=2), "cache": {"every": 2, "warmup": 1}},
    "conformal": {"n": 5, "calls": (0.3, 0.6), "margins": (4.0, 0.0)},
    # a price that is given, not measured, so that the schedule does not hang on the clock
    "evosearch": {"n": 5, "generations": 3},
    "halving": {"n": 6, "check_cost": 0.0},
    "paths": {"n": 2, "m": 2},
    "refine": {"first": SuccessiveHalving(n=4, check_cost=0.0), "then": ZeroOrder(n=3, k=2)},
    "ses": {"n": 6, "population": 2, "elites": 2},
    "smc": {"trigger": "always"},
    "zero-order": {"n": 6, "k": 2},
}


def nothing_dropped(search: Any, result: SearchResult) -> None:
    assert result.pruned == ()
    assert len(result.finished) == search.n * len(result.request.prompts)


def previews_pruned(search: Any, result: SearchResult) -> None:
    """Every candidate is finished or on record, and nobody was dropped for a better preview score than a survivor's."""
    assert search.calls and {c["stage"] for c in result.pruned} == set(search.calls)
    for prompt in range(len(result.request.prompts)):
        finished = [c for c in result.ranking if c["prompt"] == prompt]
        pruned = [c for c in result.pruned if c["prompt"] == prompt]
        assert sorted(c["candidate"] for c in [*finished, *pruned]) == list(range(search.n))
        assert len(finished) == search.keep[-1]
        for c in pruned:
            assert c["seed"] == result.request.seed_of(prompt, c["candidate"])
            survivors = [dict(f["history"])[c["stage"]] for f in finished]
            assert c["score"] <= min(survivors)


def margins_kept(search: Any, result: SearchResult) -> None:
    """Dropped are exactly those that lay beyond the margin of a check."""
    assert result.pruned and {c["stage"] for c in result.pruned} <= set(search.calls)
    margins = dict(zip(search.calls, search.margins, strict=True))
    for prompt in range(len(result.request.prompts)):
        finished = [c for c in result.ranking if c["prompt"] == prompt]
        pruned = [c for c in result.pruned if c["prompt"] == prompt]
        assert sorted(c["candidate"] for c in [*finished, *pruned]) == list(range(search.n))
        for stage in {c["stage"] for c in pruned}:
            survivors = [dict(f["history"])[stage] for f in finished if stage in dict(f["history"])]
            dropped = [c["score"] for c in pruned if c["stage"] == stage]
            assert min(survivors) >= max([*survivors, *dropped]) - margins[stage] - 1e-5
            if stage == search.calls[-1]:  # whoever led an earlier check may have been dropped since
                assert max(dropped) < max(survivors) - margins[stage] + 1e-5


def greedily_shared(search: Any, result: SearchResult) -> None:
    """All of the mean budget is spent, each prompt has a prefix of its candidates, and counts follow the rule."""
    drawn = {p: sorted(c["candidate"] for c in result.ranking if c["prompt"] == p) for p in range(len(PROMPTS))}
    assert all(k == list(range(len(k))) and len(k) >= search.first for k in drawn.values())
    assert sum(map(len, drawn.values())) == search.n * len(drawn)
    scores = {
        p: [c["score"] for c in sorted(result.ranking, key=lambda c: c["candidate"]) if c["prompt"] == p] for p in drawn
    }
    counts = dict.fromkeys(drawn, search.first)
    while (left := search.n * len(drawn) - sum(counts.values())) > 0:
        spread = spreads({p: scores[p][: counts[p]] for p in counts})
        for p, more in assign(counts, spread, search.a, min(search.width, left)).items():
            counts[p] += more
    assert counts == {p: len(k) for p, k in drawn.items()}


def particles_resampled(search: Any, result: SearchResult) -> None:
    """Some were copied over others, which are on record; all of the last generation are finished and weighed."""
    assert search.events and {c["stage"] for c in result.pruned} <= set(search.events)
    assert len(result.finished) == search.n * len(result.request.prompts)
    assert any(e["op"] == "fork" and e["stage"] in search.events for c in result.ranking for e in c["lineage"])
    for prompt in range(len(result.request.prompts)):
        ids = {c["id"] for c in [*result.ranking, *result.pruned] if c["prompt"] == prompt}
        assert len({i.split("/")[0] for i in ids}) == search.n
        assert [s for s, _ in result.ranking[0]["history"]][:-1] == list(search.events)


def centres_left(search: Any, result: SearchResult) -> None:
    """All rows differ by their initial noise alone: candidates begun anew, and neighbours of what was run before."""
    assert result.pruned == ()
    for prompt in range(len(result.request.prompts)):
        mine = [c for c in result.ranking if c["prompt"] == prompt]
        plain, moved = [c["candidate"] for c in mine if len(c["lineage"]) == 1], noised(mine)
        assert len(mine) == search.n == len(plain) + len(moved) and len(moved) >= search.k
        assert sorted(plain) == list(range(len(plain))) and {c["candidate"] for c in moved} <= set(plain)


def noised(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for c in candidates if [e["op"] for e in c["lineage"]] == ["init", "noise"]]


def branched_and_kept(search: Any, result: SearchResult) -> None:
    """Winners went back in every round; each round but one that ends at the last stage dropped all but N of N M."""
    stages = {c["stage"] for c in result.pruned}
    for prompt in range(len(result.request.prompts)):
        mine = [c for c in result.ranking if c["prompt"] == prompt]
        dropped = [c for c in result.pruned if c["prompt"] == prompt]
        assert len(mine) == search.n * (search.m if len(stages) < search.rounds else 1)
        assert len(dropped) == search.n * (search.m - 1) * len(stages)
        for c in mine:
            assert sum(e["op"] == "renoise" for e in c["lineage"]) == search.rounds >= 1


def one_high_band(search: Any, result: SearchResult) -> None:
    """Candidate 0, and others that begin from its noise with another low band."""
    assert result.pruned == ()
    for prompt in range(len(result.request.prompts)):
        mine = [c for c in result.ranking if c["prompt"] == prompt]
        assert len(mine) == search.n and {c["candidate"] for c in mine} == {0}
        assert len(noised(mine)) == search.n - 1


def winners_refined(search: Any, result: SearchResult) -> None:
    """The first search pruned, and around the best that it finished the second one drew."""
    assert {c["stage"] for c in result.pruned} == set(search.first.calls)
    for prompt in range(len(result.request.prompts)):
        mine = [c for c in result.ranking if c["prompt"] == prompt]
        assert len(mine) == search.first.keep[-1] + search.then.n
        first = max((c for c in mine if len(c["history"]) > 1), key=lambda c: c["score"])
        assert sum(c["candidate"] == first["candidate"] for c in noised(mine)) >= search.then.k


def best_draft_again(search: Any, result: SearchResult) -> None:
    """The candidate whose draft scored best is the only one finished, with the score of its full run."""
    for prompt in range(len(result.request.prompts)):
        drafts = [c for c in result.pruned if c["prompt"] == prompt]
        (finished,) = [c for c in result.ranking if c["prompt"] == prompt]
        assert len(drafts) == search.search.n and all(c["draft"] for c in drafts)
        best = max(drafts, key=lambda c: c["score"])
        assert finished["id"] == best["id"] and finished["score"] != best["score"]
        assert len(finished["history"]) == 1


def generations_born(search: Any, result: SearchResult) -> None:
    """Nobody is dropped; all but the first candidates are children of a mutation, each at its generation's restart."""
    assert result.pruned == () and search.restarts
    for prompt in range(len(result.request.prompts)):
        rows = [c for c in result.ranking if c["prompt"] == prompt]
        moved = [c["lineage"][-1] for c in rows if c["lineage"][-1]["op"] in ("perturb", "renoise")]
        assert len(rows) - len(moved) == search.n
        born = dict.fromkeys(search.restarts, 0)
        for event in moved:
            born[0 if event["op"] == "perturb" else int(event["value"])] += 1
        assert list(born.values()) == [k - search.elites for k in search.sizes[1:]]


# What each search does to its candidates, found again in the result; takes the planned search.
EVENTS: dict[str, Callable[[Any, SearchResult], None]] = {
    "allocated": greedily_shared,
    "best-of-n": nothing_dropped,
    "cached-drafts": best_draft_again,
    "conformal": margins_kept,
    "evosearch": generations_born,
    "fk": particles_resampled,
    "halving": previews_pruned,
    "paths": branched_and_kept,
    "refine": winners_refined,
    "ses": one_high_band,
    "smc": particles_resampled,
    "zero-order": centres_left,
}

SAMPLER_CASES: dict[str, Callable[[], Case]] = {
    **{f"diffusion-{kind}": partial(diffusion_case, kind) for kind in KINDS},
    "gaussian-toy": lambda: toy_case("gaussian-toy"),
    "recorded": recorded_case,
    "token-toy": lambda: toy_case("token-toy"),
}


# Samplers that cannot serve a search, and what the refusal says.
REFUSALS: dict[tuple[str, str], str] = {
    ("cached-drafts", "token-toy"): "has no other view",
    ("ses", "gaussian-toy"): "low frequencies need noise",
    **{
        (name, "recorded"): "can only be selected from"
        for name in ("cached-drafts", "evosearch", "fk", "paths", "refine", "ses", "smc", "zero-order")
    },
}


def make_search(name: str, **changes: Any) -> Any:
    return SEARCHES.load(name)(**{**SMALL.get(name, {}), **changes})
