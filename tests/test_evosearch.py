"""EvoSearch: what a generation costs, where children come from, and what stays as it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from contract.cases import PixelReward
from diffusers import IPNDMScheduler, LMSDiscreteScheduler

from visearch.budget import Ledger
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import Event, Ode, Population, Request, RowState
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN
from visearch.search.evosearch import PRESETS, EvolutionarySearch
from visearch.selection import tournament

REQUEST = Request(("a cow", "two cats"), seed=3)


def run(search, sampler=None, request=REQUEST, **options):
    return list(run_search(sampler or GaussianToy(), PixelReward(), search, request, **options))


# --- what it costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "ours", "released"), [("sd2.1", 4450, 5000), ("flux", 1150, 1465), ("wan", 800, 1000)]
)
def test_presets_cost_what_the_table_says(preset, ours, released):
    sampler = GaussianToy(steps=50)  # two model rows a stage
    assert EvolutionarySearch(preset=preset).plan(sampler).nfe == 2 * ours
    assert EvolutionarySearch(preset=preset, spend_savings=True).plan(sampler).nfe == 2 * released


@pytest.mark.parametrize("savings", [False, True])
def test_the_ledger_is_the_table(savings):
    last = run(EvolutionarySearch(preset="wan", spend_savings=savings), GaussianToy(steps=50), Request(("a cow",)))[-1]
    assert last.ledger.nfe == 2 * (1000 if savings else 800)
    assert last.ledger.decodes == len(last.result.finished) == 10 + 4 * (5 if savings else 3)


@pytest.mark.parametrize("preset", ["auto", *PRESETS])
@pytest.mark.parametrize("savings", [False, True])
def test_a_budget_shrinks_all_sizes_in_proportion_and_is_never_exceeded(preset, savings):
    sampler, one = GaussianToy(steps=50), 100
    search = EvolutionarySearch(preset=preset, spend_savings=savings)
    whole, before = search.plan(sampler), 0
    for budget in range(one, whole.nfe + 2 * one, 3 * one // 2):
        plan = search.plan(sampler, budget)
        assert before <= plan.nfe <= budget or plan.search.n < whole.search.n
        assert plan.nfe <= budget and plan.search.plan(sampler) == plan
        share = plan.search.n / whole.search.n
        by_stage = dict(zip(whole.search.restarts, whole.search.sizes[1:], strict=True))
        for stage, size in zip(plan.search.restarts, plan.search.sizes[1:], strict=True):
            assert abs(size - share * by_stage[stage]) <= 0.5 or size == 1
        before = plan.nfe
    least = replace(search, transition="sde").plan(sampler, one)
    assert (least.nfe, least.search.restarts, least.search.transition) == (one, (), Ode())
    assert search.plan(sampler, whole.nfe) == whole


def test_auto_follows_the_paper():
    plan = EvolutionarySearch(n=20).plan(GaussianToy(steps=40)).search
    assert (plan.restarts, plan.sizes, plan.elites) == ((0, 10, 20, 30), (20, 10, 10, 10, 10), 2)


# --- what it does -----------------------------------------------------------------------------------------------


def test_without_generations_it_is_best_of_n():
    evolved, plain = run(EvolutionarySearch(n=5, generations=0))[-1], run(BestOfN(5))[-1]
    key = ("prompt", "id", "score", "lineage")
    assert [[c[k] for k in key] for c in evolved.result.ranking] == [[c[k] for k in key] for c in plain.result.ranking]
    assert evolved.ledger.nfe == plain.ledger.nfe


class Watched(GaussianToy):
    """Counts who is carried on from which stage, and keeps whoever was re-noised or perturbed."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.steps: Counter = Counter()
        self.born: list[Population] = []

    def advance(self, population, to):
        keys = zip(population.prompt.tolist(), population.id, strict=True)
        self.steps.update((*key, stage) for key in keys for stage in range(population.stage, to))
        return super().advance(population, to)

    def renoise(self, population, to_stage, seeds):
        self.born.append(super().renoise(population, to_stage, seeds))
        return self.born[-1]

    def perturb(self, population, strength, seeds):
        self.born.append(super().perturb(population, strength, seeds))
        return self.born[-1]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_row_is_run_twice_through_a_stage(preset):
    sampler = Watched(steps=20)
    search = EvolutionarySearch(preset=preset, n=10)
    last = run(search, sampler)[-1]
    assert set(sampler.steps.values()) == {1}
    assert 2 * len(sampler.steps) == last.ledger.nfe == 2 * search.plan(sampler).nfe


