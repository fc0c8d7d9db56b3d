"""Real diffusers pipelines at toy size with random weights: no hub, a fraction of a second a call on one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tiny import image, video
from tiny.image import hunyuan_embeds
from tiny.parts import IMAGE, MASK, word_tokenizer
from tiny.registry import FAMILIES, PROMPT, Family

__all__ = [
    "FAMILIES", "IMAGE", "MASK", "OTHERS", "PIPELINES", "PROMPT", "Family", "build", "hunyuan_embeds", "image", "video",
    "word_tokenizer",
]  # fmt: skip

# the classes that tests of single features run over
PIPELINES: dict[str, Callable[[], Any]] = {n: FAMILIES[n].make for n in ("sd", "sdxl", "sd3", "flux", "cogview4")}

# other shapes of loop
OTHERS: dict[str, Callable[[], Any]] = {
    n: FAMILIES[n].make
    for n in ("wan", "pixart", "z-image", "hunyuan-image", "img2img", "controlnet", "controlnet-inpaint")
}


def build(name: str, scheduler: Any = None) -> Any:
    """A tiny pipeline by name, its progress bar off, the same weights every time."""
    torch.manual_seed(0)
    pipe = FAMILIES[name].make()
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe
