"""Pictures of what was measured. They need matplotlib, which is loaded when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from visearch.statistics import LEVEL, Interval, paired_interval

if TYPE_CHECKING:
    from visearch.comparison import Comparison

__all__ = ["tradeoff"]

INK, MUTED, GRID = "#1b1f24", "#667085", "#e4e7ec"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195")  # after Okabe and Ito
MARKERS = "os^DvPX<>*"
DODGE = 0.012  # share of the axis
LEGEND = 140  # characters of names that fit into a line of the legend
SECONDS = {
    "wall": "seconds a prompt",
    "cpu": "core-seconds a prompt",
    "model": "seconds a prompt in models and rewards",
}


def tradeoff(of: Comparison, reward: str) -> Any:
    """Gain over one sample of the reward and of each judge, a line each: best-of-n as a curve, searches as points.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from visearch.comparison import ONCE

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install it with: pip install 'visearch[plots]'") from error

    bar, _ = of.measured(reward)
    rows = [row for row in of.rows if row.reward == reward]
    searched = [row for row in rows if len(row.guided.over) > 1]
    styles = {label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
              for i, label in enumerate(dict.fromkeys(row.search for row in searched))}  # fmt: skip
    names = list(rows[0].measures)
    columns = min(len(styles) + 1, max(1, LEGEND // max(map(len, [*styles, "best-of-n"]))))
    lines = math.ceil((len(styles) + 1) / columns)
    figure = Figure(figsize=(12, 1.2 + 2.7 * len(names) + 0.2 * lines), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False, sharex="col", sharey="row")
    for name, (left, right) in zip(names, panels, strict=True):
        key = "score" if name == reward else name
        one = np.nanmean(bar.pool[key], axis=1)
        ok = np.isfinite(bar.curve[key]).all(1)
        gains = [paired_interval(column[ok], one[ok]) for column in bar.curve[key].T]
        for axis, x in ((left, np.arange(1, bar.size + 1)), (right, bar.seconds.mean(0))):
            _curve(axis, x, gains)
        for place, (label, style) in enumerate(styles.items()):
            mine = [row for row in searched if row.search == label]
            over = [row.measures[name].over[ONCE] for row in mine]
            aside = (place - (len(styles) - 1) / 2) * DODGE * bar.size  # most spend the same rows
            _points(left, [row.images + aside for row in mine], over, label, style)
            _points(right, [row.seconds for row in mine], over, label, style)
        kind = "guides the search" if name == reward else "held out"
        left.set_ylabel(f"{name}\n({kind})", color=INK)
    for axis, label in zip(
        panels[-1], ("image-equivalents a prompt (model rows; equal ones side by side)", SECONDS[of.clock]), strict=True
    ):
        axis.set_xlabel(label, color=INK)
        axis.set_xlim(left=0)
    figure.suptitle(
        f"{of.config.get('model', '')}: gain over one sample, guided by {reward}; {rows[0].prompts} prompts, "
        f"{LEVEL:.0%} intervals",
        color=INK,
    )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _curve(axis: Any, x: np.ndarray, gains: Sequence[Interval]) -> None:
    axis.fill_between(x, [g.low for g in gains], [g.high for g in gains], color=MUTED, alpha=0.2, linewidth=0)
    axis.plot(x, [g.mean for g in gains], color=INK, linewidth=1.8, label="best-of-n", zorder=2)
    axis.axhline(0, color=MUTED, linewidth=0.8, linestyle=":")
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _points(axis: Any, x: Sequence[float], over: Sequence[Interval], label: str, style: tuple[str, str]) -> None:
    colour, marker = style
    mean = np.array([i.mean for i in over])
    spread = [mean - [i.low for i in over], [i.high for i in over] - mean]
    axis.errorbar(x, mean, spread, color=colour, marker=marker, markersize=7, markeredgecolor="white", capsize=2.5,
                  elinewidth=1.1, linewidth=0.6, linestyle=":", label=label, zorder=3)  # fmt: skip
