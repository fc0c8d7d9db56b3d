"""mmdet's checkpoint of Mask2Former as transformers reads it: other names and order of channels, projections apart."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visearch.assets.words import class_names
from visearch.rewards.loading import digest, load_strictly, read_state
from visearch.rewards.mask2former import CHECKPOINT, RECORD

__all__ = ["convert", "published_config", "renamed"]

ENCODER = "model.pixel_level_module.encoder"
DECODER = "model.pixel_level_module.decoder"
TRANSFORMER = "model.transformer_module"
BLOCK, BLOCK_TO = r"backbone\.stages\.(\d+)\.blocks\.(\d+)", rf"{ENCODER}.swin.encoder.layers.\1.blocks.\2"
PIXEL = r"panoptic_head\.pixel_decoder"
LAYER, LAYER_TO = rf"{PIXEL}\.encoder\.layers\.(\d+)", rf"{DECODER}.encoder.layers.\1"
QUERY, QUERY_TO = r"panoptic_head\.transformer_decoder\.layers\.(\d+)", rf"{TRANSFORMER}.decoder.layers.\1"

# How a name begins -> how it begins there; the first that fits. A joint projection of queries, keys and values goes to
# three places, {}. Of two spellings, the second is mmdet 3's.
RULES = {
    r"backbone\.patch_embed\.projection": f"{ENCODER}.swin.embeddings.patch_embeddings.projection",
    r"backbone\.patch_embed\.norm": f"{ENCODER}.swin.embeddings.norm",
    **{rf"backbone\.norm{i}": f"{ENCODER}.hidden_states_norms.stage{i + 1}" for i in range(4)},
    rf"{BLOCK}\.attn\.w_msa\.qkv": rf"{BLOCK_TO}.attention.{{}}_proj",
    rf"{BLOCK}\.attn\.w_msa\.proj": rf"{BLOCK_TO}.attention.o_proj",
    rf"{BLOCK}\.attn\.w_msa\.relative_position": rf"{BLOCK_TO}.attention.relative_position_bias.relative_position",
    rf"{BLOCK}\.norm1": rf"{BLOCK_TO}.layernorm_before",
    rf"{BLOCK}\.norm2": rf"{BLOCK_TO}.layernorm_after",
    rf"{BLOCK}\.ffn\.layers\.0\.0": rf"{BLOCK_TO}.mlp.fc1",
    rf"{BLOCK}\.ffn\.layers\.1": rf"{BLOCK_TO}.mlp.fc2",
    r"backbone\.stages\.(\d+)\.downsample": rf"{ENCODER}.swin.encoder.layers.\1.downsample",
    rf"{PIXEL}\.input_convs\.(\d+)\.conv": rf"{DECODER}.input_projections.\1.0",
    rf"{PIXEL}\.input_convs\.(\d+)\.gn": rf"{DECODER}.input_projections.\1.1",
    rf"{LAYER}\.(attentions\.0|self_attn)": rf"{LAYER_TO}.self_attn",
    rf"{LAYER}\.norms\.0": rf"{LAYER_TO}.self_attn_layer_norm",
    rf"{LAYER}\.norms\.1": rf"{LAYER_TO}.final_layer_norm",
    rf"{LAYER}\.(ffns\.0|ffn)\.layers\.0\.0": rf"{LAYER_TO}.fc1",
    rf"{LAYER}\.(ffns\.0|ffn)\.layers\.1": rf"{LAYER_TO}.fc2",
    rf"{PIXEL}\.level_encoding\.weight": f"{DECODER}.level_embed",
    rf"{PIXEL}\.lateral_convs\.0\.conv": f"{DECODER}.adapter_1.0",
    rf"{PIXEL}\.lateral_convs\.0\.gn": f"{DECODER}.adapter_1.1",
    rf"{PIXEL}\.output_convs\.0\.conv": f"{DECODER}.layer_1.0",
    rf"{PIXEL}\.output_convs\.0\.gn": f"{DECODER}.layer_1.1",
    rf"{PIXEL}\.mask_feature": f"{DECODER}.mask_projection",
    rf"{QUERY}\.(attentions\.0|cross_attn)\.attn": rf"{QUERY_TO}.cross_attn",
    rf"{QUERY}\.(attentions\.1|self_attn)\.attn\.in_proj_": rf"{QUERY_TO}.self_attn.{{}}_proj.",
    rf"{QUERY}\.(attentions\.1|self_attn)\.attn\.out_proj": rf"{QUERY_TO}.self_attn.out_proj",
    rf"{QUERY}\.norms\.0": rf"{QUERY_TO}.cross_attn_layer_norm",
    rf"{QUERY}\.norms\.1": rf"{QUERY_TO}.self_attn_layer_norm",
    rf"{QUERY}\.norms\.2": rf"{QUERY_TO}.final_layer_norm",
    rf"{QUERY}\.(ffns\.0|ffn)\.layers\.0\.0": rf"{QUERY_TO}.fc1",
    rf"{QUERY}\.(ffns\.0|ffn)\.layers\.1": rf"{QUERY_TO}.fc2",
    r"panoptic_head\.transformer_decoder\.post_norm": f"{TRANSFORMER}.decoder.layernorm",
    r"panoptic_head\.query_embed": f"{TRANSFORMER}.queries_embedder",
    r"panoptic_head\.query_feat": f"{TRANSFORMER}.queries_features",
    r"panoptic_head\.level_embed": f"{TRANSFORMER}.level_embed",
    r"panoptic_head\.cls_embed": "class_predictor",
    **{
        rf"panoptic_head\.mask_embed\.{2 * i}": f"{TRANSFORMER}.decoder.mask_predictor.mask_embedder.{i}.0"
        for i in range(3)
    },
}
COMPUTED = ".relative_position_index"  # not learned
UNUSED = (".swin.layernorm.weight", ".swin.layernorm.bias", "criterion.empty_weight")  # by a detector at work


def convert(source: str | Path, out: str | Path, *, allow_pickle: bool = False, config: Any = None) -> dict[str, Any]:
    """Write what ``--detector mmdet-converted`` reads, and ``conversion.json`` about where it comes from.

    Args:
        source: mmdet's checkpoint, of versions 2 or 3.
        out: folder, new or empty.
        allow_pickle: read a file that holds more than tensors and containers. Such a file can run code: only with one
            that you trust.
        config: transformers' configuration of the model; default that of the published one.

    Returns:
        What ``conversion.json`` says.

    Raises:
        FileNotFoundError: no ``source``.
        ValueError: ``out`` is not empty, a file that is refused, or weights that do not fit exactly.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    source, out = Path(source), Path(out)
    if not source.is_file():
        raise FileNotFoundError(f"{source} is no file; download {CHECKPOINT}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give a new folder")
    checkpoint = _read(source, allow_pickle)
    state = renamed(checkpoint.get("state_dict", checkpoint))
    model = Mask2FormerForUniversalSegmentation(published_config() if config is None else config)
    unused = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(UNUSED)}
    load_strictly(model, unused | state, str(source))
    model.save_pretrained(out)
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "source": {"name": source.name, "bytes": source.stat().st_size, "sha256": sha256, "pickle": allow_pickle},
        "tensors": {"written": len(state), "left as made": sorted(unused)},
        "revision": digest(out, ("config.json", "*.safetensors")),
    }
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _read(source: Path, allow_pickle: bool) -> dict[str, Any]:
    try:
        return read_state(source, trusted=allow_pickle)
    except ValueError as error:
        if allow_pickle or not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise ValueError(f"{error}; or allow it with --allow-pickle, if you trust whoever made it") from error


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights from mmdet's.

    Raises:
        ValueError: a name that is not of a Mask2Former with a Swin backbone.
    """
    found = {}
    for name, tensor in state.items():
        if name.endswith(COMPUTED):
            continue
        target = _target(name)
        if ".downsample." in target:
            tensor = tensor[..., _patch_order(tensor.shape[-1])]
        parts = tensor.chunk(3) if "{}" in target else [tensor]
        found |= {target.format(letter): part for letter, part in zip("qkv", parts, strict=False)}
    return found


def _target(name: str) -> str:
    for pattern, replacement in RULES.items():
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    raise ValueError(f"{name} is no weight of mmdet's Mask2Former with Swin; give {CHECKPOINT.rpartition('/')[2]}")


def _patch_order(width: int) -> Tensor:
    """Where transformers' merged channels lie among mmdet's.

    Both join 2 x 2 patches of C channels: mmdet channel by channel, as ``unfold`` does, each row by row; transformers
    patch by patch, column by column.
    """
    channels = 4 * torch.arange(width // 4)
    return torch.cat([channels + patch for patch in (0, 2, 1, 3)])


def published_config() -> Any:
    """Of the published Swin-S model: 757 tensors, 69 million parameters."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        patch_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, id2label=dict(enumerate(class_names())))
