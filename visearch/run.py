"""The only loop: drives a search within a budget, round by round, and never loses what is finished."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from visearch.budget import ROUNDING, Budget, BudgetSpent, Evaluator, Ledger, MeteredReward, MeteredSampler
from visearch.checkpoint import fingerprint, load_state, save_state
from visearch.memory import plan
from visearch.protocols import Batch, Event, Population, Request, Reward, Sampler, Search, SearchState, Seed
from visearch.selection import best_per_prompt, rank, top_k

__all__ = ["Regenerated", "Round", "SearchResult", "regenerate", "run_search"]

SAFETY = 1.2  # a candidate is begun only if 1.2 x the mean time of one still fits before the deadline


@dataclass(frozen=True)
class SearchResult:
    """What a search found, however it ended.

    Attributes:
        request: what was asked for.
        finished: all scored rows at the last stage, or ``None`` if not even one finished.
        ledger: what was spent.
        stopped: ``"done"``, ``"budget"``, ``"deadline"``, ``"closed"`` (target or patience), ``"cancelled"``,
            ``"interrupted"`` or ``"failed"``.
        error: the exception behind ``"failed"`` or ``"interrupted"``.
        samples: (prompt, id) -> decoded sample of each finished row.
        pruned: candidates that the search dropped before the end, as in :class:`visearch.protocols.SearchState`.
        warnings: what went wrong without ending the run.
        held_out: reward -> its scores of the winners, for rewards that the search never saw.
    """

    request: Request
    finished: Population | None
    ledger: Ledger
    stopped: str
    error: BaseException | None = None
    samples: dict[tuple[int, str], Any] = field(default_factory=dict)
    pruned: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    held_out: dict[str, list[float]] = field(default_factory=dict)

    def winners(self, k: int = 1) -> Population:
        """The k best rows of each prompt, prompt by prompt, best first.

        Raises:
            RuntimeError: nothing was finished.
        """
        if self.finished is None:
            raise RuntimeError(f"the search stopped ({self.stopped}) before any candidate was finished") from self.error
        return self.finished.select(top_k(self.finished, k))

    def save(self, folder: str | Path, k: int = 1) -> None:
        """Write the k winners of each prompt as ``winner.safetensors`` (final latents) and ``winner.json`` (lineage).

        ``Population.load(folder, name="winner")`` reads them; :func:`regenerate` repeats one and tells the drift.

        Raises:
            RuntimeError: nothing was finished.
        """
        self.winners(k).save(folder, "winner")

    @property
    def ranking(self) -> list[dict[str, Any]]:
        """All finished candidates from best to worst: prompt, id, seed, score, lineage, history, batches; JSON-able."""
        rows = self.finished
        if rows is None:
            return []
        return [
            {
                "prompt": int(rows.prompt[r]),
                "id": rows.id[r],
                "candidate": rows.candidate[r],
                "seed": rows.seed[r],
                "score": float(rows.score[r]),
                "lineage": [e._asdict() for e in rows.lineage[r]],
                "history": [list(h) for h in rows.history[r]],
                "batches": [b._asdict() for b in rows.batches[r]],
            }
            for r in rank(rows)
        ]


@dataclass(frozen=True)
class Round:
    """One completed step of the search, for progress bars and live views.

    Attributes:
        index: completed rounds, from 1.
        state: the search's state.
        best: prompt -> best finished score.
        ledger: what has been spent so far.
        result: best so far; the run is over if ``last``.
    """

    index: int
    state: SearchState
    best: dict[int, float]
    ledger: Ledger
    result: SearchResult
    last: bool = False


def run_search(
    sampler: Sampler,
    reward: Reward,
    search: Search,
    request: Request,
    budget: Budget | None = None,
    *,
    rows: int | None = None,
    decode_rows: int | None = None,
    reward_rows: int | None = None,
    batch_buckets: Sequence[int] | None = None,
    checkpoint: str | Path | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    ledger: Ledger | None = None,
) -> Iterator[Round]:
    """Run ``search`` and yield a :class:`Round` after each of its steps; the last one has ``last=True``.

    Ctrl-C and any exception while a round runs (a broken reward, exhausted memory) end the run with a last round that
    holds what was finished, and the exception as ``result.error``. Errors of the caller (a budget too small, a bad
    argument) are raised before anything runs.

    Args:
        sampler: the generator; its ``meter`` is replaced by the ledger.
        reward: scores previews and finals.
        search: the algorithm; cut to fit ``budget.max_nfe`` before anything runs.
        request: prompts, seed, call arguments.
        budget: limits; default none.
        rows, decode_rows, reward_rows: most rows for one model call, decode and reward call; halved when memory
            runs out. Default: what :func:`visearch.memory.plan` says if ``budget.max_memory`` is given or the model
            runs on a CUDA device, else all.
        batch_buckets: the only batch sizes that the model may see, such as (1, 2, 4, 8), for compiled models.
        checkpoint: folder to save each round to; an existing one of the same run is resumed.
        cancelled: asked between rounds.
        ledger: continue counting in this one.

    Raises:
        ValueError: the budget is too small for one candidate, or the checkpoint belongs to another run.
    """
    budget, ledger = budget or Budget(), ledger or Ledger()
    begin, prompts = time.perf_counter(), len(request.prompts)
    metered = MeteredSampler(sampler, ledger, budget, rows, decode_rows, batch_buckets)
    scorer = MeteredReward(reward, ledger, reward_rows)
    evaluate = Evaluator(metered, scorer, request)
    given, search = search, search.plan(metered, budget.rows_a_prompt(metered, prompts)).search
    state = search.init(metered, request)
    print_of_run = fingerprint(request, search, metered.num_stages)
    if checkpoint is not None and (saved := load_state(checkpoint, state, getattr(sampler, "device", "cpu"))):
        state, extra = saved
        if extra["fingerprint"] != print_of_run:
            raise ValueError(f"checkpoint={str(checkpoint)!r} is of another run; delete it or choose another folder")
        vars(ledger).update(vars(Ledger.from_dict(extra["ledger"])))
        if hasattr(sampler, "request"):
            sampler.request = request  # saved rows come without the init that tells it
    for note in state.notes:
        warnings.warn(note, stacklevel=2)

    before = ledger.seconds["total"]
    if _wants_plan(metered, search, request, budget):
        sizes = {"rows": rows, "decode_rows": decode_rows, "reward_rows": reward_rows}
        fits = plan(sampler, reward, given, request, budget, **sizes, batch_buckets=batch_buckets, ledger=ledger)
        metered.rows, metered.decode_rows, scorer.batch_size = fits.rows, fits.decode_rows, fits.reward_rows
    ledger.begin_memory()

    def result(stopped: str, error: BaseException | None = None) -> SearchResult:
        ledger.seconds["total"] = before + time.perf_counter() - begin
        notes = state.notes + tuple(scorer.warnings)
        if state.finished is not None and stopped != "running":
            notes += _all_failed(state.finished, request)
        return SearchResult(request, state.finished, ledger, stopped, error, evaluate.samples, state.pruned, notes)

    def make_round(stopped: str, error: BaseException | None = None, last: bool = False) -> Round:
        rows = state.finished
        best = {} if rows is None else best_per_prompt(rows, range(prompts))
        scores = {p: float(rows.score[r]) for p, r in best.items()} if rows is not None else {}
        return Round(state.round, state, scores, ledger, result(stopped, error), last)

    stopped, error = "done", None
    while not search.done(state):
        elapsed = time.perf_counter() - begin
        room = _room(budget, ledger, metered, state, elapsed)
        rows_left = _room(replace(budget, max_seconds=None), ledger, metered, state, elapsed)
        limit = "budget" if room == rows_left else "deadline"
        if cancelled():
            room, limit = 0.0, "cancelled"
        unfinished = state.live is not None and state.finished is None  # may still finish its best row
        if room is not None and room < 1 and not unfinished:
            stopped = limit
            break
        price = _price(ledger) if state.price is None else state.price
        try:
            with torch.no_grad():  # not around the yield: the caller's grad mode is its own
                state = search.step(replace(state, room=room, price=price), metered, evaluate)
        except BudgetSpent:
            stopped = "budget"
            break
        except KeyboardInterrupt as interrupt:
            stopped, error = "interrupted", interrupt
            break
        except Exception as failure:
            stopped, error = "failed", failure
            break
        state = _close_prompts(replace(state, room=None), budget)
        if checkpoint is not None:
            ledger.seconds["total"] = before + time.perf_counter() - begin
            _save(checkpoint, state, {"ledger": ledger.as_dict(), "fingerprint": print_of_run}, scorer)
        if search.done(state):
            stopped = limit if state.cut else "done" if state.open_prompts else "closed"
            break
        yield make_round("running")
    yield make_round(stopped, error, last=True)


def _wants_plan(metered: MeteredSampler, search: Search, request: Request, budget: Budget) -> bool:
    """Whether batches are cut to fit a limit: the user's, or what is free on a CUDA device, if there is what to cut."""
    several = search.plan(metered).decodes * len(request.prompts) > 1
    return budget.max_memory is not None or (metered.device.type == "cuda" and several)


