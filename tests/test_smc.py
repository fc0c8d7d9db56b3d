"""Particles: potentials, resampling, and what the search does with them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from contract.cases import PixelReward
from diffusers import HeunDiscreteScheduler, IPNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch.budget import Budget, Ledger
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import EtaStep, Ode, Population, Request, Scores, Sde
from visearch.run import run_search
from visearch.search import SEARCHES
from visearch.search._potentials import POTENTIALS, TEMPERS, potentials
from visearch.search.best_of_n import BestOfN
from visearch.search.smc import FKSteering, SequentialMonteCarlo
from visearch.selection import RESAMPLING, effective_size, resample

REQUEST = Request(("a cow", "two cats"), seed=3)
weights = st.lists(st.floats(-20, 20), min_size=1, max_size=9).map(torch.tensor)


def run(search, sampler=None, reward=None, request=REQUEST, **options):
    rounds = run_search(sampler or GaussianToy(), reward or PixelReward(), search, request, **options)
    return list(rounds)[-1].result


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- resampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["systematic", "ssp"])
@given(log_weight=weights, seed=st.integers(0, 2**40))
def test_low_variance_rules_give_floor_or_ceil_of_the_share(rule, log_weight, seed):
    counts, shares = resample(log_weight, rule, stream(seed)), len(log_weight) * log_weight.double().softmax(0)
    assert sum(counts) == len(log_weight)
    for count, share in zip(counts, shares.tolist(), strict=True):
        assert math.floor(share + 1e-9) <= count + 1e-9 and count <= math.ceil(share - 1e-9)


@pytest.mark.parametrize("rule", RESAMPLING)
def test_the_mean_of_the_counts_is_the_share(rule):
    weight = torch.tensor([0.45, 0.05, 0.17, 0.33, 0.0])
    generator, draws = stream(0), 4000
    mean = torch.tensor([resample(weight.log(), rule, generator) for _ in range(draws)]).double().mean(0)
    assert mean[4] == 0
    torch.testing.assert_close(mean, 5 * weight.double(), atol=5 * 1.2 / math.sqrt(draws), rtol=0)


@pytest.mark.parametrize("rule", RESAMPLING)
def test_one_row_with_all_the_weight_gets_all_copies(rule):
    assert resample(torch.tensor([-math.inf, 0.0, -math.inf]), rule, stream(0)) == [0, 3, 0]


@given(log_weight=weights)
def test_the_effective_size_lies_between_one_and_all(log_weight):
    assert 1 - 1e-9 <= effective_size(log_weight) <= len(log_weight) + 1e-9
    assert effective_size(torch.zeros(5)) == pytest.approx(5)
    assert effective_size(torch.tensor([0.0, -math.inf])) == 1


def test_resampling_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="no positive weight"):
        resample(torch.full((3,), -math.inf), "ssp", stream(0))
    with pytest.raises(ValueError, match="use multinomial"):
        resample(torch.zeros(3), "residual", stream(0))


# --- potentials -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("temper", TEMPERS)
@given(rewards=st.lists(st.floats(-5, 5), min_size=1, max_size=5), scale=st.floats(0, 10))
@settings(max_examples=30)
def test_along_any_ancestry_potentials_sum_to_the_scaled_final_reward(potential, temper, rewards, scale):
    history = [(2 * i + 1, r) for i, r in enumerate(rewards[:-1])] + [(10, rewards[-1])]
    made = potentials(potential, temper, history, scale, 10)
    assert sum(made) == pytest.approx(scale * rewards[-1], abs=1e-9)


@pytest.mark.parametrize(
    ("potential", "expected"),
    [
        ("current", [2 * 0.4 * 1, 2 * 1.0 * -3, 2 * 1.6 * 2]),
        ("sum", [2 * 0.4 * 1, 2 * 1.0 * -2, 2 * 1.6 * 0]),
        ("max", [2 * 0.4 * 1, 2 * 1.0 * 1, 2 * 1.6 * 2]),
        ("difference", [2 * 0.4 * 1, 2 * (1.0 * -3 - 0.4 * 1), 2 * (1.6 * 2 - 1.0 * -3)]),
    ],
)
def test_potentials_are_those_of_the_paper(potential, expected):
    assert potentials(potential, "linear", [(2, 1.0), (5, -3.0), (8, 2.0)], 2.0, 10) == pytest.approx(expected)


def test_a_first_reward_below_zero_is_its_own_maximum():
    assert potentials("max", "constant", [(2, -1.5)], 1.0, 10) == [-1.5]


def test_das_tempers_as_published():
    assert [TEMPERS["das"](e, 100) for e in (50, 86, 88)] == pytest.approx([1.008**50 - 1, 1.008**86 - 1, 1], abs=1e-2)
    assert TEMPERS["das"](15, 15) == 1


# --- the search -------------------------------------------------------------------------------------------------


def test_without_a_scale_it_is_best_of_n_on_the_same_steps_bit_for_bit():
    particles = run(SequentialMonteCarlo(n=5, scale=0.0, trigger=1.0))
    plain = run(BestOfN(5), GaussianToy().view(transition=Sde(0.7)))
    rows, same = ({(int(r.prompt[i]), r.id[i]): i for i in range(len(r))} for r in (particles.finished, plain.finished))
    assert rows.keys() == same.keys() and len(rows) == 10
    a, b = particles.finished.state.tensors["x"], plain.finished.state.tensors["x"]
    assert all(torch.equal(a[rows[key]], b[same[key]]) for key in rows)
    assert particles.pruned == ()


def test_weights_that_never_resampled_are_the_scaled_rewards():
    found = run(SequentialMonteCarlo(n=4, scale=2.0, trigger=0.0)).finished
    torch.testing.assert_close(found.log_weight, 2 * found.score)


@pytest.mark.parametrize("rule", RESAMPLING)
def test_a_large_scale_collapses_to_one_ancestor(rule):
    result = run(SequentialMonteCarlo(n=6, scale=1e6, trigger="always", resampling=rule))
    for prompt in (0, 1):
        rows = [c for c in result.ranking if c["prompt"] == prompt]
        assert len(rows) == 6 and len({c["id"] for c in rows}) == 6
        assert len({c["candidate"] for c in rows}) == 1
        assert len({c["score"] for c in rows}) == 6  # copies diverged
        survivors = {c["candidate"] for c in rows}
        assert {c["candidate"] for c in result.pruned if c["prompt"] == prompt} >= set(range(6)) - survivors


def test_without_noise_rows_are_dropped_instead_of_copied():
    search = SequentialMonteCarlo(n=6, trigger="always", transition="ode")
    plan, result = search.plan(GaussianToy()), run(search)
    assert not plan.exact and result.ledger.nfe < 2 * plan.nfe
    assert all("fork" not in c["id"] for c in result.ranking)
    assert len(result.finished) + len(result.pruned) == 12


def test_rows_that_merge_weigh_as_many_as_they_were():
    search = SequentialMonteCarlo(n=6, trigger="always", transition="ode")
    first = next(run_search(GaussianToy(), PixelReward(), search, REQUEST)).state.live
    for prompt in (0, 1):
        copies = first.log_weight[first.prompt == prompt].exp()
        assert len(copies) < 6 and float(copies.sum()) == pytest.approx(6)
        assert torch.allclose(copies, copies.round(), atol=1e-5) and float(copies.max()) > 1


def test_tokens_keep_their_own_randomness():
    result = run(SequentialMonteCarlo(n=4, trigger="always", scale=1e6), TokenToy())
    assert any("fork" in c["id"] for c in result.ranking)
    with pytest.raises(ValueError, match="no other view"):
        TokenToy().view(transition=EtaStep())


def test_the_scale_follows_the_spread_of_each_prompts_first_scores():
    rounds = list(run_search(GaussianToy(), PixelReward(), SequentialMonteCarlo(n=4, trigger=0.0), REQUEST))
    state = rounds[0].state
    for prompt in (0, 1):
        scores = state.live.score[state.live.prompt == prompt]
        assert state.scale[prompt] == pytest.approx(4.5 / float(scores.std(correction=0)), rel=1e-5)
    assert rounds[-1].state.scale == state.scale


class Planted(PixelReward):
    """The same, but constant, or failing, in its first calls."""

    def __init__(self, early: float, calls: int = 1, whom: slice = slice(None)) -> None:
        super().__init__()
        self.early, self.until, self.whom = early, calls, whom

    def score(self, samples, prompts, **options) -> Scores:
        made = super().score(samples, prompts, **options)
        if len(self.calls) <= self.until:
            made.values[self.whom] = self.early
        return made


def test_equal_scores_weigh_nothing_and_the_scale_waits():
    rounds = list(run_search(GaussianToy(), Planted(0.5), SequentialMonteCarlo(n=4, trigger="always"), REQUEST))
    first, second = rounds[0].state, rounds[1].state
    assert all(map(math.isnan, first.scale)) and not any(map(math.isnan, second.scale))
    assert rounds[-1].result.finished is not None


def test_a_row_whose_preview_failed_is_never_copied_and_if_all_fail_all_stay():
    # a sample that failed is asked about once more: two calls of one, nine of eight
    with pytest.warns(UserWarning, match="NaN"):
        result = run(SequentialMonteCarlo(n=4, trigger="always", scale=1.0), reward=Planted(math.nan, 2, slice(0, 1)))
    assert (0, "0") in {(c["prompt"], c["id"]) for c in result.pruned}
    with pytest.warns(UserWarning, match="NaN"):
        result = run(SequentialMonteCarlo(n=4, trigger="always", scale=0.0), reward=Planted(math.nan, 9))
    assert len(result.finished) == 8


def test_with_too_little_room_the_best_go_on():
    search, sampler = SequentialMonteCarlo(n=4, trigger=0.0).plan(GaussianToy()).search, GaussianToy()

    def evaluate(rows: Population) -> Population:
        return rows.scored(torch.tensor([float(c) for c in rows.candidate]))

    state = search.step(search.init(sampler, REQUEST), sampler, evaluate)
    left = sampler.nfe(state.live.stage, sampler.num_stages) / sampler.nfe(0, sampler.num_stages)
    state = search.step(replace(state, room=2 * left), sampler, evaluate)
    assert state.cut and sorted(state.live.candidate) == [2, 2, 3, 3]
    assert sorted(c["candidate"] for c in state.pruned) == [0, 0, 1, 1]
    state = search.step(replace(state, room=0.0), sampler, evaluate)
    assert sorted(state.live.candidate) == [3, 3]


def test_the_plan_shrinks_to_plain_sampling():
    sampler, search = GaussianToy(), SequentialMonteCarlo()
    plan = search.plan(sampler, sampler.nfe(0, sampler.num_stages))
    assert plan.search == replace(search, n=1, events=(), transition=Ode()) and plan.rewards == 1
    assert search.plan(sampler, 3 * sampler.nfe(0, sampler.num_stages) + 1).search.n == 3


def test_events_after_which_no_noise_comes_vanish():
    assert SequentialMonteCarlo(events=(2, 6, 7)).plan(GaussianToy()).search.events == (2, 6)
    assert SequentialMonteCarlo(events=(4, 8)).plan(TokenToy()).search.events == (4, 8)
    with pytest.warns(UserWarning, match="no event left"):
        run(SequentialMonteCarlo(n=2), GaussianToy(steps=2))


def test_fk_is_the_column_of_the_paper():
    search = SEARCHES.load("fk")()
    assert isinstance(search, FKSteering) and isinstance(search, SequentialMonteCarlo)
    assert (search.n, search.scale, search.potential, search.temper) == (4, 10.0, "max", "constant")
    assert (search.resampling, search.trigger, search.transition) == ("multinomial", "always", EtaStep(1.0, first=1.0))
    assert search.plan(GaussianToy(steps=50)).search.events == (10, 20, 30, 40)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n", 0, "at least 1"),
        ("scale", -1.0, "at least 0"),
        ("events", (0.5, 1.5), "shares"),
        ("potential", "mean", "use current"),
        ("temper", "cosine", "use constant"),
        ("resampling", "residual", "use multinomial"),
        ("trigger", 1.5, "always"),
        ("trigger", "never", "always"),
        ("transition", "brownian", "use ode"),
    ],
)
def test_bad_hyperparameters_are_refused(field, value, says):
    with pytest.raises(ValueError, match=says):
        SequentialMonteCarlo(**{field: value})


@pytest.mark.parametrize("events", [(0.7, 0.3), (2, 99)])
def test_events_that_are_no_stages_are_refused_before_any_work(events):
    ledger = Ledger()
    with pytest.raises(ValueError, match="ascending"):
        run(SequentialMonteCarlo(events=events), ledger=ledger)
    assert ledger.nfe == ledger.encodes == 0


@pytest.mark.parametrize(("scheduler", "says"), [(HeunDiscreteScheduler(), "order 2"), (IPNDMScheduler(), "unknown")])
def test_schedulers_without_stochastic_steps_are_refused_before_any_work(scheduler, says):
    sampler, ledger = DiffusionSampler(tiny.build("sd", scheduler), {"num_inference_steps": 4}), Ledger()
    with pytest.raises(ValueError, match=says):
        run(SequentialMonteCarlo(), sampler, budget=Budget(max_nfe=10**6), ledger=ledger)
    assert ledger.nfe == ledger.encodes == 0
