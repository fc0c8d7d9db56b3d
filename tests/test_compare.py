"""``visearch compare``: what it measures on the toy, what it concludes from records, what it leaves and refuses."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from visearch.budget import Budget
from visearch.cli import main
from visearch.compare import compare
from visearch.comparison import BAR, CLOCKS, NFE, ONCE, POOL, SECONDS, Bar, Comparison, kendall
from visearch.pipelines.toy import GaussianToy
from visearch.prompts import request_of
from visearch.protocols import Budgeted, Request, Scores, SearchState, stable_hash
from visearch.rewards.combine import AverageRank, WeightedSum
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN
from visearch.search.successive_halving import SuccessiveHalving
from visearch.statistics import paired_interval

PROMPTS = [f"prompt {i}" for i in range(6)]
HALVING = SuccessiveHalving(n=6, preset="psp")


class Pixels:
    """A reward that is a function of the pixels of each sample, (N, 3, H, W) -> (N,)."""

    higher_is_better, range, licence, source = True, (-10.0, 10.0), "Apache-2.0", "tests"
    needs = frozenset({"pixels"})

    def __init__(self, name, function, **traits):
        self.name, self.function = name, function
        vars(self).update(traits)

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        return Scores(self.function(samples.double()).float())


def saturation(samples):
    return (samples.amax(1) - samples.amin(1)).mean((1, 2))


def ramp(samples):
    flat = samples.flatten(1)
    return flat @ torch.linspace(-1, 1, flat.shape[1], dtype=torch.float64)


REWARD, JUDGE = Pixels("ramp", ramp), Pixels("judge", lambda s: ramp(s) + s.flatten(1).mean(1))


def on_toy(searches=(HALVING,), prompts=PROMPTS, budgets=(4,), rewards=(REWARD,), held_out=(JUDGE,), **options):
    return compare(GaussianToy(), prompts, searches, budgets, rewards, held_out, progress=False, **options)


@pytest.fixture(scope="module")
def measured():
    return on_toy({"halving": HALVING, "fewer": SuccessiveHalving(n=3)}, budgets=(3, 5))


def of_unit(comparison, unit):
    return [r for r in comparison.records if r["unit"] == unit]


# --- what is measured -----------------------------------------------------------------------------------------


def test_no_run_spends_more_than_its_budget_and_best_of_n_spends_all_of_it(measured):
    one = GaussianToy().nfe(0, 8)
    runs = of_unit(measured, "images")
    assert len(runs) == 2 * 2 * len(PROMPTS)
    for run in runs:
        assert 0 < run["ledger"]["nfe"] <= run["budget"] * one
    for row in measured.rows:
        assert row.images <= row.budget
        if row.search == BAR:
            assert row.images == row.budget and row.ledger["nfe"] == row.budget * one
    assert {r["ledger"]["nfe"] for r in of_unit(measured, POOL)} == {8 * one}  # 1.5 x 5, rounded up


def test_all_searches_of_a_prompt_begin_with_the_candidates_of_its_pool(measured):
    for pool in of_unit(measured, POOL):
        for run in (r for r in of_unit(measured, "images") if r["prompt_id"] == pool["prompt_id"]):
            assert pool["seed"][int(run["winner"])] == run["seed"]
            assert run["score"] == pytest.approx(pool["score"][int(run["winner"])], abs=1e-6)
    first = [pool["seed"][0] for pool in of_unit(measured, POOL)]
    assert len(set(first)) == len(PROMPTS)  # no noise serves two prompts


def test_the_bar_is_what_best_of_n_finds_when_it_is_run(measured):
    bar, _ = measured.measured("ramp")
    for p, pool in enumerate(bar.records):
        request = Request((pool["prompt"],), seed=stable_hash(0, Request((pool["prompt"],)).prompt_ids[0]))
        for n in (1, 3, 5):
            *_, last = run_search(GaussianToy(), REWARD, BestOfN(n=n), request, Budget())
            best = last.result.winners()
            assert int(best.id[0]) == bar.best[p, n - 1] and best.seed[0] == pool["seed"][bar.best[p, n - 1]]
            assert float(best.score[0]) == pytest.approx(bar.curve["score"][p, n - 1], abs=1e-6)


def test_prompts_that_are_given_twice_are_two(measured):
    pools = of_unit(on_toy(prompts=["same", "same"]), POOL)
    assert pools[0]["prompt_id"] != pools[1]["prompt_id"] and pools[0]["seed"][1] != pools[1]["seed"][1]


def test_each_prompt_has_another_order_of_runs(tmp_path):
    on_toy({"a": HALVING, "b": SuccessiveHalving(n=3)}, out=tmp_path)
    lines = [json.loads(line)["key"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    orders = [[key[2] for key in lines[i : i + 3]] for i in range(0, len(lines), 3)]
    assert orders[:3] == [[BAR, "a", "b"], ["a", "b", BAR], ["b", BAR, "a"]]


def test_seconds_are_a_budget_too():
    found = on_toy(budgets=(), seconds=(0.05,), prompts=PROMPTS[:3], pool_size=4)
    assert {(row.search, row.unit, row.budget) for row in found.rows} == {
        (BAR, "seconds", 0.05),
        ("halving(n=6, preset='psp')", "seconds", 0.05),
    }
    bar, row = found.rows
    paced = found.measured("ramp")[0].seconds.mean(0)
    fits = [n for n in range(1, 5) if paced[n - 1] <= 0.05]
    assert bar.images == max(fits, default=1) and row.stopped.keys() <= {"done", "deadline"}


def test_rewards_guide_in_turn():
    found = on_toy(rewards=(REWARD, Pixels("saturation", saturation)), prompts=PROMPTS[:3])
    assert found.rewards == ("ramp", "saturation") and len(found.rows) == 4
    guided = {row.reward: row for row in found.rows if row.search != BAR}
    assert guided["saturation"].nuisance["saturation"].mean.mean > guided["ramp"].nuisance["saturation"].mean.mean


@dataclass(frozen=True)
class Collapsed:
    """Four copies of one candidate: nothing of the other ancestors is left."""

    def plan(self, sampler, max_nfe=None):
        return Budgeted(self, 4 * sampler.nfe(0, sampler.num_stages), 4.0, 4, 4, 4)

    def init(self, sampler, request):
        return SearchState(request, open_prompts=(0,))

    def step(self, state, sampler, evaluate):
        rows = sampler.advance(sampler.init(state.request, state.request.seeds(0, 2)), 1).select([1, 1, 1, 1])
        return replace(state, finished=evaluate(sampler.advance(rows, sampler.num_stages)))

    def done(self, state):
        return state.finished is not None


def test_one_ancestor_is_left_after_total_collapse():
    row = on_toy({"collapsed": Collapsed()}).rows[1]
    assert (row.search, row.returned, row.ancestors) == ("collapsed", 4, 1)
    assert row.diversity.mean.mean == pytest.approx(0, abs=1e-6) and row.diversity.over[NFE].high < 0


@dataclass(frozen=True)
class Breaking(Collapsed):
    """Fails on some prompts."""

    def step(self, state, sampler, evaluate):
        if state.request.prompts[0] in PROMPTS[:2]:
            raise RuntimeError("no memory for this prompt")
        return super().step(state, sampler, evaluate)


@pytest.mark.filterwarnings("ignore:breaking failed")
def test_a_search_that_fails_on_a_prompt_is_in_no_table_and_is_told(tmp_path):
    found = on_toy({"breaking": Breaking(), "halving": HALVING}, out=tmp_path)
    assert [row.search for row in found.rows] == [BAR, "halving"] and found.rows[0].prompts == len(PROMPTS)
    assert list(found.failures) == ["breaking"] and len(found.failures["breaking"]) == 2
    assert "no memory for this prompt" in found.markdown()
    before = (tmp_path / "runs.jsonl").read_text().count("\n")
    on_toy({"breaking": Breaking(), "halving": HALVING}, out=tmp_path)
    assert (tmp_path / "runs.jsonl").read_text().count("\n") == before + 2  # tried again, nothing else is


def test_best_of_n_must_not_fail():
    class Broken(GaussianToy):
        def decode(self, population):
            raise RuntimeError("broken decoder")

    with pytest.raises(RuntimeError, match="broken decoder"):
        compare(Broken(), PROMPTS, {"h": HALVING}, (4,), (REWARD,), progress=False)


# --- what is concluded, on records with known answers ---------------------------------------------------------


def record(prompt, search, budget, unit, score, judge, **more):
    return {
        "prompt": f"p{prompt}", "prompt_id": str(prompt), "tag": "", "reward": "r", "search": search, "budget": budget,
        "unit": unit, "score": score, "judges": {"j": judge}, "nuisance": {"saturation": 0.0, "brightness": 0.0},
        "diversity": 0.5, "returned": 2, "ancestors": 2, "winner": "0", "seed": 1, "stopped": "done", **more,
    }  # fmt: skip


def pool_of(prompt, scores, judges, a_candidate=2.0):
    count = len(scores)
    return record(
        prompt, BAR, float(count), POOL, list(scores), list(judges), one=10,
        nuisance={name: [0.0] * count for name in ("saturation", "brightness")},
        diversity=[0.5] * count, seed=[*range(count)],
        clock={"n": [count], **{name: [count * a_candidate] for name in CLOCKS}},
        ledger={"nfe": 10 * count, "decodes": count, "scores": count, "seconds": {"total": count * a_candidate}},
    )  # fmt: skip


def run_of(prompt, score, judge, nfe, seconds, budget=2.0):
    ledger = {"nfe": nfe, "decodes": 3, "scores": 3, "seconds": {"total": seconds}}
    return record(prompt, "s", budget, "images", score, judge, ledger=ledger, seconds={"wall": seconds, "cpu": seconds})


def synthetic(scores, judges, found, margin=0.02):
    """``found``: (score, judge, nfe, seconds) of the search on each prompt."""
    pools = [pool_of(p, s, j) for p, (s, j) in enumerate(zip(scores, judges))]
    return Comparison({}, pools + [run_of(p, *f) for p, f in enumerate(found)], margin=margin)


def test_best_of_n_is_interpolated_at_equal_rows_and_at_equal_seconds():
    """The best of 1, 2, 3, 4 scores 1, 2, 3, 4 here, a candidate costs 10 rows and 2 seconds."""
    scores = [[1.0, 2.0, 3.0, 4.0]] * 5
    found = synthetic(scores, scores, [(3.0, 3.0, 15, 5.0)] * 5)
    bar, row = found.rows
    assert (bar.search, bar.images, bar.guided.mean.mean, bar.seconds) == (BAR, 2, 2.0, 4.0)
    assert row.images == 1.5 and row.equal_seconds == pytest.approx(2.5)
    assert row.guided.over[NFE].mean == pytest.approx(1.5) and row.guided.over[SECONDS].mean == pytest.approx(0.5)
    assert row.guided.over[ONCE].mean == pytest.approx(0.5)
    assert row.worth_nfe.mean == pytest.approx(3 / 1.5) and row.worth_seconds.mean == pytest.approx(6 / 5)
    assert not row.beyond_pool and not row.beyond_reward
    judge = row.judges["j"]
    assert judge.oracle == 1.0 and judge.recovery is None  # of one candidate there is nothing to choose


def test_what_lies_beyond_the_pool_is_said_and_proves_nothing():
    scores = [[1.0, 2.0]] * 5
    row = synthetic(scores, scores, [(5.0, 5.0, 20, 9.0)] * 5).rows[1]
    assert row.beyond_pool and row.beyond_reward and row.equal_seconds == 2
    assert row.judges["j"].noninferior == {NFE: "yes", SECONDS: "undecided"}
    worse = synthetic(scores, scores, [(0.0, 0.0, 20, 9.0)] * 5).rows[1]
    assert worse.judges["j"].noninferior == {NFE: "no", SECONDS: "no"}
    text = synthetic(scores, scores, [(5.0, 5.0, 20, 9.0)] * 5).markdown()
    assert "> 2.00" in text and "enlarge --pool-size" in text


def test_intervals_are_paired_by_prompt():
    """Prompts differ by far more than search and bar do."""
    rng = np.random.default_rng(0)
    level, gain = rng.normal(0, 100, 40), rng.normal(1, 0.5, 40)
    scores = [[x, x + 1] for x in level]
    row = synthetic(scores, scores, [(x + 1 + g, x, 20, 4.0) for x, g in zip(level, gain)]).rows[1]
    expected = paired_interval(level + 1 + gain, level + 1)
    assert row.guided.over[NFE] == expected and 0.5 < expected.low < expected.high < 1.5
    assert row.guided.over[SECONDS].mean == pytest.approx(expected.mean)
    assert row.guided.over[SECONDS].low == pytest.approx(expected.low, abs=0.05)


@pytest.mark.parametrize(("loss", "verdict"), [(0.0, "yes"), (0.019, "yes"), (0.2, "no")])
def test_verdicts_of_non_inferiority(loss, verdict):
    scores = [[0.5, 1.0]] * 20
    row = synthetic(scores, scores, [(1.0, 1.0 - loss, 20, 4.0)] * 20).rows[1]
    assert row.judges["j"].noninferior == {NFE: verdict, SECONDS: verdict}


def test_few_noisy_prompts_leave_the_verdict_undecided():
    scores = [[0.0, 1.0]] * 6
    found = [(1.0, float(p % 2) * 2, 20, 4.0) for p in range(6)]
    assert synthetic(scores, scores, found).rows[1].judges["j"].noninferior[NFE] == "undecided"
    assert synthetic(scores, scores, found, margin=2.0).rows[1].judges["j"].noninferior[NFE] == "yes"


def test_oracle_and_recovery():
    rng = np.random.default_rng(1)
    scores, judges = rng.normal(size=(30, 6)), (rng.random((30, 6)) < 0.5).astype(float)
    found = synthetic(scores, judges, [(s[:2].max(), j[:2].max(), 20, 4.0) for s, j in zip(scores, judges)])
    bar, row = found.rows
    for measure in (bar.judges["j"], row.judges["j"]):
        assert measure.oracle == pytest.approx(judges[:, :2].max(1).mean())
        assert measure.oracle >= measure.mean.mean and measure.recovery.mean <= 1 + 1e-9
    picked = judges[np.arange(30), scores[:, :2].argmax(1)]
    mean, best = judges[:, :2].mean(), judges[:, :2].max(1).mean()
    assert bar.judges["j"].recovery.mean == pytest.approx((picked.mean() - mean) / (best - mean))
    assert row.judges["j"].recovery.mean == pytest.approx(1)


def test_a_judge_that_fails_on_a_sample_leaves_its_prompt_out():
    scores = [[1.0, 2.0]] * 4
    judges = [[0.0, 1.0]] * 3 + [[0.0, None]]
    row = synthetic(scores, judges, [(2.0, 1.0, 20, 4.0)] * 4).rows[1]
    assert row.judges["j"].over[NFE].clusters == 3 and row.guided.over[NFE].clusters == 4


def test_a_failed_candidate_is_never_the_best():
    bar = Bar([pool_of(0, [None, 1.0, None, 3.0], [0.0] * 4)])
    assert bar.best.tolist() == [[0, 1, 1, 3]] and np.isnan(bar.curve["score"][0, 0])


def test_rewards_that_rise_while_a_judge_falls_are_reported():
    scores, judges = [[0.0, 1.0]] * 20, [[0.5, 0.5]] * 20
    sure = synthetic(scores, judges, [(2.0, 0.3, 20, 4.0)] * 20).warnings
    assert len(sure) == 1 and sure[0].startswith("reward hacking: s at 2 images: r rises while j falls: +1.50")
    assert all(reference in sure[0] for reference in (ONCE, NFE, SECONDS))
    noisy = [(2.0, 0.5 + (-0.4 if p % 2 else 0.39), 20, 4.0) for p in range(20)]
    assert {w.split(":")[0] for w in synthetic(scores, judges, noisy).warnings} == {"possible reward hacking"}
    assert synthetic(scores, judges, [(2.0, 0.6, 20, 4.0)] * 20).warnings == ()


def test_a_planted_hack_warns_and_an_honest_reward_does_not():
    """A reward that wants vivid pixels, before a judge that wants pale ones and one that has no opinion on them."""
    pale = Pixels("pale", lambda s: 1 - saturation(s))
    prompts = [f"prompt {i}" for i in range(16)]
    hacked = on_toy({"halving": HALVING}, prompts, rewards=(Pixels("vivid", saturation),), held_out=(pale,))
    assert any(w.startswith("reward hacking: best-of-n") for w in hacked.warnings)
    assert any(w.startswith("reward hacking: halving") for w in hacked.warnings)
    assert hacked.rows[0].nuisance["saturation"].over[ONCE].low > 0  # and the pixels say why
    assert hacked.correlations["vivid"]["saturation"] == pytest.approx(1, abs=0.01)
    assert hacked.correlations["vivid"]["pale"] == pytest.approx(-1, abs=0.01)
    assert "reward hacking" in hacked.markdown()
    honest = on_toy({"halving": HALVING}, prompts, rewards=(REWARD,), held_out=(JUDGE,))
    assert not any(w.startswith("reward hacking") for w in honest.warnings)


def test_before_its_own_exam_a_reward_is_not_held_out():
    trained, exam = Pixels("trained", ramp), Pixels("exam", saturation)
    trained.not_held_out_for = exam.not_held_out_for = ("GenEval",)
    shown = on_toy(prompts=PROMPTS[:2], rewards=(trained, REWARD), held_out=(exam, JUDGE)).markdown()
    _, own, other = shown.split("## Guided by")
    assert "### exam (not held-out)" in own and "### judge (held out)" in own
    assert "### exam (held out)" in other and "before judges of GenEval it is not held-out" in shown


def test_an_ensemble_is_compared_and_its_scores_are_counted_once():
    found = on_toy(prompts=PROMPTS[:2], rewards=(WeightedSum([REWARD, Pixels("vivid", saturation)], [1, 2]),))
    assert found.rewards == ("ramp + 2*vivid",)
    assert all(row.ledger["scores"] == row.ledger["decodes"] > 0 for row in found.rows)


def test_searches_are_shown_for_prompts_that_have_all_of_them():
    scores = [[1.0, 2.0]] * 3
    whole = synthetic(scores, scores, [(2.0, 2.0, 20, 4.0)] * 3)
    part = replace(whole, records=whole.records[:-1])
    assert whole.rows[1].prompts == 3 and part.rows[0].prompts == part.rows[1].prompts == 2
    with pytest.raises(RuntimeError, match="no prompt has a record of every search"):
        _ = replace(
            whole, records=[r for r in whole.records if r["unit"] == POOL], searches=(("s", 2.0, "images"),)
        ).rows


def test_kendall_names_what_reverses():
    ours = {"best": 1.0, "halving": 2.0, "smc": 0.5, "only ours": 9.0}
    theirs = {"best": 10.0, "halving": 9.0, "smc": 1.0, "only theirs": 0.0}
    found = kendall(ours, theirs)
    assert found.tau == pytest.approx(1 / 3) and found.reversals == (("halving", "best"),)
    assert kendall(ours, ours).tau == pytest.approx(1) and kendall(ours, ours).reversals == ()
    with pytest.raises(ValueError, match="two names"):
        kendall({"a": 1.0}, {"a": 2.0})
    with pytest.raises(ValueError, match="finite"):
        kendall({"a": 1.0, "b": float("nan")}, {"a": 2.0, "b": 1.0})


def test_a_recorded_pool_is_compared_as_the_model_that_made_it(tmp_path, capsys):
    """Same prompts, candidates and picks; recorded seconds instead of the clock."""
    pytest.importorskip("pyarrow")
    from visearch.record import record as draw

    seed = 5
    pool = draw(GaussianToy(), [REWARD], [{"prompt": p} for p in PROMPTS], tmp_path / "parts", seeds=8, seed=seed,
                held_out=[JUDGE])  # fmt: skip
    pool = replace(pool, seconds_a_row=0.5, price=2.0)
    pool.save(tmp_path / "pool.parquet")
    words = ["compare", "--pool", str(tmp_path / "pool.parquet"), "--search", "halving", "--budget", "4"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    row = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"][1]
    assert row["diversity"] is None and row["nuisance"] == {} and list(row["judges"]) == ["judge"]
    picked = []
    for prompt in PROMPTS:
        request = request_of({"prompt": prompt}, Request((prompt,)).prompt_ids[0], seed)
        *_, last = run_search(GaussianToy(), REWARD, SuccessiveHalving(), request, Budget(max_nfe=4 * 16))
        picked.append(float(last.result.winners().score[0]))
    assert row["guided"]["mean"]["mean"] == pytest.approx(np.mean(picked), abs=1e-6)
    live = {r["prompt"]: r["seed"] for r in of_unit(on_toy(seed=seed, pool_size=8), POOL)}
    assert live == dict(zip(pool.prompts, pool.seeds.tolist(), strict=True))  # one seed, the same candidates
    assert row["seconds"] == pytest.approx(0.5 * (row["ledger"]["nfe"] + 2.0 * row["ledger"]["decodes"]), rel=0.01)
    assert main([*words, "validation"]) == 2 and main(["compare", "--search", "halving"]) == 2
    assert "either PROMPTS or --pool" in capsys.readouterr().err
    assert main([*words[:3], "--search", "zero-order", "--out", str(tmp_path / "zero")]) == 2


# --- what is kept ---------------------------------------------------------------------------------------------


def scores_of(comparison):
    return {
        (r["prompt_id"], r["search"], r["budget"], r["unit"]): (r["score"], r["judges"]) for r in comparison.records
    }


SLOW = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_compare as t

    def slow(samples):
        time.sleep(0.05)
        return t.ramp(samples)

    t.on_toy({{"halving": t.HALVING}}, rewards=(t.Pixels("ramp", slow),), out={out!r})
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    code = textwrap.dedent(SLOW.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", code])
    runs = tmp_path / "runs.jsonl"
    deadline = time.monotonic() + 120
    while not (runs.exists() and runs.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = runs.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert 4 <= kept.count(b"\n") < 12
    runs.write_bytes(kept + b'{"key": ["torn')
    again = on_toy({"halving": HALVING}, out=tmp_path)
    assert runs.read_bytes().startswith(kept) and runs.read_bytes().count(b"\n") == 12
    assert scores_of(again) == scores_of(on_toy({"halving": HALVING}))


def test_nothing_runs_twice_and_more_can_be_asked_for(tmp_path):
    first = on_toy({"halving": HALVING}, prompts=PROMPTS[:4], out=tmp_path, pool_size=8)
    before = (tmp_path / "runs.jsonl").read_text()
    assert on_toy({"halving": HALVING}, prompts=PROMPTS[:4], out=tmp_path, pool_size=8).rows == first.rows
    assert (tmp_path / "runs.jsonl").read_text() == before
    more = on_toy({"halving": HALVING}, budgets=(4, 5), out=tmp_path)  # its pool is large enough for 5
    assert len(more.rows) == 4 and more.rows[0].prompts == len(PROMPTS)
    assert {len(r["score"]) for r in of_unit(more, POOL)} == {8}
    assert (tmp_path / "runs.jsonl").read_text().startswith(before)
    larger = on_toy({"halving": HALVING}, prompts=PROMPTS[:2], budgets=(4, 9), out=tmp_path)
    assert {len(r["score"]) for r in of_unit(larger, POOL)} == {14}


def test_minutes_end_the_run_and_zero_only_reads(tmp_path):
    with pytest.raises(RuntimeError, match="nothing is measured yet"):
        _ = on_toy(out=tmp_path, minutes=0).rows
    assert not (tmp_path / "runs.jsonl").exists()
    first = on_toy(out=tmp_path, prompts=PROMPTS[:2])
    assert on_toy(out=tmp_path, minutes=0).rows == first.rows
    assert f"2 of {len(PROMPTS)} prompts" in on_toy(out=tmp_path, minutes=0).markdown()
    on_toy(out=tmp_path, minutes=1e-9)
    assert (tmp_path / "runs.jsonl").read_text().count("\n") == 4


def test_shards_together_are_the_whole(tmp_path):
    for i in (1, 2):
        both = on_toy(out=tmp_path, shard=(i, 2))
    assert {p.name for p in tmp_path.glob("runs*")} == {"runs-1-of-2.jsonl", "runs-2-of-2.jsonl"}
    assert scores_of(both) == scores_of(on_toy()) and both.rows[0].prompts == len(PROMPTS)
    assert [r["prompt"] for r in both.records] == [r["prompt"] for r in on_toy().records]


def test_results_of_other_settings_are_never_mixed(tmp_path):
    on_toy(out=tmp_path, prompts=PROMPTS[:2])
    for changed in ({"seed": 1}, {"returned": 3}, {"held_out": ()}, {"batch": 2}):
        with pytest.raises(ValueError, match=f"other settings.*{next(iter(changed)).replace('held_out', 'judges')}"):
            on_toy(out=tmp_path, prompts=PROMPTS[:2], **changed)
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text().replace('"config": "', '"config": "f', 1))
    with pytest.raises(ValueError, match="line 1 is of other settings"):
        on_toy(out=tmp_path, prompts=PROMPTS[:2])
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        on_toy(out=tmp_path, prompts=PROMPTS[:2])


def test_results_of_other_weights_are_never_mixed(tmp_path):
    def of(guide: str, judge: str = "1", **options):
        guides = [Pixels("ramp", REWARD.function, config_hash=guide)]
        judges = [Pixels("judge", JUDGE.function, config_hash=judge)]
        return on_toy(rewards=guides, held_out=judges, prompts=PROMPTS[:2], out=tmp_path, **options)

    first = of("1")
    for changed, name in ((("2",), "ramp"), (("1", "2"), "judge")):
        with pytest.raises(ValueError, match=f"results of other weights or options of {name}; choose another folder"):
            of(*changed)
    assert of("1", minutes=0).rows == first.rows

    path = tmp_path / "config.json"
    kept = json.loads(path.read_text())
    assert kept["settings"].pop("weights") == {"ramp": "1", "judge": "1"}
    path.write_text(json.dumps(kept))
    with pytest.warns(UserWarning, match="does not tell by which weights of its rewards it was measured"):
        assert of("2", minutes=0).rows == first.rows  # older ones are read, and not written to
    assert json.loads(path.read_text()) == kept


def test_the_files_say_the_same(measured, tmp_path):
    pytest.importorskip("matplotlib")
    measured.save(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    lines = list(csv.DictReader(io.StringIO((tmp_path / "per-prompt.csv").read_text())))
    markdown = (tmp_path / "summary.md").read_text()
    assert len(lines) == len(summary["rows"]) * len(PROMPTS) == 6 * len(PROMPTS)
    for row in summary["rows"]:
        mine = [r for r in lines if (r["search"], float(r["budget"])) == (row["search"], row["budget"])]
        assert len(mine) == row["prompts"]
        for column, told in (
            ("score", row["guided"]["mean"]["mean"]),
            ("judge", row["judges"]["judge"]["mean"]["mean"]),
            ("nfe", row["ledger"]["nfe"]),
            ("seconds", row["seconds"]),
            ("diversity", row["diversity"]["mean"]["mean"]),
        ):
            assert np.mean([float(r[column]) for r in mine]) == pytest.approx(told, rel=1e-6), column
        assert f"| {row['budget']:g} images | {row['search']} | {row['guided']['mean']['mean']:.4g} |" in markdown
    from PIL import Image

    picture = Image.open(tmp_path / "comparison.png")
    assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 50


def test_the_picture_shows_what_the_rows_say(measured):
    pytest.importorskip("matplotlib")
    figure = measured.figure()
    assert len(figure.axes) == 4  # reward and judge, against rows and against seconds
    row = next(r for r in measured.rows if r.search == "halving" and r.budget == 5)
    drawn = {h.get_label(): h for h in figure.axes[0].containers}
    x, y = drawn["halving"].lines[0].get_data()
    assert x[-1] == pytest.approx(row.images, abs=0.1) and y[-1] == pytest.approx(row.guided.over[ONCE].mean)
    bar = next(line for line in figure.axes[0].lines if line.get_label() == "best-of-n")
    assert len(bar.get_xdata()) == 8 and bar.get_ydata()[4] == pytest.approx(
        next(r for r in measured.rows if r.search == BAR and r.budget == 5).guided.over[ONCE].mean
    )


def test_without_matplotlib_the_error_says_how_to_get_it(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'visearch\[plots\]'"):
        measured.figure()


# --- what is refused before anything runs ---------------------------------------------------------------------


class Examiner(Pixels):
    """Judges by metadata, and knows none of these prompts."""

    needs = frozenset({"pixels", "metadata"})

    def __init__(self):
        super().__init__("examiner", ramp)

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        raise ValueError(f"cannot judge {prompts[0]!r}")


class Untouched(GaussianToy):
    """A generator that must not be run."""

    def advance(self, population, to):
        raise AssertionError("ran before the arguments were checked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"searches": ["halvin"]}, "unknown search 'halvin'; did you mean 'halving'"),
        ({"searches": ["halving(m=16)"]}, "has no field 'm'"),
        ({"searches": []}, "searches is empty"),
        ({"searches": ["best-of-n"]}, "leave it out"),
        ({"searches": ["allocated"]}, "over prompts"),
        ({"searches": "allocated"}, "over prompts"),
        ({"searches": [SuccessiveHalving(n=4, calls=(0.9, 0.1), keep=(2, 1))]}, "ascending"),
        ({"budgets": (0.5,)}, "budget=0.5 must be at least one image-equivalent"),
        ({"budgets": ()}, "both empty"),
        ({"seconds": (-1.0,)}, "greater than 0"),
        ({"rewards": ("emoji-clipp",)}, "unknown reward 'emoji-clipp'"),
        ({"rewards": ()}, "rewards is empty"),
        ({"held_out": ("judge-q",)}, "unknown reward 'judge-q'"),
        ({"held_out": (REWARD,)}, "ramp is given twice"),
        ({"rewards": (AverageRank([REWARD]),)}, r"average-rank\(ramp\) is relative to the candidates of one search"),
        ({"rewards": ("emoji-clip + judge-q",)}, "unknown reward 'judge-q'"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", " "]}, "is empty"),
        ({"shard": (0, 2)}, "count from 1/2"),
        ({"shard": (1, 2), "budgets": (), "seconds": (1.0,)}, "give pool_size"),
        ({"limit": 0}, "limit=0"),
        ({"pool_size": 2}, "below the largest budget, 4"),
        ({"held_out": (Examiner(),)}, "cannot judge 'prompt"),
        ({"minutes": -1}, "minutes=-1"),
        ({"clock": "sun"}, "clock='sun' is unknown"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(options, message):
    given = {"prompts": PROMPTS, "searches": [HALVING], "budgets": (4,), "rewards": (REWARD,), **options}
    with pytest.raises(ValueError, match=message):
        compare(Untouched(), **given, progress=False)


def test_of_all_searches_those_that_a_generator_cannot_serve_are_told():
    class Plain(GaussianToy):
        def view(self, *_, **__):
            raise ValueError("this generator has one view only")

        check_moves = renoise = perturb = noise = set_noise = view

    found = compare(Plain(), PROMPTS[:2], "all", (4,), (REWARD,), progress=False)
    assert "allocated" in found.refused and "shares its budget over prompts" in found.markdown()
    shown = {row.search for row in found.rows}
    assert "halving" in shown and not shown & set(found.refused)


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def refuse(*_):
        raise AssertionError("a model was loaded before the arguments were checked")

    monkeypatch.setattr("visearch.compare.load", refuse)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--search", "halvin"), "unknown search 'halvin'"),
        (("--search", "halving", "--budget", "0.5"), "at least one image-equivalent"),
        (("--search", "halving", "--reward", "emoji-clop"), "unknown reward 'emoji-clop'"),
        (("--search", "halving", "--held-out", "judge-a", "judge-x"), "unknown reward 'judge-x'"),
    ],
)
def test_the_command_refuses_before_a_model_is_loaded(words, message, tmp_path, capsys, unloaded):
    assert main(["compare", "validation", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_command_refuses_an_empty_file(tmp_path, capsys, unloaded):
    empty = tmp_path / "prompts.txt"
    empty.write_text("\n\n")
    assert main(["compare", str(empty), "--search", "halving", "--out", str(tmp_path / "out")]) == 2
    assert "holds no prompt" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none.txt"), "--search", "halving"]) == 2


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in shown and "--held-out" in shown and "halving(n=16)" in shown
    assert "zero-order" in shown and "allocated" not in shown  # it would be refused


@pytest.mark.slow
def test_on_the_embedded_world(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["compare", "validation", "--limit", "2", "--search", "halving", "--budget", "3", "--steps", "6"]
    words += ["--held-out", "judge-a", "judge-b", "--out", str(tmp_path), "--pool-size", "4"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "judge-a is itself wrong on" in shown and "2 prompts" in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["search"] for row in summary["rows"]] == [BAR, "halving"]
    assert set(summary["rows"][1]["judges"]) == {"judge-a", "judge-b"}
    assert main([*words, "--minutes", "0"]) == 0 and capsys.readouterr().out == shown
