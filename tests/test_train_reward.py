"""Training a reward on previews: what is kept, the curriculum, interruptions, what it is worth, the command."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from contract.cases import PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from visearch import distill
from visearch.cli import main
from visearch.distill import Settings, Trajectories, choose_strengths, curriculum, loss, rescored, train
from visearch.pipelines.toy import GaussianToy
from visearch.pool import Pool
from visearch.preview_report import evaluate, levels, omega, rank_correlation, survival
from visearch.previews import Previews
from visearch.protocols import Request
from visearch.record import record
from visearch.rewards.base import ModelReward
from visearch.rewards.images import to_uint8
from visearch.rewards.noise_aware import NoiseAware
from visearch.train_reward import split

LINES = [{"prompt": f"a photo of {n} cows", "tag": ""} for n in range(2, 5)]
LEVELS = (-4.0, -2.0, 0.0, 3.0)  # of stages 1 to 4 of 5


# --- previews ---------------------------------------------------------------------------------------------------


class Seen(PixelReward):
    """Keeps what it is shown."""

    def score(self, samples: Tensor, prompts, **options):
        self.calls.append(to_uint8(samples))
        return super().score(samples, prompts, **options)


def test_kept_previews_are_what_the_reward_saw(tmp_path):
    previews, seen, toy = Previews(tmp_path), Seen(), GaussianToy(steps=3)
    pool = record(toy, [seen], LINES[:1], tmp_path, seeds=2, previews=previews)
    shown = [pixels for pixels in seen.calls if torch.is_tensor(pixels) and len(pixels) == 2]
    drawn = Trajectories.of(pool, LINES[:1], previews)
    assert drawn.ids == Request((LINES[0]["prompt"],)).prompt_ids
    assert drawn.levels == {stage: toy.noise_level(stage) for stage in (1, 2)}
    for stage, expected in zip((1, 2, 3), shown, strict=True):
        images, texts = drawn.batch([0], stage)
        assert torch.equal(torch.stack(images), expected) and texts == [LINES[0]["prompt"]] * 2
    np.testing.assert_array_equal(drawn.targets, pool.scores["pixel"][..., -1])


def test_trajectories_find_their_prompts_in_any_order_of_drawing(tmp_path):
    previews = Previews(tmp_path)
    pool = record(GaussianToy(steps=3), [PixelReward()], LINES, tmp_path, seeds=2, previews=previews, limit=2)
    drawn = Trajectories.of(pool, LINES, previews)
    ids = dict(zip((line["prompt"] for line in LINES), Request(tuple(line["prompt"] for line in LINES)).prompt_ids))
    assert drawn.ids == tuple(ids[prompt] for prompt in pool.prompts) and len(drawn.ids) == 2


def test_a_torn_file_of_previews_is_drawn_again_and_alone(tmp_path):
    previews = Previews(tmp_path)

    def draw() -> Pool:
        return record(GaussianToy(steps=3), [PixelReward()], LINES, tmp_path, seeds=2, previews=previews)

    first = draw()
    files = sorted(tmp_path.glob("previews-*"))
    whole, times = files[0].read_bytes(), [file.stat().st_mtime_ns for file in files]
    files[0].write_bytes(whole[: len(whole) // 2])
    files[1].unlink()
    again = draw()
    np.testing.assert_array_equal(first.scores["pixel"], again.scores["pixel"])
    assert files[0].read_bytes() == whole and files[1].is_file()
    assert files[2].stat().st_mtime_ns == times[2]


def test_large_previews_are_kept_as_rewards_resize_them(tmp_path):
    previews = Previews(tmp_path, side=32)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8))
    previews.save(7, previews.encode(3, [image, image.resize((20, 20))]))
    large, small = previews.load(7, 3, [0, 1])
    assert large.size == (64, 32) and small.size == (20, 20)
    np.testing.assert_array_equal(np.asarray(large), np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC)))
    assert 7 in previews and 8 not in previews
    with pytest.raises(ValueError, match="videos are not kept"):
        previews.encode(1, torch.zeros(1, 2, 3, 8, 8))


# --- the curriculum and the loss ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(3, 9), st.integers(1, 20), st.integers(1, 3), st.integers(2, 6))
def test_levels_open_from_the_second_last_towards_noise(stages, prompts, passes, group):
    steps = curriculum(range(1, stages + 1), prompts, Settings(passes, group))
    newest = [step.newest for step in steps]
    assert newest == sorted(newest, reverse=True)
    assert set(newest) == set(range(1, stages - 1))  # neither T nor T - 1
    for step in steps:
        assert step.older == step.newest == stages - 2 or step.newest < step.older <= stages - 2
        assert 0 <= len(step.rows) - len(step.others) <= 1
    for stage in set(newest):  # each pass sees every prompt once
        rows = [p for step in steps if step.newest == stage for p in (*step.rows, *step.others)]
        assert sorted(rows) == sorted([*range(prompts)] * passes)


def test_older_levels_come_alike_often():
    steps = curriculum(range(1, 7), 400, Settings(passes=2, group=2))
    counts = np.bincount([step.older for step in steps if step.newest == 1], minlength=5)
    assert counts[:2].sum() == 0 and counts[2:].min() > 0.8 * counts[2:].mean()


def test_stages_too_late_to_train_on_are_refused():
    with pytest.raises(ValueError, match=r"stages=\(9, 10\) hold none up to T - 2 = 8"):
        curriculum((9, 10), 4, Settings())


def test_loss_is_squared_error_and_pairs_within_a_prompt():
    values, targets = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 1.0], [5.0, 5.0]])
    error = (1 + 4 + 25 + 25) / 4
    assert loss(values, targets) == error
    # one pair counts: of the first prompt, in the wrong order by 2; ties and other prompts do not
    assert loss(values, targets, 0.5) == pytest.approx(error + 0.5 * math.log(1 + math.exp(2 / 0.5)))


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"group": 1}, {"pairs": -1}, {"rate": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        Settings(**wrong)


# --- training on toy previews -----------------------------------------------------------------------------------


class Brightness(ModelReward):
    """Mean of the image by a linear layer, so that training may learn where to look."""

    name, family, scale = "brightness", "pixel", "mean of the pixels"
    licence, source, revision = "Apache-2.0", "tests", "0"

    def __init__(self) -> None:
        self.path = None
        super().__init__()

    def _load(self) -> nn.Module:
        linear = nn.Linear(3 * 8 * 8, 1, bias=False)
        nn.init.constant_(linear.weight, 1 / linear.in_features)
        return linear

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        return self.module(torch.stack(images).float().flatten(1) / 255)[:, 0]


@pytest.fixture
def reward(monkeypatch) -> Brightness:
    monkeypatch.setattr("visearch.rewards.base.locate", lambda *args, **options: None)
    return Brightness()


def toy_trajectories(folder, prompts: int, seeds: int, seed: int, reward: Brightness) -> Trajectories:
    """Images of one brightness each; previews show it in the upper half alone, a distractor grows in the lower."""
    folder.mkdir(exist_ok=True)
    random, previews = np.random.default_rng(seed), Previews(folder)
    truth, scores = random.uniform(0.3, 0.7, (prompts, seeds)), np.zeros((prompts, seeds, 5), dtype=np.float32)
    for p in range(prompts):
        kept: dict[str, Tensor] = {}
        for j, blend in enumerate((0.9, 0.7, 0.4, 0.1, 0.0)):
            distractor = random.uniform(0, 1, seeds)
            pixels = np.broadcast_to(truth[p][:, None, None, None], (seeds, 8, 8, 3)).copy()
            pixels[:, 4:] = (1 - blend) * pixels[:, 4:] + blend * distractor[:, None, None, None]
            pixels += blend * random.normal(0, 0.1, pixels.shape)
            images = [Image.fromarray((255 * x).round().clip(0, 255).astype(np.uint8)) for x in pixels]
            kept |= previews.encode(j + 1, images)
            scores[p, :, j] = reward.score(images, "").values
        previews.save(p, kept)
    seconds = {"row": 1.0, "decode": 0.1, "brightness": 0.1}
    meta = {"noise_levels": list(LEVELS), "seconds": seconds}
    return Trajectories(Pool.from_arrays({"brightness": scores}, meta=meta), tuple(range(prompts)), previews)


FAST = Settings(passes=6, group=8, rate=1e-3)


def test_previews_rank_better_on_unseen_prompts_and_most_so_in_noise(reward, tmp_path):
    aware = NoiseAware(reward)
    train(aware, toy_trajectories(tmp_path / "seen", 24, 4, 0, reward), tmp_path, FAST)
    pool = rescored(aware, toy_trajectories(tmp_path / "unseen", 12, 8, 1, reward))
    noisy, *_, clean = levels(pool)
    assert noisy.gain.low > 0.2
    assert noisy.gap["brightness-noise-aware"] < noisy.gap["brightness"]
    assert clean.tau["brightness"] == clean.tau["brightness-noise-aware"] > 0.9  # T - 1 is the reward itself
    np.testing.assert_array_equal(pool.final("brightness"), pool.final("brightness-noise-aware"))


def test_strengths_are_those_that_rank_best_and_0_where_training_harmed(reward, tmp_path):
    """Differences that reverse the reward at every level are undone; with training's own, noise takes them whole."""
    seen, choosing = (toy_trajectories(tmp_path / n, 12, 8, i, reward) for i, n in enumerate(("seen", "choosing")))
    harmed = NoiseAware(reward)
    harmed.open(LEVELS[:3], 0.0, 1.0)
    (change,) = (tensor for name, tensor in harmed.differences.items() if name.endswith(".full"))
    change -= 8 / (3 * 8 * 8)
    found = choose_strengths(harmed, choosing)
    assert harmed.strengths == (0.0,) * 3 and all(taus[0.0] > taus[1.0] for taus in found.values())
    for stage in found:
        scores = rescored(harmed, choosing).scores
        np.testing.assert_array_equal(scores["brightness"][..., stage - 1], scores[harmed.name][..., stage - 1])
    taught = NoiseAware(reward)
    train(taught, seen, tmp_path, FAST)
    noisy, *_ = choose_strengths(taught, choosing).values()
    assert taught.strengths[0] > 0 and noisy[taught.strengths[0]] == max(noisy.values()) > noisy[0.0] + 0.1
    taught.save(tmp_path / "reward")
    again = NoiseAware(reward, tmp_path / "reward")
    assert again.strengths == taught.strengths and again.config_hash != NoiseAware(reward).config_hash


