"""Checks U1 to U7: every registered search on every registered sampler."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contract.cases import EVENTS, REFUSALS, SAMPLER_CASES, Case, FakeClock, PixelReward, changed, make_search, tight
from visearch.budget import Budget, Ledger
from visearch.pipelines import SAMPLERS
from visearch.protocols import Population
from visearch.run import Round, run_search
from visearch.search import SEARCHES

_cache: dict[str, Case] = {}


# minutes; the flow pipeline and the samplers without a model stand for them otherwise
SLOW = ("diffusion-epsilon", "diffusion-v", "diffusion-video")
FIXED = ("recorded",)


def pytest_generate_tests(metafunc) -> None:
    """Every sampler, or every pair of sampler and search, but those that are refused: they have tests of their own."""
    names = [n for n in sorted(SAMPLER_CASES) if "moves" not in metafunc.fixturenames or n not in FIXED]
    marks = dict.fromkeys(SLOW, pytest.mark.slow)
    if "search" in metafunc.fixturenames:
        pairs = [(n, s) for s in sorted(SEARCHES) for n in names if (s, n) not in REFUSALS]
        params = [pytest.param(n, s, id=f"{s}-{n}", marks=marks.get(n, ())) for n, s in pairs]
        metafunc.parametrize(("case", "search"), params, indirect=True)
    elif "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [pytest.param(n, marks=marks.get(n, ())) for n in names], indirect=True)


@pytest.fixture
def case(request) -> Case:
    name = request.param
    if name not in _cache:
        _cache[name] = SAMPLER_CASES[name]()
    return _cache[name]


@pytest.fixture
def search(request):
    return make_search(request.param)


@pytest.fixture
def moves() -> None:
    """Asks for samplers whose rows can move."""


@pytest.mark.parametrize(("name", "sampler"), sorted(REFUSALS))
def test_what_a_sampler_cannot_serve_is_refused_before_anything_runs(name, sampler):
    made = SAMPLER_CASES[sampler]()
    with pytest.raises(ValueError, match=REFUSALS[name, sampler]):
        make_search(name).init(made.make(), made.request())


@pytest.mark.parametrize("name", FIXED)
def test_rows_that_cannot_move_say_so(name):
    case = SAMPLER_CASES[name]()
    sampler = case.make()
    rows = sampler.init(case.request(), case.request().seeds(0, 1))
    late = sampler.advance(rows, sampler.milestones[0])
    for refused in (
        lambda: sampler.noise(rows),
        lambda: sampler.set_noise(rows, torch.zeros(2, 1), [1, 2]),
        lambda: sampler.perturb(late, 0.5, [1, 2]),
        lambda: sampler.renoise(late, 0, [1, 2]),
    ):
        with pytest.raises(ValueError, match="only be selected from"):
            refused()


def run(case: Case, search, budget=None, request=None, **options) -> list[Round]:
    request = request or case.request()
    return list(run_search(case.make(), PixelReward(), search, request, budget, **options))


def outcome(case: Case, sampler, rows: Population) -> torch.Tensor:
    if case.decoded:
        if sampler.request is None:  # rows of another sampler of the same pipeline
            sampler.request = case.request()
        return sampler.decode(rows)
    name = "x" if "x" in rows.state.tensors else "tokens"
    return rows.state.tensors[name]


def same_ranking(case: Case, a, b) -> bool:
    """Equal up to the tolerance in the scores; equal in everything else unless scores tie within it."""
    x, y = ({(c["prompt"], c["id"]): c for c in r.ranking} for r in (a, b))
    close = 1e-3 if case.tolerance else 0
    return x.keys() == y.keys() and all(
        x[k]["lineage"] == y[k]["lineage"] and math.isclose(x[k]["score"], y[k]["score"], abs_tol=close) for k in x
    )


def test_every_sampler_has_a_case():
    missing = [name for name in SAMPLERS if not any(c == name or c.startswith(f"{name}-") for c in SAMPLER_CASES)]
    assert not missing, f"add cases for {missing} to tests/contract/cases.py"


def test_u1_budget_for_one_candidate_is_the_bare_generator(case, search):
    sampler = case.make()
    one = sampler.nfe(0, sampler.num_stages)
    for prompt in case.request().prompts:
        result = run(case, search, Budget(max_nfe=one), case.request([prompt]))[-1].result
        winner = result.winners()
        assert len(result.finished) == 1
        assert torch.equal(outcome(case, sampler, winner)[0], case.bare(sampler, prompt, 7))


def test_u2_chunks_change_nothing(case, search):
    whole = run(case, search)[-1].result
    for rows, decode_rows in ((1, 3), (3, 1)):
        split = run(case, search, rows=rows, decode_rows=decode_rows, reward_rows=2)[-1].result
        assert same_ranking(case, whole, split)


def test_u2_companions_change_nothing(case, search):
    both = run(case, search)[-1].result
    for p, prompt in enumerate(case.request().prompts):
        alone = run(case, search, request=case.request([prompt]))[-1].result
        mine = [c for c in both.ranking if c["prompt"] == p]
        theirs = alone.ranking
        if getattr(search, "across_prompts", False):  # how many candidates each gets is what hangs on the others
            common = {c["id"] for c in mine} & {c["id"] for c in theirs}
            mine, theirs = ([c for c in ranking if c["id"] in common] for ranking in (mine, theirs))
            assert len(common) >= search.plan(case.make()).search.first
        assert [c["id"] for c in mine] == [c["id"] for c in theirs]
        for a, b in zip(mine, theirs):
            assert a["lineage"] == b["lineage"]
            assert math.isclose(a["score"], b["score"], abs_tol=1e-3 if case.tolerance else 0)


def test_u2_permuted_rows_change_nothing(case):
    sampler = case.make()
    request = case.request()
    seeds = request.seeds(0, 3)
    straight = sampler.advance(sampler.init(request, seeds), sampler.num_stages)
    order = [4, 1, 5, 0, 3, 2]
    mixed = sampler.advance(sampler.init(request, [seeds[i] for i in order]), sampler.num_stages)
    assert case.same(outcome(case, sampler, straight.select(order)), outcome(case, sampler, mixed))


def test_u3_ledger_is_the_closed_form(case, search):
    sampler = case.make()
    plan = search.plan(sampler)
    ledger = run(case, search)[-1].ledger
    prompts = len(case.request().prompts)
    if not plan.exact:  # an upper bound, which the search has to undercut: else it dropped nobody
        assert ledger.nfe < prompts * plan.nfe and ledger.images < prompts * plan.images
        assert ledger.decodes <= prompts * plan.decodes and ledger.rewards["pixel"] == ledger.decodes
        return
    assert ledger.nfe == prompts * plan.nfe
    assert ledger.images == pytest.approx(prompts * plan.images)
    assert ledger.decodes == prompts * plan.decodes
    assert ledger.rewards["pixel"] == prompts * plan.rewards
    assert ledger.rewards["pixel (order check)"] == 2


def test_u4_best_so_far_is_monotone(case, search):
    rounds = run(case, search)
    assert rounds[-1].last and not any(r.last for r in rounds[:-1])
    for earlier, later in zip(rounds, rounds[1:]):
        assert all(later.best[p] >= s for p, s in earlier.best.items())
    final = rounds[-1].result
    for p, best in rounds[-1].best.items():
        assert best == max(c["score"] for c in final.ranking if c["prompt"] == p)


def test_u5_winner_is_regenerated_from_its_lineage(case, search):
    bare = case.make()
    search = search.plan(bare).search
    sampler = search.view(bare) if hasattr(search, "view") else bare
    request = case.request()
    winners = run(case, search)[-1].result.winners()
    for row in range(len(winners)):
        events = winners.lineage[row]
        prompt = request.prompts[int(winners.prompt[row])]
        if all(e.op == "init" for e in events) and sampler is bare:
            again = case.bare(sampler, prompt, events[0].seed)
        else:
            again = outcome(case, sampler, regenerate(sampler, request, winners.select([row])))[0]
        assert case.same(outcome(case, sampler, winners.select([row]))[0], again)


def regenerate(sampler, request, row):
    prompt, events = int(row.prompt[0]), row.lineage[0]
    seed = [s for s in request.seeds(0, int(events[0].value) + 1, [prompt]) if s.candidate == events[0].value]
    rows = sampler.init(request, seed)
    for event in events[1:]:
        if event.stage > rows.stage:
            rows = sampler.advance(rows, event.stage)
        if event.op == "fork":
            rows = rows.select([0] * (int(event.value) + 1)).select([int(event.value)])
        elif event.op == "renoise":
            rows = sampler.renoise(rows, int(event.value), [event.seed])
        elif event.op == "noise":
            rows = sampler.set_noise(rows, row.noise[0][None], [event.seed])
        else:
            rows = sampler.perturb(rows, event.value, [event.seed])
    return sampler.advance(rows, sampler.num_stages) if rows.stage < sampler.num_stages else rows


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.integers(0, 400))
def test_u6_nfe_cap_is_never_exceeded(case, search, extra):
    sampler = case.make()
    one = sampler.nfe(0, sampler.num_stages)
    prompts = len(case.request().prompts)
    cap = one * prompts + extra
    last = run(case, search, Budget(max_nfe=cap))[-1]
    assert last.ledger.nfe <= cap
    assert set(last.best) == set(range(prompts))


def test_u6_a_budget_below_one_candidate_is_refused_before_any_work(case, search):
    sampler = case.make()
    one = sampler.nfe(0, sampler.num_stages)
    ledger = Ledger()
    with pytest.raises(ValueError, match="too small"):
        list(run_search(sampler, PixelReward(), search, case.request(), Budget(max_nfe=one), ledger=ledger))
    assert ledger.nfe == 0 and ledger.forwards == 0


def test_u6_deadline_is_overrun_by_at_most_one_operation(case, search, monkeypatch):
    clock = FakeClock(monkeypatch)
    sampler = clock.by_cost(case.make())
    last = list(run_search(sampler, PixelReward(), search, case.request(["a"]), Budget(max_seconds=3.5)))[-1]
    assert last.result.stopped in ("deadline", "done")
    assert 1.0 <= clock.now <= 3.5 + 1.0
    assert last.result.finished is not None


def test_u7_interrupt_and_resume_equals_uninterrupted(case, search, tmp_path):
    unbroken = run(case, search)[-1]
    whole = unbroken.result
    first = run_search(case.make(), PixelReward(), search, case.request(), checkpoint=tmp_path)
    opening = next(first)
    first.close()
    assert not opening.last
    rest = run(case, search, checkpoint=tmp_path)
    assert rest[0].index > opening.index
    assert same_ranking(case, whole, rest[-1].result)
    assert rest[-1].ledger.nfe == unbroken.ledger.nfe


def test_u7_a_checkpoint_of_another_run_is_refused(case, search, tmp_path):
    first = run_search(case.make(), PixelReward(), search, case.request(), checkpoint=tmp_path)
    next(first)
    first.close()
    with pytest.raises(ValueError, match="another run"):
        run(case, search, request=case.request(seed=8), checkpoint=tmp_path)


# --- what every sampler promises ------------------------------------------------------------------------------


def test_pruning_leaves_survivors_alone(case):
    sampler = case.make()
    seeds = case.request().seeds(0, 2)
    for stage in (sampler.milestones[0], sampler.milestones[len(sampler.milestones) // 2 - 1]):
        full = sampler.advance(sampler.init(case.request(), seeds), sampler.num_stages)
        rows = sampler.advance(sampler.init(case.request(), seeds), stage)
        kept = sampler.advance(sampler.select(rows, [3, 0]), sampler.num_stages)
        assert case.same(outcome(case, sampler, kept), outcome(case, sampler, full.select([3, 0])))


def test_first_copy_keeps_its_stream_and_others_differ(case):
    sampler = case.make()
    rows = sampler.advance(sampler.init(case.request(), case.request().seeds(0, 1)), sampler.milestones[0])
    copies = sampler.select(rows, [0, 1, 0, 0])
    assert torch.equal(copies.rng[0], rows.rng[0]) and torch.equal(copies.rng[1], rows.rng[1])
    assert len({bytes(copies.rng[i].numpy()) for i in (0, 2, 3)}) == 3
    assert copies.id[2] != copies.id[3] and copies.parent.tolist() == [0, 1, 0, 0]


def test_preview_needs_a_model_call_and_costs_none(case):
    sampler = case.make()
    sampler.meter = meter = Ledger()
    rows = sampler.init(case.request(), case.request().seeds(0, 2))
    with pytest.raises(ValueError, match="stage 0"):
        sampler.predict_x0(rows)
    rows = sampler.advance(rows, sampler.milestones[0])
    spent = meter.nfe
    preview = sampler.decode(sampler.predict_x0(rows))
    assert meter.nfe == spent
    assert len(preview) == 4 and preview.min() >= 0 and preview.max() <= 1


def test_perturb_zero_is_a_no_op_and_more_moves(case, moves):
    sampler = case.make()
    rows = sampler.advance(sampler.init(case.request(), case.request().seeds(0, 2)), sampler.milestones[0])
    assert sampler.perturb(rows, 0.0, [1, 2, 3, 4]) is rows
    moved = sampler.perturb(rows, 0.5, [1, 2, 3, 4])
    assert moved.stage == rows.stage and moved.lineage[0][-1].op == "perturb"
    a, b = (outcome(case, sampler, sampler.advance(r.snapshot(), sampler.num_stages)) for r in (rows, moved))
    assert not torch.equal(a, b)
    again = sampler.advance(sampler.perturb(rows, 0.5, [1, 2, 3, 4]), sampler.num_stages)
    assert torch.equal(b, outcome(case, sampler, again))


def test_renoise_goes_back_and_reaches_the_end_again(case, moves):
    sampler = case.make()
    rows = sampler.advance(sampler.init(case.request(), case.request().seeds(0, 2)), sampler.num_stages)
    back = sampler.renoise(rows, sampler.milestones[0], [1, 2, 3, 4])
    assert back.stage == sampler.milestones[0]
    done = sampler.advance(back, sampler.num_stages)
    assert done.stage == sampler.num_stages
    assert not torch.equal(outcome(case, sampler, done), outcome(case, sampler, rows))
    with pytest.raises(ValueError, match="earlier"):
        sampler.renoise(back, sampler.milestones[0], [1, 2, 3, 4])


def test_population_survives_saving(case, tmp_path):
    sampler = case.make()
    rows = sampler.advance(sampler.init(case.request(), case.request().seeds(0, 2)), sampler.milestones[0])
    rows = rows.scored(torch.tensor([0.1, -math.inf, math.nan, 3.0]))
    rows.save(tmp_path)
    back = Population.load(tmp_path)
    assert back.id == rows.id and back.lineage == rows.lineage and repr(back.history) == repr(rows.history)
    a, b = (sampler.advance(r, sampler.num_stages) for r in (rows, back))
    assert torch.equal(outcome(case, sampler, a), outcome(case, sampler, b))


def test_noise_levels_fall_and_costs_add_up(case):
    sampler = case.make()
    stages = (0, *sampler.milestones)
    levels = [sampler.noise_level(s) for s in stages]
    assert levels == sorted(levels) and levels[-1] == math.inf
    assert sum(sampler.cost(a, b) for a, b in zip(stages, stages[1:])) == pytest.approx(1)
    assert sum(sampler.nfe(a, b) for a, b in zip(stages, stages[1:])) == sampler.nfe(0, sampler.num_stages)


def test_out_of_memory_halves_rows_and_changes_nothing(case, search):
    whole = run(case, search)[-1].result
    sampler = changed(case.make(), advance=tight(2), decode=tight(1))
    last = list(run_search(sampler, PixelReward(), search, case.request()))[-1]
    assert last.result.stopped == "done" and last.ledger.retries > 0
    assert same_ranking(case, whole, last.result)


def test_out_of_memory_with_one_row_keeps_what_was_finished(case, search):
    rounds = []

    def failing(decode, rows):
        if rounds:
            raise MemoryError
        return decode(rows)

    sampler = changed(case.make(), decode=failing)
    for made in run_search(sampler, PixelReward(), search, case.request()):
        rounds.append(made)
    *_, before, last = rounds
    assert last.result.stopped == "failed" and "out of memory" in str(last.result.error)
    keeps_what_was_finished(last.result, before)


def keeps_what_was_finished(result, before: Round) -> None:
    assert result.finished is before.state.finished and result.pruned == before.state.pruned
    if result.finished is None:
        with pytest.raises(RuntimeError, match="before any candidate was finished"):
            result.winners()
    else:
        assert set(result.winners().prompt.tolist()) == set(range(len(result.request.prompts)))


def test_interrupt_keeps_what_was_finished(case, search):
    rounds = []

    def interrupted(advance, rows, to):
        if rounds:
            raise KeyboardInterrupt
        return advance(rows, to)

    sampler = changed(case.make(), advance=interrupted)
    for made in run_search(sampler, PixelReward(), search, case.request()):
        rounds.append(made)
    *_, before, last = rounds
    assert last.last and last.result.stopped == "interrupted"
    keeps_what_was_finished(last.result, before)


def test_a_search_that_is_cancelled_has_a_winner_for_each_prompt(case, search):
    whole = search.plan(case.make()).nfe * len(case.request().prompts)
    ledger = Ledger()
    last = run(case, search, ledger=ledger, cancelled=lambda: ledger.nfe > 0)[-1]
    assert last.result.stopped == "cancelled" and ledger.nfe < whole
    assert set(last.result.winners().prompt.tolist()) == set(range(len(case.request().prompts)))


def test_the_result_shows_what_the_search_did(case, search, request):
    name = request.node.callspec.params["search"]
    assert name in EVENTS, f"search {name!r} has no event; add one to tests/contract/cases.py"
    EVENTS[name](search.plan(case.make()).search, run(case, search)[-1].result)


def test_what_was_dropped_survives_a_checkpoint(case, search, tmp_path):
    first = run_search(case.make(), PixelReward(), search, case.request(), checkpoint=tmp_path)
    next(first)
    first.close()
    resumed, whole = (run(case, search, **options)[-1].result for options in ({"checkpoint": tmp_path}, {}))
    key = ("prompt", "id", "candidate", "seed", "stage")
    assert [[c[k] for k in key] for c in resumed.pruned] == [[c[k] for k in key] for c in whole.pruned]


def test_searches_keep_to_the_prompt_that_is_open(case):
    search = make_search("best-of-n", n=6, batch=2)
    probe = run(case, search)[-1].result
    best = {p: max(c["score"] for c in probe.ranking if c["prompt"] == p) for p in (0, 1)}
    low = min(best.values()) - 1e-3
    first_two = [c["score"] for c in probe.ranking if c["candidate"] < 2]
    last = run(case, search, Budget(target=low if max(first_two) >= low else min(first_two)))[-1]
    assert last.result.stopped in ("closed", "done")
    assert last.ledger.nfe <= 2 * search.plan(case.make()).nfe


def test_best_of_n_is_a_prefix_of_best_of_more(case):
    small, large = (run(case, make_search("best-of-n", n=n, batch=n))[-1].result for n in (2, 5))
    for p in (0, 1):
        some = {c["id"]: c["score"] for c in small.ranking if c["prompt"] == p}
        more = {c["id"]: c["score"] for c in large.ranking if c["prompt"] == p}
        assert set(some) <= set(more)
        assert all(math.isclose(more[i], s, abs_tol=1e-3 if case.tolerance else 0) for i, s in some.items())
        assert max(more.values()) >= max(some.values()) - (1e-3 if case.tolerance else 0)


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_a_search_dataclass_is_frozen_and_replaceable(name):
    search = make_search(name)
    assert replace(search) == search
    with pytest.raises(AttributeError):
        search.n = 3


def test_initial_noise_can_be_read_and_set(case, moves, tmp_path):
    """Rows that are given another candidate's noise become that candidate; the noise goes where the row goes."""
    sampler, request = case.make(), case.request()
    rows = sampler.init(request, request.seeds(0, 3, [0]))
    noise = sampler.noise(rows)
    assert noise.shape[0] == 3 and not torch.equal(noise[0], noise[1])
    swapped = sampler.set_noise(rows, noise[[1, 0, 2]], [11, 12, 13])
    assert swapped.rng[0].equal(rows.rng[0]) and swapped.seed == rows.seed
    assert swapped.id == ("0/noise@0.b", "1/noise@0.c", "2/noise@0.d")
    assert torch.allclose(sampler.noise(swapped), noise[[1, 0, 2]])
    plain, moved = (sampler.advance(r, sampler.num_stages) for r in (rows, swapped))
    assert case.same(outcome(case, sampler, plain.select([1, 0, 2])), outcome(case, sampler, moved))

    moved.save(tmp_path)
    kept = Population.load(tmp_path).select([2, 0])
    assert torch.equal(kept.noise[1], noise[1]) and plain.noise == (None,) * 3
    again = regenerate(sampler, request, kept.select([1]))
    assert case.same(outcome(case, sampler, again), outcome(case, sampler, moved.select([0])))

    with pytest.raises(ValueError, match="stage 0"):
        sampler.set_noise(moved, noise, [1, 2, 3])
    with pytest.raises(ValueError, match="stage 0"):
        sampler.noise(moved)


def test_a_limit_of_memory_changes_nothing(case, search):
    """The rehearsal that plans for it runs every search with stand-ins."""
    free = run(case, search)[-1].result
    limited = run(case, search, Budget(max_memory="4GiB"))[-1].result
    assert limited.error is None and same_ranking(case, free, limited)
    assert limited.ledger.nfe == free.ledger.nfe and limited.ledger.probes["nfe"] > 0
