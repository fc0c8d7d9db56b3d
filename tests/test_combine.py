"""Rewards made of rewards: their formulas, their texts, and how a search ranks by them as candidates are added."""

from __future__ import annotations

import math
import re
import warnings
from itertools import combinations

import pytest
import torch
from contract.cases import EVENTS, PROMPTS, REFUSALS, PixelReward, make_search
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch.budget import Budget
from visearch.pipelines import SAMPLERS
from visearch.protocols import Ensemble, Request, Reward, Scores
from visearch.rewards import resolve
from visearch.rewards.combine import AverageRank, WeightedSum, ZScore
from visearch.rewards.function import FunctionReward
from visearch.run import run_search
from visearch.search import SEARCHES
from visearch.search.allocated import Allocated
from visearch.search.best_of_n import BestOfN
from visearch.search.cached_drafts import CachedDrafts
from visearch.selection import rank

INF = math.inf


def fixed(name: str, values=(), **attributes) -> FunctionReward:
    """Gives these scores to N samples, whatever they are."""
    reward = FunctionReward(lambda images, prompts: list(values), name)
    for key, value in attributes.items():
        setattr(reward, key, value)
    return reward


A, B, C = (fixed(name) for name in "abc")


def combined(kind, *columns, weights=None, groups=None, **options) -> list[float]:
    ensemble = kind([fixed(name) for name in "abcdef"[: len(columns)]], weights, **options)
    table = {m.name: torch.tensor(column) for m, column in zip(ensemble.members, columns)}
    return ensemble.combine(table, groups or [0] * len(columns[0])).tolist()


# --- formulas -------------------------------------------------------------------------------------------------


def test_average_ranks_share_ties():
    assert combined(AverageRank, [1.0, 1.0, 0.0], [0.0, 2.0, 1.0]) == [0.375, 0.875, 0.25]
    assert combined(AverageRank, [1.0, 1.0, 0.0], [0.0, 2.0, 1.0], weights=[1, 0]) == [0.75, 0.75, 0.0]
    assert combined(AverageRank, [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], weights=[3, 1]) == [0.75, 0.5, 0.25]
    assert combined(AverageRank, [7.0], [-7.0]) == [1.0]


def test_a_member_that_failed_gives_its_worst_ranks_shared():
    assert combined(AverageRank, [1.0, -INF, -INF, 2.0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(
        [5 / 6, 0.5, 1 / 3, 0.5], abs=0.09
    )
    assert combined(AverageRank, [math.nan, 0.0], [-INF, 1.0]) == [-INF, 1.0]
    assert combined(AverageRank, [math.nan, math.nan], [1.0, 0.0]) == [0.75, 0.25]


def test_z_scores_are_of_the_group():
    assert combined(ZScore, [1.0, 2.0, 3.0]) == pytest.approx([-1.2247449, 0, 1.2247449])
    assert combined(ZScore, [1.0, 2.0, 3.0], [6.0, 4.0, 2.0], weights=[3, 1]) == pytest.approx(
        [-0.6123724, 0, 0.6123724]
    )
    groups = [1, 0, 1, 0, 1, 0]
    both = combined(ZScore, [1.0, 10.0, 2.0, 30.0, 3.0, 20.0], groups=groups)
    assert both == pytest.approx([-1.2247449, -1.2247449, 0, 1.2247449, 1.2247449, 0])


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ([5.0, 5.0, 5.0], "scored all alike"),
        ([1e6, 1e6 + 0.5, 1e6 - 0.5], "scored all alike"),
        ([1.0, 2.0], "gave 2 of the 3 scores"),
        ([1.0, 2.0, -INF], "gave 2 of the 3 scores"),
    ],
)
def test_a_z_score_of_nothing_counts_nothing_and_says_so(scores, says):
    with pytest.warns(UserWarning, match=rf"z-score\(a\): a {says}.*; it counts nothing there"):
        made = combined(ZScore, scores)
    assert made == [s if s == -INF else 0.0 for s in scores]


