"""Low-frequency cross-entropy: the Haar split, the high band untouched, generations, elites and the variance floor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from contract.cases import PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import Ledger, Request, run_search
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.run import regenerate
from visearch.search.best_of_n import BestOfN
from visearch.search.paths import SearchOverPaths
from visearch.search.refine import Refine
from visearch.search.ses import LowFrequencyCrossEntropy, low_band, with_low_band


class GridToy(GaussianToy):
    """The Gaussian toy with its 48 numbers laid out as (3, 4, 4)."""

    def noise(self, population):
        return super().noise(population).reshape(-1, 3, 4, 4)

    def set_noise(self, population, noise, seeds):
        rows = super().set_noise(population, noise.flatten(1), seeds)
        return replace(rows, noise=tuple(noise.clone().unbind()))


def finish(search, sampler=None, prompts=("a",), **options):
    request = Request(tuple(prompts), seed=3)
    *_, last = run_search(sampler or GridToy(steps=4), PixelReward(), search, request, **options)
    assert last.result.error is None
    return last.result


# --- the Haar split -------------------------------------------------------------------------------------------


def haar(size: int, levels: int) -> torch.Tensor:
    """The orthonormal 1-d Haar transform, written out: averages first, then the details of each level."""
    if levels == 0:
        return torch.eye(size, dtype=torch.float64)
    half = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size // 2):
        half[i, 2 * i : 2 * i + 2] = 0.5**0.5
        half[size // 2 + i, 2 * i], half[size // 2 + i, 2 * i + 1] = 0.5**0.5, -(0.5**0.5)
    rest = torch.eye(size, dtype=torch.float64)
    rest[: size // 2, : size // 2] = haar(size // 2, levels - 1)
    return rest @ half


def split(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(low band, all other coefficients)."""
    coefficients = haar(x.shape[-2], levels) @ x @ haar(x.shape[-1], levels).T
    low = torch.zeros(x.shape[-2:], dtype=torch.bool)
    low[: x.shape[-2] >> levels, : x.shape[-1] >> levels] = True
    return coefficients[..., low], coefficients[..., ~low]


GRIDS = [((3, 4, 4), 2), ((2, 16, 8), 3), ((2, 3, 8, 16), 1), ((1, 6, 4), 1), ((2, 32, 32), 4)]


@pytest.mark.parametrize(("shape", "level"), GRIDS)
def test_the_low_band_is_haars_and_the_high_band_stays(shape, level):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = split(x, level)
    band = low_band(x, level)
    assert torch.allclose(band.flatten(-2), low, atol=1e-12)
    new = torch.randn(band.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = with_low_band(x, new, level)
    after, kept = split(moved, level)
    assert torch.allclose(kept, high, atol=1e-12) and torch.allclose(after, new.flatten(-2), atol=1e-12)
    assert torch.allclose(moved.norm() ** 2, x.norm() ** 2 - band.norm() ** 2 + new.norm() ** 2)  # orthonormal


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_the_inverse_is_exact(seed, dtype):
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert torch.equal(with_low_band(x, low_band(x, 3), 3), x)


def test_the_largest_level_that_divides_is_taken():
    sizes = {shape: low_band(torch.zeros(1, *shape), 4).shape[1:] for shape in [(64, 64), (8, 8), (6, 12), (32, 24)]}
    assert sizes == {(64, 64): (4, 4), (8, 8): (1, 1), (6, 12): (3, 6), (32, 24): (4, 3)}


@pytest.mark.parametrize("shape", [(48,), (4, 4), (3, 5, 4)])
def test_noise_without_such_a_grid_is_refused(shape):
    with pytest.raises(ValueError, match="even H and W"):
        low_band(torch.zeros(shape), 4)


# --- generations ----------------------------------------------------------------------------------------------


def noises(sampler, result, prompt=0):
    """Initial noises of a prompt's rows as they were run."""
    rows = result.finished
    own = sampler.noise(sampler.init(result.request, result.request.seeds(0, 1, [prompt])))[0]
    mine = [r for r in range(len(rows)) if rows.prompt[r] == prompt]
    return [own if rows.noise[r] is None else rows.noise[r] for r in mine], rows.score[mine]


def test_all_candidates_share_the_high_band_and_the_stream_of_candidate_0():
    sampler = GridToy(steps=4)
    result = finish(LowFrequencyCrossEntropy(n=12, population=4, elites=2), sampler, prompts=("a", "b"))
    for prompt in (0, 1):
        found, _ = noises(sampler, result, prompt)
        highs = [split(x, 2)[1] for x in found]
        assert len(found) == 12 and all(torch.allclose(h, highs[0], atol=1e-12) for h in highs)
        lows = torch.stack([split(x, 2)[0] for x in found])
        assert len(lows.unique(dim=0)) == 12
    rows = result.finished
    assert set(rows.candidate) == {0} and len({(int(p), r) for p, r in zip(rows.prompt, rows.id)}) == 24


def test_a_generation_is_drawn_from_the_elites_of_all_before():
    """Drawn again here from the rows alone: seeds, moments of the best two, floor."""
    sampler, search = GridToy(steps=4), LowFrequencyCrossEntropy(n=12, population=4, elites=2, floor=0.05)
    result = finish(search, sampler)
    found, scores = noises(sampler, result)
    for begin in (4, 8):
        best = scores[:begin].argsort(descending=True)[:2]
        lows = torch.stack([low_band(found[i], 4) for i in best])
        spread = lows.var(0, correction=0).clamp(min=0.05).sqrt()
        for i in range(4):
            seed = result.request.derive(0, "ses", begin, i)
            z = torch.randn(lows.shape[1:], generator=torch.Generator().manual_seed(seed))
            assert torch.allclose(low_band(found[begin + i], 4), lows.mean(0) + spread * z, atol=1e-6)
    for i in range(1, 4):
        z = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(result.request.derive(0, "ses", 0, i - 1)))
        assert torch.allclose(low_band(found[i], 4).float(), z, atol=1e-6)


