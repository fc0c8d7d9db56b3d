"""The one way from a sampler's output to the pixels that a reward sees."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["to_pil", "to_uint8"]


def to_uint8(samples: Tensor) -> Tensor:
    """Float [0, 1] to uint8 by ``round(255 x)``, clamped; uint8 is passed through. Any shape.

    Raises:
        ValueError: neither floating point nor uint8.
    """
    if samples.dtype == torch.uint8:
        return samples
    if not samples.is_floating_point():
        raise ValueError(f"samples are {samples.dtype}; give float in [0, 1] or uint8")
    return (samples.float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_pil(samples: Any) -> list[Any]:
    """N PIL images from (N, 3, H, W), N lists of frames from (N, F, 3, H, W); lists of PIL images are passed through.

    Raises:
        ValueError: another shape.
    """
    if not torch.is_tensor(samples):
        return list(samples)
    pixels = to_uint8(samples).cpu()
    if pixels.ndim == 5:
        return [to_pil(frames) for frames in pixels]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"samples have shape {tuple(samples.shape)}; expected (N, 3, H, W) or (N, F, 3, H, W)")
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]
