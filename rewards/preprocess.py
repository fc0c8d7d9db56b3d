"""From pixels to what an image encoder takes, in the very steps of its training, where the pixels are.

Encoders were trained on images that Pillow resized. :func:`resize` gives Pillow's own bits on an accelerator too, so
that a decoded tensor is scored there like the PNG that is made of it.

Shapes: n images, (H, W) as given, S the side that the encoder takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from visearch.rewards.images import to_pil

__all__ = ["CLIP_MEAN", "CLIP_STD", "Preprocess", "resize"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FITS = ("crop", "stretch", "pad")
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
PRECISION = 22  # bits of Pillow's fixed-point weights: 32, less 8 of a pixel and 2 of overshoot


@dataclass(frozen=True)
class Preprocess:
    """How images become an encoder's input.

    Args:
        size: S, in pixels.
        fit: ``"crop"`` resizes the shorter side and keeps the middle, ``"stretch"`` both sides, ``"pad"`` the
            longer one and fills up, an odd pixel to the right and below.
        resample: ``"bicubic"`` or ``"bilinear"``.
        mean, std: of the channels, for values in [0, 1].
        floor: whether the odd pixel of a crop goes to the right and below (transformers); else it is rounded to the
            even side (torchvision).
        fill: of the padding, in [0, 255], before it is normalised.
        antialias: ``None`` resizes uint8 as Pillow does; True or False resizes floats by torch, with or without it.
            Pixels that are floats already go by torch in any case, with it but for False: Pillow has no gradients.

    Raises:
        ValueError: an unknown ``fit`` or ``resample``.
    """

    size: int
    fit: str = "crop"
    resample: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    floor: bool = True
    fill: int = 0
    antialias: bool | None = None

    def __post_init__(self) -> None:
        for name, known in (("fit", FITS), ("resample", tuple(RESAMPLE))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; give one of {', '.join(known)}")

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """(n, 3, S, S) float32, normalised, on the device of ``images``: n of (3, H, W), uint8 or float in [0, 255]."""
        if len({image.shape for image in images}) == 1:
            return self._fitted(torch.stack(list(images)))
        return torch.cat([self._fitted(image[None]) for image in images])

    def _fitted(self, pixels: Tensor) -> Tensor:
        height, width = self._shape(*pixels.shape[-2:])
        if self.antialias is None and pixels.dtype == torch.uint8:
            pixels = resize(pixels, height, width, self.resample).float() / 255
        else:
            pixels = pixels.float() / 255
            if pixels.shape[-2:] != (height, width):
                antialias = self.antialias is not False
                pixels = F.interpolate(pixels, (height, width), mode=self.resample, antialias=antialias)
        pixels = self._cropped(pixels) if self.fit == "crop" else self._padded(pixels)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _shape(self, height: int, width: int) -> tuple[int, int]:
        """Of the resized image, before it is cropped or padded."""
        if self.fit == "stretch":
            return self.size, self.size
        if self.fit == "pad":
            scale = self.size / max(height, width)
            return max(round(height * scale), 1), max(round(width * scale), 1)
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _cropped(self, pixels: Tensor) -> Tensor:
        spare = [side - self.size for side in pixels.shape[-2:]]
        top, left = (n // 2 if self.floor else round(n / 2) for n in spare)
        return pixels[..., top : top + self.size, left : left + self.size]

    def _padded(self, pixels: Tensor) -> Tensor:
        below, right = (self.size - side for side in pixels.shape[-2:])
        sides = (right // 2, right - right // 2, below // 2, below - below // 2)
        return F.pad(pixels, sides, value=self.fill / 255)


def resize(pixels: Tensor, height: int, width: int, resample: str = "bicubic") -> Tensor:
    """Pillow's ``Image.resize``, bit for bit, without leaving an accelerator.

    Args:
        pixels: (n, 3, H, W) uint8. On a CPU Pillow itself does it, and on Apple's GPUs, which have no float64.
        height, width: of the result.
        resample: ``"bicubic"`` or ``"bilinear"``.
    """
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    if pixels.device.type in ("cpu", "mps"):
        resized = [image.resize((width, height), RESAMPLE[resample]) for image in to_pil(pixels)]
        return torch.stack([pil_to_tensor(image) for image in resized]).to(pixels.device)
    return _resize(pixels, height, width, resample)


def _resize(pixels: Tensor, height: int, width: int, resample: str) -> Tensor:
    """Columns first, then rows, each rounded to uint8. Sums of integers below 2^53 are exact in float64."""
    across = _weights(pixels.shape[-1], width, resample).to(pixels.device)
    down = _weights(pixels.shape[-2], height, resample).to(pixels.device)
    pixels = _rounded(pixels.double() @ across.T)
    return _rounded(down @ pixels.double())


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (PRECISION - 1)) / 2**PRECISION).floor().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=32)
def _weights(source: int, target: int, resample: str) -> Tensor:
    """(target, source) float64: Pillow's weights of source pixels, scaled to integers."""
    if source == target:
        return torch.eye(source, dtype=torch.float64) * 2**PRECISION
    kernel, support = (_cubic, 2.0) if resample == "bicubic" else (_triangle, 1.0)
    scale = source / target
    stretch = max(scale, 1.0)  # the kernel grows when shrinking: antialiasing
    weights = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), source)
        values = [kernel((x - centre + 0.5) / stretch) for x in range(first, last)]
        total = sum(values)
        weights[row, first:last] = torch.tensor(
            [math.floor(abs(v) / total * 2**PRECISION + 0.5) * math.copysign(1, v) for v in values], dtype=torch.float64
        )
    return weights


def _cubic(x: float) -> float:
    """Keys' cubic convolution with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _triangle(x: float) -> float:
    return max(1 - abs(x), 0.0)
