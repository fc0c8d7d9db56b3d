"""``visearch calibrate``: what to search with on your own model and reward, learned from a recorded pool.

Halving schedules (TTSnap, arXiv 2511.22242; PSP, 2607.21591), pruning margins by conformal risk control (2208.02814),
what doubling the budget gains, stop rules and budgets shared over prompts, and thresholds of cached drafts
(2607.23159). Everything is chosen on the even prompts of the pool and reported on the odd ones, at equal honest cost:
model rows plus one price for each decode and score.

Shapes: P prompts, S seeds, J recorded stages, D orders of the seeds, C checks, V measures (the reward, then judges).
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from visearch.calibration import SATURATED, TIE, Calibration, Conformal, Doubling, Entry
from visearch.drafts import draft_halves, draft_table
from visearch.options import add_command
from visearch.pipelines.recorded import RecordedSampler
from visearch.pool import Pool
from visearch.protocols import stable_hash
from visearch.risk import conformal_factor, coverage, rounded_up
from visearch.search.successive_halving import SuccessiveHalving
from visearch.simulate import Checks, Recorded, Rule, enumerate_checks, orders, share, stop
from visearch.statistics import curve_at, curve_reach, mean_interval, paired_interval, worth_interval

__all__ = ["add_parser", "calibrate"]

PRESETS = ("auto", "steep", "psp", "ttsnap-single", "ttsnap-multi")
KEEP = (0.3, 0.4, 0.5, 0.6)
SPAN = (0.2, 0.85)  # shares of T where a check may be
DEPTH = 3
LEAST_SEEDS, LEAST_PROMPTS = 8, 8
DRAWS, SCREEN, SHARE_DRAWS = 200, 50, 8
RACE = ((8, 200), (64, 12))  # (orders, schedules that stay) before all orders decide

EXAMPLES = """
examples:
  visearch calibrate pool.parquet
      schedules for budgets of 2, 4, 8 images a prompt beside best-of-N and the presets, on prompts not tuned on
  visearch calibrate pool.parquet --reward emoji-clip --budget 4 8 --risk 0.1 --out schedule.json
      also margins that drop the eventual best with probability at most 0.1; schedule.json holds what --search takes
  visearch run "a photo of two cows" --search "halving(n=6, calls=(7, 9, 12), keep=(3, 2, 1))"
      what it recommended; schedule.json has it under "schedules", by budget
