"""Whether a search made images better or only its reward higher: candidate 0 and the winners, before held-out judges.

A search finds what its reward likes. Judges of another family than the reward say whether that was worth it: rewards of
one family share their faults, and rise together. Where a judge is a checker, which says right or wrong, the oracle is
what it would have picked of the same finished candidates, and recovered (picked - base) / (oracle - base), as derived
from PSP's tables (arXiv 2607.21591).

Shapes: P = prompts for which something was finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from visearch.budget import Evaluator, Ledger, MeteredReward, MeteredSampler
from visearch.protocols import Ensemble, Population, Request, Reward, Sampler, Search
from visearch.report import markdown_table
from visearch.search.nesting import view_of
from visearch.statistics import Interval, paired_interval, ratio_interval

__all__ = [
    "Baseline",
    "Report",
    "View",
    "baselines",
    "check_absolute",
    "check_held_out",
    "exam",
    "families",
    "hacking",
    "judged",
    "signed",
]

Key = tuple[int, str]


# --- what may be held out -------------------------------------------------------------------------------------


def families(reward: Reward) -> frozenset[str]:
    """Of all rewards that a score is made of; those of unknown family are left out."""
    return frozenset(family for leaf in _parts(reward) if (family := getattr(leaf, "family", None)))


def _parts(reward: Reward) -> tuple[Reward, ...]:
    """The rewards that a score is made of: members of ensembles, past caches and means over frames."""
    for wrapped in ("uncached", "scored_by"):
        if hasattr(reward, wrapped):
            return _parts(getattr(reward, wrapped))
    return tuple(p for m in reward.members for p in _parts(m)) if isinstance(reward, Ensemble) else (reward,)


def check_held_out(guides: Sequence[Reward], judges: Sequence[Reward]) -> None:
    """Refuse judges that cannot tell whether guidance was worth it.

    Raises:
        ValueError: a judge that guides as well, is of a guide's family, or is relative; or one name twice.
    """
    names = [r.name for r in (*guides, *judges)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is given twice; a judge is held out only if it does not guide")
    seen = {part.name for guide in guides for part in _parts(guide)}
    for judge in judges:
        if guiding := sorted(part.name for part in _parts(judge) if part.name in seen):
            raise ValueError(f"held-out {judge.name}: {', '.join(guiding)} guides as well; hold out what does not")
        if getattr(judge, "relative", False):
            raise ValueError(f"held-out {judge.name} is relative: its scores cannot be compared; hold out its members")
        for guide in guides:
            if shared := families(guide) & families(judge):
                raise ValueError(
                    f"held-out {judge.name} is of the family of {guide.name} ({', '.join(sorted(shared))}): they share "
                    "their faults and rise together; hold out a judge of another family, see visearch rewards"
                )


def check_absolute(guides: Sequence[Reward]) -> None:
    """Refuse rewards whose scores say nothing of other searches and prompts.

    Raises:
        ValueError: one is relative.
    """
    for guide in guides:
        if getattr(guide, "relative", False):
            raise ValueError(
                f"{guide.name} is relative to the candidates of one search, so its scores cannot be compared; join its "
                "members by a weighted sum, or by a z-score with reference="
            )


def exam(guide: Reward, judge: Reward) -> tuple[str, ...]:
    """Benchmarks that the judge speaks for and the guide was made to pass: before those, nothing is held out."""
    known = set(getattr(guide, "not_held_out_for", ()))
    return tuple(name for name in getattr(judge, "not_held_out_for", ()) if name in known)


def hacking(
    guide: str, rises: Mapping[str, Interval], judge: str, falls: Mapping[str, Interval]
) -> tuple[str, bool] | None:
    """What to warn of where the reward rises and the judge falls, and whether it is sure.

    Sure where both intervals exclude 0 and are of several prompts; possible where the means alone say so.

    Args:
        rises, falls: reference -> difference to it, of the guide and of the judge.
    """
    pairs = [(reference, rise, falls[reference]) for reference, rise in rises.items() if reference in falls]
    sure = [p for p in pairs if p[1].low > 0 and p[2].high < 0 and p[1].clusters > 1]
    found = sure or [p for p in pairs if p[1].mean > 0 and p[2].mean < 0]
    if not found:
        return None
    what = "; ".join(f"{signed(rise)} and {signed(fall)} over {reference}" for reference, rise, fall in found)
    return f"{guide} rises while {judge} falls: {what}", bool(sure)


def signed(interval: Interval | None) -> str:
    """A difference with its interval; without one where a single prompt was measured."""
    if interval is None:
        return ""
    digits = 3 if max(abs(interval.low), abs(interval.high)) < 1 else 2
    return f"{interval:+z.{digits}f}" if interval.clusters > 1 else f"{interval.mean:+z.{digits}f}"


# --- the report -----------------------------------------------------------------------------------------------

ONCE = "candidate 0"


@dataclass(frozen=True)
class View:
    """What one reward says of candidate 0 and of the winner of each prompt, higher is better; -inf where it failed.

    Attributes:
        name: of the reward.
        role: ``"guides"``, ``"held out"``, or ``"not held-out for ..."``.
        base, picked: P scores each.
        oracle: P scores of what a checker would have picked of the finished candidates and candidate 0, or ``None``.
        note: what to know of it, such as its own error.
    """

    name: str
    role: str
    base: tuple[float, ...]
    picked: tuple[float, ...]
    oracle: tuple[float, ...] | None = None
    note: str = ""

    @cached_property
    def gain(self) -> Interval | None:
        """Of the winners over candidate 0, paired by prompt; ``None`` where the reward failed on every prompt."""
        base, picked = self._known(self.base, self.picked)
        return paired_interval(picked, base) if len(base) else None

    @cached_property
    def recovered(self) -> Interval | None:
        """Share of the oracle's gain that the winners have; ``None`` without an oracle, or where it gains nothing."""
        if self.oracle is None:
            return None
        base, picked, oracle = self._known(self.base, self.picked, self.oracle)
        return ratio_interval(picked - base, oracle - base) if (oracle - base).sum() > 0 else None

    def _known(self, *columns: Sequence[float]) -> np.ndarray:
        """Prompts on which nothing failed."""
        table = np.array(columns, dtype=float)
        return table[:, np.isfinite(table).all(0)]


