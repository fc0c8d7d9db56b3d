"""Recording a pool: what is in it, going on after a kill, sharing the work, refusing to mix."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from contract.cases import PixelReward

from visearch.cli import _parser, main
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.pool import Pool
from visearch.prompts import read_prompts
from visearch.protocols import Request, Scores, stable_hash
from visearch.record import merge, record

TESTS = Path(__file__).parent
LINES = [{"prompt": f"a photo of {n} cows", "tag": tag} for n, tag in zip("23456", "ababa")]


class Brightness:
    """Counts what it sees; reads the metadata if it is told to."""

    higher_is_better, range, licence, source = True, (0.0, 1.0), "Apache-2.0", "tests"

    def __init__(self, name: str = "brightness", needs: tuple[str, ...] = ("pixels",)) -> None:
        self.name, self.needs, self.seen = name, frozenset(needs), []

    def score(self, samples, prompts, *, noise_level=None, metadata=None) -> Scores:
        if "metadata" in self.needs and any(line is None for line in metadata):
            raise ValueError(f"{prompts[0]!r} has no metadata")
        self.seen.append((len(prompts), noise_level))
        return Scores(samples.float().mean((1, 2, 3)))


def draw(folder, lines=LINES, sampler=None, rewards=None, seeds=3, **options) -> Pool:
    return record(sampler or GaussianToy(steps=4), rewards or [PixelReward()], lines, folder, seeds=seeds, **options)


def same(a: Pool, b: Pool) -> None:
    assert (a.prompts, a.tags, a.stages, a.rows) == (b.prompts, b.tags, b.stages, b.rows)
    np.testing.assert_array_equal(a.seeds, b.seeds)
    for kind in ("scores", "held_out"):
        x, y = getattr(a, kind), getattr(b, kind)
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_numbers_are_those_of_the_generator_itself(tmp_path):
    judge = Brightness("judge")
    pool = draw(tmp_path, held_out=[judge], seed=5)
    sampler, whole = GaussianToy(steps=4), Request(tuple(line["prompt"] for line in LINES))
    assert pool.prompts == whole.prompts and pool.tags == tuple("ababa")
    assert pool.stages == (1, 2, 3, 4) and pool.rows == (2, 4, 6, 8) and pool.steps == 4
    for p, prompt in enumerate(whole.prompts):
        own = stable_hash(5, whole.prompt_ids[p])
        assert pool.seeds[p].tolist() == [own, *(stable_hash(own, whole.prompt_ids[p], k) for k in (1, 2))]
        request = Request((prompt,), own, prompt_ids=(whole.prompt_ids[p],))
        for k in range(3):
            rows = sampler.init(request, request.seeds(k, k + 1))
            for stage in (1, 2, 3, 4):
                rows = sampler.advance(rows, stage)
                image = sampler.decode(rows if stage == 4 else sampler.predict_x0(rows))
                expected = PixelReward().score(image, [prompt]).values[0]
                assert pool.scores["pixel"][p, k, stage - 1] == expected.to(torch.float32)
            assert pool.held_out["judge"][p, k] == pytest.approx(float(image.mean()))
    assert pool.held_out["judge"].shape == (5, 3)
    assert judge.seen and all(level == np.inf for _, level in judge.seen)  # judges see finals alone
    assert pool.price > 0 and pool.seconds_a_row > 0
    assert pool.meta["noise_levels"] == [sampler.noise_level(stage) for stage in (1, 2, 3)]
    assert pool.meta["seconds"]["judge"] > 0


def test_judges_see_previews_where_they_are_asked_to(tmp_path):
    pool = draw(tmp_path, held_out=[Brightness("judge")], judge_stages="all", stages=[2])
    assert pool.stages == (2, 4) and pool.rows == (4, 8)
    assert pool.held_out["judge"].shape == pool.scores["pixel"].shape == (5, 3, 2)


def test_stages_are_the_sampler_s_own_milestones(tmp_path):
    assert draw(tmp_path, sampler=TokenToy()).stages == TokenToy().milestones
    with pytest.raises(ValueError, match=r"stages \[3\] are none of the sampler's: \(4, 8, 12\)"):
        draw(tmp_path / "other", sampler=TokenToy(), stages=[3, 8])
    assert not (tmp_path / "other").exists()


SCRIPT = """
import sys, time
from test_record import LINES, PixelReward, draw

