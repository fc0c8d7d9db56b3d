"""The mean of an image reward over frames."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import FAMILIES, PROMPT, build

from visearch import BestOfN, SearchPipeline
from visearch.protocols import Scores
from visearch.rewards import check, resolve
from visearch.rewards.video import VideoMean


class Level:
    """Mean pixel, the level and what metadata adds; keeps the batches that it saw."""

    name, higher_is_better, range = "level", False, (0.0, 2.0)
    licence, source, needs = "none", "here", frozenset({"pixels", "noise_level", "metadata"})

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        self.batches.append(len(samples))
        values = torch.stack([s.float().mean() / 255 for s in samples]) + (noise_level or 0)
        return Scores(values + torch.tensor([m["add"] if m else 0.0 for m in metadata or [None] * len(samples)]))


def clip(frames: int) -> torch.Tensor:
    """(F, 3, 4, 4) whose frame k has brightness k / 100."""
    return (torch.arange(frames) / 100)[:, None, None, None].expand(-1, 3, 4, 4)


@pytest.mark.parametrize(
    ("count", "seen"), [(1, [0]), (5, range(5)), (8, range(8)), (15, range(0, 15, 2)), (29, range(0, 29, 4))]
)
def test_eight_frames_from_first_to_last(count, seen):
    [value] = VideoMean(Level()).score(clip(count)[None], "a").values.tolist()
    shades = [round(255 * k / 100) / 255 for k in seen]
    assert value == pytest.approx(sum(shades) / len(shades), abs=1e-6)


def test_all_frames_of_a_batch_go_to_the_reward_at_once_with_what_belongs_to_them():
    inner = Level()
    reward = VideoMean(inner, frames=2)
    videos = [clip(3), clip(1), clip(9)]
    values = reward.score(videos, ["a", "b", "c"], noise_level=0.5, metadata=[None, {"add": 1.0}, None]).values
    assert inner.batches == [5]
    assert values.tolist() == pytest.approx([0.5 + 2.5 / 255, 1.5, 0.5 + 10 / 255], abs=1e-6)
    assert not reward.higher_is_better and reward.range == (0.0, 2.0) and reward.needs == inner.needs


def test_one_bad_frame_fails_its_video():
    def above_half(images, prompts):
        return [math.nan if image.getpixel((0, 0))[0] == 0 else 1.0 for image in images]

    broken = torch.ones(3, 4, 3, 4, 4)
    broken[1, 0] = 0
    broken[2, 1] = math.nan
    scores = VideoMean(above_half).score(broken, "a")
    assert scores.values.tolist() == pytest.approx([1, math.nan, math.nan], nan_ok=True)
    assert "NaN or infinity" in scores.reasons[2]


def test_it_keeps_the_contract_of_rewards():
    check("video-mean:jpeg-size")


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="video-mean:NAME"):
        resolve("video-mean")
    with pytest.raises(ValueError, match="frames=0"):
        VideoMean(Level(), frames=0)
    with pytest.raises(ValueError, match=r"video-mean:jpeg-size.*single images"):
        resolve("video-mean:video-mean:jpeg-size")
    with pytest.raises(ValueError, match="scores videos, and samples holds images"):
        resolve("video-mean:jpeg-size").score(torch.rand(2, 3, 8, 8), "a")


def test_a_video_pipeline_is_searched_by_it():
    pipe = SearchPipeline(build("wan"), reward="video-mean:jpeg-size", search=BestOfN(n=2))
    found = pipe(PROMPT, **FAMILIES["wan"].call, num_inference_steps=2, output_type="pt").search
    scores = [row["score"] for row in found.ranking]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1] > 0
