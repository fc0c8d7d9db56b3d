"""Particles: sequential Monte Carlo over the steps of the sampler, as FK steering (arXiv 2501.06848) frames it.

Temper "das" and its scale are of DAS (2501.05803); the defaults follow the comparison in 2505.23614. r_j = score of a
particle's preview at event j, b_j = temper there, T = stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from visearch.protocols import Budgeted, Evaluate, Population, Request, Sampler, SearchState, Transition, transition
from visearch.search._common import (
    affordable,
    check_stages,
    check_whole,
    joined,
    rows_left,
    shares,
    unchecked,
    with_steps,
)
from visearch.search._potentials import POTENTIALS, TEMPERS, latest_potentials, spread_scales
from visearch.selection import RESAMPLING, effective_size, prune, record, resample

__all__ = ["FKSteering", "SequentialMonteCarlo"]


@dataclass(frozen=True)
class SMCState(SearchState):
    """``scale`` holds lambda of each prompt, NaN while its scores have not differed yet."""

    scale: tuple[float, ...] = ()


@dataclass(frozen=True)
class SequentialMonteCarlo:
    """n particles that take stochastic steps; at each event those with promising previews are copied over the others.

    At event j a particle's log-weight grows by Phi_j, with lambda the ``scale``: current ``lambda b_j r_j``; sum and
    max the same with the sum or maximum of its r_1 ... r_j; difference ``lambda (b_j r_j - b_{j-1} r_{j-1})``. At T it
    grows by what makes the total along any ancestry ``lambda r_T``. The answer is the argmax of the reward over the
    finished particles, all of which are kept, with their weights. A prompt costs n T model rows and n (events + 1)
    scores.

    Copies diverge by the noise of the steps that follow. ``"sde:0.7"`` keeps the spread of a known target (0.303 of
    0.300 at 28 steps, where ``"eta:1"`` keeps 0.275), and plain samples of emoji-64 are not measurably worse for it;
    with ``"eta:1"`` copies diverge by a third to a half more. With ``transition="ode"`` they never would, so rows are
    dropped, not copied, and the plan is an upper bound. With one particle, this is the plain sampler.

    Args:
        n: particles a prompt.
        scale: lambda; ``None`` takes 4.5 / (standard deviation of the prompt's scores at the first event where they
            differ). 10 suits ImageReward (2501.06848).
        events: when to weigh, ascending: floats in (0, 1) are shares of T, rounded up, ints are stages; then up to the
            next milestone. Events after which no noise is drawn any more vanish.
        potential: ``"current"``, ``"difference"``, ``"max"`` or ``"sum"``.
        temper: b: ``"constant"`` 1; ``"linear"`` 2 stage / T; ``"das"`` exponential, 1 from 0.87 T on.
        resampling: ``"multinomial"``, ``"systematic"`` or ``"ssp"``.
        trigger: resample where the effective number of particles falls below this share of n, or ``"always"``.
        transition: the stochastic step, by name or as an object; samplers that are stochastic by themselves keep
            theirs.

    Raises:
        ValueError: a field out of range or an unknown name; in ``plan`` and ``init``, a sampler without that step.
    """

    n: int = 4
    scale: float | None = None
    events: tuple[float | int, ...] = (0.3, 0.5, 0.7)
    potential: str = "max"
    temper: str = "linear"
    resampling: str = "ssp"
    trigger: float | str = 0.5
    transition: str | Transition = "sde:0.7"

    def __post_init__(self) -> None:
        check_whole(self, n=1)
        object.__setattr__(self, "events", shares("events", self.events))
        object.__setattr__(self, "transition", transition(self.transition))
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise ValueError(f"scale={self.scale} must be at least 0, or None to take it from the scores")
        for name, known in (("potential", POTENTIALS), ("temper", TEMPERS), ("resampling", RESAMPLING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use {', '.join(known)}")
        if self.trigger != "always" and not (isinstance(self.trigger, (int, float)) and 0 <= self.trigger <= 1):
            raise ValueError(f"trigger={self.trigger!r} must be a share of n in [0, 1], or 'always'")

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        end, n = sampler.num_stages, affordable(sampler, self.n, max_nfe)
        self.view(sampler)
        search = replace(self, n=n, events=self._stages(sampler))
        if n == 1:
            search = replace(search, events=(), transition="ode")
        scores, exact = n * (len(search.events) + 1), not search.events or search._copies(sampler)
        return Budgeted(search, n * sampler.nfe(0, end), n * sampler.cost(0, end), scores, scores, n, exact)

    def view(self, sampler: Sampler) -> Sampler:
        """The sampler with the steps that the particles take.

        Raises:
            ValueError: it has no such steps.
        """
        return sampler if getattr(sampler, "stochastic", False) else with_steps(sampler, self.transition)

    def _copies(self, sampler: Sampler) -> bool:
        """Whether copies of a row would diverge."""
        return getattr(sampler, "stochastic", False) or self.view(sampler) is not sampler

    def init(self, sampler: Sampler, request: Request) -> SMCState:
        search, notes, prompts = self.plan(sampler).search, (), len(request.prompts)
        if search.n > 1 and not search.events:
            notes = (
                f"smc has no event left on {sampler.num_stages} stages: this is best-of-{search.n} with the step "
                f"{self.transition}; use more steps, or give events",
            )
        scale = (math.nan if self.scale is None else float(self.scale),) * prompts
        return SMCState(request, open_prompts=tuple(range(prompts)), notes=notes, scale=scale)

    def step(self, state: SMCState, sampler: Sampler, evaluate: Evaluate) -> SMCState:
        """To the next event of all open prompts at once, or to the end.

        Where the driver cannot pay for all particles, the best ones go on. While the pace is unknown, as many as surely
        fit run to the first event and wait for the others.
        """
        view, end, rows = self.view(sampler), sampler.num_stages, state.live
        joining = unchecked(rows)
        have = 0 if rows is None else max(rows.prompt.tolist().count(p) for p in state.open_prompts)
        begin, most = (0, self.n) if joining else (rows.stage, have)
        stage = min(s for s in (*self.events, end) if s > begin)
        paid = have * sampler.nfe(0, stage) if joining else 0
        k = max(1, int(min(most, (rows_left(state, sampler) + paid) / sampler.nfe(begin, end))))
        if joining and k > have:
            rows = joined(state, view, have, k, stage)
            if have == 0 and k < most:
                return replace(state, live=rows, round=state.round + 1)
        kept, early = prune(rows, k, state.open_prompts)
        rows = view.select(rows, kept)
        rows = evaluate(rows if rows.stage == stage else view.advance(rows, stage))

        scale = spread_scales(state.scale, rows, state.open_prompts)
        grown = rows.log_weight + latest_potentials(rows, scale, self.potential, self.temper, end)
        rows = replace(rows, log_weight=grown)
        cut, pruned = state.cut or k < most, state.pruned + early
        state = replace(state, round=state.round + 1, scale=scale, cut=cut, pruned=pruned)
        if stage == end:
            return replace(state, live=None, finished=rows)
        index, weights = self._resampled(state, rows, self._copies(sampler))
        dropped = record(rows, sorted(set(range(len(rows))) - set(index)))
        live = replace(view.select(rows, index), log_weight=weights)
        return replace(state, live=live, pruned=state.pruned + dropped)

    def done(self, state: SMCState) -> bool:
        return state.finished is not None or not state.open_prompts

    def _stages(self, sampler: Sampler) -> tuple[int, ...]:
        end = sampler.num_stages
        if any(isinstance(e, int) and e > end for e in self.events):
            raise ValueError(f"events={self.events}: the sampler has {end} stages; give ascending ones up to {end - 1}")
        last = end if self.view(sampler) is sampler else end - 1  # a view's last step ends clean: it draws no noise
        return tuple(sorted({s for s in check_stages(sampler, self.events, "events") if s < last}))

    def _resampled(self, state: SMCState, rows: Population, copies: bool) -> tuple[list[int], torch.Tensor]:
        """Rows to go on with, prompt by prompt, and their log-weights."""
        index: list[int] = []
        weights: list[float] = []
        for prompt in state.open_prompts:
            mine = sorted((rows.prompt == prompt).nonzero().flatten().tolist(), key=rows.order_key)
            own = rows.log_weight[mine]
            size = effective_size(own)
            if size == 0 or (self.trigger != "always" and size >= self.trigger * len(mine)):
                index += mine
                weights += [0.0] * len(mine) if size == 0 else own.tolist()
                continue
            stream = torch.Generator().manual_seed(state.request.derive(prompt, "resample", rows.stage))
            counts = resample(own, self.resampling, stream)
            kept = {row: count for row, count in zip(mine, counts, strict=True) if count}
            if copies:
                index += [row for row, count in kept.items() for _ in range(count)]
                weights += [0.0] * len(mine)
            else:  # particles that merge weigh as many as they were
                index += kept
                weights += [math.log(count) for count in kept.values()]
        return index, torch.tensor(weights)


@dataclass(frozen=True)
class FKSteering(SequentialMonteCarlo):
    """FK steering as published (2501.06848): resample always, by the maximum so far, at 20, 40, 60 and 80 % of T.

    Its scale is made for ImageReward. Guided by a CLIP it loses to best-of-n: eight particles are worth .40 [.25, .69]
    of its model rows and .36 [.22, .62] of its seconds on emoji-64, .33 [.24, .58] and .22 [.15, .38] on emoji-64-v (60
    prompts, ``assets/results``). No judge sees that loss.
    """

    scale: float | None = 10.0
    events: tuple[float | int, ...] = (0.2, 0.4, 0.6, 0.8)
    temper: str = "constant"
    resampling: str = "multinomial"
    trigger: float | str = "always"
    transition: str | Transition = "ddpm"
