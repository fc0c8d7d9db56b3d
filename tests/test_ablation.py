"""The scripts that ask whether gains add up: a generator follows its reward, and gains at equal cost are summed."""

from __future__ import annotations

import argparse
import importlib
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from visearch.pipelines import emoji
from visearch.rewards import resolve
from visearch.rewards.noise_aware import NoiseAware

pytest.importorskip("peft")
CALL = {**emoji.DEFAULTS, "num_inference_steps": 4}
TEXTS = ["a photo of two cows", "a photo of a red car"]
LINES = [{"prompt": text} for text in TEXTS]


@pytest.fixture(scope="module")
def scripts():
    """Imports a script by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "assets" / "build")
        yield importlib.import_module


@pytest.fixture(scope="module")
def tune(scripts):
    module = scripts("tune_generator")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BATCH": 2, "LAST": 2, "VARIANTS": 1}.items():
            patch.setattr(module, name, value)
        yield module


@pytest.fixture
def tuning(tune):
    return tune.Tuning(resolve("emoji-clip"), CALL)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the generator follows its reward ---------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 3])
def test_what_is_finished_with_gradients_ends_where_the_pipeline_does(tuning, last):
    kept = []
    options = {"generator": noise(), "output_type": "latent", **CALL}
    end = tuning.pipeline(TEXTS, callback_on_step_end=lambda p, i, t, k: kept.append(k["latents"]) or {}, **options)
    torch.testing.assert_close(tuning.finish(kept[-1 - last], TEXTS, last), end.images, rtol=0, atol=1e-4)
    plain = tuning.pipeline(TEXTS, output_type="pt", generator=noise(), **CALL).images
    torch.testing.assert_close(tuning.decode(end.images), plain, rtol=0, atol=1e-4)


def test_gradients_reach_the_lora_alone(tuning):
    assert not tuning.sample(TEXTS, noise()).requires_grad
    tuning.images(TEXTS, noise()).sum().backward()
    parts = (tuning.pipeline.transformer, tuning.pipeline.text_encoder, tuning.pipeline.vae, tuning.reward.module)
    reached = {name for part in parts for name, weight in part.named_parameters() if weight.grad is not None}
    assert len(reached) == len(tuning.weights) > 0 and all(".lora_" in name for name in reached)


def test_steps_raise_the_reward_of_the_same_noise(tune):
    tuning = tune.Tuning(resolve("emoji-clip"), CALL, rate=1e-3)
    losses = []
    for _ in range(5):
        tuning.step(LINES)  # always the first one, of the same noise
        losses += tuning.losses
        tuning.losses = []
    assert losses[-1] < losses[0] - 0.5  # rounding to bfloat16 makes up to .1


def test_resumed_is_as_if_uninterrupted(tune, tuning, tmp_path):
    tuning.step(LINES)
    tuning.rows = [{"step": 0, "judges": 0.5}]
    tuning.save(tmp_path / "checkpoint.pt")
    again = tune.Tuning(resolve("emoji-clip"), CALL)
    again.load(tmp_path / "checkpoint.pt")
    for one in (tuning, again):
        one.step(LINES)
    assert again.losses == tuning.losses and again.rows == tuning.rows
    assert all(torch.equal(a, b) for a, b in zip(tuning.weights, again.weights))


def test_the_merged_lora_is_the_one_that_was_trained(tune, tuning, tmp_path):
    with torch.no_grad():
        for weight in tuning.weights:
            weight += 0.05 * torch.randn(weight.shape, generator=noise())
    tuning.export(tmp_path / "40")
    (tmp_path / "card.json").write_text(json.dumps({"chosen": {"step": 40}}))
    options = {"generator": noise(), "output_type": "latent", **CALL}
    found = tune.fused(tmp_path / "40", torch.float32)(TEXTS, **options).images
    torch.testing.assert_close(found, tuning.sample(TEXTS, noise()), rtol=0, atol=1e-3)
    assert (found - emoji.load()(TEXTS, **{**options, "generator": noise()}).images).abs().max() > 0.1
    assert tune.tuned(tmp_path).transformer.dtype == torch.bfloat16


def test_it_ends_when_the_judges_have_liked_nothing_better_for_long(tune):
    liked = [0.5, 0.6, 0.55, 0.6, 0.5]
    ends = [tune.ended([{"judges": v} for v in liked[: n + 1]]) for n in range(len(liked))]
    assert ends == [False, False, False, False, True]


# --- sums of gains ----------------------------------------------------------------------------------------------

P, S = 20, 12


@pytest.fixture(scope="module")
def ablation(scripts):
    return scripts("evidence_ablation")


@pytest.fixture
def lines(ablation):
    """Builds the record of eight searches that beat best-of-8 by what ``gain`` says of (generator, guide, search)."""

    def build(gain, slower=lambda place: 1.0, n=lambda place: 8):
        rng = np.random.default_rng(0)
        pools = {generator: rng.normal(size=(P, S)) for generator in ablation.GENERATORS}
        found = []
        for place in product(ablation.GENERATORS, ablation.GUIDES, (ablation.BAR, *ablation.ENDS)):
            generator, guide, search = place
            for p in range(P):
                one = slower(place) * (1 + 0.1 * p)
                base = {"generator": generator, "guide": guide, "search": search, "prompt_id": str(p)}
                if search == ablation.BAR:
                    scores = pools[generator][p].tolist()
                    clock = {"n": [8, 12], "cpu": [8 * one, 12 * one]}
                    judges = dict.fromkeys(ablation.JUDGES, scores)
                    found.append(base | {"unit": "pool", "score": scores, "judges": judges, "one": 30, "clock": clock})
                    continue
                value = pools["plain"][p, : n(place)].max() + gain(place)
                judges = dict.fromkeys(ablation.JUDGES, value)
                found.append(base | {"score": value, "judges": judges, "seconds": n(place) * one})
        return found

    return build


def test_planted_gains_are_found_and_add_up(ablation, lines):
    worth = {"tuned": 1.0, "noise-aware": 0.5, "halving, refined": -0.25}

    def gain(place):
        return sum(worth.get(part, 0.0) for part in place) + 0.125 * (place == ablation.ALL)

    cells = ablation.cells_of(lines(gain))
    for place in product(ablation.GENERATORS, ablation.GUIDES, ablation.ENDS):
        found = ablation.gained(cells, {place: 1}, "judges")
        assert [found.mean, found.low, found.high] == pytest.approx([gain(place)] * 3)
    found = {name: ablation.gained(cells, weights, "score").mean for name, weights in ablation.QUESTIONS.items()}
    alone = {f"{name}, alone": value for name, value in worth.items()}
    assert found == pytest.approx(
        alone | {"sum of these": 1.25, "all three together": 1.375, "together, less the sum": 0.125}
    )


def test_neither_more_seconds_nor_a_slower_hour_is_a_gain(ablation, lines):
    slow = {"tuned": 3.0, "plain": 1.0}
    cells = ablation.cells_of(lines(lambda place: 0.0, lambda place: slow[place[0]], lambda place: 5 + len(place[1])))
    for place in product(ablation.GENERATORS, ablation.GUIDES, ablation.ENDS):
        assert cells[place].n == pytest.approx(min(S, 5 + len(place[1])))
        assert ablation.gained(cells, {place: 1}, "score").mean == pytest.approx(0, abs=1e-9)


def test_prompts_that_a_search_has_not_finished_are_in_no_cell(ablation, lines):
    some = [line for line in lines(lambda place: 0.0) if line["search"] != "halving" or line["prompt_id"] in "357"]
    assert {len(cell.seconds) for cell in ablation.cells_of(some).values()} == {3}
    with pytest.raises(ValueError, match="no prompt was finished by all eight searches"):
        ablation.cells_of([line for line in some if line["search"] != "halving"])


def test_the_report_warns_where_a_judge_falls(ablation, lines):
    some = lines(lambda place: 0.1)
    for line in some:
        if line["search"] == "halving" and line["generator"] == "tuned":
            line["judges"] = {judge: value - 0.3 for judge, value in line["judges"].items()}
    row = {"step": 40, "reward": 61.0, "judges": 0.6, "a": 0.6, "b": 0.7, "c": 0.5}
    text = ablation.report([{"seconds": 5, "rows": [{**row, "step": 0}, row], "chosen": row}, *some])
    assert "- reward hacking: tuned, plain, halving: emoji-clip rises while mean of the judges falls" in text
    assert "hacking: plain" not in text and "refined: emoji-clip rises" not in text
    assert "| 40 | 61.0 | 0.6 | 0.6 | 0.7 | 0.5 | taken |" in text


def test_all_eight_are_drawn_and_drawn_once(ablation, tune, tuning, tmp_path, monkeypatch):
    small = {"halving": "halving(n=2, calls=(1,), keep=(1,))", "halving, refined": "refine(first=best-of-n(n=1), "}
    small["halving, refined"] += "then=zero-order(n=1))"
    patched = {"BUDGET": 2, "POOL_SIZE": 2, "JUDGES": ("judge-a",), "RECORD": tmp_path / "record.jsonl"}
    for name, value in {**patched, "SEARCHES": dict.fromkeys(ablation.GUIDES, small)}.items():
        monkeypatch.setattr(ablation, name, value)
    monkeypatch.setattr(emoji, "DEFAULTS", CALL)
    tuning.export(tmp_path / "tuned" / "40")
    (tmp_path / "tuned" / "card.json").write_text(json.dumps({"chosen": {"step": 40}}))
    aware = NoiseAware(resolve("emoji-clip"))
    aware.open([-1.0, 2.0], 60.0, 5.0)
    aware.save(tmp_path / "aware")
    folders = {name: tmp_path / name for name in ("work", "tuned", "aware")}
    options = argparse.Namespace(**folders, limit=1, minutes=10.0)
    ablation.draw(options)
    card, *found = (json.loads(line) for line in ablation.RECORD.read_text().splitlines())
    assert card["chosen"]["step"] == 40 and len(found) == 4 * 3
    assert {place: len(cell.seconds) for place, cell in ablation.cells_of(found).items()} == dict.fromkeys(
        product(ablation.GENERATORS, ablation.GUIDES, (ablation.BAR, *ablation.ENDS)), 1
    )
    assert str(tmp_path) not in ablation.RECORD.read_text()
    options.minutes = 0.0
    before = ablation.RECORD.read_text()
    ablation.draw(options)
    assert ablation.RECORD.read_text() == before
