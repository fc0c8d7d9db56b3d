"""GenEval (arXiv 2310.11513): its prompts and its verdict on detected boxes. Needs numpy alone.

A box is ``[x1, y1, x2, y2, score]``: pixels from the top left corner, score in [0, 1]. Names of classes are those of
``class_names()``. Scores and geometry are compared in float32, as in the reference implementation, because float32
0.3 widened to float64 would pass a threshold of 0.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visearch import assets
from visearch.assets.words import COLORS, RELATIONS, class_names

Box = Sequence[float]
Metadata = Mapping[str, Any]
ColorClassifier = Callable[[str, Sequence[Box]], Sequence[str]]

NUMBERS = {"two": 2, "three": 3, "four": 4}


def load_prompts(path: str | Path | None = None) -> list[dict[str, Any]]:
    """Lines of a GenEval prompt file: ``tag``, ``include``, optional ``exclude``, ``prompt``.

    Args:
        path: a JSON-lines file of that schema; None is the published set of 553 prompts. A run on any other file is
            "GenEval-style", not GenEval.

    Raises:
        ValueError: a line is not JSON or breaks the schema; the message names the file and the line.
    """
    path = assets.path("geneval/evaluation_metadata.jsonl") if path is None else Path(path)
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            prompts.append(check_metadata(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def check_metadata(metadata: Any) -> dict[str, Any]:
    """Return ``metadata`` as a dict if it follows the schema of the prompt file.

    Raises:
        ValueError: a key is missing, a count is not a whole number from 1, a colour or relation is not among GenEval's,
            or a position refers to a clause that does not come before its own.
    """
    if not isinstance(metadata, Mapping) or not {"tag", "include", "prompt"} <= metadata.keys():
        raise ValueError(f"metadata is {metadata!r}; it needs the keys tag, include and prompt")
    for key in ("include", "exclude"):
        for index, clause in enumerate(metadata.get(key, ())):
            where = f"{key}[{index}] of {metadata['prompt']!r}"
            if not isinstance(clause, Mapping) or not {"class", "count"} <= clause.keys():
                raise ValueError(f"{where} is {clause!r}; it needs the keys class and count")
            if type(clause["count"]) is not int or clause["count"] < 1:
                raise ValueError(f"{where} has count {clause['count']!r}; give a whole number from 1")
            if "color" in clause and clause["color"] not in COLORS:
                raise ValueError(f"{where} has color {clause['color']!r}; GenEval's are {', '.join(COLORS)}")
            if "position" in clause:
                relation, target = clause["position"]
                if relation not in RELATIONS:
                    raise ValueError(f"{where} has relation {relation!r}; GenEval's are {', '.join(RELATIONS)}")
                if type(target) is not int or not 0 <= target < index:
                    raise ValueError(f"{where} is placed against clause {target!r}; name an earlier one by its index")
    return dict(metadata)


@dataclass(frozen=True)
class Verdict:
    """``reason`` has one line for each requirement that failed, in GenEval's wording; it is empty when correct."""

    correct: bool
    reason: str


def filter_detections(
    detections: Mapping[str, Sequence[Box]],
    *,
    threshold: float = 0.3,
    max_objects: int = 16,
    max_overlap: float = 1.0,
) -> dict[str, list[list[float]]]:
    """The boxes that count, by class, best score first; classes without any are left out.

    Args:
        detections: class name to boxes, unordered and unfiltered. Among equal scores the later box comes first.
        threshold: a box counts when its score is strictly above (in float32).
        max_objects: at most so many of a class, taken before overlaps are looked at.
        max_overlap: greedy suppression of boxes whose intersection over union with a better one reaches this; 1 is
            off. Areas count pixels, one more on each side than the difference of coordinates.

    Raises:
        ValueError: a box does not have five numbers, or an option is out of its range.
    """
    check_limits(max_objects, max_overlap)
    limits = {"threshold": threshold, "max_objects": max_objects, "max_overlap": max_overlap}
    arrays = {name: np.asarray(boxes, dtype=np.float32) for name, boxes in detections.items() if len(boxes)}
    kept = {name: array[keep(array, name, **limits)].tolist() for name, array in arrays.items()}
    return {name: boxes for name, boxes in kept.items() if boxes}