def test_a_z_score_with_a_reference_holds_for_one_and_is_not_relative():
    reference = {"a": (20.0, 2.0), "b": (0.25, 0.05)}
    assert combined(ZScore, [21.0], [0.2], reference=reference) == pytest.approx([-0.25])
    assert ZScore([A]).relative and not ZScore([A, B], reference=reference).relative
    lower = fixed("a", higher_is_better=False)
    turned = ZScore([lower], reference={"a": (20.0, 2.0)}).combine({"a": torch.tensor([-24.0])}, [0])
    assert turned.tolist() == [-2.0]


def test_a_weighted_sum_is_of_raw_scores():
    assert combined(WeightedSum, [20.0, 22.0], [0.3, 0.2], weights=[1, 10]) == pytest.approx([23.0, 24.0])
    assert combined(WeightedSum, [1.0, math.nan, -INF], [1.0, 1.0, INF], weights=[1, 2]) == [3.0, -INF, -INF]
    assert not WeightedSum([A]).relative


def test_default_weights_are_questioned_where_scores_differ_in_size():
    with pytest.warns(UserWarning, match=r"a \+ b: scores of a are about 21, those of b 0.25.*average-rank") as told:
        ensemble = WeightedSum([A, B])
        for _ in range(2):
            ensemble.combine({"a": torch.tensor([20.0, 22.0]), "b": torch.tensor([0.2, 0.3])}, [0, 0])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        combined(WeightedSum, [20.0, 22.0], [0.2, 0.3], weights=[1, 80])
        combined(WeightedSum, [20.0, 22.0], [2.2, 2.2])
        combined(WeightedSum, [0.0, 0.0], [2.1, -INF])


def columns(n: int) -> st.SearchStrategy[list[list[float]]]:
    column = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0, -INF]), min_size=n, max_size=n)
    return st.lists(column, min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6).flatmap(columns), st.randoms(use_true_random=False))
@pytest.mark.parametrize("kind", [WeightedSum, AverageRank, ZScore])
@pytest.mark.filterwarnings("ignore:z-score", "ignore:.*give weights")
def test_combining_hangs_on_no_order_and_no_companion_of_another_prompt(kind, table, random):
    rows = list(range(len(table[0])))
    plain = combined(kind, *table)
    order = random.sample(rows, len(rows))
    assert combined(kind, *[[column[i] for i in order] for column in table]) == pytest.approx([plain[i] for i in order])
    beside = [[*column, *column] for column in table]
    assert combined(kind, *beside, groups=[0] * len(rows) + [1] * len(rows)) == pytest.approx([*plain, *plain])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=8))
def test_ranks_depend_on_order_alone(values):
    ranks = combined(AverageRank, values)
    for i, j in combinations(range(len(values)), 2):
        assert (ranks[i] > ranks[j], ranks[i] == ranks[j]) == (values[i] > values[j], values[i] == values[j])


# --- operators and texts --------------------------------------------------------------------------------------


def terms(reward) -> dict[str, float]:
    return {m.name: w for m, w in zip(reward.members, reward.weights)}


def test_sums_of_sums_are_one_sum():
    assert terms(A + 0.5 * B) == {"a": 1, "b": 0.5} == terms(WeightedSum([A, B], [1, 0.5]))
    assert terms(2 * (A + B * 0.5) + (B + C)) == {"a": 2, "b": 2, "c": 1}
    assert terms(sum([A, B, C])) == {"a": 1, "b": 1, "c": 1}
    assert terms(WeightedSum([A, B], [1, 0])) == {"a": 1}
    assert isinstance(A + B, Ensemble) and isinstance(A + B, Reward) and (A + 0.5 * B).name == "a + 0.5*b"


