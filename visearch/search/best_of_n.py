"""Best-of-N over noise seeds: random search of arXiv 2501.09732, section 3.

The bar for every other search: N independent samples, the best one by the reward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from visearch.protocols import Budgeted, Evaluate, Request, Sampler, SearchState
from visearch.search._common import affordable, candidates_left, finished, whole_candidates

__all__ = ["BestOfN"]


@dataclass(frozen=True)
class BestOfN:
    """N candidates run to the end, argmax of the reward (2501.09732).

    The candidates of N are a prefix of those of N' > N, so the best score never falls as N grows.

    Args:
        n: candidates a prompt, at least 1.
        batch: candidates a prompt in one round; smaller rounds stop sooner at a target or deadline.

    Raises:
        ValueError: ``n`` or ``batch`` below 1.
    """

    n: int = 8
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("n", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; {name}=1 samples once")

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        n = affordable(sampler, self.n, max_nfe)
        return whole_candidates(replace(self, n=n), sampler, n)

    def init(self, sampler: Sampler, request: Request) -> SearchState:
        return SearchState(request, open_prompts=tuple(range(len(request.prompts))))

    def step(self, state: SearchState, sampler: Sampler, evaluate: Evaluate) -> SearchState:
        start = self._drawn(state)
        count = candidates_left(state, min(self.batch, self.n - start))
        rows = sampler.init(state.request, state.request.seeds(start, start + count, state.open_prompts))
        rows = evaluate(sampler.advance(rows, sampler.num_stages))
        return replace(state, finished=finished(state, sampler, rows), round=state.round + 1)

    def done(self, state: SearchState) -> bool:
        return not state.open_prompts or self._drawn(state) >= self.n

    def _drawn(self, state: SearchState) -> int:
        """Open prompts have drawn the same number of candidates, closed ones fewer."""
        return 0 if state.finished is None else max(state.finished.candidate) + 1
