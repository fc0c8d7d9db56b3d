"""GenEval's figures of a run, with intervals. Needs numpy alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visearch.statistics import DRAWS, LEVEL, Interval, percentile_interval, resample

IMAGE_NAME = re.compile(r"(?:^|/)(\d+)/samples/(\d+)\.png$")


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
    by_tag = _by_prompt(rows)
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


def differences(
    results: Iterable[Mapping[str, Any]], baseline: Iterable[Mapping[str, Any]], *, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """How much better ``results`` are than ``baseline``, by tag and ``"overall"``, with 95 % intervals.

    Prompts are resampled inside each tag with their images of both runs, which makes the comparison paired.

    Args:
        results, baseline: as for :func:`summarize`.
        draws, seed: of the bootstrap.

    Raises:
        ValueError: the runs are not of the same prompts.
    """
    ours, theirs = (_by_prompt(_ordered(rows)) for rows in (results, baseline))
    prompts, others = ({p for found in run.values() for p in found} for run in (ours, theirs))
    if prompts != others:
        both = len(prompts & others)
        raise ValueError(
            f"the runs have {len(prompts)} and {len(others)} prompts, {both} of them in common; compare "
            "runs of the same prompts"
        )
    rng = np.random.default_rng(seed)
    found, all_draws = {}, []
    for tag, group in ours.items():
        pairs = [(verdicts, theirs[tag][prompt]) for prompt, verdicts in group.items()]
        totals = np.array([[sum(a), len(a), sum(b), len(b)] for a, b in pairs], dtype=np.float64)
        sums = np.vstack([totals.sum(axis=0), resample(totals, rng, draws)])
        gains = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
        found[tag] = percentile_interval(gains[0], gains[1:], len(totals))
        all_draws.append(gains[1:])
    overall = sum(interval.mean for interval in found.values()) / len(found)
    return found | {"overall": percentile_interval(overall, np.mean(all_draws, axis=0), len(prompts))}


def doubts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What looks like a mistake in the set-up rather than like a weak generator, from rows with ``details``."""
    found, single = [], [row["correct"] for row in results if row["tag"] == "single_object"]
    hint = "check the detector's weights, its classes and the images"
    if single and sum(single) < len(single) / 2:
        found.append(f"only {sum(single) / len(single):.0%} of single objects are found: {hint}")
    empty = sum(row.get("details") == "{}" for row in results)
    if empty > len(results) / 2:
        found.append(f"{empty} of {len(results)} images have no detection at all: {hint}")
    return found


def key_of(filename: str) -> str:
    """Prompt and image of a file name, equal for all folders that the files may be in.

    Raises:
        ValueError: a name of another form.
    """
    return "{:05d}/{:05d}".format(*_position(filename))


def _by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[bool]]]:
    """Tag -> metadata as JSON -> verdicts."""
    by_tag: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        key = row["metadata"] if isinstance(row["metadata"], str) else json.dumps(row["metadata"])
        by_tag.setdefault(row["tag"], {}).setdefault(key, []).append(bool(row["correct"]))
    return by_tag


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
