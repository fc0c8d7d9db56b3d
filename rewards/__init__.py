"""Rewards: what a search maximises, and judges that it never sees; by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from visearch.protocols import Registry, Reward

__all__ = ["REWARDS", "RewardLike", "resolve"]

RewardLike = str | Reward | Callable[[list[Any], Sequence[str]], Sequence[float]]

REWARDS = Registry(
    "reward",
    {
        "emoji-clip": "visearch.rewards.clip:emoji_clip",
        # by name only: the verdict is GenEval's, which lies above this package
        **{f"judge-{letter}": f"visearch.geneval:judge_{letter}" for letter in "abc"},
    },
)


def resolve(reward: RewardLike, device: Any = "cpu") -> Reward:
    """A reward from its name, ``"open-clip:MODEL[/PRETRAINED]"``, a reward object, or any callable.

    A callable gets N PIL images (or lists of frames) and N prompts, and returns N floats, higher is better.

    Raises:
        ValueError: unknown name; near ones are suggested.
        TypeError: none of the above.
    """
    if isinstance(reward, str):
        if reward.startswith("open-clip:"):
            from visearch.rewards.clip import OpenClipReward

            model, _, pretrained = reward.removeprefix("open-clip:").partition("/")
            return OpenClipReward(model, pretrained or None, device=device)
        return REWARDS.load(reward)(device=device)
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        from visearch.rewards.function import FunctionReward

        return FunctionReward(reward)
    raise TypeError(
        f"reward={reward!r} is a {type(reward).__name__}; give a name ({', '.join(REWARDS)}), a reward object, or a "
        "function (images, prompts) -> floats"
    )
