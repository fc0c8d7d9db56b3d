"""Noise-aware rewards: nothing changes at the clean end or untrained; what training may change, files, names."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_rewards_image_reward import Tiny, folder, weights  # noqa: F401 - fixtures of a tiny ImageReward
from torch import nn

from visearch import assets
from visearch.pool import Pool
from visearch.preview_report import levels
from visearch.rewards import resolve
from visearch.rewards.function import FunctionReward
from visearch.rewards.noise_aware import CONFIG, WEIGHTS, NoiseAware, gate

LEVELS = (-3.0, -1.0, 2.0)
PROMPTS = ["a photo of a red cow", "a photo of a blue cow", "a photo of a cow"]


@pytest.fixture(params=["emoji-clip", "image-reward"])
def reward(request, folder):  # noqa: F811
    return resolve("emoji-clip") if request.param == "emoji-clip" else Tiny(folder)


@pytest.fixture
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in PROMPTS]


def perturbed(reward, size: float = 0.05) -> NoiseAware:
    """As if trained: every difference random."""
    aware = NoiseAware(reward)
    aware.open(LEVELS, 1.0, 2.0)
    random = torch.Generator().manual_seed(1)
    for tensor in aware.differences.values():
        tensor += size * torch.randn(tensor.shape, generator=random)
    return aware


@settings(deadline=None)
@given(st.floats(-1e6, 1e6))
def test_the_gate_falls_from_1_in_noise_to_exactly_0_at_the_clean_end(level):
    assert 0 <= gate(level) <= 1
    assert gate(level) >= gate(level + 1)
    assert gate(math.inf) == 0.0 and gate(-math.inf) == 1.0
    sigma = gate(-1.3)  # of flow matching: log-SNR 2 log((1 - sigma) / sigma)
    assert 2 * math.log((1 - sigma) / sigma) == pytest.approx(-1.3)


def test_untrained_is_the_reward_at_every_level_bit_for_bit(reward, images):
    aware, expected = NoiseAware(reward), reward.score(images, PROMPTS).values
    assert torch.equal(aware.score(images, PROMPTS, noise_level=0.5).values, expected)
    aware.open(LEVELS, 3.0, 2.0)
    for level in (*LEVELS, 0.1):
        assert aware.covers(level)
        assert torch.equal(aware.score(images, PROMPTS, noise_level=level).values, expected)


def test_trained_is_the_reward_where_it_was_not_trained_bit_for_bit(reward, images):
    expected, aware = reward.score(images, PROMPTS).values, perturbed(reward)
    for level in (None, math.inf, 2.001, -3.001, -math.inf):
        assert torch.equal(aware.score(images, PROMPTS, noise_level=level).values, expected)
    noisy = aware.score(images, PROMPTS, noise_level=-1.0).values
    assert not torch.isclose(noisy, expected).any()
    assert torch.equal(reward.score(images, PROMPTS).values, expected), "the reward itself was changed"


def test_more_noise_changes_more(reward, images):
    aware = perturbed(reward, 1e-3)
    for name in ("value.scale", "value.shift"):
        aware.differences[name].zero_()
    expected = reward.score(images, PROMPTS).values
    little, much = (aware.score(images, PROMPTS, noise_level=v).values - expected for v in (2.0, -3.0))
    assert 0 < little.abs().max() < much.abs().max()


def test_levels_in_any_order_score_the_same(reward, images):
    aware, again = perturbed(reward), perturbed(reward)
    alone = {level: again.score(images, PROMPTS, noise_level=level).values for level in LEVELS}
    for level in (*LEVELS, *LEVELS[::-1]):
        assert torch.equal(aware.score(images, PROMPTS, noise_level=level).values, alone[level])


def test_scale_and_shift_are_interpolated_between_levels(reward, images):
    aware, expected = NoiseAware(reward), reward.score(images, PROMPTS).values
    aware.open(LEVELS, 1.0, 2.0)
    aware.differences["value.scale"] += torch.tensor([0.5, 0.0, -0.5])
    aware.differences["value.shift"] += torch.tensor([0.0, 1.0, 0.0])
    for level, scale, shift in ((-3.0, 0.5, 0.0), (-1.0, 0.0, 1.0), (2.0, -0.5, 0.0), (-2.0, 0.25, 0.5)):
        found = aware.score(images, PROMPTS, noise_level=level).values
        torch.testing.assert_close(found, expected + scale * (expected - 1) + 2 * shift)


def test_one_trained_level_is_enough(reward, images):
    aware, expected = NoiseAware(reward), reward.score(images, PROMPTS).values
    aware.open([0.5], 0.0, 1.0)
    aware.differences["value.shift"] += 3.0
    torch.testing.assert_close(aware.score(images, PROMPTS, noise_level=0.5).values, expected + 3)


def test_gradients_reach_every_difference_and_no_weight(reward, images):
    aware = perturbed(reward)
    for tensor in aware.differences.values():
        tensor.requires_grad_(True)
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    estimate = aware.estimate(pixels, PROMPTS, -2.0)
    torch.testing.assert_close(estimate.detach(), aware.score(images, PROMPTS, noise_level=-2.0).values)
    estimate.square().sum().backward()
    assert [name for name, tensor in aware.differences.items() if tensor.grad is None] == []
    assert all(weight.grad is None and not weight.requires_grad for weight in reward.module.parameters())


def test_training_between_two_scores_is_seen(reward, images):
    aware = perturbed(reward)
    before = aware.score(images, PROMPTS, noise_level=-1.0).values
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    aware.estimate(pixels, PROMPTS, -1.0)
    for tensor in aware.differences.values():
        tensor *= 2
    assert not torch.equal(aware.score(images, PROMPTS, noise_level=-1.0).values, before)


def test_only_what_sees_the_image_changes_and_no_embedding(reward):
    changed = {name.rsplit(".", 1)[0] for name in NoiseAware(reward).differences}
    embeddings = {f"{name}.weight" for name, part in reward.module.named_modules() if isinstance(part, nn.Embedding)}
    assert embeddings and not changed & embeddings
    if reward.name == "emoji-clip":
        assert all(".visual." in name for name in changed)
    else:
        assert {name.split(".")[0] for name in changed} == {"vision", "text", "head"}


@pytest.mark.parametrize("rank", [1, 4])
def test_differences_are_low_rank_where_that_is_smaller(reward, rank):
    aware, weights = NoiseAware(reward, rank=rank), dict(reward.module.named_parameters())  # noqa: F811
    for name, tensor in aware.differences.items():
        weight = weights[name.rsplit(".", 1)[0]]
        if name.endswith(".full"):
            assert tensor.shape == weight.shape
        else:
            assert rank in tensor.shape and 2 * tensor.numel() < 2 * weight.numel()
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        NoiseAware(reward, rank=0)


def test_saved_and_loaded_scores_the_same(reward, images, tmp_path):
    aware = perturbed(reward)
    aware.save(tmp_path)
    again = NoiseAware(reward, tmp_path)
    assert again.levels == LEVELS and again.rank == 16 and again.source == str(tmp_path)
    for level in LEVELS:
        scores = (a.score(images, PROMPTS, noise_level=level).values for a in (aware, again))
        torch.testing.assert_close(*scores, rtol=1e-2, atol=1e-2)  # half precision
    assert again.config_hash != NoiseAware(reward).config_hash


@pytest.mark.parametrize("trained_on", [((-3.0, -1.0, 2.5), 1.0, 2.0), (LEVELS, 1.5, 2.0), (LEVELS, 1.0, 2.5)])
def test_equal_differences_of_other_levels_or_values_are_another_reward(trained_on):
    aware, other = (NoiseAware(resolve("emoji-clip")) for _ in range(2))
    aware.open(LEVELS, 1.0, 2.0)
    other.open(*trained_on)
    assert aware.config_hash != other.config_hash
    other.open(LEVELS, 1.0, 2.0)
    assert aware.config_hash == other.config_hash


def test_a_folder_of_another_reward_is_refused(reward, tmp_path):
    aware = perturbed(reward)
    aware.save(tmp_path)
    facts = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**facts, "revision": "0" * 64}))
    with pytest.raises(ValueError, match=r"was trained on .* of weights 000000000000, this is .* train again"):
        NoiseAware(reward, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks noise_aware.json or .*; visearch train-reward writes them"):
        NoiseAware(reward, tmp_path / "nothing")


def test_a_folder_names_its_reward(images, tmp_path):
    perturbed(resolve("emoji-clip")).save(tmp_path)
    aware = resolve(f"noise-aware:{tmp_path}")
    assert aware.name == "emoji-clip-noise-aware" and aware.noise_aware and "noise_level" in aware.needs
    assert aware.covers(0.0) and not aware.covers(3.0)
    assert aware.score(images, PROMPTS, noise_level=0.0).values.shape == (3,)


def test_a_reward_without_a_model_is_refused():
    with pytest.raises(ValueError, match="'brightness' has no model of images"):
        NoiseAware(FunctionReward(lambda images, prompts: [0.0] * len(images), name="brightness"))


def test_a_reward_that_is_better_when_lower_is_refused(reward):
    reward.higher_is_better = False
    with pytest.raises(ValueError, match="is better when lower; give its negative"):
        NoiseAware(reward)


def test_the_shipped_one_is_what_its_card_says(images):
    shipped = assets.path("emoji-64/clip-noise-aware")
    card = json.loads((shipped / "card.json").read_text())
    assert card["sha256"] == sha256((shipped / WEIGHTS).read_bytes()).hexdigest()
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 4e6
    aware, plain = resolve("emoji-clip-noise-aware"), resolve(card["reward"])
    assert len(aware.levels) == len(card["training"]["stages"])
    clean, noisy = (aware.score(images, PROMPTS, noise_level=level).values for level in (math.inf, aware.levels[0]))
    assert torch.equal(clean, plain.score(images, PROMPTS).values) and not torch.isclose(clean, noisy).any()


def test_the_shipped_one_ranks_previews_of_report_prompts_better_than_untrained():
    """In the committed record, at the third to fifth of 15 steps."""
    pool = Pool.load(Path(__file__).parents[1] / "assets" / "results" / "pool-noise-aware.parquet")
    early = [of for of in levels(pool) if 3 <= of.stage <= 5]
    assert len(early) == 3 and all(of.gain.low > 0 and of.gain.clusters == 100 for of in early)
