"""Intervals for means of images that share prompts, and the curves of best-of-n that searches are measured by.

Shapes: N = values, C = clusters (prompts), D = bootstrap draws. Images of one prompt are not independent, so whole
prompts are resampled, each with all its images. Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 2000
LEVEL = 0.95
ROUNDING = 1e-6  # a size this close to a whole number is that number


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile-bootstrap interval, in the unit of the values.

    Attributes:
        mean: mean over all values, each value counting once.
        low, high: the two ends of the interval; equal to ``mean`` when there is one cluster, which says nothing
            about the spread.
        clusters: number of independent units that were resampled.
    """

    mean: float
    low: float
    high: float
    clusters: int

    def __format__(self, spec: str) -> str:
        """``mean [low, high]``, each number by ``spec``, such as ``+.3f``."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]" if spec else str(self)

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def cluster_totals(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of the clusters, ``(C,)`` each, in order of first appearance.

    Args:
        values: ``(N,)`` finite numbers or booleans.
        clusters: N labels, for example prompt ids; None makes every value its own cluster.

    Raises:
        ValueError: no values, values that are not ``(N,)`` and finite, or another number of labels than of values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values has shape {array.shape}; give a non-empty one-dimensional sequence")
    if not np.isfinite(array).all():
        raise ValueError(f"values has {np.sum(~np.isfinite(array))} entries that are not finite; drop or impute them")
    if clusters is None:
        return array, np.ones_like(array)
    if len(clusters) != array.size:
        raise ValueError(f"clusters has {len(clusters)} labels for {array.size} values; give one label for each value")
    codes = {label: code for code, label in enumerate(dict.fromkeys(clusters))}
    index = np.fromiter((codes[label] for label in clusters), dtype=np.intp, count=array.size)
    return np.bincount(index, weights=array), np.bincount(index).astype(np.float64)


def resample(totals: np.ndarray, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap totals ``(D, K)``: C rows of ``totals (C, K)`` are drawn with replacement and summed, D times."""
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be at least 1")
    number = len(totals)
    counts = rng.multinomial(number, np.full(number, 1 / number), size=draws)
    return counts @ totals


def percentile_interval(mean: float, draws: np.ndarray, clusters: int, level: float = LEVEL) -> Interval:
    """The central ``level`` of bootstrap means ``draws (D,)`` around ``mean``.

    Raises:
        ValueError: ``level`` is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, for example 0.95")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high), clusters)


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of ``values (N,)`` with a percentile interval from resampled clusters.

    Args:
        values: finite numbers or booleans.
        clusters: one label for each value; None when the values are independent.
        level: coverage of the interval.
        draws: D.
        seed: of the resampling; equal arguments give equal intervals.
    """
    return ratio_interval(*cluster_totals(values, clusters), level=level, draws=draws, seed=seed)


