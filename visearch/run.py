"""The only loop: drives a search within a budget, round by round, and never loses what is finished."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visearch.allocation import estimated_gain
from visearch.budget import (
    NO_FEATURES,
    ROUNDING,
    Budget,
    BudgetSpent,
    Evaluator,
    Ledger,
    MeteredFeatures,
    MeteredReward,
    MeteredSampler,
)
from visearch.checkpoint import fingerprint, load_state, save_state
from visearch.diversity import Keep, compares_features
from visearch.memory import plan
from visearch.monitor import Report
from visearch.protocols import Batch, Event, Population, Request, Reward, Sampler, Search, SearchState, Seed
from visearch.search.nesting import repeat
from visearch.selection import best_per_prompt, rank, top_k

__all__ = ["Regenerated", "Round", "SearchResult", "regenerate", "run_search"]

GAIN_FROM = 4  # finished candidates that an estimate of the next one's gain takes
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
        report: candidate 0 and the winners before the reward and those others, where there are any.
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
    report: Report | None = None

    def winners(self, k: int = 1) -> Population:
        """The k best rows of each prompt, prompt by prompt, best first.

        Raises:
            RuntimeError: nothing was finished.
        """
        rows = self._rows()
        return rows.select(top_k(rows, k))

    def diverse(self, k: int, features: Callable[[Any], Tensor], rule: Keep | str = "auto") -> Population:
        """k finished rows of each prompt that are good and unlike each other, prompt by prompt, best first.

        Args:
            k: rows a prompt; all where fewer are finished.
            features: as for :func:`run_search`; counted in the ledger.
            rule: a method of :func:`visearch.diversity.diverse_subset`, or a :class:`visearch.Keep` with its weight.

        Raises:
            ValueError: k below 1, or an unknown method.
            RuntimeError: nothing was finished, or a resumed run no longer has the samples of its earlier rows.
        """
        rule, rows = Keep.of(rule), self._rows()
        keys = list(zip(rows.prompt.tolist(), rows.id, strict=True))
        if missing := [key for key in keys if key not in self.samples]:
            raise RuntimeError(f"{len(missing)} rows were finished before a resume, and their samples are gone")
        samples = [self.samples[key] for key in keys]
        samples = torch.stack(samples) if all(map(torch.is_tensor, samples)) else samples
        return rows.select(rule.choose(rows, k, MeteredFeatures(features, self.ledger)(samples)))

    def _rows(self) -> Population:
        if self.finished is None:
            raise RuntimeError(f"the search stopped ({self.stopped}) before any candidate was finished") from self.error
        return self.finished

    def save(self, folder: str | Path, k: int = 1) -> None:
        """Write the k winners of each prompt as ``winner.safetensors`` (final latents) and ``winner.json`` (lineage).

        ``Population.load(folder, name="winner")`` reads them; :func:`regenerate` repeats one and tells the drift.

        Raises:
            RuntimeError: nothing was finished.
        """
        self.winners(k).save(folder, "winner")

    @property
    def ranking(self) -> list[dict[str, Any]]:
        """All finished candidates from best to worst: prompt, id, seed, score, lineage, history, batches; JSON-able.

        Of an ensemble of rewards, ``components`` holds what each member gave, higher is better.
        """
        rows = self.finished
        if rows is None:
            return []
        return [
            {
                "prompt": (p := int(rows.prompt[r])),
                "id": rows.id[r],
                "candidate": rows.candidate[r],
                "seed": rows.seed[r],
                "score": float(rows.score[r]),
                **({"components": {k: float(v[r]) for k, v in rows.components.items()}} if rows.components else {}),
                "lineage": [e._asdict() for e in rows.lineage[r]],
                **({} if self.request.rewrite is None else {"text": self.request.text(p, rows.candidate[r])}),
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
        previews: (prompt, id) -> latest decoded sample of each row that was scored in this step, dropped ones among
            them; kept where :func:`run_search` is asked to, for this round alone.
        scored: those rows with their scores and lineage, as they were then, without the sampler's tensors.
    """

    index: int
    state: SearchState
    best: dict[int, float]
    ledger: Ledger
    result: SearchResult
    last: bool = False
    previews: dict[tuple[int, str], Any] = field(default_factory=dict)
    scored: tuple[Population, ...] = ()


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
    features: Callable[[Any], Tensor] | None = None,
    previews: bool = False,
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
        features: gets N samples as the reward does, returns (N, D) by which a search may compare them: the larger the
            cosine of two rows, the more alike the samples. See :mod:`visearch.rewards.features`.
        previews: whether each round holds what was decoded in it; nothing is decoded for that.

    Raises:
        ValueError: the budget is too small for one candidate, the checkpoint belongs to another run, the search prunes
            by features and none are given, or a relative reward meets a limit or a search that needs a fixed scale.
    """
    budget, ledger = budget or Budget(), ledger or Ledger()
    if getattr(reward, "relative", False):
        _refuse_relative(reward, search, budget)
    begin, prompts = time.perf_counter(), len(request.prompts)
    metered = MeteredSampler(sampler, ledger, budget, rows, decode_rows, batch_buckets)
    scorer = MeteredReward(reward, ledger, reward_rows)
    described = None if features is None else MeteredFeatures(features, ledger, reward_rows)
    evaluate = Evaluator(metered, scorer, request, described, previews)
    if described is None and compares_features(search):
        raise ValueError(NO_FEATURES)
    given, search = search, search.plan(metered, budget.rows_a_prompt(metered, prompts)).search
    state = search.init(metered, request)
    call = {**request.call, **getattr(sampler, "call", {})}
    print_of_run, learned = checkpoint and fingerprint(request, search, reward, metered.num_stages, call), None
    if checkpoint is not None and (saved := load_state(checkpoint, state, getattr(sampler, "device", "cpu"))):
        state, extra = saved
        if extra["fingerprint"] != print_of_run:
            raise ValueError(f"checkpoint={str(checkpoint)!r} is of another run; delete it or choose another folder")
        vars(ledger).update(vars(Ledger.from_dict(extra["ledger"])))
        request.rewritten.update({(p, k): text for p, k, text in extra["rewritten"]})
        learned = extra["learned"]
        if hasattr(sampler, "request"):
            sampler.request = request  # saved rows come without the init that tells it
    for note in state.notes:
        warnings.warn(note, stacklevel=2)

    before = ledger.seconds["total"]
    if _wants_plan(metered, search, request, budget):
        sizes = {"rows": rows, "decode_rows": decode_rows, "reward_rows": reward_rows}
        fits = plan(sampler, reward, given, request, budget, **sizes, batch_buckets=batch_buckets, ledger=ledger)
        metered.limits.update(rows=fits.rows, decode_rows=fits.decode_rows)
        scorer.limit(fits.reward_rows)
        if described is not None:
            described.batch_size = fits.reward_rows
    if hasattr(sampler, "learned"):
        sampler.learned = learned  # of this run alone: not what an earlier one or the plan's probes taught
    ledger.begin_memory()

    def result(stopped: str, error: BaseException | None = None) -> SearchResult:
        ledger.seconds["total"] = before + time.perf_counter() - begin
        notes = state.notes + tuple(scorer.warnings)
        if state.finished is not None and stopped != "running":
            notes += _all_failed(state.finished, request)
        rows = state.finished
        keys = set() if rows is None else set(zip(rows.prompt.tolist(), rows.id, strict=True))
        samples = {key: sample for key, sample in evaluate.samples.items() if key in keys}  # drafts are none
        return SearchResult(request, rows, ledger, stopped, error, samples, state.pruned, notes)

    def make_round(stopped: str, error: BaseException | None = None, last: bool = False) -> Round:
        rows = state.finished
        best = {} if rows is None else best_per_prompt(rows, range(prompts))
        scores = {p: float(rows.score[r]) for p, r in best.items()} if rows is not None else {}
        found = result(stopped, error)
        return Round(state.round, state, scores, ledger, found, last, evaluate.previews, evaluate.scored)

    stopped, error = "done", None
    while not search.done(state):
        evaluate.forget()
        elapsed = time.perf_counter() - begin
        room, limit = _room(budget, ledger, metered, state, elapsed, before + elapsed)
        if cancelled():
            room, limit = 0.0, "cancelled"
        unfinished = state.live is not None and state.finished is None  # may still finish its best row
        shared = len(state.open_prompts) if getattr(search, "across_prompts", False) else 1
        if room is not None and room * shared < 1 - ROUNDING and not unfinished:
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
            texts = [[*of, text] for of, text in request.rewritten.items()]
            extra = {"ledger": ledger.as_dict(), "fingerprint": print_of_run, "rewritten": texts}
            extra["learned"] = getattr(sampler, "learned", None)
            _save(checkpoint, state, extra, scorer)
        if search.done(state):
            stopped = limit if state.cut else "done" if state.open_prompts else "closed"
            break
        yield make_round("running")
    yield make_round(stopped, error, last=True)


def _refuse_relative(reward: Reward, search: Search, budget: Budget) -> None:
    """Raise where scores that tell candidates of one prompt apart would be held against anything else."""
    limits = [f"{name}={value}" for name in ("target", "min_gain") if (value := getattr(budget, name)) is not None]
    if _shares_over_prompts(search):
        limits.append(f"{type(search).__name__}, which shares candidates over prompts,")
    if limits:
        raise ValueError(
            f"{limits[0]} needs scores on a fixed scale, and {reward.name} is relative to a prompt's other candidates; "
            "join its members by a weighted sum, or by a z-score with reference="
        )


def _shares_over_prompts(search: Any) -> bool:
    """Whether a search, or one inside it, compares scores of different prompts."""
    parts = [getattr(search, f.name) for f in fields(search)] if is_dataclass(search) else []
    return getattr(search, "across_prompts", False) or any(map(_shares_over_prompts, parts))


def _wants_plan(metered: MeteredSampler, search: Search, request: Request, budget: Budget) -> bool:
    """Whether batches are cut to fit a limit: the user's, or what is free on a CUDA device, if there is what to cut."""
    several = search.plan(metered).decodes * len(request.prompts) > 1
    return budget.max_memory is not None or (metered.device.type == "cuda" and several)


