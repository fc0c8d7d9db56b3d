"""The embedded world's text-to-image generator: a stock ``CogView4Pipeline`` of 7 M parameters, 64 x 64 pixels."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from visearch.assets import path

NAME = "emoji-64"
DEFAULTS: dict[str, Any] = {"num_inference_steps": 15, "guidance_scale": 5.0, "height": 64, "width": 64}
"""Call arguments that the model card's numbers were measured with; the class's own default is 50 steps."""


def load(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The shipped pipeline, its progress bar off: ``load()("a photo of two cows", **DEFAULTS).images[0]``.

    Captions have GenEval's wording; other words are unknown to its tokenizer.

    Args:
        device: where to put it.
        dtype: precision of the weights; None means float32 (the files hold float16).

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    pipeline = DiffusionPipeline.from_pretrained(path(f"{NAME}/pipeline"), dtype=dtype or torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
