"""Search over paths: branch at a low noise level, back to a high one and down again (arXiv 2501.09732, section 3).

T = stages, u = noise level of a stage in flow time: 1 is pure noise, 0 is clean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import NamedTuple

from visearch.protocols import Budgeted, Evaluate, Request, Sampler, SearchState
from visearch.search._common import ROUNDING, affordable, check_whole, joined, rows_left, unchecked
from visearch.selection import prune

__all__ = ["Leg", "SearchOverPaths", "legs"]


class Leg(NamedTuple):
    """One round: rows at stage ``begin`` are re-noised to stage ``back`` and run to stage ``land``."""

    begin: int
    back: int
    land: int


@dataclass(frozen=True)
class SearchOverPaths:
    """N rows; each round, M copies of each are re-noised, run down again, and the best N previews stay (2501.09732).

    The first N rows run to noise level ``sigma``; a round goes back by ``forward`` and down by ``backward``, always to
    the nearest stage, at least one beyond where it began. With fewer than two such rounds on the sampler's grid, rows
    go to .8 T instead, and back to .2 T in rounds that gain one stage each. Rows that land at T are finished.

    A prompt costs ``N i_0 + N M sum (i_land - i_back) + N (T - i_end)`` model calls, and N M scores a round, plus N if
    the last one does not land at T. Smaller budgets take fewer rounds, copies or rows: what spends most of them.
    In the paper, random search beats this by every guided metric, and here it loses in seconds: at eight images it is
    worth .79 [.44, 1.25] of best-of-n's model rows and .58 [.32, .95] of its seconds on emoji-64, .85 [.57, 1.16] and
    .74 [.51, 1.05] on emoji-64-v (60 prompts, ``assets/results``). It is not a default.

    Args:
        n: N, rows that stay, at least 1.
        m: M, copies of each, at least 1.
        sigma: noise level of the first branching, in (0, 1).
        forward: by how much a round goes back, in (0, 1).
        backward: by how much it comes down again, greater than ``forward`` and below 2.
        rounds: most rounds; ``None`` for all.

    Raises:
        ValueError: a field out of range; on use, a sampler whose noise levels are unknown.
    """

    n: int = 2
    m: int = 4
    sigma: float = 0.11
    forward: float = 0.78
    backward: float = 0.81
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_whole(self, n=1, m=1, **({} if self.rounds is None else {"rounds": 0}))
        for name in ("sigma", "forward"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1), a difference of noise levels")
        if not self.forward < self.backward < 2:
            raise ValueError(
                f"backward={self.backward} must be greater than forward={self.forward}, so that rounds come to an end, "
                "and below 2"
            )

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        found = self._legs(sampler)
        affordable(sampler, self.n, max_nfe)
        if max_nfe is None:
            return self._cost(sampler, self.n, self.m, found)
        sizes = product(range(1, self.n + 1), range(1, self.m + 1), range(len(found) + 1))
        plans = [
            self._cost(sampler, n, m, found[:rounds]) for n, m, rounds in sizes if m > 1 or m == self.m or not rounds
        ]
        fitting = [p for p in plans if p.nfe <= max_nfe]
        return max(fitting, key=lambda p: (p.search.rounds > 0, p.nfe, p.search.rounds))

    def init(self, sampler: Sampler, request: Request) -> SearchState:
        for leg in self.plan(sampler).search._legs(sampler):
            sampler.check_moves(leg.back)
        notes = ()
        if self.n > 1 and not replace(self, rounds=None)._legs(sampler):
            notes = (f"paths has no round on {sampler.num_stages} stages: this is best-of-{self.n}; use more steps",)
        return SearchState(request, open_prompts=tuple(range(len(request.prompts))), notes=notes)

    def step(self, state: SearchState, sampler: Sampler, evaluate: Evaluate) -> SearchState:
        """The first rows, or the next round, or the way to the end."""
        end, one, rows = sampler.num_stages, sampler.nfe(0, sampler.num_stages), state.live
        ahead = [leg for leg in self._legs(sampler) if rows is None or leg.begin >= rows.stage]
        room = rows_left(state, sampler)
        have = 0 if rows is None else rows.prompt.tolist().count(state.open_prompts[0])
        first = ahead[0].begin if ahead else end
        if unchecked(rows):
            waiting = have * sampler.nfe(first, end)  # has to be finished too
            sizes = range(self.n, have, -1)
            k = next((k for k in sizes if (k - have) * one + waiting <= room), max(have, 1))
            if k > have:
                return self._begun(state, sampler, evaluate, have, k, first)
        k, m = have, 0
        if ahead:
            _, back, land = ahead[0]
            each, rest = sampler.nfe(back, land), sampler.nfe(land, end)
            sizes = range(self.m, min(self.m - 1, 1), -1)  # one copy of each leaves nothing to choose from
            m = next((m for m in sizes if k * (m * each + rest) <= room), 0)
        if m == 0:
            land = end
            k = next((k for k in range(have, 1, -1) if k * sampler.nfe(rows.stage, end) <= room), 1)
        kept, early = prune(rows, k, state.open_prompts)
        rows = sampler.select(rows, [r for r in sorted(kept, key=rows.order_key) for _ in range(m or 1)])
        if m:
            rows = sampler.renoise(rows, back, self._seeds(state, rows.prompt.tolist(), land))
        rows = evaluate(sampler.advance(rows, land))
        cut = state.cut or k < have or (bool(ahead) and m < self.m)
        state = replace(state, round=state.round + 1, cut=cut, pruned=state.pruned + early)
        if land == end:
            return replace(state, live=None, finished=rows)
        kept, late = prune(rows, k, state.open_prompts)
        return replace(state, live=sampler.select(rows, kept), pruned=state.pruned + late)

    def done(self, state: SearchState) -> bool:
        return state.finished is not None or not state.open_prompts

    def _begun(
        self, state: SearchState, sampler: Sampler, evaluate: Evaluate, have: int, k: int, stage: int
    ) -> SearchState:
        """Candidates have..k-1 join those that wait at the first stage of branching, or are all there is to do."""
        rows = joined(state, sampler, have, k, stage)
        state = replace(state, round=state.round + 1)
        if stage == sampler.num_stages:
            return replace(state, finished=evaluate(rows), cut=k < self.n)
        return replace(state, live=rows)

    def _seeds(self, state: SearchState, prompts: Sequence[int], land: int) -> list[int]:
        """One a row, whichever prompts are beside it."""
        places = [prompts[:i].count(p) for i, p in enumerate(prompts)]
        return [state.request.derive(p, "paths", land, i) for p, i in zip(prompts, places, strict=True)]

    def _legs(self, sampler: Sampler) -> list[Leg]:
        levels = {stage: _flow_time(sampler.noise_level(stage)) for stage in sampler.milestones}
        return legs(levels, self.sigma, self.forward, self.backward)[: self.rounds]

    def _cost(self, sampler: Sampler, n: int, m: int, found: Sequence[Leg]) -> Budgeted:
        end, rounds = sampler.num_stages, len(found)
        begin, last = (found[0].begin, found[-1].land) if found else (end, end)
        runs = [(n, 0, begin), *((n * m, leg.back, leg.land) for leg in found), (n, last, end)]
        nfe = sum(k * sampler.nfe(a, b) for k, a, b in runs)
        images = sum(k * sampler.cost(a, b) for k, a, b in runs)
        finals = n * m if found and last == end else n
        scores = n * m * rounds + (0 if found and last == end else n)
        return Budgeted(replace(self, n=n, m=m, rounds=rounds), nfe, images, scores, scores, finals)


def legs(levels: dict[int, float], sigma: float, forward: float, backward: float) -> list[Leg]:
    """The rounds on a grid: ``levels`` is stage -> u of all stages at which a search may stop, the last one T.

    Empty where there are not two stages before T.
    """
    stages = sorted(levels)
    if len(stages) < 2:
        return []
    *before, end = stages
    found, at = [], _nearest(levels, before, sigma)
    while at < end:
        earlier = [s for s in before if s < at]
        if not earlier:
            break
        back = _nearest(levels, earlier, levels[at] + forward)
        land = _nearest(levels, [s for s in stages if s > at], levels[at] + forward - backward)
        found.append(Leg(at, back, land))
        at = land
    if len(found) >= 2:
        return found
    begin = min(next(s for s in stages if s >= math.ceil(0.8 * end - ROUNDING)), before[-1])
    back = next((s for s in stages if s >= math.ceil(0.2 * end - ROUNDING) and s < begin), None)
    if back is None:
        return found
    return [Leg(a, back, b) for a, b in pairwise(s for s in stages if s >= begin)]


def _nearest(levels: dict[int, float], stages: Sequence[int], u: float) -> int:
    return min(stages, key=lambda s: (abs(levels[s] - u), s))


def _flow_time(log_snr: float) -> float:
    """sigma / (alpha + sigma)."""
    return 1 / (1 + math.exp(log_snr / 2))
