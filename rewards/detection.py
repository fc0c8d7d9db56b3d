"""What GenEval (arXiv 2310.11513) asks of a detector and of whoever names colours, and those there are, by name.

A loader of ``DETECTORS`` is called as ``load(path, device, **options)`` with a hub id, folder or ``None`` and what
``--options`` gave beyond the rules of the verdict, as texts. It returns a detector and who names the colours of what
that found; one object may be both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from visearch.protocols import Registry
from visearch.rewards.detector import load_judge

__all__ = ["DETECTORS", "ColorNamer", "Detector", "EmbeddedDetector", "Instance"]

DETECTORS = Registry(
    "detector",
    {
        "mmdet-converted": "visearch.rewards.mask2former:mmdet_converted",
        "facebook": "visearch.rewards.mask2former:facebook",
        "tiny": "visearch.rewards.detection:tiny",
        "tiny-b": "visearch.rewards.detection:tiny_b",
        "tiny-c": "visearch.rewards.detection:tiny_c",
    },
)


class Instance(NamedTuple):
    """One object in an image of H x W pixels.

    Attributes:
        label: index into the detector's ``class_names``.
        score: in [0, 1], a float32 number.
        box: x1, y1, x2, y2 in pixels from the top left corner, float32 numbers.
        mask: (H, W) boolean, or ``None`` where the detector has only boxes.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects.

    Attributes:
        id: hub id, or name and version.
        revision: what tells its weights from others, such as their sha256.
        comparability: what its verdicts may be compared with, in one line.
        dtype: of its weights.
        class_names: of the labels; GenEval's own names, where it knows all 80 in COCO's order.
    """

    id: str
    revision: str
    comparability: str
    dtype: str
    class_names: tuple[str, ...]

    def detect(self, images: Sequence[Image.Image], above: float = 0.0) -> list[list[Instance]]:
        """Instances of N RGB images of one size, in any order: all whose score exceeds ``above``, and maybe others."""


class ColorNamer(Protocol):
    """Names colours.

    Attributes:
        id, revision: as of a :class:`Detector`.
    """

    id: str
    revision: str

    def classify(self, image: Image.Image, class_name: str, instances: Sequence[Instance]) -> list[str]:
        """For each instance, all of one class and of one image, one of GenEval's ten colours."""


class EmbeddedDetector:
    """A judge of the embedded world: boxes without masks, and colours by its own head.

    Args:
        letter: "a", "b" or "c", see :func:`visearch.rewards.detector.load_judge`.

    Raises:
        ImportError: "c" without the extra ``judge``.
    """

    dtype = "float32"

    def __init__(self, letter: str, device: Any = "cpu") -> None:
        self.judge = load_judge(letter, device)
        self.id, self.revision = self.judge.id, self.judge.revision
        self.comparability, self.class_names = self.judge.comparability, self.judge.class_names

    def detect(self, images: Sequence[Image.Image], above: float = 0.0) -> list[list[Instance]]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        return [
            [Instance(labels[name], box[4], tuple(box[:4])) for name, boxes in found.items() for box in boxes]
            for found in self.judge.detect(images)
        ]

    def classify(self, image: Image.Image, class_name: str, instances: Sequence[Instance]) -> list[str]:
        return self.judge.classify_color(image, class_name, [instance.box for instance in instances])


def _embedded(letter: str, path: str | None, device: Any, **options: str) -> tuple[Detector, ColorNamer]:
    if path is not None or options:
        given = f"--detector-path {path}" if path is not None else f"--options {', '.join(options)}"
        raise ValueError(f"the embedded judge {letter!r} takes no {given}; leave it out")
    judge = EmbeddedDetector(letter, device)
    return judge, judge


tiny, tiny_b, tiny_c = (partial(_embedded, letter) for letter in "abc")