def test_functions_and_foreign_rewards_can_be_added():
    def bright(images, prompts):
        return [1.0] * len(images)

    class Foreign:
        name, higher_is_better, range, licence, source, needs = "x", True, (0, 1), "MIT", "tests", frozenset()

        def score(self, samples, prompts, *, noise_level=None, metadata=None):
            return Scores(torch.zeros(len(prompts)))

    assert terms(A + bright) == terms(bright + A) == {"bright": 1, "a": 1}
    assert terms(A + Foreign()) == terms(Foreign() + A) == {"x": 1, "a": 1}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: -A, ValueError, "-a: a weight must not be negative.*higher_is_better = False"),
        (lambda: A - B, ValueError, "a - b: a weight must not be negative"),
        (lambda: -0.5 * A, ValueError, "weight -0.5 of a: a weight must not be negative"),
        (lambda: A * math.nan, ValueError, "weight nan of a is no finite number"),
        (lambda: 0 * A, ValueError, "all weights of a are 0"),
        (lambda: A + 1, TypeError, "unsupported operand"),
        (lambda: A * "2", TypeError, "can't multiply|unsupported operand"),
        (lambda: AverageRank([]), ValueError, "members is empty"),
        (lambda: AverageRank([A, B], [1]), ValueError, "weights has 1 entries for 2 members"),
        (lambda: AverageRank([A, fixed("a")]), ValueError, "a is given twice"),
        (lambda: A + AverageRank([B]), ValueError, r"average-rank\(b\) has no scale of its own"),
        (lambda: ZScore([A, B], reference={"a": (0, 1)}), ValueError, r"reference\['b'\]=\(nan, nan\)"),
        (lambda: ZScore([A], reference={"a": (0, 0)}), ValueError, r"reference\['a'\]=\(0, 0\).*greater than 0"),
    ],
)  # fmt: skip
def test_what_is_no_ensemble_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.fixture
def named(monkeypatch):
    """``resolve`` with these three names."""
    from visearch import rewards

    known = {"pick-score": A, "hps-v2.1": B, "open-clip:x/c++": C}
    plain = rewards.resolve
    monkeypatch.setattr(rewards, "resolve", lambda r, device="cpu": known.get(r) or plain(r, device))
    return rewards.resolve


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pick-score + 0.5*hps-v2.1", "a + 0.5*b"),
        ("  2 * pick-score  +  1e-1 * open-clip:x/c++ ", "2*a + 0.1*c"),
        ("3*pick-score", "3*a"),
        ("average-rank(pick-score, 2*hps-v2.1)", "average-rank(a, 2*b)"),
        ("z-score( pick-score , hps-v2.1 + 0.5 * open-clip:x/c++ )", "z-score(a, b + 0.5*c)"),
    ],
)
def test_texts(named, text, name):
    assert resolve(text).name == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pick-score - hps-v2.1", "must not be negative"),
        ("pick-score + -1*hps-v2.1", "weight -1 of b: a weight must not be negative"),
        ("half*pick-score", "'half' is no weight; write 0.5 * pick-score"),
        ("pick-score + 0.5*", "a term without a name"),
        ("average-rank()", "a term without a name"),
        ("pick-score + hps-v3", "unknown reward 'hps-v3'"),
    ],
)
def test_texts_that_say_nothing_are_refused(named, text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        resolve(text)


def test_a_list_is_joined_by_average_rank():
    assert terms(resolve([A, B])) == {"a": 1, "b": 1} and isinstance(resolve([A, B]), AverageRank)
    assert resolve([A]) is A


# --- as any reward --------------------------------------------------------------------------------------------


def test_scored_alone_it_groups_by_prompt_and_turns_members_round():
    cost = fixed("cost", [3.0, 1.0, 2.0, 5.0], higher_is_better=False)
    gain = fixed("gain", [1.0, 2.0, 3.0, math.nan])
    made = AverageRank([cost, gain]).score(torch.zeros(4, 3, 2, 2), ["x", "x", "x", "y"])
    assert made.values.tolist() == [0.0, 0.75, 0.75, 1.0]
    assert made.components["cost"].tolist() == [3, 1, 2, 5]
    made = (cost + 2 * gain).score(torch.zeros(4, 3, 2, 2), "x")
    assert made.values[:3].tolist() == [-1.0, 3.0, 4.0] and made.values[3].isnan()
    assert made.reasons == {3: "a member gave NaN"}


def test_what_is_told_of_an_ensemble_is_of_its_members():
    first = fixed("a", licence="MIT", range=(0.0, 10.0), not_held_out_for=("GenEval",), image_features=len)
    second = fixed("b", licence="MIT", range=(0.0, 1.0), higher_is_better=False, needs=frozenset({"metadata"}))
    made = first + 2 * second
    assert made.range == (-2.0, 10.0) and made.licence == "MIT" and made.needs == {"pixels", "metadata"}
    assert made.not_held_out_for == ("GenEval",) and made.image_features is len
    assert AverageRank([first]).range == (0.0, 1.0)


def test_the_hash_tells_ensembles_apart():
    first, second = fixed("a", config_hash="1"), fixed("b", config_hash="2")
    made = [
        first + second, first + 2 * second, AverageRank([first, second]), ZScore([first, second]),
        ZScore([first, second], reference={"a": (0, 1), "b": (0, 1)}),
    ]  # fmt: skip
    assert len({m.config_hash for m in made}) == len(made)
    assert (first + second).config_hash == made[0].config_hash


# --- in a search ----------------------------------------------------------------------------------------------


class Channel(PixelReward):
    """Mean of one channel."""

    def __init__(self, name: str, channel: int, sign: int = 1) -> None:
        super().__init__()
        self.name, self.channel, self.higher_is_better = name, channel, sign > 0

    def score(self, samples, prompts, *, noise_level=None, metadata=None) -> Scores:
        self.calls.append(len(prompts))
        return Scores(torch.tensor([float(row[self.channel].double().mean()) for row in samples]))


RED, LEAST_BLUE = Channel("red", 0), Channel("blue", 2, -1)
BY_ORDER = sorted(set(SEARCHES) - {"allocated", "conformal", "fk", "smc"})  # the others look at differences of scores


def toy(name: str):
    return SAMPLERS.load("token-toy" if (name, "gaussian-toy") in REFUSALS else "gaussian-toy")()


def finish(reward, search="best-of-n", sampler=None, **options):
    search = make_search(search) if isinstance(search, str) else search
    *_, last = run_search(sampler or toy("best-of-n"), reward, search, Request(PROMPTS, seed=7), **options)
    return last.result


def order(result) -> list[list[str]]:
    """Each prompt's candidates, best first."""
    return [[c["id"] for c in result.ranking if c["prompt"] == p] for p in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", [AverageRank, ZScore, WeightedSum])
@pytest.mark.parametrize("name", sorted(set(SEARCHES) - {"allocated"}))
@pytest.mark.filterwarnings("ignore:z-score")
def test_scores_of_finished_rows_stand_among_all_of_them(name, kind):
    ensemble = kind([RED, LEAST_BLUE], [1, 2])
    result = finish(ensemble, name, toy(name))
    assert result.error is None
    rows = result.finished
    samples = [result.samples[key] for key in zip(rows.prompt.tolist(), rows.id)]
    assert torch.equal(rows.components["red"], RED.score(samples, rows.id).values)
    assert torch.equal(rows.components["blue"], -LEAST_BLUE.score(samples, rows.id).values)
    assert torch.equal(rows.score, ensemble.combine(rows.components, rows.prompt.tolist()))
    assert [history[-1][1] for history in rows.history] == rows.score.tolist()
    told = result.ranking[0]["components"]
    assert told == {m: float(v[rank(rows)[0]]) for m, v in rows.components.items()}


@pytest.mark.parametrize("name", BY_ORDER)
def test_searches_decide_by_the_rank_of_one_reward_as_by_the_reward(name):
    """Also within a round, as where a neighbour is held against a centre that was finished in an earlier one."""
    plain, ranked = (finish(reward, name, toy(name)) for reward in (RED, AverageRank([RED])))
    assert order(ranked) == order(plain)
    dropped = [[(c["prompt"], c["id"], c["stage"]) for c in result.pruned] for result in (ranked, plain)]
    assert dropped[0] == dropped[1]


def test_previews_stand_among_the_rows_of_their_check():
    search = make_search("halving")
    result = finish(AverageRank([RED, LEAST_BLUE]), search)
    EVENTS["halving"](search.plan(toy("halving")).search, result)


@pytest.mark.parametrize("name", ["best-of-n", "zero-order", "evosearch"])
def test_a_resumed_run_ranks_as_an_uninterrupted_one(name, tmp_path):
    ensemble, rounds = AverageRank([RED, LEAST_BLUE]), iter([False, True])
    stopped = finish(ensemble, name, checkpoint=tmp_path, cancelled=lambda: next(rounds, True))
    assert stopped.stopped == "cancelled"
    resumed = finish(ensemble, name, checkpoint=tmp_path)
    assert resumed.ranking == finish(ensemble, name).ranking
    with pytest.raises(ValueError, match="is of another run"):
        finish(RED, name, checkpoint=tmp_path)


def test_the_ledger_counts_each_member():
    result = finish(AverageRank([RED, WeightedSum([LEAST_BLUE, PixelReward()], [1, 3])]))
    count = 5 * len(PROMPTS)
    assert dict(result.ledger.rewards) == {
        name + of: n for name in ("red", "blue", "pixel") for of, n in (("", count), (" (order check)", 2))
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": Budget(target=0.5)}, "target=0.5 needs scores on a fixed scale, and average-rank"),
        ({"budget": Budget(min_gain=0.1)}, "min_gain=0.1 needs scores on a fixed scale"),
        ({"search": "allocated"}, "Allocated, which shares candidates over prompts, needs"),
        ({"search": CachedDrafts(search=Allocated(n=4))}, "CachedDrafts, which shares"),
    ],
)
def test_relative_scores_are_held_against_nothing_else(options, says):
    with pytest.raises(ValueError, match=says):
        finish(AverageRank([RED, LEAST_BLUE]), **options)
    fixed_scale = ZScore([RED, LEAST_BLUE], reference={"red": (0.5, 0.1), "blue": (0.5, 0.1)})
    assert finish(fixed_scale, **{"search": BestOfN(n=4), **options}).error is None


class Failing(Channel):
    """Fails where ``fails(red)`` says so, by an exception or by NaN; ``times`` calls, then no more."""

    def __init__(self, fails, times: float = INF, by_nan: bool = True) -> None:
        super().__init__("failing", 0)
        self.fails, self.times, self.by_nan = fails, times, by_nan

    def score(self, samples, prompts, **context) -> Scores:
        values = super().score(samples, prompts).values
        bad = [i for i, v in enumerate(values.tolist()) if self.fails(v)]
        if len(self.calls) > self.times or not bad:
            return Scores(values)
        if not self.by_nan:
            raise RuntimeError("out of order")
        values[bad] = math.nan
        return Scores(values, reasons=dict.fromkeys(bad, "out of order"))


@pytest.mark.parametrize("by_nan", [True, False], ids=["nan", "exception"])
def test_what_fails_once_is_asked_for_again(by_nan):
    plain = finish(RED)
    result = finish(Failing(lambda v: True, times=1, by_nan=by_nan))
    assert [c["score"] for c in result.ranking] == [c["score"] for c in plain.ranking]
    assert not result.warnings and result.ledger.retries > 0


@pytest.mark.parametrize("by_nan", [True, False], ids=["nan", "exception"])
def test_a_member_that_fails_on_a_sample_ranks_it_worst_and_the_reason_is_told(by_nan):
    worst = max(finish(RED).ranking, key=lambda c: c["components"]["red"] if "components" in c else c["score"])
    with pytest.warns(UserWarning, match="'failing' failed on a sample.*out of order"):
        result = finish(AverageRank([Failing(lambda v: v == worst["score"], by_nan=by_nan), RED]))
    found = next(c for c in result.ranking if (c["prompt"], c["id"]) == (worst["prompt"], worst["id"]))
    assert found["components"] == {"failing": -INF, "red": worst["score"]} and found["score"] == 0.5
    assert sum("out of order" in w for w in result.warnings) == 1


def test_a_member_that_always_fails_decides_nothing_and_all_of_them_return_candidate_0():
    with pytest.warns(UserWarning, match="'failing' failed"):
        result = finish(AverageRank([Failing(lambda v: True), RED]))
    assert order(result) == order(finish(RED))
    with pytest.warns(UserWarning, match="every candidate"):
        result = finish(AverageRank([Failing(lambda v: True)]))
    assert result.winners().candidate == (0, 0)
