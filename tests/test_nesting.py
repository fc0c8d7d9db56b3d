"""Searches made of searches: what is forwarded, what is merged back, budgets of both, checkpoints of the whole tree."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from contract.cases import FakeClock, PixelReward

from visearch import BestOfN, Budget, Ledger, Request, SuccessiveHalving, run_search
from visearch.checkpoint import load_state, save_state
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import Budgeted, SearchState
from visearch.run import regenerate
from visearch.search import parse
from visearch.search.nesting import NestedState, is_search, may_step, step_inner
from visearch.search.refine import Refine
from visearch.search.zero_order import ZeroOrder

HALVING = SuccessiveHalving(n=4, check_cost=0.0)
REFINE = Refine(HALVING, ZeroOrder(n=5, k=2))
DRAFTS_OF_PARTICLES = "cached-drafts(search=smc(n=4, trigger=0.0), m=2, cache={'every': 2, 'warmup': 1})"


def rounds(search, sampler=None, prompts=("a", "b"), budget=None, **options):
    sampler = sampler or GaussianToy(steps=20)
    return list(run_search(sampler, PixelReward(), search, Request(tuple(prompts), seed=3), budget, **options))


def finish(search, *args, **options):
    return rounds(search, *args, **options)[-1].result


@dataclass(frozen=True)
class Told(SearchState):
    """What an inner search was told, and something of each kind to be merged back."""

    heard: tuple = ()


@dataclass(frozen=True)
class Listener:
    """One candidate a round; writes down what its state says before each."""

    n: int = 3

    def plan(self, sampler, max_nfe=None):
        one = sampler.nfe(0, sampler.num_stages)
        return Budgeted(self, self.n * one, float(self.n), self.n, self.n, self.n)

    def init(self, sampler, request):
        return Told(request, open_prompts=tuple(range(len(request.prompts))))

    def step(self, state, sampler, evaluate):
        k = state.round
        rows = sampler.init(state.request, state.request.seeds(k, k + 1, state.open_prompts))
        rows = evaluate(sampler.advance(rows, sampler.num_stages))
        done = rows if state.finished is None else sampler.concat([state.finished, rows])
        return replace(
            state,
            finished=done,
            round=k + 1,
            cut=k > 0,
            heard=(*state.heard, (state.room, state.price, state.open_prompts)),
            notes=(*state.notes, f"round {k}"),
            pruned=(*state.pruned, {"prompt": 0, "candidate": k}),
        )

    def done(self, state):
        return state.round >= self.n


def test_the_inner_search_is_told_and_what_it_says_is_merged():
    sampler, search = GaussianToy(steps=4), Listener()
    request = Request(("a", "b"))
    inner = search.init(sampler, request)
    outer = NestedState(request, open_prompts=(0, 1), inner=inner, notes=("mine",), pruned=({"prompt": 1},), room=9.0)
    score = lambda rows: rows.scored(torch.zeros(len(rows)))  # noqa: E731
    outer = step_inner(replace(outer, price=0.5), search, sampler, score, room=4.5)
    outer = step_inner(replace(outer, price=0.25, open_prompts=(1,)), search, sampler, score, room=None)
    assert outer.inner.heard == ((4.5, 0.5, (0, 1)), (None, 0.25, (1,)))
    assert outer.notes == ("mine", "round 0", "round 1")
    assert outer.pruned == ({"prompt": 1}, {"prompt": 0, "candidate": 0}, {"prompt": 0, "candidate": 1})
    assert outer.cut and outer.round == 2 and outer.finished is None and outer.inner.room is None
    assert outer.inner.finished.prompt.tolist() == [0, 1, 1]


def test_an_inner_search_steps_while_its_room_pays_for_it():
    sampler, search, request = GaussianToy(steps=4), BestOfN(n=2), Request(("a",))
    begun = search.init(sampler, request)
    rows = sampler.init(request, request.seeds(0, 2))
    assert may_step(search, begun, None) and may_step(search, begun, 1.0) and not may_step(search, begun, 0.9)
    assert may_step(search, replace(begun, live=rows), 0.0)
    assert not may_step(search, replace(begun, live=rows, finished=rows), 0.9)
    assert not may_step(search, replace(begun, finished=rows), None)


def test_only_searches_are_taken_for_searches():
    assert is_search(BestOfN()) and is_search(REFINE)
    assert not any(map(is_search, (BestOfN, "best-of-n", None)))


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_a_nested_state_survives_saving(tmp_path):
    sampler, request = GaussianToy(steps=4), Request(("a",))
    blank = REFINE.init(sampler, request)
    rows = sampler.advance(sampler.init(request, request.seeds(0, 2)), 2)
    local = ZeroOrder().init(sampler, request)
    local = replace(local, finished=rows, centre={0: 1}, queue={0: (0, 1)}, room=2.5)
    state = replace(blank, refining=True, inner=NestedState(request, inner=local, live=rows, notes=("n",)))
    save_state(tmp_path, state, {"ledger": {}})
    back, extra = load_state(tmp_path, blank)
    assert extra == {"ledger": {}} and back.refining and type(back.inner) is NestedState
    deep = back.inner.inner
    assert type(deep) is type(local) and deep.request is request
    assert deep.centre == {0: 1} and deep.queue == {0: (0, 1)} and deep.room == 2.5
    assert deep.finished.id == rows.id and torch.equal(deep.finished.state.tensors["x"], rows.state.tensors["x"])
    assert torch.equal(back.inner.live.state.tensors["x"], rows.state.tensors["x"]) and back.inner.notes == ("n",)


def test_states_of_others_are_neither_written_nor_read(tmp_path):
    request = Request(("a",))
    state = NestedState(request, inner=Told(request))
    with pytest.raises(TypeError, match=r"Told.*neither saved nor read"):
        save_state(tmp_path, state, {})
    save_state(tmp_path, NestedState(request, inner=SearchState(request)), {})
    (file,) = tmp_path.glob("round-*/state.json")
    file.write_text(file.read_text().replace("visearch.protocols:SearchState", "os:system"))
    with pytest.raises(TypeError, match="os:system"):
        load_state(tmp_path, state)


def test_interrupted_in_either_half_and_resumed(tmp_path):
    whole = rounds(REFINE)
    assert len({r.state.refining for r in whole}) == 2
    for stop in range(1, len(whole)):
        folder = tmp_path / str(stop)
        steps = run_search(GaussianToy(steps=20), PixelReward(), REFINE, Request(("a", "b"), seed=3), checkpoint=folder)
        for _ in range(stop):
            next(steps)
        steps.close()
        rest = rounds(REFINE, checkpoint=folder)
        assert [c["id"] for c in rest[-1].result.ranking] == [c["id"] for c in whole[-1].result.ranking]
        assert rest[-1].ledger.nfe == whole[-1].ledger.nfe


# --- refine ---------------------------------------------------------------------------------------------------


def test_the_local_search_begins_at_the_winners_and_keeps_what_was_found():
    first, both = finish(HALVING), finish(REFINE)
    for prompt in (0, 1):
        found = [c for c in first.ranking if c["prompt"] == prompt]
        kept = {c["id"]: c["score"] for c in both.ranking if c["prompt"] == prompt}
        assert all(kept[c["id"]] == c["score"] for c in found)
        new = [c for c in both.ranking if c["prompt"] == prompt and c["id"] not in {f["id"] for f in found}]
        assert len(new) == 5 and sum(c["candidate"] == found[0]["candidate"] for c in new) >= 2
        dropped = {c["candidate"] for c in both.pruned if c["prompt"] == prompt}
        assert not dropped & {c["candidate"] for c in new if len(c["lineage"]) == 1}
    assert len(both.pruned) == len(first.pruned) and both.winners().score.ge(first.winners().score).all()


def test_the_cost_is_the_sum_and_the_answer_the_best():
    sampler = GaussianToy(steps=20)
    parts = [HALVING.plan(sampler), ZeroOrder(n=5, k=2).plan(sampler)]
    plan, ledger = REFINE.plan(sampler), Ledger()
    finish(REFINE, sampler, ledger=ledger)
    for name in ("nfe", "images", "decodes", "rewards", "finals"):
        assert getattr(plan, name) == pytest.approx(sum(getattr(p, name) for p in parts))
    assert ledger.nfe == 2 * plan.nfe and ledger.decodes == 2 * plan.decodes


@pytest.mark.parametrize(
    ("bar", "halves"),
    [(1, (1, 0)), (2, (1, 1)), (3, (2, 1)), (6, (3, 3)), (20, (15, 5))],
)
def test_a_budget_is_split(bar, halves):
    sampler = GaussianToy(steps=20)
    one = sampler.nfe(0, 20)
    plan = Refine(BestOfN(n=15), ZeroOrder(n=5, k=2)).plan(sampler, bar * one)
    first, then = plan.search.first, plan.search.then
    assert (first.n, then.n if then else 0) == halves and plan.nfe == bar * one
    assert len(finish(plan.search, prompts=("a",)).finished) == bar


def test_what_the_local_search_leaves_goes_to_the_first():
    sampler = GaussianToy(steps=20)
    plan = Refine(BestOfN(n=15), ZeroOrder(n=2, k=2)).plan(sampler, 10 * sampler.nfe(0, 20))
    assert (plan.search.first.n, plan.search.then.n) == (8, 2)
    plan = Refine(BestOfN(n=3), ZeroOrder(n=9, k=2)).plan(sampler, 10 * sampler.nfe(0, 20))
    assert (plan.search.first.n, plan.search.then.n) == (3, 7)


def test_under_a_deadline_both_get_their_share(monkeypatch):
    clock = FakeClock(monkeypatch)
    sampler = clock.by_cost(GaussianToy(steps=20))
    search = Refine(BestOfN(n=100, batch=2), ZeroOrder(n=100, k=3))
    result = finish(search, sampler, prompts=("a",), budget=Budget(max_seconds=20))
    assert result.stopped == "deadline" and 10 <= clock.now <= 21
    moved = [c for c in result.ranking if len(c["lineage"]) > 1]
    assert len(moved) >= 3 and 6 <= len(result.ranking) - len(moved) <= 10


def test_nests_in_itself():
    result = finish(Refine(REFINE, ZeroOrder(n=2, k=2)), prompts=("a",))
    assert len({c["id"] for c in result.ranking}) == len(result.ranking) == 1 + 5 + 2


def test_without_neighbours_the_local_search_runs_one_more_candidate():
    result = finish(Refine(BestOfN(n=2), ZeroOrder(n=5, k=0)), prompts=("a",))
    assert sorted(result.finished.id) == ["0", "1", "2"]


@pytest.mark.parametrize("first", ["smc(n=4, trigger=0.0)", DRAFTS_OF_PARTICLES])
def test_neighbours_of_particles_take_their_steps(first):
    """Next to no change of the noise makes next to no change of the result: all other noise is the centre's."""
    search, sampler = Refine(parse(first), ZeroOrder(n=3, k=3, tau=1 - 1e-9)), GaussianToy(steps=20)
    result = finish(search, sampler, prompts=("a",))
    rows = {c["id"]: c for c in result.ranking}
    moved = [c for c in result.ranking if "noise" in c["id"]]
    assert len(moved) == 3
    for c in moved:
        assert c["score"] == pytest.approx(rows[c["id"].split("/noise")[0]]["score"], abs=1e-3)
    for row in range(len(result.finished)):
        assert regenerate(search.view(sampler), result.request, result.finished.select([row])).drift == 0


def test_tokens_are_refined_too():
    search = Refine(BestOfN(n=2), ZeroOrder(n=3, k=3))
    result = finish(search, TokenToy(), prompts=("a",))
    assert len(result.ranking) == 5 and sum(c["lineage"][-1]["op"] == "noise" for c in result.ranking) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first": BestOfN}, "first=.*no search"),
        ({"first": "halving"}, "first='halving'"),
        ({"then": BestOfN()}, "then=.*resume"),
        ({"share": 1.0}, r"share=1.0.*\(0, 1\)"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Refine(**fields)


def test_a_budget_below_one_candidate_is_refused():
    sampler = GaussianToy(steps=20)
    with pytest.raises(ValueError, match="too small"):
        REFINE.plan(sampler, sampler.nfe(0, 20) - 1)
