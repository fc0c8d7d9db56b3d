"""The LAION aesthetic predictor, version 2: how pleasing an image is, whatever was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visearch.rewards.clip import CLIP_FILES, CLIPScore, EncoderReward, clip_encoder
from visearch.rewards.encoders import Encoder
from visearch.rewards.heads import linear_head
from visearch.rewards.loading import digest, file_of, load_strictly, locate, read_state

__all__ = ["AestheticV2"]


class AestheticV2(EncoderReward):
    """Ratings from 1 to 10, predicted by a linear head from the features of OpenAI's CLIP, of length 1.

    Args:
        model: the head's file, or a folder that holds it; a folder with a CLIP beside it serves both.
        encoder: hub id or folder of the CLIP, as :class:`visearch.rewards.clip.CLIPScore` takes it, which then shares
            its features; default ``model`` if it holds one, else the published one.
        options: as for :class:`ModelReward`; the head runs in float32 whatever ``dtype``.

    Raises:
        ValueError: weights that do not fit, or a CLIP with another activation than QuickGELU.
    """

    name = "aesthetic"
    range = (1.0, 10.0)
    scale = "mean rating from 1 to 10, mostly 4 to 7"
    licence = "Apache-2.0 (code and head), MIT (CLIP)"
    source = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    training_data = "ratings of SAC, LAION-Logos and AVA images"
    size = CLIPScore.size + 927_969
    files = ("sac+logos+ava1-l14-linearMSE.pth",)
    needs_prompt = False

    def __init__(self, model: str | Path | None = None, *, encoder: str | Path | None = None, **options: Any) -> None:
        self.clip = self._clip_folder(model, encoder)
        super().__init__(model, **options)

    def _clip_folder(self, model: str | Path | None, encoder: str | Path | None) -> Path:
        beside = model is not None and (Path(model).expanduser() / "config.json").is_file()
        clip = str(encoder or (model if beside else CLIPScore.source))
        return locate(clip, CLIP_FILES, needed_by=self.name, option="encoder", published=CLIPScore.source)

    def _load(self) -> nn.Module:
        encoder = clip_encoder(self.clip, "quick_gelu", self.name, self)
        head = linear_head(encoder.model.config.projection_dim)
        state = read_state(file_of(self.path, self.files[0]))
        load_strictly(head, {k.removeprefix("layers."): v for k, v in state.items()}, self.name)
        return nn.ModuleDict({"encoder": encoder, "head": head})

    @property
    def encoder(self) -> Encoder:
        return self.module["encoder"]

    @property
    def image_part(self) -> tuple[str, ...]:
        return (*(f"encoder.{part}" for part in self.encoder.image_part), "head.")

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        return self.module["head"](self.encoder.images(images, self)).squeeze(-1)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "encoder": digest(self.clip, CLIP_FILES)}
