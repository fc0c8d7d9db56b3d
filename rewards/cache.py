"""Scores that were given before need not be computed again: by the content of samples, in memory or in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visearch.protocols import Reward, RewardError, Scores, identity
from visearch.rewards.base import texts_for
from visearch.rewards.combine import Operators
from visearch.rewards.images import to_pixels

__all__ = ["Cached"]

MIB = 2**20
LEAST = 2**16  # bytes: a file takes some pages before it holds anything
APPLICATION, VERSION = 0x76697363, 1  # what marks a file as ours, and its layout
WAIT = 60.0  # seconds for other processes to finish their writes
TENTH = 10  # so much goes when the cap is reached, so that it is not reached again at once
# of the reward, beside what the protocol asks for, where it has them
PASSED_ON = ("family", "modality", "scale", "note", "training_data", "size", "needs_prompt", "noise_aware",
             "not_held_out_for", "checker", "image_features")  # fmt: skip

Key = bytes
Entry = tuple[float, dict[str, float]]


class Cached(Operators):
    """A reward that remembers its scores, and so its components, by the content of what was scored.

    A score is found again for the same pixels (after EXIF rotation, as 8-bit RGB, whatever file, tensor or image they
    come from), the same prompt, the same ``config_hash`` of the reward (weights, revision, options), and, where the
    reward reads them, the same noise level and metadata. Failed samples are not remembered. Budgets count found scores
    as calls; :attr:`calls` and :attr:`evaluations`, and the ledger of a run, tell how many were really computed.

    Several processes may share a file (SQLite in WAL mode). What cannot be written, on a full disk for example, is
    returned all the same, with one warning.

    Args:
        reward: any but a relative one, whose scores hang on their companions: cache its members.
        path: file, made if need be; ``None`` remembers in memory.
        max_bytes: most that the file holds, its journal (at most some MiB) aside; what was not used for longest goes.
        config: stands for ``config_hash`` of a reward that has none, such as a function: change it with the function.

    Attributes:
        calls: samples asked for so far, by this object.
        evaluations: those of them that the reward had to score.

    Raises:
        ValueError: a relative reward; a reward on a file without ``config_hash`` and ``config``; ``max_bytes`` below
            64 KiB; a file that is damaged, no cache of scores, or in a folder that cannot be written.
    """

    def __init__(
        self, reward: Any, path: str | Path | None = None, max_bytes: int = 64 * MIB, config: str | None = None
    ) -> None:
        from visearch.rewards import resolve

        self.reward: Reward = resolve(reward)
        if getattr(self.reward, "relative", False):
            raise ValueError(f"{self.reward.name} is relative, so a score holds for its companions only; cache members")
        if config is None and not hasattr(self.reward, "config_hash") and path is not None:
            raise ValueError(
                f"{self.reward.name} has no config_hash, so a file could not tell when it changes; give "
                "config='...', and another one whenever it does"
            )
        if max_bytes < LEAST:
            raise ValueError(f"max_bytes={max_bytes} must be at least {LEAST}")
        self.config, self.calls, self.evaluations = config, 0, 0
        for name in ("name", "higher_is_better", "range", "licence", "source", "needs"):
            setattr(self, name, getattr(self.reward, name))
        for name in PASSED_ON:
            if hasattr(self.reward, name):
                setattr(self, name, getattr(self.reward, name))
        self._store = _Store(path, max_bytes)
        self._meanwhile: ExitStack | None = None

    @property
    def config_hash(self) -> str:
        return self.config or identity(self.reward)

    @property
    def uncached(self) -> Reward:
        """The reward itself, for checks that must not be answered from memory."""
        return self.reward

    @contextmanager
    def resident(self) -> Iterator[None]:
        """A model that is on its device for calls alone stays there meanwhile, from the first call that needs it."""
        with ExitStack() as self._meanwhile:
            try:
                yield
            finally:
                self._meanwhile = None

    def score(
        self,
        samples: Any,
        prompts: str | Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N samples; equal ones among them are scored once.

        Raises:
            ValueError: no samples, another number of prompts, or what is no picture.
            RewardError: the reward returned another number of scores than it got samples; none of them is kept.
        """
        pixels, broken = to_pixels(samples)
        texts = texts_for(prompts, len(pixels))
        context = [None] * len(pixels) if metadata is None else list(metadata)
        seen = [samples[i] if i in broken else image for i, image in enumerate(pixels)]
        keys = [self._key(*of, noise_level) for of in zip(seen, texts, context, strict=True)]
        first: dict[Key, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        found, reasons = self._store.read(first), {}
        missing = {key: row for key, row in first.items() if key not in found}
        if missing:
            if self._meanwhile is not None and hasattr(self.reward, "resident"):
                self._meanwhile.enter_context(self.reward.resident())
            rows = list(missing.values())
            part = samples if len(rows) == len(keys) else _pick(samples, rows)
            options = {"noise_level": noise_level, "metadata": [context[i] for i in rows]}
            fresh, reasons = self._entries(missing, self.reward.score(part, [texts[i] for i in rows], **options))
            self._store.write({key: entry for key, entry in fresh.items() if not math.isnan(entry[0])})
            found |= fresh
        self.calls += len(keys)
        self.evaluations += len(missing)
        return _scores([found[key] for key in keys], [reasons.get(key) for key in keys], len(keys) - len(missing))

    def _entries(self, keys: Collection[Key], scores: Scores) -> tuple[dict[Key, Entry], dict[Key, str]]:
        """What the reward gave for these keys, in their order, and the reasons."""
        values = torch.as_tensor(scores.values, dtype=torch.float32)
        if values.shape != (len(keys),):
            raise RewardError(
                f"reward {self.name!r} returned scores of shape {tuple(values.shape)} for {len(keys)} samples; "
                "return one number a sample, in order"
            )
        columns = {name: column.tolist() for name, column in scores.components.items()}
        entries = {
            key: (value, {name: column[i] for name, column in columns.items()})
            for i, (key, value) in enumerate(zip(keys, values.tolist(), strict=True))
        }
        return entries, {key: scores.reasons[i] for i, key in enumerate(keys) if i in scores.reasons}

    def _key(self, pixels: Tensor, prompt: str, context: Any, level: float | None) -> Key:
        reads_level = "noise_level" in self.needs or getattr(self, "noise_aware", False)
        facts = {
            "reward": self.config_hash,
            "prompt": prompt,
            "level": level if reads_level else None,
            "metadata": context if "metadata" in self.needs else None,
            "pixels": [str(pixels.dtype), *pixels.shape],
        }
        made = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        made.update(pixels.cpu().contiguous().view(torch.uint8).numpy())
        return made.digest()


def _pick(samples: Any, rows: Sequence[int]) -> Any:
    return samples[rows] if torch.is_tensor(samples) else [samples[i] for i in rows]


def _scores(entries: Sequence[Entry], reasons: Sequence[str | None], cached: int) -> Scores:
    names = dict.fromkeys(name for _, parts in entries for name in parts)
    return Scores(
        torch.tensor([value for value, _ in entries]),
        {name: torch.tensor([parts.get(name, math.nan) for _, parts in entries]) for name in names},
        {i: reason for i, reason in enumerate(reasons) if reason is not None},
        cached,
    )


# --- where they are kept --------------------------------------------------------------------------------------


class _Store:
    """Entries by key in an SQLite file, or in memory; whoever was not asked for longest makes room for new ones.

    What fails after the file was opened costs the entry, never the run: it is told once.
    """

    def __init__(self, path: str | Path | None, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._lock, self._told = threading.Lock(), False
        self._inherited: list[sqlite3.Connection | None] = []
        self._db: sqlite3.Connection | None = _connect(path, max_bytes)
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Store, (self.path, self.max_bytes)  # what another process unpickles opens the file itself

    def read(self, keys: Collection[Key]) -> dict[Key, Entry]:
        def look_up(db: sqlite3.Connection) -> dict[Key, Entry]:
            rows = (db.execute("SELECT key, value, parts FROM scores WHERE key = ?", (key,)).fetchone() for key in keys)
            return {row[0]: (row[1], json.loads(row[2])) for row in rows if row is not None}

        found = self._attempt(look_up) or {}
        now = time.time_ns()
        used = [(now, key) for key in found]
        if used:
            self._attempt(lambda db: db.executemany("UPDATE scores SET used = ? WHERE key = ?", used))
        return found

    def write(self, entries: Mapping[Key, Entry]) -> None:
        now = time.time_ns()
        rows = [(key, value, json.dumps(parts), now) for key, (value, parts) in entries.items()]
        self._attempt(lambda db: _insert(db, rows))

    def _attempt(self, work: Any) -> Any:
        """What ``work`` returns, in one transaction; ``None`` where the file fails."""
        with self._lock:
            try:
                if self._owner != os.getpid():
                    self._reopen()
                if self._db is not None:
                    with self._db:
                        return work(self._db)
            except (sqlite3.Error, _Unusable) as error:
                if not self._told:
                    self._told = True
                    warnings.warn(f"cache of scores {self.path}: {error}; scores are kept nowhere else", stacklevel=4)
        return None

    def _reopen(self) -> None:
        """A connection of this process's own: SQLite forbids a forked one so much as to close what it inherited."""
        self._inherited.append(self._db)
        self._db, self._owner = None, os.getpid()  # tried once: where it fails, nothing is remembered
        self._db = _connect(self.path, self.max_bytes)


class _Unusable(ValueError):
    """A file that is damaged, something else than a store, or cannot be written."""


def _connect(path: str | Path | None, max_bytes: int) -> sqlite3.Connection:
    """An open store.

    Raises:
        _Unusable: the file cannot be one.
    """
    where = ":memory:" if path is None else str(path)
    try:
        db = sqlite3.connect(where, timeout=WAIT, isolation_level="IMMEDIATE", check_same_thread=False)
        fault = _prepare(db, max_bytes)
    except sqlite3.Error as error:
        fault = str(error)
    if fault:
        why = " ".join(fault.split())
        raise _Unusable(f"path={where!r} is no cache of scores: {why}; choose another file, or delete it")
    return db


def _prepare(db: sqlite3.Connection, max_bytes: int) -> str | None:
    """Make the tables of a new file; what is wrong with an old one."""
    with db:
        db.execute("BEGIN IMMEDIATE")  # of several processes, one makes the tables
        mark = _pragma(db, "application_id"), _pragma(db, "user_version")
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if mark == (0, 0) and not tables:
            db.execute(
                "CREATE TABLE scores (key BLOB PRIMARY KEY, value REAL NOT NULL, parts TEXT NOT NULL, "
                "used INTEGER NOT NULL) WITHOUT ROWID"
            )
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {VERSION}")
        elif mark != (APPLICATION, VERSION):
            return f"it is marked {mark}, not {(APPLICATION, VERSION)}"
    if (state := _pragma(db, "quick_check(1)")) != "ok":
        return state
    _pragma(db, "journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")  # with a WAL, a crash may lose the latest scores but damages nothing
    _pragma(db, f"max_page_count = {max_bytes // _pragma(db, 'page_size')}")
    return None


def _pragma(db: sqlite3.Connection, text: str) -> Any:
    return db.execute(f"PRAGMA {text}").fetchone()[0]


def _insert(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    """Add entries; where the cap is reached, the tenth that was not used for longest goes first."""
    while True:
        try:
            db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?)", rows)
            return
        except sqlite3.OperationalError as error:
            (count,) = db.execute("SELECT count(*) FROM scores").fetchone()
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL or not count:
                raise
            db.rollback()
            oldest = "SELECT key FROM scores ORDER BY used LIMIT ?"
            with db:  # fails in turn where it is the disk that is full
                db.execute(f"DELETE FROM scores WHERE key IN ({oldest})", (max(1, count // TENTH),))
