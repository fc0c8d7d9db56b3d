"""``visearch run`` on a folder with a tiny real pipeline: what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import tiny
from PIL import Image, ImageChops

from visearch.cli import main
from visearch.protocols import Population
from visearch.rewards import REWARDS

for name in ("brightness", "darkness", "nan", "raising", "short", "interrupting"):
    REWARDS.add(name, f"cli_rewards:{name}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.build("cogview4").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, tmp_path, capsys):
    """Run the command; returns (exit status, standard output, standard error, folder)."""

    def call(*words, prompt="a photo of a cow", reward="brightness", out=tmp_path / "out"):
        size = ("--steps", "2", "--height", "32", "--width", "32", "--device", "cpu")
        status = main(["run", prompt, "--model", model, "--reward", reward, "--out", str(out), *size, *words])
        shown = capsys.readouterr()
        return status, shown.out, shown.err, out

    return call


def largest_difference(a, b) -> int:
    return max(high for _, high in ImageChops.difference(Image.open(a), Image.open(b)).getextrema())


def test_a_run_leaves_winner_baseline_sheet_and_result(run):
    status, out, err, folder = run("--n", "5", "--seed", "3")
    assert status == 0 and "5 candidates, 20 model rows" in out
    written = {"winner.png", "baseline.png", "contact-sheet.png", "result.json", "winner.safetensors", "winner.json"}
    assert {p.name for p in folder.iterdir()} == written
    result = json.loads((folder / "result.json").read_text())
    assert [c["score"] for c in result["ranking"]] == sorted((c["score"] for c in result["ranking"]), reverse=True)
    assert result["winner"] == result["ranking"][0] and result["baseline"]["candidate"] == 0
    assert result["baseline"]["seed"] == 3 and result["ledger"]["nfe"] == 5 * 2 * 2
    assert result["search"] == {"name": "best-of-n", "text": "best-of-n(n=5)", "n": 5, "batch": 8}
    assert result["stopped"] == "done"
    assert {"torch", "diffusers", "visearch", "python"} <= set(result["versions"])
    assert Image.open(folder / "winner.png").size == (32, 32)
    assert Image.open(folder / "contact-sheet.png").width > 4 * 256
    assert "brightness" in out and "best=" in err


def test_the_commands_in_the_result_give_the_same_pixels_again(run, tmp_path):
    _, _, _, folder = run("--n", "4", "--guidance", "2.5", "--negative-prompt", "a cat")
    result = json.loads((folder / "result.json").read_text())
    for which, picture in (("winner_command", "winner.png"), ("command", "winner.png"), ("command", "baseline.png")):
        words = shlex.split(result[which])
        assert words[:2] == ["visearch", "run"]
        again = tmp_path / which
        assert main([*words[1:], "--out", str(again)]) == 0
        # one grey level: a row alone and a row in a batch may differ in the last bits
        assert largest_difference(folder / picture, again / picture) <= 1


def test_a_budget_in_images(run):
    status, _, _, folder = run("--n", "5", "--max-images", "2")
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and result["ledger"]["images"] == 2 and result["search"]["n"] == 2
    assert "--max-images 2" in result["command"] and "--max-images" not in result["winner_command"]


def test_a_search_can_be_given_as_text(run, capsys):
    text = "refine(first=halving(n=4, calls=(1,), keep=(2,)), then=zero-order(n=2, k=2))"
    status, _, _, folder = run("--search", text, "--steps", "4")
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and result["search"]["name"] == "refine"
    assert result["search"]["first"]["n"] == 4 and result["search"]["then"]["k"] == 2
    assert len(result["ranking"]) == 4 and len(result["pruned"]) == 2
    assert any(c["id"].count("noise@0") for c in result["ranking"])
    for bad, message in (
        ("halving(m=3)", "no field 'm'"),
        ("halvign", "did you mean"),
        ("halving(n=", "cannot be read"),
    ):
        assert main(["run", "a cat", "--search", bad]) == 2
        assert message in capsys.readouterr().err


def test_halving_leaves_its_schedule_and_what_it_dropped(run, tmp_path):
    words = ("--search", "halving", "--n", "6", "--set", "preset=psp", "--steps", "4")
    status, out, err, folder = run(*words)
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and "2 of 6 candidates finished, 26 model rows" in out and "26/26" in err
    schedule = {"name": "halving", "n": 6, "preset": "psp", "calls": [1, 2], "keep": [3, 2]}
    schedule["text"] = "halving(n=6, preset='psp', calls=(1, 2), keep=(3, 2))"
    assert result["search"] == {**schedule, "check_cost": None, "rule": None} and result["price_of_a_check"] > 0
    assert [c["stage"] for c in result["pruned"]] == [1, 1, 1, 2] and len(result["ranking"]) == 2
    everyone = [c["candidate"] for c in (*result["pruned"], *result["ranking"])]
    assert sorted(everyone) == list(range(6)) and all(c["seed"] for c in result["pruned"] if c["candidate"])
    for which in ("command", "winner_command"):
        assert main([*shlex.split(result[which])[1:], "--out", str(tmp_path / which)]) == 0
        assert largest_difference(folder / "winner.png", tmp_path / which / "winner.png") <= 1
    explicit = run("--search", "halving", "--n", "6", "--set", "calls=.25,2", "--set", "keep=.5,2", "--steps", "4")[3]
    assert json.loads((explicit / "result.json").read_text())["winner"]["seed"] == result["winner"]["seed"]


def test_held_out_rewards_score_both_pictures(run):
    status, out, err, folder = run("--n", "3", "--held-out", "darkness", reward="brightness")
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and "| darkness | held out |" in out
    for picture in ("winner", "baseline"):
        assert result[picture]["held_out"]["darkness"] == pytest.approx(-result[picture]["score"])
    assert result["winner"]["id"] != "0"
    told = "possible reward hacking: brightness rises while darkness falls"
    assert told in err and result["warnings"][0].startswith(told)


def test_a_held_out_reward_that_guides_is_refused(run):
    status, _, err, _ = run("--held-out", "brightness", reward="brightness")
    assert status == 2 and "brightness is given twice; a judge is held out only if it does not guide" in err


def test_a_sum_of_rewards_guides_and_a_second_reward_is_refused(run, capsys):
    status, out, _, folder = run("--n", "2", reward="brightness + 0.25 * darkness")
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and "brightness + 0.25*darkness: " in out
    assert result["winner"]["components"].keys() == {"brightness", "darkness"}
    assert result["ledger"]["rewards"]["darkness"] == 2
    with pytest.raises(SystemExit):
        run("--reward", "darkness")
    assert "--reward is given twice; join them in one text" in capsys.readouterr().err


def test_budgets(run):
    status, out, _, folder = run("--n", "8", "--max-nfe", "13")
    assert status == 0 and "3 candidates, 12 model rows" in out
    status, out, err, _ = run("--search", "halving", "--set", "n=None", "--max-nfe", "40")
    assert status == 0 and "7 of 13 candidates finished, 40 model rows" in out and "40/40" in err
    status, out, _, folder = run("--n", "40", "--max-seconds", "0.001")
    assert status == 0 and "stopped: deadline" in out
    assert len(json.loads((folder / "result.json").read_text())["ranking"]) == 1


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (("--n", "0"), {}, "n=0 must be"),
        (("--search", "best-of-k"), {}, "unknown search 'best-of-k'; did you mean 'best-of-n'?"),
        ((), {"reward": "brightnes"}, "unknown reward 'brightnes'; did you mean 'brightness'?"),
        ((), {"prompt": "   "}, "is empty"),
        (("--max-nfe", "3"), {}, "max_nfe=3 a prompt is too small: one candidate costs 4 model rows"),
        (("--set", "m=3"), {}, "--set m=3: give NAME=VALUE; best-of-n has n, batch"),
        (("--set", "batch"), {}, "--set batch: give NAME=VALUE"),
        (("--search", "halving", "--set", "preset=pps"), {}, "preset='pps' is unknown; use auto, psp"),
        (("--search", "halving", "--set", "calls=.4"), {}, "one entry a check"),
        (("--search", "halving", "--set", "n=None"), {}, "n=None takes the number of candidates from the budget"),
        (("--max-nfe", "0"), {}, "max_nfe=0 must be greater than 0"),
        (("--steps", "0"), {}, "--steps 0 must be at least 1"),
        (("--device", "cuda:99"), {}, "--device cuda:99 is not available here"),
        (("--seed", "-1"), {}, "--seed -1 must lie in"),
        (("--offload", "model"), {}, "needs an accelerator"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_compute(run, words, options, message):
    status, _, err, folder = run(*words, **options)
    lines = [line for line in err.strip().splitlines() if line.startswith("visearch:")]
    assert status == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in err and not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [("emoji-46", "unknown model 'emoji-46'; did you mean 'emoji-64'"), ("nobody/nothing", "could not be loaded")],
)
def test_unknown_models(model, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["run", "a cow", "--model", model, "--reward", "brightness", "--out", str(tmp_path)]
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_any_compute(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err, _ = run(out=tmp_path / "file" / "out")
    assert status == 2 and "cannot write there" in err


def test_a_disk_that_fills_up_leaves_the_command_for_the_winner(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visearch.report.write_image", full)
    status, _, err, folder = run("--n", "2")
    assert status == 1 and "No space left" in err and "visearch run 'a photo of a cow'" in err
    assert json.loads((folder / "result.json").read_text())["stopped"] == "done"


@pytest.mark.parametrize("reward", ["nan", "raising"])
def test_a_reward_that_always_fails_returns_candidate_0_with_a_warning(run, reward):
    status, _, err, folder = run("--n", "2", reward=reward)
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and result["winner"]["candidate"] == 0
    assert "the reward failed on every candidate" in err and any("every candidate" in w for w in result["warnings"])


def test_a_reward_of_the_wrong_length_is_named(run):
    status, _, err, _ = run("--n", "2", reward="short")
    assert status == 1 and "reward 'short' returned scores of shape (1,) for 2 samples" in err


def test_ctrl_c_keeps_what_was_finished(run, monkeypatch):
    from visearch.search.best_of_n import BestOfN

    monkeypatch.setattr(BestOfN, "__post_init__", lambda self: object.__setattr__(self, "batch", 2))
    status, out, _, folder = run("--n", "6", reward="interrupting")
    result = json.loads((folder / "result.json").read_text())
    assert status == 130 and "interrupted by Ctrl-C" in out
    assert len(result["ranking"]) == 2 and result["stopped"] == "interrupted"
    assert (folder / "winner.png").exists()


def test_out_of_memory_is_survived(run, monkeypatch):
    from visearch.pipelines.diffusion import DiffusionSampler

    advance = DiffusionSampler.advance

    def tight(self, population, to):
        if len(population) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return advance(self, population, to)

    monkeypatch.setattr(DiffusionSampler, "advance", tight)
    status, _, _, folder = run("--n", "4")
    result = json.loads((folder / "result.json").read_text())
    assert status == 0 and len(result["ranking"]) == 4 and result["ledger"]["retries"] > 0


def test_help_teaches():
    shown = subprocess.run(
        [sys.executable, "-m", "visearch", "run", "--help"], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    for word in ("best-of-n", "emoji-clip", "--max-nfe", "examples:", "--held-out"):
        assert word in shown
    bare = subprocess.run([sys.executable, "-m", "visearch"], capture_output=True, text=True, env=os.environ)
    assert bare.returncode == 2 and "run" in bare.stdout and "demo" in bare.stdout


def test_an_exact_run_repeats_its_winner_without_drift(run):
    status, out, _, folder = run("--n", "3", "--exact", "--batch-buckets", "1,2", "--max-memory", "2GiB")
    assert status == 0 and "winner's latents differ by at most 0" in out
    result = json.loads((folder / "result.json").read_text())
    assert result["drift"] == 0 and result["ledger"]["nfe"] == 3 * 2 * 2 and result["ledger"]["probes"]["nfe"] > 0
    assert {c["batches"][0]["rows"] for c in result["ranking"]} == {1, 2}
    again = shlex.split(result["command"])
    assert again.count("--exact") == 1 and again[again.index("--batch-buckets") + 1] == "1,2"
    assert "--exact" not in result["winner_command"]
    kept = Population.load(folder, name="winner")
    assert kept.seed == (result["winner"]["seed"],) and len(kept) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--batch-buckets", "2,4"), "batch_buckets"), (("--max-memory", "lots"), "max_memory='lots'")],
)
def test_sizes_that_cannot_be_are_refused(run, words, named):
    status, _, err, folder = run("--n", "2", *words)
    assert status == 2 and named in err and not list(folder.glob("*.png"))


def test_a_list_of_sizes_is_a_list_of_numbers(run, capsys):
    with pytest.raises(SystemExit):
        run("--batch-buckets", "1,two")
    assert "write it as 1,2,4,8" in capsys.readouterr().err
