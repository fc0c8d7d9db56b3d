"""What a particle's log-weight grows by (FK steering, arXiv 2501.06848; temper "das" of DAS, 2501.05803)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from visearch.protocols import Population

SPREAD = 4.5  # times the standard deviation of a prompt's scores, where no scale is given
POTENTIALS = ("current", "difference", "max", "sum")
TEMPERS: dict[str, Callable[[int, int], float]] = {
    "constant": lambda stage, end: 1.0,
    "linear": lambda stage, end: 2 * stage / end,
    "das": lambda stage, end: min(2 ** (stage / (0.87 * end)) - 1, 1.0),  # (1 + gamma)^stage - 1, 1 at 0.87 T
}


def potentials(
    potential: str, temper: str, history: Sequence[tuple[int, float]], scale: float, end: int
) -> list[float]:
    """Phi of each (stage, score) of one ancestry; they sum to ``scale`` times the score at ``end``.

    A failed score, -inf, has Phi = -inf and counts nowhere else.
    """
    made: list[float] = []
    total = before = 0.0
    seen: list[float] = []
    for stage, score in history:
        if score == -math.inf:
            made.append(score)
            continue
        seen.append(score)
        final = stage == end
        b = 1.0 if final else TEMPERS[temper](stage, end)
        if potential == "difference":
            phi, before = scale * b * score - before, scale * b * score
        elif final:
            phi = scale * score - total
        else:
            phi = scale * b * {"current": lambda v: v[-1], "max": max, "sum": sum}[potential](seen)
        total += phi
        made.append(phi)
    return made


def latest_potentials(rows: Population, scale: Sequence[float], potential: str, temper: str, end: int) -> torch.Tensor:
    """(B,) Phi of each row's latest event; 0 where its prompt has no scale yet, since only differences count."""
    scales = [scale[p] for p in rows.prompt.tolist()]
    pairs = zip(rows.history, scales, strict=True)
    return torch.tensor([0.0 if math.isnan(s) else potentials(potential, temper, h, s, end)[-1] for h, s in pairs])


def spread_scales(scale: Sequence[float], rows: Population, prompts: Sequence[int]) -> tuple[float, ...]:
    """The scale of each prompt; where one of ``prompts`` has none, NaN, by the spread of its scores if they differ."""
    scales = list(scale)
    for prompt in prompts:
        scores = rows.score[(rows.prompt == prompt) & rows.score.isfinite()].double()
        spread = float(scores.std(correction=0)) if len(scores) else 0.0
        if math.isnan(scales[prompt]) and spread > 1e-6 * float(scores.abs().sum()):
            scales[prompt] = SPREAD / spread
    return tuple(scales)
