"""Pruning by margins: who is dropped, what it costs, deadlines; and the guarantee of conformal risk control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contract.cases import FakeClock, PixelReward
from hypothesis import given
from hypothesis import strategies as st

from visearch import BestOfN, Budget, Request, run_search
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.risk import conformal_factor, coverage
from visearch.search.conformal import ConformalHalving

SEARCH = ConformalHalving(n=8, calls=(0.3, 0.6), margins=(0.1, 0.05))


def finish(search, prompts=("a", "b"), budget=None, sampler=None, **options):
    request = Request(tuple(prompts), seed=3)
    rounds = run_search(sampler or GaussianToy(steps=10), PixelReward(), search, request, budget, **options)
    return list(rounds)[-1]


# --- the search -----------------------------------------------------------------------------------------------


def test_without_margins_it_is_best_of_n_and_says_so():
    with pytest.warns(UserWarning, match="this is best-of-6; find margins with visearch calibrate"):
        last = finish(ConformalHalving(n=6))
    assert last.result.ranking == finish(BestOfN(n=6)).result.ranking
    assert ConformalHalving(n=6).plan(GaussianToy(steps=10)).exact


def test_endless_margins_drop_nobody_and_none_keep_one():
    kept = finish(ConformalHalving(n=6, calls=(4,), margins=(math.inf,))).result
    assert len(kept.finished) == 12 and kept.pruned == ()
    one = finish(ConformalHalving(n=6, calls=(4, 8), margins=(0.0, 0.0)))
    assert len(one.result.finished) == 2 and {c["stage"] for c in one.result.pruned} == {4}
    # single ones are not scored at the second check: 12 previews and 2 finals
    assert one.ledger.decodes == 14 and one.ledger.nfe == 2 * (12 * 4 + 2 * 6)


def test_survivors_are_the_same_seeds_unpruned():
    pruned, whole = finish(SEARCH).result, finish(BestOfN(n=8)).result
    assert 2 < len(pruned.finished) < 16
    scores = {(c["prompt"], c["id"]): c["score"] for c in whole.ranking}
    assert all(scores[c["prompt"], c["id"]] == c["score"] for c in pruned.ranking)
    rows = {
        (int(p), i): x for p, i, x in zip(whole.finished.prompt, whole.finished.id, whole.finished.state.tensors["x"])
    }
    finished = pruned.finished
    for p, name, x in zip(finished.prompt, finished.id, finished.state.tensors["x"]):
        assert torch.equal(x, rows[int(p), name])


def test_the_ledger_is_what_the_records_say_and_below_the_plan():
    sampler = GaussianToy(steps=10)
    last, plan = finish(SEARCH, sampler=sampler), SEARCH.plan(sampler)
    spent = sum(sampler.nfe(0, c["stage"]) for c in last.result.pruned) + len(last.result.finished) * sampler.nfe(0, 10)
    assert last.ledger.nfe == spent < 2 * plan.nfe and not plan.exact
    assert plan.nfe == 8 * 20 and plan.decodes == 24 and plan.finals == 1 and plan.search.calls == (3, 6)


def test_wider_margins_drop_fewer():
    dropped = [
        len(finish(ConformalHalving(n=8, calls=(5,), margins=(m,))).result.pruned) for m in (0.0, 0.05, 0.1, 9.0)
    ]
    assert dropped == sorted(dropped, reverse=True) and dropped[0] == 14 and len(set(dropped)) > 2


def test_checks_move_to_milestones_and_vanish_at_the_end():
    plan = ConformalHalving(n=8, calls=(0.25, 0.9), margins=(1.0, 2.0)).plan(TokenToy(chunks=3, per_chunk=4))
    assert plan.search.calls == (4,) and plan.search.margins == (1.0,)
    assert plan.search.plan(TokenToy(chunks=3, per_chunk=4)) == plan


@pytest.mark.parametrize("seconds", [1.5, 2.5, 4.5])
def test_deadlines_leave_at_least_the_best_row(seconds, monkeypatch):
    clock = FakeClock(monkeypatch)
    sampler = clock.by_cost(GaussianToy(steps=10))
    last = finish(ConformalHalving(n=6, calls=(5,), margins=(100.0,)), ("a",), Budget(max_seconds=seconds), sampler)
    assert last.result.stopped == "deadline" and clock.now <= seconds + 1
    assert 1 <= len(last.result.finished) < 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number"),
        ({"calls": (1.5,), "margins": (1.0,)}, "calls=\\(1.5,\\)"),
        ({"calls": (3,), "margins": (-1.0,)}, "margins=\\(-1.0,\\) must be numbers of at least 0"),
        ({"calls": (3,), "margins": (math.nan,)}, "margins=\\(nan,\\)"),
        ({"calls": (3, 5), "margins": (1.0,)}, "one entry a check"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ConformalHalving(**fields)


def test_calls_that_descend_are_refused_before_any_work():
    with pytest.raises(ValueError, match="ascending order"):
        ConformalHalving(calls=(5, 3), margins=(1.0, 1.0)).init(GaussianToy(steps=10), Request(("a",)))


# --- the guarantee --------------------------------------------------------------------------------------------


@given(st.integers(9, 60), st.sampled_from([0.1, 0.2, 0.5]), st.integers(0, 5))
def test_with_one_draw_a_prompt_it_is_the_conformal_quantile(prompts, risk, seed):
    excess = np.random.default_rng(seed).normal(size=prompts)
    rank = math.ceil(round((prompts + 1) * (1 - risk), 9))
    assert conformal_factor(excess, risk) == np.sort(excess)[rank - 1]


@given(st.integers(20, 40), st.integers(1, 7), st.integers(0, 5))
def test_the_factor_is_the_smallest_that_controls_the_bound(prompts, draws, seed):
    excess = np.random.default_rng(seed).normal(size=(prompts, draws))

    def bound(t):
        return ((excess > t).mean(1).sum() + 1) / (prompts + 1)

    factor = conformal_factor(excess, 0.2)
    assert bound(factor) <= 0.2 + 1e-9
    below = excess[excess < factor]
    assert not len(below) or bound(below.max()) > 0.2 - 1e-9


def test_the_factor_falls_as_the_risk_grows_and_ignores_the_order():
    excess = np.random.default_rng(0).gamma(1.0, size=(50, 20))
    factors = [conformal_factor(excess, risk) for risk in (0.05, 0.1, 0.2, 0.4)]
    assert factors == sorted(factors, reverse=True)
    shuffled = np.random.default_rng(1).permutation(excess)
    assert conformal_factor(shuffled, 0.1) == conformal_factor(excess, 0.1)


def test_unseen_prompts_are_lost_at_most_as_often_as_promised():
    """200 times 29 calibrating prompts, heavy-tailed: risk - 1/30 <= mean loss <= risk, up to binomial error."""
    risk, lost = 0.2, []
    rng = np.random.default_rng(0)
    for _ in range(200):
        level = rng.pareto(2.0, size=(129, 1))  # prompts differ: an excess of one prompt tells of its others
        excess = level + 0.3 * rng.random((129, 8))
        lost.append((excess[29:] > conformal_factor(excess[:29], risk)).mean())
    error = np.std(lost) / math.sqrt(200)
    assert risk - 1 / 30 - 3 * error <= np.mean(lost) <= risk + 3 * error


def test_coverage_over_splits_agrees_with_the_promise():
    excess = np.random.default_rng(0).gamma(1.0, size=(200, 10)) + np.random.default_rng(1).normal(size=(200, 1))
    seen = coverage(excess, 0.1, 100)
    assert 0.07 < seen.mean <= 0.1 + 1e-2 and seen.low < seen.mean < seen.high


def test_too_few_prompts_say_how_many_are_needed():
    with pytest.raises(ValueError, match=r"risk=0.1 needs at least 9 calibration prompts, these are 8"):
        conformal_factor(np.zeros(8), 0.1)
    assert conformal_factor(np.zeros(9), 0.1) == 0
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        conformal_factor(np.zeros(9), 1.0)
