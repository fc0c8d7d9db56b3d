"""What the searches share: checks of their fields, whole candidates, where they stop, rows that join others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from visearch.protocols import Budgeted, Ode, Population, Sampler, Search, SearchState, Transition

ROUNDING = 1e-9  # 0.55 * 20 is 11.000000000000002
WHOLE = 1e-6  # of a candidate: shares of the driver's room that add up to one may miss it by so much


# --- fields -----------------------------------------------------------------------------------------------------


def check_whole(search: Any, **least: int) -> None:
    """Raise a ValueError unless the named fields are whole numbers, each of at least so much."""
    for name, low in least.items():
        value = getattr(search, name)
        if not (isinstance(value, int) and value >= low):
            raise ValueError(f"{name}={value!r} must be a whole number of at least {low}")


def as_tuple(value: Any) -> tuple:
    """A sequence as a tuple, anything else as a tuple of it alone."""
    return tuple(value) if isinstance(value, Sequence) else (value,)


def shares(name: str, value: Any) -> tuple[float | int, ...]:
    """Shares of a whole and whole numbers, as a tuple.

    Raises:
        ValueError: one is neither a float in (0, 1) nor an int of at least 1.
    """
    given = as_tuple(value)
    if not all(v >= 1 if type(v) is int else type(v) is float and 0 < v < 1 for v in given):
        raise ValueError(f"{name}={given!r}: give shares as floats in (0, 1), or ints of at least 1")
    return given


# --- plans ------------------------------------------------------------------------------------------------------


def affordable(sampler: Sampler, n: int | None, max_nfe: int | None) -> int:
    """Whole candidates of a prompt: n, or as many as ``max_nfe`` model rows pay for; one of them may be ``None``.

    Raises:
        ValueError: not even one fits.
    """
    one = sampler.nfe(0, sampler.num_stages)
    if max_nfe is not None and max_nfe < one:
        raise ValueError(f"max_nfe={max_nfe} a prompt is too small: one candidate costs {one} model rows")
    return min(k for k in (n, None if max_nfe is None else max_nfe // one) if k is not None)


def whole_candidates(search: Search, sampler: Sampler, n: int) -> Budgeted:
    """The plan of a search that runs n candidates of each prompt to the end and scores each once."""
    nfe, images = n * sampler.nfe(0, sampler.num_stages), n * sampler.cost(0, sampler.num_stages)
    return Budgeted(search, nfe, images, decodes=n, rewards=n, finals=n)


def check_stages(sampler: Sampler, calls: Sequence[float | int], name: str = "calls") -> list[int]:
    """Milestones of checks: floats are shares of T, rounded up, ints are stages; then up to the next milestone.

    Raises:
        ValueError: ``calls`` do not ascend; the message calls them ``name``.
    """
    wanted = [c if isinstance(c, int) else math.ceil(c * sampler.num_stages - ROUNDING) for c in calls]
    if wanted != sorted(wanted):
        raise ValueError(f"{name}={calls} are stages {wanted} of {sampler.num_stages}; give them in ascending order")
    return [next_milestone(sampler, w) for w in wanted]


def next_milestone(sampler: Sampler, stage: int) -> int:
    """The first stage from this one on at which a search may stop; T beyond it."""
    return next((m for m in sampler.milestones if m >= stage), sampler.num_stages)


def with_steps(sampler: Sampler, transition: Transition) -> Sampler:
    """The sampler with the steps that all rows of a search take.

    Raises:
        ValueError: it has no such steps.
    """
    return sampler if isinstance(transition, Ode) else sampler.view(transition=transition)


# --- rounds -----------------------------------------------------------------------------------------------------


def candidates_left(state: SearchState, n: int) -> int:
    """Whole candidates of a prompt that the driver still pays for, at most n."""
    return n if state.room is None else min(n, int(state.room + WHOLE))


def rows_left(state: SearchState, sampler: Sampler) -> float:
    """Model rows of a prompt that the driver still pays for."""
    return math.inf if state.room is None else state.room * sampler.nfe(0, sampler.num_stages) + ROUNDING


def unchecked(rows: Population | None) -> bool:
    """Whether no preview was scored so far, so that more candidates may join."""
    return rows is None or bool(rows.score.isnan().all())


def joined(state: SearchState, sampler: Sampler, have: int, k: int, stage: int) -> Population:
    """The live rows, and beside them candidates have..k-1 of each open prompt, run to the stage where those wait."""
    new = sampler.init(state.request, state.request.seeds(have, k, state.open_prompts))
    new = sampler.advance(new, stage)
    return new if state.live is None else sampler.concat([state.live, new])


def finished(state: SearchState, sampler: Sampler, rows: Population) -> Population:
    """All finished rows, these the last."""
    return rows if state.finished is None else sampler.concat([state.finished, rows])