@dataclass(frozen=True)
class Report:
    """The reward that guided and the judges that it did not see, side by side; ``print`` it.

    Attributes:
        guided: the reward.
        judges: the others.
        ledger: what it took to draw candidate 0 where the search had not finished it, and to judge.
    """

    guided: View
    judges: tuple[View, ...]
    ledger: Ledger

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Where the reward rises and a judge falls, against candidate 0."""
        if self.guided.gain is None:
            return ()
        rises = {ONCE: self.guided.gain}
        told = [hacking(self.guided.name, rises, j.name, {ONCE: j.gain}) for j in self.judges if j.gain is not None]
        return tuple(f"{'' if sure else 'possible '}reward hacking: {text}" for text, sure in filter(None, told))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [
            {**asdict(v), "gain": v.gain and v.gain.to_dict(), "recovered": v.recovered and v.recovered.to_dict()}
            for v in (self.guided, *self.judges)
        ]
        return {"rewards": rows, "warnings": list(self.warnings), "ledger": self.ledger.as_dict()}

    def __str__(self) -> str:
        heads = ("reward", "role", ONCE, "searched", "gain", "oracle", "recovered", "note")
        lines = [
            (v.name, v.role, _mean(v.base), _mean(v.picked), signed(v.gain), _mean(v.oracle),
             "" if v.recovered is None else f"{v.recovered.mean:.0%}", v.note)
            for v in (self.guided, *self.judges)
        ]  # fmt: skip
        return markdown_table(heads, lines)


def _mean(scores: Sequence[float] | None) -> str:
    if scores is None:
        return ""
    known = [s for s in scores if math.isfinite(s)]
    return f"{sum(known) / len(known):.4g}" if known else "failed"


# --- candidate 0 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """Candidate 0 of a prompt, as a plain call gives it.

    Attributes:
        id: ``"0"`` where it is a candidate that the search finished, else ``"plain"``.
        row: B = 1, finished and scored.
        sample: decoded.
        best: score of the prompt's winner; a relative reward gives it anew where candidate 0 joins the others.
    """

    id: str
    row: Population
    sample: Any
    best: float


def baselines(
    sampler: Sampler, search: Search, reward: Reward, result: Any, winners: Population | None = None, **sizes: Any
) -> tuple[dict[int, Baseline], Ledger]:
    """Prompt -> its candidate 0: one that the search finished, or drawn and scored now, which the ledger tells.

    Args:
        sampler: of the search; its meter is as before afterwards.
        search: as it ran, cut to the budget; where it takes other steps than the sampler's own, none of its rows is a
            plain sample.
        reward: that guided.
        result: a :class:`visearch.run.SearchResult`.
        winners: a row or several of each prompt, the best first; default the best one.
        sizes: ``rows``, ``decode_rows`` and ``batch_buckets`` of the search, as in :func:`visearch.run.run_search`.
    """
    finished, winners = result.finished, result.winners() if winners is None else winners
    place, best = {key: row for row, key in enumerate(_keys(finished))}, _first(winners)
    plain = view_of(search, sampler) is sampler
    missing = [p for p in best if not plain or (p, "0") not in place]
    drawn, ledger = _drawn(sampler, reward, result.request, missing, sizes)
    found = {}
    for prompt, winner in best.items():
        score = float(winners.score[winner])
        if prompt in drawn:
            row, sample = drawn[prompt]
            if getattr(reward, "relative", False):
                row, score = _together(reward, finished, row, place[prompt, winners.id[winner]])
        else:
            row, sample = finished.select([place[prompt, "0"]]), result.samples[prompt, "0"]
        found[prompt] = Baseline("plain" if prompt in drawn else "0", row, sample, score)
    return found, ledger


def _first(rows: Population) -> dict[int, int]:
    """Prompt -> its first row."""
    return dict(sorted({p: row for row, p in reversed(list(enumerate(rows.prompt.tolist())))}.items()))


def _drawn(
    sampler: Sampler, reward: Reward, request: Request, prompts: Sequence[int], sizes: Mapping[str, Any]
) -> tuple[dict[int, tuple[Population, Any]], Ledger]:
    """Prompt -> candidate 0 and its sample."""
    meter, ledger = sampler.meter, Ledger()
    metered = MeteredSampler(sampler, ledger, **sizes)
    evaluate = Evaluator(metered, MeteredReward(reward, ledger), request)
    found = {}
    try:
        with torch.no_grad():
            if prompts:
                rows = metered.init(request, request.seeds(0, 1, prompts))
                rows = evaluate(metered.advance(rows, metered.num_stages))
                found = {p: (rows.select([r]), evaluate.samples[p, "0"]) for r, p in enumerate(rows.prompt.tolist())}
    finally:
        sampler.meter = meter
    return found, ledger


def _together(reward: Any, finished: Population, row: Population, winner: int) -> tuple[Population, float]:
    """Candidate 0, and the score of the winner, among all finished candidates of the prompt and candidate 0."""
    mine = (finished.prompt == int(row.prompt[0])).nonzero().flatten().tolist()
    table = {name: torch.cat([values[mine], row.components[name]]) for name, values in finished.components.items()}
    scores = reward.combine(table, [0] * (len(mine) + 1))
    return row.rescored(scores[-1:]), float(scores[mine.index(winner)])


# --- judges ---------------------------------------------------------------------------------------------------


def judged(
    reward: Reward,
    judges: Sequence[Reward],
    result: Any,
    first: Mapping[int, Baseline],
    ledger: Ledger,
    winners: Population | None = None,
) -> tuple[Report, dict[str, list[float]]]:
    """The report of a search, and judge -> its scores of all winners.

    Judges with an attribute ``checker = True``, whose verdicts are right or wrong, see all finished candidates: what
    they would have picked is the oracle.

    Args:
        reward, result, winners: as for :func:`baselines`.
        judges: see :func:`check_held_out`.
        first, ledger: what that gave; the ledger also counts the judges.

    Raises:
        RewardError: a judge broke its contract.
    """
    winners = result.winners() if winners is None else winners
    base, picked = (tuple(of) for of in zip(*((float(b.row.score[0]), b.best) for b in first.values()), strict=True))
    views, scores = [View(reward.name, "guides", base, picked)], {}
    for judge in judges:
        given = _scores(judge, result, first, winners, ledger)
        views.append(_view(reward, judge, given, first, winners))
        scores[judge.name] = [given[key] for key in _keys(winners)]
    return Report(views[0], tuple(views[1:]), ledger), scores


def _scores(
    judge: Reward, result: Any, first: Mapping[int, Baseline], winners: Population, ledger: Ledger
) -> dict[Key, float]:
    """What a judge says of candidate 0, of the winners and, if it is a checker, of all that was finished."""
    samples = {(p, baseline.id): baseline.sample for p, baseline in first.items()}
    wanted = _keys(winners) + (_keys(result.finished) if _checks(judge) else [])
    samples |= {key: result.samples[key] for key in wanted}
    texts, lines = ([of[p] for p, _ in samples] for of in (result.request.reward_prompts, result.request.metadata))
    shown = list(samples.values())
    shown = torch.stack(shown) if all(map(torch.is_tensor, shown)) else shown
    return dict(zip(samples, MeteredReward(judge, ledger)(shown, texts, math.inf, lines).tolist(), strict=True))


def _checks(judge: Reward) -> bool:
    return getattr(judge, "checker", False)


def _view(
    reward: Reward, judge: Reward, given: Mapping[Key, float], first: Mapping[int, Baseline], winners: Population
) -> View:
    shared, oracle = exam(reward, judge), None
    if _checks(judge):
        oracle = tuple(max(score for (q, _), score in given.items() if q == p) for p in first)
    return View(
        judge.name,
        f"not held-out for {', '.join(shared)}" if shared else "held out",
        tuple(given[p, baseline.id] for p, baseline in first.items()),
        tuple(given[p, winners.id[row]] for p, row in _first(winners).items()),
        oracle,
        getattr(judge, "note", ""),
    )


def _keys(rows: Population) -> list[Key]:
    return list(zip(rows.prompt.tolist(), rows.id, strict=True))
