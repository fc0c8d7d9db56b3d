"""EvoSearch: candidates evolve along the denoising steps (arXiv 2505.17618).

T = stages, e_g = stage from which generation g restarts, k_0 = first candidates, k_{g+1} = population of generation g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from visearch.protocols import Budgeted, Evaluate, Population, Request, Sampler, SearchState, Transition, transition
from visearch.search._common import (
    affordable,
    as_tuple,
    candidates_left,
    check_whole,
    finished,
    next_milestone,
    rows_left,
    with_steps,
)
from visearch.search._generations import PRESETS, restart_stages, shape
from visearch.selection import tournament

__all__ = ["PRESETS", "EvolutionarySearch"]


@dataclass(frozen=True)
class EvoState(SearchState):
    """``archive`` holds, by stage, the rows of each round as they came by there, on the CPU, in the order of
    ``finished``; ``generation`` is the next one."""

    archive: dict[int, tuple[Population, ...]] = field(default_factory=dict)
    generation: int = 0


@dataclass(frozen=True)
class EvolutionarySearch:
    """n candidates, then generations of children of the best so far, each mutated at a later stage and run on to T.

    The archive holds whoever was finished, with the score. In generation g its ``elites`` best count as part of the
    population and are never run again; each other place goes to a child, whose parent wins a tournament among
    ``tournament`` distinct members. From stage 0 a child's initial noise is ``sqrt(1 - beta^2) x + beta eps``; from
    later ones the parent as it was ``jump`` stages after e_g is noised back to e_g, exactly to its level. The answer is
    the archive's best. A prompt costs ``n nfe(0, T) + sum_g (k_{g+1} - elites) nfe(e_g, T)`` model rows, where the
    released code runs elites again. Within a budget, n and with it all sizes shrink in proportion.

    Presets: ``"sd2.1"``, ``"flux"``, ``"wan"``: the released code's. ``"auto"``: ``generations`` restarts at even
    distances from stage 0 on, populations of n / 2, a fifth of one elite.

    The published claim, better and more diverse than best-of-n, does not hold here (60 prompts, eight images,
    ``assets/results``). It is worth 1.07 [.89, 1.38] of best-of-n's model rows and .68 [.56, .89] of its seconds on
    emoji-64, 1.29 [1.07, 1.76] and .56 [.46, .80] on emoji-64-v. Judges differ once in six: B gains .083 [.010, .160]
    on emoji-64. What it returns is less diverse on both, by .069 [.059, .080] and .053 [.044, .063].

    Args:
        n: k_0; default the preset's, 8 for ``"auto"``.
        preset: as above; default ``"auto"``, or ``"explicit"`` where ``restarts`` are given.
        restarts: e_g, not descending: floats in [0, 1) are shares of T, down to a milestone; ints are milestones or 0.
        sizes: k_0 ... k_G; scaled where ``n`` says so.
        elites: default a fifth of the smallest population.
        generations: of ``"auto"``.
        tournament: entrants a child.
        beta: strength of the mutation at stage 0, in (0, 1].
        jump: stages between e_g and where the parent is taken from; up to the next milestone.
        spend_savings: elites come on top, so that k_{g+1} children cost what the released code spends.
        transition: of all steps, by name or as an object.

    Raises:
        ValueError: a field out of range, more elites than population; in ``plan`` and ``init``, a restart that is no
            stage of the sampler, or a sampler whose rows cannot move.
    """

    n: int | None = None
    preset: str | None = None
    restarts: tuple[float | int, ...] | None = None
    sizes: tuple[int, ...] | None = None
    elites: int | None = None
    generations: int = 4
    tournament: int = 3
    beta: float = 0.3
    jump: int = 1
    spend_savings: bool = False
    transition: str | Transition = "ode"

    def __post_init__(self) -> None:
        object.__setattr__(self, "transition", transition(self.transition))
        for name in ("restarts", "sizes"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_tuple(value))
        object.__setattr__(self, "preset", self.preset or ("auto" if self.restarts is None else "explicit"))
        own = self.restarts is not None
        if self.preset not in ("auto", *PRESETS, *(("explicit",) * own)) or own != (self.sizes is not None):
            raise ValueError(
                f"preset={self.preset!r}, restarts={self.restarts}, sizes={self.sizes}: use auto, "
                f"{', '.join(PRESETS)}, or give restarts and sizes together"
            )
        least = {"n": 1, "elites": 0, "generations": 0, "tournament": 1, "jump": 1}
        check_whole(self, **{name: low for name, low in least.items() if getattr(self, name) is not None})
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in (0, 1]; 0 would repeat the parents")
        restarts, sizes, elites = self._shape()
        if len(sizes) != len(restarts) + 1 or not all(isinstance(k, int) and k >= 1 for k in sizes):
            raise ValueError(
                f"sizes={sizes}: give {len(restarts) + 1} whole numbers for restarts={restarts}: k_0, then "
                "one a restart"
            )
        if not all(e >= 0 if type(e) is int else type(e) is float and 0 <= e < 1 for e in restarts):
            raise ValueError(f"restarts={restarts}: give shares of the steps as floats in [0, 1), or stages")
        if sizes[1:] and elites > min(sizes[1:]):
            raise ValueError(f"elites={elites} are more than the smallest population, {min(sizes[1:])}; give fewer")

    def _shape(self) -> tuple[tuple[float | int, ...], tuple[int, ...], int]:
        """Restarts, sizes and elites before n scales them."""
        return shape(self.preset, self.restarts, self.sizes, self.elites, self.n, self.generations)

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        affordable(sampler, self.n or 1, max_nfe)
        n = self._shape()[1][0] if self.n is None else self.n
        plans = (self._with(sampler, k) for k in range(n, -1, -1))
        return next(plan for plan in plans if max_nfe is None or plan.nfe <= max_nfe)

    def _with(self, sampler: Sampler, n: int) -> Budgeted:
        """The plan with n first candidates and all other sizes in proportion; 0 is one candidate and no generation."""
        restarts, sizes, elites = self._shape()
        stages, end = restart_stages(sampler, restarts), sampler.num_stages
        first, *later = (max(1, math.floor(k * n / sizes[0] + 0.5)) for k in sizes)
        kept = min(elites, max(1, math.floor(elites * n / sizes[0] + 0.5)))
        idle = 0 if self.spend_savings else kept
        held = [(e, k) for e, k in zip(stages, later, strict=True) if n and k > idle]
        search = replace(
            self,
            n=first,
            preset="explicit",
            restarts=tuple(e for e, _ in held),
            sizes=(first, *(k for _, k in held)),
            elites=kept,
            transition=self.transition if first > 1 or held else "ode",
        )
        runs = [(first, 0), *((k - idle, e) for e, k in held)]
        nfe = sum(k * sampler.nfe(e, end) for k, e in runs)
        images = sum(k * sampler.cost(e, end) for k, e in runs)
        finals = sum(k for k, _ in runs)
        return Budgeted(search, nfe, images, finals, finals, finals)

    def view(self, sampler: Sampler) -> Sampler:
        """The sampler with the steps that all rows take."""
        return with_steps(sampler, self.transition)

    def init(self, sampler: Sampler, request: Request) -> EvoState:
        self.view(sampler)
        for stage in self.plan(sampler).search.restarts:
            sampler.check_moves(stage)
        return EvoState(request, open_prompts=tuple(range(len(request.prompts))))

    def step(self, state: EvoState, sampler: Sampler, evaluate: Evaluate) -> EvoState:
        """The first candidates, as many at once as surely fit; or one generation of all open prompts."""
        view, end = self.view(sampler), sampler.num_stages
        drawn, g, cut = self._drawn(state), state.generation, state.cut
        if drawn < self.n:
            stop = drawn + candidates_left(state, self.n - drawn)
            rows = view.init(state.request, state.request.seeds(drawn, stop, state.open_prompts))
            later = self.restarts
        else:
            wanted = self.sizes[g + 1] - (0 if self.spend_savings else self.elites)
            count = int(min(wanted, rows_left(state, sampler) / sampler.nfe(self.restarts[g], end)))
            rows = self._children(state, view, count)
            g, cut, later = g + 1, cut or count < wanted, self.restarts[g + 1 :]
        sources = sorted({self._source(sampler, e) for e in later} - {end})
        archive = {}
        for stage in sources:
            rows = rows if rows.stage == stage else view.advance(rows, stage)
            archive[stage] = (*state.archive.get(stage, ()), rows.snapshot().to("cpu"))
        rows = evaluate(view.advance(rows, end))
        done = finished(state, view, rows)
        return replace(state, finished=done, archive=archive, generation=g, cut=cut, round=state.round + 1)

    def done(self, state: EvoState) -> bool:
        return not state.open_prompts or (self._drawn(state) >= self.n and state.generation >= len(self.restarts))

    def _drawn(self, state: EvoState) -> int:
        return 0 if state.finished is None else max(state.finished.candidate) + 1

    def _source(self, sampler: Sampler, restart: int) -> int:
        """Where the parents of children that restart at a stage are taken from."""
        return next_milestone(sampler, restart + self.jump) if restart else 0

    def _children(self, state: EvoState, view: Sampler, count: int) -> Population:
        """Mutated copies of tournament winners at the generation's restart, ``count`` a prompt."""
        g, request, archived = state.generation, state.request, state.finished
        restart = self.restarts[g]
        chosen = []
        for prompt in state.open_prompts:
            mine = (archived.prompt == prompt).nonzero().flatten().tolist()
            for slot in range(count):
                stream = torch.Generator().manual_seed(request.derive(prompt, "tournament", g, slot))
                row = tournament(archived, mine, self.tournament, stream)
                chosen.append((row, request.derive(prompt, "mutate", g, slot)))
        parts = state.archive.get(self._source(view, restart), (archived,))
        starts = accumulate(map(len, parts), initial=0)
        children = []
        for part, start in zip(parts, starts, strict=False):  # rounds apart: their rows may hold other histories
            mine = [(row - start, seed) for row, seed in chosen if start <= row < start + len(part)]
            if mine:
                rows, seeds = [row for row, _ in mine], [seed for _, seed in mine]
                parents = view.select(part.to(view.device), rows)
                moved = view.renoise(parents, restart, seeds) if restart else view.perturb(parents, self.beta, seeds)
                children.append(moved)
        return view.concat(children)
