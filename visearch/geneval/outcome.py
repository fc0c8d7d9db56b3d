"""``visearch geneval summary``: files of results merged, GenEval's figures, and what a search left to be gained."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from visearch.geneval.score import read_meta
from visearch.geneval.summary import Summary, differences, doubts, key_of, summarize
from visearch.journal import read_lines
from visearch.options import STOPS
from visearch.prompts import read_prompts
from visearch.report import markdown_table
from visearch.statistics import Interval, best_of_curve

__all__ = ["Conflict", "Outcome", "candidates", "read_outcome", "table"]

DRIFT = "GenEval drifts from human judgement as generators improve: up to 17.7 % absolute error (arXiv 2512.16853)"


class Conflict(ValueError):
    """Files of results that do not go together."""


@dataclass(frozen=True)
class Outcome:
    """The results of one run, whatever files they were in.

    Args:
        rows: one an image, in the order of prompts and images.
        metas: the provenance of each file that has one.
    """

    rows: Sequence[Mapping[str, Any]]
    metas: Sequence[Mapping[str, Any]]

    @cached_property
    def summary(self) -> Summary:
        return summarize(self.rows)

    @cached_property
    def records(self) -> list[dict[str, Any]] | None:
        """What ``search.json`` tells of each image; ``None`` where one has none."""
        kept: dict[Path, dict[str, Any]] = {}
        found = []
        for row in self.rows:
            file = Path(row["filename"])
            path = file.parents[1] / "search.json"
            if path not in kept:
                kept[path] = json.loads(path.read_text(encoding="utf-8"))["images"] if path.is_file() else {}
            found.append(kept[path].get(file.stem))
        return None if None in found else found

    def missing(self, lines: Sequence[Mapping[str, Any]] | None = None) -> int:
        """Images that are not there, going by the prompt with most of them, what was to be scored, and ``lines``."""
        number = Counter(key_of(row["filename"]).partition("/")[0] for row in self.rows)
        each = max(number.values())
        short = sum(each - count for count in number.values())
        if lines is not None:
            one_each = {key_of(row["filename"]).partition("/")[0]: row["metadata"] for row in self.rows}
            absent = Counter(json.dumps(line) for line in lines) - Counter(one_each.values())
            short += each * absent.total()
        return max(short, max((meta["expected"] for meta in self.metas), default=0) - len(self.rows))

    def protocol(self) -> str:
        """What was done, so that figures of other protocols are not put beside it."""
        each = self.summary.num_images / self.summary.num_prompts
        meta = self.metas[0] if self.metas else {}
        text = f"{meta.get('benchmark', 'GenEval-style')}, {self.summary.num_prompts} prompts x {each:g} images"
        if made := meta.get("images"):
            how = "each sampled once"
            if made["search"] != "none":
                how = f"each the winner of a search of its own, {made['hyperparameters']} guided by {made['reward']}"
                how += "".join(f", {name} {made[name]}" for name in STOPS if name in made)
            text += f", {made['model']}, {how}"
        return text + (f", judged by {meta['settings']['detector']['id']} ({meta['comparability']})" if meta else "")

    def cost(self) -> dict[str, float] | None:
        """Means of an image, where they are known."""
        if self.records is None:
            return None
        kinds = ("nfe", "decodes", "rewards", "seconds")
        return {kind: sum(record[kind] for record in self.records) / len(self.records) for kind in kinds}


def read_outcome(files: Sequence[str | Path]) -> Outcome:
    """Merge files of results, of shares of the work or of the same images.

    Raises:
        ValueError: no results; a damaged file.
        Conflict: an image that was judged in two ways, or results of several settings.
    """
    rows: dict[str, dict[str, Any]] = {}
    origin: dict[str, Path] = {}
    for path in map(Path, files):
        if not path.is_file():
            raise ValueError(f"{path} is no file; give what visearch geneval score wrote")
        for number, row in read_lines(path):
            if not isinstance(row, dict) or not {"filename", "tag", "correct", "metadata"} <= row.keys():
                raise ValueError(f"{path}, line {number} is no result of an image")
            key = key_of(row["filename"])
            first = next(iter(rows.values()), row)
            if row.get("config") != first.get("config"):
                raise Conflict(f"{path}, line {number} is of other settings than those before; sum up each alone")
            if key in rows and _content(rows[key]) != _content(row):
                raise Conflict(f"{path}, line {number}: image {key} was judged otherwise in {origin[key]}")
            rows.setdefault(key, row)
            origin.setdefault(key, path)
    if not rows:
        raise ValueError(f"no results in {', '.join(map(str, files))}; run visearch geneval score first")
    return Outcome([rows[key] for key in sorted(rows)], list(filter(None, map(read_meta, map(Path, files)))))


def _content(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "filename"}


# --- what a search left -----------------------------------------------------------------------------------------


def candidates(outcome: Outcome) -> dict[str, dict[str, dict[str, float]]]:
    """Judge -> row -> accuracy by tag and overall, from verdicts of held-out judges on all finished candidates.

    Rows are ``"one sample"`` (candidate 0), ``"best of n"`` (the mean over all subsets of n, where candidates are
    independent), ``"chosen"`` and ``"oracle"`` (the candidate that the judge itself would pick). Empty where
    ``search.json`` tells nothing, or of one candidate an image. A verdict that failed counts as wrong.
    """
    records = outcome.records or []
    if not any(len(record["candidates"]) > 1 for record in records):
        return {}
    made = outcome.metas[0].get("images") if outcome.metas else None
    independent = bool(made) and made["search"].startswith("best-of-n")
    tags = [row["tag"] for row in outcome.rows]
    found = {}
    for judge in records[0]["candidates"][0]["held_out"]:
        columns = dict(_columns(records, judge, independent))
        found[judge] = {name: _by_tag(values, tags) for name, values in columns.items()}
    return found


def _columns(records: Sequence[Mapping[str, Any]], judge: str, independent: bool) -> Iterator[tuple[str, list[float]]]:
    """Row of the table -> its value for each image."""
    verdicts = [{c["id"]: c["held_out"][judge] or 0.0 for c in record["candidates"]} for record in records]
    if all("0" in found for found in verdicts):
        yield "one sample", [found["0"] for found in verdicts]
    scores = [[c["score"] for c in record["candidates"]] for record in records]
    size = len(scores[0])
    if independent and all(len(s) == size and None not in s for s in scores):
        curve = best_of_curve(np.array(scores), np.array([list(found.values()) for found in verdicts]))
        for n in (2**k for k in range(1, math.ceil(math.log2(size)))):
            yield f"best of {n}", curve[:, n - 1].tolist()
    yield "chosen", [found[record["winner"]] for found, record in zip(verdicts, records, strict=True)]
    yield "oracle", [max(found.values()) for found in verdicts]


def _by_tag(values: Sequence[float], tags: Sequence[str]) -> dict[str, float]:
    groups = {tag: [v for v, t in zip(values, tags, strict=True) if t == tag] for tag in dict.fromkeys(tags)}
    means = {tag: sum(group) / len(group) for tag, group in groups.items()}
    return means | {"overall": sum(means.values()) / len(means)}


# --- tables -----------------------------------------------------------------------------------------------------


def table(outcome: Outcome, baseline: Outcome | None) -> list[dict[str, Any]]:
    """A row a task and one overall, of plain numbers.

    Raises:
        ValueError: the baseline is of other prompts.
    """
    summary, rows = outcome.summary, []
    whole = {"correct": sum(t.correct for t in summary.tasks.values()), "images": summary.num_images}
    for tag, task in summary.tasks.items():
        rows.append({"task": tag, "correct": task.correct, "images": task.images, **_interval(task.accuracy)})
    rows.append({"task": "overall", **whole, **_interval(summary.overall)})
    if baseline is not None:
        gains, other = differences(outcome.rows, baseline.rows), baseline.summary
        for row in rows:
            tag = row["task"]
            row["baseline"] = (other.overall if tag == "overall" else other.tasks[tag].accuracy).mean
            row |= {"gain": gains[tag].mean, "gain_low": gains[tag].low, "gain_high": gains[tag].high}
    return rows


def _interval(interval: Interval) -> dict[str, float]:
    return {"accuracy": interval.mean, "low": interval.low, "high": interval.high}


def markdown(outcome: Outcome, rows: Sequence[Mapping[str, Any]], baseline: Outcome | None) -> str:
    """Tables with what they are of."""
    heads = ["task", "correct", "images", "accuracy (95 %)"] + ["baseline", "gain (95 %)"] * (baseline is not None)
    lines = []
    for row in rows:
        line = [row["task"], row["correct"], row["images"], _shown(row, "accuracy", "low", "high")]
        if baseline is not None:
            line += [f"{row['baseline']:.2%}", _shown(row, "gain", "gain_low", "gain_high", "+")]
        lines.append(line)
    parts = [f"{outcome.protocol()}.", markdown_table(heads, lines)]
    if baseline is not None:
        parts.insert(1, f"Baseline: {baseline.protocol()}.")
    if cost := outcome.cost():
        parts.append(
            f"An image cost {cost['nfe']:.1f} model rows, {cost['decodes']:.1f} decodes, {cost['rewards']:.1f} scores "
            f"and {cost['seconds']:.2f} s."
        )
    for judge, found in candidates(outcome).items():
        names = list(next(iter(found.values())))
        cells = [[name, *(f"{values[tag]:.2%}" for tag in names)] for name, values in found.items()]
        parts.append(markdown_table([f"by {judge}, held out", *names], cells))
    return "\n\n".join(parts)


def _shown(row: Mapping[str, Any], mean: str, low: str, high: str, sign: str = "") -> str:
    return f"{row[mean]:{sign}.2%} [{row[low]:{sign}.2%}, {row[high]:{sign}.2%}]"


# --- the command ------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Images that are missing.

    Raises:
        Conflict: results that do not go together.
    """
    lines = None if options.prompts is None else read_prompts(options.prompts)
    outcome = read_outcome(options.files)
    baseline = read_outcome(options.baseline) if options.baseline else None
    rows = table(outcome, baseline)
    shown = markdown(outcome, rows, baseline)
    print(outcome.summary.text(), shown, sep="\n\n")
    _save(options, outcome, rows, shown)
    for doubt in doubts(outcome.rows):
        warnings.warn(doubt, stacklevel=2)
    print(DRIFT, file=sys.stderr)
    return outcome.missing(lines)


def _save(options: argparse.Namespace, outcome: Outcome, rows: Sequence[Mapping[str, Any]], shown: str) -> None:
    if options.markdown:
        Path(options.markdown).write_text(shown + "\n", encoding="utf-8")
    if options.csv:
        with Path(options.csv).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "protocol"])
            writer.writeheader()
            writer.writerows({**row, "protocol": outcome.protocol()} for row in rows)
    if options.json:
        content = {
            "protocol": outcome.protocol(),
            **outcome.summary.to_dict(),
            "table": list(rows),
            "cost": outcome.cost(),
            "candidates": candidates(outcome),
            "provenance": list(outcome.metas),
        }
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
