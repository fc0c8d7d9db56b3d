"""Searches made of searches: how an outer search drives an inner one.

An outer search holds the inner one as a field and its state in :class:`NestedState`. Each of its steps calls
:func:`step_inner` with the sampler, or a view of it, that the inner search shall see, and decides what becomes of the
inner ``finished`` rows. Two ways are written: cheap drafts of whatever search, the best run again in full (2607.23159),
``CachedDrafts(search=SuccessiveHalving(n=16))``; and a global search whose winners a local one moves on from
(2501.09732), ``Refine(first=SuccessiveHalving(n=16), then=ZeroOrder(n=8))``. They nest in each other to any depth, and
checkpoints hold the whole tree of states.

A search that can follow another is :class:`Local`: it has one more method, ``resume(sampler, found)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

from visearch.protocols import Evaluate, Event, Population, Request, Sampler, Search, SearchState, Seed
from visearch.search._common import WHOLE

__all__ = [
    "Local",
    "NestedState",
    "at_noise",
    "begun_again",
    "is_search",
    "may_step",
    "next_candidates",
    "refinable",
    "repeat",
    "step_inner",
    "view_of",
]


@dataclass(frozen=True)
class NestedState(SearchState):
    """State of a search that drives another.

    Args:
        inner: state of the search that is driven.
    """

    inner: SearchState | None = None


S = TypeVar("S", bound=NestedState)


@runtime_checkable
class Local(Search, Protocol):
    """A search that can go on from what another one found."""

    def resume(self, sampler: Sampler, found: SearchState) -> SearchState:
        """Begin at the winners of ``found``, whose ``finished`` stay finished; its plan holds for what is yet to run.

        Candidates that ``found`` has drawn, finished or pruned, are not drawn again.
        """


def is_search(value: object) -> bool:
    """Whether something given as an inner search is one, and no class or name."""
    methods = ("plan", "init", "step", "done")
    return not isinstance(value, type) and all(callable(getattr(value, m, None)) for m in methods)


def view_of(search: Search, sampler: Sampler) -> Sampler:
    """The sampler with the steps that the finished rows of a search took.

    Raises:
        ValueError: it has no such steps.
    """
    return search.view(sampler) if hasattr(search, "view") else sampler


def may_step(search: Search, inner: SearchState, room: float | None) -> bool:
    """Whether the inner search has a round left that ``room`` (candidates a prompt; ``None``: no limit) pays for.

    Rows under way with nothing finished may always go on: their search then finishes the best of them.
    """
    unfinished = inner.live is not None and inner.finished is None
    return not search.done(inner) and (room is None or room >= 1 - WHOLE or unfinished)


def step_inner(state: S, search: Search, sampler: Sampler, evaluate: Evaluate, room: float | None) -> S:
    """One round of the inner search, on behalf of the outer one.

    The inner search hears what the driver said (price, open prompts) and ``room``, its own share of what is left. Its
    live rows, new notes, newly pruned rows and cuts become the outer state's; ``finished`` is left to the caller.
    """
    before = replace(state.inner, room=room, price=state.price, open_prompts=state.open_prompts)
    after = search.step(before, sampler, evaluate)
    return replace(
        state,
        inner=replace(after, room=None),
        live=after.live,
        round=state.round + 1,
        cut=state.cut or after.cut,
        pruned=state.pruned + after.pruned[len(before.pruned) :],
        notes=state.notes + after.notes[len(before.notes) :],
    )


def refinable(rows: Population, row: int) -> bool:
    """Whether a row differs from a plain candidate by its initial noise alone, so that it can begin again."""
    return all(e.stage == 0 and e.op in ("noise", "perturb") for e in rows.lineage[row][1:])


def at_noise(sampler: Sampler, request: Request, rows: Population, row: int, copies: int) -> Population:
    """``copies`` of a refinable row at stage 0, as it began: all with its noise and its one random stream."""
    first, *later = rows.lineage[row]
    made = sampler.init(request, [Seed(int(rows.prompt[row]), int(first.value), first.seed)] * copies)
    for event in later:
        seeds = [event.seed] * copies
        if event.op == "noise":
            made = sampler.set_noise(made, rows.noise[row].expand(copies, *rows.noise[row].shape), seeds)
        else:
            made = sampler.perturb(made, event.value, seeds)
    return made


def begun_again(
    state: SearchState, sampler: Sampler, rows: Population, row: int, count: int, name: str
) -> tuple[Population, list[int]]:
    """``count`` copies of a refinable row as it began, and a seed for what the search ``name`` draws for each.

    Seeds are new whenever rows of that prompt were finished since.
    """
    prompt = int(rows.prompt[row])
    before = 0 if state.finished is None else state.finished.prompt.tolist().count(prompt)
    seeds = [state.request.derive(prompt, name, before, i) for i in range(count)]
    return at_noise(sampler, state.request, rows, row, count), seeds


def next_candidates(found: SearchState) -> dict[int, int]:
    """Prompt -> the first candidate after all that ``found`` finished or dropped."""
    rows = found.finished
    seen = list(zip(rows.prompt.tolist(), rows.candidate, strict=True))
    seen += [(c["prompt"], c["candidate"]) for c in found.pruned]
    return {p: max((k + 1 for q, k in seen if p == q), default=0) for p in range(len(found.request.prompts))}


def repeat(sampler: Sampler, row: Population, event: Event) -> Population:
    """One fork, re-noising or perturbation of a row's lineage, on that row alone where it stood then."""
    if event.op == "fork":
        copy = int(event.value)
        return row.select([0] * (copy + 1)).select([copy])
    if event.op == "renoise":
        return sampler.renoise(row, int(event.value), [event.seed])
    return sampler.perturb(row, event.value, [event.seed])
