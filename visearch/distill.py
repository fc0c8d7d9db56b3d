"""Self-distillation of a reward that judges previews by what they become (TTSnap, arXiv 2511.22242).

Trajectories are drawn from the user's own generator; at every stage the reward sees the preview and is taught what
its frozen self says of the finished image. One model learns all levels, from clean to noisy: the window of levels opens
one by one, half of each batch comes from the newest and half from those before, so that nothing is forgotten.

Shapes: P prompts, S seeds, J recorded stages, G prompts of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visearch.pool import Pool
from visearch.preview_report import rank_correlation
from visearch.previews import Previews
from visearch.protocols import Request, stable_hash
from visearch.rewards.images import to_pixels
from visearch.rewards.noise_aware import NoiseAware

__all__ = ["Settings", "Step", "Trajectories", "choose_strengths", "chooses", "curriculum", "loss", "rescored", "train"]

SOFTNESS = 0.5  # of pairs, in deviations of the target
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHOOSE = 8  # one prompt in so many chooses among them
SAVE_EVERY = 50  # steps

# --- what is learned from --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Recorded candidates with their previews.

    Args:
        pool: scores of the frozen reward alone.
        ids: P prompt ids, under which the previews lie.
        previews: their images.
    """

    pool: Pool
    ids: tuple[int, ...]
    previews: Previews

    @classmethod
    def of(cls, pool: Pool, lines: Sequence[Mapping[str, Any]], previews: Previews) -> Trajectories:
        """What :func:`visearch.record.record` made of these lines."""
        ids = Request(tuple(line["prompt"] for line in lines)).prompt_ids
        return cls(pool, tuple(ids[p] for p in pool.meta["index"]), previews)

    @property
    def reward(self) -> str:
        return next(iter(self.pool.scores))

    @cached_property
    def levels(self) -> dict[int, float]:
        """Stage -> log-SNR, of all stages but the last."""
        return dict(zip(self.pool.stages[:-1], self.pool.meta["noise_levels"], strict=True))

    @cached_property
    def targets(self) -> np.ndarray:
        """(P, S) the frozen reward's values of the finished images."""
        return self.pool.final(self.reward).astype(np.float64)

    def take(self, rows: Sequence[int]) -> Trajectories:
        """Some of the prompts."""
        return Trajectories(self.pool.take(rows), tuple(self.ids[p] for p in rows), self.previews)

    def split(self) -> tuple[Trajectories, Trajectories]:
        """Prompts to train on, and those that :func:`choose_strengths` is for; equal texts stay together.

        Raises:
            ValueError: too few prompts for either.
        """
        parts: tuple[list[int], list[int]] = [], []
        for p, text in enumerate(self.pool.prompts):
            parts[chooses(text)].append(p)
        if not all(parts):
            raise ValueError(f"{len(self.ids)} prompts are too few to train on and to choose strengths by; draw more")
        train, choose = map(self.take, parts)
        return train, choose

    def batch(self, rows: Sequence[int], stage: int) -> tuple[list[Tensor], list[str]]:
        """Images (3, H, W), uint8, of all candidates of some prompts at a stage, prompt by prompt, and their texts."""
        seeds = range(self.pool.size)
        images = [image for p in rows for image in self.previews.load(self.ids[p], stage, seeds)]
        return to_pixels(images)[0], [self.pool.prompts[p] for p in rows for _ in seeds]


