"""ImageReward (arXiv 2304.05977): a BLIP text encoder that looks at the image, and a linear head, fitted to rankings.

Shapes: N samples, L = 35 text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from visearch.rewards.base import ModelReward
from visearch.rewards.encoders import warn_cut_off
from visearch.rewards.heads import linear_head
from visearch.rewards.loading import digest, file_of, load_strictly, locate, read_state
from visearch.rewards.preprocess import Preprocess

__all__ = ["BlipReward", "ImageReward", "from_published"]

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's values on the authors' data
LENGTH = 35
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 30524,
}  # fmt: skip
TOKENIZER, VOCABULARY = "google-bert/bert-base-uncased", "vocab.txt"
ADDED = ("[DEC]", "[ENC]")  # BLIP's, after BERT's own 30522
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's contrastive loss
PUBLISHED = {  # names in ImageReward.pt -> here, replaced in this order
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
}


class BlipReward(nn.Module):
    """Pixels and text tokens to one value: differentiable, and open to adapters on its linear layers.

    Args:
        vision, text: sizes, as of `BlipVisionConfig` and `BlipTextConfig`; default the published ones.
    """

    def __init__(self, vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        # transformers builds cross-attention into decoders only; forward() runs it as an encoder all the same
        config = BlipTextConfig(**text, encoder_hidden_size=vision["hidden_size"], is_decoder=True)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = linear_head(config.hidden_size)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N,) float32, before it is standardised by ``MEAN`` and ``STD``.

        Args:
            pixel_values: (N, 3, 224, 224), normalised by CLIP's mean and deviation.
            input_ids, attention_mask: (N, L) int64.
        """
        patches = self.vision(pixel_values=pixel_values).last_hidden_state
        hidden = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            is_decoder=False,  # True would be causal: position 0, which is read, would not see the text
        ).last_hidden_state
        return self.head(hidden[:, 0].float()).squeeze(-1)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ``ImageReward.pt`` under the names of :class:`BlipReward`; names that it does not know stay."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            continue
        for old, new in PUBLISHED.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


class ImageReward(ModelReward):
    """How much people would like the image for the prompt, standardised over the authors' data.

    Args:
        model: hub id; the file ``ImageReward.pt`` or a folder that holds it; or weights of a :class:`BlipReward` that
            were saved as safetensors.
        tokenizer: hub id, or local folder or file ``vocab.txt``, of BERT's uncased vocabulary; default ``model`` if it
            is a folder that holds it, else the published one.
        options: as for :class:`ModelReward`.

    Raises:
        FileNotFoundError: weights or vocabulary are missing.
        ValueError: they do not fit.
    """

    name = "image-reward"
    family = "blip"
    scale = "standardised value of the head, mostly between -2 and 2"
    licence = "Apache-2.0 (code and weights)"
    source = "zai-org/ImageReward"
    training_data = "137 000 comparisons of images for DiffusionDB prompts by experts (2304.05977)"
    size = 446_206_689
    files = ("ImageReward.pt|*.safetensors",)
    vision: ClassVar[Mapping[str, Any]] = VISION
    text: ClassVar[Mapping[str, Any]] = TEXT

    def __init__(self, model: str | Path | None = None, *, tokenizer: str | Path | None = None, **options: Any) -> None:
        beside = model is not None and (Path(model).expanduser() / VOCABULARY).is_file()
        source = str(tokenizer or (model if beside else TOKENIZER))
        self.vocabulary = locate(source, (VOCABULARY,), needed_by=self.name, option="tokenizer")
        self.tokenizer = self._tokenizer()
        self.preprocess = Preprocess(self.vision["image_size"], floor=False)
        super().__init__(model, **options)

    def _load(self) -> BlipReward:
        module = BlipReward(self.vision, self.text)
        load_strictly(module, from_published(read_state(file_of(self.path, self.files[0]))), self.name)
        module.to(self.dtype)
        module.head.float()
        return module

    def _tokenizer(self) -> Any:
        from transformers import BertTokenizer

        tokenizer = BertTokenizer(vocab=str(file_of(self.vocabulary, VOCABULARY)))
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
        if len(tokenizer) != self.text["vocab_size"]:
            raise ValueError(
                f"{self.name}: tokenizer={str(self.vocabulary)!r} has {len(tokenizer) - len(ADDED)} words, where the "
                f"model knows {self.text['vocab_size'] - len(ADDED)}; give {VOCABULARY} of {TOKENIZER}"
            )
        return tokenizer

    def _score(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        for prompt in dict.fromkeys(prompts):
            warn_cut_off(self.tokenizer, prompt, LENGTH)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        pixels = self.preprocess(images).to(self.device, self.dtype)
        raw = self.module(pixels, tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device))
        return (raw - MEAN) / STD

    def _config(self) -> dict[str, Any]:
        own = {"preprocess": asdict(self.preprocess), "tokenizer": digest(self.vocabulary, (VOCABULARY,))}
        return {**super()._config(), **own}
