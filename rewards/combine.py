"""Rewards made of rewards: weighted sums, average ranks (the verifier ensemble of arXiv 2501.09732) and z-scores.

``a + 0.5 * b`` is a :class:`WeightedSum`, a list of rewards an :class:`AverageRank`; texts say the same:
``"pick-score + 0.5 * hps-v2.1"``, ``"average-rank(pick-score, 2 * hps-v2.1)"``, ``"z-score(a, b)"``.

Members where lower is better are turned round first, so that every ensemble is "higher is better". Ranks and z-scores
are *relative*: a score says where a candidate stands among those of its prompt that were scored with it. The driver
keeps what the members said of each row and combines it anew whenever finished rows are added; previews stand among the
rows of their check. Whatever compares scores of different prompts refuses them.

Shapes: M members, N candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from visearch.protocols import Reward, Scores

__all__ = ["AverageRank", "Ensemble", "Operators", "WeightedSum", "ZScore", "is_ensemble_text", "names", "parse"]

NEGATIVE = (
    "a weight must not be negative: a search would maximise what the reward is blind to; where lower is better, the "
    "reward says so itself by higher_is_better = False and is turned round"
)
SCALES = 10.0  # times that mean sizes of scores may differ before equal weights are questioned
GROUP = 3  # scores that a mean and a standard deviation take
CONSTANT = 1e-6  # standard deviations up to so much of the mean are rounding


class Operators:
    """``a + b`` and ``2 * a`` for a reward; with functions ``(images, prompts) -> floats``, too.

    Raises:
        ValueError: a negative weight, as in ``-a`` and ``a - b``.
        TypeError: an operand that is no reward or no number.
    """

    def __add__(self, other: Any) -> WeightedSum:
        return WeightedSum([self, other]) if _may_join(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, Real) and other == 0:  # where sum() begins
            return self
        return WeightedSum([other, self]) if _may_join(other) else NotImplemented

    def __mul__(self, weight: float) -> WeightedSum:
        return WeightedSum([self], [weight]) if isinstance(weight, Real) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> Any:
        raise ValueError(f"-{getattr(self, 'name', 'reward')}: {NEGATIVE}")

    def __sub__(self, other: Any) -> Any:
        raise ValueError(f"{getattr(self, 'name', 'reward')} - {getattr(other, 'name', other)}: {NEGATIVE}")

    __rsub__ = __sub__


def _may_join(other: Any) -> bool:
    return callable(other) or isinstance(other, Reward)


# --- ensembles ------------------------------------------------------------------------------------------------


class Ensemble(Operators):
    """What all ensembles share; implements :class:`visearch.protocols.Ensemble`.

    Args:
        members: rewards, names or functions ``(images, prompts) -> floats``; those of weight 0 are dropped.
        weights: M numbers of at least 0; default 1 each.

    Raises:
        ValueError: no member, two of one name, weights that are not M numbers of at least 0 or are all 0, or a member
            whose scores are relative themselves.
    """

    higher_is_better = True
    range: tuple[float, float] = (-math.inf, math.inf)
    relative = True

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        from visearch.rewards import resolve

        resolved = [resolve(member) for member in members]
        given = [1.0] * len(resolved) if weights is None else list(weights)
        _check_weights([m.name for m in resolved], given)
        pairs = self._flat([(m, float(w)) for m, w in zip(resolved, given, strict=True) if w > 0])
        _check_members([m for m, _ in pairs])
        self.members, self.weights = tuple(m for m, _ in pairs), tuple(w for _, w in pairs)
        self._describe()

    def _flat(self, terms: list[tuple[Reward, float]]) -> list[tuple[Reward, float]]:
        """The terms, where some of them may be several."""
        return terms

    def _describe(self) -> None:
        """What is told of all rewards; of the members, joined."""
        self.name = self._text([m.name if w == 1 else f"{w:g}*{m.name}" for m, w in self._terms()])
        self.licence = "; ".join(dict.fromkeys(m.licence for m in self.members))
        self.source = "; ".join(f"{m.name}: {m.source}" for m in self.members)
        self.needs = frozenset().union(*(m.needs for m in self.members))
        self.not_held_out_for = tuple(
            dict.fromkeys(known for m in self.members for known in getattr(m, "not_held_out_for", ()))
        )
        self.noise_aware = any(getattr(m, "noise_aware", False) for m in self.members)
        encoders = [m.image_features for m in self.members if hasattr(m, "image_features")]
        if encoders:
            self.image_features = encoders[0]

    def _terms(self) -> list[tuple[Reward, float]]:
        return list(zip(self.members, self.weights, strict=True))

    def _text(self, terms: Sequence[str]) -> str:
        raise NotImplementedError

    def _combine(self, table: Tensor) -> Tensor:
        """(N,) of one prompt's candidates from (M, N) float64, higher is better, -inf where a member failed."""
        raise NotImplementedError

    def _own(self) -> Any:
        """Options beside the weights, JSON-able."""
        return None

    @property
    def config_hash(self) -> str:
        """sha256 of the members' own, weights and options.

        Raises:
            AttributeError: a member has none.
        """
        parts = [type(self).__name__, [m.config_hash for m in self.members], self.weights, self._own()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def score(
        self,
        samples: Any,
        prompts: str | Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N samples; those of equal prompts are candidates of one group.

        Returns:
            Scores with the members' raw values as components; a sample is NaN where :meth:`combine` says that it
            failed, with the reason of the first member that gave one.
        """
        found = {m.name: m.score(samples, prompts, noise_level=noise_level, metadata=metadata) for m in self.members}
        raw = {name: scores.values for name, scores in found.items()}
        upward = {m.name: raw[m.name] if m.higher_is_better else -raw[m.name] for m in self.members}
        count = len(next(iter(raw.values())))
        values = self.combine(upward, [prompts] * count if isinstance(prompts, str) else prompts)
        failed = values == -math.inf
        reasons = {
            i: next((f"{name}: {s.reasons[i]}" for name, s in found.items() if i in s.reasons), "a member gave NaN")
            for i in failed.nonzero().flatten().tolist()
        }
        return Scores(torch.where(failed, math.nan, values), raw, reasons)

    def combine(self, components: Mapping[str, Tensor], groups: Sequence[Hashable]) -> Tensor:
        """(N,) float32 scores from what the members gave.

        Args:
            components: member -> (N,) scores, higher is better, -inf or NaN where it failed.
            groups: N labels; equal ones are candidates of one prompt.

        Returns:
            -inf for a sample on which all members failed, of sums and z-scores one on which any did.
        """
        table = torch.stack([components[m.name].double() for m in self.members])
        table = torch.where(table.isnan(), -math.inf, table)
        scores = torch.empty(table.shape[1], dtype=torch.float64)
        for group in dict.fromkeys(groups):
            mine = [i for i, label in enumerate(groups) if label == group]
            scores[mine] = self._combine(table[:, mine])
        lost = scores.isnan() | (table == -math.inf).all(0)
        return torch.where(lost, -math.inf, scores).float()


def _check_weights(names: Sequence[str], weights: Sequence[float]) -> None:
    if not names:
        raise ValueError("members is empty; give at least one reward")
    if len(weights) != len(names):
        raise ValueError(f"weights has {len(weights)} entries for {len(names)} members; give one each")
    for name, weight in zip(names, weights, strict=True):
        if not (isinstance(weight, Real) and math.isfinite(weight)):
            raise ValueError(f"weight {weight!r} of {name} is no finite number; give one of at least 0")
        if weight < 0:
            raise ValueError(f"weight {weight:g} of {name}: {NEGATIVE}")
    if not any(weights):
        raise ValueError(f"all weights of {', '.join(names)} are 0; give one that is not")


def _check_members(members: Sequence[Reward]) -> None:
    names = [m.name for m in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is given twice; give members names of their own, or one a larger weight")
    for member in members:
        if getattr(member, "relative", False):
            raise ValueError(f"{member.name} has no scale of its own to be joined by; give its members instead of it")


class WeightedSum(Ensemble):
    """``sum w r`` of raw scores; not relative. Sums of sums are one sum.

    Scores of different size need weights: a warning says where weights that are all 1 meet scores that are ten times
    as large as others.
    """

    relative = False

    def _flat(self, terms: list[tuple[Reward, float]]) -> list[tuple[Reward, float]]:
        joined: dict[int, tuple[Reward, float]] = {}
        for term, outer in terms:
            for member, inner in term._terms() if isinstance(term, WeightedSum) else [(term, 1.0)]:
                _, before = joined.get(id(member), (member, 0.0))
                joined[id(member)] = member, before + outer * inner
        return list(joined.values())

    def _describe(self) -> None:
        super()._describe()
        self._questioned = any(w != 1 for w in self.weights)
        ends = [(m.range if m.higher_is_better else (-m.range[1], -m.range[0]), w) for m, w in self._terms()]
        self.range = sum(w * low for (low, _), w in ends), sum(w * high for (_, high), w in ends)

    def _text(self, terms: Sequence[str]) -> str:
        return " + ".join(terms)

    def _combine(self, table: Tensor) -> Tensor:
        if not self._questioned:
            self._question(table)
        return torch.tensor(self.weights, dtype=torch.float64) @ table

    def _question(self, table: Tensor) -> None:
        """Warn, once, where weights that nobody chose let one member decide alone."""
        sizes = {m.name: float(row[row.isfinite()].abs().mean()) for m, row in zip(self.members, table, strict=True)}
        told = {name: size for name, size in sizes.items() if size > 0}  # NaN of a member that failed everywhere
        small, large = min(told, key=told.get, default=None), max(told, key=told.get, default=None)
        if told and told[large] > SCALES * told[small]:
            self._questioned = True
            warnings.warn(
                f"{self.name}: scores of {large} are about {told[large]:.3g}, those of {small} {told[small]:.3g}, so "
                f"that {large} may decide alone; give weights, or join them by average-rank",
                stacklevel=2,
            )


class AverageRank(Ensemble):
    """``1 - R / (N - 1)`` with R the weighted mean of a candidate's ranks among N, best 0, ties averaged (2501.09732).

    The best by all members scores 1, the worst by all 0, a single candidate 1. Candidates on which a member failed
    share its worst ranks.
    """

    range = (0.0, 1.0)

    def _text(self, terms: Sequence[str]) -> str:
        return f"average-rank({', '.join(terms)})"

    def _combine(self, table: Tensor) -> Tensor:
        from scipy.stats import rankdata

        count = table.shape[1]
        if count == 1:
            return torch.ones(1, dtype=torch.float64)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        ranks = torch.from_numpy(rankdata(-table.numpy(), axis=1) - 1)
        return 1 - (weights @ ranks) / weights.sum() / (count - 1)


class ZScore(Ensemble):
    """Weighted mean of ``(r - mean) / sd``, mean and population sd over a prompt's candidates, or fixed ones.

    A member whose scores are fewer than three, or equal up to rounding, says nothing: it counts 0, with a warning.

    Args:
        members, weights: as for :class:`Ensemble`.
        reference: member -> (mean, sd) on its published scale. Given, scores are not relative: they may be compared
            across prompts, and a single candidate has one.

    Raises:
        ValueError: as :class:`Ensemble`, and a ``reference`` that lacks a member or has an sd not above 0.
    """

    def __init__(
        self,
        members: Sequence[Any],
        weights: Sequence[float] | None = None,
        reference: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        super().__init__(members, weights)
        self.reference, self.relative = None if reference is None else dict(reference), reference is None
        self._told: set[str] = set()
        for member in self.members if self.reference is not None else ():
            mean, sd = self.reference.get(member.name, (math.nan, math.nan))
            if not (math.isfinite(mean) and 0 < sd < math.inf):
                raise ValueError(f"reference[{member.name!r}]=({mean}, {sd}); give a mean, and an sd greater than 0")

    def _text(self, terms: Sequence[str]) -> str:
        return f"z-score({', '.join(terms)})"

    def _own(self) -> Any:
        return self.reference

    def _combine(self, table: Tensor) -> Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        scores = torch.stack([self._standard(m, row) for m, row in zip(self.members, table, strict=True)])
        return weights @ scores / weights.sum()

    def _standard(self, member: Reward, scores: Tensor) -> Tensor:
        if self.reference is not None:
            mean, sd = self.reference[member.name]
            return (scores - (mean if member.higher_is_better else -mean)) / sd
        known = scores[scores.isfinite()]
        if len(known) < GROUP:
            return self._nothing(scores, f"{member.name} gave {len(known)} of the {GROUP} scores that it takes")
        mean, sd = known.mean(), known.std(correction=0)
        if sd <= CONSTANT * max(1.0, abs(float(mean))):
            return self._nothing(scores, f"{member.name} scored all alike")
        return (scores - mean) / sd

    def _nothing(self, scores: Tensor, why: str) -> Tensor:
        if why not in self._told:
            self._told.add(why)
            warnings.warn(f"{self.name}: {why}; it counts nothing there", stacklevel=2)
        return torch.where(scores.isfinite(), 0.0, scores)


# --- texts ----------------------------------------------------------------------------------------------------

KINDS: dict[str, type[Ensemble]] = {"average-rank": AverageRank, "z-score": ZScore}
_CALL = re.compile(rf"\s*({'|'.join(KINDS)})\s*\((.*)\)\s*", re.DOTALL)
_PLUS = re.compile(r"\s+\+\s+")  # with spaces: file names may hold a +


def is_ensemble_text(text: str) -> bool:
    """Whether a text names an ensemble rather than one reward."""
    return bool(_CALL.fullmatch(text) or _PLUS.search(text) or "*" in text or _subtracts(text))


def _subtracts(text: str) -> bool:
    return " - " in text and "/" not in text  # as it may be in the name of a folder


def parse(text: str, load: Callable[[str], Reward]) -> Ensemble:
    """The ensemble that a text describes, as in the head of this module.

    Args:
        text: names with optional weights; ``+`` stands between spaces.
        load: makes a reward of a name.

    Raises:
        ValueError: a weight that is no number of at least 0, a term without a name, and what ``load`` refuses.
    """
    if _subtracts(text):
        raise ValueError(f"reward {text!r}: {NEGATIVE}")
    if call := _CALL.fullmatch(text):
        kind, inside = call.groups()
        pairs = [
            (parse(term, load), 1.0) if _PLUS.search(term) else _term(term, text, load) for term in inside.split(",")
        ]
        return KINDS[kind](*zip(*pairs, strict=True))
    return WeightedSum(*zip(*(_term(term, text, load) for term in _PLUS.split(text)), strict=True))


def names(text: str) -> list[str]:
    """The rewards that a text names: itself, or the members of an ensemble."""
    if not is_ensemble_text(text):
        return [text]
    call = _CALL.fullmatch(text)
    parts = call.group(2).split(",") if call else _PLUS.split(text)
    return [n for part in parts for n in (names(part) if _PLUS.search(part) else [part.rpartition("*")[2].strip()])]


def _term(term: str, text: str, load: Callable[[str], Reward]) -> tuple[Reward, float]:
    weight, star, name = term.strip().rpartition("*")
    try:
        number = float(weight) if star else 1.0
    except ValueError:
        raise ValueError(f"reward {text!r}: {weight.strip()!r} is no weight; write 0.5 * {name.strip()}") from None
    if not name.strip():
        raise ValueError(f"reward {text!r} has a term without a name; write it as 'a + 0.5 * b'")
    return load(name.strip()), number
