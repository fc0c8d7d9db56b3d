"""What images look like, as vectors to compare them by: similar ones have a large cosine.

Features are plain callables: N samples, as a reward gets them, to (N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visearch.protocols import Reward
from visearch.rewards.images import to_pil

__all__ = ["Features", "FeaturesLike", "resolve_features", "thumbnails"]

Features = Callable[[Any], Tensor]
FeaturesLike = str | Features

SIDE = 8  # pixels of a thumbnail
FRAMES = 4  # of a video


def thumbnails(samples: Any) -> Tensor:
    """Colours and layout, without any weights: pixels of 8 x 8 thumbnails around mid-grey, in [-0.5, 0.5].

    Returns:
        (N, 192); of videos, four frames from first to last, (N, 768).
    """
    made = [_thumbnail(sample) for sample in to_pil(samples)]
    return torch.from_numpy(np.stack(made))


def _thumbnail(sample: Any) -> np.ndarray:
    if isinstance(sample, list):
        frames = np.linspace(0, len(sample) - 1, FRAMES).round().astype(int)
        return np.concatenate([_thumbnail(sample[i]) for i in frames])
    small = sample.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).flatten() / 255 - 0.5


def resolve_features(features: FeaturesLike | None, reward: Reward, device: Any = "cpu") -> Features:
    """Features from their name, or any callable.

    Args:
        features: ``"thumbnails"``; a name of a reward that has an image encoder; a function of N samples; ``None`` is
            the image encoder of ``reward``, or thumbnails if it has none.
        reward: the one that guides.
        device: where a named encoder runs.

    Raises:
        ValueError: an unknown name, or a reward without an image encoder.
        TypeError: neither a name nor a callable.
    """
    from visearch.rewards import resolve

    if features is None:
        return getattr(reward, "image_features", thumbnails)
    if features == "thumbnails":
        return thumbnails
    if isinstance(features, str):
        encoder = getattr(resolve(features, device), "image_features", None)
        if encoder is None:
            raise ValueError(
                f"features={features!r}: this reward has no image encoder; use 'thumbnails', 'emoji-clip', "
                "open-clip:MODEL/PRETRAINED, or a function of N samples that returns (N, D)"
            )
        return encoder
    if callable(features):
        return features
    raise TypeError(f"features={features!r} is a {type(features).__name__}; give a name or a function of N samples")