class Killed(Exception):
    pass


def test_an_interrupted_training_ends_as_one_that_was_not(reward, tmp_path, monkeypatch):
    drawn = toy_trajectories(tmp_path, 8, 3, 0, reward)
    whole, cut = NoiseAware(reward), NoiseAware(reward)
    expected = train(whole, drawn, tmp_path / "whole", FAST)
    monkeypatch.setattr(distill, "SAVE_EVERY", 4)
    batch, calls = Trajectories.batch, itertools.count()

    def dying(self, rows, stage):
        if next(calls) == 21:
            raise Killed
        return batch(self, rows, stage)

    monkeypatch.setattr(Trajectories, "batch", dying)
    with pytest.raises(Killed):
        train(cut, drawn, tmp_path / "cut", FAST)
    again = NoiseAware(reward)
    assert train(again, drawn, tmp_path / "cut", FAST) == expected
    assert next(calls) < 2 * 2 * len(expected), "it began anew"
    assert all(torch.equal(again.differences[name], whole.differences[name]) for name in whole.differences)


def test_a_checkpoint_of_other_settings_or_prompts_is_refused(reward, tmp_path):
    drawn = toy_trajectories(tmp_path, 4, 3, 0, reward)
    train(NoiseAware(reward), drawn, tmp_path, Settings(passes=1))
    with pytest.raises(ValueError, match=r"is of other settings: .*'pairs': 0.0.*, now .*'pairs': 1.*; delete it"):
        train(NoiseAware(reward), drawn, tmp_path, Settings(passes=1, pairs=1))
    fewer = Trajectories(drawn.pool.take(range(3)), drawn.ids[:3], drawn.previews)
    with pytest.raises(ValueError, match="is of other data"):
        train(NoiseAware(reward), fewer, tmp_path, Settings(passes=1))


