"""Stand-ins for the small files that diffusers' tests take from a model hub: tokenizers, processors, text encoders."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

# the ids that configurations of Qwen's vision models have by default
QWEN = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
    "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image_pad|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}"
)


def words(special: dict[str, int] | None = None, kind: type = PreTrainedTokenizerFast, **options: Any) -> Any:
    """A tokenizer of whole words, few of them known, and given special tokens; every text begins with <bos>."""
    known = ["a", "an", "the", "of", "and", "with", "cat", "dog", "red", "blue", "photo", "painting", "video", "person"]
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", *known])} | (special or {})
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    made = kind(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<unk>", **options},
    )
    if special:
        made.add_special_tokens({"additional_special_tokens": list(special)})
    made.chat_template = CHAT
    return made


def clip_tokenizer(*_: Any, **__: Any) -> Any:
    letters = sorted(ByteLevel.alphabet())
    entries = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(entries)}, merges=[], model_max_length=77)


def qwen_tokenizer(*_: Any, **__: Any) -> Any:
    """Ids as in Qwen's own files, and attributes that its processors read."""
    made = words(QWEN, model_max_length=1024)
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        setattr(made, f"{name}_token", token)
        setattr(made, f"{name}_token_id", QWEN[token])
    return made


class _PositionTokenizer(PreTrainedTokenizerFast):
    """Also gives positions, as the tokenizer of ChatGLM does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made["position_ids"] = torch.arange(made["input_ids"].shape[1]).expand_as(made["input_ids"]).clone()
        return made


def t5_config(*_: Any, **__: Any) -> Any:
    return transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip


def _gemma3() -> Any:
    text = {
        "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=200, boi_token_index=201,
        eoi_token_index=202,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen2vl() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, 
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def _qwen3vl() -> Any:
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "deepstack_visual_indexes": [1], "num_position_embeddings": 16,
        },
    )  # fmt: skip
    model = transformers.Qwen3VLForConditionalGeneration(config)
    # the stand-in tokenizer's ids are sparse, so its length says nothing about the table of embeddings
    model.resize_token_embeddings = lambda *_, **__: model.get_input_embeddings()
    return model


def _llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1024, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, pad_token_id=0,
        )
    )  # fmt: skip


def _chatglm(kind: type) -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    return kind(
        ChatGLMConfig(
            num_layers=2, padded_vocab_size=1024, hidden_size=8, ffn_hidden_size=16, kv_channels=4,
            num_attention_heads=2, seq_length=256, multi_query_attention=True, multi_query_group_num=1,
            add_qkv_bias=True, original_rope=True, torch_dtype=torch.float32,
        )
    )  # fmt: skip


def _bert(kind: type) -> Any:
    return kind(
        transformers.BertConfig(
            vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37
        )
    )


def _consistency_unet(subfolder: str) -> Any:
    return diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
        attention_head_dim=8, num_class_embeds=10 if "class_cond" in subfolder else None,
    )  # fmt: skip


def _model(kind: type, where: str, subfolder: str) -> Any:
    torch.manual_seed(0)
    name = kind.__name__
    makers: dict[str, Callable[[], Any]] = {
        "Gemma3ForConditionalGeneration": _gemma3,
        "Qwen2VLForConditionalGeneration": _qwen2vl,
        "Qwen3VLForConditionalGeneration": _qwen3vl,
        "LlamaForCausalLM": _llama,
        "ChatGLMModel": lambda: _chatglm(kind),
        "BertModel": lambda: _bert(kind),
        "T5EncoderModel": lambda: kind(t5_config()),
        "UMT5EncoderModel": lambda: kind(
            transformers.UMT5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
        ),
        "SiglipVisionModel": lambda: kind(
            transformers.SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=30,
                patch_size=2,
            )
        ),
        "UNet2DModel": lambda: _consistency_unet(subfolder),
    }
    if name not in makers:
        raise FileNotFoundError(f"no stand-in for {name} of {where}")
    return makers[name]().eval()


def _tokenizer(kind: type, where: str) -> Any:
    name = kind.__name__
    if name.startswith("CLIPTokenizer"):
        return clip_tokenizer()
    if name == "ChatGLMTokenizer":
        return words(kind=_PositionTokenizer)
    if any(word in where.lower() for word in ("qwen", "cosmos3")):
        return qwen_tokenizer()
    made = words()
    if name in ("T5Tokenizer", "RobertaTokenizer"):
        made.__class__ = kind  # pipelines ask with isinstance which encoder it belongs to
    return made


def _image_processor(kind: type, size: Any) -> Any:
    if kind.__name__ == "AutoImageProcessor" or "Qwen" in kind.__name__:
        kind = transformers.Qwen2VLImageProcessor
        return kind(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
    if kind.__name__ == "DPTImageProcessor":
        size = {"height": 32, "width": 32}
    return kind() if size is None else kind(size=size)


def _processor(kind: type, where: str) -> Any:
    lower = where.lower()
    if "mistral" in lower:
        special = {"[IMG]": 10, "[IMG_BREAK]": 11, "[IMG_END]": 12}
        tokenizer = words(special)
        return transformers.PixtralProcessor(
            image_processor=transformers.PixtralImageProcessor(), tokenizer=tokenizer, chat_template=CHAT
        )
    if "glm" in lower:
        special = {"<|image|>": 167855, "<|dit_token_16384|>": 16384, "<|dit_token_16385|>": 16385}
        tokenizer = words(special)
        tokenizer.image_token, tokenizer.grid_bos_token, tokenizer.grid_eos_token = special
        return kind(transformers.GlmImageImageProcessor(), tokenizer, chat_template=CHAT)
    tokenizer = qwen_tokenizer()
    if "qwen3" in lower or kind.__name__ == "Qwen3VLProcessor":
        kind = transformers.Qwen3VLProcessor
        video: Any = transformers.Qwen3VLVideoProcessor()
        image = transformers.Qwen2VLImageProcessor(patch_size=16, merge_size=2, min_pixels=4096, max_pixels=16384)
    else:
        kind = transformers.Qwen2_5_VLProcessor if kind.__name__ == "AutoProcessor" else kind
        video = transformers.Qwen2VLVideoProcessor()
        image = transformers.Qwen2VLImageProcessor(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28)
    given = {"image_processor": image, "tokenizer": tokenizer, "video_processor": video, "chat_template": CHAT}
    return kind(**{k: v for k, v in given.items() if k in inspect.signature(kind.__init__).parameters})


def fit(pipe: Any) -> None:
    """Settings that the stand-ins and the size of the test need.

    Some pipelines bring their images to about a megapixel whatever the call says, minutes a call for nothing; and one
    family cuts its template off by a number of tokens that holds for its own tokenizer. Parameters that a class leaves
    uninitialised get small random values.
    """
    for module in pipe.components.values():
        for parameter in module.parameters() if isinstance(module, torch.nn.Module) else ():
            if not bool(parameter.isfinite().all()) or float(parameter.detach().abs().max()) > 1e3:
                torch.nn.init.normal_(parameter.detach(), std=0.02)
    for name in ("prompt_template", "prompt_template_encode"):
        if isinstance(template := getattr(pipe, name, None), str):
            tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
            pipe.prompt_template_encode_start_idx = len(tokenizer(template.split("{}")[0]).input_ids)
    if hasattr(pipe, "resolutions"):
        pipe.resolutions = [(64, 64)]
    processor = inspect.getmodule(type(getattr(pipe, "vae_image_processor", pipe)))
    for size in getattr(processor, "BUCKETS", ()):
        processor.BUCKETS[size] = [(64, 64)]
    module = inspect.getmodule(type(pipe))
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        if hasattr(module, name):
            setattr(module, name, 64 * 64)
    if hasattr(module, "calculate_dimensions"):
        real = module.calculate_dimensions
        module.calculate_dimensions = lambda _, ratio: real(64 * 64, ratio)


def install() -> None:
    """Make ``from_pretrained`` of hub ids give the stand-ins; folders load as ever."""

    def replace(owner: Any, make: Callable[[type, str, dict[str, Any]], Any]) -> None:
        real = owner.from_pretrained.__func__

        def from_pretrained(kind: type, where: Any, *args: Any, **kwargs: Any) -> Any:
            if os.path.isdir(str(where)):
                return real(kind, where, *args, **kwargs)
            return make(kind, str(where), kwargs)

        owner.from_pretrained = classmethod(from_pretrained)

    def model(kind: type, where: str, kwargs: dict[str, Any]) -> Any:
        return _model(kind, where, str(kwargs.get("subfolder", "")))

    def model_max(kind: type, where: str, kwargs: dict[str, Any]) -> Any:
        made = _tokenizer(kind, where)
        made.model_max_length = kwargs.get("model_max_length", made.model_max_length)
        return made

    for owner in (transformers.PreTrainedTokenizerBase, transformers.AutoTokenizer):
        replace(owner, model_max)
    for owner in (transformers.PreTrainedModel, diffusers.ModelMixin):
        replace(owner, model)
    replace(transformers.AutoConfig, t5_config)
    for owner in (transformers.ProcessorMixin, transformers.AutoProcessor):
        replace(owner, lambda kind, where, _: _processor(kind, where))
    for owner in (transformers.ImageProcessingMixin, transformers.AutoImageProcessor):
        replace(owner, lambda kind, _, kwargs: _image_processor(kind, kwargs.get("size")))
    replace(
        transformers.FeatureExtractionMixin,
        lambda kind, _, kwargs: kind(**{k: v for k, v in kwargs.items() if k == "hop_length"}),
    )
