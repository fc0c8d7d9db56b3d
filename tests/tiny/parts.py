"""Tokenizers, text and image encoders, autoencoders and UNets that several tiny pipelines share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, ControlNetModel, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torchvision.transforms.functional import to_pil_image
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = sorted(set("a photo of an and two three four left right red green blue cow cows cat car".split()))  # noqa: SIM905
VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
VOCAB = {w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", *WORDS, "<eos>", *VISION])}
# of every language model here; the tokenizers' ids lie below
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}

# what pipelines take as a condition: (1, 3, 32, 32) and (1, 1, 32, 32) in [0, 1], and the same image for PIL
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = (IMAGE[:, :1] > 0.5).float()
PICTURE = to_pil_image(IMAGE[0])


# --- tokenizers -------------------------------------------------------------------------------------------------


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def word_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # a first token, so that the empty negative prompt is not an empty sequence
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", VOCAB["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        padding_side=side, model_max_length=32, extra_special_tokens=VISION,
    )  # fmt: skip


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


# --- text and image encoders ------------------------------------------------------------------------------------


def clip_text(projected: bool = False, width: int = 32) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def clip_vision(size: int = 32) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=32,
        image_size=size, patch_size=size // 4,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def clip_pixels(size: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(crop_size=size, size=size)


def t5(multilingual: bool = False) -> torch.nn.Module:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
    return (UMT5EncoderModel(UMT5Config(**sizes)) if multilingual else T5EncoderModel(T5Config(**sizes))).eval()


def bert() -> BertModel:
    return BertModel(BertConfig(**SIZES, max_position_embeddings=96)).eval()


def gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, pad_token_id=0)).eval()


def gemma3() -> Gemma3ForConditionalGeneration:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**SIZES, "head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0},
        vision_config={**vision, "image_size": 32, "patch_size": 8}, mm_tokens_per_image=4,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def llama(with_head: bool = False) -> torch.nn.Module:
    config = LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    if not with_head:
        return LlamaModel(config).eval()
    config._attn_implementation = "eager"  # HiDream asks for the attention maps
    return LlamaForCausalLM(config).eval()


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, num_key_value_heads=2)).eval()


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {**SIZES, "num_key_value_heads": 2, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 37, "num_heads": 4, "out_hidden_size": 32}
    tokens = dict(zip(("vision_start_token_id", "image_token_id", "vision_end_token_id"), (VOCAB[v] for v in VISION)))
    ends = {"bos_token_id": VOCAB["<bos>"], "eos_token_id": VOCAB["<eos>"]}
    config = Qwen2_5_VLConfig(text_config=text | ends, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


# --- autoencoders and UNets -------------------------------------------------------------------------------------


def vae(latent_channels: int = 4, channels: tuple[int, ...] = (16, 32)) -> AutoencoderKL:
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels, latent_channels=latent_channels, norm_num_groups=8, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        shift_factor=0.1,
    ).eval()  # fmt: skip


def video_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def unet(cross: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, cross_attention_dim=cross, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **options,
    ).eval()  # fmt: skip


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    return awaken(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval())


def awaken(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that begin at zero switch off what they lead to, and a test would not see it go wrong."""
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return model