# --- what it is worth ---------------------------------------------------------------------------------------------

TABLES = st.integers(3, 7).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(0, 4), min_size=size, max_size=size) for _ in range(2)])
)


@settings(deadline=None)
@given(TABLES)
def test_tau_b_is_what_counting_all_pairs_gives(table):
    a, b = (np.array(row, dtype=float) for row in table)
    pairs = list(itertools.combinations(range(len(a)), 2))
    signs = np.array([[np.sign(a[i] - a[j]), np.sign(b[i] - b[j])] for i, j in pairs])
    untied = (signs**2).sum(0)
    expected = signs.prod(1).sum() / np.sqrt(untied.prod()) if untied.all() else 0.0
    assert rank_correlation(a[None], b[None])[0] == pytest.approx(expected)


def test_the_best_survives_a_check_that_keeps_it():
    scores, finals = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[0.1, 0.5, 0.9, 0.2]])
    for share, survives, gap in ((0.05, False, 0.8), (0.5, False, 0.4), (0.74, False, 0.4), (0.75, True, 0.0)):
        alive, behind = survival(scores, finals, share)
        assert alive.tolist() == [survives] and behind == pytest.approx([gap])


def test_omega_is_0_for_best_of_n_and_100_for_twice_its_gain():
    budgets, base = [2, 4, 6, 8], [1.0, 2.0, 2.5, 3.0]
    assert omega(base, base, budgets) == 0
    assert omega([1 + 2 * (v - 1) for v in base], base, budgets) == pytest.approx(100)


