"""What measured searches are worth: beside best-of-N at equal model rows and at equal seconds, before held-out judges.

The oracle is what a judge itself would pick of best-of-N's candidates, recovery (picked - mean) / (oracle - mean), as
derived from PSP's tables (arXiv 2607.21591). Shapes: P = prompts, S = candidates of best-of-N's pool, D = draws.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visearch.monitor import hacking, signed
from visearch.report import markdown_table, write_json
from visearch.statistics import (
    LEVEL,
    ROUNDING,
    Interval,
    curve_at,
    curve_reach,
    mean_interval,
    paired_interval,
    ratio_interval,
    resampled_interval,
    worth_interval,
)

__all__ = ["BAR", "CLOCKS", "POOL", "Bar", "Comparison", "Kendall", "Measure", "Row", "kendall"]

BAR, POOL = "best-of-n", "pool"
CLOCKS = {"wall": "wall clock", "cpu": "core-seconds", "model": "those in models and rewards alone"}
ONCE, NFE, SECONDS = "one sample", "best-of-n at equal rows", "best-of-n at equal seconds"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """The reward, a judge, a nuisance factor or the diversity of what was picked; differences are paired by prompt.

    Attributes:
        mean: over prompts.
        over: reference -> difference to it: ``"one sample"`` (the mean of best-of-N's candidates), ``"best-of-n at
            equal rows"``, ``"best-of-n at equal seconds"``; the latter two for searches other than best-of-N.
        noninferior: reference -> ``"yes"``, ``"no"`` or ``"undecided"``; judges only.
        oracle, recovery: judges only; no recovery where the oracle gains nothing.
    """

    mean: Interval
    over: Mapping[str, Interval]
    noninferior: Mapping[str, str] = field(default_factory=dict)
    oracle: float | None = None
    recovery: Interval | None = None


@dataclass(frozen=True)
class Row:
    """A search at one budget, guided by one reward. Means are over the P prompts for which everything was measured.

    Attributes:
        budget, unit: what it may spend a prompt: ``"images"`` (image-equivalents) or ``"seconds"``.
        images, seconds: what it spent a prompt; ``images`` counts model rows, 1 is one plain generation.
        ledger: a prompt: ``nfe``, ``decodes``, ``scores``, and ``seconds`` of wall clock by kind, plus ``total``.
        equal_seconds: N of the best-of-N that takes as long, fractions interpolated.
        beyond_pool: it takes longer than all of best-of-N's pool, so that bar is too low.
        worth_nfe, worth_seconds: how many times as many model rows, as many seconds, the smallest best-of-N takes whose
            guided reward is the same.
        beyond_reward: its reward is above that of best-of-N's whole pool, so that it is worth more than is told.
        guided, judges, nuisance: measures of the winners.
        diversity: mean pairwise 1 - cosine of features in the set of the best that is returned, 0 for a single one;
            ``None`` like the nuisance of a recorded pool, which holds no pixels.
        returned, ancestors: candidates in that set, and initial candidates that they descend from.
        stopped: how the runs ended.
    """

    reward: str
    search: str
    budget: float
    unit: str
    prompts: int
    images: float
    seconds: float
    ledger: Mapping[str, Any]
    equal_seconds: float
    beyond_pool: bool
    worth_nfe: Interval
    worth_seconds: Interval
    beyond_reward: bool
    guided: Measure
    judges: Mapping[str, Measure]
    nuisance: Mapping[str, Measure]
    diversity: Measure | None
    returned: float
    ancestors: float
    stopped: Mapping[str, int]

    @property
    def name(self) -> str:
        return f"{self.search} at {self.budget:g} {self.unit}"

    @property
    def measures(self) -> dict[str, Measure]:
        """The guided reward and the judges, by name."""
        return {self.reward: self.guided, **self.judges}


class Bar:
    """Best-of-n for all n at once, from one pool a prompt: its candidates are the first n.

    Attributes:
        one: model rows a candidate.
        seconds: (P, S) what the first n took.
        pool: measure -> (P, S) of each candidate; NaN where it failed.
        curve: measure -> (P, S) of the best of the first n by the guided reward.
    """

    def __init__(self, pools: Sequence[Record], clock: str = "wall") -> None:
        self.records, self.one, self.clock = pools, pools[0]["one"], clock
        self.size = len(pools[0]["score"])
        n = np.arange(1, self.size + 1)
        self.seconds = np.array([np.interp(n, [0, *r["clock"]["n"]], [0, *r["clock"][clock]]) for r in pools])
        named = {name: [r[of][name] for r in pools] for of in ("judges", "nuisance") for name in pools[0][of]}
        named["score"] = [r["score"] for r in pools]
        self.pool = {name: np.array(values, dtype=float) for name, values in named.items()}
        scores = np.where(np.isfinite(self.pool["score"]), self.pool["score"], -np.inf)
        self.best = np.stack([scores[:, :k].argmax(1) for k in n], axis=1)
        self.curve = {name: np.take_along_axis(values, self.best, 1) for name, values in self.pool.items()}
        self.curve["diversity"] = np.array([r["diversity"] for r in pools], dtype=float)

    def runs(self, budget: float, unit: str) -> list[dict[str, Any]]:
        """Records of best-of-n as a search: the largest n that fits the budget (of seconds: on average)."""
        fits = (np.arange(1, self.size + 1) if unit == "images" else self.seconds.mean(0)) <= budget + ROUNDING
        n = max(1, int(fits.sum()))
        return [self._run(p, n, budget, unit) for p in range(len(self.records))]

    def _run(self, p: int, n: int, budget: float, unit: str) -> dict[str, Any]:
        pool, best = self.records[p], int(self.best[p, n - 1])
        share = {k: v * self.seconds[p, n - 1] / self.seconds[p, -1] for k, v in pool["ledger"]["seconds"].items()}
        return {
            **{k: pool[k] for k in ("prompt", "prompt_id", "tag", "reward")},
            "search": BAR,
            "budget": budget,
            "unit": unit,
            **{of: {name: pool[of][name][best] for name in pool[of]} for of in ("judges", "nuisance")},
            "score": pool["score"][best],
            "seconds": {self.clock: self.seconds[p, n - 1]},
            "ledger": {"nfe": n * self.one, "decodes": n, "scores": n, "seconds": share},
            "diversity": pool["diversity"][n - 1],
            "returned": min(n, pool["returned"]),
            "ancestors": min(n, pool["returned"]),
            "winner": str(best),
            "seed": pool["seed"][best],
            "stopped": "done",
        }


@dataclass(frozen=True)
class Comparison:
    """Searches measured side by side; everything is computed from ``records``.

    Args:
        config: what was compared: model, call, seed, notes on judges.
        records: what :func:`visearch.compare.compare` measured: one a prompt, search, budget and reward.
        searches: (label, budget, unit) to show, in order; default all that the records hold.
        margin: a judge may lose less than this, and the search still counts as non-inferior.
        refused: search -> why the generator cannot serve it.
        clock: what seconds are. ``"wall"``; ``"cpu"``, core-seconds of the process: the fairer one where other work
            shares the machine, and the model runs on the CPU; ``"model"``, those in models and rewards alone, which is
            what a recorded pool knows. Seconds by kind of work are always wall.

    Raises:
        ValueError: an unknown clock.
        RuntimeError: when read: no prompt has a record of everything.
    """

    config: Mapping[str, Any]
    records: Sequence[Record]
    searches: tuple[tuple[str, float, str], ...] = ()
    margin: float = 0.02
    refused: Mapping[str, str] = field(default_factory=dict)
    clock: str = "wall"

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise ValueError(f"clock={self.clock!r} is unknown; use one of {', '.join(CLOCKS)}")

    @cached_property
    def rewards(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r["reward"] for r in self.records))

    @cached_property
    def judges(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for r in self.records if r["unit"] == POOL for name in r["judges"]))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Reward by reward and budget by budget, best-of-n first."""
        if not self.records:
            raise RuntimeError("nothing is measured yet; let the comparison run")
        rows = []
        for reward in self.rewards:
            bar, groups = self.measured(reward)
            rows += [self._row(bar, runs) for runs in groups]
        return tuple(rows)

    @cached_property
    def failures(self) -> dict[str, tuple[str, ...]]:
        """Search -> its errors. What failed on a prompt is in no table: its other prompts may be the easy ones."""
        failed: dict[str, list[str]] = {}
        for r in self.records:
            if "error" in r:
                failed.setdefault(r["search"], []).append(f"{r['prompt']!r}, {r['budget']:g} {r['unit']}: {r['error']}")
        return {search: tuple(errors) for search, errors in failed.items()}

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Where the guided reward rises and a judge falls: both intervals exclude 0, or only the means do ("possible").

        Over one sample this is the reward's own fault, over best-of-n the search's.
        """
        sure, possible = [], []
        for row in self.rows:
            for name, judge in row.judges.items():
                if found := hacking(row.reward, row.guided.over, name, judge.over):
                    what, certain = found
                    text = f"reward hacking: {row.name}: {what}"
                    (sure if certain else possible).append(text if certain else f"possible {text}")
        return (*sure, *possible)

    @cached_property
    def correlations(self) -> dict[str, dict[str, float | None]]:
        """Reward -> nuisance factor or judge -> its correlation with the reward within prompts, in best-of-n's pool."""
        found = {}
        for reward in self.rewards:
            bar, _ = self.measured(reward)
            names = (name for name in bar.pool if name != "score")
            found[reward] = {name: _within(bar.pool["score"], bar.pool[name]) for name in names}
        return found

    def measured(self, reward: str) -> tuple[Bar, list[list[Record]]]:
        """Best-of-n, and one list of P records for each row, prompts in the same order."""
        mine = [r for r in self.records if r["reward"] == reward and "error" not in r]
        pools = {r["prompt_id"]: r for r in mine if r["unit"] == POOL}
        found = {(r["prompt_id"], r["search"], r["budget"], r["unit"]): r for r in mine if r["unit"] != POOL}
        shown = self.searches or tuple(dict.fromkeys(key[1:] for key in found))
        shown = [entry for entry in shown if entry[0] not in self.failures]
        whole = [p for p in pools if all((p, *entry) in found for entry in shown)]
        if not whole:
            raise RuntimeError(f"no prompt has a record of every search guided by {reward}; let the comparison run on")
        bar, groups = Bar([pools[p] for p in whole], self.clock), []
        for budget, unit in dict.fromkeys(entry[1:] for entry in shown):
            groups.append(bar.runs(budget, unit))
            groups += [[found[p, *entry] for p in whole] for entry in shown if entry[1:] == (budget, unit)]
        return bar, groups

    def _row(self, bar: Bar, runs: Sequence[Record]) -> Row:
        first, count = runs[0], len(runs)
        seconds, nfe = np.array([r["seconds"][self.clock] for r in runs]), np.array([r["ledger"]["nfe"] for r in runs])
        n, paced = nfe.mean() / bar.one, bar.seconds.mean(0)
        beyond = bool(seconds.mean() > paced[-1] + ROUNDING)
        plain = first["search"] == BAR

        def measure(name: str, values: Sequence[Any], judge: bool = False) -> Measure:
            found = _measure(np.array(values, dtype=float), name, bar, None if plain else seconds, n)
            return _judged(found, values, bar.pool[name], n, self.margin, beyond) if judge else found

        kinds: Counter[str] = Counter()
        for r in runs:
            kinds.update(r["ledger"]["seconds"])
        ledger = {k: sum(r["ledger"][k] for r in runs) / count for k in ("nfe", "decodes", "scores")}
        guided = measure("score", [r["score"] for r in runs])
        worth = _worth(np.array([r["score"] for r in runs], dtype=float), nfe, seconds, bar)
        return Row(
            **{k: first[k] for k in ("reward", "search", "budget", "unit")},
            prompts=count,
            images=float(n),
            seconds=float(seconds.mean()),
            ledger={**ledger, "seconds": {k: v / count for k, v in kinds.items()}},
            equal_seconds=float(curve_reach(paced, seconds.mean())),
            beyond_pool=beyond,
            worth_nfe=worth[0],
            worth_seconds=worth[1],
            beyond_reward=worth[2],
            guided=guided,
            judges={j: measure(j, [r["judges"][j] for r in runs], judge=True) for j in self.judges},
            nuisance={f: measure(f, [r["nuisance"][f] for r in runs]) for f in first["nuisance"]},
            diversity=measure("diversity", [r["diversity"] for r in runs]) if first["nuisance"] else None,
            returned=sum(r["returned"] for r in runs) / count,
            ancestors=sum(r["ancestors"] for r in runs) / count,
            stopped=dict(Counter(r["stopped"] for r in runs)),
        )

    # --- what is left behind

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: configuration, rows, warnings, what was refused or failed."""
        plain = ("config", "margin", "clock", "warnings", "correlations", "failures", "refused")
        content = {name: getattr(self, name) for name in plain}
        return {**content, "level": LEVEL, "rows": [asdict(row) for row in self.rows]}

    def csv(self) -> str:
        """One line a prompt, search, budget and reward, best-of-n at each budget among the searches."""
        text = io.StringIO()
        writer = None
        for r in (r for reward in self.rewards for runs in self.measured(reward)[1] for r in runs):
            line = {k: r[k] for k in ("reward", "search", "budget", "unit", "prompt", "tag", "score")}
            line |= {**r["judges"], **{k: r["ledger"][k] for k in ("nfe", "decodes", "scores")}, **r["nuisance"]}
            line["seconds"] = r["seconds"][self.clock]
            line |= {k: r[k] for k in ("diversity", "returned", "ancestors", "winner", "seed", "stopped")}
            writer = writer or csv.DictWriter(text, line, lineterminator="\n")
            if not text.tell():
                writer.writeheader()
            writer.writerow(line)
        return text.getvalue()

    def markdown(self) -> str:
        """The summary: costs, gains, judges, sets, and what to beware of."""
        return "\n\n".join([_head(self), *(_section(self, reward) for reward in self.rewards), *_remarks(self)]) + "\n"

    def figure(self, reward: str | None = None) -> Any:
        """A matplotlib figure: reward and judges against image-equivalents and against seconds.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from visearch.figures import tradeoff

        return tradeoff(self, reward or self.rewards[0])

    def save(self, folder: str | Path) -> None:
        """Write per-prompt.csv, summary.md, summary.json and, with one picture a reward, comparison.png."""
        folder = Path(folder)
        write_json(folder / "summary.json", self.as_dict())
        (folder / "per-prompt.csv").write_text(self.csv())
        (folder / "summary.md").write_text(self.markdown())
        for i, reward in enumerate(self.rewards):
            self.figure(reward).savefig(folder / f"comparison{f'-{i + 1}' * bool(i)}.png", dpi=150)


# --- statistics -----------------------------------------------------------------------------------------------


def _measure(values: np.ndarray, name: str, bar: Bar, seconds: np.ndarray | None, n: float) -> Measure:
    """``seconds`` (P,) is ``None`` for best-of-n itself, ``n`` the candidates that cost as many model rows."""
    curve = bar.curve[name]
    ok = np.isfinite(values) & np.isfinite(curve).all(1)  # where a sample failed, the prompt says nothing
    if not ok.any():
        raise ValueError(f"{name} failed on every prompt; there is nothing to compare")
    values, curve, over = values[ok], curve[ok], {}
    if name in bar.pool:
        over[ONCE] = paired_interval(values, np.nanmean(bar.pool[name][ok], axis=1))
    if seconds is not None:
        over[NFE] = paired_interval(values, curve_at(curve, n))
        over[SECONDS] = _over_equal_seconds(values, seconds[ok], curve, bar.seconds[ok])
    return Measure(mean_interval(values), over)


def _judged(found: Measure, values: Sequence[Any], pool: np.ndarray, n: float, margin: float, beyond: bool) -> Measure:
    picked, first = np.array(values, dtype=float), pool[:, : max(1, int(n + ROUNDING))]
    ok = np.isfinite(picked) & np.isfinite(first).any(1)
    mean, oracle = np.nanmean(first[ok], axis=1), np.nanmax(first[ok], axis=1)
    verdicts = {}
    for reference in (NFE, SECONDS):
        if (interval := found.over.get(reference)) is not None:
            verdict = "yes" if interval.low > -margin else "no" if interval.high < -margin else "undecided"
            too_low = beyond and reference == SECONDS and verdict == "yes"
            verdicts[reference] = "undecided" if too_low else verdict
    recovery = ratio_interval(picked[ok] - mean, oracle - mean) if (oracle - mean).sum() > 0 else None
    return Measure(found.mean, found.over, verdicts, float(oracle.mean()), recovery)


def _over_equal_seconds(values: np.ndarray, seconds: np.ndarray, curve: np.ndarray, clock: np.ndarray) -> Interval:
    """Mean of ``values`` (P,) minus best-of-n at the one n that takes as long in all, found anew in each draw."""
    size = curve.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        value, spent, paced, best = np.split(sums, [1, 2, 2 + size], axis=1)
        return (value[:, 0] - curve_at(best, curve_reach(paced, spent[:, 0]))) / len(values)

    return resampled_interval(np.column_stack([values, seconds, clock, curve]), difference)


def _worth(values: np.ndarray, nfe: np.ndarray, seconds: np.ndarray, bar: Bar) -> tuple[Interval, Interval, bool]:
    """Model rows and seconds of the best-of-n with the same mean reward, over those spent; and whether none has it."""
    curve = bar.curve["score"]
    ok = np.isfinite(values) & np.isfinite(curve).all(1)
    values, curve = values[ok], curve[ok]

    def in_seconds(sums: np.ndarray) -> np.ndarray:
        value, spent, paced, best = np.split(sums, [1, 2, 2 + bar.size], axis=1)
        return curve_at(paced, curve_reach(best, value[:, 0])) / spent[:, 0]

    rows = worth_interval(values, nfe[ok] / bar.one, curve)
    paced = resampled_interval(np.column_stack([values, seconds[ok], bar.seconds[ok], curve]), in_seconds)
    return rows, paced, bool(values.mean() > curve[:, -1].mean() + ROUNDING)


def _within(a: np.ndarray, b: np.ndarray) -> float | None:
    """Correlation of deviations from the prompt's mean, (P, S) each; ``None`` where one of them is constant."""
    whole = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    x, y = ((v[whole] - v[whole].mean(1, keepdims=True)).ravel() for v in (a, b))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else None


class Kendall(NamedTuple):
    """tau-b in [-1, 1] of two rankings, its two-sided p value, and the pairs (better by ours, better by theirs)."""

    tau: float
    p: float
    reversals: tuple[tuple[str, str], ...]


def kendall(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Kendall:
    """Rank correlation of two tables of scores over the names that both hold; higher is better in both.

    Raises:
        ValueError: fewer than two names are shared, or a shared score is not finite.
    """
    from scipy.stats import kendalltau

    names = [name for name in ours if name in theirs]
    a, b = (np.array([table[n] for n in names], dtype=float) for table in (ours, theirs))
    if len(names) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"ours and theirs share {names}; a ranking needs two names or more, with finite scores")
    tau, p = kendalltau(a, b)
    pairs = np.argwhere((a[:, None] > a) & (b[:, None] < b))
    return Kendall(float(tau), float(p), tuple((names[i], names[j]) for i, j in pairs))


# --- the summary ----------------------------------------------------------------------------------------------


def _head(of: Comparison) -> str:
    count, asked = of.rows[0].prompts, of.config.get("prompts", of.rows[0].prompts)
    parts = [
        f"# Searches on {of.config.get('model', 'this model')}",
        f"{count}{f' of {asked}' * (asked > count)} prompts, seed {of.config.get('seed')}; intervals are {LEVEL:.0%}, "
        f"paired, over prompts; seconds are {CLOCKS[of.clock]}. A judge's margin of non-inferiority is {of.margin:g}. "
        "The bar is best-of-n: the first n candidates of one pool, drawn from the same seeds; fractions of a candidate "
        "are interpolated. A search is worth x rows or seconds if best-of-n takes x times as many for the same mean "
        "reward.",
    ]
    return "\n\n".join([*parts, *of.config.get("notes", ())])


def _section(of: Comparison, reward: str) -> str:
    rows = [row for row in of.rows if row.reward == reward]
    known = of.config.get("exams", {}).get(reward, ())
    parts = [f"## Guided by {reward}", _costs(rows)]
    parts += [
        f"### {name}{'' if name == reward else ' (not held-out)' if name in known else ' (held out)'}\n\n"
        + _gains(rows, name)
        for name in rows[0].measures
    ]
    return "\n\n".join([*parts, f"### Sets and pixels\n\n{_sets(rows)}"])


def _costs(rows: Sequence[Row]) -> str:
    heads = ("budget", "search", "images", "decodes", "scores", "seconds", "% denoiser, decode, reward, other",
             "best-of-n in these seconds")  # fmt: skip
    lines = []
    for row in rows:
        spent = row.ledger["seconds"]
        parts = [100 * spent.get(kind, 0.0) / spent["total"] for kind in ("denoiser", "decode", "reward")]
        shares = ", ".join(f"{v:.0f}" for v in (*parts, 100 - sum(parts)))
        n = f"{'> ' * row.beyond_pool}{row.equal_seconds:.2f}"
        counts = (f"{v:.4g}" for v in (row.images, row.ledger["decodes"], row.ledger["scores"]))
        lines.append((f"{row.budget:g} {row.unit}", row.search, *counts, f"{row.seconds:.3g}", shares, n))
    return markdown_table(heads, lines)


def _gains(rows: Sequence[Row], name: str) -> str:
    judged = name in rows[0].judges
    heads = ["budget", "search", "mean", f"over {ONCE}", f"over {NFE}", f"over {SECONDS}"]
    heads += ["non-inferior: rows, seconds", "oracle", "recovery"] if judged else ["worth x rows", "worth x seconds"]
    lines = []
    for row in rows:
        m = row.measures[name]
        cells = [f"{row.budget:g} {row.unit}", row.search, f"{m.mean.mean:.4g}"]
        cells += [signed(m.over.get(reference)) for reference in (ONCE, NFE, SECONDS)]
        if judged:
            recovery = "" if m.recovery is None else f"{m.recovery:.0%}"
            cells += [", ".join(m.noninferior.values()), f"{m.oracle:.3f}", recovery]
        elif row.guided.over.get(NFE):
            more = "> " * row.beyond_reward
            cells += [f"{more}{w:.2f}" for w in (row.worth_nfe, row.worth_seconds)]
        else:
            cells += ["1", "1"]
        lines.append(cells)
    return markdown_table(heads, lines)


def _sets(rows: Sequence[Row]) -> str:
    factors = [*rows[0].nuisance]
    heads = ["budget", "search", "returned", "ancestors"]
    heads += ["diversity", f"over {NFE}", *(f"{factor} over {ONCE}" for factor in factors)] if factors else []
    lines = []
    for row in rows:
        cells = [f"{row.budget:g} {row.unit}", row.search, f"{row.returned:.2f}", f"{row.ancestors:.2f}"]
        if row.diversity is not None:
            cells += [f"{row.diversity.mean.mean:.4g}", signed(row.diversity.over.get(NFE))]
        lines.append([*cells, *(signed(row.nuisance[factor].over[ONCE]) for factor in factors)])
    return markdown_table(heads, lines)


def _remarks(of: Comparison) -> list[str]:
    parts = []
    for reward, found in of.correlations.items():
        known = ", ".join(f"{name} {value:+.2f}" for name, value in found.items() if value is not None)
        parts.append(f"Within a prompt, {reward} correlates with: {known}.")
    short = [row for row in of.rows if row.unit == "images" and row.images < 0.9 * row.budget]
    spent = [f"{row.name} spent {row.images:.3g}" for row in short]
    over = [row.name for row in of.rows if row.beyond_pool]
    lists = {
        "Beware": of.warnings,
        "Left budget unspent; a larger n may use it": spent,
        "Took longer than best-of-n's whole pool, so the bar at equal seconds is too low; enlarge --pool-size": over,
        "Refused by this generator": [f"{search}: {reason}" for search, reason in of.refused.items()],
        "Failed, and in no table": [f"{search}: {'; '.join(errors)}" for search, errors in of.failures.items()],
    }
    for title, lines in lists.items():
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in dict.fromkeys(lines)))
    return parts
