"""How well an image compresses: rewards that no model stands behind, as in DDPO (arXiv 2305.13301)."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from torch import Tensor

from visearch.rewards.base import BaseReward
from visearch.rewards.images import to_pil

__all__ = ["JpegCompressibility", "JpegSize"]

QUALITY = 95


class JpegSize(BaseReward):
    """Kilobytes (1000 bytes) of the image as JPEG of quality 95: high for detail and noise."""

    name = "jpeg-size"
    family = "pixel"
    range = (0.0, math.inf)
    scale = "kilobytes of the image as JPEG of quality 95"
    licence = "Apache-2.0 (code; there are no weights)"
    source = "arXiv 2305.13301"
    needs_prompt = False

    def __init__(self, *, device: Any = "cpu") -> None:
        """``device`` is taken as by all rewards; the encoder is Pillow's, on the CPU."""

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        return torch.tensor([_jpeg_bytes(image) / 1000 for image in images])

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "quality": QUALITY}


class JpegCompressibility(JpegSize):
    """The same, negated: high for plain images."""

    name = "jpeg-compressibility"
    range = (-math.inf, 0.0)
    scale = "minus the kilobytes of the image as JPEG of quality 95"

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        return -super()._score(images, prompts)


def _jpeg_bytes(image: Tensor) -> int:
    buffer = io.BytesIO()
    to_pil(image[None])[0].save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
