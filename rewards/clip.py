"""Contrastive image-text rewards: functions of the cosine of an image and its prompt."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visearch import assets
from visearch.rewards.base import ModelReward
from visearch.rewards.encoders import ClipEncoder, Encoder, OpenClipEncoder, open_clip_towers, shared
from visearch.rewards.loading import digest, locate, matches

__all__ = [
    "CLIP_FILES",
    "CLIPScore",
    "ContrastiveReward",
    "EmojiClip",
    "FormedReward",
    "OpenClipReward",
    "PickScore",
    "clip_encoder",
]

MODEL_FILES = ("config.json", "*.safetensors*|*.bin*")  # of a transformers model; large ones have an index
TOKENIZER_FILES = ("tokenizer*.json|vocab.json",)
CLIP_FILES = MODEL_FILES + TOKENIZER_FILES


class EncoderReward(ModelReward):
    """A reward that looks at the features of an :class:`visearch.rewards.encoders.Encoder`."""

    family = "clip"

    @property
    def encoder(self) -> Encoder:
        return self.module

    @property
    def image_part(self) -> tuple[str, ...]:
        """How names of the weights begin that see the image."""
        return self.encoder.image_part

    @torch.no_grad()
    def image_features(self, samples: Any) -> Tensor:
        """(N, D) float32 on CPU, of length 1: what images show, to compare them by; those with NaN count as black."""
        images, _ = self._images(samples)
        size = self.batch_size or len(images)
        with self.resident():
            parts = [self.encoder.images(images[i : i + size], self).cpu() for i in range(0, len(images), size)]
        return torch.cat(parts)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "preprocess": self.encoder.describe()}


class ContrastiveReward(EncoderReward):
    """A function of the cosine of image and text."""

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        return self._value((self.encoder.images(images, self) * self.encoder.texts(prompts)).sum(-1))

    def _value(self, cosine: Tensor) -> Tensor:
        """(n,) on the published scale from (n,) cosines."""
        raise NotImplementedError


class FormedReward(ContrastiveReward):
    """One that is published in several forms, the cosine itself among them.

    Class attributes beside those of :class:`ModelReward`:

    Attributes:
        RANGES: form -> its range.

    Args:
        model, options: as for :class:`ModelReward`.
        form: one of ``RANGES``.

    Raises:
        ValueError: an unknown form.
    """

    RANGES: ClassVar[dict[str, tuple[float, float]]]

    def __init__(self, model: str | Path | None = None, *, form: str, **options: Any) -> None:
        if form not in self.RANGES:
            raise ValueError(f"form={form!r} is unknown; give one of {', '.join(self.RANGES)}")
        self.form, self.range = form, self.RANGES[form]
        super().__init__(model, **options)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "form": self.form}


def clip_encoder(
    path: Path, activation: str, what: str, reward: ModelReward, tokenizer: Path | None = None
) -> ClipEncoder:
    """The encoder of a folder, shared by all rewards that read it on the device and in the dtype of ``reward``."""
    key = (path.resolve(), activation, tokenizer, reward.device, reward.dtype)
    return shared(key, lambda: ClipEncoder(path, activation, what, reward.dtype, tokenizer))


class CLIPScore(FormedReward):
    """CLIPScore (arXiv 2104.08718): how well an image fits its prompt, by OpenAI's CLIP.

    GenEval names colours by the same CLIP, so that its colour verdicts are no independent check of this reward.

    Args:
        model: hub id or folder of a transformers CLIP.
        form: ``"torchmetrics"``, max(100 cos, 0); ``"cosine"``, in [-1, 1]; ``"paper"``, 2.5 max(cos, 0) of the prompt
            after "A photo depicts".
        activation: which the weights were trained with, ``"gelu"`` for LAION's.
        options: as for :class:`ModelReward`.

    Raises:
        ValueError: an unknown form, or a model with another activation.
    """

    name = "clip-score"
    range = (0.0, 100.0)
    scale = "max(100 cos, 0), mostly 15 to 35"
    licence = "MIT (code and weights)"
    source = "openai/clip-vit-large-patch14"
    training_data = "400 million image-text pairs of the web, unpublished (2103.00020)"
    size = 427_616_513
    files = CLIP_FILES
    not_held_out_for = ("GenEval's colours",)

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "torchmetrics": (0.0, 100.0),
        "cosine": (-1.0, 1.0),
        "paper": (0.0, 2.5),
    }

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        form: str = "torchmetrics",
        activation: str = "quick_gelu",
        **options: Any,
    ) -> None:
        self.activation = activation
        super().__init__(model, form=form, **options)

    def _load(self) -> nn.Module:
        return clip_encoder(self.path, self.activation, self.name, self)

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        if self.form == "paper":
            prompts = [f"A photo depicts {prompt}" for prompt in prompts]
        return super()._score(images, prompts)

    def _value(self, cosine: Tensor) -> Tensor:
        if self.form == "cosine":
            return cosine
        return (100 if self.form == "torchmetrics" else 2.5) * cosine.clamp(min=0)


class PickScore(ContrastiveReward):
    """PickScore (arXiv 2305.01569): which image of a prompt users would pick, by a CLIP-H tuned on their choices.

    Args:
        model: hub id or folder of the transformers CLIP.
        tokenizer: hub id or folder of its tokenizer, where ``model`` holds none.
        options: as for :class:`ModelReward`.

    Raises:
        ValueError: a model with another activation than GELU.
    """

    name = "pick-score"
    range = (-100.0, 100.0)
    scale = "exp(logit scale) cos, mostly 18 to 24"
    licence = "see the model's card (weights), MIT (code)"
    source = "yuvalkirstain/PickScore_v1"
    training_data = "Pick-a-Pic: 584 000 choices between two images by users (2305.01569)"
    size = 986_109_441
    files = MODEL_FILES

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        **options: Any,
    ) -> None:
        self.tokenizer = str(tokenizer)
        super().__init__(model, **options)

    def _load(self) -> nn.Module:
        return clip_encoder(self.path, "gelu", self.name, self, self._tokenizer_folder())

    def _tokenizer_folder(self) -> Path:
        if matches(self.path, TOKENIZER_FILES[0]):
            return self.path
        return locate(self.tokenizer, TOKENIZER_FILES, needed_by=self.name, option="tokenizer")

    def _value(self, cosine: Tensor) -> Tensor:
        return self.encoder.scale * cosine

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "tokenizer": digest(self._tokenizer_folder(), TOKENIZER_FILES)}


class OpenClipReward(ContrastiveReward):
    """``100 cos(image, text)`` of an open_clip model, unclipped (CLIPScore, arXiv 2104.08718).

    Args:
        model: open_clip's name of the model, ``"hf-hub:..."`` or ``"local-dir:<folder>"``.
        pretrained: open_clip's tag of the weights, where the name does not imply them.
        name: how tables call it.
        licence: of the weights.
        options: as for :class:`ModelReward`.

    Raises:
        ValueError: open_clip knows no such model or weights, or they were trained with another activation.
    """

    range = (-100.0, 100.0)
    scale = "100 cos"
    licence = "see the model's card"
    training_data = "see the model's card"

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        *,
        name: str | None = None,
        licence: str | None = None,
        **options: Any,
    ) -> None:
        self.architecture, self.pretrained = str(model), pretrained
        self.name = name or f"open-clip:{model}" + (f"/{pretrained}" if pretrained else "")
        self.licence = licence or self.licence
        super().__init__(model, **options)

    def _load(self) -> nn.Module:
        return OpenClipEncoder(open_clip_towers(self.architecture, self.pretrained), self.architecture, self.dtype)

    @cached_property
    def revision(self) -> str:
        """sha256 of the weights in memory: open_clip says of no file where it lies."""
        total = hashlib.sha256()
        for name, tensor in self.encoder.model.state_dict().items():
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return total.hexdigest()

    def _value(self, cosine: Tensor) -> Tensor:
        return 100 * cosine


class EmojiClip(OpenClipReward):
    """The embedded world's own CLIP, trained on its images and captions alone."""

    name = "emoji-clip"
    licence = "Apache-2.0 (code and weights)"
    source = "visearch.assets, emoji-64/clip"
    training_data = "scenes of emoji-64 with their captions"
    size = 1_872_409

    def __init__(self, **options: Any) -> None:
        super().__init__(f"local-dir:{assets.path('emoji-64/clip')}", name=self.name, **options)
        self.source = type(self).source  # the same on every machine
