"""Conformal risk control (arXiv 2208.02814): how large a margin must be for a promise on prompts not yet seen.

Shapes: m calibration prompts, P prompts in all, D random subsets of a prompt's candidates. Needs numpy alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from visearch.statistics import Interval, mean_interval

__all__ = ["conformal_factor", "coverage", "rounded_up"]

SPLITS = 200


def conformal_factor(excess: ArrayLike, risk: float) -> float:
    """The smallest t with ``(sum_i L_i(t) + 1) / (m + 1) <= risk`` (conformal risk control, 2208.02814, section 2).

    ``L_i(t)`` is the share of prompt i's random subsets whose excess is above t: it lies in [0, 1] and never rises in
    t. For one more exchangeable prompt and subset the probability of an excess above t is then at most ``risk``.

    Args:
        excess: (m, D), or (m,), numbers of m prompts.
        risk: in (0, 1).

    Raises:
        ValueError: ``risk`` out of range, or too few prompts: m >= 1 / risk - 1 are needed.
    """
    if not 0 < risk < 1:
        raise ValueError(f"risk={risk} must lie between 0 and 1, such as 0.1")
    table = np.asarray(excess, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    prompts, draws = table.shape
    allowed = math.floor((risk * (prompts + 1) - 1) * draws + 1e-9)
    if allowed < 0:
        need = math.ceil(1 / risk - 1e-9) - 1
        raise ValueError(f"risk={risk} needs at least {need} calibration prompts, these are {prompts}; record more")
    descending = np.sort(table, axis=None)[::-1]
    return float(descending[allowed]) if allowed < table.size else -math.inf


def coverage(excess: np.ndarray, risk: float, size: int, splits: int = SPLITS, seed: int = 0) -> Interval:
    """How often unseen prompts exceed the factor that ``size`` others set, over random splits; prompts are resampled.

    Args:
        excess: (P, D).
        size: prompts in the calibrating part.
    """
    rng, lost, seen = np.random.default_rng(seed), np.zeros(len(excess)), np.zeros(len(excess))
    for _ in range(splits):
        order = rng.permutation(len(excess))
        factor = conformal_factor(excess[order[:size]], risk)
        rest = order[size:]
        lost[rest] += (excess[rest] > factor).mean(1)
        seen[rest] += 1
    return mean_interval((lost / np.maximum(seen, 1))[seen > 0])


def rounded_up(value: float, digits: int = 4) -> float:
    """The next number of so many digits: a margin that is rounded down would lose more than was promised."""
    step = 10.0 ** (math.floor(math.log10(value)) - digits + 1) if value > 0 else 1.0
    return float(f"{math.ceil(value / step) * step:.{digits}g}")
