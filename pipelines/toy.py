"""Two generators with closed forms: a Gaussian flow, and tokens committed in rounds.

They prove that the protocols fit every family, and make exact tests possible: all arithmetic is elementwise, so a row
never depends on its companions, not even in the last bit.

Shapes: B = rows, D = 48 (Gaussian) or L tokens (discrete).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from visearch.pipelines.flow import Level, transit
from visearch.protocols import (
    EtaStep,
    Event,
    NullMeter,
    Ode,
    Population,
    Request,
    RowsInPopulation,
    RowState,
    Seed,
    Transition,
    stable_hash,
)

__all__ = ["GaussianToy", "TokenToy"]


class _Toy(RowsInPopulation):
    """What both toys share: rows, streams, and the events that re-key them."""

    num_stages: int
    milestones: tuple[int, ...]
    device = torch.device("cpu")

    skipped: frozenset[int] = frozenset()  # stages whose model calls a step cache answers

    def __init__(self) -> None:
        self.meter = NullMeter()

    def nfe(self, start: int, stop: int) -> int:
        return 2 * sum(stage not in self.skipped for stage in range(start, stop))

    def init(self, request: Request, seeds: Sequence[Seed]) -> Population:
        generators = [request.generator(s) for s in seeds]
        targets = torch.stack([self._target(request.reward_prompts[s.prompt]) for s in seeds])
        state = self._start(targets, generators)
        self.meter.encode(len({s.prompt for s in seeds}), 0.0)
        return Population(
            stage=0,
            prompt=torch.tensor([s.prompt for s in seeds]),
            lineage=tuple((Event("init", 0, s.value, s.candidate),) for s in seeds),
            rng=tuple(g.get_state() for g in generators),
            state=state,
        )

    def advance(self, population: Population, to: int) -> Population:
        state, generators = population.state, population.generators()
        for stage in range(population.stage, to):
            begin = time.perf_counter()
            state = self._step(state, stage, generators)
            for _branch in range(2):
                rows, share = len(population), self.cost(stage, stage + 1) / 2
                if stage in self.skipped:
                    self.meter.skipped(rows)
                    continue
                self.meter.forward(rows, (time.perf_counter() - begin) / 2, images=rows * share)
        return replace(population, stage=to, state=state, rng=tuple(g.get_state() for g in generators))

    def check_moves(self, stage: int) -> None:
        """Rows can move to any stage."""

    def noise(self, population: Population) -> Tensor:
        if population.stage != 0:
            raise ValueError(f"rows are at stage {population.stage}; their initial noise is known at stage 0 only")
        return self._noise_of(population)

    def decode(self, population: Population) -> Tensor:
        """(B, 3, 4, 4) in [0, 1]."""
        begin = time.perf_counter()
        pixels = self._pixels(population.state)
        self.meter.decode(len(population), time.perf_counter() - begin)
        return pixels

    def _back(
        self, population: Population, to_stage: int, seeds: Sequence[int]
    ) -> tuple[Population, list[torch.Generator]]:
        if not 0 <= to_stage < population.stage:
            raise ValueError(f"to_stage={to_stage} must be earlier than the population's stage {population.stage}")
        return self._rekey(population, "renoise", to_stage, seeds)

    def _aside(
        self, population: Population, strength: float, seeds: Sequence[int]
    ) -> tuple[Population, list[torch.Generator]]:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength} must lie in [0, 1]")
        return self._rekey(population, "perturb", strength, seeds)

    def _rekey(
        self, population: Population, op: str, value: float, seeds: Sequence[int]
    ) -> tuple[Population, list[torch.Generator]]:
        if len(seeds) != len(population):
            raise ValueError(f"seeds has {len(seeds)} entries for {len(population)} rows; give one a row")
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        pairs = zip(population.lineage, seeds, strict=True)
        lineage = tuple((*events, Event(op, population.stage, s, value)) for events, s in pairs)
        return replace(population, lineage=lineage), generators


class GaussianToy(_Toy):
    """Flow matching towards N(mu(prompt), scale^2), solved in closed form; a stage is one step of a uniform grid.

    ``x_t = (1 - t) x0 + t eps`` has mean ``(1 - t) mu`` and variance ``v(t) = (1 - t)^2 scale^2 + t^2``, so the ODE
    maps ``x_t - (1 - t) mu`` to ``sqrt(v(s) / v(t))`` times itself, and stage T is exactly ``mu + scale * noise``.

    Args:
        steps: T.
        scale: standard deviation of the data; 0 is a single point.
        transition: ODE by default.
    """

    dims = 48

    def __init__(self, steps: int = 8, scale: float = 0.5, transition: Transition | None = None) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        self.num_stages, self.scale, self.transition = steps, scale, transition or Ode()
        self.milestones = tuple(range(1, steps + 1))

    def time(self, stage: int) -> float:
        """Noise scale t of a stage: 1 at stage 0, 0 at stage T."""
        return 1 - stage / self.num_stages

    def noise_level(self, stage: int) -> float:
        t = self.time(stage)
        return math.inf if t == 0 else -math.inf if t == 1 else 2 * math.log((1 - t) / t)

    def cost(self, start: int, stop: int) -> float:
        return self.nfe(start, stop) / (2 * self.num_stages)

    def sample(self, prompt: str, generator: torch.Generator) -> Tensor:
        """(D,) the unsearched ODE result, one plain loop: equal to ``mu + scale * noise`` up to rounding."""
        x, target = torch.randn(self.dims, generator=generator, dtype=torch.float64), self._target(prompt)
        for stage in range(self.num_stages):
            t, s = self.time(stage), self.time(stage + 1)
            ratio = math.sqrt((1 - s) ** 2 * self.scale**2 + s**2) / math.sqrt((1 - t) ** 2 * self.scale**2 + t**2)
            x = (1 - s) * target + ratio * (x - (1 - t) * target)
        return x

    def predict_x0(self, population: Population) -> Population:
        if population.stage == 0:
            raise ValueError("stage 0 has no preview; advance at least one stage first")
        x0 = population.state.tensors["x0"]
        return replace(population, stage=self.num_stages, state=population.state.update(x=x0))

    def renoise(self, population: Population, to_stage: int, seeds: Sequence[int]) -> Population:
        moved, generators = self._back(population, to_stage, seeds)
        s, t = self.time(population.stage), self.time(to_stage)
        kept = (1 - t) / (1 - s)
        fresh = math.sqrt(t**2 - (kept * s) ** 2)
        state = moved.state.update(x=kept * moved.state.tensors["x"] + fresh * self._noise(generators))
        return replace(moved, stage=to_stage, state=state, rng=tuple(g.get_state() for g in generators))

    def perturb(self, population: Population, strength: float, seeds: Sequence[int]) -> Population:
        if strength == 0:
            return population
        moved, generators = self._aside(population, strength, seeds)
        t, x = self.time(population.stage), moved.state.tensors["x"]
        x0, eps = self._posterior(x, moved.state.tensors["target"], t)
        eps = math.sqrt(1 - strength**2) * eps + strength * self._noise(generators)
        state = moved.state.update(x=(1 - t) * x0 + t * eps)
        return replace(moved, state=state, rng=tuple(g.get_state() for g in generators))

    def set_noise(self, population: Population, noise: Tensor, seeds: Sequence[int]) -> Population:
        return population.begun_from(noise, seeds, population.state.update(x=noise.to(torch.float64)))

    def view(self, transition: Transition | None = None, cache: Any = None, guidance: Any = None) -> GaussianToy:
        """Other steps, or a fixed :class:`~visearch.pipelines.cache.StepCache`: skipped stages repeat the last x0."""
        if guidance is not None:
            raise ValueError("the Gaussian toy has the views transition= and cache= only")
        other = copy.copy(self)
        other.transition = transition or self.transition
        if cache is not None:
            from visearch.pipelines.cache import StepCache, resolve

            cache = resolve(cache, self.num_stages)
            if not isinstance(cache, StepCache) or cache.tau:
                raise ValueError(f"the Gaussian toy has step caches with a fixed pattern only, not {cache!r}")
            other.skipped = cache.stages(self.num_stages)
        return other

    def _target(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(stable_hash("target", prompt))
        return torch.randn(self.dims, generator=generator, dtype=torch.float64)

    def _start(self, targets: Tensor, generators: list[torch.Generator]) -> RowState:
        x = self._noise(generators)
        return RowState({"x": x, "x0": targets.clone(), "target": targets}, {"x": 0, "x0": 0, "target": 0})

    def _noise_of(self, population: Population) -> Tensor:
        return population.state.tensors["x"]

    def _noise(self, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.dims, generator=g, dtype=torch.float64) for g in generators])

    def _posterior(self, x: Tensor, target: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """E[x0 | x_t] and the noise that goes with it."""
        variance = (1 - t) ** 2 * self.scale**2 + t**2
        if variance == 0:
            return x, torch.zeros_like(x)
        centred = x - (1 - t) * target
        return target + (1 - t) * self.scale**2 / variance * centred, t / variance * centred

    def _step(self, state: RowState, stage: int, generators: list[torch.Generator]) -> RowState:
        x, target = state.tensors["x"], state.tensors["target"]
        t, s = self.time(stage), self.time(stage + 1)
        x0, eps = self._posterior(x, target, t)
        if stage in self.skipped:
            x0 = state.tensors["x0"]
            eps = (x - (1 - t) * x0) / t
        kind = self.transition
        straight = isinstance(kind, Ode) or (isinstance(kind, EtaStep) and kind.at(stage) == 0)
        if straight and stage in self.skipped:
            return state.update(x=(1 - s) * x0 + s * eps)
        if straight:
            spread = [math.sqrt((1 - u) ** 2 * self.scale**2 + u**2) for u in (s, t)]
            moved = (1 - s) * target + spread[0] / spread[1] * (x - (1 - t) * target)
            return state.update(x=moved, x0=x0)
        moved = transit(kind, x, x0, self._noise(generators), Level(1 - t, t), Level(1 - s, s), stage)
        return state.update(x=moved, x0=x0)

    def _pixels(self, state: RowState) -> Tensor:
        return (0.5 + state.tensors["x"].float() / 16).clamp(0, 1).reshape(-1, 3, 4, 4)


class TokenToy(_Toy):
    """Tokens committed in rounds with a cache per row; a stage is one commit, a milestone the end of a chunk.

    It has the traits of the VAR, masked and chunked-video families: integer state, a cache along the rows that is a
    function of what was committed, later stages that cost more, stops at chunk ends only. Token i is drawn from the
    logits ``prompt table + cache``, where the cache adds up what the earlier tokens said about their successors.

    Args:
        chunks: number of chunks.
        per_chunk: commits in a chunk.
    """

    vocabulary, mask, per_commit = 16, -1, 4
    stochastic = True

    def __init__(self, chunks: int = 3, per_chunk: int = 4) -> None:
        super().__init__()
        for name, value in (("chunks", chunks), ("per_chunk", per_chunk)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_stages = chunks * per_chunk
        self.milestones = tuple(range(per_chunk, self.num_stages + 1, per_chunk))
        generator = torch.Generator().manual_seed(0)
        self._table = torch.randn(self.vocabulary, self.vocabulary, generator=generator, dtype=torch.float64)

    def noise_level(self, stage: int) -> float:
        revealed = stage / self.num_stages
        return math.inf if revealed == 1 else -math.inf if revealed == 0 else math.log(revealed / (1 - revealed))

    def cost(self, start: int, stop: int) -> float:
        """Stage k attends to k + 1 commits."""
        total = self.num_stages * (self.num_stages + 1)
        return (stop * (stop + 1) - start * (start + 1)) / total

    def sample(self, prompt: str, generator: torch.Generator) -> Tensor:
        """(L,) int64, the unsearched result, token by token without a cache."""
        target, tokens = self._target(prompt), []
        for _stage in range(self.num_stages):
            cache = torch.zeros(self.vocabulary, dtype=torch.float64)
            for token in tokens:
                cache = 0.5 * cache + self._table[token]
            gumbel = self._gumbel(self._normal(generator))
            tokens += (target + cache + gumbel).argmax(-1).tolist()
        return torch.tensor(tokens)

    def predict_x0(self, population: Population) -> Population:
        if population.stage == 0:
            raise ValueError("stage 0 has no preview; advance to a milestone first")
        tokens, guess = population.state.tensors["tokens"], population.state.tensors["x0"]
        filled = torch.where(tokens == self.mask, guess[:, :1], tokens)
        return replace(population, stage=self.num_stages, state=population.state.update(tokens=filled))

    def renoise(self, population: Population, to_stage: int, seeds: Sequence[int]) -> Population:
        """Mask again what was committed after ``to_stage``; the cache is rebuilt from what is left."""
        moved, generators = self._back(population, to_stage, seeds)
        tokens = moved.state.tensors["tokens"].clone()
        tokens[:, to_stage * self.per_commit :] = self.mask
        state = moved.state.update(tokens=tokens, cache=self._rebuild(tokens), field=self._unset(moved, to_stage))
        return replace(moved, stage=to_stage, state=state, rng=tuple(g.get_state() for g in generators))

    def perturb(self, population: Population, strength: float, seeds: Sequence[int]) -> Population:
        """Redraw exactly ``round(strength * committed)`` committed tokens of each row."""
        if strength == 0:
            return population
        moved, generators = self._aside(population, strength, seeds)
        tokens, committed = moved.state.tensors["tokens"].clone(), population.stage * self.per_commit
        for row, generator in enumerate(generators):
            places = torch.randperm(committed, generator=generator)[: round(strength * committed)]
            tokens[row, places] = torch.randint(self.vocabulary, (len(places),), generator=generator)
        field = self._unset(moved, moved.stage)
        state = moved.state.update(tokens=tokens, cache=self._rebuild(tokens), field=field)
        return replace(moved, state=state, rng=tuple(g.get_state() for g in generators))

    def set_noise(self, population: Population, noise: Tensor, seeds: Sequence[int]) -> Population:
        return population.begun_from(noise, seeds, population.state.update(field=noise.to(torch.float64)))

    def select(self, population: Population, index: Sequence[int]) -> Population:
        """Copies draw what is to come from their own streams, also where the noise was set."""
        picked, rows = population.select(index), [int(i) for i in index]
        copies = [place for place, row in enumerate(rows) if row in rows[:place]]
        if not copies:
            return picked
        field = picked.state.tensors["field"].clone()
        field[copies, picked.stage :] = math.nan
        return replace(picked, state=picked.state.update(field=field))

    def view(self, transition: Transition | None = None, cache: Any = None, guidance: Any = None) -> TokenToy:
        if any(v is not None for v in (transition, cache, guidance)):
            raise ValueError("the token toy samples stochastically already and has no other view")
        return copy.copy(self)

    def _target(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(stable_hash("target", prompt))
        return torch.randn(self.vocabulary, generator=generator, dtype=torch.float64)

    def _start(self, targets: Tensor, generators: list[torch.Generator]) -> RowState:
        rows, length = len(targets), self.num_stages * self.per_commit
        tokens = torch.full((rows, length), self.mask)
        cache = torch.zeros(rows, self.vocabulary, dtype=torch.float64)
        guess = targets.argmax(-1, keepdim=True)
        field = torch.full((rows, self.num_stages, self.per_commit, self.vocabulary), math.nan, dtype=torch.float64)
        tensors = {"tokens": tokens, "cache": cache, "target": targets, "x0": guess, "field": field}
        return RowState({**tensors, "table": self._table}, {**dict.fromkeys(tensors, 0), "table": None})

    def _noise_of(self, population: Population) -> Tensor:
        """Where it was not set, what the rows' streams will give."""
        field = population.state.tensors["field"]
        drawn = [torch.stack([self._normal(g) for _ in range(self.num_stages)]) for g in population.generators()]
        return torch.where(field.isnan(), torch.stack(drawn), field)

    def _unset(self, population: Population, stage: int) -> Tensor:
        """The field, from ``stage`` on to be drawn."""
        field = population.state.tensors["field"].clone()
        field[:, stage:] = math.nan
        return field

    def _normal(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.per_commit, self.vocabulary, generator=generator, dtype=torch.float64)

    def _gumbel(self, normal: Tensor) -> Tensor:
        uniform = torch.special.ndtr(normal)
        return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))

    def _step(self, state: RowState, stage: int, generators: list[torch.Generator]) -> RowState:
        logits = state.tensors["target"] + state.tensors["cache"]
        own, given = torch.stack([self._normal(g) for g in generators]), state.tensors["field"][:, stage]
        gumbel = self._gumbel(torch.where(given.isnan(), own, given))
        drawn = (logits[:, None, :] + gumbel).argmax(-1)
        tokens = state.tensors["tokens"].clone()
        tokens[:, stage * self.per_commit : (stage + 1) * self.per_commit] = drawn
        cache = self._extend(state.tensors["cache"], drawn)
        return state.update(tokens=tokens, cache=cache, x0=logits.argmax(-1, keepdim=True))

    def _extend(self, cache: Tensor, tokens: Tensor) -> Tensor:
        for column in tokens.unbind(1):
            cache = 0.5 * cache + self._table[column]
        return cache

    def _rebuild(self, tokens: Tensor) -> Tensor:
        committed = int((tokens[0] != self.mask).sum())
        empty = torch.zeros(len(tokens), self.vocabulary, dtype=torch.float64)
        return self._extend(empty, tokens[:, :committed])

    def _pixels(self, state: RowState) -> Tensor:
        values = state.tensors["tokens"].float() / (self.vocabulary - 1)
        return values[:, torch.arange(48) % values.shape[1]].reshape(-1, 3, 4, 4)
