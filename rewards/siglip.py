"""SigLIP 2 (arXiv 2502.14786): the probability that image and text belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from visearch.rewards.clip import CLIP_FILES, FormedReward
from visearch.rewards.encoders import NaflexEncoder, SiglipEncoder

__all__ = ["SigLIP2"]


class SigLIP2(FormedReward):
    """``sigmoid(exp(logit scale) cos + logit bias)``.

    Args:
        model: hub id or folder of a transformers SigLIP; those called "naflex" see images in their own aspect ratio.
        form: ``"probability"``, or ``"cosine"`` in [-1, 1].
        options: as for :class:`ModelReward`.

    Raises:
        ValueError: an unknown form, or weights that do not fit.
    """

    name = "siglip2"
    range = (0.0, 1.0)
    scale = "probability that image and text belong together, mostly far below 0.5"
    licence = "Apache-2.0 (code and weights)"
    source = "google/siglip2-so400m-patch14-384"
    training_data = "WebLI: 10 billion images of the web with 12 billion texts, unpublished (2502.14786)"
    size = 1_136_008_498
    files = (*CLIP_FILES, "preprocessor_config.json|processor_config.json")

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"probability": (0.0, 1.0), "cosine": (-1.0, 1.0)}

    def __init__(self, model: str | Path | None = None, *, form: str = "probability", **options: Any) -> None:
        super().__init__(model, form=form, **options)

    def _load(self) -> nn.Module:
        kind = json.loads((self.path / "config.json").read_text())["model_type"]
        return (NaflexEncoder if kind == "siglip2" else SiglipEncoder)(self.path, self.name, self.dtype)

    def _value(self, cosine: Tensor) -> Tensor:
        return cosine if self.form == "cosine" else (self.encoder.scale * cosine + self.encoder.bias).sigmoid()
