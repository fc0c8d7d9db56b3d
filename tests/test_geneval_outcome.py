"""Summing up: parts merged, what goes together and what does not, comparisons, and what a search left to be gained."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch.cli import main
from visearch.geneval.outcome import Conflict, Outcome, candidates, read_outcome
from visearch.geneval.summary import differences, doubts, summarize

TAGS = ("single_object", "colors")
JUDGE = {"settings": {"detector": {"id": "d"}}, "comparability": "not comparable on counting"}


def row(prompt: int, image: int, correct: bool, root="run", tag=None, **more):
    line = {"tag": tag or TAGS[prompt % 2], "include": [], "prompt": f"prompt {prompt}"}
    return {
        "filename": f"{root}/{prompt:05d}/samples/{image:05d}.png",
        "tag": line["tag"],
        "prompt": line["prompt"],
        "correct": correct,
        "reason": "",
        "metadata": json.dumps(line),
        "details": "{}",
        "config": "k",
    } | more


def run_of(verdicts, **more):
    """Verdicts by prompt."""
    return [row(p, k, bool(v), **more) for p, images in enumerate(verdicts) for k, v in enumerate(images)]


def write(path: Path, rows, expected=None) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    if expected is not None:
        meta = {"expected": expected, "benchmark": "GenEval", "images": None, **JUDGE}
        path.with_name(path.name + ".meta.json").write_text(json.dumps(meta))
    return path


ROWS = run_of([[1, 0], [1, 1], [0, 0], [0, 1]])


# --- merging ------------------------------------------------------------------------------------------------------


def test_parts_in_any_order_are_the_whole(tmp_path):
    parts = [write(tmp_path / "a", ROWS[5:]), write(tmp_path / "b", ROWS[:3]), write(tmp_path / "c", ROWS[2:6])]
    for order in itertools.permutations(parts):
        assert read_outcome(order).rows == ROWS
    moved = run_of([[1, 0]], root="elsewhere/run")
    assert read_outcome([*parts, write(tmp_path / "d", moved)]).summary == summarize(ROWS)


def test_what_does_not_go_together_is_a_conflict(tmp_path):
    whole = write(tmp_path / "a", ROWS)
    with pytest.raises(Conflict, match=r"b, line 1: image 00000/00000 was judged otherwise in .*a"):
        read_outcome([whole, write(tmp_path / "b", [{**ROWS[0], "correct": False}])])
    with pytest.raises(Conflict, match="c, line 3 is of other settings"):
        read_outcome([write(tmp_path / "c", [*ROWS[:2], {**ROWS[2], "config": "other"}])])
    without = [{k: v for k, v in r.items() if k != "config"} for r in ROWS]
    assert read_outcome([write(tmp_path / "d", without)]).summary == summarize(ROWS)
    with pytest.raises(Conflict, match="settings"):
        read_outcome([write(tmp_path / "e", [*ROWS[:1], *without[1:]])])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="none is no file"):
        read_outcome([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"no results in .*empty"):
        read_outcome([write(tmp_path / "empty", [])])
    with pytest.raises(ValueError, match="b, line 2 is no result"):
        read_outcome([write(tmp_path / "b", [ROWS[0], {"tag": "x"}])])
    torn = write(tmp_path / "torn", ROWS)
    torn.write_bytes(torn.read_bytes()[:-5])
    assert read_outcome([torn]).rows == ROWS[:-1]


def test_missing_images_are_counted(tmp_path):
    assert read_outcome([write(tmp_path / "a", ROWS)]).missing() == 0
    assert read_outcome([write(tmp_path / "b", ROWS[1:])]).missing() == 1
    assert read_outcome([write(tmp_path / "c", ROWS, expected=16)]).missing() == 8
    lines = [json.loads(r["metadata"]) for r in ROWS[::2]]
    outcome = read_outcome([tmp_path / "a"])
    assert outcome.missing(lines) == 0
    assert outcome.missing([*lines, {"prompt": "another"}, lines[0]]) == 4  # the same line twice is two prompts


# --- comparing ------------------------------------------------------------------------------------------------------


def test_a_run_gains_nothing_on_itself():
    for interval in differences(ROWS, ROWS).values():
        assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


def test_gains_are_differences_of_the_summaries_and_paired():
    """The same prompts are hard in both runs: the interval of the gain is narrower than those of the runs."""
    rng = np.random.default_rng(0)
    hard = rng.random(60) < 0.5
    worse = [[not h and rng.random() < 0.9] for h in hard]
    better = [[not h] for h in hard]
    gains = differences(run_of(better), run_of(worse))
    a, b = summarize(run_of(better)), summarize(run_of(worse))
    assert gains["overall"].mean == pytest.approx(a.overall.mean - b.overall.mean)
    assert gains["colors"].mean == pytest.approx(a.tasks["colors"].accuracy.mean - b.tasks["colors"].accuracy.mean)
    width = gains["overall"].high - gains["overall"].low
    assert 0 < width < 0.8 * (a.overall.high - a.overall.low)
    assert gains == differences(run_of(better), run_of(worse)) != differences(run_of(better), run_of(worse), seed=1)


def test_runs_of_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="4 and 3 prompts, 3 of them in common"):
        differences(ROWS, ROWS[:6])


@settings(max_examples=30, deadline=None)
@given(
    verdicts=st.lists(st.lists(st.booleans(), min_size=1, max_size=3), min_size=2, max_size=8), seed=st.integers(0, 9)
)
def test_intervals_hang_on_the_results_and_the_seed_alone(verdicts, seed):
    rows = run_of(verdicts)
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    assert summarize(rows, draws=50, seed=seed) == summarize(shuffled, draws=50, seed=seed)
    for task in summarize(rows, draws=50, seed=seed).tasks.values():
        assert 0 <= task.accuracy.low <= task.accuracy.mean <= task.accuracy.high <= 1


def test_doubts_are_of_the_set_up_not_of_a_weak_generator():
    assert doubts(run_of([[1], [0], [1], [0]], details="{...}")) == []
    assert len(doubts(run_of([[0], [1]], details="{...}"))) == 1
    assert "no detection" in doubts(run_of([[1], [0]]))[0]


# --- what a search left -----------------------------------------------------------------------------------------------


def searched(root: Path, verdicts, scores, winner="0") -> Outcome:
    """One image a prompt, whose candidates have these scores and verdicts of a held-out judge."""
    for p, (found, values) in enumerate(zip(verdicts, scores)):
        order = sorted(range(len(values)), key=lambda k: -values[k])
        told = [{"id": str(k), "score": values[k], "held_out": {"judge": float(found[k])}} for k in order]
        record = {"winner": told[0]["id"], "candidates": told, "nfe": 8, "decodes": 4, "rewards": 4, "seconds": 1.5}
        (root / f"{p:05d}").mkdir(parents=True)
        (root / f"{p:05d}" / "search.json").write_text(json.dumps({"config": "x", "images": {"00000": record}}))
    images = {"model": "m", "search": "best-of-n(n=4)", "hyperparameters": "BestOfN(n=4)", "reward": "r"}
    meta = {"images": images, "benchmark": "GenEval-style", "expected": 0, **JUDGE}
    return Outcome(run_of([[1]] * len(verdicts), root=str(root)), [meta])


def test_rows_between_one_sample_and_the_oracle(tmp_path):
    rng = np.random.default_rng(1)
    verdicts, scores = rng.random((6, 4)) < 0.5, rng.random((6, 4))
    found = candidates(searched(tmp_path, verdicts, scores))["judge"]
    assert list(found) == ["one sample", "best of 2", "chosen", "oracle"]
    for place, tag in enumerate(TAGS):
        mine = range(place, 6, 2)
        assert found["one sample"][tag] == pytest.approx(mean(float(verdicts[p, 0]) for p in mine))
        assert found["oracle"][tag] == pytest.approx(mean(float(verdicts[p].any()) for p in mine))
        assert found["chosen"][tag] == pytest.approx(mean(float(verdicts[p, scores[p].argmax()]) for p in mine))
        pairs = list(itertools.combinations(range(4), 2))
        best = mean(float(verdicts[p, max(pair, key=lambda k: scores[p, k])]) for p in mine for pair in pairs)
        assert found["best of 2"][tag] == pytest.approx(best)
    for values in found.values():
        assert values["overall"] == pytest.approx(mean(values[tag] for tag in TAGS))


def test_one_candidate_an_image_leaves_nothing_to_be_gained(tmp_path):
    assert candidates(searched(tmp_path / "one", [[1], [0]], [[0.0], [0.0]])) == {}
    assert candidates(Outcome(ROWS, [])) == {}


def test_the_protocol_and_the_cost_are_named(tmp_path):
    outcome = searched(tmp_path, [[1, 0]], [[1.0, 0.0]])
    assert outcome.protocol() == (
        "GenEval-style, 1 prompts x 1 images, m, each the winner of a search of its own, BestOfN(n=4) guided by r, "
        "judged by d (not comparable on counting)"
    )
    assert outcome.cost() == {"nfe": 8, "decodes": 4, "rewards": 4, "seconds": 1.5}


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_same_is_printed_and_written(tmp_path, capsys):
    worse = write(tmp_path / "worse.jsonl", run_of([[0, 0], [1, 1], [0, 0], [0, 1]]))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "markdown")}
    words = ["geneval", "summary", str(write(tmp_path / "run.jsonl", ROWS)), "--baseline", str(worse)]
    assert main([*words, *(str(w) for kind, path in files.items() for w in (f"--{kind}", path))]) == 0
    out = capsys.readouterr().out
    text, shown = summarize(ROWS).text(), files["markdown"].read_text()
    assert out == f"{text}\n\n{shown}"
    told = json.loads(files["json"].read_text())
    lines = list(csv.DictReader(files["csv"].open()))
    assert [line["task"] for line in lines] == [*TAGS, "overall"]
    gains = differences(ROWS, run_of([[0, 0], [1, 1], [0, 0], [0, 1]]))
    for line, number in zip(lines, told["table"]):
        assert {k: str(v) for k, v in number.items()} | {"protocol": told["protocol"]} == line
        gain = gains[line["task"]]
        assert (number["gain"], number["gain_low"], number["gain_high"]) == (gain.mean, gain.low, gain.high)
        assert f"{number['accuracy']:.2%} [{number['low']:.2%}, {number['high']:.2%}]" in shown
    assert told["overall"]["mean"] == summarize(ROWS).overall.mean == float(lines[-1]["accuracy"])
