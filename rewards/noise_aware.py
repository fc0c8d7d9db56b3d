"""Rewards that judge a preview by what its image will become (TTSnap, arXiv 2511.22242).

TTSnap trains a whole checkpoint for each noise level. Here one small set of differences serves all: at a level with
log-SNR l every weight w of the frozen reward f becomes ``w + h(l) dw``, dw of low rank (2106.09685) where that is
smaller, and the value is shifted and scaled. The gate ``h(l) = sigmoid(-l / 2)``, sigma / (alpha + sigma), is 0 at the
clean end, where f itself answers; differences begin at 0, so that an untrained one is f everywhere. A level may take
them at less than their full strength: weights between the frozen and the trained ones often serve unseen data best
(2109.01903).

Shapes: N samples, L trained levels.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from visearch import assets
from visearch.protocols import Scores
from visearch.rewards.base import BaseReward, ModelReward

__all__ = ["NoiseAware", "emoji_clip_noise_aware", "gate", "trained"]

WEIGHTS, CONFIG = "differences.safetensors", "noise_aware.json"
VALUE = ("value.scale", "value.shift")


def gate(level: float) -> float:
    """sigma / (alpha + sigma) of a log-SNR: 1 at -inf, 0 at +inf."""
    return 1 / (1 + math.exp(min(level / 2, 700.0))) if level < math.inf else 0.0


class _Call(nn.Module):
    """Calls a function while ``module`` holds other weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class NoiseAware(BaseReward):
    """A reward whose values for previews are its estimate of the finished image's.

    Args:
        reward: the frozen one. Of a CLIP the image tower changes with the level, of others all but token embeddings.
        folder: what :meth:`save` wrote; ``None`` is untrained.
        rank: of the differences; a folder brings its own.

    Attributes:
        differences: name -> trainable float32 tensor, all that training changes; ``value.scale`` and ``value.shift``
            have one entry a level.
        levels: L log-SNRs that were trained on, ascending; beyond them ``reward`` itself answers.
        strengths: of the differences of weights, one a level, in [0, 1]; 1 until something else is chosen.
        centre, spread: mean and deviation of the finished images' values in training.

    Raises:
        ValueError: ``reward`` has no weights to change, or ``folder`` was trained on another reward.
        FileNotFoundError: ``folder`` holds nothing trained.
    """

    range = (-math.inf, math.inf)  # an estimate may leave the published scale
    noise_aware = True

    def __init__(self, reward: ModelReward, folder: str | Path | None = None, *, rank: int = 16) -> None:
        if not isinstance(reward, ModelReward) or reward.modality != "image":
            raise ValueError(f"reward {reward.name!r} has no model of images; give a CLIP, ImageReward or the like")
        if not reward.higher_is_better:
            raise ValueError(f"reward {reward.name!r} is better when lower; give its negative")
        self.reward, self.folder = reward, folder and Path(folder)
        for name in ("family", "higher_is_better", "licence", "training_data", "needs_prompt", "not_held_out_for"):
            setattr(self, name, getattr(reward, name))
        self.name, self.source = f"{reward.name}-noise-aware", str(folder or reward.source)
        self.scale = f"the finished image's value, estimated; {reward.scale}"
        self.needs = reward.needs | {"noise_level"}
        self.levels: tuple[float, ...] = ()
        self.strengths: tuple[float, ...] = ()
        self.centre, self.spread, self.rank = 0.0, 1.0, rank
        self._merged: tuple[float, dict[str, Tensor]] = (0.0, {})
        self.differences = dict(_differences(reward, rank))
        if folder is not None:
            self._load()

    def open(self, levels: Sequence[float], centre: float, spread: float) -> None:
        """Prepare for training on these levels, ascending; the reward stays what it is."""
        self.levels, self.centre, self.spread = tuple(levels), centre, spread
        self.strengths = (1.0,) * len(levels)
        for name in VALUE:
            self.differences[name] = torch.zeros(len(levels))

    # --- files ---

    def save(self, folder: str | Path) -> None:
        """Write differences in half precision, and what they belong to."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().half().contiguous() for k, v in self.differences.items()}, folder / WEIGHTS)
        config = {
            "reward": self.reward.name,
            "revision": self.reward.revision,
            "rank": self.rank,
            "levels": self.levels,
            "strengths": self.strengths,
            "centre": self.centre,
            "spread": self.spread,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")

    def _load(self) -> None:
        facts = _facts(self.folder)
        if facts["revision"] != self.reward.revision:
            raise ValueError(
                f"{self.folder} was trained on {facts['reward']} of weights {facts['revision'][:12]}, this is "
                f"{self.reward.name} of {self.reward.revision[:12]}; give that reward, or train again"
            )
        self.levels, self.centre, self.spread = tuple(facts["levels"]), facts["centre"], facts["spread"]
        self.strengths = tuple(facts["strengths"])
        self.rank = facts["rank"]
        self.differences = {k: v.float() for k, v in load_file(self.folder / WEIGHTS).items()}

    def _config(self) -> dict[str, Any]:
        values = b"".join(v.detach().cpu().numpy().tobytes() for v in self.differences.values())
        return {
            **super()._config(),
            "reward": self.reward.config_hash,
            "differences": sha256(values).hexdigest(),
            "levels": self.levels,
            "strengths": self.strengths,
            "centre": self.centre,
            "spread": self.spread,
        }

    # --- scoring ---

    def resident(self) -> AbstractContextManager[None]:
        return self.reward.resident()

    def covers(self, level: float | None) -> bool:
        """Whether a level lies in the trained range."""
        return level is not None and bool(self.levels) and self.levels[0] <= level <= self.levels[-1]

    @torch.no_grad()
    def score(
        self,
        samples: Any,
        prompts: str | Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N samples of one noise level; clean ones exactly as the reward does, bit for bit.

        Args:
            samples, prompts, metadata: as the reward takes them.
            noise_level: log-SNR of the state that the previews were estimated from; ``None`` and +inf are clean.
        """

        def plain() -> Scores:
            return self.reward.score(samples, prompts, noise_level=noise_level, metadata=metadata)

        if not self.covers(noise_level):
            return plain()
        with self.reward.resident():
            found = functional_call(_Call(self.reward.module), self._weights(noise_level), (plain,))
        return replace(found, values=self._rescaled(found.values, noise_level))

    def estimate(self, images: Sequence[Tensor], prompts: Sequence[str], level: float) -> Tensor:
        """As :meth:`ModelReward.estimate` of (3, H, W) each, at a log-SNR, with gradients to :attr:`differences`."""
        self._merged = 0.0, {}  # what it holds is about to be trained
        with self.reward.resident():
            call, weights = _Call(self.reward.module), dict(self._changed(gate(level)))
            found = functional_call(call, weights, (lambda: self.reward.estimate(images, prompts),))
        return self._rescaled(found, level)

    def _rescaled(self, values: Tensor, level: float) -> Tensor:
        """Scale and shift, interpolated between the trained levels."""
        below, above, share = self._between(level)
        scale, shift = (
            torch.lerp(both[below], both[above], share).to(values.device)
            for both in (self.differences[name] for name in VALUE)
        )
        return values + scale * (values - self.centre) + shift * self.spread

    def _between(self, level: float) -> tuple[int, int, float]:
        """The trained levels around one, and how far it is from the lower to the upper."""
        above = min(max(bisect.bisect_left(self.levels, level), 1), len(self.levels) - 1)
        low, high = self.levels[above - 1], self.levels[above]
        return above - 1, above, (level - low) / (high - low) if high > low else 1.0

    def _weights(self, level: float) -> dict[str, Tensor]:
        """The weights at a level; the last are kept, since a search asks for one level again and again."""
        below, above, share = self._between(level)
        h = gate(level) * ((1 - share) * self.strengths[below] + share * self.strengths[above])
        if self.reward.offload != "none":
            return dict(self._changed(h))  # they would stay on the device
        if self._merged[0] != h:
            self._merged = h, dict(self._changed(h))
        return self._merged[1]

    def _changed(self, h: float) -> Iterator[tuple[str, Tensor]]:
        for name, weight in _open(self.reward):
            if f"{name}.up" in self.differences:
                down, up = (self.differences[f"{name}.{part}"].to(weight.device) for part in ("down", "up"))
                change = (up @ down).view_as(weight)
            else:
                change = self.differences[f"{name}.full"].to(weight.device)
            yield f"module.{name}", (weight + h * change).to(weight.dtype)


