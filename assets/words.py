"""GenEval's words (arXiv 2310.11513), which the embedded world shares."""

from __future__ import annotations

from functools import cache

from visearch.assets import path

__all__ = ["COLORS", "RELATIONS", "TAGS", "class_names"]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@cache
def class_names() -> tuple[str, ...]:
    """The 80 classes in COCO label order, three of them renamed: map a detector's labels by index, never by name."""
    return tuple(path("geneval/object_names.txt").read_text(encoding="utf-8").splitlines())
