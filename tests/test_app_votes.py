"""Blind votes: the order tells nothing, the tally does not know it, the interval promises what it keeps."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial

from visearch.app.votes import CHOICES, Ballot, Tally, win_rate

NAMES = ("best-of-n", "halving", "smc")
PAIRS = st.permutations(NAMES).map(lambda names: tuple(names[:2]))
VERDICTS = st.lists(st.tuples(PAIRS, st.sampled_from([0, 1, None]), st.booleans()), max_size=40)


@given(st.integers(0, 2**32), PAIRS)
def test_either_order_is_as_likely_and_independent_of_the_one_before(seed, pair):
    chance, number = random.Random(seed), 2000
    swapped = [Ballot.drawn(*pair, chance).a == pair[1] for _ in range(number)]
    changed = sum(a != b for a, b in zip(swapped, swapped[1:]))
    for count in (sum(swapped), changed):
        assert abs(count - number / 2) < 6 * math.sqrt(number / 4)


def test_two_sessions_draw_orders_of_their_own():
    draws = [tuple(Ballot.drawn("a", "b").a for _ in range(64)) for _ in range(2)]
    assert draws[0] != draws[1]


def voted(verdicts, swap):
    """The tally of a person who prefers number 0, 1 or neither of each pair, whichever way they are shown."""
    tally = Tally()
    for pair, preferred, shown in verdicts:
        a, b = pair if shown ^ swap else pair[::-1]
        choice = "same" if preferred is None else "A" if pair[preferred] == a else "B"
        tally = tally.counted(Ballot(a, b), choice)
    return tally


@given(VERDICTS)
def test_the_tally_does_not_depend_on_the_order_shown(verdicts):
    shown, other = voted(verdicts, False), voted(verdicts, True)
    assert shown.votes == other.votes
    assert sum(s.wins + s.same + s.losses for s in shown.standings()) == len(verdicts)


@given(VERDICTS)
def test_votes_for_the_other_search_mirror_the_rate(verdicts):
    mirrored = [(pair, None if p is None else 1 - p, shown) for pair, p, shown in verdicts]
    for one, other in zip(voted(verdicts, False).standings(), voted(mirrored, False).standings()):
        assert one.rate.mean == pytest.approx(1 - other.rate.mean)
        assert one.rate.low == pytest.approx(1 - other.rate.high)
        assert {one.leader, other.leader} in ({None}, set(one.pair))


def test_a_vote_leaves_the_earlier_tally_as_it_was():
    before = Tally().counted(Ballot("a", "b"), "A")
    after = before.counted(Ballot("b", "a"), "A")
    assert before.votes == {("a", "b"): (1, 0, 0)}
    assert after.votes == {("a", "b"): (1, 0, 1)}


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_whole_points_give_the_exact_interval(case):
    wins, votes = case
    expected = binomtest(wins, votes).proportion_ci(0.95, method="exact")
    found = win_rate(wins, votes)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.low <= found.mean <= found.high


@pytest.mark.parametrize("votes", [1, 2, 5, 10, 25])
@pytest.mark.parametrize("same", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_the_interval_covers_the_true_rate_as_often_as_it_says(votes, same, share):
    """By enumeration of every outcome of independent votes, with votes for neither among them."""
    chances = [(1 - same) * share, same, (1 - same) * (1 - share)]
    true = chances[0] + same / 2
    covered = 0.0
    for wins in range(votes + 1):
        for draws in range(votes - wins + 1):
            found = win_rate(wins + draws / 2, votes)
            if found.low <= true <= found.high:
                covered += multinomial.pmf([wins, draws, votes - wins - draws], votes, chances)
    assert covered >= 0.95


def test_five_votes_of_five_do_not_decide_and_six_do():
    tally = Tally()
    leaders = []
    for _ in range(6):
        tally = tally.counted(Ballot("b", "a"), "B")
        leaders.append(tally.standings()[0].leader)
    assert leaders == [None] * 5 + ["a"]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: Ballot.drawn("a", "a"), "'a'"),
        (lambda: Tally().counted(Ballot("a", "b"), "a"), "A, same, B"),
        (lambda: win_rate(0, 0), "votes=0"),
        (lambda: win_rate(3, 2), "points=3"),
    ],
)
def test_what_is_no_vote_is_refused(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def test_the_choices_are_fair():
    assert sum(CHOICES.values()) / len(CHOICES) == CHOICES["same"]
