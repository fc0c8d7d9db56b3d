"""GenEval (arXiv 2310.11513): its prompts, its verdict on detected boxes, and its summary. Needs numpy alone.

A box is ``[x1, y1, x2, y2, score]``: pixels from the top left corner, score in [0, 1]. Names of classes are those of
``class_names()``. Scores and geometry are compared in float32, as in the reference implementation, because float32
0.3 widened to float64 would pass a threshold of 0.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from visearch import assets
from visearch.statistics import DRAWS, LEVEL, Interval, percentile_interval, resample

Box = Sequence[float]
Metadata = Mapping[str, Any]
ColorClassifier = Callable[[str, Sequence[Box]], Sequence[str]]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
IMAGE_NAME = re.compile(r"(?:^|/)(\d+)/samples/(\d+)\.png$")


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


@cache
def class_names() -> tuple[str, ...]:
    """The 80 classes in COCO label order, three of them renamed: map a detector's labels by index, never by name."""
    return tuple(assets.path("geneval/object_names.txt").read_text(encoding="utf-8").splitlines())


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
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}; it must be at least 1")
    if not 0 < max_overlap <= 1:
        raise ValueError(f"max_overlap is {max_overlap}; it must lie in (0, 1], where 1 switches suppression off")
    kept = {}
    for name, boxes in detections.items():
        if len(boxes) == 0:
            continue
        array = np.asarray(boxes, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != 5:
            raise ValueError(f"boxes of {name!r} have shape {array.shape}; each must be [x1, y1, x2, y2, score]")
        array = array[np.argsort(array[:, 4], kind="stable")[::-1]]
        array = array[array[:, 4] > np.float32(threshold)][:max_objects]
        if max_overlap < 1:
            array = _suppress(array, max_overlap)
        if len(array):
            kept[name] = array.tolist()
    return kept


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
    kept = filter_detections(
        detections,
        threshold=counting_threshold if metadata["tag"] == "counting" else threshold,
        max_objects=max_objects,
        max_overlap=max_overlap,
    )
    reasons: list[str] = []
    groups: list[list[list[float]] | None] = []
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


def judge_images(detector: Any, images: Sequence[Any], metadata: Sequence[Metadata], **options: Any) -> list[Verdict]:
    """Verdicts of a detector with a colour classifier on N images.

    Args:
        detector: has ``detect(images) -> detections of each`` and ``classify_color(image, class name, boxes)``, such as
            :func:`visearch.rewards.detector.load_judge` returns.
        images: what the detector takes.
        metadata: N lines of a prompt file.
        options: of :func:`judge`.
    """
    found = detector.detect(images)
    return [
        judge(line, boxes, partial(detector.classify_color, image), **options)
        for image, line, boxes in zip(images, metadata, found, strict=True)
    ]


class VerdictReward:
    """GenEval's verdict of a detector as a reward: 1 for a correct image, else 0.

    Args:
        detector: see :func:`judge_images`.
    """

    higher_is_better = True
    range = (0.0, 1.0)
    needs = frozenset({"pixels", "metadata"})
    not_held_out_for = ("GenEval",)

    def __init__(self, detector: Any) -> None:
        self.detector = detector
        self.name, self.licence, self.source = f"judge-{detector.name}", detector.licence, detector.source
        measured = getattr(detector, "error", {}).get("overall")
        self.note = f"itself wrong on {measured['rate']:.1%} of composed scenes" if measured else "own error unknown"

    def score(
        self,
        samples: Any,
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Metadata | None] | None = None,
    ) -> Any:
        """Score N images; prompts without metadata must be in GenEval's wording.

        Raises:
            ValueError: a prompt in another wording, or with a class that the detector does not know.
        """
        import torch

        from visearch.protocols import Scores
        from visearch.rewards.images import to_pil

        lines = [
            line or parse_prompt(prompt)
            for line, prompt in zip(metadata or [None] * len(prompts), prompts, strict=True)
        ]
        for clause in (clause for line in lines for clause in line["include"]):
            if clause["class"] not in self.detector.class_names:
                raise ValueError(f"{self.name} does not know {clause['class']!r}; it knows {self.detector.class_names}")
        verdicts = judge_images(self.detector, to_pil(samples), lines)
        reasons = {i: v.reason for i, v in enumerate(verdicts) if not v.correct}
        return Scores(torch.tensor([float(v.correct) for v in verdicts]), reasons=reasons)


def _load_verdict(letter: str, device: Any = "cpu") -> VerdictReward:
    from visearch.rewards.detector import load_judge

    return VerdictReward(load_judge(letter, device))


judge_a, judge_b, judge_c = (partial(_load_verdict, letter) for letter in "abc")


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
    found: list[list[float]],
    groups: list[list[list[float]] | None],
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


def _suppress(boxes: np.ndarray, max_overlap: float) -> np.ndarray:
    """Greedy non-maximum suppression of ``boxes (n, 5)``, best first."""
    kept = []
    while len(boxes):
        best, boxes = boxes[0], boxes[1:]
        kept.append(best)
        boxes = boxes[_overlap(best, boxes) < max_overlap]
    return np.stack(kept) if kept else boxes


