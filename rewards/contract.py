"""Whether a reward keeps its contract, for the tests of your own rewards.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visearch.protocols import Reward, RewardError, Scores
from visearch.rewards.images import to_pil, to_uint8

__all__ = ["check"]

COLOURS = ("red", "green", "blue", "yellow", "white")


def check(
    reward: Any,
    samples: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Raise unless a reward keeps the contract of :class:`visearch.protocols.Reward`.

    It must return N finite scores within its range, in input order, the same every time, the same for each sample
    whatever its companions, the same for a tensor in [0, 1] and the PIL image that is made of it, and leave the samples
    as they are.

    Args:
        reward: whatever ``reward=`` takes.
        samples: N that it does not score alike, as a reward gets them; default five noisy squares, a colour each
            (where ``reward.modality`` is ``"video"``, five frames of each).
        prompts: N texts; default ``'a photo of a "red" square'`` and so on.
        metadata: of the samples, if the reward needs any.
        tolerance: by which scores may differ between batches, relative to the largest.

    Raises:
        RewardError: what was not kept, in numbers.
        TypeError: not a reward at all.
    """
    from visearch.rewards import resolve

    reward = resolve(reward)
    if samples is None:
        samples = _squares(video=getattr(reward, "modality", "image") == "video")
    texts = [f'a photo of a "{colour}" square' for colour in COLOURS] if prompts is None else prompts

    everything = list(range(len(samples)))

    def score(rows: list[int], given: Any = samples) -> Tensor:
        if rows is not everything:
            given = given[rows] if torch.is_tensor(given) else [given[i] for i in rows]
        about = None if metadata is None else [metadata[i] for i in rows]
        return _values(reward, reward.score(given, [texts[i] for i in rows], metadata=about), len(rows))

    before = samples.clone() if torch.is_tensor(samples) else None
    together, turned = score(everything), everything[1:] + everything[:1]
    if before is not None and not torch.equal(before, samples):
        raise RewardError(f"reward {reward.name!r} changed the samples; work on a copy")
    _check_spread(reward, together)
    _check_same(reward, together, score(everything), tolerance, "again")
    _check_same(reward, together[turned], score(turned), tolerance, "in another order")
    _check_same(reward, together, torch.cat([score([i]) for i in everything]), tolerance, "one by one")
    _check_same(reward, together, score(everything, to_pil(samples)), tolerance, "as PIL images")


def _squares(video: bool) -> Tensor:
    """(5, 3, 64, 64) or (5, 5, 3, 64, 64) in [0, 1]: a colour each, under ever more noise."""
    from PIL import ImageColor

    colours = torch.tensor([ImageColor.getrgb(colour) for colour in COLOURS]) / 255
    noise = torch.rand(5, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    amount = torch.linspace(0.1, 0.9, 5)[:, None, None, None, None]
    squares = (1 - amount) * colours[:, None, :, None, None] + amount * noise
    squares = to_uint8(squares).float() / 255
    return squares if video else squares[:, 0]


def _values(reward: Reward, scores: Any, count: int) -> Tensor:
    if not isinstance(scores, Scores):
        raise RewardError(f"reward {reward.name!r} returned {type(scores).__name__}; return visearch.protocols.Scores")
    values = torch.as_tensor(scores.values).detach().to("cpu", torch.float64)
    if values.shape != (count,):
        raise RewardError(
            f"reward {reward.name!r} returned scores of shape {tuple(values.shape)} for {count} samples; return (N,)"
        )
    for i in (~values.isfinite()).nonzero().flatten().tolist():
        raise RewardError(
            f"reward {reward.name!r} scored sample {i} {float(values[i])}: {scores.reasons.get(i, 'no reason given')}; "
            "give samples= and prompts= that it can score"
        )
    return values


def _check_spread(reward: Reward, values: Tensor) -> None:
    low, high = reward.range
    if values.min() < low or values.max() > high:
        raise RewardError(f"reward {reward.name!r} gave {values.tolist()}, which leaves its range ({low}, {high})")
    if values.min() == values.max():
        raise RewardError(
            f"reward {reward.name!r} scored all samples {float(values[0])}, so that their order cannot be seen; give "
            "samples= and prompts= that it does not score alike"
        )


def _check_same(reward: Reward, first: Tensor, second: Tensor, tolerance: float, how: str) -> None:
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise RewardError(
            f"reward {reward.name!r} gave {first.tolist()}, and asked {how} {second.tolist()}; scores must come in "
            "input order and depend on their own sample and prompt alone"
        )
