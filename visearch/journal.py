"""Files of long runs: lines that are only appended, contents that are replaced whole, settings that never mix.

A process may be killed at any moment. What is lost is at most the line or file that was being written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visearch.protocols import stable_hash

__all__ = ["append_line", "changes", "read_lines", "replace_text", "settings_hash"]


def read_lines(path: Path, mend: bool = False) -> Iterator[tuple[int, Any]]:
    """(number from 1, content) of each JSON line; a torn last one, without newline or no JSON, is left out.

    Args:
        path: need not exist.
        mend: cut a torn last line off the file, so that it can be appended to.

    Raises:
        ValueError: a line before the last is no JSON.
    """
    data = path.read_bytes() if path.exists() else b""
    whole, newline, torn = data.rpartition(b"\n")
    lines, end = whole.split(b"\n") if newline else [], len(whole) + len(newline)
    contents = []
    for number, text in enumerate(lines, 1):
        try:
            contents.append(json.loads(text))
        except ValueError as error:
            if number < len(lines) or torn:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); delete that line to run it again"
                ) from error
            end -= len(text) + 1
    if mend and end < len(data):
        os.truncate(path, end)
    yield from enumerate(contents, 1)


def append_line(path: Path, text: str) -> None:
    """Append one line and wait until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a whole file at once: others see the old one or the new one, also where several processes write it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Name of JSON-able settings, the same in every process and order of keys."""
    return f"{stable_hash(json.dumps(settings, sort_keys=True)):016x}"


def changes(known: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that differ, as they were and as they are; both are empty where nothing does."""
    changed = [k for k in {**known, **settings} if known.get(k) != settings.get(k)]
    return {k: known.get(k) for k in changed}, {k: settings.get(k) for k in changed}
