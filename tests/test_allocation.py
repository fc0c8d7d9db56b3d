"""Shared budgets and estimated gains: closed forms, equal and planted spreads, the driver's tail, stops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from contract.cases import PixelReward
from hypothesis import given
from hypothesis import strategies as st

from visearch import Budget, Request, run_search
from visearch.allocation import assign, estimated_gain, expected_maximum, spreads
from visearch.pipelines.toy import GaussianToy
from visearch.search.allocated import Allocated
from visearch.search.best_of_n import BestOfN

PROMPTS = ("a", "b", "c")


class Loud(PixelReward):
    """Scores of prompt "b" are spread ten times as wide as the others'."""

    def score(self, samples, prompts, **context):
        scores = super().score(samples, prompts, **context)
        for i, prompt in enumerate(prompts):
            scores.values[i] *= 10 if prompt == "b" else 1
        return scores


def finish(search, prompts=PROMPTS, budget=None, reward=None):
    request = Request(tuple(prompts), seed=3)
    return list(run_search(GaussianToy(steps=4), reward or PixelReward(), search, request, budget))[-1]


def counts(last) -> list[int]:
    return [last.result.finished.prompt.tolist().count(p) for p in range(len(last.result.request.prompts))]


# --- the rule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "value"), [(1, 0.0), (2, 1 / math.sqrt(math.pi)), (4, 1.0294), (8, 1.4236), (16, 1.7660)]
)
def test_expected_maximum_of_normals(n, value):
    assert expected_maximum(n) == pytest.approx(value, abs=5e-5)


def test_spread_is_shrunk_to_the_pooled_one():
    own = [np.std([0.0, 4.0, 2.0, 2.0], ddof=1), np.std([0.0, 1.0], ddof=1)]
    pooled = math.sqrt((3 * own[0] ** 2 + own[1] ** 2) / 4)
    found = spreads({0: [0.0, 4.0, 2.0, 2.0], 1: [0.0, 1.0], 2: [5.0], 3: [-math.inf, 1.0]})
    assert found[0] == pytest.approx(0.5 * own[0] + 0.5 * pooled)
    assert found[1] == pytest.approx(own[1] / 3 + pooled * 2 / 3)
    assert found[2] == found[3] == pytest.approx(pooled)
    assert spreads({0: [1.0], 1: [2.0]}) == {0: 1.0, 1: 1.0}


@given(prompts=st.integers(1, 9), a=st.integers(1, 5), total=st.integers(0, 60), start=st.integers(1, 6))
def test_equal_spreads_give_counts_within_a(prompts, a, total, start):
    given_away = assign(dict.fromkeys(range(prompts), start), dict.fromkeys(range(prompts), 2.5), a, total)
    assert sum(given_away.values()) == total
    final = [start + given_away.get(p, 0) for p in range(prompts)]
    assert max(final) - min(final) <= a


@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=6, unique=True), st.integers(1, 40))
def test_wider_spreads_never_get_less(spread, total):
    given_away = assign(dict.fromkeys(range(len(spread)), 4), dict(enumerate(spread)), 1, total)
    by_spread = [given_away.get(p, 0) for p in sorted(range(len(spread)), key=lambda p: spread[p])]
    assert by_spread == sorted(by_spread)


def test_greedy_batches_are_the_best_split():
    """The gains fall with n, so batches one by one reach the best of all splits."""
    spread, total = {0: 1.0, 1: 2.0, 2: 0.4}, 6

    def gain(split):
        return sum(s * (expected_maximum(4 + k) - expected_maximum(4)) for s, k in zip(spread.values(), split))

    best = max((s for s in itertools.product(range(7), repeat=3) if sum(s) == total), key=gain)
    given_away = assign(dict.fromkeys(spread, 4), spread, 1, total)
    assert tuple(given_away.get(p, 0) for p in spread) == best


def test_nobody_gets_more_than_most():
    assert assign({0: 7, 1: 4}, {0: 100.0, 1: 1.0}, 2, 20, most=8) == {0: 1, 1: 4}


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="give each prompt a candidate first"):
        assign({0: 0}, {0: 1.0}, 2, 4)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        expected_maximum(0)


def test_estimated_gain_is_unbiased():
    """Leaving each of n exchangeable scores out in turn costs what the last one gained, on average."""
    scores = np.random.default_rng(0).normal(size=7)
    without = [np.delete(scores, i).max() for i in range(7)]
    assert estimated_gain(scores) == pytest.approx(scores.max() - np.mean(without))
    assert estimated_gain([1.0]) == math.inf and estimated_gain([1.0, -math.inf]) == math.inf


# --- the search -----------------------------------------------------------------------------------------------


def test_the_prompt_with_the_wide_spread_gets_more():
    last = finish(Allocated(n=8, a=2, width=2), reward=Loud())
    assert sum(counts(last)) == 24 and counts(last)[1] >= 12 and min(counts(last)) >= 4


def test_one_prompt_or_a_small_mean_is_best_of_n():
    for search, prompts in ((Allocated(n=7), ("a",)), (Allocated(n=3), PROMPTS)):
        ours, bar = (finish(s, prompts).result.ranking for s in (search, BestOfN(n=search.n)))
        assert [(c["prompt"], c["id"], c["score"]) for c in ours] == [(c["prompt"], c["id"], c["score"]) for c in bar]


def test_a_budget_in_rows_is_spent_to_the_last_candidate():
    """The last rounds have less than one candidate a prompt left."""
    last = finish(Allocated(n=50, first=2, a=1, width=2), budget=Budget(max_nfe=5 * 3 * 8))
    assert last.ledger.nfe == 5 * 3 * 8 and last.result.stopped == "done"


def test_closed_prompts_leave_their_share_to_the_others():
    after_four = finish(BestOfN(n=4)).best
    first = max(after_four, key=after_four.get)
    target = after_four[first]
    last = finish(Allocated(n=6, a=1, width=1), budget=Budget(target=target))
    assert counts(last)[first] == 4  # closed after its first ones
    others = [p for p in after_four if p != first]
    still_open = [p for p in others if last.best[p] < target]
    assert not still_open or sum(counts(last)) == 18
    assert max(counts(last)[p] for p in others) > 6


@pytest.mark.parametrize("field", ["n", "first", "a", "width"])
def test_fields_are_checked(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be a whole number"):
        Allocated(**{field: 0})


# --- stops ----------------------------------------------------------------------------------------------------


def test_a_small_estimated_gain_closes_the_prompt():
    free = [c["score"] for c in sorted(finish(BestOfN(n=12), ("a",)).result.ranking, key=lambda c: c["candidate"])]
    gains = [estimated_gain(free[:n]) for n in range(1, 13)]
    threshold = sorted(gains[3:])[4] * 1.0001
    stops = next(n for n in range(4, 13) if gains[n - 1] < threshold)
    last = finish(BestOfN(n=12, batch=1), ("a",), Budget(min_gain=threshold))
    assert len(last.result.finished) == stops and last.result.stopped == ("closed" if stops < 12 else "done")
    with pytest.raises(ValueError, match="min_gain=0 must be greater than 0"):
        Budget(min_gain=0)
