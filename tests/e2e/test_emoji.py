"""The embedded world as a newcomer meets it: what the README shows, run for real."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogView4Pipeline, DiffusionPipeline, PixArtSigmaPipeline
from PIL import Image, ImageChops

from visearch import BestOfN, SearchPipeline, assets
from visearch.cli import main
from visearch.pipelines import emoji

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def pipe():
    return emoji.load()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_a_stock_pipeline_whose_bare_call_works():
    pipe = DiffusionPipeline.from_pretrained(assets.path("emoji-64/pipeline"))
    assert type(pipe) is CogView4Pipeline
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of two cows", generator=seeded()).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 10


def test_sizes_are_within_their_quotas():
    def megabytes(*names: str) -> float:
        files = [f for name in names for f in assets.path(f"emoji-64/{name}").rglob("*") if f.is_file()]
        return sum(f.stat().st_size for f in files) / 1e6

    assert megabytes("pipeline") <= 14 and megabytes("pipeline-v") <= 8
    assert megabytes("clip") <= 4 and megabytes("judge-a", "judge-b") <= 3


def test_a_batch_is_its_rows_and_one_candidate_is_the_plain_call(pipe):
    plain = pipe("a photo of a red car", generator=seeded(3), output_type="pt", **emoji.DEFAULTS).images
    found = SearchPipeline(pipe, "emoji-clip", BestOfN(n=1))(
        "a photo of a red car", generator=seeded(3), output_type="pt", **emoji.DEFAULTS
    )
    assert torch.equal(plain, found.images)


def test_the_second_model_predicts_v_in_four_steps_and_shares_the_rest(pipe):
    second, call = emoji.load_v(), emoji.CALLS["emoji-64-v"]
    assert type(second) is PixArtSigmaPipeline and second.scheduler.config.prediction_type == "v_prediction"
    for part in ("vae", "text_encoder"):
        ours, theirs = (getattr(p, part).state_dict() for p in (second, pipe))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    image = second("a photo of two cows", generator=seeded(), **call).images[0]
    assert image.size == (64, 64) and np.asarray(image).std() > 10
    options = {"output_type": "pt", **call}
    plain = second("a photo of a red car", generator=seeded(3), **options).images
    once = SearchPipeline(second, "emoji-clip", BestOfN(n=1))("a photo of a red car", generator=seeded(3), **options)
    assert torch.equal(plain, once.images)
    searched = SearchPipeline(second, "emoji-clip", "halving(n=8, calls=(2,), keep=(4,))")(
        "a photo of a red car", generator=seeded(3), **options
    )
    assert searched.search.ledger.nfe == 8 * 2 + 4 * 2
    assert searched.search.ranking[0]["score"] > once.search.ranking[0]["score"]


def test_the_clip_prefers_the_right_picture(pipe):
    """Eight cars and eight cows: the mean score of each prompt is higher on its own pictures."""
    from visearch.rewards import resolve

    prompts = ("a photo of a car", "a photo of a cow")
    reward = resolve("emoji-clip")
    call = {"num_images_per_prompt": 8, "output_type": "pt", **emoji.DEFAULTS}
    images = [pipe(p, generator=seeded(1), **call).images for p in prompts]
    scores = [[reward.score(i, [p] * 8).values.mean().item() for p in prompts] for i in images]
    assert scores[0][0] > scores[0][1] and scores[1][1] > scores[1][0]


def test_the_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    offline = next(b for b in blocks if "emoji.load" in b)
    names: dict = {}
    exec(offline, names)
    assert names["image"].size == (64, 64)
    online = next(b for b in blocks if "stable-diffusion-xl" in b)
    assert len(online.strip().splitlines()) <= 6
    compile(online, "README.md", "exec")


def test_run_and_the_winner_again(tmp_path, capsys):
    words = ["run", "a photo of two cows", "--n", "4", "--seed", "2", "--held-out", "judge-a", "--held-out", "judge-b"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert "| judge-a | held out |" in capsys.readouterr().out
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert set(result["winner"]["held_out"]) == {"judge-a", "judge-b"}
    assert main([*shlex.split(result["winner_command"])[1:], "--out", str(tmp_path / "two")]) == 0
    a, b = (Image.open(tmp_path / folder / "winner.png") for folder in ("one", "two"))
    assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 1


def test_a_verdict_needs_the_benchmarks_wording(tmp_path, capsys):
    words = ["run", "two happy cows", "--n", "2", "--held-out", "judge-a", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "GenEval's wording" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_shows_once_and_searched_before_the_judges(tmp_path, capsys):
    assert main(["demo", "--n", "3", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "judge A" in shown and "own error" in shown
    content = json.loads((tmp_path / "demo.json").read_text())
    assert len(content["rows"]) == 12
    assert all(r["reward"][1] >= r["reward"][0] for r in content["rows"])
    assert Image.open(tmp_path / "comparison.png").width > 1000
    assert len(list(tmp_path.glob("contact-sheet-*.png"))) == 3
