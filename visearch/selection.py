"""Scores and weights to indices, per prompt. Pure functions; randomness comes from the generator that is given.

Shapes: B = rows of a population.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from visearch.diversity import Keep
from visearch.protocols import Population

__all__ = [
    "RESAMPLING",
    "best_per_prompt",
    "effective_size",
    "prune",
    "rank",
    "record",
    "resample",
    "top_k",
    "tournament",
]


def rank(population: Population) -> list[int]:
    """Rows from best to worst: by score, then by lineage, so that the order of rows never decides. NaN is worst."""

    return sorted(range(len(population)), key=lambda row: _worst_last(population, row))


def _worst_last(population: Population, row: int) -> tuple:
    score = float(population.score[row])
    return (math.inf if math.isnan(score) else -score, population.order_key(row))


def top_k(population: Population, k: int) -> list[int]:
    """The k best rows of each prompt, prompts in ascending order, best first.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    taken: dict[int, list[int]] = {}
    for row in rank(population):
        mine = taken.setdefault(int(population.prompt[row]), [])
        if len(mine) < k:
            mine.append(row)
    return [row for prompt in sorted(taken) for row in taken[prompt]]


def best_per_prompt(population: Population, prompts: Sequence[int]) -> dict[int, int]:
    """Prompt -> its best row; prompts without a row are left out."""
    best = {int(population.prompt[row]): row for row in reversed(rank(population))}
    return {p: best[p] for p in prompts if p in best}


def prune(
    population: Population,
    k: int,
    prompts: Collection[int],
    rule: Keep | None = None,
    features: Tensor | None = None,
) -> tuple[list[int], tuple[dict[str, Any], ...]]:
    """k rows of each prompt in ``prompts``, in their order, and a record of all others.

    A record is a JSON-able dict: prompt, id, candidate, seed, stage, and the latest score (``None`` if unscored).

    Args:
        rule: which k; default the best by score.
        features: (B, D), what ``rule`` compares rows by.
    """
    chosen = top_k(population, k) if rule is None else rule.choose(population, k, features)
    kept = sorted(row for row in chosen if int(population.prompt[row]) in prompts)
    return kept, record(population, sorted(set(range(len(population))) - set(kept)))


def record(population: Population, rows: Sequence[int]) -> tuple[dict[str, Any], ...]:
    """What is kept of rows that are dropped, as in :func:`prune`."""
    ids, candidates, seeds = population.id, population.candidate, population.seed
    return tuple(
        {
            "prompt": int(population.prompt[row]),
            "id": ids[row],
            "candidate": candidates[row],
            "seed": seeds[row],
            "stage": population.stage,
            "score": None if population.score[row].isnan() else float(population.score[row]),
        }
        for row in rows
    )


# --- draws; k = rows of one prompt, in the order of their ids ---------------------------------------------------


def tournament(population: Population, rows: Sequence[int], entrants: int, generator: torch.Generator) -> int:
    """The best of ``entrants`` distinct ``rows``, drawn evenly; of fewer rows, of all.

    Of equal scores the one drawn first wins, so that a reward of few values breeds from all of the best.
    """
    rows = sorted(rows, key=population.order_key)
    drawn = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:entrants].tolist()]
    return min(drawn, key=lambda row: _worst_last(population, row)[0])


def effective_size(log_weight: Tensor) -> float:
    """``(sum w)^2 / sum w^2`` of weights (k,): k where they are equal, 1 where one has it all; 0 of none."""
    weight = _weights(log_weight)
    return 0.0 if weight is None else float(1 / weight.square().sum())


def resample(log_weight: Tensor, rule: str, generator: torch.Generator) -> list[int]:
    """Copies of each of k rows, k in all, in expectation in proportion to their weights w (sum 1).

    ``"multinomial"``: independent draws. ``"systematic"``: one draw, evenly spaced points. ``"ssp"``: the
    Srinivasan sampling process, pairs of rows that trade their fractions of a copy (as in 2505.23614). The last two
    give each row floor(k w) or ceil(k w) copies.

    Args:
        log_weight: (k,), -inf is weight 0, not all of them.
        rule: one of :data:`RESAMPLING`.
        generator: on the CPU.

    Raises:
        ValueError: no weight is positive, or an unknown rule.
    """
    weight = _weights(log_weight)
    if weight is None:
        raise ValueError(f"log_weight={log_weight.tolist()} has no positive weight; keep the rows as they are")
    if rule not in RESAMPLING:
        raise ValueError(f"resampling {rule!r} is unknown; use {', '.join(RESAMPLING)}")
    return RESAMPLING[rule](weight, generator)


def _weights(log_weight: Tensor) -> Tensor | None:
    """Normalised weights in float64; ``None`` where all are 0."""
    values = log_weight.double()
    return None if bool((values == -math.inf).all()) else values.softmax(0)


def _multinomial(weight: Tensor, generator: torch.Generator) -> list[int]:
    drawn = torch.multinomial(weight, len(weight), replacement=True, generator=generator)
    return drawn.bincount(minlength=len(weight)).tolist()


def _systematic(weight: Tensor, generator: torch.Generator) -> list[int]:
    k = len(weight)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    ends = (k * weight).cumsum(0)
    ends[int(weight.nonzero()[-1]) :] = k  # sums round
    passed = (ends - start).ceil().clamp(0, k).long()  # points start, start + 1, ... below each end
    return passed.diff(prepend=passed.new_zeros(1)).tolist()


def _ssp(weight: Tensor, generator: torch.Generator) -> list[int]:
    k = len(weight)
    counts = (k * weight).floor()
    part, counts = (k * weight - counts).tolist(), counts.long().tolist()
    draws = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    open_row = None
    for row in range(k):
        if open_row is None:
            open_row = row
            continue
        a, b = part[open_row], part[row]
        up, down = min(1 - a, b), min(a, 1 - b)
        if up + down > 0:
            move = up if draws[row] * (up + down) < down else -down
            part[open_row], part[row] = a + move, b - move
        # one of the two is at 0 or 1 now, up to rounding: the one nearer to it settles
        first = min(part[open_row], 1 - part[open_row]) <= min(part[row], 1 - part[row])
        settled, open_row = (open_row, row) if first else (row, open_row)
        counts[settled] += round(part[settled])
    counts[open_row] += k - sum(counts)
    return counts


RESAMPLING: dict[str, Callable[[Tensor, torch.Generator], list[int]]] = {
    "multinomial": _multinomial,
    "systematic": _systematic,
    "ssp": _ssp,
}
