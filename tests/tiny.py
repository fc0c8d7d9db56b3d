"""Real diffusers pipelines at toy size with random weights: no hub, a fraction of a second a call on one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKL,
    AutoencoderKLHunyuanImage,
    AutoencoderKLWan,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = sorted(set("a photo of an and two three four left right red green blue cow cows cat car".split()))  # noqa: SIM905


def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def clip_text(projected: bool = False, width: int = 32) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def word_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<pad>", "<unk>", "<bos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # a first token, so that the empty negative prompt is not an empty sequence
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side=side,
        model_max_length=32,
    )  # fmt: skip


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0)
    ).eval()


def vae(latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 32], latent_channels=latent_channels, norm_num_groups=8, sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, shift_factor=0.1,
    ).eval()  # fmt: skip


def unet(cross: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, cross_attention_dim=cross, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **options,
    ).eval()  # fmt: skip


def stable_diffusion(scheduler: Any = None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=unet(32),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False) if scheduler is None else scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projected=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=unet(64, projection_class_embeddings_input_dim=80, **added),
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64, out_channels=4,
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=clip_text(projected=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(4), text_encoder=clip_text(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=word_tokenizer(), transformer=transformer,
    )  # fmt: skip


def cogview4() -> CogView4Pipeline:
    text = GlmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=32, time_embed_dim=32, condition_dim=8, sample_size=16,
    ).eval()  # fmt: skip
    return CogView4Pipeline(
        tokenizer=word_tokenizer("left"), text_encoder=GlmModel(text).eval(), vae=vae(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def wan() -> WanPipeline:
    """Video, two denoisers in turn, multistep."""
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
            qk_norm="rms_norm_across_heads",
        ).eval()
        for _ in range(2)
    ]  # fmt: skip
    decoder = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), vae=decoder.eval(), transformer=transformers[0],
        transformer_2=transformers[1], boundary_ratio=0.9,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


def pixart() -> PixArtSigmaPipeline:
    """A denoiser that also predicts variances, which the pipeline drops."""
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), vae=vae(), scheduler=DPMSolverMultistepScheduler(),
        transformer=transformer,
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    """A denoiser that takes and returns lists of rows."""
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    # their memory is not initialised by the class
    torch.nn.init.ones_(transformer.x_pad_token)
    torch.nn.init.ones_(transformer.cap_pad_token)
    return ZImagePipeline(
        transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=t5(),
        tokenizer=chat_tokenizer(),
    )  # fmt: skip


def hunyuan_image() -> HunyuanImagePipeline:
    """Guidance with momentum; no text encoder: give it :func:`hunyuan_embeds`."""
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=32, text_embed_2_dim=32, rope_axes_dim=(4, 4),
    ).eval()  # fmt: skip
    decoder = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        scaling_factor=0.5, spatial_compression_ratio=2, sample_size=32,
    ).eval()  # fmt: skip
    return HunyuanImagePipeline(
        transformer=transformer, vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
        text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
    )  # fmt: skip


def hunyuan_embeds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for sign in ("", "negative_"):
        for end in ("", "_2"):
            made[f"{sign}prompt_embeds{end}"] = torch.randn(1, 6, 32, generator=generator)
            made[f"{sign}prompt_embeds_mask{end}"] = torch.ones(1, 6, dtype=torch.int64)
    return made


def from_stable_diffusion(kind: type, **parts: Any) -> Any:
    base = stable_diffusion()
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = {k: getattr(base, k) for k in names} | {k: make(base.unet) for k, make in parts.items()}
    return kind(**made, **none)


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "cogview4": cogview4,
}


# Other shapes of loop; "controlnet-inpaint" draws what all rows share from the first row's generator.
OTHERS: dict[str, Callable[[], Any]] = {
    "wan": wan,
    "pixart": pixart,
    "z-image": z_image,
    "hunyuan-image": hunyuan_image,
    "img2img": lambda: from_stable_diffusion(StableDiffusionImg2ImgPipeline),
    "controlnet": lambda: from_stable_diffusion(StableDiffusionControlNetPipeline, controlnet=controlnet),
    "controlnet-inpaint": lambda: from_stable_diffusion(
        StableDiffusionControlNetInpaintPipeline, controlnet=controlnet
    ),
}


def build(name: str, scheduler: Any = None) -> Any:
    """A tiny pipeline by name, its progress bar off, the same weights every time."""
    torch.manual_seed(0)
    pipe = (PIPELINES | OTHERS)[name]()
    if scheduler is not None:
        pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe
