"""Whether an image shows the text that its prompt puts in double quotes, as scored by Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visearch.protocols import Scores
from visearch.rewards.base import BaseReward
from visearch.rewards.function import path_of, plug_in
from visearch.rewards.images import to_pil

__all__ = ["OCR", "edit_distance", "quoted", "similarity"]


class OCR(BaseReward):
    """:func:`similarity` of what a reader finds in the image and the prompt's first quoted text; NaN without one.

    Args:
        reader: your own: a PIL image to the text in it, or where that function is, as ``"module:function"``
            (``"pytesseract:image_to_string"``).
        device: not used here; a reader has its own.

    Raises:
        ValueError: no reader, or none at that place.
    """

    name = "ocr"
    family = "ocr"
    range = (0.0, 1.0)
    scale = "1 - edit distance / length of the quoted text"
    licence = "Apache-2.0 (code; the reader has its own)"
    source = "arXiv 2505.05470"

    def __init__(self, reader: Callable[[Image.Image], str] | str | None = None, *, device: Any = "cpu") -> None:
        if reader is None:
            raise ValueError(
                "ocr reads with a function of your own, from a PIL image to its text; give reader=, or write its path, "
                "such as ocr:pytesseract:image_to_string"
            )
        self.reader = plug_in(reader) if isinstance(reader, str) else reader

    def _score(self, images: list[Tensor], prompts: list[str]) -> Scores:
        targets = [quoted(prompt) for prompt in prompts]
        values = [
            math.nan if target is None else similarity(self.reader(to_pil(image[None])[0]), target)
            for image, target in zip(images, targets, strict=True)
        ]
        missing = [i for i, target in enumerate(targets) if target is None]
        return Scores(torch.tensor(values), reasons=dict.fromkeys(missing, 'the prompt has no text in "double quotes"'))

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "reader": path_of(self.reader)}


def quoted(prompt: str) -> str | None:
    """What stands between the first two double quotes; ``None`` where that is nothing but spaces."""
    found = re.search('"([^"]*)"', prompt)
    return found[1] if found and found[1].strip() else None


def similarity(read: str, target: str) -> float:
    """``1 - d / len(target)``, both without spaces and case: d is 0 if the target was read anywhere, else its edit
    distance to all that was read, at most ``len(target)``."""
    read, target = (text.replace(" ", "").lower() for text in (read, target))
    distance = 0 if target in read else min(edit_distance(read, target), len(target))
    return 1 - distance / len(target)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: fewest insertions, deletions and replacements of a character that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
