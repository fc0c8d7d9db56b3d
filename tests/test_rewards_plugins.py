"""Rewards from outside: by import path, and the check that finds the ones that break the contract."""

from __future__ import annotations

import sys

import pytest
import torch

from visearch.protocols import RewardError, Scores
from visearch.rewards import check, resolve
from visearch.rewards.function import FunctionReward

SOURCE = """
import torch
from visearch.protocols import Scores

class Brightness:
    name, higher_is_better, range = "brightness", True, (0.0, 255.0)
    licence, source, needs = "none", "here", frozenset({"pixels"})

    def __init__(self, scale=1.0, device=None):
        self.scale, self.device = scale, device

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        return Scores(self.scale * torch.as_tensor(samples).flatten(1).mean(1))

def area(images, prompts):
    return [image.width * image.height for image in images]

def made(power, **options):
    return lambda images, prompts: [image.width**power for image in images]

number = 3
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch) -> str:
    """A module of the user's, on the path."""
    (tmp_path / "user_rewards.py").write_text(SOURCE)
    (tmp_path / "user_broken.py").write_text("import a_library_that_is_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_rewards"
    sys.modules.pop("user_rewards", None)


def test_a_class_is_made_on_the_device_with_its_options(plugins):
    assert resolve(f"{plugins}:Brightness", "meta").device == "meta"
    reward = resolve({"class": f"{plugins}:Brightness", "scale": 0.5, "device": "cpu"}, "meta")
    assert (reward.scale, reward.device) == (0.5, "cpu")
    assert reward.score(torch.ones(2, 3, 4, 4), ["a", "b"]).values.tolist() == [0.5, 0.5]


def test_functions_score_and_functions_with_options_make_rewards(plugins):
    images = torch.rand(1, 3, 4, 5)
    area = resolve(f"{plugins}:area")
    assert isinstance(area, FunctionReward) and area.name == "area"
    assert area.score(images, "a").values.tolist() == [20.0]
    assert resolve({"class": f"{plugins}:made", "power": 2}).score(images, "a").values.tolist() == [25.0]


def test_a_path_is_a_term_of_an_ensemble(plugins):
    both = resolve(f"{plugins}:area + 2 * {plugins}:Brightness")
    assert both.score(torch.ones(1, 3, 4, 5), ["a"]).values.tolist() == [22.0]


@pytest.mark.parametrize(
    ("reward", "error", "said"),
    [
        ("user_reward:area", ValueError, r"no module 'user_reward'.*PYTHONPATH"),
        ("user_broken:area", ValueError, r"no module 'a_library_that_is_not_here'"),
        ("user_rewards:aria", ValueError, r"user_rewards has no 'aria'; did you mean area\?"),
        ("user_rewards:number", TypeError, r"reward=3 is a int"),
        ({"path": "user_rewards:area"}, ValueError, r"'class' must be"),
        ({"class": "area"}, ValueError, r"'class' must be"),
        ({"class": "user_rewards:Brightness", "scales": 2}, TypeError, r"scales"),
    ],
)
def test_what_cannot_be_found_is_named(plugins, reward, error, said):
    with pytest.raises(error, match=said):
        resolve(reward)


# --- the contract -----------------------------------------------------------------------------------------------


class Mean:
    """Mean pixel of each image: a reward without fault."""

    name, higher_is_better, range = "mean", True, (0.0, 1.0)
    licence, source, needs = "none", "here", frozenset({"pixels"})

    def values(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1).mean(1)

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        if not torch.is_tensor(samples):
            samples = torch.stack([torch.tensor(list(s.tobytes())).float() / 255 for s in samples])
        return Scores(self.values(samples))


class Unordered(Mean):
    def values(self, pixels):
        return super().values(pixels).sort().values


class Relative(Mean):
    def values(self, pixels):
        values = super().values(pixels)
        return (values - values.min()) / 10 + 0.1 * (len(values) == 1)


class Drifting(Mean):
    calls = 0

    def values(self, pixels):
        self.calls += 1
        return super().values(pixels) * (1 - 0.01 * self.calls)


class Short(Mean):
    def values(self, pixels):
        return super().values(pixels)[1:]


class Broken(Mean):
    def values(self, pixels):
        return super().values(pixels).index_fill(0, torch.tensor(0), float("nan"))


class Percent(Mean):
    def values(self, pixels):
        return 100 * super().values(pixels)


class Constant(Mean):
    def values(self, pixels):
        return 0 * super().values(pixels)


class Painting(Mean):
    def values(self, pixels):
        return super().values(pixels.mul_(0.5))


class Rescaled(Mean):
    """Takes pixels of PIL images for another scale than those of tensors."""

    def score(self, samples, prompts, **more):
        return Scores(super().score(samples, prompts).values * (1 if torch.is_tensor(samples) else 0.5))


class Bare(Mean):
    def score(self, samples, prompts, **more):
        return super().score(samples, prompts).values


@pytest.mark.parametrize(
    ("reward", "fault"),
    [
        (Unordered, "in another order"),
        (Relative, "one by one"),
        (Drifting, "again"),
        (Short, r"shape \(4,\) for 5"),
        (Broken, "sample 0 nan: no reason"),
        (Percent, r"leaves its range \(0.0, 1.0\)"),
        (Constant, "scored all samples"),
        (Painting, "changed the samples"),
        (Rescaled, "as PIL images"),
        (Bare, "returned Tensor"),
    ],
)
def test_each_fault_is_found_by_its_name(reward, fault):
    with pytest.raises(RewardError, match=fault):
        check(reward())


def test_a_reward_without_fault_and_functions_pass():
    check(Mean())
    check(lambda images, prompts: [sum(image.tobytes()) for image in images])


def test_samples_and_metadata_of_ones_own_are_used():
    class Metadata(Mean):
        def score(self, samples, prompts, *, noise_level=None, metadata=None):
            return Scores(torch.tensor([m["value"] for m in metadata]))

    check(Metadata(), torch.rand(2, 3, 8, 8), ["a", "b"], metadata=[{"value": 0.1}, {"value": 0.2}])
    with pytest.raises(RewardError, match="scored all samples"):
        check(Metadata(), torch.rand(2, 3, 8, 8), ["a", "b"], metadata=[{"value": 0.1}, {"value": 0.1}])
