"""transformers' Mask2Former at tiny size, and its weights under the names and in the order of mmdet's."""

from __future__ import annotations

import re

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def tiny_config(labels: int = 80) -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2], window_size=4, mlp_ratio=2.0, out_features=STAGES
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(map(str, range(labels)))),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=24,
        dim_feedforward=24,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=7,
    )


def tiny_model() -> Mask2FormerForUniversalSegmentation:
    """The same random weights every time, all of which matter."""
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(tiny_config())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return model.eval()


# --- mmdet's names --------------------------------------------------------------------------------------------------


def mmdet_name(name: str, version: int = 2) -> str | None:
    """mmdet's name of a transformers weight, with "q", "k" or "v" in brackets for a third of a joint one."""
    encoder, decoder = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
    transformer, head = "model.transformer_module.", "panoptic_head."
    if name.startswith(encoder):
        return swin_name(name.removeprefix(encoder))
    if name.startswith("class_predictor"):
        return head + name.replace("class_predictor", "cls_embed")
    if name.startswith(decoder):
        return head + "pixel_decoder." + pixel_decoder_name(name.removeprefix(decoder), version)
    if not name.startswith(transformer):
        return None
    name = name.removeprefix(transformer)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
        layer, rest = match.groups()
        cross, own, ffn = (
            ("attentions.0", "attentions.1", "ffns.0") if version == 2 else ("cross_attn", "self_attn", "ffn")
        )
        for ours, theirs in (
            ("cross_attn.", f"{cross}.attn."),
            ("self_attn.out_proj", f"{own}.attn.out_proj"),
            ("cross_attn_layer_norm", "norms.0"),
            ("self_attn_layer_norm", "norms.1"),
            ("final_layer_norm", "norms.2"),
            ("fc1", f"{ffn}.layers.0.0"),
            ("fc2", f"{ffn}.layers.1"),
        ):
            if rest.startswith(ours):
                return f"{head}transformer_decoder.layers.{layer}.{rest.replace(ours, theirs, 1)}"
        third, kind = re.fullmatch(r"self_attn\.([qkv])_proj\.(\w+)", rest).groups()
        return f"{head}transformer_decoder.layers.{layer}.{own}.attn.in_proj_{kind}[{third}]"
    if match := re.fullmatch(r"decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.(\w+)", name):
        return f"{head}mask_embed.{2 * int(match[1])}.{match[2]}"
    whole = {"queries_embedder": "query_embed", "queries_features": "query_feat", "level_embed": "level_embed"}
    whole["decoder.layernorm"] = "transformer_decoder.post_norm"
    start, kind = name.rsplit(".", 1)
    return f"{head}{whole[start]}.{kind}"


def swin_name(name: str) -> str | None:
    if match := re.fullmatch(r"hidden_states_norms\.stage(\d)\.(\w+)", name):
        return f"backbone.norm{int(match[1]) - 1}.{match[2]}"
    if name.startswith("swin.layernorm"):
        return None
    if name.startswith("swin.embeddings."):
        return name.replace("swin.embeddings.", "backbone.patch_embed.").replace("patch_embeddings.", "")
    stage, rest = re.fullmatch(r"swin\.encoder\.layers\.(\d)\.(.*)", name).groups()
    if rest.startswith("downsample"):
        return f"backbone.stages.{stage}.{rest}"
    if match := re.fullmatch(r"(blocks\.\d+)\.attention\.([qkv])_proj\.(\w+)", rest):
        return f"backbone.stages.{stage}.{match[1]}.attn.w_msa.qkv.{match[3]}[{match[2]}]"
    for ours, theirs in (
        ("attention.o_proj", "attn.w_msa.proj"),
        ("attention.relative_position_bias.", "attn.w_msa."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("mlp.fc1", "ffn.layers.0.0"),
        ("mlp.fc2", "ffn.layers.1"),
    ):
        rest = rest.replace(ours, theirs)
    return f"backbone.stages.{stage}.{rest}"


def pixel_decoder_name(name: str, version: int) -> str:
    attention, ffn = ("attentions.0", "ffns.0") if version == 2 else ("self_attn", "ffn")
    if name == "level_embed":
        return "level_encoding.weight"
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(\w+)\.(.*)", name):
        parts = {"self_attn": attention, "self_attn_layer_norm": "norms.0", "final_layer_norm": "norms.1"}
        parts |= {"fc1": f"{ffn}.layers.0.0", "fc2": f"{ffn}.layers.1"}
        return f"encoder.layers.{match[1]}.{parts[match[2]]}.{match[3]}"
    if name.startswith("mask_projection"):
        return name.replace("mask_projection", "mask_feature")
    name = re.sub(r"^input_projections\.(\d)", r"input_convs.\1", name)
    name = name.replace("adapter_1", "lateral_convs.0").replace("layer_1", "output_convs.0")
    return re.sub(r"\.0\.(\w+)$", r".conv.\1", re.sub(r"\.1\.(\w+)$", r".gn.\1", name)) if ".gn." not in name else name


def unfolded(tensor: torch.Tensor) -> torch.Tensor:
    """The last axis from transformers' order of merged patches to that of ``unfold``.

    What reads the top left patch of channel c lies at c there and at 4 c here; then come the bottom left, the top right
    and the bottom right one there, and the top right, the bottom left and the bottom right one here.
    """
    channels = tensor.shape[-1] // 4
    result = torch.empty_like(tensor)
    for place, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        for channel in range(channels):
            result[..., 4 * channel + 2 * row + column] = tensor[..., place * channels + channel]
    return result


def as_mmdet(state: dict[str, torch.Tensor], version: int = 2) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(1)}
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        target = mmdet_name(name, version)
        if target is None:
            continue
        if target.endswith("]"):
            thirds.setdefault(target[:-3], {})[target[-2]] = tensor
        else:
            found[target] = unfolded(tensor) if ".downsample." in target else tensor
    return found | {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in thirds.items()}
