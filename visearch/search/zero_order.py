"""Zero-order search: random steps around the best initial noise so far (arXiv 2501.09732, section 3).

Shapes: noises and samples (B, ...), one row a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visearch.protocols import Budgeted, Evaluate, Population, Request, Sampler, SearchState
from visearch.search._common import affordable, candidates_left, check_whole, finished, whole_candidates
from visearch.search.nesting import begun_again, next_candidates, refinable
from visearch.selection import rank

__all__ = ["ZeroOrder", "ZeroOrderState", "neighbour"]


@dataclass(frozen=True)
class ZeroOrderState(SearchState):
    """Where each prompt stands.

    Args:
        centre: prompt -> row of ``finished`` that neighbours are drawn around; none where a candidate begins anew.
        tried: prompt -> neighbours of its centre that were run.
        drawn: prompt -> rows that were run.
        fresh: prompt -> next candidate to begin anew from.
        queue: prompt -> rows of ``finished`` to begin anew from before that.
    """

    centre: dict[int, int] = field(default_factory=dict)
    tried: dict[int, int] = field(default_factory=dict)
    drawn: dict[int, int] = field(default_factory=dict)
    fresh: dict[int, int] = field(default_factory=dict)
    queue: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ZeroOrder:
    """Climb by the best of K neighbours; where none is better, begin anew from the next candidate (2501.09732).

    A neighbour of the noise x is ``|x| (tau x/|x| + sqrt(1 - tau^2) w)`` with w a random unit vector orthogonal to x:
    of the same norm, at cosine tau. It keeps the random stream of its centre, so that a stochastic sampler changes
    nothing else. All rows are finished and scored once, centres too, and the answer is the best of them all. The paper
    gives no formula; neighbours, K and the new beginnings follow the public code of the field.

    Costs n whole candidates a prompt, new beginnings counted. The paper itself finds random search better by every
    guided metric, and it loses to best-of-n here: eight candidates are worth .65 [.43, 1.07] of its model rows and .56
    [.37, .92] of its seconds on emoji-64, .66 [.47, .93] and .48 [.34, .69] on emoji-64-v (60 prompts,
    ``assets/results``). This is not a default.

    Args:
        n: candidates a prompt in all, at least 1.
        k: neighbours of a centre, at least 0; 0 is one plain candidate.
        tau: cosine between a centre and its neighbours, in [0, 1).

    Raises:
        ValueError: a field out of range; on use, a sampler whose initial noise is not known.
    """

    n: int = 13
    k: int = 4
    tau: float = 0.95

    def __post_init__(self) -> None:
        check_whole(self, n=1, k=0)
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau={self.tau} must lie in [0, 1); 1 would draw the centre again, 0.95 is usual")

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        n = affordable(sampler, self.n if self.k else 1, max_nfe)
        return whole_candidates(replace(self, n=n), sampler, n)

    def init(self, sampler: Sampler, request: Request) -> ZeroOrderState:
        if self.plan(sampler).search.n > 1:
            sampler.noise(sampler.init(request, request.seeds(0, 1)))  # refused here rather than after the first round
        prompts = range(len(request.prompts))
        return ZeroOrderState(request, open_prompts=tuple(prompts), fresh=dict.fromkeys(prompts, 0))

    def resume(self, sampler: Sampler, found: SearchState) -> ZeroOrderState:
        """Centres are the best rows of ``found`` that differ by their initial noise alone, best first."""
        rows, notes = found.finished, found.notes
        order = [r for r in rank(rows) if refinable(rows, r) and self.k]
        if self.k and not order:
            notes += ("zero-order: no finished row differs by its initial noise alone; it begins from new candidates",)
        fresh = next_candidates(found)
        queue = {p: tuple(r for r in order if int(rows.prompt[r]) == p) for p in fresh}
        return ZeroOrderState(
            found.request,
            rows,
            open_prompts=found.open_prompts,
            pruned=found.pruned,
            notes=notes,
            centre={p: q[0] for p, q in queue.items() if q},
            queue={p: q[1:] for p, q in queue.items()},
            fresh=fresh,
        )

    def step(self, state: ZeroOrderState, sampler: Sampler, evaluate: Evaluate) -> ZeroOrderState:
        """Of each open prompt, the neighbours of its centre, and the centre itself where it is new."""
        n, parts = self.plan(sampler).search.n, []
        room = candidates_left(state, n)
        for prompt in state.open_prompts:
            count = min(room, n - state.drawn.get(prompt, 0))
            if count < 1:
                continue
            new = prompt not in state.centre
            if new:
                k = state.fresh[prompt]
                parts.append(sampler.init(state.request, state.request.seeds(k, k + 1, [prompt])))
            rows, row = (parts[-1], 0) if new else (state.finished, state.centre[prompt])
            count = min(count - new, self.k - state.tried.get(prompt, 0))
            if count > 0:
                parts.append(self._neighbours(state, sampler, rows, row, count))
        rows = evaluate(sampler.advance(sampler.concat(parts), sampler.num_stages))
        done = finished(state, sampler, rows)
        state = replace(state, finished=done, round=state.round + 1)
        for prompt in set(rows.prompt.tolist()):
            state = self._moved(
                state, prompt, [r for r in range(len(done) - len(rows), len(done)) if done.prompt[r] == prompt]
            )
        return state

    def done(self, state: ZeroOrderState) -> bool:
        n = self.n if self.k else 1
        return all(state.drawn.get(p, 0) >= n for p in state.open_prompts)

    def _neighbours(
        self, state: ZeroOrderState, sampler: Sampler, rows: Population, row: int, count: int
    ) -> Population:
        copies, seeds = begun_again(state, sampler, rows, row, count, "zero-order")
        noise = torch.stack([neighbour(x, self.tau, s) for x, s in zip(sampler.noise(copies), seeds, strict=True)])
        return sampler.set_noise(copies, noise, seeds)

    def _moved(self, state: ZeroOrderState, prompt: int, new: list[int]) -> ZeroOrderState:
        """After the rows ``new`` of a prompt: the centre moves, stays, or gives way to the next one."""
        rows, centre, queue = state.finished, dict(state.centre), dict(state.queue)
        drawn = {**state.drawn, prompt: state.drawn.get(prompt, 0) + len(new)}
        tried, fresh = state.tried.get(prompt, 0), dict(state.fresh)
        if prompt not in centre:
            centre[prompt], fresh[prompt], new = new[0], fresh[prompt] + 1, new[1:]
        best = min(new, key=lambda r: (-float(rows.score[r]), rows.order_key(r)), default=centre[prompt])
        tried += len(new)
        if rows.score[best] > rows.score[centre[prompt]]:
            centre[prompt], tried = best, 0
        elif tried >= self.k:
            del centre[prompt]
            tried = 0
            if queue.get(prompt):
                centre[prompt], *rest = queue[prompt]
                queue[prompt] = tuple(rest)
        tried = {**state.tried, prompt: tried}
        return replace(state, centre=centre, tried=tried, drawn=drawn, fresh=fresh, queue=queue)


def neighbour(x: Tensor, tau: float, seed: int) -> Tensor:
    """A random vector of the norm of ``x``, of any shape, at cosine ``tau`` to it; computed in float64."""
    flat = x.to("cpu", torch.float64).flatten()  # not every accelerator has float64
    norm = flat.norm()
    towards = flat / norm
    w = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w -= (w @ towards) * towards
    moved = norm * (tau * towards + (1 - tau**2) ** 0.5 * w / w.norm())
    return moved.reshape(x.shape).to(x)
