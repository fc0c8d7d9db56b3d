"""What a calibration found, and its tables: :func:`visearch.calibrate.calibrate` makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from visearch.report import markdown_table
from visearch.statistics import Interval

__all__ = ["SATURATED", "TIE", "Calibration", "Conformal", "Doubling", "Entry"]

TIE = 0.1  # differences of multipliers below this are ties
SATURATED = {"reward": 0.1, "judge": 0.01}  # gains of a doubling: within-prompt deviations; absolute


@dataclass(frozen=True)
class Entry:
    """A search on prompts that it was not tuned on, beside best-of-n at equal honest cost.

    Attributes:
        budget: N, whole candidates a prompt that it was made for.
        name: what the table calls it.
        search: what ``--search`` takes.
        nfe, scores: model rows, and decodes and scores, a prompt.
        spent: the same as whole candidates of best-of-n, fractions counted; of schedules the budget, N.
        values: measure -> mean of what it picks.
        over: measure -> difference to best-of-``spent`` (best-of-N for schedules), paired by prompt.
        multiplier: n at which best-of-n has the same mean reward, over what is spent; at most S over that.
    """

    budget: int
    name: str
    search: str
    nfe: float
    scores: float
    spent: float
    values: dict[str, float]
    over: dict[str, Interval]
    multiplier: Interval

    @property
    def saving(self) -> Interval:
        """Share of the candidates that it spares at equal mean reward."""
        worth = self.multiplier
        return Interval(*(1 - 1 / v for v in (worth.mean, worth.low, worth.high)), worth.clusters)


@dataclass(frozen=True)
class Doubling:
    """What the even prompts say that doubling n gains, and what it gained on the odd ones."""

    measure: str
    search: str
    n: int
    predicted: float
    observed: Interval


@dataclass(frozen=True)
class Conformal:
    """Margins, or numbers to keep, that drop the eventual best of n with probability at most ``risk``.

    The promise is of a new prompt and a random calibration: those of few prompts scatter around it.

    Attributes:
        observed: how often it was dropped on the odd prompts.
        coverage: how often it was dropped over random splits of all prompts that did not choose the checks: calibrated
            on one part, seen on the other.
        entry: what it costs and finds.
    """

    risk: float
    observed: Interval
    coverage: Interval
    entry: Entry


@dataclass(frozen=True)
class Calibration:
    """All that ``visearch calibrate`` found; means and intervals are of the odd prompts."""

    pool: dict[str, Any]
    measures: tuple[str, ...]
    entries: tuple[Entry, ...]
    adopted: dict[int, bool]
    doublings: tuple[Doubling, ...]
    saturation: dict[str, int | None]
    conformal: tuple[Conformal, ...] = ()
    economies: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def chosen(self, budget: int) -> Entry:
        """The tuned schedule where it is worth adopting, else ``auto``, or best-of-n where the pool is too small."""
        own = {e.name: e for e in self.entries if e.budget == budget}
        return own["tuned"] if self.adopted[budget] else own.get("auto", own["best-of-n"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: everything, and under ``"schedules"`` what to run at each budget."""
        schedules = {
            str(n): {"search": self.chosen(n).search, "nfe": self.chosen(n).nfe, "tuned": tuned}
            for n, tuned in self.adopted.items()
        }
        return {"schedules": schedules, **asdict(self)}

    @property
    def calibration_error(self) -> dict[str, float]:
        """Measure -> mean absolute difference of predicted and observed gains of best-of-n's doublings."""
        own = {m: [d for d in self.doublings if d.measure == m and d.search == "best-of-n"] for m in self.measures}
        return {m: float(np.mean([abs(d.predicted - d.observed.mean) for d in found])) for m, found in own.items()}

    def markdown(self) -> str:
        """The tables: schedules, doublings, margins, stop rules, and what was left out."""
        pool = self.pool
        parts = [
            f"{pool['prompts']} prompts x {pool['seeds']} seeds: tuned on the even, reported on the odd prompts. A "
            f"decode and score costs {pool['price']:.2f} model rows, one candidate {pool['rows'][-1]}.",
            _schedules(self),
            _doublings(self),
            *([_conformal(self)] if self.conformal else []),
            _economies(self),
            *(["\n".join(self.notes)] if self.notes else []),
        ]
        return "\n\n".join(parts)