def _overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union ``(n,)`` of ``box (5,)`` with ``boxes (n, 5)``."""

    def area(top_left: np.ndarray, bottom_right: np.ndarray) -> np.ndarray:
        return np.maximum(bottom_right - top_left + 1, 0).prod(axis=-1)

    both = area(np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:4], boxes[:, 2:4]))
    union = area(box[:2], box[2:4]) + area(boxes[:, :2], boxes[:, 2:4]) - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


@dataclass(frozen=True)
class Task:
    """Images of one tag: how many were judged, how many were correct, and the accuracy with its interval."""

    correct: int
    images: int
    accuracy: Interval


@dataclass(frozen=True)
class Summary:
    """GenEval's figures with 95 % intervals; ``text()`` prints the benchmark's own lines.

    Attributes:
        tasks: by tag, in the order in which the tags come up in the run.
        images: mean over images.
        prompts: mean over prompts of "any of its images is correct".
        overall: mean of the task accuracies, each task counting once; GenEval's headline.
    """

    num_images: int
    num_prompts: int
    tasks: dict[str, Task]
    images: Interval
    prompts: Interval
    overall: Interval

    def text(self) -> str:
        """The summary in exactly the lines of the reference implementation, without a newline at the end."""
        return "\n".join(
            [
                "Summary",
                "=======",
                f"Total images: {self.num_images}",
                f"Total prompts: {self.num_prompts}",
                f"% correct images: {self.images.mean:.2%}",
                f"% correct prompts: {self.prompts.mean:.2%}",
                "",
                "Task breakdown",
                "==============",
                *(
                    f"{tag:<16} = {task.accuracy.mean:.2%} ({task.correct} / {task.images})"
                    for tag, task in self.tasks.items()
                ),
                "",
                f"Overall score (avg. over tasks): {self.overall.mean:.5f}",
            ]
        )

    def __str__(self) -> str:
        bounds = [*((tag, task.accuracy) for tag, task in self.tasks.items()), ("overall", self.overall)]
        lines = [f"{name:<16} = [{value.low:.2%}, {value.high:.2%}]" for name, value in bounds]
        return "\n".join([self.text(), "", f"{LEVEL:.0%} intervals (prompts resampled)", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for ``json.dumps``."""
        tasks = {
            tag: {"correct": task.correct, "images": task.images, **task.accuracy.to_dict()}
            for tag, task in self.tasks.items()
        }
        return {
            "num_images": self.num_images,
            "num_prompts": self.num_prompts,
            "level": LEVEL,
            "tasks": tasks,
            "images": self.images.to_dict(),
            "prompts": self.prompts.to_dict(),
            "overall": self.overall.to_dict(),
        }


def summarize(results: Iterable[Mapping[str, Any]], *, draws: int = DRAWS, seed: int = 0) -> Summary:
    """Accuracies by task and overall, with 95 % percentile-bootstrap intervals.

    Prompts are resampled inside each tag, each prompt with all its images, because images of one prompt are not
    independent.

    Args:
        results: one mapping for each image with ``tag``, ``correct`` and ``metadata`` (a dict or its JSON string, which
            is what tells prompts apart). With ``filename`` (``.../00000/samples/00000.png``) rows are first sorted by
            folder and image number; without, their order is kept.
        draws: number of bootstrap draws.
        seed: of the bootstrap; equal results in any order of files give equal intervals.

    Raises:
        ValueError: no results, a key is missing, ``correct`` is no boolean, or a file name has another form.
    """
    rows = _ordered(results)
    by_tag: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        key = row["metadata"] if isinstance(row["metadata"], str) else json.dumps(row["metadata"])
        by_tag.setdefault(row["tag"], {}).setdefault(key, []).append(bool(row["correct"]))
    rng = np.random.default_rng(seed)
    tasks, task_draws = {}, []
    for tag, prompts in by_tag.items():
        sums = np.array([sum(verdicts) for verdicts in prompts.values()], dtype=np.float64)
        sizes = np.array([len(verdicts) for verdicts in prompts.values()], dtype=np.float64)
        anys = (sums > 0).astype(np.float64)
        # One index serves images and prompts, so that all figures of a draw describe the same resampled benchmark.
        task_draws.append(resample(np.stack([sums, sizes, anys], axis=1), rng, draws))
        share = task_draws[-1][:, 0] / task_draws[-1][:, 1]
        accuracy = percentile_interval(sums.sum() / sizes.sum(), share, len(sums))
        tasks[tag] = Task(int(sums.sum()), int(sizes.sum()), accuracy)
    number = sum(len(prompts) for prompts in by_tag.values())
    totals = np.sum(task_draws, axis=0)
    any_correct = sum(any(verdicts) for prompts in by_tag.values() for verdicts in prompts.values())
    overall = sum(task.accuracy.mean for task in tasks.values()) / len(tasks)
    return Summary(
        num_images=len(rows),
        num_prompts=number,
        tasks=tasks,
        images=percentile_interval(
            sum(task.correct for task in tasks.values()) / len(rows), totals[:, 0] / totals[:, 1], number
        ),
        prompts=percentile_interval(any_correct / number, totals[:, 2] / number, number),
        overall=percentile_interval(overall, np.mean([d[:, 0] / d[:, 1] for d in task_draws], axis=0), number),
    )


def _ordered(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    rows = list(results)
    if not rows:
        raise ValueError("results is empty; judge at least one image first")
    for index, row in enumerate(rows):
        if missing := {"tag", "correct", "metadata"} - row.keys():
            raise ValueError(f"results[{index}] lacks {', '.join(sorted(missing))}; give one judged image a row")
        if not isinstance(row["correct"], bool | np.bool_):
            raise ValueError(f"results[{index}] has correct={row['correct']!r}; GenEval's verdict is true or false")
    named = sum("filename" in row for row in rows)
    if named not in (0, len(rows)):
        raise ValueError(f"{named} of {len(rows)} results have a filename; give one to all or to none")
    return sorted(rows, key=lambda row: _position(row["filename"])) if named else rows


def _position(filename: str) -> tuple[int, int]:
    match = IMAGE_NAME.search(filename)
    if match is None:
        raise ValueError(f"filename {filename!r} is not of the form .../00000/samples/00000.png")
    return int(match[1]), int(match[2])
