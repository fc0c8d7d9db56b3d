"""Sharing a budget over prompts: the next candidates go where the best is expected to gain most.

With scores of spread s_p, ``E(n)`` the expected maximum of n standard normals and n_p candidates drawn, ``a`` more are
worth ``s_p [E(n_p + a) - E(n_p)]``. All candidates cost the same. Needs numpy alone.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["assign", "estimated_gain", "expected_maximum", "spreads"]

PRIOR = 4.0  # candidates that the pooled spread is worth


@cache
def expected_maximum(n: int) -> float:
    """``E(n) = n int x phi(x) Phi(x)^(n-1) dx``: 0, 0.564, 1.029, 1.424, 1.766 for n = 1, 2, 4, 8, 16.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    x, phi, cdf = _normal()
    return float(n * (x * phi * cdf ** (n - 1)).sum() * (x[1] - x[0]))


@cache
def _normal() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, normal = np.linspace(-9, 9, 3601), NormalDist()
    return x, np.array([normal.pdf(v) for v in x]), np.array([normal.cdf(v) for v in x])


def spreads(scores: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Standard deviation of each prompt's scores, shrunk to the pooled one with weight ``n_p / (n_p + 4)`` on its own.

    Scores that are not finite (failed samples) tell nothing. With no prompt of two scores all spreads are 1.

    Args:
        scores: prompt -> scores of its finished candidates.
    """
    finite = {p: np.asarray(s, dtype=np.float64)[np.isfinite(s)] for p, s in scores.items()}
    own = {p: float(s.std(ddof=1)) for p, s in finite.items() if len(s) > 1}
    degrees = sum(len(finite[p]) - 1 for p in own)
    pooled = math.sqrt(sum((len(finite[p]) - 1) * s**2 for p, s in own.items()) / degrees) if degrees else 1.0
    weight = {p: len(finite[p]) / (len(finite[p]) + PRIOR) for p in own}
    return {p: weight[p] * own[p] + (1 - weight[p]) * pooled if p in own else pooled for p in scores}


def assign(
    counts: Mapping[int, int], spread: Mapping[int, float], a: int, total: int, most: int | None = None
) -> dict[int, int]:
    """Prompt -> more candidates: ``total`` of them in batches of ``a``, each to the prompt that gains most by it.

    Ties go to the prompt with fewer candidates, then to the lower number.

    Args:
        counts: prompt -> n_p >= 1, candidates so far.
        spread: prompt -> s_p >= 0.
        a: candidates in one batch; the last one may be smaller.
        total: candidates to give away.
        most: candidates that a prompt may have at most; ``None`` is no limit.

    Raises:
        ValueError: ``a`` < 1, or a prompt that has no candidate yet.
    """
    if a < 1 or min(counts.values(), default=1) < 1:
        raise ValueError(f"a={a} and counts={dict(counts)} must be at least 1; give each prompt a candidate first")
    more = dict.fromkeys(counts, 0)

    def entry(prompt: int) -> tuple[float, int, int]:
        n = counts[prompt] + more[prompt]
        return -spread[prompt] * (expected_maximum(n + a) - expected_maximum(n)), n, prompt

    heap = [entry(p) for p in counts]
    heapq.heapify(heap)
    while total > 0 and heap:
        _, n, prompt = heapq.heappop(heap)
        size = min(a, total, a if most is None else most - n)
        if size < 1:
            continue
        more[prompt] += size
        total -= size
        heapq.heappush(heap, entry(prompt))
    return {p: k for p, k in more.items() if k}


def estimated_gain(scores: ArrayLike) -> float:
    """``(best - second) / n``: unbiased for ``E[max of n] - E[max of n - 1]`` of independent scores (n,); inf if n < 2.

    Of n exchangeable scores each is the best with chance 1/n, and leaving it out loses ``best - second``.
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    if len(values) < 2 or not np.isfinite(values[1]):
        return math.inf
    return float(values[0] - values[1]) / len(values)