"""


# --- pools to arrays ---------------------------------------------------------------------------------------------


def _recorded(pool: Pool, reward: str, judges: Sequence[str], draws: int = DRAWS) -> Recorded:
    keys = [stable_hash(text, *own[:1]) for text, own in zip(pool.prompts, pool.seeds, strict=True)]
    worth = np.stack([pool.final(name) for name in (reward, *judges)]).astype(np.float64)
    table = pool.scores[reward].astype(np.float64)
    return Recorded(table, worth, pool.rows, pool.price, orders(keys, pool.size, draws))


def _checked(pool: Pool, reward: str | None) -> tuple[Pool, str, list[str]]:
    """The pool of the stages at which the reward was recorded, the reward, and the judges."""
    if reward is None and len(pool.scores) > 1:
        raise ValueError(f"this pool has several rewards; say which guides: --reward {' or '.join(pool.scores)}")
    reward = reward or next(iter(pool.scores))
    if reward not in pool.scores:
        raise ValueError(f"reward {reward!r} was not recorded; this pool has {', '.join(pool.scores)}")
    if pool.size < LEAST_SEEDS or len(pool.prompts) < LEAST_PROMPTS:
        raise ValueError(
            f"the pool has {len(pool.prompts)} prompts x {pool.size} seeds; calibration needs at least {LEAST_PROMPTS} "
            f"x {LEAST_SEEDS} (32 x 32 is better): it tunes on half of the prompts and subsamples half of the seeds"
        )
    table = pool.scores[reward]
    seen = ~np.isnan(table).any((0, 1))
    bad = np.isinf(table).any((1, 2)) | np.isnan(table[..., -1]).any(1)
    if bad.any():
        raise ValueError(
            f"reward {reward!r} failed or is missing on candidates of {bad.sum()} prompts, "
            f"{pool.prompts[bad.argmax()]!r} for one; leave them out with Pool.take(prompts=...), or record them again"
        )
    judges = [name for name in pool.held_out if np.isfinite(pool.final(name)).all()]
    kept = replace(
        pool,
        stages=tuple(np.array(pool.stages)[seen].tolist()),
        rows=tuple(np.array(pool.rows)[seen].tolist()),
        scores={reward: table[..., seen]},
        held_out={name: pool.final(name) for name in judges},
    )
    return kept, reward, judges


def _check(size: int, prompts: int, budgets: Sequence[int], risk: float | None) -> None:
    if not all(isinstance(n, int) and 1 <= n <= size // 2 for n in budgets):
        raise ValueError(f"budgets={budgets} must be from 1 to {size // 2}, half of the {size} seeds of the pool")
    if risk is None:
        return
    if not 0 < risk < 1:
        raise ValueError(f"risk={risk} must lie in (0, 1), such as 0.1")
    quarter = len(range(2, prompts, 4))
    if risk * (quarter + 1) < 1 - 1e-9:
        need = 4 * (math.ceil(1 / risk - 1e-9) - 1)
        raise ValueError(
            f"risk={risk} needs at least {need} prompts, the pool has {prompts}; a quarter of the prompts calibrates it"
        )


# --- measuring -----------------------------------------------------------------------------------------------


def _entry(
    recorded: Recorded,
    measures: Sequence[str],
    budget: int,
    name: str,
    search: str,
    found: np.ndarray,
    nfe: ArrayLike,
    scores: ArrayLike,
    spent: ArrayLike | None = None,
) -> Entry:
    """Beside best-of-n: ``found`` (P, V); ``nfe``, ``scores`` and ``spent`` are numbers or (P,).

    ``spent`` is taken from rows and scores unless given (the budget that a schedule was made for).
    """
    nfe, scores = (np.broadcast_to(np.asarray(v, dtype=np.float64), len(found)) for v in (nfe, scores))
    whole = recorded.rows[-1] + recorded.price
    each = (nfe + recorded.price * scores) / whole if spent is None else np.broadcast_to(spent, len(found))
    base = curve_at(recorded.curves, float(np.mean(each)))
    return Entry(
        budget,
        name,
        search,
        float(nfe.mean()),
        float(scores.mean()),
        float(np.mean(each)),
        dict(zip(measures, found.mean(0).tolist(), strict=True)),
        {m: paired_interval(found[:, v], base[:, v]) for v, m in enumerate(measures)},
        worth_interval(found[:, 0], each, recorded.curves[:, 0]),
    )


# --- a. schedules ----------------------------------------------------------------------------------------------


def _tune(recorded: Recorded, budget: int, at: Sequence[int]) -> Checks | None:
    """The schedule with the best mean reward at the honest cost of best-of-``budget``."""
    limit, most = budget * (recorded.rows[-1] + recorded.price), recorded.scores.shape[1] // 2
    left = list(enumerate_checks(recorded.rows, recorded.price, limit, at, KEEP, most, DEPTH))
    finals = recorded.scores[..., -1]

    def value(checks: Checks, draws: int | None = None) -> float:
        return float(np.take_along_axis(finals, recorded.halve(checks, draws), 1).mean())

    for draws, kept in RACE:
        if len(left) > kept:
            left = sorted(left, key=lambda checks: -value(checks, draws))[:kept]
    return max(left, key=value, default=None)


def _checkable(pool: Pool) -> list[int]:
    """Positions of the recorded stages where a check may be."""
    return [j for j, s in enumerate(pool.stages) if SPAN[0] * pool.steps <= s <= SPAN[1] * pool.steps]


def _spec(pool: Pool, checks: Checks) -> str:
    calls, keep = tuple(pool.stages[j] for j in checks.at), checks.rows[1:]
    return f"halving(n={checks.rows[0]}, calls={calls}, keep={keep})" if calls else f"best-of-n(n={checks.rows[0]})"


def _planned(pool: Pool, budget: int, preset: str) -> Checks:
    """A preset at the honest cost of best-of-``budget``."""
    search = SuccessiveHalving(n=None, preset=preset, check_cost=pool.price)
    plan = search.plan(RecordedSampler(pool), budget * pool.rows[-1]).search
    return Checks(tuple(pool.stages.index(c) for c in plan.calls), (plan.n, *plan.keep))


def _schedules(
    pool: Pool, tune: Recorded, report: Recorded, measures: Sequence[str], budgets: Sequence[int]
) -> tuple[list[Entry], dict[int, Checks | None], list[str]]:
    entries, tuned, notes = [], {}, []
    at = _checkable(pool)
    for n in budgets:
        tuned[n] = _tune(tune, n, at)
        named: dict[str, Checks | None] = {"best-of-n": Checks((), (n,))}
        named |= {preset: _planned(pool, n, preset) for preset in PRESETS} | {"tuned": tuned[n]}
        for name, checks in named.items():
            if checks is None or checks.rows[0] > pool.size // 2:
                why = "no schedule fits" if checks is None else f"it begins with {checks.rows[0]} candidates"
                notes.append(f"N={n}, {name}: not evaluated on {pool.size} seeds, {why}")
                continue
            found = curve_at(report.curves, checks.rows[0]) if not checks.at else report.valued(report.halve(checks))
            facts = checks.nfe(pool.rows), sum(checks.rows), float(n)
            entries.append(_entry(report, measures, n, name, _spec(pool, checks), found, *facts))
    return entries, tuned, notes


# --- b. conformal risk control ---------------------------------------------------------------------------------


def _conformal(
    pool: Pool, every: Recorded, report: Recorded, measures: Sequence[str], budget: int, risk: float
) -> list[Conformal]:
    """Checks and scales come from a quarter of the prompts, margins from another, the report from the odd half."""
    number = np.arange(len(pool.prompts))
    tune, setting, odd = number % 4 == 0, number % 4 == 2, number % 2 == 1
    at = _cheapest(pool, every, tune, budget, risk)
    found = []
    for ranks in (False, True):
        behind = every.behind(budget, at, ranks)
        scale = _scale(behind[tune])
        excess = (behind / scale).max(2)
        margins = np.maximum(conformal_factor(excess[setting], risk), 0) * scale
        if ranks:
            margins = np.floor(margins + 1e-9)
            rows = itertools.accumulate((budget, *(int(m) + 1 for m in margins)), min)
            kept = {j: b for j, (a, b) in zip(at, itertools.pairwise(rows), strict=True) if b < a}
            checks = Checks(tuple(kept), (budget, *kept.values()))
            name, search = "conformal, numbers", _spec(pool, checks)
            value, facts = report.valued(report.halve(checks)), (checks.nfe(pool.rows), sum(checks.rows))
        else:
            margins = np.array([rounded_up(m) for m in margins])
            stages = tuple(pool.stages[j] for j in at)
            name = "conformal, margins"
            search = f"conformal(n={budget}, calls={stages}, margins={tuple(margins.tolist())})"
            picks, nfe, scores = report.margins(budget, at, margins)
            value, facts = report.valued(picks), (nfe.mean(1), scores.mean(1))
        lost = mean_interval((behind[odd] > margins).any(2).mean(1))
        seen = coverage(excess[~tune], risk, int(setting.sum()))
        found.append(Conformal(risk, lost, seen, _entry(report, measures, budget, name, search, value, *facts)))
    return found


def _scale(behind: np.ndarray) -> np.ndarray:
    """(C,) root mean square of how far the eventual best lies behind at each check."""
    return np.maximum(np.sqrt((behind**2).mean((0, 1))), 1e-9)


def _cheapest(pool: Pool, every: Recorded, tune: np.ndarray, n: int, risk: float) -> tuple[int, ...]:
    """One or two checks whose margins, set to lose ``risk`` on the prompts ``tune``, leave the least honest cost."""
    own = Recorded(every.scores[tune], every.worth[:, tune], every.rows, every.price, every.order[tune, :SCREEN])
    at = _checkable(pool)
    if not at:
        raise ValueError(f"no stage of {pool.stages} lies in {SPAN} of {pool.steps} steps; record more stages")
    costs = {}
    for checks in (c for size in (1, 2) for c in itertools.combinations(at, size)):
        behind = own.behind(n, checks)
        scale = _scale(behind)
        margins = np.quantile((behind / scale).max(2), 1 - risk) * scale
        _, nfe, scores = own.margins(n, checks, margins)
        costs[checks] = float((nfe + every.price * scores).mean())
    return min(costs, key=costs.__getitem__)


# --- c. budget advice --------------------------------------------------------------------------------------------


def _doublings(
    tune: Recorded, report: Recorded, measures: Sequence[str], tuned: Mapping[int, Checks | None]
) -> tuple[list[Doubling], dict[str, int | None]]:
    found, size = [], report.scores.shape[1]
    halved = {n: c for n, c in tuned.items() if c is not None and 2 * n in tuned and tuned[2 * n] is not None}
    gains: list[tuple[str, int, Callable[[Recorded], np.ndarray]]] = []
    for n in (2**k for k in range(size.bit_length()) if 2 ** (k + 1) <= size):
        gains.append(("best-of-n", n, lambda half, n=n: curve_at(half.curves, 2 * n) - curve_at(half.curves, n)))
    for n, checks in halved.items():
        twice = tuned[2 * n]
        gains.append(
            ("tuned", n, lambda half, a=checks, b=twice: half.valued(half.halve(b)) - half.valued(half.halve(a)))
        )
    for search, n, gain in gains:
        expected, observed = gain(tune).mean(0), gain(report)
        for v, measure in enumerate(measures):
            found.append(Doubling(measure, search, n, float(expected[v]), mean_interval(observed[:, v])))
    least = {m: SATURATED["judge"] if v else SATURATED["reward"] * tune.deviation for v, m in enumerate(measures)}
    plain = [d for d in found if d.search == "best-of-n"]
    return found, {m: next((d.n for d in plain if d.measure == m and d.predicted < least[m]), None) for m in measures}


# --- d. allocation and stop rules --------------------------------------------------------------------------------


def _economies(tune: Recorded, report: Recorded, measures: Sequence[str], budgets: Sequence[int]) -> list[Entry]:
    """Stop rules, each with the setting that saves most on the even prompts, and budgets shared over prompts."""
    most, entries = report.scores.shape[1] // 2, []
    finals = tune.scores[..., -1]
    rules = {
        "target": [Rule(target=float(q)) for q in np.quantile(finals, (0.6, 0.7, 0.8, 0.9, 0.95))],
        "plateau": [Rule(patience=k) for k in range(2, most)],
        "gain": [Rule(min_gain=part * tune.deviation) for part in (0.01, 0.02, 0.05, 0.1, 0.2)],
    }

    def saves(rule: Rule) -> float:
        drawn, value = stop(tune, rule, most)
        return float(curve_reach(tune.curves[:, 0].mean(0), value[:, 0].mean()) / drawn.mean())

    chosen = [(name, max(settings, key=saves)) for name, settings in rules.items() if settings]
    usual = max(4, math.ceil(most / 2))
    for name, rule in [*chosen, ("plateau, usual", Rule(patience=usual))]:
        drawn, value = stop(report, rule, most)
        facts = drawn * report.rows[-1], drawn, drawn
        entries.append(_entry(report, measures, most, name, f"best-of-n(n={most}, batch=1) with {rule}", value, *facts))
    for n in (n for n in budgets if n > 4):
        drawn, value = share(report, n, SHARE_DRAWS)
        facts = drawn * report.rows[-1], drawn, drawn
        entries.append(_entry(report, measures, n, "shared over prompts", f"allocated(n={n})", value, *facts))
    return entries


# --- everything ----------------------------------------------------------------------------------------------------


def calibrate(
    pool: Pool, reward: str | None = None, budgets: Sequence[int] | None = None, risk: float | None = None
) -> Calibration:
    """Tune on the even prompts of a pool, report on the odd ones.

    Args:
        pool: at least 8 prompts x 8 seeds, 32 x 32 or more for numbers that mean something.
        reward: which of the pool's rewards guides; may be left out where there is one.
        budgets: N, whole candidates a prompt, whose honest cost each search gets; default 2, 4, 8 ... up to S / 4.
        risk: of dropping the eventual best, for conformal margins; ``None`` leaves them out.

    Raises:
        ValueError: a pool too small (the message says what is needed), an unknown reward, failed samples, a budget
            outside 1 to S / 2, or a risk outside (0, 1).
    """
    given = pool
    pool, reward, judges = _checked(pool, reward)
    size = pool.size
    budgets = sorted(set(budgets or [2**k for k in range(1, 10) if 2**k <= size // 4]))
    _check(size, len(pool.prompts), budgets, risk)
    measures = (reward, *judges)
    even, odd = pool.split()
    tune, report = (_recorded(half, reward, judges) for half in (even, odd))
    entries, tuned, notes = _schedules(pool, tune, report, measures, budgets)
    notes += [f"{name}: left out, not all finals have a verdict" for name in given.held_out if name not in judges]
    worth = {(e.budget, e.name): e.multiplier.mean for e in entries}
    adopted = {n: worth.get((n, "tuned"), 0.0) > worth.get((n, "auto"), 1.0) + TIE for n in budgets}
    doublings, saturation = _doublings(tune, report, measures, tuned)
    found: list[Conformal] = []
    if risk is not None:
        every = _recorded(pool, reward, judges)
        for n in sorted({*(n for n in budgets if n > 2), size // 2}):
            found += _conformal(pool, every, report, measures, n, risk)
    facts = {
        "prompts": len(pool.prompts),
        "seeds": size,
        "steps": pool.steps,
        "stages": pool.stages,
        "rows": pool.rows,
        "price": pool.price,
        "reward": reward,
        "meta": dict(pool.meta),
    }
    economies = _economies(tune, report, measures, budgets)
    parts = tuple(entries), adopted, tuple(doublings), saturation, tuple(found), tuple(economies), tuple(notes)
    return Calibration(facts, measures, *parts)


# --- the command -------------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """``visearch calibrate``; ``commands`` is what ``add_subparsers`` returned."""
    parser = add_command(
        commands,
        "calibrate",
        _calibrate,
        help="learn from a recorded pool what to search with: schedules, margins, budgets, stop rules",
        description="Tunes on the even prompts of a pool that `visearch record` made, reports on the odd ones at equal "
        "honest cost, and prints what to give to --search.",
        examples=EXAMPLES,
    )
    parser.add_argument("pool", metavar="POOL", help="a pool: Parquet of visearch record, or arrays (.npz, .npy, .pt)")
    parser.add_argument("--reward", metavar="NAME", help="which of its rewards guides (default: the only one)")
    parser.add_argument(
        "--budget",
        type=int,
        nargs="+",
        metavar="N",
        help="whole images a prompt whose cost the searches get (default 2, 4, 8 ... up to a quarter of the seeds)",
    )
    parser.add_argument(
        "--risk", type=float, metavar="R", help="also margins that drop the eventual best with at most this probability"
    )
    parser.add_argument(
        "--drafts",
        metavar="FILE.npz",
        help="also choose the step cache of drafts: arrays full (P, S), drafts (A, P, S), skipped (A,), settings (A,)",
    )
    parser.add_argument("--out", metavar="FILE", help="write everything as JSON")


def _calibrate(options: argparse.Namespace) -> int:
    from visearch.report import write_json

    drafts = draft_halves(options.drafts) if options.drafts else None
    found = calibrate(Pool.load(options.pool), options.reward, options.budget, options.risk)
    content, text = found.to_dict(), found.markdown()
    if drafts:
        content |= {"drafts": asdict(drafts[0]), "drafts_unseen": asdict(drafts[1])}
        text += "\n\n" + draft_table(*drafts)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(options.out), content)
    print(text)
    return 0