def test_the_archive_stays_as_it_was_byte_for_byte():
    rounds = run(EvolutionarySearch(n=6), GaussianToy(steps=12))
    final = rounds[-1].state.finished
    assert len(rounds) > 3
    for earlier in rounds[:-1]:
        rows = earlier.state.finished
        assert final.id[: len(rows)] == rows.id and torch.equal(final.score[: len(rows)], rows.score)
        for name, tensor in rows.state.tensors.items():
            assert torch.equal(final.state.tensors[name][: len(rows)], tensor)


def test_elites_are_not_run_again():
    search = EvolutionarySearch(n=10, elites=3)
    rounds = run(search, Watched(steps=12))
    sizes = [len(r.state.finished) for r in rounds]
    assert [b - a for a, b in zip(sizes, sizes[1:], strict=False)] == [2 * (5 - 3)] * 4


@pytest.mark.parametrize("jump", [1, 3])
def test_children_have_exactly_the_noise_of_their_stage(jump):
    """For a single-point target the noise in a child is (x - (1 - t) x0) / t, whoever its parent was."""
    sampler = Watched(steps=20, scale=0.0)
    run(EvolutionarySearch(n=60, restarts=(4, 10, 16), sizes=(60, 60, 60, 60), jump=jump, elites=0), sampler)
    seen = set()
    for rows in sampler.born:
        t, tensors = sampler.time(rows.stage), rows.state.tensors
        noise = (tensors["x"] - (1 - t) * tensors["target"]) / t
        seen.add(rows.stage)
        if len(rows) >= 20:
            assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / noise.numel()) ** 0.5 + 0.03)
    assert seen == {4, 10, 16}


def test_at_stage_0_children_turn_the_initial_noise_by_beta():
    sampler = Watched(steps=6)
    run(EvolutionarySearch(n=8, restarts=(0,), sizes=(8, 8), elites=0, beta=0.3), sampler, Request(("a cow",)))
    start = GaussianToy(steps=6).init(Request(("a cow",)), Request(("a cow",)).seeds(0, 8)).state.tensors["x"]
    children = sampler.born[0]
    pairs = [(start[c], children.state.tensors["x"][i]) for i, c in enumerate(children.candidate)]
    cosine = torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()
    assert len(pairs) == 8 and float(cosine) == pytest.approx((1 - 0.3**2) ** 0.5, abs=0.05)


def test_states_are_archived_on_the_cpu_and_only_while_a_generation_needs_them():
    rounds = run(EvolutionarySearch(n=6, restarts=(0, 3, 8), sizes=(6, 3, 3, 3)), GaussianToy(steps=12))
    assert [sorted(r.state.archive) for r in rounds] == [[0, 4, 9], [4, 9], [9], []]
    first = rounds[0].state
    for stage, (rows,) in first.archive.items():
        assert rows.stage == stage and rows.id == first.finished.id
        assert {t.device.type for t in rows.state.tensors.values()} == {"cpu"}
    assert [len(part) for part in rounds[2].state.archive[9]] == [12, 4, 4]


def test_the_best_never_falls_and_the_answer_is_the_best_of_the_archive():
    rounds = run(EvolutionarySearch(n=6), GaussianToy(steps=12))
    for earlier, later in zip(rounds, rounds[1:], strict=False):
        assert all(later.best[p] >= score for p, score in earlier.best.items())
    winners = rounds[-1].result.winners()
    finished = rounds[-1].result.finished
    assert winners.score.tolist() == [float(finished.score[finished.prompt == p].max()) for p in (0, 1)]


def test_with_too_little_room_fewer_children_are_born():
    sampler, reward = GaussianToy(steps=10), PixelReward()
    search = EvolutionarySearch(n=8, generations=2, elites=0).plan(sampler).search

    def evaluate(rows: Population) -> Population:
        return rows.scored(reward.score(sampler.decode(rows), [""] * len(rows)).values)

    state = search.init(sampler, REQUEST)
    state = search.step(replace(state, room=3.0), sampler, evaluate)
    assert sorted(set(state.finished.candidate)) == [0, 1, 2] and not search.done(state) and not state.cut
    state = search.step(replace(state, room=None), sampler, evaluate)
    assert len(state.finished) == 16 and state.generation == 0
    state = search.step(replace(state, room=2.5), sampler, evaluate)
    assert len(state.finished) == 20 and state.cut and state.generation == 1
    state = search.step(replace(state, room=1.2, open_prompts=(1,)), sampler, evaluate)
    assert state.finished.prompt[20:].tolist() == [1, 1] and search.done(state)


