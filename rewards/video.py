"""Rewards of images on videos.

Shapes: N videos of F frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from visearch.protocols import Reward, Scores
from visearch.rewards.base import BaseReward, texts_for

__all__ = ["VideoMean"]

DESCRIBED = (
    "family", "higher_is_better", "range", "scale", "licence", "source", "training_data", "size", "needs",
    "needs_prompt", "noise_aware", "not_held_out_for",
)  # fmt: skip


class VideoMean(BaseReward):
    """Mean of an image reward over frames from first to last; a video is NaN if any of them is.

    It does not see motion: of two orders of the same frames none is better.

    Args:
        reward: what scores the frames, as for ``SearchPipeline``.
        frames: how many, evenly spaced; all of a shorter video.
        device: where a reward that is given by name runs.

    Raises:
        ValueError: no reward, one of videos, one whose scores are relative, or ``frames`` below 1.
    """

    name = "video-mean"
    family = ""
    modality = "video"
    scale = "mean of an image reward over frames"
    licence = source = training_data = "as of the reward of the frames"

    def __init__(self, reward: Any = None, *, frames: int = 8, device: torch.device | str = "cpu") -> None:
        from visearch.rewards import resolve

        if reward is None:
            raise ValueError("video-mean needs the reward of its frames; write video-mean:NAME, or give reward=")
        if frames < 1:
            raise ValueError(f"frames={frames} must be at least 1")
        self.reward, self.frames = resolve(reward, device), frames
        if getattr(self.reward, "modality", "image") == "video" or getattr(self.reward, "relative", False):
            raise ValueError(f"reward={self.reward.name!r} cannot be averaged over frames; give one of single images")
        self.name = f"video-mean:{self.reward.name}"
        for name in DESCRIBED:
            if hasattr(self.reward, name):
                setattr(self, name, getattr(self.reward, name))

    @property
    def scored_by(self) -> Reward:
        """The reward of the frames: a judge of its families is none of this one's."""
        return self.reward

    def resident(self) -> AbstractContextManager[None]:
        return getattr(self.reward, "resident", nullcontext)()

    def score(
        self,
        samples: Any,
        prompts: str | Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N videos, (N, F, 3, H, W) or lists of frames; all their frames go to the reward at once."""
        videos, failed = self._images(samples)
        texts = texts_for(prompts, len(videos))
        picked = [torch.linspace(0, len(v) - 1, min(self.frames, len(v))).round().long().tolist() for v in videos]
        rows = [i for i, frames in enumerate(picked) for _ in frames]
        scores = self.reward.score(
            [video[f] for video, frames in zip(videos, picked, strict=True) for f in frames],
            [texts[i] for i in rows],
            noise_level=noise_level,
            metadata=metadata and [metadata[i] for i in rows],
        )
        means = torch.stack([part.mean() for part in scores.values.split([len(frames) for frames in picked])])
        reasons = {rows[k]: f"a frame: {reason}" for k, reason in scores.reasons.items()} | failed
        return Scores(means.index_fill(0, torch.tensor(list(failed), dtype=torch.long), math.nan), reasons=reasons)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "reward": self.reward.config_hash, "frames": self.frames}
