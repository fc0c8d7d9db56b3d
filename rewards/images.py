"""The one way from a sampler's output to the pixels that a reward sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

__all__ = ["to_pil", "to_pixels", "to_uint8"]

TOLERANCE = 0.05  # by which decoders may leave [0, 1]; more is another scale


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
    """N PIL images from (N, 3, H, W), N lists of frames from (N, F, 3, H, W); of a list each of its samples.

    Raises:
        ValueError: another shape.
    """
    if not torch.is_tensor(samples):
        return [to_pil(s[None])[0] if torch.is_tensor(s) else s for s in samples]
    pixels = to_uint8(samples).cpu()
    if pixels.ndim == 5:
        return [to_pil(frames) for frames in pixels]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"samples have shape {tuple(samples.shape)}; expected (N, 3, H, W) or (N, F, 3, H, W)")
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a.squeeze(-1) if a.shape[-1] == 1 else a) for a in arrays]


def to_pixels(samples: Any) -> tuple[list[Tensor], dict[int, str]]:
    """N samples as uint8 tensors where they are: images (3, H, W), videos (F, 3, H, W), each of its own size.

    Args:
        samples: (N, 3, H, W) or (N, F, 3, H, W), float in [0, 1] or uint8, one grey channel instead of three allowed;
            or a list of N such tensors without the first axis, PIL images (turned as their EXIF says), or lists of PIL
            frames.

    Returns:
        The samples, and row -> reason for those that are no picture: they hold NaN or infinity.

    Raises:
        ValueError: no samples, or a shape, type or range that is no image's.
        TypeError: something else than tensors and PIL images.
    """
    if not torch.is_tensor(samples) and not isinstance(samples, Sequence):
        raise TypeError(f"samples is a {type(samples).__name__}; give a tensor (N, 3, H, W) or a list of PIL images")
    if len(samples) == 0:
        raise ValueError("samples is empty; give at least one image")
    pixels, failed = [], {}
    for row, sample in enumerate(samples):
        if torch.is_tensor(sample) and sample.is_floating_point():
            low, high = (edge.item() for edge in sample.aminmax()) if sample.numel() else (0.0, 0.0)
            if not math.isfinite(high - low):
                failed[row] = "the sample holds NaN or infinity"
                sample = torch.zeros_like(sample)
            elif low < -TOLERANCE or high > 1 + TOLERANCE:
                raise ValueError(
                    f"samples holds values from {low:.3g} to {high:.3g}; give float in [0, 1], such as x / 2 + 0.5 of "
                    "what lies in [-1, 1], or uint8"
                )
        pixels.append(_pixels(sample))
    return pixels, failed


def _pixels(sample: Any) -> Tensor:
    if isinstance(sample, Image.Image):
        return pil_to_tensor(ImageOps.exif_transpose(sample).convert("RGB"))
    if isinstance(sample, Sequence) and sample and all(isinstance(frame, Image.Image) for frame in sample):
        return torch.stack([_pixels(frame) for frame in sample])
    if not torch.is_tensor(sample):
        raise TypeError(f"samples holds a {type(sample).__name__}; give tensors, PIL images, or lists of PIL frames")
    if sample.ndim not in (3, 4) or sample.shape[-3] not in (1, 3) or sample.numel() == 0:
        raise ValueError(
            f"samples holds a sample of shape {tuple(sample.shape)}; expected (3, H, W), or (F, 3, H, W) for a video"
        )
    return to_uint8(sample).expand(*sample.shape[:-3], 3, -1, -1)
