"""A recorded pool against the generator it was drawn from: the same picks, the same costs, and nothing that moves."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from contract.cases import PixelReward, diffusion_case, make_search

from visearch.budget import Budget
from visearch.pipelines.recorded import RecordedReward, RecordedSampler
from visearch.pipelines.toy import GaussianToy
from visearch.pool import Pool, evaluate_on_pool
from visearch.protocols import Request
from visearch.record import record
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN
from visearch.search.successive_halving import SuccessiveHalving
from visearch.statistics import expected_best

PROMPTS = ("a photo of a cow", "a photo of two cats", "a photo of a cow")
SELECTING = {
    "best-of-n": BestOfN(n=5, batch=2),
    "halving": SuccessiveHalving(n=6, check_cost=0.0),
    "psp": SuccessiveHalving(n=6, preset="psp", check_cost=0.0),
}


class NegatedReward(PixelReward):
    """Of the other direction, so that a flipped sign would show."""

    name, higher_is_better = "negated", False


def recorded(sampler, folder, reward=None, seeds: int = 6, prompts=PROMPTS, **options) -> Pool:
    lines = [{"prompt": text, "tag": text[-3:]} for text in prompts]
    return record(sampler, [reward or PixelReward()], lines, folder, seeds=seeds, seed=7, rows=6, **options)


def live_request(pool: Pool, **call) -> Request:
    """For the pool's prompts and candidates, of a generator that draws them."""
    streams = (torch.Generator().manual_seed(seed) for seed in pool.seeds.ravel().tolist())
    return Request(pool.prompts, generators=tuple(streams), call=call)


def last_of(*run):
    *_, last = run_search(*run)
    assert last.result.error is None
    return last


def same_run(live, replayed) -> None:
    """All finished rows with every preview seen, all dropped ones, all costs."""
    a, b = (
        [(c["prompt"], c["id"], c["seed"], c["score"], c["lineage"], c["history"]) for c in r.result.ranking]
        for r in (live, replayed)
    )
    assert a == b and a
    assert live.result.pruned == replayed.result.pruned and live.result.stopped == replayed.result.stopped
    assert (live.ledger.nfe, live.ledger.decodes) == (replayed.ledger.nfe, replayed.ledger.decodes)
    assert live.ledger.rewards == replayed.ledger.rewards
    assert live.ledger.images == pytest.approx(replayed.ledger.images)


@pytest.fixture(scope="module")
def toy_pool(tmp_path_factory) -> Pool:
    return recorded(GaussianToy(), tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("max_nfe", [None, 150])
def test_a_search_on_the_pool_is_the_live_search(toy_pool, name, max_nfe):
    request, budget = live_request(toy_pool), Budget(max_nfe=max_nfe)
    live = last_of(GaussianToy(), PixelReward(), SELECTING[name], request, budget)
    replayed = last_of(RecordedSampler(toy_pool), RecordedReward(toy_pool), SELECTING[name], request, budget)
    same_run(live, replayed)
    picks = evaluate_on_pool(toy_pool, SELECTING[name], max_nfe=None if max_nfe is None else max_nfe // len(PROMPTS))
    winners = live.result.winners()
    assert picks.picks.tolist() == [list(winners.candidate)]
    np.testing.assert_array_equal(picks.values["pixel"], winners.score.numpy())
    assert picks.nfe * len(PROMPTS) == live.ledger.nfe and picks.decodes * len(PROMPTS) == live.ledger.decodes


def test_rewards_where_lower_is_better_are_kept_higher_is_better(tmp_path):
    pool = recorded(GaussianToy(), tmp_path, NegatedReward())
    request = live_request(pool)
    live = last_of(GaussianToy(), NegatedReward(), SELECTING["halving"], request)
    same_run(live, last_of(RecordedSampler(pool), RecordedReward(pool), SELECTING["halving"], request))


def test_a_pipeline_s_pool_is_the_live_search(tmp_path):
    case, search = diffusion_case("flow"), SuccessiveHalving(n=6, preset="psp", check_cost=0.0)
    pool = recorded(case.make(), tmp_path, prompts=PROMPTS[:1])
    assert pool.rows == tuple(case.make().nfe(0, stage) for stage in pool.stages)
    assert pool.meta["noise_levels"] == [case.make().noise_level(stage) for stage in pool.stages[:-1]]
    live = last_of(case.make(), PixelReward(), search, live_request(pool, **case.call))
    replayed = last_of(RecordedSampler(pool), RecordedReward(pool), search, live_request(pool))
    assert live.result.winners().id == replayed.result.winners().id
    dropped = [[(c["id"], c["seed"], c["stage"]) for c in run.result.pruned] for run in (live, replayed)]
    assert dropped[0] == dropped[1] and len({stage for _, _, stage in dropped[0]}) == 2
    scores = [[c["score"] for c in run.result.pruned] for run in (live, replayed)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)  # smaller batches may round otherwise
    assert (live.ledger.nfe, live.ledger.decodes) == (replayed.ledger.nfe, replayed.ledger.decodes)


def noise_pool(prompts: int = 5, size: int = 8, **settings) -> Pool:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(prompts, size, 1)) + rng.normal(size=(prompts, size, 6)) * np.linspace(1, 0, 6)
    return Pool.from_arrays(rewards, rows=range(2, 14, 2), **settings)


def test_random_orders_average_to_the_closed_form():
    pool = noise_pool(held_out={"judge": np.arange(40).reshape(5, 8) % 3})
    found = evaluate_on_pool(pool, BestOfN(n=3), draws=2000)
    for p in range(5):
        rewards, verdicts = pool.final("reward")[p], pool.final("judge")[p]
        assert found.values["reward"][p] == pytest.approx(expected_best(rewards, 3), abs=0.06)
        assert found.values["judge"][p] == pytest.approx(expected_best(rewards, 3, verdicts), abs=0.08)
    assert found.picks.shape == (2000, 5) and found.nfe == 36 and found.decodes == 3


def test_costs_of_an_evaluation_are_those_recorded():
    pool = noise_pool(price=0.5, seconds_a_row=0.25)
    search = SuccessiveHalving(n=8, calls=(2,), keep=(3,))
    found = evaluate_on_pool(pool, search)
    assert found.nfe == search.plan(RecordedSampler(pool)).nfe == 8 * 4 + 3 * 8
    assert found.decodes == 8 + 3 and found.cost == 56 + 5.5 and found.seconds == 0.25 * 61.5


def test_orders_are_drawn_for_each_prompt_apart_and_never_hang_on_companions():
    pool = noise_pool()
    orders = evaluate_on_pool(pool, BestOfN(n=1), draws=4).picks
    assert len({tuple(column) for column in orders.T}) > 1
    alone = evaluate_on_pool(pool.take(prompts=[3]), BestOfN(n=1), draws=4).picks
    np.testing.assert_array_equal(alone[:, 0], orders[:, 3])
    again = evaluate_on_pool(pool, BestOfN(n=1), draws=4).picks
    np.testing.assert_array_equal(orders, again)
    assert not np.array_equal(orders, evaluate_on_pool(pool, BestOfN(n=1), draws=4, seed=1).picks)


def test_a_prompt_that_comes_twice_keeps_its_two_pools():
    """Also where the two lie in different runs of an evaluation."""
    pool = noise_pool(prompts=20)
    twice = replace(pool, prompts=(*pool.prompts[:-1], pool.prompts[0]))
    picks = evaluate_on_pool(twice, BestOfN(n=8)).picks[0]
    assert picks.tolist() == pool.final("reward").argmax(1).tolist()
    assert picks[0] != picks[-1]


def test_another_recorded_reward_may_guide():
    rewards = {"a": np.eye(4)[:, :, None] * np.ones(3), "b": -np.eye(4)[:, :, None] * np.ones(3)}
    pool = Pool.from_arrays(rewards, held_out={"judge": np.eye(4)})
    assert evaluate_on_pool(pool, BestOfN(n=4)).values["judge"].tolist() == [1, 1, 1, 1]
    assert evaluate_on_pool(pool, BestOfN(n=4), "b").values["judge"].tolist() == [0, 0, 0, 0]
    assert evaluate_on_pool(pool, BestOfN(n=4), "judge").picks.tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="'c' was not recorded; this pool has judge, a, b"):
        evaluate_on_pool(pool, BestOfN(n=4), "c")


