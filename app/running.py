"""One run: the plain sample, then the search's rounds as they come from the driver, then the judges; all as frames."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from visearch.app.board import Board, media_of
from visearch.app.frames import Cost, Frame, Settings, Share
from visearch.budget import Budget, Ledger
from visearch.monitor import Baseline, Report, judged
from visearch.options import one_line
from visearch.protocols import Evaluate, Population, Reward, Sampler, Search, SearchState
from visearch.run import Round, SearchResult, run_search
from visearch.search.best_of_n import BestOfN
from visearch.statistics import best_of_curve
from visearch.wrap import Job

__all__ = ["Run"]

log = logging.getLogger(__name__)

PHASES = {"done": "done", "closed": "done", "budget": "budget", "deadline": "budget", "cancelled": "cancelled"}


@dataclass(frozen=True)
class Once(BestOfN):
    """Candidate 0 alone, as the plain pipeline draws it, seen once on its way."""

    n: int = 1

    def step(self, state: SearchState, sampler: Sampler, evaluate: Evaluate) -> SearchState:
        rows, stage = state.live, sampler.num_stages
        if rows is None:
            rows, stage = sampler.init(state.request, state.request.seeds(0, 1, state.open_prompts)), max(1, stage // 3)
        rows, state = evaluate(sampler.advance(rows, stage)), replace(state, round=state.round + 1)
        if stage < sampler.num_stages:
            return replace(state, live=rows)
        return replace(state, live=None, finished=rows)


@dataclass
class Run:
    """One search of one prompt.

    Args:
        settings: as the page asked.
        job: prompt, seed and search for the pipeline.
        reward: guides.
        judges: score baseline and winners after the end.
        budget: limits.
        cost: as planned.
        notes: what to warn of whatever happens.
        bar: is drawn after the search for comparison, if given, beside its budget.

    Attributes:
        ledger: what the search spent.
    """

    settings: Settings
    job: Job
    reward: Reward
    judges: Sequence[Reward]
    budget: Budget
    cost: Cost
    notes: tuple[str, ...] = ()
    bar: Search | None = None
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self._board = Board(self.settings.prompt)
        self._leaders: dict[float, str] = {}  # images spent -> who was the best finished one then

    def frames(self, cancelled: Callable[[], bool]) -> Iterator[Frame]:
        """A preview of the baseline, the baseline, a frame a round, one with the judges' scores, those of best-of-n.

        Raises:
            Exception: whatever ended the baseline or the judging; failures of the search are told in the last frame.
        """
        for step in run_search(self.job.sampler, self.reward, Once(), self.job.request, previews=True):
            once = step.result
            if once.finished is None and once.error is None:
                yield self._glimpse(step)
        if once.error is not None:
            raise once.error
        frame = self._baseline(once)
        yield frame
        rounds = run_search(
            self.job.sampler,
            self.reward,
            self.job.search,
            self.job.request,
            self.budget,
            cancelled=cancelled,
            ledger=self.ledger,
            previews=True,
        )
        with closing(rounds):
            for step in rounds:
                self._board.update(step)
                frame = self._after(frame, step)
                yield frame
        frame = self._ended(frame, step.result)
        if self.judges and step.result.finished is not None:
            frame = self._judged(frame, step.result, once)
        yield frame
        if self.bar is not None and frame.phase in ("done", "budget"):
            yield from self._compared(frame, once, cancelled)

    def _glimpse(self, step: Round) -> Frame:
        """Candidate 0 on its way."""
        preview = media_of(step.previews[0, "0"], f"{self.settings.prompt}: a preview of one sample")
        return Frame(self.settings, "baseline", cost=self.cost, baseline=preview, warnings=self.notes)

    def _baseline(self, once: SearchResult) -> Frame:
        settings = self.settings
        return Frame(
            settings,
            "searching",
            stages=self.job.sampler.num_stages,
            cost=self.cost,
            baseline=media_of(once.samples[0, "0"], f"{settings.prompt}: one sample of seed {settings.seed}"),
            baseline_score=float(once.finished.score[0]),
            beside=(Share("baseline", 1, once.ledger.seconds["total"], once.ledger.images),),
            warnings=self.notes,
        )

    def _after(self, frame: Frame, step: Round) -> Frame:
        rows, images, seconds = step.result.finished, self.ledger.images, self.ledger.seconds["total"]
        curve, best = frame.curve, self._board.best
        if rows is not None and len(rows) > sum(c.rank is not None for c in frame.candidates):
            curve = (*curve, (images, step.best[0]))
            self._leaders[images] = best
        return replace(
            frame,
            index=step.index,
            winner=best,
            candidates=self._board.candidates,
            images=images,
            seconds=seconds,
            eta=max(0.0, self.cost.images - images) * seconds / images if images else None,
            ledger=_shares(self.ledger),
            curve=curve,
            best_of_n=_best_of_n(_plain(step.result)),
        )

    def _ended(self, frame: Frame, result: SearchResult) -> Frame:
        """How it ended, and the winner as the pipeline decodes it alone: batches may round otherwise."""
        error = None if result.error is None else one_line(result.error)
        if result.error is not None:
            log.error("a search failed", exc_info=result.error)
        if result.finished is not None:
            with torch.no_grad():
                self._board.show(frame.winner, self.job.sampler.decode(result.winners())[0])
        return replace(
            frame,
            phase=PHASES.get(result.stopped, "failed"),
            error=error,
            eta=None,
            candidates=self._board.candidates,
            ledger=_shares(self.ledger),
            warnings=(*frame.warnings, *result.warnings),
        )

    def _judged(self, frame: Frame, result: SearchResult, once: SearchResult) -> Frame:
        """What the judges say of baseline and winner, and of whoever led before."""
        place = {id: row for row, id in enumerate(result.finished.id)}
        led = list(dict.fromkeys((frame.winner, *self._leaders.values())))
        rows = result.finished.select([place[id] for id in led])
        report, scores = self._verdicts(result, once, rows)
        return replace(
            frame,
            held_out={view.name: (view.base[0], view.picked[0]) for view in report.judges},
            held_out_curve={
                name: tuple((images, given[led.index(id)]) for images, id in self._leaders.items())
                for name, given in scores.items()
            },
            warnings=(*report.warnings, *frame.warnings),
            beside=(*frame.beside, Share("judges", report.ledger.rewards.total(), report.ledger.seconds["reward"])),
        )

    def _compared(self, frame: Frame, once: SearchResult, cancelled: Callable[[], bool]) -> Iterator[Frame]:
        """Best-of-n of the same prompt, seed and budget: what a search has to beat; then what the judges say of it."""
        job, spent = self.job, Ledger()
        options = {"cancelled": cancelled, "ledger": spent}
        with closing(run_search(job.sampler, self.reward, self.bar, job.request, self.budget, **options)) as rounds:
            for step in rounds:
                result, rows = step.result, _plain(step.result)
                yield replace(frame, comparing=True, best_of_n=_best_of_n(rows) or frame.best_of_n)
        drawn = Share("best-of-n", spent.decodes, spent.seconds["total"], spent.images)
        frame = replace(frame, best_of_n=_best_of_n(rows) or frame.best_of_n, beside=(*frame.beside, drawn))
        if result.error is not None:
            log.error("best-of-n failed", exc_info=result.error)
            told = f"best-of-n was not drawn to its end: {one_line(result.error)}"
            frame = replace(frame, warnings=(*frame.warnings, told))
        yield self._judged_bar(frame, result, once, rows) if self.judges and frame.held_out and rows else frame

    def _judged_bar(self, frame: Frame, result: SearchResult, once: SearchResult, rows: Population) -> Frame:
        report, scores = self._verdicts(result, once, rows)
        judges = Share("judges of best-of-n", report.ledger.rewards.total(), report.ledger.seconds["reward"])
        curves = {name: _best_of_n(rows, given) for name, given in scores.items()}
        return replace(frame, held_out_best_of_n=curves, beside=(*frame.beside, judges))

    def _verdicts(
        self, result: SearchResult, once: SearchResult, rows: Population
    ) -> tuple[Report, dict[str, list[float]]]:
        """The judges' report of the single sample and the first of the rows, and what each says of all rows."""
        first = {0: Baseline("plain", once.finished, once.samples[0, "0"], float(rows.score[0]))}
        return judged(self.reward, self.judges, result, first, Ledger(), rows)