class Slow(PixelReward):
    def score(self, *args, **options):
        time.sleep(0.05)
        return super().score(*args, **options)

draw(sys.argv[1], rewards=[Slow()])
"""


def test_kill_9_and_again_is_as_if_never_killed(tmp_path):
    folder = tmp_path / "killed"
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env={**os.environ, "PYTHONPATH": str(TESTS)})
    end = time.monotonic() + 120
    while len(list(folder.glob("prompt-*.json"))) < 2 and time.monotonic() < end and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    parts = {path: path.stat().st_mtime_ns for path in folder.glob("prompt-*.json")}
    assert 2 <= len(parts) < len(LINES)
    assert merge(folder).prompts and len(merge(folder).prompts) == len(parts)
    torn = min(parts)
    torn.write_text(torn.read_text()[:40])
    (folder / "prompt-00.json.99.part").write_text("{")
    resumed = draw(folder)
    assert all(path == torn or path.stat().st_mtime_ns == written for path, written in parts.items())
    same(resumed, draw(tmp_path / "whole"))


def test_nothing_is_drawn_twice(tmp_path):
    judge = Brightness("judge")
    first = draw(tmp_path, held_out=[judge])
    seen = len(judge.seen)
    assert seen >= len(LINES)
    same(first, draw(tmp_path, held_out=[judge]))
    assert len(judge.seen) == seen


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": 4}, "'seeds': 3"),
        ({"seed": 1}, "'seed': 0"),
        ({"stages": [2]}, "'stages': [1, 2, 3, 4]"),
        ({"sampler": GaussianToy(steps=5)}, "'rows': [2, 4, 6, 8]"),
        ({"rewards": [Brightness()]}, "'pixel'"),
        ({"held_out": [Brightness()]}, "'held_out': {}"),
        ({"config": {"model": "other"}}, "'model': 'this'"),
        ({"judge_stages": "all"}, "'judge_stages': 'final'"),
    ],
)
def test_records_of_other_settings_are_never_mixed(tmp_path, changes, named):
    draw(tmp_path, LINES[:1], config={"model": "this"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="choose another --out") as refusal:
        draw(tmp_path, **{"config": {"model": "this"}, **changes})
    assert named in str(refusal.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_record_that_was_put_there_from_another_folder_is_refused(tmp_path):
    draw(tmp_path / "a", LINES[:1])
    draw(tmp_path / "b", LINES[1:2], seed=1)
    (stranger,) = (tmp_path / "b").glob("prompt-*.json")
    stranger.rename(tmp_path / "a" / stranger.name)
    with pytest.raises(ValueError, match="other settings"):
        merge(tmp_path / "a")


def test_shards_share_the_prompts_and_change_no_seed(tmp_path):
    lines = [*LINES, LINES[0]]  # the same prompt again, which is another one by its id
    first = draw(tmp_path / "shared", lines, shard=(1, 2))
    assert len(first.prompts) == 3
    both = draw(tmp_path / "shared", lines, shard=(2, 2))
    whole = draw(tmp_path / "whole", lines)
    same(both, whole)
    assert whole.prompts == tuple(line["prompt"] for line in lines)
    assert len(set(whole.seeds.ravel().tolist())) == whole.seeds.size  # no noise serves two prompts


def test_what_another_process_has_drawn_meanwhile_is_not_drawn_again(tmp_path):
    whole = draw(tmp_path / "whole")
    sampler, begun = GaussianToy(steps=4), []
    init = sampler.init

    def meanwhile(*args):
        begun.append(1)
        for path in (tmp_path / "whole").glob("prompt-*.json"):
            shutil.copy(path, tmp_path / "shared")
        return init(*args)

    sampler.init = meanwhile
    same(draw(tmp_path / "shared", sampler=sampler), whole)
    assert len(begun) == 1


def test_a_limit_is_spread_over_the_file_and_can_be_raised(tmp_path):
    assert draw(tmp_path, limit=3).prompts == tuple(LINES[i]["prompt"] for i in (0, 2, 4))
    same(draw(tmp_path), draw(tmp_path / "whole"))


def test_time_that_is_up_leaves_a_pool_of_what_there_is(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 30.0, 61.0])
    monkeypatch.setattr("visearch.record.time.monotonic", lambda: next(clock))
    assert len(draw(tmp_path, minutes=1).prompts) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"limit": 0}, "limit=0"),
        ({"lines": []}, "prompts=0"),
        ({"shard": (3, 2)}, "shard 3/2"),
        ({"shard": (0, 2)}, "count from 1/2"),
        ({"judge_stages": "some"}, "'some'"),
        ({"held_out": [PixelReward()]}, "pixel is given twice"),
        ({"held_out": [Brightness("judge", needs=("metadata",))]}, "'a photo of . cows' has no metadata"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(tmp_path, options, message):
    sampler = GaussianToy(steps=4)
    sampler.init = lambda *_: pytest.fail("drawn")
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "new", sampler=sampler, **options)
    assert len(draw(tmp_path / "new", LINES[:1]).prompts) == 1  # a refused attempt does not bind the folder


def test_judges_get_the_line_of_the_prompt(tmp_path):
    line = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"}
    judge = Brightness("judge", needs=("metadata",))
    assert draw(tmp_path, [line], held_out=[judge]).held_out["judge"].shape == (1, 3)


def test_prompts_come_from_files_or_by_name(tmp_path):
    (tmp_path / "p.txt").write_text("a cow\n\n  a cat \n")
    assert read_prompts(str(tmp_path / "p.txt")) == [{"prompt": "a cow"}, {"prompt": "a cat"}]
    line = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    assert read_prompts(str(tmp_path / "p.jsonl")) == [line]
    assert len(read_prompts("report")) == 324
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(str(tmp_path / "p.txt"))
    with pytest.raises(ValueError, match="'reports' are no file"):
        read_prompts("reports")
    (tmp_path / "p.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        read_prompts(str(tmp_path / "p.jsonl"))


def test_the_command_makes_a_pool_that_loads(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    out = tmp_path / "pool.parquet"
    command = ["record", "validation", "--out", str(out), "--steps", "3", "--seeds", "2", "--stages", "every:2"]
    command += ["--held-out", "judge-a", "--limit", "2", "--dtype", "float32", "--device", "cpu"]
    assert main(command) == 0
    pool = Pool.load(out)
    assert len(pool.prompts) == 2 and pool.size == 2 and pool.stages == (2, 3) and pool.rows == (4, 6)
    assert set(np.unique(pool.held_out["judge-a"])) <= {0.0, 1.0}
    assert pool.meta["model"] == "emoji-64" and pool.meta["dtype"] == "float32"
    assert "2 prompts x 2 seeds at 2 of 3 stages" in capsys.readouterr().out
    out.unlink()
    assert main([*command, "--merge"]) == 0
    same(Pool.load(out), pool)
    assert main([*command, "--dtype", "bfloat16"]) == 2
    assert "'dtype': 'float32'" in capsys.readouterr().err


COMMANDS = [["record", "report", "--out", "x.parquet"], ["compare", "report", "--search", "all"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_several_rewards_and_judges_are_named_in_either_way(command):
    named = ["--held-out", "judge-a", "judge-b", "--reward", "x", "--held-out", "judge-c", "--reward", "y"]
    given = _parser().parse_args([*command, *named])
    assert (given.reward, given.held_out) == (["x", "y"], ["judge-a", "judge-b", "judge-c"])
    plain = _parser().parse_args(command)
    assert (plain.reward, plain.held_out) == (None, [])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("shard", "message"), [("2", "write it as 1/4"), ("3/2", "count from 1/2"), ("0/2", "1/2")])
def test_parts_that_do_not_exist_are_refused(command, shard, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--shard", shard])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "--out", "pool.csv"], "must end in .parquet"),
        (["report", "--out", "none/pool.parquet", "--merge"], "nothing is recorded"),
        (["reports", "--out", "pool.parquet"], "are no file"),
        (["report", "--out", "pool.parquet", "--reward", "emoji-clop"], "emoji-clip"),
    ],
)
def test_bad_commands_say_what_to_do(words, message, capsys, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    assert main(["record", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
