"""Who names the colours of GenEval's objects (arXiv 2310.11513): OpenAI's CLIP, zero-shot, on the object cut out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from visearch.assets.words import COLORS
from visearch.rewards.clip import OpenClipReward
from visearch.rewards.detection import Instance

__all__ = ["ClipColors", "clip_colors"]

MODEL, PRETRAINED = "ViT-L-14-quickgelu", "openai"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND, ORIGINAL = "#999", "original"


class ClipColors:
    """Names colours by the nearest of ten texts, see :class:`visearch.rewards.detection.ColorNamer`.

    Args:
        model: open_clip's name of a CLIP, or ``MODEL/PRETRAINED`` with open_clip's tag or a file of weights, or
            ``"hf-hub:..."`` or ``"local-dir:FOLDER"``.
        background: colour of what is not the object, or ``"original"`` to leave it.
        crop: whether to cut the image to the object's box.
        device: where the model runs; in float32.

    Raises:
        ValueError: no such model, weights or colour, or a model without QuickGELU.
    """

    def __init__(
        self, model: str = MODEL, *, background: str = BACKGROUND, crop: bool = True, device: Any = "cpu"
    ) -> None:
        if background != ORIGINAL:
            ImageColor.getrgb(background)
        self.background, self.crop = background, crop
        name, weights = model, None
        if not model.startswith(("hf-hub:", "local-dir:")):
            name, _, weights = model.partition("/")
            weights = weights or PRETRAINED
        self.clip = OpenClipReward(name, weights, device=device)
        self._check_activation()
        # weights are told apart by their revision, wherever they lie
        self.id = f"open-clip:{name}, background {background}, {'cropped' if crop else 'whole'}"
        self.revision = self.clip.revision

    def _check_activation(self) -> None:
        from open_clip.transformer import QuickGELU

        if not any(isinstance(module, QuickGELU) for module in self.clip.module.modules()):
            raise ValueError(
                f"clip_model {self.clip.architecture!r} has GELU; OpenAI's CLIP, by which GenEval names colours, was "
                f"trained with QuickGELU: give {MODEL}"
            )

    def classify(self, image: Image.Image, class_name: str, instances: Sequence[Instance]) -> list[str]:
        """For each instance, all of one class and of one RGB image, one of GenEval's ten colours."""
        if not instances:
            return []
        seen = self.clip.image_features([self.cut_out(image, instance) for instance in instances])
        return [COLORS[index] for index in (seen @ self._texts(class_name).T).argmax(1).tolist()]

    def cut_out(self, image: Image.Image, instance: Instance) -> Image.Image:
        """What the model sees of an instance."""
        if instance.mask is not None and self.background != ORIGINAL:
            flat = Image.new("RGB", image.size, self.background)
            image = Image.composite(image, flat, Image.fromarray(instance.mask))
        return image.crop(instance.box) if self.crop else image

    def _texts(self, class_name: str) -> Tensor:
        """(10, D) of length 1: the mean over templates."""
        texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
        features = self.clip.encoder.texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
        return F.normalize(features.mean(1), dim=-1).cpu()


def clip_colors(
    device: Any, *, clip_model: str = MODEL, bgcolor: str = BACKGROUND, crop: str = "1", **unknown: str
) -> ClipColors:
    """From GenEval's own ``--options``, as texts.

    Raises:
        ValueError: an unknown option or value, and as :class:`ClipColors`.
    """
    if unknown:
        raise ValueError(f"--options {', '.join(unknown)}: the detector takes clip_model, bgcolor and crop")
    if crop not in ("0", "1"):
        raise ValueError(f"--options crop={crop}: give 0 or 1")
    return ClipColors(clip_model, background=bgcolor, crop=crop == "1", device=device)
