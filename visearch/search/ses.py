"""Low-frequency cross-entropy search over the initial noise, SES (arXiv 2602.03208).

Shapes: noises (..., H, W); their low band at level L is (..., H / 2^L, W / 2^L).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from visearch.protocols import Budgeted, Evaluate, Population, Request, Sampler, SearchState
from visearch.search._common import affordable, candidates_left, check_whole, finished, whole_candidates
from visearch.search.nesting import at_noise, begun_again, next_candidates, refinable
from visearch.selection import rank

__all__ = ["CrossEntropyState", "LowFrequencyCrossEntropy", "low_band", "with_low_band"]

ROUNDS = 3  # as in the paper, 30 = 3 x 10; fewer candidates make smaller generations


@dataclass(frozen=True)
class CrossEntropyState(SearchState):
    """Where each prompt stands.

    Args:
        base: prompt -> row of ``finished`` whose high band all others share; none before the first round.
        drawn: prompt -> rows that were run.
        fresh: prompt -> candidate to begin from where there is no base.
        begun: rows of ``finished`` that were there at the beginning.
    """

    base: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, int] = field(default_factory=dict)
    fresh: dict[int, int] = field(default_factory=dict)
    begun: int = 0


@dataclass(frozen=True)
class LowFrequencyCrossEntropy:
    """Fit a Gaussian to the low frequencies of the noises that scored best, draw from it, repeat (2602.03208).

    The noise is split by the orthonormal Haar transform, of which only the low band at level L is touched: generations
    of it are drawn from N(mu, v), mu = 0 and v = 1 at first; then mu and v, elementwise, are refitted to the ``elites``
    best of all generations. All candidates share the high band and the random stream of candidate 0, which is the first
    of them. Five elites alone would let v collapse: it stays above ``floor``.

    Costs n whole candidates a prompt. Where n is small, generations are, so that three remain.

    At eight candidates it loses to best-of-n: they are worth .28 [.23, .39] of its model rows and .21 [.17, .30] of its
    seconds on emoji-64, .62 [.40, .97] and .35 [.22, .55] on emoji-64-v (60 prompts, ``assets/results``).

    Args:
        n: candidates a prompt in all, at least 1.
        population: most candidates of a generation, at least 2.
        elites: of which mu and v are refitted, 2 to ``population``; half of smaller generations.
        levels: L at most, at least 1: the largest for which 2^L divides both H and W is taken.
        floor: least variance, at least 0.

    Raises:
        ValueError: a field out of range; on use, a sampler whose initial noise is not known or has no such grid.
    """

    n: int = 30
    population: int = 10
    elites: int = 5
    levels: int = 4
    floor: float = 0.05

    def __post_init__(self) -> None:
        check_whole(self, n=1, population=2, elites=2, levels=1)
        if self.elites > self.population:
            raise ValueError(f"elites={self.elites} cannot be more than population={self.population}; 5 of 10 is usual")
        if not self.floor >= 0:
            raise ValueError(f"floor={self.floor} must be at least 0, in units of the noise's variance; 0.05 is usual")

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        n = affordable(sampler, self.n, max_nfe)
        population = max(2, min(self.population, -(-n // ROUNDS)))
        elites = self.elites if population == self.population else max(2, min(self.elites, population // 2))
        return whole_candidates(replace(self, n=n, population=population, elites=elites), sampler, n)

    def init(self, sampler: Sampler, request: Request) -> CrossEntropyState:
        if self.n > 1:  # refused here rather than after the first round
            low_band(sampler.noise(sampler.init(request, request.seeds(0, 1))), self.levels)
        prompts = range(len(request.prompts))
        return CrossEntropyState(request, open_prompts=tuple(prompts), fresh=dict.fromkeys(prompts, 0))

    def resume(self, sampler: Sampler, found: SearchState) -> CrossEntropyState:
        """All candidates share the high band of the best row of ``found`` that differs by its initial noise alone.

        Where there is none, of the next candidate.
        """
        rows, notes = found.finished, found.notes
        base = {int(rows.prompt[r]): r for r in reversed(rank(rows)) if refinable(rows, r)}
        if not base:
            notes += ("ses: no finished row differs by its initial noise alone; it begins from a new candidate",)
        return CrossEntropyState(
            found.request,
            rows,
            open_prompts=found.open_prompts,
            pruned=found.pruned,
            notes=notes,
            base=base,
            fresh=next_candidates(found),
            begun=len(rows),
        )

    def step(self, state: CrossEntropyState, sampler: Sampler, evaluate: Evaluate) -> CrossEntropyState:
        """The rest of a generation of each open prompt."""
        search, parts = self.plan(sampler).search, []
        room = candidates_left(state, search.n)
        drawn, base = dict(state.drawn), dict(state.base)
        for prompt in state.open_prompts:
            have = drawn.get(prompt, 0)
            count = min(room, search.n - have, search.population - have % search.population)
            if count < 1:
                continue
            drawn[prompt] = have + count
            rows, row = state.finished, base.get(prompt)
            if row is None:
                k = state.fresh[prompt]
                rows, row = sampler.init(state.request, state.request.seeds(k, k + 1, [prompt])), 0
                base[prompt] = (0 if state.finished is None else len(state.finished)) + sum(map(len, parts))
                parts.append(rows)
                count -= 1
            if count:
                parts.append(search._generation(state, sampler, rows, row, count))
        rows = evaluate(sampler.advance(sampler.concat(parts), sampler.num_stages))
        done = finished(state, sampler, rows)
        return replace(state, finished=done, base=base, drawn=drawn, round=state.round + 1)

    def done(self, state: CrossEntropyState) -> bool:
        return all(state.drawn.get(p, 0) >= self.n for p in state.open_prompts)

    def _generation(
        self, state: CrossEntropyState, sampler: Sampler, rows: Population, row: int, count: int
    ) -> Population:
        copies, seeds = begun_again(state, sampler, rows, row, count, "ses")
        noise, prompt = sampler.noise(copies), int(rows.prompt[row])
        mean, variance = torch.zeros(()), torch.ones(())
        if state.drawn.get(prompt, 0) >= self.population:
            lows = torch.stack([low_band(x, self.levels) for x in self._elites(state, sampler, prompt)])
            mean, variance = lows.mean(0), lows.var(0, correction=0).clamp(min=self.floor)
        shape = low_band(noise[0], self.levels).shape
        drawn = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        low = mean.to(noise) + variance.to(noise).sqrt() * drawn.to(noise)
        return sampler.set_noise(copies, with_low_band(noise, low, self.levels), seeds)

    def _elites(self, state: CrossEntropyState, sampler: Sampler, prompt: int) -> list[Tensor]:
        """Noises of the best rows of this search, and of the one that it began from."""
        rows, base = state.finished, state.base[prompt]
        mine = [r for r in rank(rows) if rows.prompt[r] == prompt and (r == base or r >= state.begun)]
        return [sampler.noise(at_noise(sampler, state.request, rows, r, 1))[0] for r in mine[: self.elites]]


def low_band(x: Tensor, levels: int) -> Tensor:
    """The low band of the orthonormal Haar transform of (..., H, W): block sums over 2^L x 2^L, divided by 2^L.

    L is the largest level up to ``levels`` for which 2^L divides H and W.

    Raises:
        ValueError: fewer than three dimensions, or H or W odd.
    """
    block = _block(x, levels)
    grids = x.reshape(-1, 1, *x.shape[-2:])
    return (avg_pool2d(grids, block) * block).reshape(*x.shape[:-2], x.shape[-2] // block, x.shape[-1] // block)


def with_low_band(x: Tensor, low: Tensor, levels: int) -> Tensor:
    """``x`` with another low band and all its other Haar coefficients as they were; inverse of :func:`low_band`."""
    block = _block(x, levels)
    change = (low - low_band(x, levels)) / block
    return x + change.repeat_interleave(block, -2).repeat_interleave(block, -1)


def _block(x: Tensor, levels: int) -> int:
    """2^L."""
    grid = tuple(x.shape[-2:])
    fitting = [2**level for level in range(1, levels + 1) if x.ndim >= 3 and all(s % 2**level == 0 for s in grid)]
    if not fitting:
        raise ValueError(
            f"low frequencies need noise of shape (..., H, W) with even H and W, this is {tuple(x.shape)}; use another "
            "size, or zero-order search, which takes any shape"
        )
    return fitting[-1]
