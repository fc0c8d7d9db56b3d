"""Scores to indices, per prompt. Pure functions on tensors; no randomness of their own.

Shapes: B = rows of a population.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from visearch.protocols import Population

__all__ = ["best_per_prompt", "prune", "rank", "top_k"]


def rank(population: Population) -> list[int]:
    """Rows from best to worst: by score, then by lineage, so that the order of rows never decides. NaN is worst."""

    def key(row: int) -> tuple:
        score = float(population.score[row])
        return (-score if score == score else float("inf"), population.order_key(row))

    return sorted(range(len(population)), key=key)


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


def prune(population: Population, k: int, prompts: Collection[int]) -> tuple[list[int], tuple[dict[str, Any], ...]]:
    """The k best rows of each prompt in ``prompts``, in their order, and a record of all others.

    A record is a JSON-able dict: prompt, id, candidate, seed, stage, and the latest score (``None`` if unscored).
    """
    kept = sorted(row for row in top_k(population, k) if int(population.prompt[row]) in prompts)
    dropped = tuple(
        {
            "prompt": int(population.prompt[row]),
            "id": population.id[row],
            "candidate": population.candidate[row],
            "seed": population.seed[row],
            "stage": population.stage,
            "score": None if population.score[row].isnan() else float(population.score[row]),
        }
        for row in sorted(set(range(len(population))) - set(kept))
    )
    return kept, dropped