def test_what_was_not_recorded_is_refused():
    pool = noise_pool(held_out={"judge": np.zeros((5, 8))})
    with pytest.raises(ValueError, match="candidate 8 was not recorded: the pool has 8"):
        evaluate_on_pool(pool, BestOfN(n=9, batch=9))
    sampler = RecordedSampler(pool)
    with pytest.raises(ValueError, match="stage 7 was not recorded"):
        sampler.nfe(0, 7)
    request = Request(("prompt 0", "prompt 0"))
    with pytest.raises(ValueError, match="'prompt 0' was not recorded in this pool, or not so many times"):
        sampler.init(request, request.seeds(0, 1))
    rows = sampler.init(sampler.request(), sampler.request().seeds(0, 2))
    with pytest.raises(ValueError, match="stage 0"):
        sampler.predict_x0(rows)
    with pytest.raises(ValueError, match="finished samples only"):
        preview = sampler.decode(sampler.predict_x0(sampler.advance(rows, 1)))
        RecordedReward(pool, "judge").score(preview, [""] * 10)
    with pytest.raises(ValueError, match="draws=0"):
        evaluate_on_pool(pool, BestOfN(n=4), draws=0)


def test_a_search_that_moves_rows_is_refused_on_a_pool():
    for name in ("zero-order", "smc"):
        with pytest.raises(ValueError, match="only be selected from"):
            evaluate_on_pool(noise_pool(), make_search(name))


def test_numbers_that_are_not_there_fail_and_are_never_picked():
    rewards = np.zeros((1, 4, 2))
    rewards[0, :, 1] = [np.nan, 1, -np.inf, 2]
    with pytest.warns(UserWarning, match="scored -inf"):
        assert evaluate_on_pool(Pool.from_arrays(rewards), BestOfN(n=4)).picks.tolist() == [[3]]


def test_the_price_of_a_check_is_the_pool_s():
    """The driver measures it from the ledger, whose seconds are the recorded ones."""
    pool = noise_pool(prompts=1, price=0.75, seconds_a_row=10.0)
    *_, last = run_search(RecordedSampler(pool), RecordedReward(pool), BestOfN(n=4, batch=1), Request(pool.prompts))
    assert last.state.price == pytest.approx(0.75, rel=1e-3)
    assert last.ledger.seconds["denoiser"] == 4 * 12 * 10


def test_three_hundred_prompts_take_a_moment():
    rng = np.random.default_rng(0)
    pool = Pool.from_arrays(rng.normal(size=(300, 32, 15)), rows=range(2, 31, 2), price=0.7)
    begin = time.process_time()
    evaluate_on_pool(pool, SuccessiveHalving(n=16, check_cost=0.7))
    assert time.process_time() - begin < 2
