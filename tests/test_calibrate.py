"""Calibration on synthetic pools with known answers, and the fast simulation against the driver itself."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from visearch import BestOfN, SuccessiveHalving
from visearch.allocation import expected_maximum
from visearch.calibrate import PRESETS, _conformal, _recorded, calibrate
from visearch.cli import main
from visearch.drafts import calibrate_drafts
from visearch.pipelines.recorded import RecordedSampler
from visearch.pool import Pool, evaluate_on_pool
from visearch.search import parse
from visearch.search.allocated import Allocated
from visearch.search.conformal import ConformalHalving
from visearch.simulate import Checks, Recorded, Rule, enumerate_checks, share, stop
from visearch.statistics import best_of_curve, expected_best

STEPS = 10


def make_pool(prompts=48, seeds=16, fidelity=None, price=0.5, seed=0, spread=None) -> Pool:
    """Standard normal finals; the preview of stage j correlates with the final by ``fidelity[j]``.

    Args:
        fidelity: (J,) correlations; default rises linearly to 1.
        spread: (P,) deviations of the prompts' scores.
    """
    rng = np.random.default_rng(seed)
    rho = np.linspace(0.1, 1, STEPS) if fidelity is None else np.asarray(fidelity)
    final = rng.normal(size=(prompts, seeds, 1))
    table = rho * final + np.sqrt(1 - rho**2) * rng.normal(size=(prompts, seeds, STEPS))
    table = table * (1 if spread is None else np.asarray(spread)[:, None, None]) + rng.normal(size=(prompts, 1, 1))
    agrees = (final[..., 0] + rng.normal(size=(prompts, seeds)) > 0.5).astype(float)
    return Pool.from_arrays({"clip": table}, rows=range(2, 2 * STEPS + 1, 2), price=price, held_out={"judge": agrees})


def one_order(pool: Pool, order: int) -> tuple[Recorded, RecordedSampler]:
    """The arrays of a single random order, and the sampler that replays the same one."""
    sampler = RecordedSampler(pool, order)
    recorded = _recorded(pool, "clip", ["judge"])
    return replace(recorded, order=sampler._members[:, None]), sampler


# --- the simulation is what the driver does -----------------------------------------------------------------------


def through_the_driver(pool: Pool, search, **limits):
    """As ``share`` and ``stop`` return: how many finished (P,), and the values of the picks (P, V)."""
    from visearch import Budget, run_search
    from visearch.pipelines.recorded import RecordedReward

    sampler = RecordedSampler(pool, 5)
    *_, last = run_search(sampler, RecordedReward(pool, "clip"), search, sampler.request(), Budget(**limits))
    drawn = np.bincount(last.result.finished.prompt.numpy(), minlength=len(pool.prompts))
    picks = last.result.winners().state.tensors["shown"][:, 2].numpy()
    worth = np.stack([pool.final(m)[np.arange(len(picks)), picks] for m in ("clip", "judge")], axis=1)
    return drawn, worth, last.ledger


@pytest.mark.parametrize("checks", [Checks((3,), (8, 4)), Checks((2, 5), (8, 4, 1)), Checks((1, 4, 7), (7, 5, 3, 2))])
def test_halving_picks_whom_the_search_picks(checks):
    pool = make_pool(prompts=12)
    recorded, sampler = one_order(pool, 5)
    search = SuccessiveHalving(n=checks.rows[0], calls=tuple(pool.stages[j] for j in checks.at), keep=checks.rows[1:])
    _, worth, ledger = through_the_driver(pool, search)
    np.testing.assert_allclose(recorded.valued(recorded.halve(checks)), worth, rtol=1e-6)
    assert ledger.nfe == 12 * checks.nfe(pool.rows) and ledger.decodes == 12 * sum(checks.rows)
    plan = search.plan(sampler)
    assert (plan.nfe, plan.rewards) == (checks.nfe(pool.rows), sum(checks.rows))
    assert checks.cost(pool.rows, pool.price) == plan.nfe + 0.5 * plan.rewards


@pytest.mark.parametrize(("at", "margins"), [((3,), (0.5,)), ((2, 6), (1.0, 0.2)), ((2, 6), (0.0, 0.0))])
def test_margins_pick_and_cost_what_the_search_does(at, margins):
    pool = make_pool(prompts=12)
    recorded, _ = one_order(pool, 5)
    picks, nfe, scores = recorded.margins(7, at, margins)
    search = ConformalHalving(n=7, calls=tuple(pool.stages[j] for j in at), margins=margins)
    _, worth, ledger = through_the_driver(pool, search)
    np.testing.assert_allclose(recorded.valued(picks), worth, rtol=1e-6)
    assert ledger.nfe == nfe.sum() < 12 * 7 * 20 and ledger.decodes == scores.sum()


@pytest.mark.parametrize("width", [2, 8])
def test_shared_budgets_go_where_the_search_sends_them(width):
    pool = make_pool(prompts=9, spread=np.linspace(0.2, 3, 9))
    recorded, _ = one_order(pool, 5)
    counts, value = share(recorded, 6, draws=1, width=width)
    drawn, worth, _ = through_the_driver(pool, Allocated(n=6, width=width))
    assert counts.tolist() == drawn.tolist() and counts.sum() == 54 and counts[-1] > counts[0]
    np.testing.assert_allclose(value, worth, rtol=1e-6)


@pytest.mark.parametrize("rule", [Rule(target=0.8), Rule(patience=3), Rule(min_gain=0.1)])
def test_stop_rules_end_where_the_driver_ends(rule):
    pool = make_pool(prompts=12)
    recorded, _ = one_order(pool, 5)
    counts, value = stop(recorded, rule, most=10)
    drawn, worth, _ = through_the_driver(pool, BestOfN(n=10, batch=1), **vars(rule))
    assert counts.tolist() == drawn.tolist() and len(set(drawn.tolist())) > 1
    np.testing.assert_allclose(value, worth, rtol=1e-6)


def test_means_over_orders_agree_with_the_replayed_pool():
    pool = make_pool(prompts=40)
    recorded, checks = _recorded(pool, "clip", []), Checks((3, 6), (8, 4, 2))
    search = SuccessiveHalving(n=8, calls=(4, 7), keep=(4, 2))
    replayed = evaluate_on_pool(pool, search, draws=30)
    fast = recorded.valued(recorded.halve(checks))[:, 0]
    error = np.std(fast - replayed.values["clip"], ddof=1) / math.sqrt(40)
    assert abs(fast.mean() - replayed.values["clip"].mean()) < 3 * error


# --- pieces -------------------------------------------------------------------------------------------------------


def test_the_curve_is_the_closed_form_for_every_n_and_equals_enumeration():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    curve = best_of_curve(rewards, values)
    for p, n in itertools.product(range(3), range(1, 7)):
        assert curve[p, n - 1] == pytest.approx(expected_best(rewards[p], n, values[p]))
        subsets = [list(s) for s in itertools.combinations(range(6), n)]
        picked = [values[p, max(s, key=lambda i: rewards[p, i])] for s in subsets]
        assert curve[p, n - 1] == pytest.approx(np.mean(picked))
    with pytest.raises(ValueError, match="one number a candidate each"):
        best_of_curve(rewards, values[:2])


def test_schedules_fit_are_as_large_as_can_be_and_come_once():
    rows, price, budget = tuple(range(2, 21, 2)), 0.5, 4 * 20.5
    found = list(enumerate_checks(rows, price, budget, range(2, 8), (0.3, 0.5), most=8, depth=2))
    assert len(found) == len(set(found)) > 20
    for checks in found:
        assert checks.cost(rows, price) <= budget and list(checks.rows) == sorted(set(checks.rows), reverse=True)
        if len(checks.at) == 1 and checks.rows[1] + 1 < checks.rows[0]:  # as wide as the budget allows
            wider = Checks(checks.at, (*checks.rows[:-1], checks.rows[-1] + 1))
            assert wider.cost(rows, price) > budget
        if checks.rows[0] < 8 and len(checks.at) == 1:
            more = Checks(checks.at, (checks.rows[0] + 1, math.floor(0.3 * (checks.rows[0] + 1) + 0.5) or 1))
            assert more.cost(rows, price) > budget or checks.rows[1] / checks.rows[0] > 0.4


def test_who_lies_behind_by_hand():
    scores = np.array([[[3.0, 1.0], [5.0, 2.0], [4.0, 9.0]]])
    recorded = Recorded(scores, scores[None, ..., -1], (1, 2), 0.0, np.array([[[0, 1, 2], [1, 0, 2]]]))
    assert recorded.behind(3, [0]).tolist() == [[[1.0], [1.0]]]  # candidate 2 ends best, 1 leads at first
    assert recorded.behind(3, [0], ranks=True).tolist() == [[[1.0], [1.0]]]
    assert recorded.behind(2, [0]).tolist() == [[[0.0], [0.0]]]


# --- what is found --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return calibrate(make_pool(prompts=120, seeds=16), budgets=[2, 4, 8], risk=0.2)


def entry(found, budget, name):
    return next(e for e in found.entries if (e.budget, e.name) == (budget, name))


def test_previews_that_tell_all_early_are_worth_a_schedule():
    """From stage 3 on previews are the finals: 8 candidates cost little more than their first three steps."""
    clear = calibrate(make_pool(fidelity=[0, 0, *[1] * 8]), budgets=[4])
    tuned = entry(clear, 4, "tuned")
    assert clear.adopted[4] and tuned.multiplier.low > entry(clear, 4, "auto").multiplier.mean
    assert tuned.search.startswith("halving(n=8, calls=(3,") and tuned.multiplier.mean == pytest.approx(2, abs=0.05)
    assert tuned.over["clip"].low > 0 and tuned.over["judge"].mean > 0
    assert clear.chosen(4) is tuned


def test_previews_that_tell_nothing_are_not_worth_one():
    blind = calibrate(make_pool(prompts=120, fidelity=[*[0] * 9, 1]), budgets=[4])
    assert not blind.adopted[4] or entry(blind, 4, "tuned").multiplier.mean < 1
    assert entry(blind, 4, "tuned").multiplier.mean < 0.9
    assert all(e.multiplier.mean < 1 for e in blind.entries if e.name not in ("best-of-n", "tuned"))


def test_nothing_costs_more_than_best_of_n(found):
    for e in found.entries:
        assert e.nfe + 0.5 * e.scores <= e.budget * 20.5 + 1e-9
    names = [e.name for e in found.entries if e.budget == 4]
    assert names == ["best-of-n", *PRESETS, "tuned"] or found.notes


def test_more_is_never_worse(found):
    for name in ("best-of-n", "auto", "tuned"):
        values = [e.values["clip"] for e in found.entries if e.name == name]
        assert values == sorted(values)


def test_doublings_of_normal_scores_gain_what_the_normal_maximum_does(found):
    for d in found.doublings:
        if d.measure == "clip" and d.search == "best-of-n":
            expected = expected_maximum(2 * d.n) - expected_maximum(d.n)
            assert d.predicted == pytest.approx(expected, abs=0.1)
            assert d.observed.low - 0.05 <= expected <= d.observed.high + 0.05
    assert 0 < found.calibration_error["clip"] < 0.1


def test_a_judge_that_agrees_with_nothing_is_saturated_at_once():
    pool = make_pool(prompts=120)
    coin = np.random.default_rng(9).random((120, 16))
    doubled = calibrate(replace(pool, held_out={"coin": np.round(coin.mean(1, keepdims=True)) + 0 * coin}), budgets=[2])
    assert doubled.saturation == {"clip": None, "coin": 1}


def test_the_eventual_best_is_lost_at_most_as_often_as_promised(found):
    assert {c.entry.name for c in found.conformal} == {"conformal, margins", "conformal, numbers"}
    for c in found.conformal:
        assert c.coverage.mean <= 0.2 and c.coverage.low < c.coverage.high
        assert c.entry.spent < c.entry.budget


def test_over_many_calibrations_the_promise_holds_on_unseen_prompts():
    """One calibration scatters by its prompts; the promise is of their mean."""
    lost = []
    for seed in range(12):
        pool = make_pool(prompts=72, seed=seed)
        every, report = (_recorded(p, "clip", ["judge"]) for p in (pool, pool.split()[1]))
        lost += [c.observed.mean for c in _conformal(pool, every, report, ("clip", "judge"), 6, 0.2)]
    for own in (lost[::2], lost[1::2]):  # margins, numbers
        assert np.mean(own) <= 0.2 + 3 * np.std(own, ddof=1) / math.sqrt(12) and max(own) > 0.05


def test_less_risk_costs_more():
    pool = make_pool(prompts=120)
    every, report = (_recorded(p, "clip", ["judge"]) for p in (pool, pool.split()[1]))
    found = [_conformal(pool, every, report, ("clip", "judge"), 8, risk)[0] for risk in (0.05, 0.2, 0.4)]
    spent = [c.entry.spent for c in found]
    assert spent == sorted(spent, reverse=True)


@pytest.mark.parametrize("loud", [20.0, 1.0])
def test_sharing_gains_where_prompts_differ_and_loses_nothing_where_they_do_not(loud):
    pool = make_pool(prompts=240, seeds=32, spread=np.where(np.arange(240) % 6 == 0, loud, 1.0))
    recorded = _recorded(pool, "clip", ["judge"])
    counts, value = share(recorded, 8, draws=4, width=40)
    gain = value[:, 0] - recorded.curves[:, 0, 7]
    error = gain.std(ddof=1) / math.sqrt(240)
    assert counts.mean() == 8
    if loud > 1:
        assert counts[::6].mean() > 12 and gain.mean() > 3 * error
    else:
        assert counts[::6].mean() == pytest.approx(8, abs=0.5) and abs(gain.mean()) < 3 * error


def test_a_target_saves_where_prompts_reach_it_at_different_times(found):
    target = next(e for e in found.economies if e.name == "target")
    assert target.spent < 8 and target.multiplier.mean > 1


def test_the_order_of_prompts_in_a_quarter_decides_nothing():
    pool = make_pool(prompts=48)
    order = np.concatenate([np.arange(48).reshape(12, 4)[::-1]]).ravel()
    a, b = (calibrate(p, budgets=[4], risk=0.3) for p in (pool, pool.take(prompts=order.tolist())))
    for x, y in zip((*a.entries, *(c.entry for c in a.conformal)), (*b.entries, *(c.entry for c in b.conformal))):
        assert x.search == y.search and x.values == pytest.approx(y.values)
        assert x.multiplier.mean == pytest.approx(y.multiplier.mean)


def test_stages_that_were_not_recorded_are_left_out():
    pool = make_pool()
    table = pool.scores["clip"].copy()
    table[5, :, 3] = math.nan
    thinned = calibrate(replace(pool, scores={"clip": table}), budgets=[4])
    assert 4 not in thinned.pool["stages"] and all(
        "4," not in e.search.partition("calls=")[2].partition(")")[0] + ","
        for e in thinned.entries
        if e.name == "tuned"
    )


def test_a_judge_without_all_verdicts_is_left_out_and_named():
    pool = make_pool()
    holes = pool.held_out["judge"].copy()
    holes[2, 3] = math.nan
    found = calibrate(replace(pool, held_out={"judge": holes}), budgets=[1, 2])
    assert found.measures == ("clip",) and found.notes[-1] == "judge: left out, not all finals have a verdict"
    assert found.chosen(1).search == "best-of-n(n=1)" and found.chosen(1).multiplier.mean == 1


def test_a_budget_for_which_auto_does_not_fit_the_pool_falls_back_to_best_of_n():
    found = calibrate(make_pool(prompts=16, seeds=8, fidelity=[*[0] * 9, 1], price=0.0), budgets=[4])
    assert "auto" not in {e.name for e in found.entries} and not found.adopted[4]
    assert found.chosen(4).name == "best-of-n" and "(best-of-n: tuning is not worth" in found.markdown()


def test_a_pool_of_finals_alone_still_tells_of_budgets():
    pool = make_pool()
    finals = Pool.from_arrays({"clip": pool.scores["clip"][..., -1:]}, stages=[10], rows=[20], price=0.5)
    found = calibrate(finals, budgets=[4])
    assert found.chosen(4).search == "best-of-n(n=4)" and found.doublings and "no schedule fits" in found.notes[0]
    with pytest.raises(ValueError, match="record more stages"):
        calibrate(finals, budgets=[4], risk=0.2)


# --- drafts ----------------------------------------------------------------------------------------------------


def test_the_largest_threshold_that_captures_enough_is_chosen():
    rng = np.random.default_rng(0)
    full = rng.normal(size=(60, 8))
    drafts = {tau: full + 10 * tau * rng.normal(size=full.shape) for tau in (0.01, 0.05, 0.3)}
    found = calibrate_drafts(drafts, full, {0.01: 0.1, 0.05: 0.4, 0.3: 0.7})
    captured = [c.mean for c in found.capture]
    assert captured == sorted(captured, reverse=True) and captured[0] > 0.98 and captured[2] < 0.5
    assert found.settings == (0.01, 0.05, 0.3) and found.skipped == (0.1, 0.4, 0.7)
    assert found.chosen == max(t for t, c in zip(found.settings, captured) if c >= 0.9)
    assert all(c.low < c.mean for c in found.capture[1:])


def test_capture_by_hand():
    full = [[0.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 4.0]]  # means 1 and 1, bests 2 and 4
    drafts = {0.1: [[0, 9, 0, 0], [0, 0, 0, 9]]}  # picks worth 1 and 4: (0 + 3) / (1 + 3)
    assert calibrate_drafts(drafts, full, {0.1: 0.5}).capture[0].mean == 0.75
    assert calibrate_drafts(drafts, full, {0.1: 0.5}).chosen is None


@pytest.mark.parametrize(
    ("drafts", "full", "skipped", "message"),
    [
        ({0.1: [[1.0, 2.0]]}, [[1.0]], {0.1: 0.5}, "at least two seeds"),
        ({0.1: [[1.0, 2.0]]}, [[1.0, 2.0]], {0.2: 0.5}, "skipped has settings"),
        ({0.1: [[1.0]]}, [[1.0, 2.0]], {0.1: 0.5}, "0.1: drafts have shape"),
        ({0.1: [[1.0, 2.0]]}, [[1.0, 2.0]], {0.1: 1.0}, "skip 1.0"),
        ({0.1: [[1.0, 2.0]]}, [[1.0, 1.0]], {0.1: 0.5}, "no gain to capture"),
    ],
)
def test_drafts_are_checked(drafts, full, skipped, message):
    with pytest.raises(ValueError, match=message):
        calibrate_drafts(drafts, full, skipped)


# --- errors and the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "arguments", "message"),
    [
        ({"seeds": 4}, {}, "48 prompts x 4 seeds; calibration needs at least 8 x 8"),
        ({"prompts": 6}, {}, "6 prompts x 16 seeds; calibration needs"),
        ({}, {"reward": "pick"}, "reward 'pick' was not recorded; this pool has clip"),
        ({}, {"budgets": [9]}, r"budgets=\[9\] must be from 1 to 8"),
        ({"prompts": 32}, {"risk": 0.1}, "risk=0.1 needs at least 36 prompts, the pool has 32"),
        ({}, {"risk": 1.5}, r"risk=1.5 must lie in \(0, 1\)"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(pool, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(make_pool(**pool), **arguments)


def test_failed_samples_and_several_rewards_are_refused():
    pool = make_pool()
    table = pool.scores["clip"].copy()
    table[3, 2, -1] = -math.inf
    with pytest.raises(ValueError, match="candidates of 1 prompts, 'prompt 3' for one; leave them out"):
        calibrate(replace(pool, scores={"clip": table}))
    with pytest.raises(ValueError, match="say which guides: --reward clip or pick"):
        calibrate(replace(pool, scores={**pool.scores, "pick": pool.scores["clip"]}))


def test_the_command_prints_tables_and_writes_schedules(tmp_path, capsys):
    pool, out = make_pool(), tmp_path / "schedule.json"
    pool.save(tmp_path / "pool.parquet")
    command = ["calibrate", str(tmp_path / "pool.parquet"), "--reward", "clip", "--budget", "2", "4", "--risk", "0.2"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert set(saved["schedules"]) == {"2", "4"}
    for n, schedule in saved["schedules"].items():
        assert f'N = {n}: `--search "{schedule["search"]}"`' in printed
    for part in ("worth N x", "What doubling n gains", "probability at most 0.2", "Stop rules", "conformal(n=4"):
        assert part in printed
    for e in (*saved["entries"], *(c["entry"] for c in saved["conformal"])):
        assert parse(e["search"]).n >= 2  # what --search takes
    plan = parse(saved["schedules"]["4"]["search"]).plan(RecordedSampler(pool))
    assert plan.nfe == saved["schedules"]["4"]["nfe"] and plan.nfe + 0.5 * plan.rewards <= 4 * 20.5
    assert calibrate(pool, "clip", [2, 4], 0.2).markdown() == printed.rstrip("\n")


def test_the_command_chooses_a_cache_on_the_even_prompts(tmp_path, capsys):
    rng = np.random.default_rng(0)
    full = rng.normal(size=(40, 8))
    noisy = np.stack([full + 0.05 * rng.normal(size=full.shape), full + 5 * rng.normal(size=full.shape)])
    file, out = tmp_path / "drafts.npz", tmp_path / "found.json"
    arrays = {"full": full, "drafts": noisy, "skipped": np.array([0.4, 0.7]), "settings": np.array(["careful", "bold"])}
    np.savez(file, **arrays)
    make_pool(prompts=8, seeds=8).save(tmp_path / "pool.parquet")
    command = ["calibrate", str(tmp_path / "pool.parquet"), "--drafts", str(file), "--out", str(out)]
    assert main(command) == 0
    assert "chosen: careful (asked for 0.9 on the even prompts)" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["drafts"]["chosen"] == "careful" and saved["drafts_unseen"]["capture"][0]["clusters"] == 20
    np.savez(file, **{**arrays, "drafts": noisy[:1]})
    assert main(command) == 2 and "drafts have shape (1, 40, 8)" in capsys.readouterr().err
    np.savez(file, full=full)
    assert main(command) == 2 and "it needs drafts, full, settings, skipped" in capsys.readouterr().err


def test_errors_of_the_command_are_one_line(tmp_path, capsys):
    assert main(["calibrate", str(tmp_path / "none.parquet")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pool_for_evidence_takes_seconds():
    begin = time.process_time()
    calibrate(make_pool(prompts=300, seeds=32), risk=0.1)
    assert time.process_time() - begin < 60
