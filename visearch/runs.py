"""What ``visearch compare`` measured, kept as it comes: one line of JSON a run, in ``runs*.jsonl``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visearch.journal import append_line, changes, read_lines, settings_hash

__all__ = ["Key", "Runs"]

Key = tuple[Any, ...]


@dataclass
class Runs:
    """Records by key, in memory and, if there is a folder, in one append-only file a shard.

    Args:
        folder: where; ``None`` is nowhere.
        config: of all records; a folder of another one is refused.
        shard: names the file that is appended to; the files of other shards are only read.

    Raises:
        ValueError: the folder belongs to other settings, or a file is damaged elsewhere than at its end.
    """

    folder: str | Path | None
    config: dict[str, Any]
    shard: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.records: dict[Key, dict[str, Any]] = {}
        self._settled: dict[str, Any] | None = None
        self.hash = settings_hash(self.config)
        if self.folder is None:
            return
        from visearch.report import check_folder

        self.folder = check_folder(self.folder)
        known = self.folder / "config.json"
        if known.exists():
            kept = json.loads(known.read_text())
            other, _ = changes(kept["config"], self.config)
            if other:
                raise ValueError(
                    f"{self.folder} holds results of other settings ({', '.join(other)}); choose another folder"
                )
            self.settings, self._settled = kept["settings"], dict(kept["settings"])
        index, count = self.shard
        self.path = self.folder / f"runs{f'-{index}-of-{count}' * (count > 1)}.jsonl"
        for path in sorted(self.folder.glob("runs*.jsonl")):
            self._read(path)

    def claim(self, weights: Mapping[str, str]) -> None:
        """Say by which weights of its rewards results are made from here on.

        Args:
            weights: reward -> :func:`visearch.protocols.identity`.

        Raises:
            ValueError: the folder has results of a reward of that name with others.
        """
        known = self.settings.get("weights", {})
        if other := [name for name, own in weights.items() if known.get(name, own) != own]:
            raise ValueError(
                f"{self.folder} holds results of other weights or options of {', '.join(other)}; choose another folder"
            )
        if self.records and "weights" not in self.settings:
            warnings.warn(
                f"{self.folder} does not tell by which weights of its rewards it was measured; those of now are taken "
                "for them",
                stacklevel=3,
            )
        self.settings["weights"] = {**known, **weights}

    def _read(self, path: Path) -> None:
        for number, line in read_lines(path, mend=path == self.path):
            try:
                key, config = tuple(line["key"]), line["config"]
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); delete that line to run it again"
                ) from error
            if config != self.hash:
                raise ValueError(f"{path}, line {number} is of other settings; choose another folder")
            self.records[key] = line["record"]

    def has(self, key: Key) -> bool:
        """Whether it need not be run; what failed is tried again."""
        return key in self.records and "error" not in self.records[key]

    def of(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        return [self.records[key] for key in keys if key in self.records]

    def append(self, key: Key, record: dict[str, Any]) -> None:
        self.records[key] = record
        if self.folder is None:
            return
        from visearch.report import write_json

        if self._settled != self.settings:
            write_json(self.folder / "config.json", {"config": self.config, "settings": self.settings})
            self._settled = dict(self.settings)
        append_line(self.path, json.dumps({"key": key, "config": self.hash, "record": record}, allow_nan=False))
