"""Blind votes between two searches: which of them is shown as A, and what the votes of a session say."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from scipy.special import betaincinv

from visearch.statistics import LEVEL, Interval

__all__ = ["CHOICES", "Ballot", "Standing", "Tally", "win_rate"]

CHOICES = {"A": 1.0, "same": 0.5, "B": 0.0}
"""What may be voted, and what it is worth to A."""


@dataclass(frozen=True)
class Ballot:
    """The searches behind A and B; whoever votes learns them afterwards.

    Args:
        a, b: names of two different searches.
    """

    a: str
    b: str

    @classmethod
    def drawn(cls, one: str, other: str, chance: random.Random | None = None) -> Ballot:
        """Either order with probability one half, whatever came before.

        Args:
            one, other: names of two different searches.
            chance: default the system's own, so that no earlier ballot tells of a later one.

        Raises:
            ValueError: the names are equal.
        """
        if one == other:
            raise ValueError(f"both searches are {one!r}; choose two different ones")
        swapped = (chance or random.SystemRandom()).random() < 0.5
        return cls(other, one) if swapped else cls(one, other)


@dataclass(frozen=True)
class Standing:
    """The votes on one pair of searches.

    Attributes:
        pair: names in alphabetical order.
        wins, same, losses: votes for the first, for neither, for the second.
        rate: share of votes that the first won, those for neither counting half, with its interval.
    """

    pair: tuple[str, str]
    wins: int
    same: int
    losses: int
    rate: Interval

    @property
    def leader(self) -> str | None:
        """The search that wins more than half of the votes beyond doubt; ``None`` while that is not decided."""
        if self.rate.low > 0.5:
            return self.pair[0]
        return self.pair[1] if self.rate.high < 0.5 else None


@dataclass(frozen=True)
class Tally:
    """The votes of a session.

    Args:
        votes: pair of searches in alphabetical order -> (for the first, for neither, for the second).
    """

    votes: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)

    def counted(self, ballot: Ballot, choice: str) -> Tally:
        """The tally with one more vote.

        Raises:
            ValueError: a choice that is not on the ballot.
        """
        if choice not in CHOICES:
            raise ValueError(f"vote {choice!r} is not on the ballot; choose one of {', '.join(CHOICES)}")
        first, second = sorted((ballot.a, ballot.b))
        points = CHOICES[choice] if ballot.a == first else 1 - CHOICES[choice]
        counts = list(self.votes.get((first, second), (0, 0, 0)))
        counts[round(2 * (1 - points))] += 1
        return Tally({**self.votes, (first, second): tuple(counts)})

    def standings(self) -> list[Standing]:
        """Each pair that was voted on, in the order of first votes."""
        return [
            Standing(pair, wins, same, losses, win_rate(wins + same / 2, wins + same + losses))
            for pair, (wins, same, losses) in self.votes.items()
        ]


def win_rate(points: float, votes: int, level: float = LEVEL) -> Interval:
    """Share of votes won, with the Clopper-Pearson interval (Biometrika 26, 1934), which never promises too much.

    Exact for wins and losses, and wider than need be where votes for neither count half a point each, since these vary
    less. It is of a number of votes that was fixed before the first one: who stops at the vote that decides is wrong
    more often.

    Args:
        points: wins, and half a point for each vote for neither; from 0 to ``votes``.
        votes: at least 1.
        level: coverage of the interval.

    Raises:
        ValueError: no votes, or points out of their range.
    """
    if votes < 1 or not 0 <= points <= votes:
        raise ValueError(f"points={points} of votes={votes}: give at least one vote, and 0 to {votes} points")
    tail = (1 - level) / 2
    low = betaincinv(points, votes - points + 1, tail) if points else 0.0
    high = betaincinv(points + 1, votes - points, 1 - tail) if points < votes else 1.0
    return Interval(points / votes, float(low), float(high), votes)