def test_the_report_has_both_rewards_at_the_cost_of_each(reward, tmp_path):
    pool = rescored(NoiseAware(reward), toy_trajectories(tmp_path, 12, 16, 1, reward))
    report = evaluate(pool, [2, 4])
    text = report.markdown()
    assert len(report.levels) == 4 and report.levels[0].gain.mean == 0  # untrained
    for name in ("brightness", "brightness-noise-aware"):
        assert set(report.omegas[name]) >= {"best-of-n", "tuned"} and report.omegas[name]["best-of-n"] == 0
        assert f"| 4 | {name} |" in text
    price = report.calibrations["brightness-noise-aware"].pool["price"]
    assert price == pytest.approx(0.1 + pool.meta["seconds"]["brightness-noise-aware"])
    assert text.count("best-of-n(n=4)") == 1
    few = evaluate(pool.take(range(4)), [2, 4])
    assert "Too few prompts or seeds" in few.markdown() and len(few.levels) == 4


# --- the command --------------------------------------------------------------------------------------------------


def test_a_tenth_stays_unseen_and_equal_texts_together():
    lines = [{"prompt": f"prompt {i % 50}"} for i in range(100)]
    seen, unseen = split(lines)
    texts = [{line["prompt"] for line in part} for part in (seen, unseen)]
    assert not texts[0] & texts[1] and len(seen) + len(unseen) == 100 and 2 <= len(texts[1]) <= 10
    with pytest.raises(ValueError, match="of 1 prompts none is left"):
        split(lines[:1])


def command(tmp_path, *more: str) -> int:
    prompts, unseen = tmp_path / "prompts.txt", tmp_path / "unseen.txt"
    prompts.write_text("a photo of two cows\na photo of a red car\na photo of a blue clock\n")
    unseen.write_text("a photo of three boats\na photo of a chair\n")
    how = ["--model", "emoji-64-v", "--seeds", "2", "--unseen-seeds", "3", "--passes", "1", "--group", "2"]
    return main(
        ["train-reward", "--prompts", str(prompts), "--unseen", str(unseen), "--out", str(tmp_path), *how, *more]
    )


def test_the_command_draws_trains_and_evaluates_and_goes_on(tmp_path, capsys):
    assert command(tmp_path) == 0
    text = capsys.readouterr().out
    assert f"give --reward noise-aware:{tmp_path / 'reward'}" in text
    assert "Previews against finished images: emoji-clip, and trained" in text
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [level["stage"] for level in report["levels"]] == [1, 2, 3]
    files = {path: path.stat().st_mtime_ns for name in ("draws", "unseen") for path in (tmp_path / name).iterdir()}
    assert sum(path.name.startswith("previews-") for path in files) == 5
    trained = (tmp_path / "reward" / "differences.safetensors").read_bytes()
    assert command(tmp_path) == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}, "it drew again"
    assert (tmp_path / "reward" / "differences.safetensors").read_bytes() == trained
    assert command(tmp_path, "--rate", "0.01") == 2
    assert "checkpoint.pt is of other settings" in capsys.readouterr().err


def test_prompts_in_both_parts_are_refused_before_any_work(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of two cows\n")
    options = ["--prompts", str(prompts), "--unseen", str(prompts), "--out", str(tmp_path / "out")]
    assert main(["train-reward", *options]) == 2
    assert "shares 1 prompts with --prompts, 'a photo of two cows' for one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_prompts_are_refused_before_any_draw(tmp_path, capsys):
    prompts, unseen = tmp_path / "prompts.txt", tmp_path / "unseen.txt"
    prompts.write_text("a photo of two cows\na photo of a red car\n")
    unseen.write_text("a photo of a chair\n")
    options = ["--prompts", str(prompts), "--unseen", str(unseen), "--out", str(tmp_path / "out")]
    assert main(["train-reward", *options]) == 2
    assert "has too few prompts: one in 8 is kept to choose strengths by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_without_a_model_is_refused_before_any_draw(tmp_path, capsys):
    assert command(tmp_path, "--reward", "jpeg-size") == 2
    assert "has no model of images" in capsys.readouterr().err
    assert not (tmp_path / "draws").exists()
