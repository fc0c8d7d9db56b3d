"""A global search, then a local one around what it found (the two kinds of search of arXiv 2501.09732)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from visearch.protocols import Budgeted, Evaluate, Request, Sampler, Search
from visearch.search.nesting import Local, NestedState, is_search, may_step, step_inner, view_of
from visearch.search.successive_halving import SuccessiveHalving
from visearch.search.zero_order import ZeroOrder

__all__ = ["Refine", "RefineState"]


@dataclass(frozen=True)
class RefineState(NestedState):
    """Which half is under way.

    Args:
        refining: whether ``inner`` is the state of the local search.
    """

    refining: bool = False


@dataclass(frozen=True)
class Refine:
    """``first`` runs to its end; ``then``, a local search, goes on from its winners.

    Random search and the local searches are two sides of 2501.09732; this joins them. Rows of ``then`` take the steps
    of those of ``first``, so that neighbours of a particle keep the noise of its steps. It costs what both cost, and
    the answer is the best row that either finished. In a budget too small for both, ``first`` gets ``share`` of it and
    what ``then`` leaves, and ``then`` the rest, or nothing where that is below one candidate. Under a deadline
    ``first`` may use ``share`` of the room that is left, and more where the plan of ``then`` does not need it.

    In the same budget the local search is worth less than what it takes from halving: after ``"steep"``, eight images
    are worth 1.24 [.98, 1.50] of best-of-n's model rows on emoji-64 and 1.11 [.94, 1.47] on emoji-64-v, without it 1.44
    on both (60 prompts, ``assets/results``).

    Args:
        first: any search.
        then: one that can follow another, as :class:`ZeroOrder` can; its ``n`` counts what is yet to run. ``None`` ends
            with ``first``.
        share: of the budget, for ``first``, in (0, 1).

    Raises:
        ValueError: ``then`` cannot follow another search, or ``share`` lies outside (0, 1).
    """

    first: Search = field(default_factory=SuccessiveHalving)
    then: Local | None = field(default_factory=lambda: ZeroOrder(n=4))
    share: float = 0.5

    def __post_init__(self) -> None:
        if not is_search(self.first):
            raise ValueError(f"first={self.first!r} is no search; give one, such as SuccessiveHalving(n=16)")
        if not isinstance(self.then, Local | None):
            raise ValueError(
                f"then={self.then!r} cannot follow another search: it has no resume(); use ZeroOrder or another local "
                "search"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} must lie in (0, 1); it is what `first` gets of the budget")

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        one = sampler.nfe(0, sampler.num_stages)
        rest, then = None, None
        if max_nfe is not None:
            rest = max_nfe - max(one, int(self.share * max_nfe))
        if self.then is not None and (rest is None or rest >= one):
            then = self.then.plan(sampler, rest)
        first = self.first.plan(sampler, None if max_nfe is None else max_nfe - (then.nfe if then else 0))
        if max_nfe is not None and then:
            then = self.then.plan(sampler, max_nfe - first.nfe)
        search = replace(self, first=first.search, then=then and then.search)
        if then is None:
            return first._replace(search=search)
        sums = (a + b for a, b in zip(first[1:6], then[1:6], strict=True))
        return Budgeted(search, *sums, exact=first.exact and then.exact)

    def view(self, sampler: Sampler) -> Sampler:
        """The sampler with the steps of ``first``, which the rows of ``then`` take too."""
        return view_of(self.first, sampler)

    def init(self, sampler: Sampler, request: Request) -> RefineState:
        if self.then is not None:
            self.then.init(self.view(sampler), request)  # refuses a sampler that cannot serve it before anything runs
        inner = self.first.init(sampler, request)
        return RefineState(request, open_prompts=inner.open_prompts, notes=inner.notes, inner=inner)

    def step(self, state: RefineState, sampler: Sampler, evaluate: Evaluate) -> RefineState:
        room = self._room_of_first(state, sampler)
        if not state.refining and may_step(self.first, state.inner, room):
            state = step_inner(state, self.first, sampler, evaluate, room)
            return replace(state, finished=state.inner.finished)
        view = self.view(sampler)
        if not state.refining:
            inner = self.then.resume(view, state.inner)
            notes = state.notes + inner.notes[len(state.inner.notes) :]
            cut = state.cut or not self.first.done(state.inner)
            state = replace(state, inner=inner, notes=notes, refining=True, cut=cut)
        state = step_inner(state, self.then, view, evaluate, state.room)
        return replace(state, finished=state.inner.finished)

    def done(self, state: RefineState) -> bool:
        if not state.open_prompts:
            return True
        if state.refining:
            return self.then.done(state.inner)
        return self.then is None and self.first.done(state.inner)

    def _room_of_first(self, state: RefineState, sampler: Sampler) -> float | None:
        if state.room is None or self.then is None:
            return state.room
        ahead = self.then.plan(sampler).nfe / sampler.nfe(0, sampler.num_stages)
        rows = state.inner.finished
        spent = 0 if rows is None else max(map(rows.prompt.tolist().count, state.open_prompts))
        least = min(state.room, 1.0) if rows is None else 0.0  # the first candidate has to be finished
        return max(state.room - ahead, self.share * (state.room + spent) - spent, least)
