"""Vision-language models with their processors, saved as a checkpoint of the hub would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

KINDS = ("qwen2.5-vl", "qwen3-vl")
MERGES = (("Y", "e"), ("Ye", "s"), ("y", "e"), ("ye", "s"), ("Ġ", "Yes"), ("Ġ", "yes"))
MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


def save(folder: Path, kind: str = KINDS[0], merges: Any = MERGES, chat: str | None = CHAT) -> Path:
    """A tiny random model of a kind in a folder, whose own settings would sample, as those of published ones do."""
    tokenizer = byte_tokenizer(merges)
    marks = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    torch.manual_seed(0)
    model = (qwen2_5_vl if kind == KINDS[0] else qwen3_vl)(len(tokenizer), marks).eval()
    model.generation_config.update(do_sample=True, temperature=5.0)
    images = Qwen2VLImageProcessor(**PATCHES, min_pixels=64, max_pixels=1024)
    processor, videos = (
        (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor) if kind == KINDS[0] else (Qwen3VLProcessor, Qwen3VLVideoProcessor)
    )
    model.save_pretrained(folder)
    processor(images, tokenizer, videos(**PATCHES), chat_template=chat).save_pretrained(folder)
    return folder


def byte_tokenizer(merges: Any = MERGES) -> PreTrainedTokenizerFast:
    """Bytes, and the words that merges make of them."""
    words = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=MARKS[0], eos_token=MARKS[2], extra_special_tokens=list(MARKS[1:])
    )


def _text(vocabulary: int, marks: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "initializer_range": 0.3,
        "pad_token_id": marks["<|endoftext|>"], "eos_token_id": marks["<|im_end|>"],
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip


VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.3,
}  # fmt: skip


def _marks(marks: dict[str, int]) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    return {f"{name}_token_id": marks[mark] for name, mark in zip(names, MARKS[3:], strict=True)}


def qwen2_5_vl(vocabulary: int, marks: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    vision = {**VISION, "window_size": 16, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(text_config=_text(vocabulary, marks), vision_config=vision, **_marks(marks))
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(vocabulary: int, marks: dict[str, int]) -> Qwen3VLForConditionalGeneration:
    vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {**_text(vocabulary, marks), "head_dim": 8}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_marks(marks))
    return Qwen3VLForConditionalGeneration(config)
