"""Image and text encoders of one space, as rewards use them: features of length 1, computed once.

Shapes: n images of a chunk, L tokens, D features.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from visearch.rewards.images import to_pil
from visearch.rewards.loading import pretrained
from visearch.rewards.preprocess import Preprocess

__all__ = ["ClipEncoder", "Encoder", "NaflexEncoder", "OpenClipEncoder", "SiglipEncoder", "open_clip_towers", "shared"]

KEPT = 4096  # features that an encoder keeps, of texts, and of images that a second reward may ask for

_SHARED: weakref.WeakValueDictionary[Hashable, Encoder] = weakref.WeakValueDictionary()


def shared(key: Hashable, load: Callable[[], Encoder]) -> Encoder:
    """The encoder that another reward already holds under ``key``, or a new one."""
    encoder = _SHARED.get(key)
    if encoder is None:
        encoder = _SHARED[key] = load()
    return encoder


class Encoder(nn.Module):
    """Both towers, with what they take.

    Args:
        model: the towers.
        tokenizer: of texts.
        context_length: L, the most tokens of a text.

    Attributes:
        scale, bias: exp(logit scale) and logit bias, in full precision whatever that of the towers.
        preprocess: pixels to inputs of the image tower.
        image_part: how names of the image tower's weights begin.
    """

    preprocess: Preprocess
    image_part: tuple[str, ...]

    def __init__(self, model: nn.Module, tokenizer: Any, context_length: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.context_length = model, tokenizer, context_length
        self.scale = math.exp(float(model.logit_scale.detach()))
        bias = getattr(model, "logit_bias", None)
        self.bias = 0.0 if bias is None else float(bias.detach())
        self._own = list(model.parameters())
        self._texts: dict[str, Tensor] = {}
        self._images: dict[int, tuple[Tensor, set[int]]] = {}
        self._readers: weakref.WeakSet[Any] = weakref.WeakSet()

    def inputs(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """What :meth:`encode_images` takes for n uint8 images (3, H, W), computed where they are."""
        return {"pixel_values": self.preprocess(images)}

    def describe(self) -> dict[str, Any]:
        """How images are preprocessed, JSON-able."""
        return asdict(self.preprocess)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(n, D), differentiable."""
        raise NotImplementedError

    def tokens(self, text: str) -> Tensor:
        """(1, L) int64."""
        raise NotImplementedError

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(n, D), differentiable."""
        raise NotImplementedError

    def images(self, images: Sequence[Tensor], reader: Any) -> Tensor:
        """(n, D) float32 of length 1, on the encoder's device.

        What one reward has just computed, another takes. The same reward that asks again gets it computed again: what
        a score costs must not hang on whether its image was seen before.

        Args:
            images: uint8 (3, H, W) each.
            reader: the reward that asks.
        """
        inputs = self.inputs(images)
        self._readers.add(reader)
        swapped = [id(p) for p in self.model.parameters()] != [id(p) for p in self._own]  # functional_call, adapters
        graph = torch.is_grad_enabled()  # of the one who asks: what was computed for another is no part of it
        if len(self._readers) < 2 or swapped or graph:
            return self._unit(inputs)
        keys, reader = fingerprints(inputs), id(reader)
        entries = [self._images.get(key, (None, {reader})) for key in keys]
        if all(reader not in seen for _, seen in entries):
            for _, seen in entries:
                seen.add(reader)
            return torch.stack([features for features, _ in entries]).to(self._own[0].device)
        features = self._unit(inputs)
        self._images |= {key: (row, {reader}) for key, row in zip(keys, features, strict=True)}
        forget(self._images)
        return features

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 of length 1, on the encoder's device; each text is encoded alone, and once.

        Warns:
            UserWarning: a text is longer than the encoder takes; says what was cut off.
        """
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self._texts[text] = self._text(text)
        found = torch.stack([self._texts[text] for text in texts]).to(self._own[0].device)
        forget(self._texts)
        return found

    def _unit(self, inputs: Mapping[str, Tensor]) -> Tensor:
        own = self._own[0]
        moved = {k: v.to(own.device, own.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        return F.normalize(self.encode_images(**moved).float(), dim=-1)

    def _text(self, text: str) -> Tensor:
        warn_cut_off(self.tokenizer, text, self.context_length)
        features = self.encode_texts(self.tokens(text).to(self._own[0].device))
        return F.normalize(features[0].float(), dim=-1)


class ClipEncoder(Encoder):
    """A transformers ``CLIPModel``.

    Args:
        path: folder of the model.
        activation: ``"quick_gelu"`` or ``"gelu"``, which the weights were trained with.
        what: the reward, for errors.
        dtype: of the towers.
        tokenizer: folder of the tokenizer; default ``path``.

    Raises:
        ValueError: weights that do not fit, or another activation.
    """

    image_part = ("model.vision_model.", "model.visual_projection.")

    def __init__(
        self, path: Path, activation: str, what: str, dtype: torch.dtype, tokenizer: Path | None = None
    ) -> None:
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        check_activation(CLIPConfig.from_pretrained(path), activation, what)
        # in float32 first: the logit scale must not be rounded with the towers
        model = pretrained(CLIPModel, path, what, torch.float32)
        tokens = model.config.text_config.max_position_embeddings
        super().__init__(model, AutoTokenizer.from_pretrained(tokenizer or path), tokens)
        self.preprocess = Preprocess(model.config.vision_config.image_size)
        self.to(dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values).pooler_output

    def tokens(self, text: str) -> Tensor:
        return padded(self.tokenizer, text, self.context_length)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        # what follows the end token is masked out, so that padding needs no mask
        return self.model.get_text_features(input_ids=tokens).pooler_output


class SiglipEncoder(Encoder):
    """A transformers ``SiglipModel``, as which SigLIP 2 checkpoints of one image size are published.

    Args:
        path: folder of the model.
        what: the reward, for errors.
        dtype: of the towers.

    Raises:
        ValueError: weights that do not fit, or a resampling filter that is neither bilinear nor bicubic.
    """

    image_part = ("model.vision_model.",)
    model_class, processor_class = "SiglipModel", "SiglipImageProcessorPil"

    def __init__(self, path: Path, what: str, dtype: torch.dtype) -> None:
        import transformers

        model = pretrained(getattr(transformers, self.model_class), path, what, torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if tokenizer("a").input_ids[-1] != tokenizer.eos_token_id:
            warnings.warn(
                f"{what}: the tokenizer in {path} does not end a text as in training; take tokenizer.json as published",
                stacklevel=2,
            )
        super().__init__(model, tokenizer, model.config.text_config.max_position_embeddings)
        self._see(getattr(transformers, self.processor_class).from_pretrained(path))
        self.to(dtype)

    def _see(self, processor: Any) -> None:
        self.preprocess = Preprocess(
            self.model.config.vision_config.image_size,
            "stretch",
            Image.Resampling(processor.resample).name.lower(),
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )

    def encode_images(self, **inputs: Tensor) -> Tensor:
        return self.model.get_image_features(**inputs).pooler_output

    def tokens(self, text: str) -> Tensor:
        return padded(self.tokenizer, text.lower(), self.context_length)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        # trained without a mask: the last position, which is read, is mostly padding
        return self.model.get_text_features(input_ids=tokens).pooler_output


class NaflexEncoder(SiglipEncoder):
    """A transformers ``Siglip2Model``, which takes images in their own aspect ratio, as at most 256 patches."""

    model_class, processor_class = "Siglip2Model", "Siglip2ImageProcessorPil"

    def _see(self, processor: Any) -> None:
        self.processor = processor

    def inputs(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(self.processor(to_pil(images), return_tensors="pt"))

    def describe(self) -> dict[str, Any]:
        facts = ("patch_size", "max_num_patches", "resample", "image_mean", "image_std")
        return {name: getattr(self.processor, name) for name in facts}


class OpenClipEncoder(Encoder):
    """An open_clip model.

    Args:
        towers: the model.
        name: open_clip's name of it, for its tokenizer.
        preprocess: of images; default open_clip's own for these weights.
        dtype: of the towers.
    """

    image_part = ("model.visual.",)

    def __init__(self, towers: nn.Module, name: str, dtype: torch.dtype, preprocess: Preprocess | None = None) -> None:
        import open_clip

        super().__init__(towers, open_clip.get_tokenizer(name), towers.context_length)
        self.preprocess = preprocess or open_clip_preprocess(towers.visual.preprocess_cfg)
        self.to(dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)

    def tokens(self, text: str) -> Tensor:
        return self.tokenizer([text])

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def open_clip_towers(model: str, pretrained: str | None) -> nn.Module:
    """An open_clip model with its weights.

    Args:
        model: open_clip's name of the model, ``"hf-hub:..."`` or ``"local-dir:<folder>"``.
        pretrained: open_clip's tag of the weights, where the name does not imply them.

    Raises:
        ValueError: open_clip knows no such model or weights, or they were trained with another activation.
    """
    import open_clip

    check_quick_gelu(model, pretrained)
    try:
        # required: open_clip would make up weights that it does not find
        return open_clip.create_model(model, pretrained=pretrained, weights_only=True, require_pretrained=True)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        remedy = "give a name of open_clip.list_pretrained() as MODEL/PRETRAINED, or local-dir:FOLDER"
        if known := pretrained and open_clip.get_pretrained_cfg(model, pretrained):
            source = known.get("hf_hub", "").strip("/") or known["url"]
            remedy = f"download open_clip_model.safetensors of {source} and give {model}/FILE"
        raise ValueError(
            f"open_clip cannot load model={model!r} pretrained={pretrained!r}: {error}; {remedy}"
        ) from error


def open_clip_preprocess(config: Mapping[str, Any]) -> Preprocess:
    """What open_clip's own transform does with such a ``preprocess_cfg``.

    Raises:
        ValueError: images that are not square.
    """
    height, width = (config["size"],) * 2 if isinstance(config["size"], int) else config["size"]
    if height != width:
        raise ValueError(f"the model takes images of {height} x {width} pixels; give one that takes square ones")
    return Preprocess(
        height,
        {"shortest": "crop", "squash": "stretch", "longest": "pad"}[config["resize_mode"]],
        "bilinear" if config["interpolation"] == "bilinear" else "bicubic",  # "random" is bicubic but in training
        tuple(config["mean"]),
        tuple(config["std"]),
        floor=False,
        fill=config["fill_color"],
    )


def check_activation(config: Any, wanted: str, what: str) -> None:
    """Refuse a CLIP whose activation is not that of its training: it runs all the same, and scores wrongly.

    Raises:
        ValueError: ``hidden_act`` of a tower is not ``wanted``.
    """
    for tower in ("text_config", "vision_config"):
        found = getattr(config, tower).hidden_act
        if found != wanted:
            raise ValueError(
                f"{what}: {tower}.hidden_act is {found!r} and these weights were trained with {wanted!r}; set it to "
                f"{wanted!r} in config.json, or give the checkpoint that was published"
            )


def check_quick_gelu(model: str, pretrained: str | None) -> None:
    """The same for a tag of open_clip's weights, before they are downloaded.

    Raises:
        ValueError: they were trained with QuickGELU and the model has GELU.
    """
    import open_clip

    weights = (open_clip.get_pretrained_cfg(model, pretrained) if pretrained else None) or {}
    config = open_clip.get_model_config(model) or {}
    if weights.get("quick_gelu", False) and not config.get("quick_gelu", False):
        raise ValueError(
            f"pretrained={pretrained!r} was trained with QuickGELU, which model={model!r} has not; give "
            f"{f'{model}-quickgelu'!r}"
        )


def padded(tokenizer: Any, text: str, length: int) -> Tensor:
    """(1, length) ids, filled up on the right."""
    return tokenizer(
        [text], padding="max_length", truncation=True, max_length=length, padding_side="right", return_tensors="pt"
    ).input_ids


def warn_cut_off(tokenizer: Any, text: str, length: int) -> None:
    """Say what of a text its encoder will not see.

    Warns:
        UserWarning: it has more than ``length`` tokens.
    """
    if lost := cut_off(tokenizer, text, length):
        warnings.warn(
            f"a prompt is longer than the {length} tokens that its encoder takes; not seen: {lost!r}", stacklevel=3
        )


def cut_off(tokenizer: Any, text: str, length: int) -> str:
    """What of a text lies beyond ``length`` tokens."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip's wrapper of one of transformers
    if hasattr(tokenizer, "num_special_tokens_to_add"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        room = length - tokenizer.num_special_tokens_to_add()
    else:
        ids, room = tokenizer.encode(text), length - 2
    return tokenizer.decode(ids[room:]).strip()


def fingerprints(inputs: Mapping[str, Tensor]) -> list[int]:
    """A number for each of n images, that differs where a byte does; the pixels stay where they are.

    It is a random linear form of the bytes modulo 2^64: two images that differ have the same by a chance below 2^-56.
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in inputs.values():
        rows = tensor.flatten(1).contiguous().view(torch.uint8)
        factors = _factors(rows.shape[1], rows.device)
        total = total.to(rows.device) + torch.stack([(row * factors).sum() for row in rows])
    return total.tolist()


@lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    drawn = torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(0))
    return drawn.to(device)


def forget(kept: dict[Any, Any]) -> None:
    """Drop what was put in first, beyond ``KEPT`` entries."""
    while len(kept) > KEPT:
        del kept[next(iter(kept))]
