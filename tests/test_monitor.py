"""What held-out judges say of a search: who may judge, candidate 0, the oracle, and when to be warned."""

from __future__ import annotations

import json
import math

import pytest
import torch
from contract.cases import PROMPTS, PixelReward, make_search

from visearch.budget import Ledger
from visearch.geneval import VerdictReward
from visearch.monitor import Report, View, baselines, check_absolute, check_held_out, hacking, judged
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import Request, Scores
from visearch.rewards.cache import Cached
from visearch.rewards.combine import AverageRank, WeightedSum
from visearch.rewards.video import VideoMean
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN
from visearch.search.smc import SequentialMonteCarlo
from visearch.search.successive_halving import SuccessiveHalving
from visearch.statistics import Interval

SEED = 3  # with which candidate 0 is neither the best nor among the survivors


class Named(PixelReward):
    """The sum of the pixels times a sign; ``traits`` are attributes."""

    def __init__(self, name: str, sign: float = 1.0, **traits) -> None:
        super().__init__()
        self.name, self.sign = name, sign
        vars(self).update(traits)

    def score(self, samples, prompts, **context) -> Scores:
        self.calls.append(len(prompts))
        return Scores(torch.tensor([self.sign * float(row.double().sum()) for row in samples]))


def searched(reward, search, prompts=PROMPTS):
    """What :func:`baselines` takes, without the reward."""
    sampler = GaussianToy()
    *_, last = run_search(sampler, reward, search, Request(prompts, seed=SEED))
    return sampler, search, last.result


def report(reward, judges, search, prompts=PROMPTS):
    sampler, _, result = searched(reward, search, prompts)
    return judged(reward, judges, result, *baselines(sampler, search, reward, result))[0], result


# --- who may judge --------------------------------------------------------------------------------------------


def test_judges_of_the_guides_family_are_refused():
    pick, hps, blip = (Named(n, family=f) for n, f in (("pick", "clip"), ("hps", "clip"), ("image-reward", "blip")))
    with pytest.raises(ValueError, match=r"held-out hps is of the family of pick \(clip\).*another family"):
        check_held_out([pick], [blip, hps])
    with pytest.raises(ValueError, match=r"held-out hps is of the family of average-rank\(image-reward, pick\)"):
        check_held_out([AverageRank([blip, pick])], [hps])
    with pytest.raises(ValueError, match="hps is given twice"):
        check_held_out([hps], [hps])
    with pytest.raises(ValueError, match=r"held-out average-rank\(hps\) is relative"):
        check_held_out([blip], [AverageRank([hps])])
    check_held_out([pick, Named("mine")], [blip, Named("yours")])


def test_a_judge_that_guides_within_an_ensemble_behind_a_cache_or_by_frames_is_refused():
    mine, pick, hps = Named("mine"), Named("pick", family="clip"), Named("hps", family="clip")
    joined = WeightedSum([mine, pick])
    for guide in (joined, Cached(joined), VideoMean(joined), Cached(VideoMean(joined))):
        with pytest.raises(ValueError, match=r"held-out mine: mine guides as well"):
            check_held_out([guide], [mine])
        with pytest.raises(ValueError, match=r"held-out hps is of the family of .*mine \+ pick \(clip\)"):
            check_held_out([guide], [hps])
    check_held_out([mine, WeightedSum([mine, pick])], [Named("yours")])  # guides may share members


def test_relative_rewards_are_not_compared_between_searches():
    pick, blip = Named("pick"), Named("image-reward")
    with pytest.raises(ValueError, match=r"average-rank\(pick, image-reward\) is relative.*weighted sum"):
        check_absolute([pick, AverageRank([pick, blip])])
    check_absolute([pick, WeightedSum([pick, blip])])


# --- candidate 0 ----------------------------------------------------------------------------------------------


def test_candidate_0_is_taken_from_the_search_or_drawn_beside_it():
    guide = Named("sum")
    sampler, search, whole = searched(guide, BestOfN(n=6))
    kept, nothing = baselines(sampler, search, guide, whole)
    assert nothing.nfe == 0
    sampler, search, pruned = searched(guide, SuccessiveHalving(n=6, calls=(3,), keep=(1,)))
    lost = {c["prompt"] for c in pruned.pruned if c["id"] == "0"}
    assert lost
    meter = sampler.meter
    drawn, ledger = baselines(sampler, search, guide, pruned)
    assert sampler.meter is meter and ledger.nfe == len(lost) * sampler.nfe(0, 8) == ledger.rewards["sum"] * 16
    for prompt in range(len(PROMPTS)):
        assert torch.equal(kept[prompt].sample, drawn[prompt].sample)
        assert torch.equal(kept[prompt].row.score, drawn[prompt].row.score)


def test_candidate_0_is_drawn_in_batches_of_the_searchs_sizes():
    guide = Named("sum")
    sampler, search, pruned = searched(guide, SuccessiveHalving(n=6))
    found, _ = baselines(sampler, search, guide, pruned, batch_buckets=(1,))
    assert [b.id for b in found.values()] == ["plain"] * len(PROMPTS)
    assert {batch.rows for b in found.values() for batch in b.row.batches[0]} == {1}