def _plain(result: SearchResult) -> Population | None:
    """Finished candidates that were drawn for no reason but their number, where nothing was selected."""
    rows = result.finished
    if rows is None or result.pruned:
        return None
    pairs = enumerate(zip(rows.lineage, rows.score.tolist(), strict=True))
    return rows.select([row for row, (events, score) in pairs if len(events) == 1 and math.isfinite(score)])


def _best_of_n(rows: Population | None, values: Sequence[float] | None = None) -> tuple[tuple[int, float], ...]:
    """(n, expected score, or value, of the best of n by score)."""
    if rows is None or len(rows) < 2:
        return ()
    return tuple(enumerate(best_of_curve(rows.score.tolist(), values).tolist(), 1))


def _shares(ledger: Ledger) -> tuple[Share, ...]:
    """The ledger, line by line; their seconds add up to the search's."""
    seconds, previews = ledger.seconds, ledger.previews.total()
    beside = ("encode", "decode", "preview", "reward", "probe", "total")
    lines = [
        Share("model", ledger.forwards, sum(s for kind, s in seconds.items() if kind not in beside), ledger.images),
        Share("text encoder", ledger.encodes, seconds["encode"]),
        Share("decoder", ledger.decodes, seconds["decode"]),
        Share("preview decoder", previews, seconds["preview"]),
        Share("reward", ledger.rewards.total(), seconds["reward"]),
    ]
    rest = seconds["total"] - sum(line.seconds for line in lines)
    return (*(line for line in lines if line.calls), Share("all else", 0, max(0.0, rest)))
