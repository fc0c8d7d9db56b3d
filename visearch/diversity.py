"""Sets that are good and unlike each other, as the last step of a search or as a rule of pruning (2508.15773).

Diversity has its price: images differ most where some of them are wrong. On emoji-64, with features of the CLIP that
guides (24 validation prompts, 4 of 16 finished images; ``assets/build/measure_diversity.py``), ``"exhaustive"`` and
``"greedy"`` with weight 1 nearly triple the distance of the best four but lose 0.10 of judge B's accuracy,
``"k-means"`` 0.15; with weight 0.3 ``"exhaustive"`` gains a third in distance and no judge's loss is beyond its
interval. As a rule of halving, 16 to 4, ``"dpp"`` kept more modes than pruning by score, with a best reward that was
no worse; the gain of ``"coverage"`` lay within its interval, and ``"greedy"`` lost on all three judges.

Shapes: B = rows of a population, M = items to choose from, D = features of an item, k = items chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from visearch.protocols import Population

__all__ = ["Keep", "compares_features", "diverse_subset"]

METHODS = ("auto", "exhaustive", "greedy", "dpp", "k-means", "coverage")
SETS = 200_000  # most sets that are tried one by one
SAME = 1e-9  # distances and objectives that differ by less are equal
TINY = 1e-12  # what rounding leaves of a variance
STRUCTURE = 0.25  # mean silhouette below which clusters are no modes (Kaufman and Rousseeuw, Finding Groups in Data)
RESTARTS = 10


@dataclass(frozen=True)
class Keep:
    """Which rows of a prompt stay where not just the best are wanted: the last step of a search, or a rule of pruning.

    Args:
        method: as in :func:`diverse_subset`.
        weight: of the diversity against the quality, at least 0; 2508.15773 weighs more, at a loss (see above).
        scale: as in :func:`diverse_subset`.
        least: rows that pruning leaves at least, for a set of so many at the end.

    Raises:
        ValueError: an unknown method or scale, a negative weight, ``least`` below 1.
    """

    method: str = "dpp"
    weight: float = 0.3
    scale: str = "means"
    least: int = 1

    def __post_init__(self) -> None:
        _check_method(self.method, self.weight, self.scale)
        if not (isinstance(self.least, int) and self.least >= 1):
            raise ValueError(f"least={self.least!r} must be a whole number of at least 1")

    @classmethod
    def of(cls, rule: Keep | str | None) -> Keep | None:
        """A rule from the name of its method; rules and ``None`` are passed through.

        Raises:
            ValueError: an unknown method.
            TypeError: neither.
        """
        if rule is not None and not isinstance(rule, (Keep, str)):
            raise TypeError(f"{rule!r} is no rule; give one of {', '.join(METHODS)}, or a Keep")
        return cls(rule) if isinstance(rule, str) else rule

    def survivors(self, rows: int, share: float) -> int:
        """Of K rows, ``max(least, ceil(share K))`` stay: rounded up, unlike pruning by score alone."""
        return min(rows, max(self.least, math.ceil(share * rows - SAME)))

    def choose(self, population: Population, k: int, features: Tensor) -> list[int]:
        """k rows of each prompt by their latest scores and features (B, D), prompts in ascending order, best first."""
        if len(features) != len(population):
            raise ValueError(f"features are of {len(features)} rows for {len(population)}; give one a row")
        picked = []
        for prompt in sorted(set(population.prompt.tolist())):
            rows = (population.prompt == prompt).nonzero().flatten().tolist()
            keys = [population.order_key(row) for row in rows]
            quality = population.score[rows]
            index = diverse_subset(
                quality, features[rows], k, self.method, weight=self.weight, scale=self.scale, keys=keys
            )
            picked += [rows[i] for i in index]
        return picked


def compares_features(search: Any) -> bool:
    """Whether a search, or one inside it, prunes by such a rule."""
    if isinstance(search, Keep):
        return True
    parts = [getattr(search, f.name) for f in fields(search)] if is_dataclass(search) else search
    return isinstance(parts, (list, tuple)) and any(map(compares_features, parts))


def diverse_subset(
    quality: Tensor,
    features: Tensor | None,
    k: int,
    method: str = "auto",
    *,
    weight: float = 0.3,
    scale: str = "means",
    distances: Tensor | None = None,
    keys: Sequence[Any] | None = None,
    seed: int = 0,
) -> list[int]:
    """k of M items that are good and unlike each other, best first; the order of the items changes nothing.

    q = quality, d = distances (1 - cosine of features), S = the chosen set, w = ``weight``:

    - ``"exhaustive"``: the maximum of ``mean_S q + w mean_{i<j in S} d_ij``, q and d z-scored over the items; with
      ``scale="sums"`` of ``sum_S q + w sum_{i<j in S} d_ij``, raw, whose balance shifts with k (Group Inference,
      2508.15773).
    - ``"greedy"``: the same by greedy choice, then by exchanging one item at a time while it helps.
    - ``"auto"``: exhaustive where there are at most 200 000 sets, else greedy.
    - ``"dpp"``: greedy MAP of a determinantal point process, ``L_ij = exp((q_i + q_j) / 2w) (1 - d_ij)``, by
      incremental Cholesky factors (1709.05135); q as for ``scale``.
    - ``"k-means"``: the best of each of k clusters of normalised features, 10 restarts from ``seed``.
    - ``"coverage"``: the best of each mode, then the best of the rest. Modes are average-linkage clusters, at most k,
      as many as give the largest mean silhouette; one if none reaches 0.25.

    The last two have no ``weight``. In all, an item that failed (NaN, -inf) is taken only when there is no other, and a
    copy of a better item (distance 0) only when there is none that is not; with ``weight=0`` copies are items like any
    other, and the first four are the k best.

    Args:
        quality: (M,), higher is better.
        features: (M, D), or ``None`` where distances are given.
        k: items to choose; all where there are fewer.
        distances: (M, M), symmetric, 0 on the diagonal, at least 0.
        keys: M unique keys, which break ties; default the position, on which ties then depend.

    Raises:
        ValueError: k below 1; an unknown method or scale; a negative weight; shapes that do not fit or features that
            are not finite; neither features nor distances; ``"k-means"`` without features; ``"exhaustive"`` with more
            than 200 000 sets.
    """
    _check_method(method, weight, scale)
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    q = quality.detach().double().cpu()
    values, count = q.nan_to_num(-math.inf, math.inf, -math.inf).tolist(), len(q)
    order = sorted(range(count), key=lambda i: (-values[i], i if keys is None else keys[i]))
    q = q[order]
    x, d = _geometry(order, features, distances, method)

    pool = [i for i in range(count) if q[i] > -math.inf]
    if pool and q[pool[0]] == math.inf:
        finite = q[pool][q[pool] < math.inf]
        q = q.clamp(max=float(finite.max()) if len(finite) else 0.0)
    if weight > 0:
        pool = _distinct(d, pool)
    chosen = pool
    if len(pool) > k:
        q, d, x = q[pool], d[pool][:, pool], None if x is None else x[pool]
        chosen = [pool[i] for i in _solve(q, d, x, k, method, weight, scale, seed)]
    chosen = chosen + [i for i in range(count) if i not in chosen][: k - len(chosen)]
    return [order[i] for i in sorted(chosen)]


def _check_method(method: str, weight: float, scale: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight={weight!r} must be a number of at least 0; 0 leaves quality alone")
    if scale not in ("means", "sums"):
        raise ValueError(f"scale={scale!r} is unknown; use 'means' or 'sums'")


def _geometry(
    order: Sequence[int], features: Tensor | None, distances: Tensor | None, method: str
) -> tuple[Tensor | None, Tensor]:
    """Features of length 1, if there are any, and distances, both in this order."""
    x, count = None, len(order)
    if features is not None:
        x = features.detach().double().cpu()
        if x.ndim != 2 or len(x) != count or not x.isfinite().all():
            raise ValueError(f"features of shape {tuple(x.shape)} for {count} items; give finite ones, (M, D)")
        x = torch.nn.functional.normalize(x[order], dim=1)
        if distances is None:
            d = (1 - x @ x.T).clamp_min(0)
            blank = x.abs().sum(1) == 0
            d[blank[:, None] & blank] = 0  # no direction, yet the same
            return x, d.fill_diagonal_(0)
    elif distances is None:
        raise ValueError("neither features nor distances are given; a diverse set needs one of them")
    elif method == "k-means":
        raise ValueError("method='k-means' needs features; with distances alone use 'coverage'")
    d = distances.detach().double().cpu()
    if d.shape != (count, count) or not torch.equal(d, d.T) or not (d >= 0).all() or d.diagonal().any():
        raise ValueError(
            f"distances of shape {tuple(d.shape)} for {count} items; give (M, M), symmetric, at least 0, 0 on the "
            "diagonal"
        )
    return x, d[order][:, order]


def _distinct(d: Tensor, pool: Sequence[int]) -> list[int]:
    """The first of each group of copies."""
    kept: list[int] = []
    for i in pool:
        if not kept or d[i, kept].min() > SAME:
            kept.append(i)
    return kept


def _solve(
    q: Tensor, d: Tensor, x: Tensor | None, k: int, method: str, weight: float, scale: str, seed: int
) -> Sequence[int]:
    """k of M > k distinct items in descending order of quality."""
    if method in ("k-means", "coverage"):
        labels = _k_means(x, k, seed) if method == "k-means" else _modes(d, k)
        first = sorted({label: i for i, label in reversed([*enumerate(labels)])}.values())
        return first + [i for i in range(len(q)) if i not in first][: k - len(first)]
    if method == "dpp":
        return _dpp(_z(q, q) if scale == "means" else q, 1 - d, k, weight)[0]
    q, d = _terms(q, d, k, weight, scale)
    sets = math.comb(len(q), k)
    if method == "exhaustive" and sets > SETS:
        raise ValueError(f"method='exhaustive' would try {sets} sets, {SETS} are allowed; use 'greedy'")
    if method == "exhaustive" or (method == "auto" and sets <= SETS):
        return _exhaustive(q, d, k)
    return _exchange(q, d, _greedy(q, d, k))


def _z(values: Tensor, among: Tensor) -> Tensor:
    spread = among.std(correction=0)
    return (values - among.mean()) / spread if spread > TINY * among.abs().max() else torch.zeros_like(values)


def _terms(q: Tensor, d: Tensor, k: int, weight: float, scale: str) -> tuple[Tensor, Tensor]:
    """q and d scaled so that the objective is ``sum_S q + sum_{i<j in S} d``."""
    if scale == "sums":
        unit = max(float(q.abs().max()), weight * float(d.max())) or 1.0  # so that rounding stays below what is equal
        return q / unit, weight * d / unit
    pairs = d[tuple(torch.triu_indices(len(d), len(d), offset=1))]
    return _z(q, q) / k, (weight * _z(d, pairs) / max(1, math.comb(k, 2))).fill_diagonal_(0)


def _value(q: Tensor, d: Tensor, sets: Tensor) -> Tensor:
    """(N,) objective of N sets, (N, k)."""
    pairs = combinations(range(sets.shape[1]), 2)
    return q[sets].sum(1) + sum((d[sets[:, a], sets[:, b]] for a, b in pairs), torch.zeros(len(sets)))


def _exhaustive(q: Tensor, d: Tensor, k: int) -> list[int]:
    sets = torch.combinations(torch.arange(len(q)), k)  # in lexicographic order: of equal ones, that of the best items
    values = _value(q, d, sets)
    return sets[int((values >= values.max() - SAME).nonzero()[0])].tolist()


def _greedy(q: Tensor, d: Tensor, k: int) -> list[int]:
    chosen, gain = [], q.clone()
    for _ in range(k):
        chosen.append(int(gain.argmax()))  # of equal ones the first
        gain += d[chosen[-1]]
        gain[chosen] = -math.inf
    return chosen


def _exchange(q: Tensor, d: Tensor, chosen: Sequence[int]) -> list[int]:
    """Exchange one item, the one that gains most, until none gains."""
    chosen = list(chosen)
    while True:
        worth = q + d[:, chosen].sum(1)  # of an item beside all chosen ones
        gain = worth[:, None] - d[:, chosen] - worth[chosen]  # of each item in the place of each chosen one
        gain[chosen] = -math.inf
        best = int(gain.argmax())
        if gain.flatten()[best] <= SAME:
            return chosen
        chosen[best % len(chosen)] = best // len(chosen)


def _dpp(q: Tensor, similarity: Tensor, k: int, weight: float) -> tuple[list[int], list[float]]:
    """Items in greedy order, and what each adds to ``w log det L_S``: its q and w log of what S leaves of it."""
    left, factors = similarity.diagonal().clone(), torch.zeros(k, len(q), dtype=q.dtype)
    chosen: list[int] = []
    gains = []
    for step in range(k):
        gain = q + weight * left.clamp_min(TINY).log()
        gain[chosen] = -math.inf
        chosen.append(i := int(gain.argmax()))
        gains.append(float(gain[i]))
        if left[i] > TINY:
            factors[step] = (similarity[i] - factors[:step, i] @ factors[:step]) / left[i].sqrt()
            left = left - factors[step] ** 2
    return chosen, gains


def _k_means(x: Tensor, k: int, seed: int) -> list[int]:
    from sklearn.cluster import KMeans

    return KMeans(k, n_init=RESTARTS, random_state=seed).fit_predict(x.numpy()).tolist()


def _modes(d: Tensor, most: int) -> list[int]:
    """Labels of average-linkage clusters."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    best, found = STRUCTURE, [0] * len(d)
    for modes in range(2, min(most, len(d) - 1) + 1):
        labels = AgglomerativeClustering(modes, metric="precomputed", linkage="average").fit_predict(d.numpy())
        if (score := silhouette_score(d.numpy(), labels, metric="precomputed")) > best:
            best, found = score, labels.tolist()
    return found