def test_a_row_with_stochastic_steps_is_no_plain_candidate_0():
    guide = Named("sum")
    (sampler, search, result), (*_, plain) = (
        searched(guide, s) for s in (SequentialMonteCarlo(trigger=0.0), BestOfN(n=1))
    )
    assert sum(c["id"] == "0" for c in result.ranking) == len(PROMPTS)  # nothing was resampled
    found, ledger = baselines(sampler, search, guide, result)
    assert ledger.nfe == len(PROMPTS) * sampler.nfe(0, 8)
    for prompt, base in found.items():
        assert base.id == "plain" and torch.equal(base.sample, plain.samples[prompt, "0"])
    other = Named("other", checker=True)
    view = judged(guide, [other], result, found, ledger)[0].judges[0]
    assert view.base == pytest.approx([float(b.row.score) for b in found.values()])


def test_a_relative_reward_ranks_candidate_0_among_the_finished():
    guide, plain = AverageRank([Named("sum")]), Named("sum")
    sampler, search, result = searched(guide, SuccessiveHalving(n=6, calls=(3,), keep=(2,)))
    absolute, _ = baselines(sampler, search, plain, result)
    for prompt, base in baselines(sampler, search, guide, result)[0].items():
        scores = [c["components"]["sum"] for c in result.ranking if c["prompt"] == prompt]
        scores = sorted({*scores, float(absolute[prompt].row.score)})
        assert len(scores) == 3 and base.best == 1.0
        assert float(base.row.score) == scores.index(float(absolute[prompt].row.score)) / 2


# --- the report -----------------------------------------------------------------------------------------------


def test_guide_and_judges_stand_side_by_side():
    judge = Named("opposed", -1.0, note="a test's own")
    found, result = report(Named("sum"), [judge], BestOfN(n=6), tuple(f"prompt {i}" for i in range(6)))
    best = {c["prompt"]: c["score"] for c in reversed(result.ranking)}
    assert found.guided.picked == tuple(best[p] for p in range(6)) and found.guided.gain.low > 0
    assert found.judges[0].picked == pytest.approx(tuple(-s for s in found.guided.picked))
    assert found.judges[0].base == pytest.approx(tuple(-s for s in found.guided.base))
    (warning,) = found.warnings
    assert warning.startswith("reward hacking: sum rises while opposed falls: +") and "over candidate 0" in warning
    shown = str(found)
    assert "| sum | guides |" in shown and "| opposed | held out |" in shown and "a test's own" in shown
    assert json.loads(json.dumps(found.as_dict()))["rewards"][1]["role"] == "held out"
    assert report(Named("sum"), [Named("agrees")], BestOfN(n=6))[0].warnings == ()


def test_an_oracle_where_a_judge_checks():
    """Only a checker sees all that was finished; what it would pick is the best by it."""
    checker, other = Named("checker", -1.0, checker=True), Named("other")
    found, result = report(Named("sum"), [checker, other], BestOfN(n=6))
    assert found.judges[0].oracle == pytest.approx(
        tuple(max(-c["score"] for c in result.ranking if c["prompt"] == p) for p in range(len(PROMPTS)))
    )
    assert max(checker.calls) == 12 and max(other.calls) <= 4 and found.judges[1].oracle is None
    worst = View("checker", "held out", base=(0.0, 0.5), picked=(1.0, 0.5), oracle=(1.0, 1.5))
    assert worst.recovered.mean == 0.5
    assert View("checker", "held out", (1.0,), (1.0,), oracle=(1.0,)).recovered is None


def test_a_reward_made_for_a_benchmark_is_not_held_out_before_it():
    class Detector:
        name, licence, source = "d", "MIT", "tests"

    guide = Named("trained", not_held_out_for=("GenEval",))
    exam = Named("judge-d", not_held_out_for=VerdictReward(Detector()).not_held_out_for)
    found, _ = report(guide, [exam, Named("other")], make_search("best-of-n"))
    assert [v.role for v in found.judges] == ["not held-out for GenEval", "held out"]
    assert "not held-out for GenEval" in str(found)


def test_what_failed_is_left_out():
    failed = View("judge", "held out", base=(-math.inf, 1.0), picked=(2.0, 3.0))
    assert failed.gain.mean == 2.0 and failed.gain.clusters == 1
    nothing = View("judge", "held out", base=(-math.inf,), picked=(2.0,))
    shown = Report(View("sum", "guides", (0.0,), (1.0,)), (nothing,), Ledger())
    assert nothing.gain is None and shown.warnings == () and "failed" in str(shown)


# --- warnings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rise", "fall", "sure"),
    [
        (Interval(2, 1, 3, 9), Interval(-2, -3, -1, 9), True),
        (Interval(2, -1, 3, 9), Interval(-2, -3, -1, 9), False),
        (Interval(2, 1, 3, 9), Interval(-2, -3, 1, 9), False),
        (Interval(2, 2, 2, 1), Interval(-2, -2, -2, 1), False),
        (Interval(-2, -3, -1, 9), Interval(-2, -3, -1, 9), None),
        (Interval(2, 1, 3, 9), Interval(0, -1, 1, 9), None),
    ],
)
def test_when_a_rise_is_suspicious(rise, fall, sure):
    found = hacking("guide", {"one": rise}, "judge", {"one": fall, "other": rise})
    assert (found and found[1]) == sure
    if found:
        assert found[0].startswith("guide rises while judge falls: +2") and found[0].endswith("over one")