def _room(budget: Budget, ledger: Ledger, sampler: Sampler, state: SearchState, elapsed: float) -> float | None:
    """Whole candidates a prompt that still fit the remaining rows and seconds; ``None`` is no limit."""
    prompts, limits = max(1, len(state.open_prompts)), []
    whole = prompts * sampler.nfe(0, sampler.num_stages)
    if budget.max_nfe is not None:
        limits.append((budget.max_nfe - ledger.nfe) / whole)
    if budget.max_images is not None:
        limits.append((budget.max_images - ledger.images + ROUNDING) / prompts)
    if budget.max_seconds is not None:
        if ledger.nfe == 0:
            limits.append(1.0)  # the first candidate tells how long one takes
        else:
            each = SAFETY * elapsed / ledger.nfe * whole if elapsed else 0.0
            limits.append((budget.max_seconds - elapsed) / each if each else 1.0)
    return max(0.0, min(limits)) if limits else None


def _price(ledger: Ledger) -> float | None:
    """What one decode and score costs in model rows by the seconds spent so far; ``None`` while nothing tells."""
    seconds = ledger.seconds
    if not (ledger.decodes and ledger.nfe and seconds["denoiser"]):
        return None
    return (seconds["decode"] + seconds["reward"]) / ledger.decodes / (seconds["denoiser"] / ledger.nfe)