def check_limits(max_objects: int, max_overlap: float) -> None:
    """Refuse options of :func:`filter_detections` that are out of their range, with a ValueError."""
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; it must be at least 1")
    if not 0 < max_overlap <= 1:
        raise ValueError(f"max_overlap is {max_overlap}; it must lie in (0, 1], where 1 switches suppression off")


def keep(
    boxes: np.ndarray, name: str, *, threshold: float = 0.3, max_objects: int = 16, max_overlap: float = 1.0
) -> np.ndarray:
    """Which of the ``boxes (n, 5)``, float32, of class ``name`` count: their indices, best first.

    Raises:
        ValueError: boxes of another shape.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes of {name!r} have shape {boxes.shape}; each must be [x1, y1, x2, y2, score]")
    order = np.argsort(boxes[:, 4], kind="stable")[::-1]
    order = order[boxes[order, 4] > np.float32(threshold)][:max_objects]
    return order[_suppress(boxes[order], max_overlap)] if max_overlap < 1 else order


def relations(a: Box, b: Box, position_threshold: float = 0.1) -> set[str]:
    """Where box ``a`` is, seen from box ``b``: none, one or two of ``RELATIONS``.

    Offsets between the centres are shortened on each axis by ``position_threshold`` times the two boxes' summed sides;
    a relation holds when what is left exceeds half the distance between the centres.
    """
    corners = np.asarray([a[:4], b[:4]], dtype=np.float32).reshape(2, 2, 2)
    centre_a, centre_b = corners.mean(axis=1)
    sides = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    offset = centre_a - centre_b
    revised = np.maximum(np.abs(offset) - position_threshold * sides, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, held in holds.items() if held}


def judge(
    metadata: Metadata,
    detections: Mapping[str, Sequence[Box]],
    classify_color: ColorClassifier,
    *,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
    max_objects: int = 16,
    max_overlap: float = 1.0,
    position_threshold: float = 0.1,
) -> Verdict:
    """GenEval's verdict on one image.

    Args:
        metadata: the line of the prompt file that the image was made from.
        detections: class name to boxes before filtering; a class that was not found may be missing.
        classify_color: ``(class name, boxes) -> one of COLORS for each box``; called only for clauses with a colour,
            with as many of the best boxes as the clause asks for.
        threshold: of scores, for every tag but "counting".
        counting_threshold: of scores, for tag "counting".
        max_objects, max_overlap: see ``filter_detections``.
        position_threshold: see ``relations``.

    Raises:
        ValueError: ``metadata`` or a box breaks its schema, an option is out of range, or ``classify_color`` answers
            with another number of colours than it got boxes.
    """
    check_metadata(metadata)
    limit = counting_threshold if metadata["tag"] == "counting" else threshold
    kept = filter_detections(detections, threshold=limit, max_objects=max_objects, max_overlap=max_overlap)
    return verdict(metadata, kept, classify_color, position_threshold)


def verdict(
    metadata: Metadata,
    kept: Mapping[str, Sequence[Box]],
    classify_color: ColorClassifier,
    position_threshold: float = 0.1,
) -> Verdict:
    """The same on boxes that were filtered already: class name to boxes, best first."""
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for clause in metadata["include"]:
        found = kept.get(clause["class"], [])[: clause["count"]]
        failure = _include_failure(clause, found, groups, classify_color, position_threshold)
        groups.append(found if failure is None else None)
        if failure is not None:
            reasons.append(failure)
    for clause in metadata.get("exclude", ()):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(not reasons, "\n".join(reasons))


def parse_prompt(prompt: str) -> dict[str, Any]:
    """The metadata line of a prompt in GenEval's wording, such as "a photo of two cows" or "a photo of a red car".

    Raises:
        ValueError: other wording, or classes and colours that GenEval does not have; the message shows examples.
    """
    names = {name: name for name in class_names()}
    plurals = {_plural(name): name for name in names}
    item = rf"an? (?:(?P<c{{0}}>{'|'.join(COLORS)}) )?(?P<n{{0}}>{'|'.join(map(re.escape, names))})"
    many = rf"(?P<k>{'|'.join(NUMBERS)}) (?P<p>{'|'.join(map(re.escape, plurals))})"
    pair = rf"{item.format(1)}(?: (?P<r>and|{'|'.join(RELATIONS)}) {item.format(2)})?"
    match = re.fullmatch(rf"an? photo of (?:{many}|{pair})", " ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"prompt {prompt!r} is not in GenEval's wording, which its verdict needs; for example 'a photo of two "
            "cows', 'a photo of a red car', 'a photo of a cow left of a car'"
        )
    part = match.groupdict()
    if part["k"]:
        name, count = plurals[part["p"]], NUMBERS[part["k"]]
        include: list[dict[str, Any]] = [{"class": name, "count": count}]
        return {
            "tag": "counting",
            "include": include,
            "exclude": [{"class": name, "count": count + 1}],
            "prompt": prompt,
        }
    clauses: list[dict[str, Any]] = []
    for i in ("1", "2"):
        if part[f"n{i}"]:
            color = {"color": part[f"c{i}"]} if part[f"c{i}"] else {}
            clauses.append({"class": part[f"n{i}"], "count": 1, **color})
    if part["r"] in RELATIONS:
        first, target = clauses
        tag, clauses = "position", [target, {**first, "position": [part["r"], 0]}]
    elif any("color" in c for c in clauses):
        tag = "colors" if len(clauses) == 1 else "color_attr"
    else:
        tag = "single_object" if len(clauses) == 1 else "two_object"
    return {"tag": tag, "include": clauses, "prompt": prompt}


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def _include_failure(
    clause: Metadata,
    found: Sequence[Box],
    groups: Sequence[Sequence[Box] | None],
    classify_color: ColorClassifier,
    position_threshold: float,
) -> str | None:
    """The first requirement of an include clause that fails: number, then colour, then position."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        wanted, colors = clause["color"], list(classify_color(name, found))
        if len(colors) != len(found):
            raise ValueError(f"classify_color gave {len(colors)} colours for {len(found)} boxes of {name!r}")
        if not set(colors) <= set(COLORS):
            raise ValueError(f"classify_color gave {colors!r} for {name!r}; GenEval's are {', '.join(COLORS)}")
        if colors.count(wanted) < count:
            seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and {seen}"
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            return f"no target for {name} to be {relation}"
        for box in found:
            for other in groups[target]:
                held = relations(box, other, position_threshold)
                if relation not in held:
                    return f"expected {name} {relation} target, found {' and '.join(sorted(held))} target"
    return None


def _suppress(boxes: np.ndarray, max_overlap: float) -> list[int]:
    """Greedy non-maximum suppression of ``boxes (n, 5)``, best first: the indices that stay."""
    kept, left = [], np.arange(len(boxes))
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        left = left[_overlap(boxes[best], boxes[left]) < max_overlap]
    return kept


def _overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union ``(n,)`` of ``box (5,)`` with ``boxes (n, 5)``."""

    def area(top_left: np.ndarray, bottom_right: np.ndarray) -> np.ndarray:
        return np.maximum(bottom_right - top_left + 1, 0).prod(axis=-1)

    both = area(np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:4], boxes[:, 2:4]))
    union = area(box[:2], box[2:4]) + area(boxes[:, :2], boxes[:, 2:4]) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)
