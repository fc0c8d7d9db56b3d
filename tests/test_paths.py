"""Search over paths: rounds on a grid, progress in each, costs in closed form, what stays and what is dropped."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from contract.cases import FakeClock, PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import Budget, Ledger, Request, run_search
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.search.paths import Leg, SearchOverPaths, legs

FINE = {s: 1 - s / 100 for s in range(1, 101)}


def shifted(steps: int, shift: float) -> dict[int, float]:
    """u of the stages of a flow schedule with a shift, as stock schedulers have it."""
    sigmas = {s: 1 - s / steps for s in range(1, steps + 1)}
    return {s: shift * u / (1 + (shift - 1) * u) for s, u in sigmas.items()}


def paths_legs(levels):
    return legs(levels, 0.11, 0.78, 0.81)


def finish(search, sampler=None, prompts=("a",), budget=None, **options):
    request = Request(tuple(prompts), seed=3)
    *_, last = run_search(sampler or GaussianToy(steps=20), PixelReward(), search, request, budget, **options)
    assert last.result.error is None
    return last.result


# --- rounds on a grid -----------------------------------------------------------------------------------------


def test_on_a_fine_grid_rounds_are_the_papers():
    assert paths_legs(FINE) == [Leg(89, 11, 92), Leg(92, 14, 95), Leg(95, 17, 98), Leg(98, 20, 100)]


def test_thirty_steps_at_shift_3_leave_one_round_and_fall_back():
    levels = shifted(30, 3)
    (begin,) = [s for s in levels if levels[s] == min((levels[t] for t in range(1, 30)), key=lambda u: abs(u - 0.11))]
    assert begin == 29  # whatever it lands at is the end: one round
    assert paths_legs(levels) == [Leg(s, 6, s + 1) for s in range(24, 30)]


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        (1, []),
        (2, []),
        (3, [Leg(2, 1, 3)]),
        (4, [Leg(3, 1, 4)]),
        (5, [Leg(4, 1, 5)]),
        (10, [Leg(8, 2, 9), Leg(9, 2, 10)]),
    ],
)
def test_coarse_grids(steps, found):
    assert paths_legs(shifted(steps, 3)) == found


@settings(deadline=None, max_examples=200)
@given(
    steps=st.integers(1, 60),
    shift=st.floats(0.2, 8),
    every=st.integers(1, 7),
    sigma=st.floats(0.01, 0.99),
    forward=st.floats(0.01, 0.98),
    more=st.floats(0.001, 1),
)
def test_every_round_goes_back_and_makes_progress(steps, shift, every, sigma, forward, more):
    levels = shifted(steps * every, shift)
    levels = {s: u for s, u in levels.items() if s % every == 0}
    found = legs(levels, sigma, forward, forward + more)
    assert all(leg.back < leg.begin < leg.land and set(leg) <= set(levels) for leg in found)
    assert all(a.land == b.begin for a, b in zip(found, found[1:]))
    assert not found or found[-1].land == steps * every
    if steps >= 3:
        assert found


def test_levels_come_from_the_sampler():
    sampler = GaussianToy(steps=100)
    begin, back, land = SearchOverPaths()._legs(sampler)[0]
    assert [sampler.time(s) for s in (begin, back, land)] == pytest.approx([0.11, 0.89, 0.08])


# --- costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 10, 20, 100])
@pytest.mark.parametrize(("n", "m", "rounds"), [(2, 4, None), (3, 2, 1), (1, 3, 0), (2, 1, None)])
def test_the_ledger_is_the_closed_form(steps, n, m, rounds):
    sampler, search = GaussianToy(steps=steps), SearchOverPaths(n=n, m=m, rounds=rounds)
    found = search._legs(sampler)
    ledger = Ledger()
    result = finish(search, sampler, ledger=ledger)
    first, last = (found[0].begin, found[-1].land) if found else (steps, steps)
    calls = n * first + n * m * sum(leg.land - leg.back for leg in found) + n * (steps - last)
    finals = 0 if found and last == steps else n
    plan = search.plan(sampler)
    assert plan.nfe == ledger.nfe == 2 * calls
    assert plan.decodes == ledger.decodes == n * m * len(found) + finals
    assert plan.finals == len(result.finished) == (finals or n * m)
    assert len(result.pruned) == sum(n * (m - 1) for leg in found if leg.land < steps)


@settings(deadline=None, max_examples=30)
@given(cap=st.integers(40, 4000))
def test_a_budget_is_never_exceeded_and_well_spent(cap):
    sampler = GaussianToy(steps=20)
    plan = SearchOverPaths(n=4, m=4).plan(sampler, cap)
    assert plan.nfe <= cap and SearchOverPaths(n=4, m=4).plan(sampler, plan.nfe).nfe == plan.nfe
    ledger = Ledger()
    finish(plan.search, sampler, budget=Budget(max_nfe=cap), ledger=ledger)
    assert ledger.nfe == plan.nfe
    if cap >= 200:
        assert plan.nfe > 0.5 * min(cap, SearchOverPaths(n=4, m=4).plan(sampler).nfe) and plan.search.rounds > 0


def test_one_candidate_is_the_unwrapped_run():
    sampler = GaussianToy(steps=20)
    row = finish(SearchOverPaths(), sampler, budget=Budget(max_nfe=sampler.nfe(0, 20))).finished
    assert row.id == ("0",)
    assert torch.equal(row.state.tensors["x"][0], sampler.sample("a", torch.Generator().manual_seed(3)))


# --- what happens to rows -------------------------------------------------------------------------------------


def test_the_best_previews_of_a_round_stay():
    sampler, search = GaussianToy(steps=100), SearchOverPaths(n=2, m=3)
    result = finish(search, sampler, prompts=("a", "b"))
    found = search._legs(sampler)
    for prompt in (0, 1):
        winners = [c for c in result.ranking if c["prompt"] == prompt]
        for leg in found[:-1]:
            dropped = [c["score"] for c in result.pruned if c["prompt"] == prompt and c["stage"] == leg.land]
            kept = {c["id"].rsplit("/", 1)[0]: dict(c["history"])[leg.land] for c in winners}
            assert len(dropped) == 2 * 3 - 2 and min(kept.values()) >= max(dropped)
        assert all(
            [e["stage"] for e in c["lineage"] if e["op"] == "renoise"] == [x.begin for x in found] for c in winners
        )
        assert len({c["id"] for c in winners}) == len(winners) == 6


@pytest.mark.parametrize(("start", "to"), [(89, 11), (24, 6), (9, 1), (19, 18)])
def test_renoising_a_single_point_has_exactly_the_variance_of_the_stage(start, to):
    sampler, request = GaussianToy(steps=100 if start == 89 else 30, scale=0.0), Request(("a",))
    rows = sampler.advance(sampler.init(request, request.seeds(0, 800)), start)
    point = rows.state.tensors["target"]
    assert torch.allclose(rows.state.tensors["x"] - (1 - sampler.time(start)) * point, torch.zeros(()).double(), atol=6)
    back = sampler.renoise(rows, to, [request.derive(0, "paths", to, i) for i in range(800)])
    t = sampler.time(to)
    noise = (back.state.tensors["x"] - (1 - t) * point) / t
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 * count**-0.5
    assert abs(float((noise**2).mean()) - 1) < 4 * math.sqrt(2 / count)


def test_tokens_are_masked_again_and_one_chunk_is_gained():
    result = finish(SearchOverPaths(n=1, m=3), TokenToy())
    assert [c["lineage"][-1]["op"] for c in result.ranking] == ["renoise"] * 3


def test_a_grid_without_rounds_is_best_of_n_and_says_so():
    sampler = GaussianToy(steps=2)
    with pytest.warns(UserWarning, match="no round on 2 stages: this is best-of-3"):
        result = finish(SearchOverPaths(n=3), sampler)
    assert sorted(result.finished.id) == ["0", "1", "2"] and result.pruned == ()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0, 8.0, 40.0])
def test_a_deadline_always_leaves_a_winner(monkeypatch, seconds):
    clock = FakeClock(monkeypatch)
    sampler = clock.by_cost(GaussianToy(steps=20))
    result = finish(SearchOverPaths(n=2, m=4), sampler, budget=Budget(max_seconds=seconds))
    assert clock.now <= max(seconds, 1.0) + 1e-9 and len(result.finished) >= 1
    assert result.stopped == ("done" if seconds == 40 else "deadline")
    if seconds >= 8:
        assert any(e["op"] == "renoise" for c in result.ranking for e in c["lineage"])


def test_on_a_pipeline():
    sampler = DiffusionSampler(tiny.build("cogview4"), {"num_inference_steps": 4, "height": 32, "width": 32})
    search = SearchOverPaths(n=1, m=2)
    ledger = Ledger()
    result = finish(search, sampler, ledger=ledger)
    assert search.plan(sampler).nfe == ledger.nfe and len(result.finished) == 2
    assert all(c["lineage"][-1]["op"] == "renoise" for c in result.ranking)


def test_unknown_noise_levels_are_refused_before_anything_runs(monkeypatch):
    sampler, ledger = GaussianToy(steps=20), Ledger()

    def unknown(stage):
        raise ValueError("noise levels of FooScheduler are unknown; use DDIM")

    sampler.noise_level = unknown
    with pytest.raises(ValueError, match="FooScheduler"):
        finish(SearchOverPaths(), sampler, ledger=ledger)
    assert ledger.nfe == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"m": 1.5}, "m=1.5"),
        ({"rounds": -1}, "rounds=-1"),
        ({"sigma": 0.0}, r"sigma=0.0 must lie in \(0, 1\)"),
        ({"forward": 1.0}, "forward=1.0"),
        ({"backward": 0.7}, r"backward=0.7 must be greater than forward=0.78"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SearchOverPaths(**fields)
