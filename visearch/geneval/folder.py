"""GenEval's folder of images: ``00000/metadata.jsonl`` with the prompt's line, ``00000/samples/00000.png`` and so on.

Names have five digits where we write them; read are those of any number of digits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visearch.geneval.rules import check_metadata

__all__ = ["IMAGES_PER_PROMPT", "PromptFolder", "config_of", "image_path", "name_of", "read_folder"]

IMAGES_PER_PROMPT = 4  # of the published protocol


@dataclass(frozen=True)
class PromptFolder:
    """One prompt: its number, where it is, its line of the prompt file, and its images by number."""

    number: int
    path: Path
    line: Mapping[str, Any]
    images: Mapping[int, Path]


def name_of(number: int) -> str:
    """Of a prompt's folder, and of an image without its ending."""
    return f"{number:05d}"


def image_path(root: Path, prompt: int, image: int) -> Path:
    return root / name_of(prompt) / "samples" / f"{name_of(image)}.png"


def read_folder(root: Path, judged: bool = True) -> list[PromptFolder]:
    """All prompts of a folder in the order of their numbers; there may be none.

    Args:
        root: the folder.
        judged: every line must say what its images are judged by; else a prompt is enough.

    Raises:
        ValueError: no such folder; one of a prompt without a line that follows the schema; two of one number.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; give the one that holds 00000/metadata.jsonl and 00000/samples")
    found: dict[int, PromptFolder] = {}
    for path in sorted(p for p in root.iterdir() if p.is_dir() and p.name.isdecimal()):
        number = int(path.name)
        if number in found:
            raise ValueError(f"{path} and {found[number].path} have one number; leave only one of them")
        images = {int(p.stem): p for p in sorted(path.glob("samples/*.png")) if p.stem.isdecimal()}
        found[number] = PromptFolder(number, path, _line(path / "metadata.jsonl", judged), images)
    return [found[number] for number in sorted(found)]


def config_of(root: Path) -> dict[str, Any]:
    """What ``visearch geneval generate`` noted of a folder that it made; empty for others."""
    path = root / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _line(path: Path, judged: bool) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; each prompt's folder holds its line of the prompt file under that name")
    try:
        line = json.loads(path.read_text(encoding="utf-8"))
        return check_metadata(line) if judged else {"prompt": line["prompt"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}, line 1: {error}") from error
