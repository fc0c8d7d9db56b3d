"""Rewards: what a search maximises, and judges that it never sees; by name.

A class is imported when it is first asked for: ``from visearch.rewards import PickScore``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from visearch.protocols import Registry, Reward

CLASSES = {
    "AestheticV2": "aesthetic",
    "AverageRank": "combine",
    "CLIPScore": "clip",
    "Cached": "cache",
    "FunctionReward": "function",
    "HPSv2": "hps",
    "HPSv20": "hps",
    "ImageReward": "image_reward",
    "JpegCompressibility": "pixel",
    "JpegSize": "pixel",
    "NoiseAware": "noise_aware",
    "OCR": "ocr",
    "OpenClipReward": "clip",
    "PickScore": "clip",
    "SigLIP2": "siglip",
    "UnifiedReward": "unified",
    "VQAScore": "vqa",
    "VideoMean": "video",
    "WeightedSum": "combine",
    "ZScore": "combine",
    "check": "contract",
}

__all__ = ["REWARDS", "RewardLike", "check_names", "resolve", *CLASSES]

RewardLike = (
    str | Mapping[str, Any] | Reward | Callable[[list[Any], Sequence[str]], Sequence[float]] | Sequence["RewardLike"]
)

REWARDS = Registry(
    "reward",
    {
        "clip-score": "visearch.rewards.clip:CLIPScore",
        "pick-score": "visearch.rewards.clip:PickScore",
        "hps-v2.1": "visearch.rewards.hps:HPSv2",
        "hps-v2.0": "visearch.rewards.hps:HPSv20",
        "siglip2": "visearch.rewards.siglip:SigLIP2",
        "aesthetic": "visearch.rewards.aesthetic:AestheticV2",
        "image-reward": "visearch.rewards.image_reward:ImageReward",
        "vqa-score": "visearch.rewards.vqa:VQAScore",
        "unified-reward": "visearch.rewards.unified:UnifiedReward",
        "jpeg-size": "visearch.rewards.pixel:JpegSize",
        "jpeg-compressibility": "visearch.rewards.pixel:JpegCompressibility",
        "ocr": "visearch.rewards.ocr:OCR",
        "video-mean": "visearch.rewards.video:VideoMean",
        "emoji-clip": "visearch.rewards.clip:EmojiClip",
        "emoji-clip-noise-aware": "visearch.rewards.noise_aware:emoji_clip_noise_aware",
        # by name only: the verdict is GenEval's, which lies above this package
        **{f"judge-{letter}": f"visearch.geneval:judge_{letter}" for letter in "abc"},
    },
)


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{CLASSES[name]}"), name)


def resolve(reward: RewardLike, device: Any = "cpu") -> Reward:
    """A reward from a text, a mapping, a reward object, any callable, or several of them.

    Args:
        reward: a name; ``"NAME:MODEL"`` with the hub id, folder or file of its weights;
            ``"open-clip:MODEL/PRETRAINED"``; ``"noise-aware:FOLDER"``; an ensemble of these (see
            :mod:`visearch.rewards.combine`); ``"package.module:Name"`` of your own. ``{"class": NAME, **options}``
            gives options. A callable gets N PIL images (or lists of frames) and N prompts, and returns N floats, higher
            is better. A list is joined by average rank.
        device: where models run that are made here.

    Raises:
        ValueError: unknown name; near ones are suggested.
        FileNotFoundError: weights are missing; the text says which, and where to put them.
        TypeError: none of the above, or options that it does not take.
    """
    if isinstance(reward, (list, tuple)):
        from visearch.rewards.combine import AverageRank

        members = [resolve(member, device) for member in reward]
        return members[0] if len(members) == 1 else AverageRank(members)
    if isinstance(reward, str):
        return _named(reward, device)
    if isinstance(reward, Mapping):
        if (name := reward.get("class")) in REWARDS:
            options = {key: value for key, value in reward.items() if key != "class"}
            return REWARDS.load(name)(**{"device": device, **options})
        from visearch.rewards.function import plug_in

        return resolve(plug_in(reward, device), device)
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        from visearch.rewards.function import FunctionReward

        return FunctionReward(reward)
    raise TypeError(
        f"reward={reward!r} is a {type(reward).__name__}; give a name ({', '.join(REWARDS)}), a reward object, or a "
        "function (images, prompts) -> floats"
    )


def check_names(rewards: Sequence[RewardLike]) -> None:
    """Find typing errors in texts before large models are read.

    Raises:
        ValueError: as :func:`resolve` for a name that is unknown.
    """
    from visearch.rewards.combine import names
    from visearch.rewards.function import is_path

    for name in (name for text in rewards if isinstance(text, str) for name in names(text)):
        known, _, _ = name.partition(":")
        if known not in ("open-clip", "noise-aware") and not is_path(name):
            REWARDS.load(known)


def _named(text: str, device: Any) -> Reward:
    from visearch.rewards.combine import is_ensemble_text, parse
    from visearch.rewards.function import is_path, plug_in

    if is_ensemble_text(text):
        return parse(text, lambda term: resolve(term, device))
    name, colon, rest = text.partition(":")
    if name == "open-clip" and colon:
        from visearch.rewards.clip import OpenClipReward

        whole = rest.startswith(("hf-hub:", "local-dir:"))
        model, _, pretrained = (rest, "", "") if whole else rest.partition("/")
        return OpenClipReward(model, pretrained or None, device=device)
    if name == "noise-aware" and colon:
        from visearch.rewards.noise_aware import trained

        return trained(rest, device)
    if name not in REWARDS and is_path(text):
        return resolve(plug_in(text, device), device)
    factory, given = REWARDS.load(name), [rest] * bool(colon)
    try:
        inspect.signature(factory).bind(*given, device=device)
    except TypeError:
        raise ValueError(f"reward {text!r}: nothing may follow {name!r}") from None
    return factory(*given, device=device)
