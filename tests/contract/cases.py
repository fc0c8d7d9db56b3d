"""One small case per registered search and sampler; a new registry entry without a case fails the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visearch.pipelines import SAMPLERS
from visearch.protocols import Request, Sampler, Scores
from visearch.run import SearchResult
from visearch.search import SEARCHES

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


def diffusion_case() -> Case:
    """The embedded world's pipeline class at toy size, driven by replay; the outcome is the decoded image."""
    import tiny

    from visearch.pipelines.diffusion import DiffusionSampler

    pipe, call = tiny.build("cogview4"), {"num_inference_steps": 4, "height": 32, "width": 32}

    def bare(sampler: Sampler, prompt: str, seed: int) -> Tensor:
        return pipe(prompt, generator=generator(seed), output_type="pt", **call).images[0]

    return Case(make=lambda: DiffusionSampler(pipe, call), bare=bare, tolerance=1e-4, decoded=True)


# Hyperparameters that make each search small; what is not named here runs with its defaults.
SMALL: dict[str, dict[str, Any]] = {
    "best-of-n": {"n": 5, "batch": 2},
    # a price that is given, not measured, so that the schedule does not hang on the clock
    "halving": {"n": 6, "check_cost": 0.0},
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


# What each search does to its candidates, found again in the result; takes the planned search.
EVENTS: dict[str, Callable[[Any, SearchResult], None]] = {"best-of-n": nothing_dropped, "halving": previews_pruned}

SAMPLER_CASES: dict[str, Callable[[], Case]] = {
    "diffusion": diffusion_case,
    "gaussian-toy": lambda: toy_case("gaussian-toy"),
    "token-toy": lambda: toy_case("token-toy"),
}


def make_search(name: str, **changes: Any) -> Any:
    return SEARCHES.load(name)(**{**SMALL.get(name, {}), **changes})
