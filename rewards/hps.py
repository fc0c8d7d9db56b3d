"""HPSv2 (arXiv 2306.09341): human preference between images of a prompt, by an open_clip CLIP-H tuned on choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from visearch.rewards.clip import ContrastiveReward
from visearch.rewards.encoders import OpenClipEncoder
from visearch.rewards.loading import file_of, load_strictly, read_state
from visearch.rewards.preprocess import Preprocess

__all__ = ["HPSv2", "HPSv20"]


class HPSv2(ContrastiveReward):
    """The cosine of image and text, without a logit scale; papers print 100 times as much.

    Images are resized to fit into the square and padded with black, without a crop.

    Args:
        model: hub id, folder, or the one file of the version's weights.
        version: ``"2.1"`` or ``"2.0"``; upstream's own function defaults to 2.0.
        antialias: of the resize. The reference resized tensors in 2023, when that meant without; with it, scores differ
            slightly.
        options: as for :class:`ModelReward`.

    Raises:
        ValueError: an unknown version, or weights that do not fit.
    """

    name = "hps-v2.1"
    range = (-1.0, 1.0)
    scale = "cos, mostly 0.2 to 0.3"
    licence = "Apache-2.0 (code and weights)"
    source = "xswu/HPSv2"
    training_data = "choices between images, of higher quality than the 798 000 of HPD v2 (2306.09341)"
    size = 986_109_441
    files = ("HPS_v2.1_compressed.pt",)

    FILES: ClassVar[dict[str, str]] = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
    architecture: ClassVar[str] = "ViT-H-14"  # with plain GELU

    def __init__(
        self, model: str | Path | None = None, *, version: str = "2.1", antialias: bool = False, **options: Any
    ) -> None:
        if version not in self.FILES:
            raise ValueError(f"version={version!r} is unknown; give one of {', '.join(self.FILES)}")
        self.name, self.files, self.antialias = f"hps-v{version}", (self.FILES[version],), antialias
        super().__init__(model, **options)

    def _load(self) -> nn.Module:
        import open_clip

        path = file_of(self.path, self.files[0])
        state = read_state(path)
        if "state_dict" not in state:
            raise ValueError(f"{path} holds no 'state_dict'; give {self.files[0]} of {type(self).source}")
        towers = open_clip.create_model(self.architecture, load_weights=False)
        load_strictly(towers, state["state_dict"], self.name)
        fitted = Preprocess(towers.visual.image_size[0], "pad", antialias=self.antialias)
        return OpenClipEncoder(towers, self.architecture, self.dtype, fitted)

    def _value(self, cosine: Tensor) -> Tensor:
        return cosine


class HPSv20(HPSv2):
    """HPSv2 as first published: :class:`HPSv2` of version 2.0, with its options."""

    name = "hps-v2.0"
    training_data = "HPD v2: 798 000 choices between images of 108 000 prompts (2306.09341)"
    files = ("HPS_v2_compressed.pt",)

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        super().__init__(model, version="2.0", **options)