def _close_prompts(state: SearchState, budget: Budget) -> SearchState:
    """Prompts that reached the target or stopped improving get no more candidates."""
    rows = state.finished
    if rows is None or (budget.target is None and budget.patience is None):
        return state
    still_open = []
    for prompt in state.open_prompts:
        mine = [(rows.order_key(r), float(rows.score[r])) for r in range(len(rows)) if int(rows.prompt[r]) == prompt]
        scores = [s for _, s in sorted(mine)]
        best = max(scores, default=float("-inf"))
        since = len(scores) - 1 - scores.index(best) if scores else 0
        reached = budget.target is not None and best >= budget.target
        if not reached and (budget.patience is None or since < budget.patience):
            still_open.append(prompt)
    return replace(state, open_prompts=tuple(still_open))


def _all_failed(rows: Population, request: Request) -> tuple[str, ...]:
    notes = []
    for prompt, row in best_per_prompt(rows, range(len(request.prompts))).items():
        if rows.score[row] == float("-inf"):
            text = request.reward_prompts[prompt]
            notes.append(f"the reward failed on every candidate of {text!r}; candidate {rows.id[row]} is returned")
            warnings.warn(notes[-1], stacklevel=3)
    return tuple(notes)


def _save(folder: str | Path, state: SearchState, extra: dict[str, Any], scorer: MeteredReward) -> None:
    try:
        save_state(folder, state, extra)
    except OSError as error:
        scorer._warn(f"could not write checkpoint {folder}: {error}; the search goes on without it")


