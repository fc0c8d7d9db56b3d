"""Who searches right now: one search a user, which its Cancel button and its closed browser end."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

__all__ = ["Sessions"]


@dataclass(frozen=True)
class _Claim:
    session: str
    cancelled: threading.Event = field(default_factory=threading.Event)


class Sessions:
    """Claims of users; a session is one open page, of which a user who logged in may have several.

    Args:
        limit: most claims at a time.
    """

    def __init__(self, limit: int = 32) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._claims: dict[str, _Claim] = {}

    def claim(self, user: str, session: str) -> None:
        """
        Raises:
            ValueError: a search of this user waits or runs, or too many of others do.
        """
        with self._lock:
            if user in self._claims:
                raise ValueError("a search of yours is still running; cancel it, or wait for its end")
            if len(self._claims) >= self.limit:
                raise ValueError(f"{len(self._claims)} searches run or wait already; try again in a while")
            self._claims[user] = _Claim(session)

    def claimed(self, session: str) -> threading.Event | None:
        """What is set as soon as the search that this session claimed shall end; ``None`` without a claim."""
        with self._lock:
            return next((c.cancelled for c in self._claims.values() if c.session == session), None)

    def cancel(self, session: str) -> None:
        """Ask this session's search to end with the best so far; nothing where it has none."""
        claim = self.claimed(session)
        if claim is not None:
            claim.set()

    def release(self, session: str) -> None:
        """End the claim of a search that is over or never began."""
        self.cancel(session)
        with self._lock:
            self._claims = {user: c for user, c in self._claims.items() if c.session != session}
