"""Previews kept as images: what a reward saw of every recorded candidate, to train one on.

One safetensors file a prompt beside its record, each image an entry of its own, so that a batch reads what it needs.
Lossless WebP at its fastest: of an emoji-64 preview 4.7 kB in 1 ms (PNG 4.9 kB in 6 ms, pixels 12.3 kB; latents 2 kB,
but decoding them again costs 16 ms and the generator at hand).
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["Previews"]


@dataclass(frozen=True)
class Previews:
    """Images by prompt, stage and candidate.

    Args:
        folder: where they lie.
        side: larger images are kept with their shorter side of so many pixels, as rewards resize them (bicubic).
    """

    folder: Path
    side: int = 224

    def encode(self, stage: int, samples: Any) -> dict[str, torch.Tensor]:
        """Candidates 0 to S - 1 at a stage, ready for :meth:`save`.

        Raises:
            ValueError: they are videos.
        """
        from visearch.rewards.images import to_pil

        images = to_pil(samples)
        if images and not isinstance(images[0], Image.Image):
            raise ValueError("previews of videos are not kept; record an image model")
        return {f"{stage}/{k}": self._bytes(image) for k, image in enumerate(images)}

    def _bytes(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB")
        scale = self.side / min(image.size)
        if scale < 1:
            image = image.resize([round(scale * v) for v in image.size], Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "WEBP", lossless=True, method=0)
        return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)

    def save(self, prompt_id: int, encoded: dict[str, torch.Tensor]) -> None:
        """Write a prompt's images in one step."""
        path = self._path(prompt_id)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        save_file(encoded, part)
        part.replace(path)

    def __contains__(self, prompt_id: int) -> bool:
        """Whether a prompt's file is there and whole."""
        path = self._path(prompt_id)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt"):
                return True
        except SafetensorError:
            return False

    def load(self, prompt_id: int, stage: int, candidates: Sequence[int]) -> list[Image.Image]:
        """Images of some candidates of a prompt at a stage.

        Raises:
            FileNotFoundError: the prompt was not recorded.
            SafetensorError: its file is torn.
        """
        with safe_open(self._path(prompt_id), "pt") as file:
            found = [file.get_tensor(f"{stage}/{k}") for k in candidates]
        return [Image.open(io.BytesIO(np.asarray(image).tobytes())) for image in found]

    def _path(self, prompt_id: int) -> Path:
        return self.folder / f"previews-{prompt_id:016x}.safetensors"
