"""Cached drafts: what is drafted, what runs again, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from contract.cases import PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import BestOfN, Budget, Ledger, Population, Request, SuccessiveHalving, run_search
from visearch.pipelines.cache import StepCache
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy
from visearch.run import regenerate
from visearch.search.cached_drafts import CachedDrafts
from visearch.search.smc import SequentialMonteCarlo
from visearch.search.zero_order import ZeroOrder

HALF = StepCache(every=2, warmup=1, tail=0)  # skips every second stage of an even number
PROMPTS = ("a", "b")


def rounds(search, sampler=None, prompts=PROMPTS, budget=None, **options):
    sampler = sampler or GaussianToy()
    return list(run_search(sampler, PixelReward(), search, Request(tuple(prompts), seed=3), budget, **options))


def finish(search, *args, **options):
    return rounds(search, *args, **options)[-1].result


def drafts(result, prompt=0):
    return {c["id"]: c["score"] for c in result.pruned if c["prompt"] == prompt and c.get("draft")}


@pytest.fixture(scope="module")
def pipe_sampler() -> DiffusionSampler:
    return DiffusionSampler(tiny.build("cogview4"), {"num_inference_steps": 6, **tiny.FAMILIES["cogview4"].call})


@pytest.mark.parametrize("m", [1, 3])
def test_best_drafts_run_again_in_full(m):
    result = finish(CachedDrafts(BestOfN(n=8), m=m, cache=HALF))
    full = finish(BestOfN(n=8))
    scores = {(c["prompt"], c["id"]): c["score"] for c in full.ranking}
    for prompt in range(len(PROMPTS)):
        drafted = drafts(result, prompt)
        best = sorted(drafted, key=drafted.get, reverse=True)[:m]
        mine = {c["id"]: c["score"] for c in result.ranking if c["prompt"] == prompt}
        assert len(drafted) == 8 and set(mine) == set(best)
        assert mine == {i: scores[prompt, i] for i in best}
        assert all(mine[i] != drafted[i] for i in mine)
        assert {c["stage"] for c in result.pruned} == {8}
    assert set(result.samples) == {(c["prompt"], c["id"]) for c in result.ranking}


def test_the_winner_is_the_uncached_image_of_its_seed_bit_for_bit(pipe_sampler):
    search = CachedDrafts(BestOfN(n=4), cache="every=2,warmup=1,order=1")
    result = finish(search, pipe_sampler, [tiny.PROMPT])
    (winner,) = result.ranking
    plain = pipe_sampler.pipe(
        tiny.PROMPT,
        generator=torch.Generator().manual_seed(winner["seed"]),
        output_type="pt",
        **pipe_sampler.call,
    ).images[0]
    assert torch.equal(result.samples[0, winner["id"]], plain)


@pytest.mark.filterwarnings("ignore:no drafts")
@settings(deadline=None)
@given(
    st.integers(2, 9),
    st.integers(1, 3),
    st.sets(st.integers(1, 7), min_size=1),
    st.one_of(st.none(), st.integers(16, 200)),
)
def test_ledger_is_the_closed_form(n, m, skip, max_nfe):
    """N (1 - q) T + m T model rows, within any budget."""
    search, sampler, ledger = (
        CachedDrafts(BestOfN(n=n), m=m, cache=StepCache(skip=tuple(skip))),
        GaussianToy(),
        Ledger(),
    )
    plan, one = search.plan(sampler, max_nfe), sampler.nfe(0, 8)
    budget = None if max_nfe is None else Budget(max_nfe=max_nfe)
    result = finish(search, sampler, ["a"], budget, ledger=ledger)
    assert ledger.nfe == plan.nfe <= (max_nfe or ledger.nfe)
    assert ledger.images == pytest.approx(plan.images) and ledger.decodes == plan.decodes
    assert len(result.finished) == plan.finals
    share, inner = len(skip) / 8, plan.search.search.n
    if plan.search.m:
        assert plan.nfe == pytest.approx(inner * (1 - share) * one + plan.search.m * one)
        assert ledger.skipped_rows == inner * share * one and inner > (max_nfe or 0) // one
    else:
        assert plan.nfe == inner * one and ledger.skipped_rows == 0
    if max_nfe is None:
        assert (inner, plan.search.m) == ((n, min(m, n)) if n > m else (n, 0))


@pytest.mark.parametrize("cache", ["tau=0.0", "every=1", {"skip": ()}])
def test_a_cache_that_skips_nothing_is_best_of_n(pipe_sampler, cache):
    with pytest.warns(UserWarning, match="skips nothing of 6 stages"):
        result = finish(CachedDrafts(BestOfN(n=3), cache=cache), pipe_sampler, [tiny.PROMPT])
    plain = finish(BestOfN(n=3), pipe_sampler, [tiny.PROMPT])
    assert result.ranking == plain.ranking and result.ledger.nfe == plain.ledger.nfe


def test_auto_skips_nothing_of_four_steps_and_says_so():
    with pytest.warns(UserWarning, match="no drafts: cache='auto' skips nothing of 4 stages"):
        result = finish(CachedDrafts(BestOfN(n=3)), GaussianToy(steps=4))
    assert result.ledger.skipped_rows == 0 and len(result.finished) == 6
    assert CachedDrafts().plan(GaussianToy(steps=15)).nfe == 8 * 2 * 7 + 30


def test_a_threshold_is_planned_as_an_upper_bound(pipe_sampler):
    plan = CachedDrafts(BestOfN(n=3), cache=StepCache(tau=1e9, warmup=1)).plan(pipe_sampler)
    assert not plan.exact and plan.nfe == 4 * pipe_sampler.nfe(0, 6)
    result = finish(plan.search, pipe_sampler, [tiny.PROMPT])
    assert result.ledger.nfe == 3 * 4 + 12 and len(result.finished) == 1  # two of six steps, and one in full


def test_drafts_of_halving_are_pruned_by_their_previews():
    search = CachedDrafts(SuccessiveHalving(n=6, check_cost=0.0), cache=HALF)
    sampler = GaussianToy(steps=20)
    plan = search.plan(sampler)
    result = finish(search, sampler)
    assert result.ledger.nfe == 2 * plan.nfe
    for prompt in (0, 1):
        mine = [c for c in result.pruned if c["prompt"] == prompt]
        previews, finals = ([c for c in mine if c.get("draft") is d] for d in (None, True))
        assert {c["stage"] for c in previews} == set(plan.search.search.calls) and {c["stage"] for c in finals} == {20}
        assert len(previews) + len(finals) == 6


def test_a_draft_from_other_noise_runs_again_from_that_noise():
    search = CachedDrafts(ZeroOrder(n=6, k=2), m=4, cache=HALF)
    result = finish(search, prompts=["a"])
    plain = {c["id"]: c["score"] for c in result.ranking}
    assert any("noise" in i for i in plain) and set(plain) <= set(drafts(result))
    sampler, request = GaussianToy(), Request(("a",), seed=3)
    for row in range(len(result.finished)):
        one = result.finished.select([row])
        begun = sampler.init(request, request.seeds(0, one.candidate[0] + 1)[-1:])
        if one.noise[0] is not None:
            begun = sampler.set_noise(begun, one.noise[0][None], [1])
        assert torch.equal(sampler.advance(begun, 8).state.tensors["x"], one.state.tensors["x"])


def test_forked_drafts_run_again_with_their_forks_and_stochastic_steps():
    """All four particles descend from one: whoever runs again but the first copy is a fork."""
    smc = SequentialMonteCarlo(n=4, scale=1e6, trigger="always", events=(2, 5))
    search, sampler = CachedDrafts(smc, m=3, cache=StepCache(skip=(3, 6))), GaussianToy()
    result = finish(search, sampler, prompts=["a"])
    rows = result.finished
    forked = [r for r in range(len(rows)) if any(e.op == "fork" for e in rows.lineage[r])]
    assert len(forked) >= 2 and set(rows.id) <= set(drafts(result))
    for row in forked:  # the whole run by its lineage, without the cache
        assert regenerate(search.view(sampler), result.request, rows.select([row])).drift == 0
    assert len(rows.state.tensors["x"].unique(dim=0)) == 3
    assert result.ledger.nfe == 4 * 12 + 3 * 16


def test_drafts_that_were_renoised_are_refused():
    class Renoising(BestOfN):
        def step(self, state, sampler, evaluate):
            state = super().step(state, sampler, evaluate)
            rows = sampler.renoise(state.finished, 4, list(range(len(state.finished))))
            return replace(state, finished=evaluate(sampler.advance(rows, 8)))

    result = finish(CachedDrafts(Renoising(n=2), cache=HALF), prompts=["a"])
    assert result.stopped == "failed" and "use best-of-n, halving or smc" in str(result.error)


def test_companions_and_checkpoints_change_nothing(tmp_path):
    search = CachedDrafts(BestOfN(n=5, batch=2), m=2, cache=HALF)
    both = finish(search)
    for prompt, text in enumerate(PROMPTS):
        alone = finish(search, prompts=[text])
        assert [(c["id"], c["score"]) for c in both.ranking if c["prompt"] == prompt] == [
            (c["id"], c["score"]) for c in alone.ranking
        ]
    for count in (1, 2, 3):
        run = run_search(
            GaussianToy(), PixelReward(), search, Request(PROMPTS, seed=3), checkpoint=tmp_path / f"{count}"
        )
        for _ in range(count):
            next(run)
        run.close()
        resumed = finish(search, checkpoint=tmp_path / f"{count}")
        assert resumed.ranking == both.ranking and resumed.pruned == both.pruned


def test_whoever_is_cut_short_still_gets_a_full_run():
    ledger = Ledger()
    last = rounds(CachedDrafts(BestOfN(n=8, batch=2), m=2, cache=HALF), ledger=ledger, cancelled=lambda: ledger.nfe > 0)
    result = last[-1].result
    assert result.stopped == "cancelled" and len(result.finished) == 2
    assert ledger.nfe == 2 * (2 * 8 + 16) and len(drafts(result)) == 2


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="m=-1"):
        CachedDrafts(m=-1)
    with pytest.raises(ValueError, match="is no search"):
        CachedDrafts(search=8)
    with pytest.raises(ValueError, match="is no step cache"):
        CachedDrafts(cache=0.5).plan(GaussianToy())
    with pytest.raises(ValueError, match="too small"):
        CachedDrafts(cache=HALF).plan(GaussianToy(), 15)


def test_finished_rows_carry_nothing_of_the_drafts():
    result = finish(CachedDrafts(BestOfN(n=4), cache=HALF), prompts=["a"])
    row: Population = result.winners()
    assert [s for s, _ in row.history[0]] == [8] and len(row.batches[0]) == 1
