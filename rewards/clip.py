"""Contrastive image-text rewards through open_clip: 100 x cosine of image and text features (CLIPScore, 2104.08718)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visearch import assets
from visearch.protocols import Scores
from visearch.rewards.images import to_pil

__all__ = ["OpenClipReward", "emoji_clip"]


class OpenClipReward:
    """``100 cos(image, text)`` of an open_clip model, unclipped.

    Args:
        model: open_clip's name of the model, ``"hf-hub:..."`` or ``"local-dir:<folder>"``.
        pretrained: open_clip's tag of the weights, where the name does not imply them.
        name: how tables call it.
        device, dtype: where and in which precision the towers run; features are compared in float32.

    Raises:
        ValueError: open_clip knows no such model or weights.
    """

    higher_is_better = True
    range = (-100.0, 100.0)
    needs = frozenset({"pixels"})

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        *,
        name: str | None = None,
        licence: str = "see the model's card",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        import open_clip

        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, device=device, weights_only=True
            )
        except (RuntimeError, FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"open_clip cannot load model={model!r} pretrained={pretrained!r}: {error}; give a name of "
                "open_clip.list_pretrained() as MODEL/PRETRAINED, or local-dir:FOLDER"
            ) from error
        self.model.eval().requires_grad_(False).to(dtype)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.name = name or f"open-clip:{model}" + (f"/{pretrained}" if pretrained else "")
        self.licence, self.source = licence, model
        self.device, self.dtype = torch.device(device), dtype
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def score(
        self,
        samples: Any,
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N images; each distinct prompt is encoded once."""
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in to_pil(samples)])
        images = self.model.encode_image(pixels.to(self.device, self.dtype), normalize=True).float()
        texts = torch.stack([self._text(p) for p in prompts])
        return Scores(100 * (images * texts).sum(-1).cpu())

    def _text(self, prompt: str) -> torch.Tensor:
        if prompt not in self._texts:
            tokens = self.tokenizer([prompt]).to(self.device)
            self._texts[prompt] = self.model.encode_text(tokens, normalize=True)[0].float()
        return self._texts[prompt]


def emoji_clip(device: torch.device | str = "cpu") -> OpenClipReward:
    """The embedded world's own CLIP, trained on its images and captions alone."""
    folder = assets.path("emoji-64/clip")
    return OpenClipReward(f"local-dir:{folder}", name="emoji-clip", licence="Apache-2.0", device=device)