# --- its tables -----------------------------------------------------------------------------------------------


def _schedules(of: Calibration) -> str:
    heads = ("N", "name", "search", "rows", "scores", of.measures[0], "over best-of-N (95 %)", "worth N x (95 %)")
    lines = [
        (e.budget, e.name, f"`{e.search}`", f"{e.nfe:.0f}", f"{e.scores:.1f}", *_gains(e, of.measures))
        for e in of.entries
    ]
    text = ["## Schedules at the honest cost of best-of-N\n", markdown_table([*heads, *_judges(of)], lines), ""]
    for n, tuned in of.adopted.items():
        chosen = of.chosen(n)
        why = "" if tuned else f": tuning is not worth {TIE} more"
        text.append(f'N = {n}: `--search "{chosen.search}"` ({chosen.name}{why})')
    return "\n".join(text)


def _doublings(of: Calibration) -> str:
    heads = ("search", "n to 2n", "measure", "predicted", "observed (95 %)")
    lines = [
        (d.search, f"{d.n} to {2 * d.n}", d.measure, f"{d.predicted:+.3f}", f"{d.observed:+.3f}") for d in of.doublings
    ]
    text = ["## What doubling n gains\n", markdown_table(heads, lines), ""]
    for name, error in of.calibration_error.items():
        n, guides = of.saturation[name], name == of.measures[0]
        least = f"{SATURATED['reward']} of a prompt's deviation" if guides else f"{SATURATED['judge']}"
        where = f"from n = {n} on" if n else f"nowhere up to n = {of.pool['seeds']}"
        text.append(f"{name}: doubling gains less than {least} {where}; predictions were off by {error:.3f} on average")
    return "\n".join(text)


def _conformal(of: Calibration) -> str:
    heads = ("n", "search", "dropped on odd prompts (95 %)", "dropped, random splits (95 %)", "costs best-of-",
             of.measures[0], "over it (95 %)", "worth x (95 %)")  # fmt: skip
    lines = []
    for found in of.conformal:
        e, dropped = found.entry, (f"{found.observed:.3f}", f"{found.coverage:.3f}")
        lines.append((e.budget, f"`{e.search}`", *dropped, f"{e.spent:.2f}", *_gains(e, of.measures)))
    title = f"## Dropping the eventual best with probability at most {of.conformal[0].risk}"
    return f"{title}\n\n{markdown_table([*heads, *_judges(of)], lines)}"


def _economies(of: Calibration) -> str:
    heads = ("name", "search", "candidates", of.measures[0], "over it (95 %)", "saving at equal reward (95 %)")
    lines = []
    for e in of.economies:
        value, over, _, *judged = _gains(e, of.measures)
        lines.append((e.name, e.search, f"{e.spent:.2f}", value, over, f"{e.saving:+.2f}", *judged))
    title = "## Stop rules and shared budgets, beside best-of-n of the same mean number"
    return f"{title}\n\n{markdown_table([*heads, *_judges(of)], lines)}"


def _judges(of: Calibration) -> list[str]:
    """Heads of the judges' columns."""
    return [f"{judge} over it (95 %)" for judge in of.measures[1:]]


def _gains(entry: Entry, measures: Sequence[str]) -> list[str]:
    """The reward, its gain, what it is worth, and each judge's gain; best-of-n itself gains nothing."""
    reward, *judges = measures
    value = f"{entry.values[reward]:.3f}"
    if entry.name == "best-of-n":
        return [value, "", "1", *(f"{entry.values[judge]:.3f}" for judge in judges)]
    return [value, f"{entry.over[reward]:+.3f}", f"{entry.multiplier:.2f}", *(f"{entry.over[j]:+.3f}" for j in judges)]
