"""Successive halving: schedules and costs by hand, survivors untouched, budgets, deadlines, prices."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny
import torch
from contract.cases import FakeClock, PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import BestOfN, Budget, Ledger, Request, SearchPipeline, SuccessiveHalving, run_search
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import Scores
from visearch.run import _price
from visearch.search.successive_halving import PRESETS
from visearch.statistics import expected_best

NAMED = ["auto", *PRESETS]
# 8 -> 4 -> 2 at stages 8 and 14 of 20; a given price keeps the clock out of it
AUTO = SuccessiveHalving(n=8, check_cost=0.0)


def rounds(search, sampler=None, reward=None, prompts=("a",), budget=None, **options):
    sampler, reward = sampler or GaussianToy(steps=20), reward or PixelReward()
    return list(run_search(sampler, reward, search, Request(tuple(prompts), seed=3), budget, **options))


def finish(search, *args, **options):
    return rounds(search, *args, **options)[-1].result


def calls(plan, sampler) -> float:
    """Model calls a prompt: the toys evaluate two guidance branches a call."""
    return plan.nfe / sampler.nfe(0, 1)


# --- schedules and costs --------------------------------------------------------------------------------------


def test_psp_costs_what_best_of_4_costs_but_scores_14_previews():
    sampler = GaussianToy(steps=64)
    plan = SuccessiveHalving(n=None, preset="psp").plan(sampler, 4 * sampler.nfe(0, 64))
    assert (plan.search.n, plan.search.calls, plan.search.keep) == (8, (16, 32), (4, 2))
    assert calls(plan, sampler) == 256 and plan.decodes == plan.rewards == 14 and plan.finals == 2
    assert plan.images == pytest.approx(4)


def test_the_single_preset_costs_6_04_calls_a_seed():
    sampler = GaussianToy(steps=20)
    for name in ("ttsnap-single", "ttsnap"):
        plan = SuccessiveHalving(n=100, preset=name).plan(sampler)
        assert plan.search.calls == (3, 7, 12) and plan.search.keep == (40, 16, 8)
        assert calls(plan, sampler) / 100 == pytest.approx(6.04)


def test_the_multi_preset_by_hand():
    sampler = GaussianToy(steps=20)
    plan = SuccessiveHalving(n=10, preset="ttsnap-multi").plan(sampler)
    assert plan.search.calls == (5, 7, 12) and plan.search.keep == (4, 2, 1)
    assert calls(plan, sampler) == 10 * 5 + 4 * 2 + 2 * 5 + 1 * 8 and plan.rewards == 10 + 4 + 2 + 1


@pytest.mark.parametrize(
    ("bar", "stages", "rows"),
    [(1, (), (1,)), (2, (), (2,)), (3, (9,), (4, 2)), (4, (8, 14), (6, 3, 2)), (8, (8, 14), (12, 6, 4))],
)
def test_auto_depends_on_how_many_could_be_finished(bar, stages, rows):
    sampler = GaussianToy(steps=20)
    plan = SuccessiveHalving(n=None).plan(sampler, bar * sampler.nfe(0, 20))
    assert plan.search.calls == stages and (plan.search.n, *plan.search.keep) == rows


def test_what_the_budget_leaves_widens_the_last_check_first():
    sampler = GaussianToy(steps=10)
    search = SuccessiveHalving(n=None, calls=(2, 5), keep=(0.5, 0.5))
    base = search.plan(sampler, 2 * 30)  # 6 rows to 2, 3 to 5, 2 to 10: 31 calls; 5, 3, 2: 29 calls
    assert (base.search.n, *base.search.keep) == (5, 3, 2) and calls(base, sampler) == 29
    for budget, rows, spent in ((44, (8, 4, 3), 43), (47, (8, 5, 3), 46)):
        plan = search.plan(sampler, 2 * budget)
        assert (plan.search.n, *plan.search.keep) == rows and calls(plan, sampler) == spent
    exact = replace(search, keep=(4, 0.5)).plan(sampler, 2 * 47)  # numbers are kept as they are
    assert (exact.search.n, *exact.search.keep) == (12, 4, 2)
    capped = replace(search, n=4).plan(sampler, 2 * 1000)
    assert (capped.search.n, *capped.search.keep) == (4, 2, 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("preset", NAMED)
def test_checks_scale_up_and_those_at_the_end_vanish(steps, preset):
    plan = SuccessiveHalving(n=16, preset=preset).plan(GaussianToy(steps=steps))
    shares = (0.4, 0.7) if preset == "auto" else PRESETS[preset][0]
    wanted = sorted({math.ceil(round(s * steps, 9)) for s in shares} - {steps})
    assert list(plan.search.calls) == wanted
    assert list(plan.search.keep) == sorted(plan.search.keep, reverse=True)


def test_of_several_checks_on_one_stage_the_last_counts():
    plan = SuccessiveHalving(n=10, calls=(0.1, 0.2, 0.5), keep=(0.5, 0.4, 0.5)).plan(GaussianToy(steps=4))
    assert plan.search.calls == (1, 2) and plan.search.keep == (4, 2)


def test_checks_move_to_the_next_milestone():
    plan = SuccessiveHalving(n=8, preset="psp").plan(TokenToy(chunks=3, per_chunk=4))
    assert plan.search.calls == (4, 8)
    plan = SuccessiveHalving(n=8).plan(TokenToy(chunks=3, per_chunk=4))
    assert plan.search.calls == (8,)


def test_shares_and_numbers_mix():
    plan = SuccessiveHalving(n=9, calls=(0.25, 10), keep=(4, 0.5)).plan(GaussianToy(steps=20))
    assert plan.search.calls == (5, 10) and plan.search.keep == (4, 2)
    kept = SuccessiveHalving(n=3, calls=5, keep=4).plan(GaussianToy(steps=20)).search
    assert kept.calls == () and kept.n == 3


def test_a_planned_search_plans_itself():
    sampler = GaussianToy(steps=20)
    for name in NAMED:
        plan = SuccessiveHalving(n=None, preset=name).plan(sampler, 9 * sampler.nfe(0, 20) + 7)
        assert plan.search.plan(sampler) == plan == plan.search.plan(sampler, 9 * sampler.nfe(0, 20) + 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number"),
        ({"n": 2.5}, "n=2.5 must be a whole number"),
        ({"preset": "pso"}, "preset='pso' is unknown; use auto, psp"),
        ({"preset": "explicit"}, "give calls and keep"),
        ({"calls": (0.5,)}, "one entry a check"),
        ({"keep": (0.5,)}, "one entry a check"),
        ({"calls": (0.4, 0.7), "keep": (0.5,)}, "one entry a check"),
        ({"calls": (1.5,), "keep": (0.5,)}, "calls=\\(1.5,\\)"),
        ({"calls": (0,), "keep": (0.5,)}, "calls=\\(0,\\)"),
        ({"calls": (3,), "keep": (1.0,)}, "keep=\\(1.0,\\)"),
        ({"calls": "3", "keep": (1,)}, "calls=\\('3',\\)"),
        ({"check_cost": -1}, "check_cost=-1"),
        ({"check_cost": math.nan}, "check_cost=nan"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SuccessiveHalving(**fields)


def test_bad_plans_are_refused():
    sampler = GaussianToy(steps=20)
    with pytest.raises(ValueError, match="n=None takes the number"):
        SuccessiveHalving(n=None).plan(sampler)
    with pytest.raises(ValueError, match="max_nfe=39 a prompt is too small"):
        SuccessiveHalving().plan(sampler, 39)
    with pytest.raises(ValueError, match="ascending"):
        SuccessiveHalving(calls=(0.7, 3), keep=(0.5, 0.5)).plan(sampler)


# --- survivors are left alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [GaussianToy, TokenToy])
@pytest.mark.parametrize("preset", NAMED)
def test_survivors_equal_the_same_seeds_unpruned(toy, preset):
    pruned = finish(SuccessiveHalving(n=12, preset=preset, check_cost=0.0), toy(), prompts=("a", "b"))
    whole = finish(BestOfN(n=12), toy(), prompts=("a", "b"))
    assert 0 < len(pruned.finished) < len(whole.finished)
    name = "x" if toy is GaussianToy else "tokens"
    rows = {
        (int(p), k): whole.finished.state.tensors[name][r]
        for r, (p, k) in enumerate(zip(whole.finished.prompt, whole.finished.candidate))
    }
    for r, (p, k) in enumerate(zip(pruned.finished.prompt, pruned.finished.candidate)):
        assert torch.equal(pruned.finished.state.tensors[name][r], rows[int(p), k])


@pytest.mark.parametrize("scheduler", [None, diffusers.HeunDiscreteScheduler], ids=["own", "order-2"])
def test_survivors_of_a_real_pipeline_equal_the_plain_call(scheduler):
    pipe = tiny.build("sd", scheduler() if scheduler else None)
    call = {"num_inference_steps": 5, "height": 32, "width": 32}
    sampler, search = DiffusionSampler(pipe, call), SuccessiveHalving(n=6, preset="psp")
    plan = search.plan(sampler)
    # one row at a time: kernels may differ in the last bit between batch shapes
    result = finish(search, sampler, rows=1, decode_rows=1)
    assert result.ledger.nfe == plan.nfe and result.ledger.decodes == plan.decodes
    assert plan.search.calls == (2, 3) and len(result.finished) == 2
    for r, seed in enumerate(result.finished.seed):
        image = pipe("a", generator=torch.Generator().manual_seed(seed), output_type="pt", **call).images[0]
        assert torch.equal(sampler.decode(result.finished.select([r]))[0], image)


def test_a_wrapped_pipeline_returns_a_survivor_as_the_plain_call_would():
    pipe, call = tiny.build("sd"), {"num_inference_steps": 4, "height": 32, "width": 32, "output_type": "pt"}
    budget = Budget(max_nfe=2 * 2 * 4 * 3)  # two prompts, guidance, four steps: best-of-3
    searched = SearchPipeline(pipe, PixelReward(), SuccessiveHalving(n=None, preset="psp"), budget, rows=1)
    images = searched(["a cow", "a cat"], generator=torch.Generator().manual_seed(5), **call).images
    result = searched.search_result
    assert {c["prompt"] for c in result.pruned} == {0, 1} and result.ledger.nfe <= budget.max_nfe
    for prompt, image, seed in zip(("a cow", "a cat"), images, result.winners().seed):
        plain = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
        assert torch.allclose(image, plain, rtol=0, atol=1e-4)
    few = SearchPipeline(pipe, PixelReward(), SuccessiveHalving(n=4, preset="psp"))
    with pytest.raises(ValueError, match="2 images a prompt are asked for but the search finishes 1"):
        few("a cow", num_images_per_prompt=2, **call)


def test_an_empty_schedule_is_best_of_n_and_says_so():
    with pytest.warns(UserWarning, match="no check left .* this is best-of-5"):
        pruned = finish(SuccessiveHalving(n=5, calls=(), keep=()))
    assert pruned.ranking == finish(BestOfN(n=5)).ranking
    assert any("best-of-5" in note for note in pruned.warnings)


@pytest.mark.parametrize("preset", NAMED)
def test_one_stage_is_never_quietly_best_of_n(preset):
    with pytest.warns(UserWarning, match="on 1 stages: this is best-of-4"):
        assert len(finish(SuccessiveHalving(n=4, preset=preset), GaussianToy(steps=1)).finished) == 4


@pytest.mark.parametrize("search", [AUTO, SuccessiveHalving(n=1), SuccessiveHalving(n=4, preset="psp")])
def test_nothing_is_said_where_there_is_nothing_to_say(search):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finish(search).warnings == ()


def test_candidates_are_a_prefix():
    small, large = (finish(SuccessiveHalving(n=n, preset="psp")) for n in (5, 11))
    seeds = [{c["candidate"]: c["seed"] for c in (*r.pruned, *r.ranking)} for r in (small, large)]
    assert sorted(seeds[0]) == list(range(5)) and seeds[0].items() <= seeds[1].items()


# --- scores ---------------------------------------------------------------------------------------------------


class Levelled(PixelReward):
    """``change(values, noise level)`` of the pixel reward."""

    name = "levelled"

    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def score(self, samples, prompts, *, noise_level=None, metadata=None) -> Scores:
        return Scores(self.change(super().score(samples, prompts).values, noise_level))


def test_preview_scores_never_compete_with_final_scores():
    high = Levelled(lambda v, level: v + (0 if level == math.inf else 1000))
    plain, found = finish(AUTO), rounds(AUTO, reward=high)
    assert [r.best for r in found[:-1]] == [{}] * (len(found) - 1)
    assert found[-1].best[0] < 900 and found[-1].result.ranking[0]["score"] == plain.ranking[0]["score"]
    assert all(c["score"] > 900 for c in found[-1].result.pruned)


def test_ties_go_to_the_lower_candidate():
    result = finish(AUTO, reward=Levelled(lambda v, level: torch.zeros_like(v)))
    assert sorted(result.finished.candidate) == [0, 1] and result.winners().candidate == (0,)


def test_previews_that_all_fail_still_leave_a_winner():
    reward = Levelled(lambda v, level: v if level == math.inf else torch.full_like(v, math.nan))
    with pytest.warns(UserWarning, match="NaN"):
        result = finish(AUTO, reward=reward)
    assert result.stopped == "done" and sorted(result.finished.candidate) == [0, 1]
    assert {c["score"] for c in result.pruned} == {-math.inf}


def test_a_batch_of_prompts_is_pruned_prompt_by_prompt():
    both = finish(AUTO, prompts=("a", "b"))
    for p, prompt in enumerate(("a", "b")):
        alone = finish(AUTO, prompts=(prompt,))
        assert [c["id"] for c in both.ranking if c["prompt"] == p] == [c["id"] for c in alone.ranking]
        assert [c["score"] for c in both.pruned if c["prompt"] == p] == [c["score"] for c in alone.pruned]


def test_closed_prompts_go_no_further():
    sampler, request, search = GaussianToy(steps=20), Request(("a", "b", "c")), AUTO
    sampler.meter = ledger = Ledger()

    def evaluate(rows):
        return rows.scored(PixelReward().score(sampler.decode(sampler.predict_x0(rows)), ["x"] * len(rows)).values)

    state = search.step(search.init(sampler, request), sampler, evaluate)
    spent = ledger.nfe
    state = search.step(replace(state, open_prompts=(1,)), sampler, evaluate)
    assert set(state.live.prompt.tolist()) == {1} and ledger.nfe - spent == 4 * sampler.nfe(8, 14)
    assert len(state.pruned) == 3 * 4 + 2 * 4 + 2
    assert search.done(replace(state, open_prompts=()))
    state = search.step(state, sampler, evaluate)
    assert search.done(state) and set(state.finished.prompt.tolist()) == {1}


# --- budgets --------------------------------------------------------------------------------------------------

shares = st.floats(0.05, 0.95)
schedules = st.lists(st.tuples(shares | st.integers(1, 12), shares | st.integers(1, 9)), max_size=4)


@st.composite
def searches(draw):
    preset = draw(st.sampled_from([None, *NAMED]))
    fields = {"n": draw(st.integers(1, 24)), "check_cost": draw(st.sampled_from([0.0, 0.3, 5.0, 40.0]))}
    if preset is None:
        order = sorted(draw(schedules), key=lambda c: c[0] if isinstance(c[0], int) else math.ceil(c[0] * 12))
        return SuccessiveHalving(calls=tuple(c for c, _ in order), keep=tuple(k for _, k in order), **fields)
    return SuccessiveHalving(preset=preset, **fields)


@pytest.mark.filterwarnings("ignore:halving")
@settings(deadline=None, max_examples=400)
@given(search=searches(), bar=st.none() | st.integers(1, 9), extra=st.integers(0, 23), tokens=st.booleans())
def test_any_schedule_keeps_its_plan_and_its_budget(search, bar, extra, tokens):
    sampler = TokenToy() if tokens else GaussianToy(steps=12)
    one = sampler.nfe(0, 12)
    cap = None if bar is None else bar * one + extra
    plan = search.plan(sampler, cap)
    rows = [plan.search.n, *plan.search.keep]
    assert rows == sorted(set(rows), reverse=True) and rows[0] <= search.n and rows[-1] == plan.finals >= 1
    assert list(plan.search.calls) == sorted(set(plan.search.calls) & set(sampler.milestones[:-1]))
    stages = [0, *plan.search.calls, 12]
    assert plan.nfe == sum(k * sampler.nfe(a, b) for k, a, b in zip(rows, stages, stages[1:]))
    assert plan.decodes == plan.rewards == sum(rows)
    result = finish(search, sampler, prompts=("a", "b"), budget=cap and Budget(max_nfe=2 * cap))
    assert result.stopped == "done" and len(result.finished) == 2 * plan.finals
    assert result.ledger.nfe == 2 * plan.nfe and result.ledger.decodes == 2 * plan.decodes
    assert result.ledger.rewards["pixel"] == 2 * plan.rewards
    assert result.ledger.images == pytest.approx(2 * plan.images)
    if cap is not None:
        price = search.check_cost
        assert plan.nfe <= cap and plan.nfe + price * plan.rewards <= cap + price * bar + 1e-6


@settings(deadline=None, max_examples=300)
@given(preset=st.sampled_from(NAMED), cap=st.integers(40, 800))
def test_more_budget_never_means_fewer_candidates_and_one_more_would_not_fit(preset, cap):
    sampler = GaussianToy(steps=20)
    plan = SuccessiveHalving(n=None, preset=preset).plan(sampler, cap)
    if preset != "auto":  # whose schedule changes at three and four
        assert SuccessiveHalving(n=None, preset=preset).plan(sampler, cap + 40).search.n >= plan.search.n
        more = SuccessiveHalving(n=plan.search.n + 1, preset=preset).plan(sampler)
        assert more.nfe > cap >= plan.nfe
    assert cap - plan.nfe < sampler.nfe(0, 20)


@pytest.mark.parametrize("target", [-100.0, 100.0])
def test_a_target_is_for_final_scores(target):
    result = finish(AUTO, budget=Budget(target=target))
    assert len(result.finished) == 2 and result.stopped == ("closed" if target < 0 else "done")


def test_rows_spent_by_others_are_respected():
    sampler, ledger = GaussianToy(steps=20), Ledger(nfe=100)
    result = finish(AUTO, sampler, budget=Budget(max_nfe=200), ledger=ledger)
    assert ledger.nfe <= 200 and len(result.finished) >= 1 and result.stopped == "budget"


# --- deadlines ------------------------------------------------------------------------------------------------


class Clocked(GaussianToy):
    """One whole candidate takes ``pace`` seconds of a clock of its own; decoding is free."""

    def __init__(self, monkeypatch, pace=1.0, steps=20) -> None:
        super().__init__(steps)
        self.clock, self.pace, self.batches = FakeClock(monkeypatch), pace, []

    def advance(self, rows, to):
        self.batches.append((len(rows), rows.stage, to))
        self.clock.now += self.pace * len(rows) * self.cost(rows.stage, to)
        return super().advance(rows, to)


def test_under_a_deadline_the_first_candidate_tells_the_pace(monkeypatch):
    sampler = Clocked(monkeypatch)
    result = finish(AUTO, sampler, budget=Budget(max_seconds=100))
    assert sampler.batches == [(1, 0, 8), (7, 0, 8), (4, 8, 14), (2, 14, 20)]
    assert result.stopped == "done" and result.ledger.nfe == AUTO.plan(sampler).nfe


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("preset", NAMED)
def test_a_deadline_shrinks_the_plan_and_always_leaves_a_winner(monkeypatch, seconds, preset):
    sampler = Clocked(monkeypatch)
    result = finish(SuccessiveHalving(n=64, preset=preset, check_cost=0.0), sampler, budget=Budget(max_seconds=seconds))
    assert sampler.clock.now <= max(seconds, 1.0) + 1e-9 and len(result.finished) >= 1
    assert result.stopped == ("deadline" if sampler.clock.now < 20 else "done")


def test_at_the_deadline_the_best_preview_is_finished_alone(monkeypatch):
    sampler = Clocked(monkeypatch)
    steps = run_search(sampler, PixelReward(), AUTO, Request(("a",)), Budget(max_seconds=100))
    next(steps), next(steps)
    sampler.clock.now = 1000.0
    *_, last = steps
    assert last.result.stopped == "deadline" and sampler.batches[-1] == (1, 8, 20)
    scores = {c["candidate"]: c["score"] for c in last.result.pruned if c["stage"] == 8}
    (winner,) = last.result.ranking
    assert dict(winner["history"])[8] >= max(scores.values()) and len(scores) == 7


# --- the price of a check -------------------------------------------------------------------------------------


def test_auto_drops_checks_that_cost_more_than_they_save():
    sampler = GaussianToy(steps=20)  # 40 rows a candidate; the checks of 16 save 8 x 24 and 4 x 12 rows
    plans = {y: SuccessiveHalving(n=16, check_cost=y).plan(sampler).search.calls for y in (0, 5.9, 6, 11.9, 12)}
    assert plans == {0: (8, 14), 5.9: (8, 14), 6: (8,), 11.9: (8,), 12: ()}
    steep = SuccessiveHalving(n=16, preset="steep")  # of 16, 7 and 3, its checks save 9 x 24, 4 x 16 and 2 x 8 rows
    plans = {y: replace(steep, check_cost=y).plan(sampler).search.calls for y in (0, 5.3, 5.4, 9.1, 9.2, 13.5)}
    assert plans == {0: (8, 12, 16), 5.3: (8, 12, 16), 5.4: (8, 12), 9.1: (8, 12), 9.2: (8,), 13.5: ()}
    assert steep.plan(sampler).search.keep == (7, 3, 1)
    assert SuccessiveHalving(n=16, preset="psp", check_cost=1000).plan(sampler).search.calls == (5, 10)


def test_a_known_price_is_paid_from_the_budget_of_best_of_n():
    sampler, cap = GaussianToy(steps=20), 8 * 40
    free, dear = (SuccessiveHalving(n=None, preset="psp", check_cost=y).plan(sampler, cap) for y in (0, 4))
    assert free.nfe == cap and free.rewards == 28 and dear.search.n < free.search.n
    assert dear.nfe + 4 * dear.rewards <= cap + 4 * 8


@pytest.mark.parametrize(
    ("price", "budget", "stages"),
    [(0.1, None, [8, 14]), (6.0, None, [8]), (6.0, 10_000, [8]), (6.0, 320, [8, 14])],
)
def test_auto_leaves_out_a_later_check_by_the_measured_price(monkeypatch, price, budget, stages):
    monkeypatch.setattr("visearch.run._price", lambda ledger: price if ledger.decodes else None)
    limits = None if budget is None else Budget(max_nfe=budget)
    result = finish(SuccessiveHalving(n=None if budget == 320 else 16), budget=limits)
    assert sorted({c["stage"] for c in result.pruned}) == stages and result.stopped == "done"
    if budget is not None:
        assert result.ledger.nfe <= budget


def test_the_price_is_measured_in_model_rows():
    seconds = {"denoiser": 2.0, "decode": 3.0, "reward": 1.0}
    ledger = Ledger(nfe=100, decodes=20)
    assert _price(ledger) is None
    ledger.seconds.update(seconds)
    assert _price(ledger) == pytest.approx(0.2 / 0.02)


# --- the value of a pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 7))
def test_expected_best_equals_enumeration(n):
    rng = np.random.default_rng(0)
    rewards, verdicts = rng.normal(size=6).round(1), rng.integers(0, 2, 6)
    subsets = list(itertools.combinations(range(6), n))
    picks = [max(s, key=lambda i: (rewards[i], -i)) for s in subsets]
    assert expected_best(rewards, n) == pytest.approx(np.mean([rewards[i] for i in picks]))
    assert expected_best(rewards, n, verdicts) == pytest.approx(np.mean([verdicts[i] for i in picks]))


def test_expected_best_breaks_ties_like_a_search():
    assert expected_best([1.0, 1.0, 1.0], 2, [0.0, 1.0, 2.0]) == pytest.approx((0 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("n", "values", "message"), [(0, None, "1 to 3"), (4, None, "1 to 3"), (1, [1.0], "one number")]
)
def test_expected_best_refuses(n, values, message):
    with pytest.raises(ValueError, match=message):
        expected_best([1.0, 2.0, 3.0], n, values)


@pytest.mark.parametrize("price", [0.0, 1.2, 3.0])
@pytest.mark.parametrize("cap", range(8, 80, 4))
def test_a_check_that_is_widened_until_it_drops_nobody_frees_its_budget(cap, price):
    """Four stages, where checks are dear: without any left, it is best-of-n of all that fits."""
    sampler = GaussianToy(steps=4)
    plan = SuccessiveHalving(n=None, check_cost=price).plan(sampler, cap)
    assert all(k < before for before, k in zip((plan.search.n, *plan.search.keep), plan.search.keep))
    if not plan.search.calls:
        assert plan.search.n == cap // sampler.nfe(0, 4)
