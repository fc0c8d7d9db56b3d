"""Whose turn it is: whoever came first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Turns"]

PATIENCE = 0.1  # seconds between two looks whether someone who waits has gone


class Turns:
    """A line of who wants what only one may use at a time; ``len`` of it counts those who use it or wait."""

    def __init__(self) -> None:
        self._line: list[object] = []
        self._moved = threading.Condition()

    def __len__(self) -> int:
        return len(self._line)

    @contextmanager
    def place(self) -> Iterator[Callable[[], int]]:
        """Stand in line until the block ends; gives a function that waits a moment and says how many are before one.

        It is one's turn at 0, and stays so.
        """
        mine = object()

        def before() -> int:
            with self._moved:
                self._moved.wait_for(lambda: self._line[0] is mine, PATIENCE)
                return self._line.index(mine)

        with self._moved:
            self._line.append(mine)
        try:
            yield before
        finally:
            with self._moved:
                self._line.remove(mine)
                self._moved.notify_all()

    @contextmanager
    def held(self, cancelled: Callable[[], bool]) -> Iterator[bool]:
        """Wait for the turn, unless cancelled meanwhile: whether it came; who was cancelled has left the line."""
        with self.place() as before:
            while (waiting := before()) and not cancelled():
                pass
            if not waiting:
                yield True
                return
        yield False