# --- a row again ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regenerated:
    """A row that was run again.

    Attributes:
        row: B = 1.
        drift: largest absolute difference of its state (the latents) from what was kept.
        ledger: what it took; nothing of it is booked with the search.
    """

    row: Population
    drift: float
    ledger: Ledger


def regenerate(sampler: Sampler, request: Request, row: Population, exact: bool = True) -> Regenerated:
    """Run one row again from its seed and operations, and compare it with what was kept of it.

    What a pipeline draws for candidate 0 without its generator comes from torch's global stream, which then has to
    stand where it stood when the search began.

    Args:
        sampler: as in the search, the same view of it.
        request: as in the search.
        row: B = 1, e.g. ``result.winners().select([0])`` or what :meth:`SearchResult.save` wrote.
        exact: run in batches of the sizes that the row was carried in, at the row's own place, the others filled with
            copies of it, since kernels may round otherwise in other shapes; else alone, which is cheaper.

    Raises:
        ValueError: not exactly one row, or ``exact`` for a row whose batches were not all recorded.
    """
    if len(row) != 1:
        raise ValueError(f"row holds {len(row)} rows; select one")
    prompt, first, steps = int(row.prompt[0]), row.lineage[0][0], _script(row, exact)
    others = {p for step in steps if isinstance(step, Batch) for p, _ in step.prompts} - {prompt}
    seeds = [Seed(prompt, int(first.value), first.seed), *request.seeds(0, 1, sorted(others))]
    meter, sampler.meter = sampler.meter, (ledger := Ledger())
    try:
        with torch.no_grad():
            again = sampler.init(request, seeds).select([0])  # init encodes the prompts that its batches will hold
            for step in steps:
                again = (_carry if isinstance(step, Batch) else _repeat)(sampler, again, step)
    finally:
        sampler.meter = meter
    return Regenerated(again, _drift(again, row), ledger)


def _script(row: Population, exact: bool) -> list[Event | Batch]:
    """What happened to a row after its init, in order; not exact: carried alone between its operations."""
    events, batches = list(row.lineage[0][1:]), list(row.batches[0])
    steps: list[Event | Batch] = []
    stage = 0
    while events or stage != row.stage:
        if events and events[0].stage == stage:
            steps.append(events.pop(0))
            stage = int(steps[-1].value) if steps[-1].op == "renoise" else stage
            continue
        if not exact:
            steps.append(Batch(stage, events[0].stage if events else row.stage, 1, 0, ((int(row.prompt[0]), 1),)))
        elif batches and batches[0].start == stage:
            steps.append(batches.pop(0))
        else:
            raise ValueError(f"the batch that carried this row on from stage {stage} is not recorded; use exact=False")
        stage = steps[-1].stop
    return steps


def _repeat(sampler: Sampler, row: Population, event: Event) -> Population:
    """One operation of a row's lineage."""
    if event.op == "fork":
        copy = int(event.value)
        return row.select([0] * (copy + 1)).select([copy])
    if event.op == "renoise":
        return sampler.renoise(row, int(event.value), [event.seed])
    return sampler.perturb(row, event.value, [event.seed])


def _carry(sampler: Sampler, row: Population, batch: Batch) -> Population:
    """Carry a row as it was, at the same place in a batch of the same prompts; the others are copies of it."""
    prompts = torch.tensor([p for p, count in batch.prompts for _ in range(count)])
    order = list(range(1, batch.rows))
    order.insert(batch.position, 0)  # the first copy is the one that keeps its random stream
    rows = replace(row.select([0] * batch.rows).select(order), prompt=prompts)
    return sampler.advance(rows, batch.stop).select([batch.position])


def _drift(a: Population, b: Population) -> float:
    """Largest absolute difference of the tensors that belong to the rows, states of random streams (bytes) aside."""
    own = [k for k, t in a.state.tensors.items() if a.state.axes[k] is not None and t.dtype != torch.uint8]
    pairs = [(a.state.tensors[k].cpu().double(), b.state.tensors[k].cpu().double()) for k in own]
    return max(float((x - y).abs().max()) for x, y in pairs)
