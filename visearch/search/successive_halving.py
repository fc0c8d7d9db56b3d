"""Successive halving: prune candidates by the rewards of their previews (TTSnap, arXiv 2511.22242; PSP, 2607.21591).

T = stages, c_j = stage of check j (c_0 = 0, c_{J+1} = T), K_j = candidates of a prompt that go on from there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from visearch.diversity import Keep
from visearch.protocols import Budgeted, Evaluate, Request, Sampler, SearchState
from visearch.search._common import ROUNDING, affordable, check_stages, joined, rows_left, shares, unchecked
from visearch.selection import prune

__all__ = ["PRESETS", "SuccessiveHalving"]

PRESETS = {  # calls as shares of T, and the share that each check keeps
    "psp": ((1 / 4, 1 / 2), (0.5, 0.5)),
    "ttsnap-single": ((3 / 20, 7 / 20, 12 / 20), (0.4, 0.4, 0.5)),
    "ttsnap-multi": ((5 / 20, 7 / 20, 12 / 20), (0.4, 0.5, 0.6)),
}
PRESETS["ttsnap"] = PRESETS["ttsnap-single"]
PRESETS["steep"] = ((4 / 10, 6 / 10, 8 / 10), (0.45, 0.4, 0.4))
THRIFTY = ("auto", "steep")  # what drops checks that cost more than they save; published schedules stay as they are


@dataclass(frozen=True)
class SuccessiveHalving:
    """K_0 candidates; at stage c_j the best K_j = max(1, floor(a_j K_{j-1} + 1/2)) previews of each prompt stay.

    Survivors end as they would have unpruned; the answer is the argmax of the reward over those that are finished. A
    prompt costs ``sum_j K_j nfe(c_j, c_{j+1})`` model rows and ``sum_j K_j`` decodes and scores. Within a budget K_0 is
    the largest integer that fits, at most ``n``; where the budget decided, its rest widens the shares, last first.

    Presets: ``"psp"`` halves at T/4 and T/2 (2607.21591); ``"ttsnap-single"``, short ``"ttsnap"``, keeps .4, .4, .5
    after 3, 7, 12 of 20 calls and ``"ttsnap-multi"`` .4, .5, .6 after 5, 7, 12 (2511.22242, code; made for rewards that
    were trained on noisy previews). ``"auto"``, for plain rewards: no check where only N <= 2 candidates could be
    finished, one at .45 T for N = 3, else .40 T and .70 T, each keeping half. ``"steep"`` keeps .45, .4, .4 at .4, .6,
    .8 T, for previews that tell early. The last two drop checks that cost more than they save, ``K_{j-1} y >= (K_{j-1}
    - K_j) nfe(c_j, T)`` with y the price of one decode and score in model rows.

    At N = 8, steep is worth 1.5 of emoji-64's best-of-8, but .72 (SDXL, HPS) to 1.35 (FLUX, ImageReward) on published
    plain rewards, where auto is worth .98 to 1.29, psp .89 to 1.24, ttsnap .56 to .97, and what ``visearch calibrate``
    finds 1.09 to 1.36 (``assets/build/evidence_published.py``): calibrate, or stay with auto.

    Args:
        n: most candidates to begin with, a prompt; ``None`` takes as many as the budget allows.
        preset: as above; default ``"auto"``, or ``"explicit"`` where ``calls`` are given.
        calls: when to check, ascending: floats in (0, 1) are shares of T, rounded up, ints are stages; then up to the
            next milestone. Checks at T vanish, as do those that drop nobody; of several on one stage the last counts.
        keep: one entry a call: floats in (0, 1) are shares of the candidates at the check, ints are candidates.
        check_cost: y. Given, no schedule costs more, its checks counted, than best-of-N in the same ``max_nfe``.
            ``None``: a budget counts model rows alone, and ``"auto"`` and ``"steep"`` leave out a check after the first
            one where the driver's measurement says so and its budget has room; only then the plan is not exact.
        rule: which K_j stay where not the best alone are wanted, such as ``"coverage"``: fewer, but all modes. Shares
            are then rounded up, to ``rule.least`` at least (2508.15773), and the run needs ``features``.

    Raises:
        ValueError: a field out of range, an unknown preset, or ``calls`` and ``keep`` of different lengths.
    """

    n: int | None = 16
    preset: str | None = None
    calls: tuple[float | int, ...] | None = None
    keep: tuple[float | int, ...] | None = None
    check_cost: float | None = None
    rule: Keep | str | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "keep"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, shares(name, value))
        object.__setattr__(self, "rule", Keep.of(self.rule))
        if len(self.calls or ()) != len(self.keep or ()):
            raise ValueError(f"calls={self.calls} and keep={self.keep} must have one entry a check each")
        object.__setattr__(self, "preset", self.preset or ("auto" if self.calls is None else "explicit"))
        known = ("auto", *PRESETS, *(() if self.calls is None else ("explicit",)))
        if self.preset not in known:
            raise ValueError(f"preset={self.preset!r} is unknown; use {', '.join(known)}, or give calls and keep")
        if self.n is not None and not (isinstance(self.n, int) and self.n >= 1):
            raise ValueError(f"n={self.n} must be a whole number of at least 1, or None to take it from the budget")
        if self.check_cost is not None and not self.check_cost >= 0:
            raise ValueError(f"check_cost={self.check_cost} must be at least 0 model rows, or None to measure it")

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        end = sampler.num_stages
        if self.n is None and max_nfe is None:
            raise ValueError("n=None takes the number of candidates from the budget; give max_nfe, or n")
        checks = self._checks(sampler, affordable(sampler, self.n, max_nfe))
        price = self.check_cost if self.check_cost and self.preset in THRIFTY else 0.0
        while True:
            rows = self._widest(sampler, checks, max_nfe)
            held = {c: k for c, k in zip(checks, pairwise(rows), strict=True) if k[1] < k[0]}
            dear = [c for c, (before, after) in held.items() if not _pays(before, after, price, sampler.nfe(c, end))]
            if not dear and (held or not checks):
                break
            checks = {c: k for c, k in checks.items() if held and c != dear[-1]}  # widened until idle, they hold back n
        stages, scores = (0, *checks, end), sum(set(rows))
        images = sum(k * sampler.cost(a, b) for k, (a, b) in zip(rows, pairwise(stages), strict=True))
        search = replace(self, n=rows[0], calls=tuple(held), keep=tuple(after for _, after in held.values()))
        return Budgeted(search, _nfe(sampler, stages, rows), images, scores, scores, finals=rows[-1])

    def init(self, sampler: Sampler, request: Request) -> SearchState:
        search, notes = self.plan(sampler).search, ()
        if search.n > 1 and not search.calls:
            notes = (
                f"halving (preset {self.preset!r}) has no check left that drops a candidate on {sampler.num_stages} "
                f"stages: this is best-of-{search.n}; use more steps or candidates, or give calls and keep",
            )
        return SearchState(request, open_prompts=tuple(range(len(request.prompts))), notes=notes)

    def step(self, state: SearchState, sampler: Sampler, evaluate: Evaluate) -> SearchState:
        """The next check of all open prompts at once, or the end.

        Where the driver cannot pay for the plan, fewer candidates go on in its proportions, at least the best one of
        each prompt. While the pace is unknown, as many as surely fit run to the first check and wait for the others.
        """
        search, end, rows = self.plan(sampler).search, sampler.num_stages, state.live
        have = 0 if rows is None else rows.prompt.tolist().count(state.open_prompts[0])
        joining = unchecked(rows)
        begin, most = (0, search.n) if joining else (rows.stage, have)
        planned = zip(search.calls, pairwise((search.n, *search.keep)), strict=True)
        checks = {c: after / before for c, (before, after) in planned if c > begin}
        stages = (begin, *checks, end)
        first = stages[1]

        room = rows_left(state, sampler)
        paid = have * sampler.nfe(0, first) if joining else 0
        fitting = (k for k in range(most, 1, -1) if _nfe(sampler, stages, self._survivors(k, checks)) - paid <= room)
        k = next(fitting, 1)
        if joining and k > have:
            rows = joined(state, sampler, have, k, first)
            if have == 0 and k < most:
                return replace(state, live=rows, round=state.round + 1)
        kept, early = prune(rows, k, state.open_prompts)
        rows = sampler.select(rows, kept)

        measured = self.preset in THRIFTY and self.check_cost is None and k * sampler.nfe(begin, end) - paid <= room
        price = state.price if measured and state.price else 0.0
        left = zip(checks, self._survivors(k, checks)[1:], strict=True)
        stage, survivors = next((c for c in left if _pays(k, c[1], price, sampler.nfe(c[0], end))), (end, k))
        rows = evaluate(rows if rows.stage == stage else sampler.advance(rows, stage))
        state = replace(state, round=state.round + 1, cut=state.cut or k < most)
        if stage == end:
            return replace(state, live=None, finished=rows, pruned=state.pruned + early)
        features = None if self.rule is None else evaluate.features(rows)
        kept, late = prune(rows, survivors, state.open_prompts, self.rule, features)
        return replace(state, live=sampler.select(rows, kept), pruned=state.pruned + early + late)

    def done(self, state: SearchState) -> bool:
        return state.finished is not None or not state.open_prompts

    def _checks(self, sampler: Sampler, n_bar: int) -> dict[int, float | int]:
        """Stage -> what stays."""
        calls, keep = self.calls, self.keep
        if calls is None and self.preset == "auto":
            calls = () if n_bar <= 2 else (0.45,) if n_bar == 3 else (0.4, 0.7)
            keep = (0.5,) * len(calls)
        elif calls is None:
            calls, keep = PRESETS[self.preset]
        stages = zip(check_stages(sampler, calls), keep, strict=True)
        return {c: kept for c, kept in stages if c < sampler.num_stages}

    def _survivors(self, n: int, checks: Mapping[int, float | int]) -> list[int]:
        """K_0 ... K_J from K_0 = n."""
        rows = [n]
        for a in checks.values():
            if isinstance(a, int):
                kept = a
            elif self.rule is not None:
                kept = self.rule.survivors(rows[-1], a)
            else:
                kept = max(1, math.floor(a * rows[-1] + 0.5 + ROUNDING))
            rows.append(min(rows[-1], kept))
        return rows

    def _widest(self, sampler: Sampler, checks: Mapping[int, float | int], max_nfe: int | None) -> list[int]:
        """K_0 ... K_J with the most candidates that fit, what is left of the budget spent on wider checks."""
        if max_nfe is None:
            return self._survivors(self.n, checks)
        stages, bar = (0, *checks, sampler.num_stages), max_nfe // sampler.nfe(0, sampler.num_stages)
        price = self.check_cost or 0.0

        def fits(rows: Sequence[int]) -> bool:
            nfe = _nfe(sampler, stages, rows)
            scores = sum(set(rows))  # a check that keeps everyone is not held
            return nfe <= max_nfe and nfe + price * scores <= max_nfe + price * bar + ROUNDING

        most = max_nfe // sampler.nfe(0, stages[1])
        most = most if self.n is None else min(most, self.n)
        n = bisect_left(range(1, most + 1), True, key=lambda n: not fits(self._survivors(n, checks)))
        rows = self._survivors(n, checks)
        for j, kept in reversed([*enumerate(checks.values(), 1)]):
            if n == self.n or isinstance(kept, int):
                continue
            while rows[j] < rows[j - 1] and fits(wider := [*rows[:j], rows[j] + 1, *rows[j + 1 :]]):
                rows = wider
        return rows


def _nfe(sampler: Sampler, stages: Sequence[int], rows: Sequence[int]) -> int:
    return sum(k * sampler.nfe(a, b) for k, (a, b) in zip(rows, pairwise(stages), strict=True))


def _pays(before: int, after: int, price: float, nfe_left: int) -> bool:
    return before * price < (before - after) * nfe_left
