"""GenEval's results to be browsed: every judged image with its verdict and boxes, the baseline's beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from visearch.app.frames import Media
from visearch.geneval.outcome import Outcome, read_outcome, table
from visearch.geneval.summary import key_of

__all__ = ["SHOWN", "Results", "Shot", "drawn", "read_results"]

SIDE = 384  # pixels of an image's longer side on the page
SHOWN = ("wrong", "right", "all", "gained", "lost")
"""Verdicts to choose from; the last two are of a search beside its baseline."""
BOX_COLOURS = ("#0a7d4f", "#b42318", "#175cd3", "#6938ef", "#93370d", "#3e4784")  # white letters read well on each


@dataclass(frozen=True)
class Shot:
    """One judged image.

    Attributes:
        key: prompt and image, such as ``"00003/00000"``.
        tag: its task.
        prompt: what it should show.
        correct: the verdict.
        reason: what failed, one requirement a line; empty where it is right.
        boxes: class -> ``[x1, y1, x2, y2, score]`` in pixels, best first; ``None`` where the results hold none.
        file: the image, within the folder that was named on the command line.
        baseline: the same prompt's image of the other run.
    """

    key: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    boxes: Mapping[str, Sequence[Sequence[float]]] | None
    file: Path
    baseline: Shot | None = None


@dataclass(frozen=True)
class Results:
    """One run, or a search and its baseline.

    Attributes:
        outcome: of the search.
        baseline: of the run that it is compared with.
        shots: every image of the search, in the order of prompts.
    """

    outcome: Outcome
    baseline: Outcome | None
    shots: Sequence[Shot]

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """Accuracy and gain by task with 95 % intervals, as in ``visearch geneval summary``."""
        return table(self.outcome, self.baseline)

    @property
    def tags(self) -> list[str]:
        return list(self.outcome.summary.tasks)

    def matching(self, tag: str | None, shown: str) -> list[Shot]:
        """Images of one task, or of all, that were judged so.

        Raises:
            ValueError: ``shown`` is none of :data:`SHOWN`.
        """
        if shown not in SHOWN:
            raise ValueError(f"verdict {shown!r} is unknown; choose one of {', '.join(SHOWN)}")
        return [shot for shot in self.shots if tag in (None, shot.tag) and _is(shot, shown)]


def _is(shot: Shot, shown: str) -> bool:
    if shown in ("gained", "lost"):
        other = shot.baseline
        return other is not None and shot.correct != other.correct and shot.correct == (shown == "gained")
    return shown == "all" or shot.correct == (shown == "right")


def read_results(sources: Sequence[Path]) -> Results:
    """What ``visearch geneval score`` wrote: of one run, or of a search and then its baseline.

    Args:
        sources: one or two folders of images with their results, or the files of results in such folders.

    Raises:
        ValueError: another number of them; no results; results of a damaged file or of other prompts.
    """
    if len(sources) not in (1, 2):
        raise ValueError(f"--geneval names {len(sources)} folders; give one, or a search and its baseline")
    (outcome, shots), *others = map(_read, sources)
    if not others:
        return Results(outcome, None, shots)
    baseline, single = others[0]
    by_key = {shot.key: shot for shot in single}
    paired = [replace(shot, baseline=by_key.get(shot.key)) for shot in shots]
    results = Results(outcome, baseline, paired)
    _ = results.table  # refuses runs of different prompts
    return results


def _read(source: Path) -> tuple[Outcome, list[Shot]]:
    files = sorted(source.glob("results*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"{source} holds no results.jsonl; run: visearch geneval score {source} --detector tiny")
    root = source if source.is_dir() else source.parent
    outcome = read_outcome(files)
    return outcome, [_shot(row, root) for row in outcome.rows]


def _shot(row: Mapping[str, Any], root: Path) -> Shot:
    """Whatever folders the results name, only the one given on the command line is read from."""
    prompt, samples, image = Path(row["filename"]).parts[-3:]
    return Shot(
        key_of(row["filename"]),
        row["tag"],
        row.get("prompt") or json.loads(row["metadata"])["prompt"],
        row["correct"],
        row.get("reason", ""),
        json.loads(row["details"]) if row.get("details") else None,
        root / prompt / samples / image,
    )


# --- images -----------------------------------------------------------------------------------------------------


def drawn(shot: Shot) -> Media | None:
    """The image with its boxes; ``None`` where the file is gone or no image."""
    try:
        with Image.open(shot.file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    scale = SIDE / max(image.size)
    scale = max(1, round(scale)) if scale > 1 else scale  # whole pixels stay whole
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    boxes = shot.boxes or {}
    for name, colour in reversed(list(zip(boxes, cycle(BOX_COLOURS), strict=False))):
        for box in reversed(boxes[name]):  # the best one lies on top
            _draw_box(image, [round(edge * scale) for edge in box[:4]], f"{name} {box[4]:.2f}", colour)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=85)
    return Media("image", "image/webp", content.getvalue(), shot.prompt + _found(shot))


def _found(shot: Shot) -> str:
    """What the detector saw, in words."""
    if shot.boxes is None:
        return ""
    counts = ", ".join(f"{len(boxes)} {name}" for name, boxes in shot.boxes.items())
    return f"; the detector found {counts or 'nothing'}"


def _draw_box(image: Image.Image, box: Sequence[int], text: str, colour: str) -> None:
    """A box with its label inside the image, above the box where there is room."""
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    edges = zip(box, image.size * 2, strict=True)
    left, top, right, bottom = (min(max(edge, 0), side - 1) for edge, side in edges)
    draw.rectangle((left, top, right, bottom), outline="#ffffff", width=4)
    draw.rectangle((left, top, right, bottom), outline=colour, width=3)
    width, height = round(draw.textlength(text, font=font)) + 8, 20
    x = max(0, min(left, image.width - width))
    y = top - height if top >= height else top
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 4, y + 1), text, "#ffffff", font=font)