def _room(
    budget: Budget, ledger: Ledger, sampler: Sampler, state: SearchState, elapsed: float, spent: float
) -> tuple[float | None, str]:
    """Whole candidates a prompt that still fit (``None`` is no limit), and what stops more: "budget" or "deadline"."""
    prompts, limits = max(1, len(state.open_prompts)), []
    whole = prompts * sampler.nfe(0, sampler.num_stages)
    if budget.max_nfe is not None:
        limits.append(((budget.max_nfe - ledger.nfe) / whole, "budget"))
    if budget.max_images is not None:
        limits.append(((budget.max_images - ledger.images + ROUNDING) / prompts, "budget"))
    if budget.max_seconds is not None:
        room = 1.0  # the first candidate tells how long one takes
        if ledger.nfe and elapsed:
            room = (budget.max_seconds - elapsed) / (SAFETY * spent / ledger.nfe * whole)
        limits.append((room, "deadline"))
    return min(((max(0.0, room), name) for room, name in limits), default=(None, "budget"))  # "budget" where equal


def _price(ledger: Ledger) -> float | None:
    """What one decode and score costs in model rows by the seconds spent so far; ``None`` while nothing tells."""
    seconds, looks = ledger.seconds, ledger.decodes + ledger.previews.total()
    if not (looks and ledger.nfe and seconds["denoiser"]):
        return None
    spent = seconds["decode"] + seconds["preview"] + seconds["reward"]
    return spent / looks / (seconds["denoiser"] / ledger.nfe)


def _close_prompts(state: SearchState, budget: Budget) -> SearchState:
    """Prompts that reached the target or stopped improving get no more candidates."""
    rows = state.finished
    if rows is None or (budget.target is None and budget.patience is None and budget.min_gain is None):
        return state
    still_open = []
    for prompt in state.open_prompts:
        mine = [(rows.order_key(r), float(rows.score[r])) for r in range(len(rows)) if int(rows.prompt[r]) == prompt]
        scores = [s for _, s in sorted(mine)]
        best = max(scores, default=float("-inf"))
        since = len(scores) - 1 - scores.index(best) if scores else 0
        reached = budget.target is not None and best >= budget.target
        stale = budget.patience is not None and since >= budget.patience
        little = budget.min_gain is not None and len(scores) >= GAIN_FROM and estimated_gain(scores) < budget.min_gain
        if not (reached or stale or little):
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
                if isinstance(step, Event) and step.op == "noise":
                    again = sampler.set_noise(again, row.noise[0][None], [step.seed])
                else:
                    again = (_carry if isinstance(step, Batch) else repeat)(sampler, again, step)
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
