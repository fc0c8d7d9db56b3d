"""How large the generations of an evolutionary search are, and where they restart (EvoSearch, arXiv 2505.17618)."""

from __future__ import annotations

from collections.abc import Sequence

from visearch.protocols import Sampler
from visearch.search._common import ROUNDING

__all__ = ["PRESETS", "restart_stages", "shape"]

PRESETS = {  # restarts as shares of T, k_0 ... k_G, elites; those of the released code, made for 50 steps
    "sd2.1": ((0.0, 0.4, 0.6, 0.8), (42, 26, 26, 26, 30), 5),
    "flux": ((0.1, 0.4, 0.6, 0.8), (14, 7, 7, 7, 10), 3),
    "wan": ((0.1, 0.4, 0.6, 0.9), (10, 5, 5, 5, 5), 2),
}


def shape(
    preset: str,
    restarts: tuple[float | int, ...] | None,
    sizes: tuple[int, ...] | None,
    elites: int | None,
    n: int | None,
    generations: int,
) -> tuple[tuple[float | int, ...], tuple[int, ...], int]:
    """Restarts, sizes and elites before n scales them; see the fields of ``EvolutionarySearch``."""
    own = None
    if restarts is None and preset == "auto":
        n = n or 8
        restarts, sizes = tuple(g / generations for g in range(generations)), (n, *((n + 1) // 2,) * generations)
    elif restarts is None:
        restarts, sizes, own = PRESETS[preset]
    fifth = max(1, round(0.2 * min(sizes[1:], default=1)))
    return restarts, sizes, next(m for m in (elites, own, fifth) if m is not None)


def restart_stages(sampler: Sampler, restarts: Sequence[float | int]) -> list[int]:
    """The stages of restarts: shares of T down to a milestone, or stages as they are.

    Raises:
        ValueError: one that is no milestone, or they descend.
    """
    end, stops = sampler.num_stages, (0, *sampler.milestones[:-1])
    wanted = [e if isinstance(e, int) else max(m for m in stops if m <= e * end + ROUNDING) for e in restarts]
    if not set(wanted) <= set(stops):
        raise ValueError(f"restarts={tuple(wanted)}: a restart has to be 0 or one of {sampler.milestones[:-1]}")
    if wanted != sorted(wanted):
        raise ValueError(f"restarts={tuple(restarts)} are stages {wanted}; give them in ascending order")
    return wanted