def ratio_interval(
    numerator: np.ndarray, denominator: np.ndarray, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Ratio of two sums over clusters, ``(C,)`` each; draws whose denominator is not above 0 say nothing.

    Raises:
        ValueError: the denominators do not sum to more than 0.
    """
    if not denominator.sum() > 0:
        raise ValueError(f"denominator sums to {denominator.sum():g}; there is no ratio to a sum that is not above 0")
    totals = resample(np.stack([numerator, denominator], axis=1), np.random.default_rng(seed), draws)
    totals = totals[totals[:, 1] > 0]
    ratio = numerator.sum() / denominator.sum()
    return percentile_interval(ratio, totals[:, 0] / totals[:, 1], len(numerator), level)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of ``a - b`` with a percentile interval that keeps pairs and clusters together.

    Args:
        a, b: ``(N,)`` results of two methods on the same prompts in the same order.
        clusters: one prompt label for each pair; None when every pair is its own prompt.
        level, draws, seed: as in ``mean_interval``.

    Raises:
        ValueError: ``a`` and ``b`` differ in shape, or hold values that are not finite.
    """
    return mean_interval(_differences(a, b), clusters, level=level, draws=draws, seed=seed)


def minimum_detectable_effect(
    differences: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    power: float = 0.8,
    level: float = LEVEL,
) -> float:
    """Smallest true mean difference that a two-sided paired test would find with probability ``power``.

    ``(z[(1 + level) / 2] + z[power]) * se``, the normal approximation, with the cluster-robust standard error of the
    mean, ``se^2 = C / (C - 1) * sum_c (sum_c - size_c * mean)^2 / N^2``.

    Args:
        differences: ``(N,)`` paired differences, for example ``a - b`` of ``paired_interval``.
        clusters: one prompt label for each difference; None when they are independent.

    Raises:
        ValueError: fewer than two clusters, or ``power`` or ``level`` not inside (0, 1).
    """
    for name, value in (("power", power), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
    sums, sizes = cluster_totals(differences, clusters)
    number = len(sums)
    if number < 2:
        raise ValueError(f"differences come from {number} cluster; a standard error needs results on two or more")
    residuals = sums - sizes * (sums.sum() / sizes.sum())
    error = np.sqrt(number / (number - 1) * np.sum(residuals**2)) / sizes.sum()
    normal = NormalDist()
    return float((normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)) * error)


def resampled_interval(totals: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """Of a function of sums over C clusters: ``of`` maps sums (D, K) of ``totals (C, K)`` to (D,)."""
    draws = of(resample(totals, np.random.default_rng(0)))
    return percentile_interval(of(totals.sum(0, keepdims=True))[0], draws, len(totals))


def worth_interval(values: np.ndarray, spent: np.ndarray, curve: np.ndarray) -> Interval:
    """n at which best-of-n has the same mean value as a search, over what the search spends; at most S over that.

    Args:
        values: (P,) of what a search picks.
        spent: (P,) in candidates.
        curve: (P, S) of best-of-n, ascending in the mean over P.
    """

    def of(sums: np.ndarray) -> np.ndarray:
        value, cost, best = np.split(sums, [1, 2], axis=1)
        return curve_reach(best, value[:, 0]) * len(values) / cost[:, 0]

    return resampled_interval(np.column_stack([values, spent, curve]), of)


def _differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a has shape {left.shape} and b {right.shape}; pair results on the same prompts")
    return left - right


def expected_best(rewards: ArrayLike, n: int, values: ArrayLike | None = None) -> float:
    """Expected value of the best of ``n`` candidates, drawn without replacement from a pool of S.

    ``sum_{i=n..S} v_(i) C(i - 1, n - 1) / C(S, n)`` with v in ascending order of reward: exact, no simulation.

    Args:
        rewards: ``(S,)`` finite numbers that choose the best; of equal ones the earlier is better.
        n: candidates drawn, 1 to S.
        values: ``(S,)`` what the chosen one is worth, for example a judge's verdict; default its reward.

    Raises:
        ValueError: ``n`` outside 1 to S, or ``values`` of another shape than ``rewards``.
    """
    order = np.asarray(rewards, dtype=np.float64)
    worth = order if values is None else np.asarray(values, dtype=np.float64)
    if order.ndim != 1 or worth.shape != order.shape:
        raise ValueError(f"rewards has shape {order.shape} and values {worth.shape}; give one number a candidate each")
    if not 1 <= n <= len(order):
        raise ValueError(f"n is {n}; a pool of {len(order)} candidates allows 1 to {len(order)}")
    return float(np.dot(worth[_ascending(order)], _chances(len(order))[n - 1]))


def best_of_curve(rewards: ArrayLike, values: ArrayLike | None = None) -> np.ndarray:
    """``expected_best`` for n = 1 to S at once: ``(..., S)`` of ``rewards (..., S)`` and ``values`` of the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    order = np.asarray(rewards, dtype=np.float64)
    worth = order if values is None else np.asarray(values, dtype=np.float64)
    if worth.shape != order.shape:
        raise ValueError(f"rewards has shape {order.shape} and values {worth.shape}; give one number a candidate each")
    return np.take_along_axis(worth, _ascending(order), -1) @ _chances(order.shape[-1]).T


def curve_at(curve: np.ndarray, n: ArrayLike) -> np.ndarray:
    """(...) of best-of-n's curves (..., S) at ``n``, a number or (...), cut to 1 to S.

    A fraction is that share of prompts with one candidate more.
    """
    size = curve.shape[-1]
    n = np.broadcast_to(n, curve.shape[:-1]).clip(1, size)
    low = np.floor(n + ROUNDING).astype(int)
    at, after = _of_size(curve, low), _of_size(curve, (low + 1).clip(max=size))
    return at + (n - low).clip(0, 1) * (after - at)


def curve_reach(curve: np.ndarray, target: ArrayLike) -> np.ndarray:
    """(...) the n, 1 to S, fractions interpolated, at which ascending curves (..., S) first reach a target (...)."""
    size, target = curve.shape[-1], np.asarray(target)
    tie = 1e-9 * (1 + np.abs(target))
    below = (curve < (target - tie)[..., None]).sum(-1).clip(1, size)
    at, after = _of_size(curve, below), _of_size(curve, (below + 1).clip(max=size))
    gap = np.where(after > at, after - at, 1.0)
    return (below + ((target - at) / gap).clip(0, 1)).clip(max=size)


def _of_size(curve: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.take_along_axis(curve, (n - 1)[..., None], -1)[..., 0]


def _ascending(rewards: np.ndarray) -> np.ndarray:
    return np.argsort(-rewards, axis=-1, kind="stable")[..., ::-1]


@cache
def _chances(size: int) -> np.ndarray:
    """``(S, S)``: the chance that the best of n (row n - 1) is the i-th in ascending order (column i - 1)."""
    sizes = range(1, size + 1)
    return np.array([[math.comb(i - 1, n - 1) / math.comb(size, n) for i in sizes] for n in sizes])