def trained(folder: str | Path, device: torch.device | str = "cpu") -> NoiseAware:
    """What :meth:`NoiseAware.save` wrote, on the reward that it was trained on, by that one's name.

    Raises:
        FileNotFoundError, ValueError: as :class:`NoiseAware`.
    """
    from visearch.rewards import resolve

    return NoiseAware(resolve(_facts(Path(folder))["reward"], device), folder)


def emoji_clip_noise_aware(device: torch.device | str = "cpu") -> NoiseAware:
    """The embedded world's CLIP, trained on previews of its 15-step generator."""
    return trained(assets.path("emoji-64/clip-noise-aware"), device)


def _facts(folder: Path) -> dict[str, Any]:
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise FileNotFoundError(f"{folder} lacks {CONFIG} or {WEIGHTS}; visearch train-reward writes them")
    return json.loads((folder / CONFIG).read_text())


def _open(reward: ModelReward) -> Iterator[tuple[str, Tensor]]:
    """Weights that may change: those that score an image, embeddings of tokens left out."""
    module = reward.module
    fixed = {id(p) for part in module.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    begins = getattr(reward, "image_part", ("",))  # features of texts are kept from call to call
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and id(weight) not in fixed and name.startswith(begins):
            yield name, weight


def _differences(reward: ModelReward, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Differences that change nothing yet."""
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    generator = torch.Generator().manual_seed(0)
    for name, weight in _open(reward):
        rows, columns = weight.shape[0] if weight.ndim else 1, weight[0].numel() if weight.ndim else 1
        if rank * (rows + columns) < weight.numel():
            yield f"{name}.down", torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            yield f"{name}.up", torch.zeros(rows, rank)
        else:
            yield f"{name}.full", torch.zeros(weight.shape)
