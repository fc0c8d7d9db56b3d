"""Cached drafts (arXiv 2607.23159): search among drafts that reuse model outputs, then run the best again in full.

T = stages, q = share of model rows that the step cache skips.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from visearch.protocols import Budgeted, Evaluate, Population, Request, Sampler, Search
from visearch.search._common import candidates_left, check_whole
from visearch.search.best_of_n import BestOfN
from visearch.search.nesting import NestedState, at_noise, is_search, may_step, refinable, repeat, step_inner, view_of
from visearch.selection import record, top_k

__all__ = ["CachedDrafts"]


@dataclass(frozen=True)
class CachedDrafts:
    """``search`` runs on drafts with a step cache; its ``m`` best rows run again without, and are scored again.

    A full run repeats the draft's lineage (seed, noise, forks, perturbations) and equals the uncached candidate; only
    full runs are finished, drafts are on record in ``pruned``, with their scores at stage T and ``draft=True``. With
    best-of-N inside, a prompt costs ``N (1 - q) T + m T`` model rows. Where that scores no more candidates than the
    budget pays in full, or where the cache skips nothing, there are no drafts: ``search`` runs in full (``m=0``).

    On emoji-64 at 15 steps and for eight images, drafts are worth 1.34 [1.05, 1.50] of best-of-n's model rows and 1.20
    [.91, 1.38] of its seconds, drafts of halving 1.43 [1.08, 1.50] and 1.29 [.94, 1.37], which is what halving alone is
    worth (60 prompts, ``assets/results``). Only the full runs are returned, so there is no set to choose from.

    Args:
        search: draws the drafts; one that re-noises finished rows is refused, since its rows cost several runs.
        m: drafts a prompt that run again, at least 1; 0 runs ``search`` alone, without the cache.
        cache: what ``sampler.view(cache=)`` takes. ``"auto"`` skips about half of the calls, and nothing of at most 4
            steps. The paper's thresholds, here ``"tau=..."``: .10 for Wan, .05 for CogVideoX and HunyuanVideo, .02 for
            LTX; elsewhere the largest with a capture of 90 %. With a threshold the plan is an upper bound.

    Raises:
        ValueError: ``m`` below 0, or ``search`` is none; in ``plan`` and ``init``, a sampler without that cache.
    """

    search: Search = field(default_factory=BestOfN)
    m: int = 1
    cache: Any = "auto"

    def __post_init__(self) -> None:
        if not is_search(self.search):
            raise ValueError(f"search={self.search!r} is no search; give one, such as BestOfN(n=8)")
        check_whole(self, m=0)

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        draft, one = self._drafts(sampler), sampler.nfe(0, sampler.num_stages)
        exact = getattr(draft, "exact_nfe", True)
        if self.m == 0 or (exact and draft.nfe(0, draft.num_stages) == one):
            return self._without(sampler, max_nfe)
        whole = None if max_nfe is None else max_nfe // one
        m = self.m if whole is None else min(self.m, max(1, whole - 1))
        rest = None if max_nfe is None else max_nfe - m * one
        if rest is not None and rest < draft.nfe(0, draft.num_stages):
            return self._without(sampler, max_nfe)
        inner = self.search.plan(draft, rest)
        m = min(m, inner.finals)
        if inner.decodes <= (m if whole is None or not exact else max(m, whole)):
            return self._without(sampler, max_nfe)
        return Budgeted(
            replace(self, search=inner.search, m=m),
            nfe=inner.nfe + m * one,
            images=inner.images + m * sampler.cost(0, sampler.num_stages),
            decodes=inner.decodes + m,
            rewards=inner.rewards + m,
            finals=m,
            exact=inner.exact and exact,
        )

    def view(self, sampler: Sampler) -> Sampler:
        """The sampler with the steps of full runs: those that ``search`` takes."""
        return view_of(self.search, sampler)

    def init(self, sampler: Sampler, request: Request) -> NestedState:
        search = self.plan(sampler).search
        inner = search.search.init(search._drafts(sampler) if search.m else sampler, request)
        notes = inner.notes
        if search.m == 0 and search.search.plan(sampler).decodes > 1:
            notes += (
                f"no drafts: cache={self.cache!r} skips nothing of {sampler.num_stages} stages, or the budget pays as "
                f"many candidates in full; {search.search} runs without; use more steps or another cache",
            )
        return NestedState(request, open_prompts=inner.open_prompts, notes=notes, inner=inner)

    def step(self, state: NestedState, sampler: Sampler, evaluate: Evaluate) -> NestedState:
        """A round of the drafts, or all full runs at once.

        Of what the driver can still pay, the full runs are kept back; while the pace is unknown, one candidate's worth
        is drafted.
        """
        search = self.plan(sampler).search
        if search.m == 0:
            state = step_inner(state, search.search, sampler, evaluate, state.room)
            return replace(state, finished=state.inner.finished)
        draft, room = search._drafts(sampler), state.room
        if room is not None:
            price = draft.nfe(0, draft.num_stages) / sampler.nfe(0, sampler.num_stages)
            kept = min(search.m, max(1, int(room)))
            least = min(room, 1.0) if state.inner.finished is None else 0.0
            room = max(room - kept, least) / price
        if may_step(search.search, state.inner, room):
            state = step_inner(state, search.search, draft, evaluate, room)
            return state if state.live is not None else replace(state, live=state.inner.finished)
        return search._finish(state, sampler, evaluate)

    def done(self, state: NestedState) -> bool:
        if not state.open_prompts or (state.finished is not None and self.m):
            return True
        return not self.m and self.search.done(state.inner)

    def _drafts(self, sampler: Sampler) -> Sampler:
        return sampler.view(cache=self.cache)

    def _without(self, sampler: Sampler, max_nfe: int | None) -> Budgeted:
        plan = self.search.plan(sampler, max_nfe)
        return plan._replace(search=replace(self, search=plan.search, m=0))

    def _finish(self, state: NestedState, sampler: Sampler, evaluate: Evaluate) -> NestedState:
        """Run the best drafts of each open prompt again, each from its beginning."""
        drafts, m = state.inner.finished, max(1, candidates_left(state, self.m))
        best = [r for r in top_k(drafts, m) if int(drafts.prompt[r]) in state.open_prompts]
        plain = self.view(sampler)
        begun = [r for r in best if refinable(drafts, r)]
        rows = [at_noise(plain, state.request, drafts, r, 1) for r in begun]
        full = [plain.advance(plain.concat(rows), plain.num_stages)] if rows else []
        full += [_again(plain, state.request, drafts, r) for r in best if r not in begun]
        return replace(
            state,
            live=None,
            finished=evaluate(plain.concat(full)),
            round=state.round + 1,
            cut=state.cut or len(best) < self.m * len(state.open_prompts) or not self.search.done(state.inner),
            pruned=state.pruned + tuple({**r, "draft": True} for r in record(drafts, range(len(drafts)))),
        )


def _again(sampler: Sampler, request: Request, rows: Population, row: int) -> Population:
    """One row by its lineage, in full.

    Raises:
        ValueError: it was re-noised, so that it cost more than one run.
    """
    events = rows.lineage[row]
    later = [e for e in events[1:] if e.stage > 0 or e.op not in ("noise", "perturb")]
    if any(e.op == "renoise" for e in later):
        raise ValueError(
            f"draft {rows.id[row]} was re-noised on its way; drafts of a search that re-noises cannot run again in one "
            "run: use best-of-n, halving or smc as search"
        )
    first = replace(rows.select([row]), lineage=(events[: len(events) - len(later)],))
    made = at_noise(sampler, request, first, 0, 1)
    for event in later:
        made = made if event.stage == made.stage else sampler.advance(made, event.stage)
        made = repeat(sampler, made, event)
    return made if made.stage == sampler.num_stages else sampler.advance(made, sampler.num_stages)
