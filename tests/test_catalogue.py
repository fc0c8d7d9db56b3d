"""``visearch rewards``, and the names and classes that it lists."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import visearch.rewards
from visearch.catalogue import facts
from visearch.cli import main
from visearch.rewards import CLASSES, REWARDS, resolve

DOWNLOADED = ["clip-score", "pick-score", "hps-v2.1", "hps-v2.0", "siglip2", "aesthetic"]


def printed(capsys, *words: str) -> str:
    assert main(["rewards", *words]) == 0
    return capsys.readouterr().out


OTHERS = ("brightness", "darkness", "nan", "raising", "short", "interrupting")  # registered by test_cli


@pytest.fixture(scope="module")
def table() -> dict[str, dict]:
    return {name: facts(name) for name in REWARDS}


def test_every_reward_has_a_row(capsys):
    lines = printed(capsys).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(REWARDS)
    clip = next(line for line in lines if line.startswith("clip-score"))
    assert all(part in clip for part in ("clip", "427.6 M", "0 to 100", "MIT", "2103.00020"))


def test_every_reward_says_what_one_must_know_before_using_it(table):
    for name, known in table.items():
        # what the mean over frames is, is up to the reward of the frames
        if known["missing"] or name == "video-mean" or name in OTHERS:
            continue
        for what in ("family", "range", "scale", "licence", "training_data", "about", "higher_is_better"):
            assert known[what] is not None and known[what] != "", (name, what)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_weights_that_are_downloaded_are_described_without_being_loaded(name, table):
    factory = REWARDS.load(name)
    assert inspect.isclass(factory) and factory.name == name
    assert table[name]["size"] > 1e8 and table[name]["files"]


@pytest.mark.parametrize("name", DOWNLOADED)
def test_missing_weights_are_asked_for_before_anything_is_loaded(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"download .* into a folder and give (model|encoder)=FOLDER"):
        resolve(f"{name}:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "verdict"),
    [("pick-score", "held out: yes"), ("judge-a", "held out: no"), ("clip-score", "held out: but for colours")],
)
def test_what_shares_genevals_judge_is_not_held_out(name, verdict, capsys):
    assert verdict in printed(capsys, name)


def test_one_in_full_tells_how_to_get_its_weights(capsys):
    text = printed(capsys, "hps-v2.0")
    assert "hf download xswu/HPSv2 --include HPS_v2_compressed.pt --local-dir FOLDER" in text
    assert "--reward hps-v2.0:FOLDER, or visearch.rewards.HPSv20('FOLDER') in Python" in text
    text = printed(capsys, "aesthetic")
    assert "improved-aesthetic-predictor" in text and "hf download" not in text
    assert "prompt         ignored" in text
    assert "weights:" not in printed(capsys, "emoji-clip")


def test_json_holds_everything(capsys):
    (known,) = json.loads(printed(capsys, "siglip2", "--json"))
    assert known == facts("siglip2") | {"range": [0.0, 1.0]}


def test_an_unknown_name_is_one_line_with_near_ones(capsys):
    assert main(["rewards", "pickscore"]) == 2
    assert "did you mean 'pick-score'" in capsys.readouterr().err


def test_what_cannot_be_loaded_here_says_why(monkeypatch, capsys):
    def absent():
        raise ImportError("install the extra")

    monkeypatch.setattr("visearch.geneval.judge_c", absent)
    assert facts("judge-c")["missing"] == "install the extra"
    assert "install the extra" in printed(capsys)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_exported(name):
    assert getattr(visearch.rewards, name).__name__ == name
    assert name in visearch.rewards.__all__


def test_a_class_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PickScroe'"):
        _ = visearch.rewards.PickScroe


def test_importing_a_reward_loads_no_model_library():
    code = (
        "import sys\nfrom visearch.rewards import AestheticV2, CLIPScore, HPSv2, PickScore, SigLIP2\n"
        "print([name for name in ('transformers', 'open_clip', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["emoji-clip", "judge-a"])
def test_what_has_no_weights_to_choose_takes_none(name):
    with pytest.raises(ValueError, match=f"nothing may follow '{name}'"):
        resolve(f"{name}:somewhere")


def test_open_clip_takes_folders_and_hub_ids_whole(monkeypatch):
    asked = []
    monkeypatch.setattr("visearch.rewards.clip.OpenClipReward", lambda *given, device: asked.append(given))
    for text in ("ViT-B-32/openai", "ViT-B-32", "local-dir:/a/b", "hf-hub:owner/name"):
        resolve(f"open-clip:{text}")
    assert asked == [
        ("ViT-B-32", "openai"),
        ("ViT-B-32", None),
        ("local-dir:/a/b", None),
        ("hf-hub:owner/name", None),
    ]