# --- parents ----------------------------------------------------------------------------------------------------


def archive(scores) -> Population:
    rows = len(scores)
    lineage = tuple((Event("init", 0, k, k),) for k in range(rows))
    population = Population(8, torch.zeros(rows, dtype=torch.int64), lineage, (torch.zeros(1),) * rows, RowState())
    return population.scored(torch.tensor(scores))


def test_a_tournament_is_won_by_the_best_of_distinct_entrants():
    rows = archive([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    assert {tournament(rows, [0, 1, 2, 3], 4, generator) for _ in range(20)} == {1}
    assert {tournament(rows, [0, 2, 3], 9, generator) for _ in range(20)} == {3}
    assert {tournament(rows, [0, 1, 2, 3], 1, generator) for _ in range(100)} == {0, 1, 2, 3}
    assert 0 not in {tournament(rows, [0, 1, 2, 3], 2, generator) for _ in range(100)}


def test_the_order_of_rows_does_not_decide_a_tournament():
    scores = [0.3, 0.1, 0.9, 0.5, 0.7]
    rows, order = archive(scores), [3, 1, 4, 0, 2]
    mixed = rows.select(order)
    for seed in range(20):
        a = tournament(rows, range(5), 2, torch.Generator().manual_seed(seed))
        b = tournament(mixed, range(5), 2, torch.Generator().manual_seed(seed))
        assert rows.id[a] == mixed.id[b]


def test_rows_of_equal_score_win_equally_often():
    rows, generator = archive([1.0, 0.0, 1.0, 1.0]), torch.Generator().manual_seed(0)
    won = [tournament(rows, range(4), 4, generator) for _ in range(300)]
    assert set(won) == {0, 2, 3}
    assert all(won.count(row) == pytest.approx(100, abs=35) for row in (0, 2, 3))


def test_three_entrants_leave_many_parents():
    """About 14 distinct parents in 21 slots from an archive of 42."""
    rows, generator = archive(list(range(42))), torch.Generator().manual_seed(0)
    distinct = [len({tournament(rows, range(42), 3, generator) for _ in range(21)}) for _ in range(200)]
    assert sum(distinct) / len(distinct) == pytest.approx(14, abs=1)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n": 0}, "at least 1"),
        ({"preset": "sdxl"}, "use auto"),
        ({"restarts": (0,)}, "together"),
        ({"restarts": (0, 5), "sizes": (4, 4)}, "give 3"),
        ({"restarts": (0, 1.5), "sizes": (4, 4, 4)}, "shares"),
        ({"restarts": (0,), "sizes": (4, 2), "elites": 3}, "more than the smallest population"),
        ({"elites": 9}, "more than the smallest population"),
        ({"elites": -1}, "at least 0"),
        ({"tournament": 0}, "at least 1"),
        ({"jump": 0}, "at least 1"),
        ({"beta": 0.0}, "repeat the parents"),
        ({"beta": 1.5}, "lie in"),
        ({"transition": "brownian"}, "use ode"),
    ],
)
def test_bad_hyperparameters_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        EvolutionarySearch(**fields)


@pytest.mark.parametrize(("restarts", "says"), [((9, 20), "has to be 0 or one of"), ((0.5, 0.2), "ascending")])
def test_restarts_that_are_no_stages_are_refused_before_any_work(restarts, says):
    ledger = Ledger()
    with pytest.raises(ValueError, match=says):
        run(EvolutionarySearch(restarts=restarts, sizes=(4, 4, 4)), GaussianToy(steps=10), ledger=ledger)
    assert ledger.nfe == ledger.encodes == 0


@pytest.mark.parametrize(("scheduler", "says"), [(IPNDMScheduler(), "unknown"), (LMSDiscreteScheduler(), "middle")])
def test_schedulers_whose_rows_cannot_move_are_refused_before_any_work(scheduler, says):
    sampler, ledger = DiffusionSampler(tiny.build("sd", scheduler), {"num_inference_steps": 6}), Ledger()
    with pytest.raises(ValueError, match=says):
        run(EvolutionarySearch(), sampler, ledger=ledger)
    assert ledger.nfe == ledger.encodes == 0