def test_the_variance_does_not_fall_below_its_floor():
    def last_spread(floor):
        sampler = GridToy(steps=4)
        search = LowFrequencyCrossEntropy(n=200, population=20, elites=2, levels=2, floor=floor)
        found, _ = noises(sampler, finish(search, sampler))
        return float(torch.stack([low_band(x, 2) for x in found[-20:]]).var(0).mean())

    assert last_spread(0.05) > 0.025 > 5 * last_spread(0.0)


def test_it_climbs():
    once, searched = (finish(LowFrequencyCrossEntropy(n=n)).winners() for n in (1, 60))
    assert searched.score[0] > once.score[0] and searched.noise[0] is not None


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, (2, 2)), (6, (2, 2)), (9, (3, 2)), (15, (5, 2)), (30, (10, 5)), (60, (10, 5))]
)
def test_smaller_budgets_make_smaller_generations(n, sizes):
    sampler = GridToy(steps=4)
    plan = LowFrequencyCrossEntropy(n=60).plan(sampler, n * sampler.nfe(0, 4) + 1)
    assert (plan.search.population, plan.search.elites) == sizes
    assert plan.search.n == plan.decodes == n and plan.nfe == n * sampler.nfe(0, 4)


def test_one_candidate_is_the_unwrapped_run():
    sampler = GridToy(steps=4)
    row = finish(LowFrequencyCrossEntropy(n=1), sampler).finished
    assert row.id == ("0",)
    assert torch.equal(row.state.tensors["x"][0], sampler.sample("a", torch.Generator().manual_seed(3)))


def test_noise_that_is_no_grid_is_refused_before_anything_runs():
    ledger = Ledger()
    with pytest.raises(ValueError, match=r"\(1, 48\).*zero-order"):
        finish(LowFrequencyCrossEntropy(), GaussianToy(), ledger=ledger)
    assert ledger.nfe == 0


def test_after_another_search_it_begins_from_the_best_row_that_can_begin_again_else_from_the_next_candidate():
    ses = LowFrequencyCrossEntropy(n=4, population=2, elites=2)
    result = finish(Refine(BestOfN(n=3), ses), GridToy(steps=10))
    first = max((c for c in result.ranking if len(c["lineage"]) == 1), key=lambda c: c["score"])
    assert len(result.ranking) == 3 + 4 and len({c["id"] for c in result.ranking}) == 7
    assert {c["candidate"] for c in result.ranking if len(c["lineage"]) > 1} == {first["candidate"]}
    result = finish(Refine(SearchOverPaths(n=2, m=2), ses), GridToy(steps=10))
    assert any("begins from a new candidate" in note for note in result.warnings)
    new = [c for c in result.ranking if not any(e["op"] == "renoise" for e in c["lineage"])]
    assert len(new) == 4 and {c["candidate"] for c in new} == {2}


def test_the_low_part_of_the_field_behind_tokens():
    result = finish(LowFrequencyCrossEntropy(n=4, population=2, elites=2), TokenToy())
    assert len(result.ranking) == 4 and len({tuple(t.tolist()) for t in result.finished.state.tensors["tokens"]}) > 1


def test_on_a_pipeline():
    sampler = DiffusionSampler(tiny.build("cogview4"), {"num_inference_steps": 3, "height": 32, "width": 32})
    result = finish(LowFrequencyCrossEntropy(n=4, population=2, elites=2, levels=1), sampler)
    found, _ = noises(sampler, result)
    assert len(found) == 4
    highs = [split(x.double(), 1)[1] for x in found]
    assert all(torch.allclose(h, highs[0], atol=1e-6) for h in highs)
    assert regenerate(sampler, result.request, result.finished.select([3])).drift == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"population": 1}, "population=1 must be a whole number of at least 2"),
        ({"elites": 11}, "elites=11 cannot be more than population=10"),
        ({"levels": 0}, "levels=0"),
        ({"floor": -0.1}, "floor=-0.1"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        LowFrequencyCrossEntropy(**fields)
