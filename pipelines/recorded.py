"""A pool of recorded rewards behind the Sampler protocol: searches that only select are exact on it, and free.

Shapes: B = rows of a population; P = prompts, S = seeds, J = stages of the pool (:class:`visearch.pool.Pool`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visearch.protocols import (
    Event,
    NullMeter,
    Population,
    Request,
    RowsInPopulation,
    RowState,
    Scores,
    Seed,
    stable_hash,
)

__all__ = ["RecordedReward", "RecordedSampler"]

CODE = 2**20  # indices below it are exact as float32 pixels


class RecordedSampler(RowsInPopulation):
    """Candidate k of a prompt is one of the pool's; a stage is one of the generator that made it.

    Rows advance from one recorded stage to another and are booked with what that cost then, model rows and seconds; a
    decoded sample names its prompt, stage and candidate, and :class:`RecordedReward` reads back what was recorded of
    it. Nothing can move: no stochastic steps, no re-noising, no other noise. Prompts are found by their ids.

    Args:
        pool: what was recorded.
        order: seed of a random order of the candidates, drawn for each prompt apart; ``None`` keeps the pool's own, in
            which candidate k is candidate k of a live search for that prompt with the seed of candidate 0.

    Raises:
        ValueError: more prompts, stages or seeds than float32 can number (2^20).
    """

    device = torch.device("cpu")

    def __init__(self, pool: Any, order: int | None = None) -> None:
        if max(len(pool.prompts), len(pool.stages), pool.size) >= CODE:
            raise ValueError(f"the pool has {len(pool.prompts)} prompts x {pool.size} seeds; at most {CODE} of each")
        self.pool, self.meter = pool, NullMeter()
        self.num_stages, self.milestones = pool.steps, tuple(pool.stages)
        self._rows = {0: 0, **dict(zip(pool.stages, pool.rows, strict=True))}
        levels = pool.meta.get("noise_levels", [math.nan] * (len(pool.stages) - 1))
        self._levels = {0: -math.inf, **dict(zip(pool.stages, [*levels, math.inf], strict=True))}
        ids = Request(tuple(pool.prompts)).prompt_ids
        self._places = {prompt_id: index for index, prompt_id in enumerate(ids)}
        members = [np.arange(pool.size)] * len(pool.prompts)
        if order is not None:
            members = [np.random.default_rng(stable_hash(order, i)).permutation(pool.size) for i in ids]
        self._members = np.array(members)

    def request(self, seed: int = 0) -> Request:
        """All prompts of the pool."""
        return Request(self.pool.prompts, seed=seed)

    def noise_level(self, stage: int) -> float:
        """log-SNR; NaN where the pool does not know it."""
        return self._levels[self._recorded(stage)]

    def nfe(self, start: int, stop: int) -> int:
        """Model rows per candidate, as recorded.

        Raises:
            ValueError: a stage that was not recorded.
        """
        return self._rows[self._recorded(stop)] - self._rows[self._recorded(start)]

    def cost(self, start: int, stop: int) -> float:
        return self.nfe(start, stop) / self.nfe(0, self.num_stages)

    def init(self, request: Request, seeds: Sequence[Seed]) -> Population:
        """Rows whose seeds are those of the pool.

        Raises:
            ValueError: a prompt or a candidate that the pool does not have.
        """
        ids = request.prompt_ids
        for prompt in {seed.prompt for seed in seeds}:
            if ids[prompt] not in self._places:
                text = request.reward_prompts[prompt]
                raise ValueError(f"prompt {text!r} was not recorded in this pool, or not so many times")
        most = max(seed.candidate for seed in seeds)
        if most >= self.pool.size:
            raise ValueError(f"candidate {most} was not recorded: the pool has {self.pool.size} a prompt; use fewer")
        prompts = np.array([self._places[ids[seed.prompt]] for seed in seeds])
        members = self._members[prompts, [seed.candidate for seed in seeds]]
        shown = torch.from_numpy(np.stack([prompts, np.zeros_like(prompts), members], axis=1))
        drawn = self.pool.seeds[prompts, members].tolist()
        return Population(
            stage=0,
            prompt=torch.tensor([seed.prompt for seed in seeds]),
            lineage=tuple((Event("init", 0, v, s.candidate),) for v, s in zip(drawn, seeds, strict=True)),
            rng=(torch.empty(0, dtype=torch.uint8),) * len(seeds),
            state=RowState({"shown": shown}, {"shown": 0}),
        )

    def advance(self, population: Population, to: int) -> Population:
        rows = len(population) * self.nfe(population.stage, to)
        self.meter.forward(rows, rows * self.pool.seconds_a_row, images=rows / self.nfe(0, self.num_stages))
        shown = population.state.tensors["shown"].clone()
        shown[:, 1] = self.milestones.index(to)
        return replace(population, stage=to, state=population.state.update(shown=shown))

    def predict_x0(self, population: Population) -> Population:
        if population.stage == 0:
            raise ValueError("stage 0 has no preview; advance to a recorded stage first")
        return replace(population, stage=self.num_stages)

    def decode(self, population: Population) -> Tensor:
        """(B, 3, 1, 1) float32 in [0, 1]: which prompt of the pool, at which of its stages, which candidate."""
        rows = len(population)
        self.meter.decode(rows, rows * self.pool.price * self.pool.seconds_a_row)
        return (population.state.tensors["shown"].float() / CODE)[:, :, None, None]

    def _recorded(self, stage: int) -> int:
        if stage not in self._rows:
            raise ValueError(f"stage {stage} was not recorded; this pool has {self.milestones}")
        return stage

    def _refuse(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError."""
        raise ValueError(
            "a recorded pool can only be selected from: it has no other steps, noise or strengths than it was drawn "
            "with; run this search on the generator itself"
        )

    check_moves = renoise = perturb = noise = set_noise = view = _refuse


class RecordedReward:
    """Reads back what a pool holds of the samples that its :class:`RecordedSampler` decodes.

    Args:
        pool: what was recorded.
        name: a reward or judge of it; default the first reward.

    Raises:
        ValueError: nothing of that name was recorded.
    """

    higher_is_better = True  # pools hold scores that way
    range = (-math.inf, math.inf)
    licence = "that of the recorded reward"
    needs = frozenset({"pixels"})

    def __init__(self, pool: Any, name: str | None = None) -> None:
        self.name = next(iter(pool.scores)) if name is None else name
        self.source = f"recorded {self.name}"
        self._table, self._last = pool.table(self.name), len(pool.stages) - 1

    def score(
        self,
        samples: Tensor,
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Values of N decoded samples; NaN, so failed, where none was recorded.

        Raises:
            ValueError: samples of a preview, if finals alone were recorded.
        """
        prompt, stage, member = (samples.flatten(1) * CODE).round().long().numpy().T
        if self._table.ndim == 3:
            return Scores(torch.from_numpy(self._table[prompt, member, stage]))
        if (stage != self._last).any():
            raise ValueError(f"{self.name} was recorded for finished samples only")
        return Scores(torch.from_numpy(self._table[prompt, member]))
