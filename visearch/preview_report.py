"""Whether a reward that was trained on previews ranks them better than before, and what that is worth in a search.

Measures of TTSnap (arXiv 2511.22242): Kendall's tau-b of previews and finished images within a prompt, how often the
best survives a check, and halving's gain over best-of-N at equal honest cost.

Shapes: P prompts, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from visearch.calibrate import LEAST_SEEDS, calibrate
from visearch.calibration import Calibration
from visearch.pool import Pool
from visearch.report import markdown_table
from visearch.statistics import Interval, paired_interval

__all__ = ["Level", "Report", "evaluate", "levels", "omega", "priced", "rank_correlation", "survival"]

SHARES = np.arange(0.05, 0.951, 0.05)  # that a check may keep


def rank_correlation(scores: np.ndarray, finals: np.ndarray) -> np.ndarray:
    """(P,) Kendall's tau-b of (P, S) previews and (P, S) finished images; 0 where all previews score the same."""
    from scipy.stats import kendalltau

    found = [kendalltau(a, b).statistic for a, b in zip(scores, finals, strict=True)]
    return np.nan_to_num(np.array(found, dtype=np.float64))


def survival(scores: np.ndarray, finals: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """What keeping the ``max(1, floor(share S))`` best previews (P, S) costs.

    Returns:
        (P,) whether the best finished image is among them, and (P,) how far the best among them falls behind it.
    """
    kept = max(1, int(share * scores.shape[1] + 1e-9))
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    best = np.take_along_axis(finals, rows, 1).max(1)
    return best == finals.max(1), finals.max(1) - best


@dataclass(frozen=True)
class Level:
    """How previews of one stage rank what they become, by the frozen and by the trained reward.

    Attributes:
        stage, log_snr: which.
        tau: reward -> mean Kendall's tau-b within prompts; gain: trained - frozen, paired.
        survival: reward -> share of prompts whose best survives keeping a quarter.
        averaged: the same, mean over keeping .05 to .95.
        gap: reward -> how far the best of the kept quarter falls behind the best.
    """

    stage: int
    log_snr: float
    tau: dict[str, float]
    gain: Interval
    survival: dict[str, float]
    averaged: dict[str, float]
    gap: dict[str, float]


def levels(pool: Pool) -> list[Level]:
    """Every stage but the last of a pool with the frozen and the trained reward, in this order."""
    found, finals = [], pool.final(next(iter(pool.scores)))
    for j, (stage, level) in enumerate(zip(pool.stages[:-1], pool.meta["noise_levels"], strict=True)):
        seen = {name: table[..., j] for name, table in pool.scores.items()}
        tau = {name: rank_correlation(scores, finals) for name, scores in seen.items()}
        quarter = {name: survival(scores, finals, 0.25) for name, scores in seen.items()}
        every = {name: np.mean([survival(s, finals, share)[0] for share in SHARES]) for name, s in seen.items()}
        before, after = tau.values()
        found.append(
            Level(
                stage,
                level,
                {name: float(v.mean()) for name, v in tau.items()},
                paired_interval(after, before),
                {name: float(alive.mean()) for name, (alive, _) in quarter.items()},
                {name: float(v) for name, v in every.items()},
                {name: float(behind.mean()) for name, (_, behind) in quarter.items()},
            )
        )
    return found


def omega(values: Sequence[float], base: Sequence[float], budgets: Sequence[float]) -> float:
    """100 (area of a search - area of best-of-N) / area of best-of-N, above best-of-N's value at the smallest budget.

    It depends on the window of budgets: the multiplier says more.

    Args:
        values, base: reward of the search and of best-of-N at each of the budgets, which ascend.
    """
    from scipy.integrate import simpson

    area = simpson(np.asarray(base) - base[0], x=budgets)
    return float(100 * (simpson(np.asarray(values) - base[0], x=budgets) - area) / area)


@dataclass(frozen=True)
class Report:
    """What training was worth on prompts that it never saw.

    Attributes:
        levels: one a stage.
        calibrations: reward -> schedules of halving that it guides, at honest cost; empty for a pool too small.
        omegas: reward -> schedule -> omega over the calibrated budgets.
    """

    levels: list[Level]
    calibrations: dict[str, Calibration]
    omegas: dict[str, dict[str, float]]

    def markdown(self) -> str:
        (frozen, trained), show = self.levels[0].tau, "{:.3f}".format
        heads = ["stage", "log-SNR", "tau", "trained", "gain (95 %)", "best survives a quarter", "trained"]
        heads += ["averaged over .05 to .95", "trained", "gap at a quarter", "trained"]
        lines = [
            [of.stage, f"{of.log_snr:.2f}", show(of.tau[frozen]), show(of.tau[trained]), f"{of.gain:+.3f}"]
            + [show(v[name]) for v in (of.survival, of.averaged, of.gap) for name in (frozen, trained)]
            for of in self.levels
        ]
        text = [f"## Previews against finished images: {frozen}, and trained\n", markdown_table(heads, lines), ""]
        return "\n".join(text + self._schedules())

    def _schedules(self) -> list[str]:
        if not self.calibrations:
            return ["Too few prompts or seeds for schedules."]
        measures = next(iter(self.calibrations.values())).measures[1:]
        heads = ["N", "guide", "schedule", "search", "reward", "over best-of-N (95 %)", "worth N x (95 %)", "omega"]
        lines = []
        for name, found in self.calibrations.items():
            for of in found.entries:
                if of.name == "best-of-n" and lines and lines[0][1] != name:
                    continue  # the same for every guide
                own = self.omegas[name].get(of.name)
                line = [of.budget, name, of.name, f"`{of.search}`", f"{of.values[name]:.3f}", f"{of.over[name]:+.3f}"]
                line += [f"{of.multiplier:.2f}", "" if own is None else f"{own:.1f}"]
                lines.append([*line, *(f"{of.over[m]:+.3f}" for m in measures)])
        lines.sort(key=lambda line: line[0])
        table = markdown_table([*heads, *(f"{m} over it (95 %)" for m in measures)], lines)
        return ["## Halving at the honest cost of best-of-N\n", table]


def evaluate(pool: Pool, budgets: Sequence[int] | None = None) -> Report:
    """Judge a trained reward by a pool of prompts that it never saw.

    Args:
        pool: scores of the frozen and of the trained reward, in this order; 32 x 32 or more for numbers that mean much.
        budgets: as in :func:`visearch.calibrate.calibrate`.
    """
    calibrations, omegas = {}, {}
    if min(pool.seeds.shape) >= LEAST_SEEDS:
        for name in pool.scores:
            found = calibrations[name] = calibrate(priced(pool, name), name, budgets)
            by_name: dict[str, dict[int, float]] = {}
            for entry in found.entries:
                by_name.setdefault(entry.name, {})[entry.budget] = entry.values[name]
            base = by_name["best-of-n"]
            omegas[name] = {
                schedule: omega(list(values.values()), list(base.values()), list(base))
                for schedule, values in by_name.items()
                if values.keys() == base.keys() and len(base) > 1
            }
    return Report(levels(pool), calibrations, omegas)


def priced(pool: Pool, name: str) -> Pool:
    """The pool with the price of one of its rewards, where its seconds were measured."""
    seconds = pool.meta["seconds"]
    return replace(pool, price=(seconds["decode"] + seconds[name]) / seconds["row"])