# --- training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How it is trained.

    Args:
        passes: over the prompts, for each newly opened level.
        group: G, prompts a step, each with all its seeds.
        rate: AdamW's, falling linearly to half.
        pairs: weight of the loss on pairs of one prompt.
        seed: of the order of prompts and levels.

    Raises:
        ValueError: a value out of range.
    """

    passes: int = 4
    group: int = 16
    rate: float = 1e-4
    pairs: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("passes", 1), ("group", 2), ("pairs", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate} must be above 0")


@dataclass(frozen=True)
class Step:
    """One step: rows of prompts at the newest level, and others at one before it."""

    newest: int
    rows: tuple[int, ...]
    older: int
    others: tuple[int, ...]


def curriculum(stages: Sequence[int], prompts: int, settings: Settings) -> list[Step]:
    """All steps, in order: levels open from the second last stage before the end towards noise.

    Args:
        stages: recorded ones, ascending, the last is T; those after T - 2 are not trained on.
        prompts: P.

    Raises:
        ValueError: no stage up to T - 2 was recorded.
    """
    opened = [stage for stage in stages if stage <= stages[-1] - 2][::-1]
    if not opened:
        raise ValueError(f"stages={tuple(stages)} hold none up to T - 2 = {stages[-1] - 2}; record earlier ones")
    steps = []
    for window, newest in enumerate(opened):
        for turn in range(settings.passes):
            rng = np.random.default_rng((settings.seed, window, turn))
            for rows in np.array_split(rng.permutation(prompts), max(1, round(prompts / settings.group))):
                half = (len(rows) + 1) // 2
                older = opened[rng.integers(window)] if window else newest
                steps.append(Step(newest, tuple(rows[:half].tolist()), older, tuple(rows[half:].tolist())))
    return steps


def loss(values: Tensor, targets: Tensor, pairs: float = 0.0) -> Tensor:
    """Squared error, and of pairs within a prompt ``-log sigmoid((r_i - r_j) / 0.5)`` where f_i > f_j.

    Args:
        values, targets: (G, S), standardised.
        pairs: weight of the second.
    """
    error = F.mse_loss(values, targets)
    better = targets[:, :, None] > targets[:, None, :]
    if not pairs or not better.any():
        return error
    margin = (values[:, :, None] - values[:, None, :])[better]
    return error - pairs * F.logsigmoid(margin / SOFTNESS).mean()


def train(
    aware: NoiseAware, drawn: Trajectories, folder: str | Path, settings: Settings, progress: bool = False
) -> list[float]:
    """Train in place, from the checkpoint in ``folder`` if there is one; the same as without an interruption.

    Returns:
        The loss of every step.

    Raises:
        ValueError: the checkpoint belongs to other settings or trajectories.
    """
    from tqdm.auto import tqdm

    steps = curriculum(drawn.pool.stages, len(drawn.ids), settings)
    _open(aware, drawn, [stage for stage in drawn.levels if stage <= steps[0].newest])
    aware.reward.module.to(memory_format=torch.channels_last)  # convolutions in half precision are twice as fast so
    tensors = aware.differences
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(tensors.values(), settings.rate, betas=(0.9, 0.999), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=len(steps))
    checkpoint = Checkpoint(
        Path(folder) / "checkpoint.pt", asdict(settings), stable_hash(*drawn.ids, *drawn.pool.stages, aware.rank)
    )
    losses = checkpoint.load(tensors, optimizer, scheduler)
    for step in tqdm(steps[len(losses) :], initial=len(losses), total=len(steps), unit="step", disable=not progress):
        optimizer.zero_grad()
        found = _errors(aware, drawn, step, settings.pairs)
        torch.stack(found).mean().backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 5.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(torch.stack(found).mean().detach()))
        if len(losses) % SAVE_EVERY == 0 or len(losses) == len(steps):
            checkpoint.save(tensors, optimizer, scheduler, losses)
    return losses


def _open(aware: NoiseAware, drawn: Trajectories, stages: Sequence[int]) -> None:
    """Levels, each with the scale and shift that serve the frozen reward best: least squares over all trajectories."""
    centre, spread = float(drawn.targets.mean()), float(drawn.targets.std())
    aware.open([drawn.levels[stage] for stage in stages], centre, spread)
    for level, stage in enumerate(stages):
        seen = drawn.pool.scores[drawn.reward][..., drawn.pool.stages.index(stage)].astype(np.float64)
        slope, offset = np.polyfit(seen.ravel() - centre, drawn.targets.ravel() - centre, 1)
        aware.differences["value.scale"][level] = slope - 1
        aware.differences["value.shift"][level] = offset / spread


def _errors(aware: NoiseAware, drawn: Trajectories, step: Step, pairs: float) -> list[Tensor]:
    """Losses of the two halves of a batch."""
    found = []
    for stage, rows in ((step.newest, step.rows), (step.older, step.others)):
        if not rows:
            continue
        images, texts = drawn.batch(rows, stage)
        with torch.autocast(aware.reward.device.type, torch.bfloat16):
            values = aware.estimate(images, texts, drawn.levels[stage])
        goal = torch.as_tensor(drawn.targets[list(rows)], dtype=torch.float32, device=values.device)
        values, goal = ((v - aware.centre) / aware.spread for v in (values.float().view_as(goal), goal))
        found.append(loss(values, goal, pairs))
    return found


@dataclass(frozen=True)
class Checkpoint:
    """State of a training, replaced in one step."""

    path: Path
    settings: Mapping[str, Any]
    data: int

    def save(self, tensors: Mapping[str, Tensor], optimizer: Any, scheduler: Any, losses: Sequence[float]) -> None:
        state = {
            "settings": dict(self.settings),
            "data": self.data,
            "tensors": {k: v.detach() for k, v in tensors.items()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "losses": list(losses),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def load(self, tensors: Mapping[str, Tensor], optimizer: Any, scheduler: Any) -> list[float]:
        """Restore all three, and return the losses so far."""
        if not self.path.is_file():
            return []
        state = torch.load(self.path, weights_only=True)
        for name in ("settings", "data"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"{self.path} is of other {name}: {state[name]}, now {getattr(self, name)}; delete it to begin anew"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state["tensors"][name])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        return state["losses"]


def chooses(prompt: str) -> bool:
    """Whether a prompt is kept from training for :func:`choose_strengths`."""
    return stable_hash("strength", prompt) % CHOOSE == 0


def choose_strengths(aware: NoiseAware, drawn: Trajectories) -> dict[int, dict[float, float]]:
    """Set each level's strength to the one that ranks previews best, by mean tau within prompts; of equals the least.

    A training of few prompts learns some of them by heart. What generalises often lies between the frozen and the
    trained weights (2109.01903), and where nothing does, 0 leaves the reward as it was.

    Args:
        drawn: of prompts that were not trained on.

    Returns:
        Stage -> strength -> tau.
    """
    found: dict[int, dict[float, float]] = {stage: {} for stage, level in drawn.levels.items() if level in aware.levels}
    for strength in STRENGTHS:
        aware.strengths = (strength,) * len(aware.levels)
        pool = rescored(aware, drawn)
        for stage, taus in found.items():
            scores = pool.scores[aware.name][..., pool.stages.index(stage)]
            taus[strength] = float(rank_correlation(scores, drawn.targets).mean())
    best = {drawn.levels[stage]: max(taus, key=taus.get) for stage, taus in found.items()}
    aware.strengths = tuple(best[level] for level in aware.levels)
    return found


def rescored(aware: NoiseAware, drawn: Trajectories) -> Pool:
    """The pool with what the trained reward says of every preview beside what the frozen one says."""
    pool, seconds = drawn.pool, []
    after = pool.scores[drawn.reward].copy()  # of finished images both say the same
    for j, stage in enumerate(pool.stages[:-1]):
        for p in range(len(drawn.ids)):
            images, texts = drawn.batch([p], stage)
            begin = time.perf_counter()
            after[p, :, j] = aware.score(images, texts, noise_level=drawn.levels[stage]).values.numpy()
            seconds.append((time.perf_counter() - begin) / pool.size)
    meta = {**pool.meta, "seconds": {**pool.meta["seconds"], aware.name: float(np.median(seconds))}}
    return replace(pool, scores={**pool.scores, aware.name: after}, meta=meta)
