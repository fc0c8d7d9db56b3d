"""``visearch geneval score``: GenEval's verdict on every image of a folder, one line each, as upstream writes them."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visearch.assets.words import class_names
from visearch.geneval.folder import IMAGES_PER_PROMPT, PromptFolder, config_of, read_folder
from visearch.geneval.rules import check_limits, keep, verdict
from visearch.geneval.summary import key_of
from visearch.journal import append_line, changes, read_lines, replace_text, settings_hash
from visearch.options import one_line
from visearch.parallel import place, work
from visearch.prompts import spread

__all__ = ["Examiner", "Rules", "Sample", "load_examiner", "read_meta", "score"]

FORMAT = 1
ORIENTATION = 0x0112  # the EXIF tag that may swap width and height
PUBLISHED = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # sha256 of GenEval's prompt file


@dataclass(frozen=True)
class Rules:
    """Options of the verdict, see :func:`visearch.geneval.judge`.

    Raises:
        ValueError: one is out of range.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        check_limits(self.max_objects, self.max_overlap)
        for name in ("threshold", "counting_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if not self.position_threshold >= 0:
            raise ValueError(f"position_threshold is {self.position_threshold}; it must be at least 0")


@dataclass(frozen=True)
class Sample:
    """An image to be judged by the line of its prompt."""

    path: Path
    line: Mapping[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.path.as_posix())


class Examiner:
    """Judges images.

    Args:
        detector: see :class:`visearch.rewards.detection.Detector`.
        colors: names the colours of what it found.
        rules: of the verdict.
    """

    def __init__(self, detector: Any, colors: Any, rules: Rules) -> None:
        self.detector, self.colors, self.rules = detector, colors, rules
        known = {name: place for place, name in enumerate(class_names())}
        self.order = sorted(detector.class_names, key=lambda name: known.get(name, len(known)))

    def settings(self) -> dict[str, Any]:
        """All that decides a verdict, JSON-able."""
        parts = {"detector": self.detector, "colors": self.colors}
        return {
            "format": FORMAT,
            **{name: {"id": part.id, "revision": part.revision} for name, part in parts.items()},
            "dtype": self.detector.dtype,
            "rules": vars(self.rules),
        }

    def check(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Refuse prompts that ask for what the detector does not know, with a ValueError."""
        for line in lines:
            for clause in (*line["include"], *line.get("exclude", ())):
                if clause["class"] not in self.detector.class_names:
                    raise ValueError(
                        f"{self.detector.id} does not know {clause['class']!r} of {line['prompt']!r}; it knows "
                        f"{', '.join(self.detector.class_names)}: choose another --detector or other prompts"
                    )

    def __call__(self, batch: tuple[Sequence[Mapping[str, Any]], Sequence[Image.Image]]) -> list[dict[str, Any]]:
        """The rows of results for lines and RGB images of one size, without file names."""
        lines, images = batch
        above = min(self.rules.threshold, self.rules.counting_threshold)
        found = self.detector.detect(images, above=above)
        return [self._row(*each) for each in zip(lines, images, found, strict=True)]

    def _row(self, line: Mapping[str, Any], image: Image.Image, instances: Sequence[Any]) -> dict[str, Any]:
        kept = self._kept(instances, counting=line["tag"] == "counting")
        boxes = {name: [[*i.box, i.score] for i in kept[name]] for name in self.order if name in kept}
        found = verdict(
            line,
            boxes,
            lambda name, asked: self.colors.classify(image, name, kept[name][: len(asked)]),
            self.rules.position_threshold,
        )
        return {
            "tag": line["tag"],
            "prompt": line["prompt"],
            "correct": found.correct,
            "reason": found.reason,
            "metadata": json.dumps(line),
            "details": json.dumps(boxes),
        }

    def _kept(self, instances: Sequence[Any], counting: bool) -> dict[str, list[Any]]:
        """Class -> the instances that count, best first."""
        rules = self.rules
        by_name: dict[str, list[Any]] = {}
        for instance in instances:
            by_name.setdefault(self.detector.class_names[instance.label], []).append(instance)
        limits = {"max_objects": rules.max_objects, "max_overlap": rules.max_overlap}
        limits["threshold"] = rules.counting_threshold if counting else rules.threshold
        kept = {}
        for name, found in by_name.items():
            boxes = np.array([[*i.box, i.score] for i in found], dtype=np.float32)
            kept[name] = [found[i] for i in keep(boxes, name, **limits)]
        return {name: found for name, found in kept.items() if found}


# --- images ---------------------------------------------------------------------------------------------------


def batches_of(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Images of one size that are judged together, in order.

    Raises:
        ValueError: a file that is no image.
    """
    groups = (list(group) for _, group in groupby(samples, key=lambda sample: _size(sample.path)))
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _size(path: Path) -> tuple[Any, ...]:
    try:
        with Image.open(path) as image:
            return image.size, image.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    why = "no image" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return ValueError(f"{path} does not open ({why}); delete it and make it again")


# --- results --------------------------------------------------------------------------------------------------


def score(
    make: Callable[[], Examiner],
    batches: Sequence[Sequence[Sample]],
    outfile: Path,
    key: str,
    *,
    upstream: bool = False,
    shard: tuple[int, int] = (1, 1),
    minutes: float | None = None,
    ray: str | None = None,
    gpus: int = 0,
    progress: bool = False,
) -> int:
    """Judge what ``outfile`` lacks of this process's share; returns how many images of it are still missing.

    Args:
        make: gives what judges images; see :func:`visearch.parallel.work`.
        batches: of the whole job.
        outfile: JSON lines; only appended to.
        key: name of the settings.
        upstream: leave out our eighth key, ``config``.
        shard: (i, n): only batches i, i + n, ... of all, from 1.
        minutes: begin no batch after so long.
        ray, gpus: see :func:`visearch.parallel.work`.
        progress: show a bar.

    Raises:
        ValueError: a damaged line, or one of other settings.
    """
    from tqdm.auto import tqdm

    done = _done(outfile, key)
    mine = batches[shard[0] - 1 :: shard[1]]
    # whole, though some of it may be done: what is judged together never changes, and with it no bit of a score
    todo = [batch for batch in mine if any(sample.key not in done for sample in batch)]
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    pieces = map(_loaded, takewhile(lambda _: time.monotonic() < end, todo))
    total = sum(map(len, mine))
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        bar.update(sum(sample.key in done for batch in mine for sample in batch))
        for number, rows in work(make, pieces, ray, gpus):
            for sample, row in zip(todo[number], rows, strict=True):
                if sample.key not in done:
                    line = {"filename": sample.path.as_posix(), **row} | ({} if upstream else {"config": key})
                    append_line(outfile, _as_upstream(line))
                    done.add(sample.key)
                    bar.update()
    return sum(sample.key not in done for batch in mine for sample in batch)


def _loaded(batch: Sequence[Sample]) -> tuple[list[Mapping[str, Any]], list[Image.Image]]:
    return [sample.line for sample in batch], [_read(sample.path) for sample in batch]


def _as_upstream(row: Mapping[str, Any]) -> str:
    return json.dumps(row, separators=(",", ":")).replace("/", "\\/")


def _done(outfile: Path, key: str) -> set[str]:
    """Keys of the images that were judged; a torn last line is cut off."""
    done = set()
    for number, row in read_lines(outfile, mend=True):
        if not isinstance(row, dict) or "filename" not in row:
            raise ValueError(f"{outfile}, line {number} is no result of an image; choose another --outfile")
        if row.get("config", key) != key:
            raise ValueError(f"{outfile}, line {number} is of other settings; choose another --outfile")
        done.add(key_of(row["filename"]))
    return done


# --- provenance -----------------------------------------------------------------------------------------------


def meta_path(outfile: Path) -> Path:
    return outfile.with_name(outfile.name + ".meta.json")


def read_meta(outfile: Path) -> dict[str, Any]:
    """The provenance of results; empty where there is none."""
    path = meta_path(outfile)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _claim(outfile: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Write the provenance; the name of the settings.

    Raises:
        ValueError: the file has results of other settings.
    """
    settings, path = json.loads(json.dumps(settings)), meta_path(outfile)
    key = settings_hash(settings)
    if outfile.is_file() and outfile.stat().st_size:
        was, now = changes(read_meta(outfile).get("settings", {}), settings)
        if now:
            raise ValueError(f"{outfile} was scored with {was}, now it is {now}; choose another --outfile")
    outfile.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"config": key, "settings": settings, **about}, indent=2))
    return key


def _origin(root: Path, folders: Sequence[PromptFolder]) -> dict[str, Any]:
    """Where prompts and images come from."""
    text = "".join(json.dumps(folder.line) + "\n" for folder in folders)
    digest = hashlib.sha256(text.encode()).hexdigest()
    made = config_of(root)
    known = {word for folder in folders if made for word in _known(folder.path / "search.json")}
    return {
        "benchmark": "GenEval" if digest == PUBLISHED else "GenEval-style",
        "prompts": {"count": len(folders), "sha256": digest},
        "images": made.get("settings"),
        "search_knew": sorted(known),
    }


def _known(path: Path) -> set[str]:
    """Benchmarks whose questions the rewards know that guided a prompt's searches."""
    images = json.loads(path.read_text(encoding="utf-8"))["images"] if path.is_file() else {}
    return {word for record in images.values() for word in record["not_held_out_for"]}


# --- the command ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Images that are missing: not made, or not judged, of this process's share."""
    root = Path(options.imagedir)
    if options.batch_size < 1 or (options.images_per_prompt or 1) < 1:
        raise ValueError("--batch-size and --images-per-prompt must be at least 1")
    rules, rest = _parsed(options.options)
    folders = read_folder(root)
    if not folders:
        print(f"visearch: {root} holds no prompt's folder such as 00000/metadata.jsonl", file=sys.stderr)
        return 1
    folders = [folders[i] for i in sorted(spread(len(folders), options.limit))]
    samples = [Sample(path, folder.line) for folder in folders for _, path in sorted(folder.images.items())]
    batches = batches_of(samples, options.batch_size)
    device, gpus = place(options.device, options.ray)
    make = partial(load_examiner, options.detector, options.detector_path, rules, rest)
    examiner = make("cpu" if gpus else device)
    examiner.check(folder.line for folder in folders)
    made = config_of(root)
    images = None if not made else settings_hash(made["settings"])
    each = options.images_per_prompt or made.get("images_per_prompt", IMAGES_PER_PROMPT)
    outfile = _outfile(options, root)
    about = {"expected": each * len(folders), **_about(examiner, device), **_origin(root, folders)}
    key = _claim(outfile, {**examiner.settings(), "images": images}, about)
    _warn(about)
    left = score(
        (lambda: examiner) if options.ray is None else partial(make, device),
        batches,
        outfile,
        key,
        upstream=options.upstream_format,
        shard=options.shard,
        minutes=options.minutes,
        ray=options.ray,
        gpus=gpus,
        progress=True,
    )
    print(outfile)
    return left + sum(max(0, each - len(folder.images)) for folder in folders)


def load_examiner(name: str, path: str | None, rules: Rules, options: Mapping[str, str], device: str) -> Examiner:
    """A detector by name, with the colours and rules that go with it.

    Raises:
        ValueError: an unknown name, or a path or option that the detector does not take.
    """
    from visearch.rewards.detection import DETECTORS

    return Examiner(*DETECTORS.load(name)(path, device, **options), rules)


def _parsed(given: Sequence[str]) -> tuple[Rules, dict[str, str]]:
    """Rules of the verdict, and options that go to the detector."""
    kinds, rules, rest = {f.name: type(f.default) for f in fields(Rules)}, {}, {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--options {text}: write NAME=VALUE; the verdict has {', '.join(kinds)}")
        try:
            (rules if name in kinds else rest)[name] = kinds.get(name, str)(value)
        except ValueError:
            raise ValueError(f"--options {text}: {value!r} is no number") from None
    return Rules(**rules), rest


def _outfile(options: argparse.Namespace, root: Path) -> Path:
    given, (index, count) = Path(options.outfile or root / "results.jsonl"), options.shard
    return given if count == 1 else given.with_name(f"{given.stem}-{index}-of-{count}{given.suffix}")


def _about(examiner: Examiner, device: str) -> dict[str, Any]:
    from visearch.report import versions

    return {
        "comparability": examiner.detector.comparability,
        "device": device,
        "command": shlex.join(["visearch", *sys.argv[1:]]),
        "versions": versions(),
    }


def _warn(about: Mapping[str, Any]) -> None:
    print(about["comparability"], file=sys.stderr)
    if about["search_knew"]:
        knew = ", ".join(about["search_knew"])
        warnings.warn(f"the images were searched by a reward that knows what {knew} asks for", stacklevel=2)
