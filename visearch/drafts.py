"""Thresholds of cached drafts (arXiv 2607.23159): how many model calls may be skipped and the best seed still be found.

Shapes: A settings of the cache, P prompts, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from visearch.report import markdown_table
from visearch.statistics import Interval, ratio_interval

__all__ = ["Drafts", "calibrate_drafts", "draft_halves", "draft_table"]


@dataclass(frozen=True)
class Drafts:
    """What cheap drafts capture of the gain of full runs, by the setting of their step cache.

    Attributes:
        settings: thresholds, or names of caches, the most careful first.
        skipped: share of the model calls that each saves.
        capture: (full score of the draft's pick - mean) / (best - mean), of sums over prompts.
        level: capture that was asked for.
        chosen: the setting that skips most and still captures ``level``, or ``None``.
    """

    settings: tuple[float | str, ...]
    skipped: tuple[float, ...]
    capture: tuple[Interval, ...]
    level: float
    chosen: float | str | None


def calibrate_drafts(
    drafts: Mapping[float | str, ArrayLike],
    full: ArrayLike,
    skipped: Mapping[float | str, float],
    level: float = 0.9,
) -> Drafts:
    """The largest threshold whose drafts still find what full runs would (2607.23159).

    Args:
        drafts: setting of the cache, such as its threshold -> (P, S) scores of drafts, by seed.
        full: (P, S) scores of full runs of the same seeds; 25 x 8 is usual.
        skipped: setting -> share of the model calls that the cache skipped, in [0, 1); the larger, the cheaper.
        level: capture that is asked for.

    Raises:
        ValueError: shapes that differ, values that are not finite, other settings in ``skipped``, or no gain to
            capture.
    """
    whole = np.asarray(full, dtype=np.float64)
    if whole.ndim != 2 or whole.shape[1] < 2 or not np.isfinite(whole).all():
        raise ValueError(f"full has shape {whole.shape}; give finite scores (prompts, seeds) of at least two seeds")
    if set(drafts) != set(skipped) or not drafts:
        raise ValueError(f"skipped has settings {list(skipped)} and drafts {list(drafts)}; give one share each")
    best = whole.max(1) - whole.mean(1)
    if not best.sum() > 0:
        raise ValueError("full has no candidate above its prompt's mean: there is no gain to capture")
    found, settings = [], sorted(drafts, key=skipped.__getitem__)
    for setting in settings:
        scores = np.asarray(drafts[setting], dtype=np.float64)
        if scores.shape != whole.shape or not np.isfinite(scores).all() or not 0 <= skipped[setting] < 1:
            raise ValueError(
                f"{setting}: drafts have shape {scores.shape} and skip {skipped[setting]}; give finite scores of shape "
                f"{whole.shape} and a share in [0, 1)"
            )
        picked = np.take_along_axis(whole, scores.argmax(1)[:, None], 1)[:, 0] - whole.mean(1)
        found.append(ratio_interval(picked, best))
    enough = [s for s, capture in zip(settings, found, strict=True) if capture.mean >= level]
    shares = tuple(skipped[s] for s in settings)
    return Drafts(tuple(settings), shares, tuple(found), level, enough[-1] if enough else None)


def draft_halves(path: str | Path) -> tuple[Drafts, Drafts]:
    """Drafts of the even prompts, which choose, and of the odd ones.

    Args:
        path: ``.npz`` with arrays full (P, S), drafts (A, P, S), skipped (A,) and settings (A,), as in
            :func:`calibrate_drafts`.

    Raises:
        ValueError: arrays that are missing, or do not fit each other.
    """
    arrays = {"full", "drafts", "skipped", "settings"}
    with np.load(path, allow_pickle=False) as file:
        if not arrays <= set(file):
            raise ValueError(f"--drafts {path} holds {', '.join(file)}; it needs {', '.join(sorted(arrays))}")
        full, drafts, skipped, names = (file[name] for name in ("full", "drafts", "skipped", "settings"))
    if not (full.ndim == 2 and drafts.shape == (len(names), *full.shape) and skipped.shape == names.shape):
        raise ValueError(
            f"--drafts {path}: drafts have shape {drafts.shape}, full {full.shape}, skipped {skipped.shape}, settings "
            f"{names.shape}; give (settings, prompts, seeds), (prompts, seeds), and one share and name a setting"
        )
    shares = dict(zip(names.tolist(), skipped.tolist(), strict=True))
    halves = (slice(0, None, 2), slice(1, None, 2))
    even, odd = (calibrate_drafts(dict(zip(shares, drafts[:, h], strict=True)), full[h], shares) for h in halves)
    return even, odd


def draft_table(even: Drafts, odd: Drafts) -> str:
    """Markdown: what each setting skips and captures, and which one the even prompts chose."""
    unseen = dict(zip(odd.settings, odd.capture, strict=True))
    lines = [
        (setting, f"{skipped:.2f}", f"{capture:.2f}", f"{unseen[setting]:.2f}")
        for setting, skipped, capture in zip(even.settings, even.skipped, even.capture, strict=True)
    ]
    heads = ("setting", "skipped", "captures, even prompts (95 %)", "captures, odd prompts (95 %)")
    choice = f"chosen: {even.chosen}" if even.chosen is not None else "none captures enough: draft without a cache"
    return (
        f"## Drafts with a step cache\n\n{markdown_table(heads, lines)}\n\n"
        f"{choice} (asked for {even.level} on the even prompts)"
    )
