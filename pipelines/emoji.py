"""The embedded world's text-to-image generators: stock pipelines of a few million parameters, 64 x 64 pixels.

``emoji-64`` is a ``CogView4Pipeline`` that matches flows, in about 15 steps with guidance. ``emoji-64-v`` is a
``PixArtSigmaPipeline`` that predicts v, distilled to 4 steps without guidance; it shares the autoencoder and the text
encoder of the first. Captions have GenEval's wording; other words are unknown to their tokenizer.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import AutoTokenizer, GlmModel

from visearch.assets import path

NAME = "emoji-64"
DEFAULTS: dict[str, Any] = {"num_inference_steps": 15, "guidance_scale": 5.0, "height": 64, "width": 64}
"""Call arguments that the model card's numbers were measured with; the class's own default is 50 steps."""

CALLS: dict[str, dict[str, Any]] = {
    "emoji-64": DEFAULTS,
    "emoji-64-v": {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
        # the class would bin 64 x 64 to the resolutions of large models, and pad to 300 tokens
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 16,
    },
}
"""The same for each of the models."""


def load(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The shipped flow model, its progress bar off: ``load()("a photo of two cows", **DEFAULTS).images[0]``.

    Args:
        device: where to put it.
        dtype: precision of the weights; None means float32 (the files hold float16).

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    pipeline = DiffusionPipeline.from_pretrained(path(f"{NAME}/pipeline"), dtype=dtype or torch.float32)
    return _ready(pipeline, device)


def load_v(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> PixArtSigmaPipeline:
    """The shipped four-step v-prediction model; called with ``CALLS["emoji-64-v"]``. As :func:`load` otherwise."""
    shared, own, options = path(f"{NAME}/pipeline"), path(f"{NAME}/pipeline-v"), {"dtype": dtype or torch.float32}
    pipeline = PixArtSigmaPipeline(
        AutoTokenizer.from_pretrained(shared / "tokenizer"),
        GlmModel.from_pretrained(shared / "text_encoder", **options),
        AutoencoderKL.from_pretrained(shared / "vae", torch_dtype=options["dtype"]),
        PixArtTransformer2DModel.from_pretrained(own / "transformer", torch_dtype=options["dtype"]),
        DDIMScheduler.from_pretrained(own / "scheduler"),
    )
    return _ready(pipeline, device)


def _ready(pipeline: Any, device: str | torch.device) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
