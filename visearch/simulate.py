"""Selection replayed on recorded rewards: what a schedule, a margin, a stop rule or a shared budget would have picked.

A search that only selects is a function of rewards that can be recorded, so thousands of them are tried without a
generator. Seeds are subsampled for each prompt on its own (two prompts never share a subset), and all searches see the
same subsets.

Shapes: P prompts, S seeds, J recorded stages, D random orders of the seeds, V measures (the reward, then judges).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from visearch.allocation import assign, spreads
from visearch.statistics import best_of_curve

__all__ = ["Checks", "Recorded", "Rule", "enumerate_checks", "orders", "share", "stop"]

ROUNDING = 1e-9


@dataclass(frozen=True)
class Checks:
    """A schedule on recorded stages: ``rows[0]`` candidates begin, ``rows[j]`` go on from check j.

    Args:
        at: positions of the checks among the J recorded stages, ascending; the last stage is no check.
        rows: one more than checks.
    """

    at: tuple[int, ...]
    rows: tuple[int, ...]

    def nfe(self, rows_to: Sequence[int]) -> int:
        """Model rows; ``rows_to`` (J,) is what one candidate costs to each stage."""
        reached = [0, *(rows_to[j] for j in self.at), rows_to[-1]]
        return sum(k * (b - a) for k, (a, b) in zip(self.rows, itertools.pairwise(reached), strict=True))

    def cost(self, rows_to: Sequence[int], price: float) -> float:
        """Honest cost in model rows: one decode and score costs ``price``."""
        return self.nfe(rows_to) + price * sum(self.rows)


@dataclass(frozen=True, eq=False)
class Recorded:
    """Rewards of P prompts x S seeds x J stages, and random orders to subsample them by.

    Args:
        scores: (P, S, J) finite rewards that guide.
        worth: (V, P, S) what a finished candidate is worth: the reward itself, then judges.
        rows: (J,) model rows that one candidate costs to each stage.
        price: model rows that one decode and score costs.
        order: (P, D, S) indices of seeds.
    """

    scores: np.ndarray
    worth: np.ndarray
    rows: tuple[int, ...]
    price: float
    order: np.ndarray

    @cached_property
    def rank(self) -> np.ndarray:
        """(P, S, J) int16: 0 is the best preview at that stage; of equal ones the first."""
        best_first = np.argsort(-self.scores, axis=1, kind="stable")
        return np.argsort(best_first, axis=1).astype(np.int16)

    @cached_property
    def curves(self) -> np.ndarray:
        """(P, V, S): what best-of-n picks is worth, for n = 1 to S, in closed form."""
        reward = self.scores[..., -1]
        return np.stack([best_of_curve(reward, worth) for worth in self.worth], axis=1)

    @property
    def deviation(self) -> float:
        """Standard deviation of the finished candidates' rewards within a prompt, pooled over prompts."""
        return float(np.sqrt(self.scores[..., -1].var(1, ddof=1).mean()))

    def valued(self, picks: np.ndarray) -> np.ndarray:
        """(P, V): mean worth of the candidates ``picks`` (P, D)."""
        return np.stack([np.take_along_axis(worth, picks, 1).mean(1) for worth in self.worth], axis=1)

    def candidates(self, n: int, draws: int | None = None) -> np.ndarray:
        """(P, D, n): the first n of each order."""
        return self.order[:, :draws, :n]

    def at(self, table: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """(P, D, k): values (P, S) of the candidates ``seeds`` (P, D, k)."""
        return np.take_along_axis(table[:, None], seeds, 2)

    def halve(self, checks: Checks, draws: int | None = None) -> np.ndarray:
        """(P, D): whom successive halving picks."""
        alive = self.candidates(checks.rows[0], draws)
        for j, keep in zip((*checks.at, -1), (*checks.rows[1:], 1), strict=True):
            if keep < alive.shape[2]:
                best = self.at(self.rank[..., j], alive).argpartition(keep - 1, 2)[..., :keep]
                alive = np.take_along_axis(alive, best, 2)
        return alive[..., 0]

    def behind(self, n: int, at: Sequence[int], ranks: bool = False) -> np.ndarray:
        """(P, D, C): how far at each check the candidate that ends best of n lies behind the best preview.

        Args:
            n: candidates.
            at: positions of C stages.
            ranks: count the better previews instead of subtracting rewards.
        """
        seeds = self.candidates(n)
        winner = self.at(self.rank[..., -1], seeds).argmin(2)[..., None]
        found = []
        for j in at:
            seen = self.at(self.scores[..., j], seeds)
            own = np.take_along_axis(seen, winner, 2)
            found.append((seen > own).sum(2) if ranks else seen.max(2) - own[..., 0])
        return np.stack(found, axis=2).astype(np.float64)

    def margins(self, n: int, at: Sequence[int], margins: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whom pruning by margins picks, and the model rows and scores that it takes, (P, D) each."""
        seeds = self.candidates(n)
        alive, reached = np.ones(seeds.shape, dtype=bool), 0
        nfe, scored = np.zeros(seeds.shape[:2]), np.zeros(seeds.shape[:2])
        for j, margin in zip((*at, -1), (*margins, 0.0), strict=True):
            going = alive.sum(2)
            contested = (going > 1) | (j == -1)
            nfe += going * (self.rows[j] - reached)
            reached = self.rows[j]
            scored += going * contested
            seen = np.where(alive, self.at(self.scores[..., j], seeds), -math.inf)
            alive &= (seen >= seen.max(2, keepdims=True) - margin) | ~contested[..., None]
        pick = np.where(alive, self.at(-self.rank[..., -1], seeds), -len(self.scores[0])).argmax(2)
        return np.take_along_axis(seeds, pick[..., None], 2)[..., 0], nfe, scored


def orders(keys: Sequence[int], size: int, draws: int) -> np.ndarray:
    """(P, D, S): random orders of S seeds for each prompt, from its own key alone."""
    return np.stack([np.random.default_rng(key).random((draws, size)).argsort(1) for key in keys])


def enumerate_checks(
    rows_to: Sequence[int], price: float, budget: float, at: Sequence[int], keep: Sequence[float], most: int, depth: int
) -> Iterator[Checks]:
    """All schedules of 1 to ``depth`` checks that fit, each with as many candidates as it can begin with.

    The rest of the budget widens the last check first, as in :class:`~visearch.SuccessiveHalving`. None comes twice.

    Args:
        rows_to: (J,) model rows that one candidate costs to each stage.
        price: model rows that one decode and score costs.
        budget: honest cost, in model rows.
        at: positions of the stages where a check may be.
        keep: shares that a check may keep.
        most: candidates that a schedule may begin with.
        depth: most checks.
    """
    seen: set[Checks] = set()
    for count in range(1, depth + 1):
        for stages, shares in itertools.product(
            itertools.combinations(at, count), itertools.product(keep, repeat=count)
        ):
            found = _widest(stages, shares, rows_to, price, budget, most)
            if found is not None and found not in seen:
                seen.add(found)
                yield found


def _widest(
    at: tuple[int, ...],
    shares: Sequence[float],
    rows_to: Sequence[int],
    price: float,
    budget: float,
    most: int,
) -> Checks | None:
    for n in range(most, 1, -1):
        rows = [n]
        for share in shares:
            rows.append(max(1, math.floor(share * rows[-1] + 0.5 + ROUNDING)))
        if any(a == b for a, b in itertools.pairwise(rows)):
            return None  # a check that drops nobody: a schedule without it is in the list
        if Checks(at, tuple(rows)).cost(rows_to, price) <= budget + ROUNDING:
            break
    else:
        return None
    for j in range(len(rows) - 1, 0, -1):
        while rows[j] + 1 < rows[j - 1]:
            wider = Checks(at, (*rows[:j], rows[j] + 1, *rows[j + 1 :]))
            if wider.cost(rows_to, price) > budget + ROUNDING:
                break
            rows[j] += 1
    return Checks(at, tuple(rows))


# --- one prompt after the other -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """When a prompt gets no more candidates: exactly one of the three is given.

    Args:
        target: its best finished candidate scores at least this.
        patience: so many finished in a row without a new best.
        min_gain: from the fourth on, (best - second) / n is below this.
    """

    target: float | None = None
    patience: int | None = None
    min_gain: float | None = None

    def __str__(self) -> str:
        name, value = next((k, v) for k, v in vars(self).items() if v is not None)
        return f"{name}={value:.4g}"


def stop(recorded: Recorded, rule: Rule, most: int, first: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Candidates drawn (P,), and what the best of them is worth (P, V), means over the orders.

    Args:
        recorded: finished candidates come one by one in its orders.
        rule: when to stop.
        most: candidates a prompt at most.
        first: candidates that an estimate of the gain takes.
    """
    seeds = recorded.candidates(most)
    scores = recorded.at(recorded.scores[..., -1], seeds)
    best, second = scores[..., 0].copy(), np.full(scores.shape[:2], -math.inf)
    pick, drawn = np.zeros(best.shape, dtype=int), np.full(best.shape, most)
    going = np.ones(best.shape, dtype=bool)
    for n in range(1, most + 1):
        if n > 1:
            new = scores[..., n - 1]
            better = going & (new > best)
            second = np.where(going, np.maximum(second, np.minimum(new, best)), second)
            best, pick = np.where(better, new, best), np.where(better, n - 1, pick)
        ends = np.zeros(best.shape, dtype=bool)
        if rule.target is not None:
            ends = best >= rule.target
        elif rule.patience is not None:
            ends = n - 1 - pick >= rule.patience
        elif n >= first:
            ends = (best - second) / n < rule.min_gain
        drawn = np.where(going & ends, n, drawn)
        going &= ~ends
    return drawn.mean(1), recorded.valued(np.take_along_axis(seeds, pick[..., None], 2)[..., 0])


def share(
    recorded: Recorded, n: int, draws: int, first: int = 4, a: int = 2, width: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`stop`, for ``Allocated(n, first, a, width)`` over the P prompts; nobody gets more than S candidates."""
    finals, size = recorded.scores[..., -1], recorded.scores.shape[1]
    prompts, drawn, picks = range(len(finals)), [], []
    for d in range(draws):
        order = recorded.order[:, d]
        scores = np.take_along_axis(finals, order, 1)
        counts = dict.fromkeys(prompts, min(first, n))
        spread: Mapping[int, float] = {}
        while (left := n * len(counts) - sum(counts.values())) > 0:
            spread = spreads({p: scores[p, : counts[p]] for p in prompts})
            more = assign(counts, spread, a, min(width, left), most=size)
            if not more:
                break
            counts = {p: counts[p] + more.get(p, 0) for p in prompts}
        drawn.append([counts[p] for p in prompts])
        picks.append([order[p, scores[p, : counts[p]].argmax()] for p in prompts])
    return np.mean(drawn, axis=0), recorded.valued(np.array(picks).T)
