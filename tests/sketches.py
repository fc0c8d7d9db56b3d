"""What stands in for models in tests of the GenEval batch job: it runs in any process and costs nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from visearch.geneval.generate import Drawn, Wanted
from visearch.protocols import stable_hash

COLORS = ("red", "blue")


class Sketcher:
    """Draws noise that hangs on the image and on which others are in its pack, as kernels round by batch."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def __call__(self, pack: Sequence[Wanted]) -> list[Drawn]:
        time.sleep(self.pause)
        return [self._drawn(one, stable_hash(one.id, *(other.id for other in pack))) for one in pack]

    def _drawn(self, one: Wanted, seed: int) -> Drawn:
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        candidates = [{"id": "0", "seed": seed, "score": 1.0, "held_out": {}}]
        record = {"id": f"{one.id:016x}", "winner": "0", "candidates": candidates, "nfe": 1, "not_held_out_for": []}
        return Drawn(one, Image.fromarray(pixels), record)


class Looker:
    """Judges an image by its first pixel."""

    def __call__(self, batch: tuple) -> list[dict]:
        return [self._row(line, image) for line, image in zip(*batch)]

    def _row(self, line: dict, image: Image.Image) -> dict:
        value = int(np.asarray(image)[0, 0, 0])
        return {
            "tag": line["tag"],
            "prompt": line["prompt"],
            "correct": value % 2 == 0,
            "reason": f"value/{value}",
        }
