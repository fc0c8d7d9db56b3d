"""Image pipelines at toy size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    KandinskyV22CombinedPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PriorTransformer,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import GlmConfig, GlmModel

from tiny.parts import (
    IMAGE,
    MASK,
    PICTURE,
    bert,
    chat_tokenizer,
    clip_pixels,
    clip_text,
    clip_tokenizer,
    clip_vision,
    controlnet,
    gemma,
    llama,
    qwen3,
    qwen_vl,
    t5,
    unet,
    vae,
    word_tokenizer,
)
from tiny.registry import family

SIZE = {"height": 32, "width": 32}
PICTURE_64 = PICTURE.resize((64, 64))  # the least that FLUX.2 takes


# --- UNets ------------------------------------------------------------------------------------------------------


@family("sd", **SIZE)
def stable_diffusion() -> StableDiffusionPipeline:
    return from_stable_diffusion(StableDiffusionPipeline)


def from_stable_diffusion(kind: type, **parts: Any) -> Any:
    """A pipeline of Stable Diffusion's parts, and others that are made from its UNet."""
    denoiser = unet(32)
    return kind(
        vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        **{k: make(denoiser) for k, make in parts.items()},
    )  # fmt: skip


@family("img2img", image=IMAGE, strength=0.7)
def image_to_image() -> StableDiffusionImg2ImgPipeline:
    return from_stable_diffusion(StableDiffusionImg2ImgPipeline)


@family("controlnet", image=IMAGE)
def controlled() -> StableDiffusionControlNetPipeline:
    return from_stable_diffusion(StableDiffusionControlNetPipeline, controlnet=controlnet)


@family("controlnet-inpaint", image=IMAGE, mask_image=MASK, control_image=IMAGE)
def controlled_inpaint() -> StableDiffusionControlNetInpaintPipeline:
    """Draws what all rows share from the first row's generator."""
    return from_stable_diffusion(StableDiffusionControlNetInpaintPipeline, controlnet=controlnet)


@family("ip-adapter", ip_adapter_image_embeds=[torch.cat([torch.zeros(1, 1, 32), torch.ones(1, 1, 32)])], **SIZE)
def image_prompted() -> StableDiffusionPipeline:
    """An image prompt beside the text, through decoupled cross-attention."""
    pipe = stable_diffusion()
    states = {
        "image_proj": {"proj.weight": torch.randn(4 * 32, 32), "proj.bias": torch.zeros(4 * 32)}
        | {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)},
        "ip_adapter": {},
    }
    cross = [n for n in pipe.unet.attn_processors if "attn2" in n]
    for i, name in enumerate(cross):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("k", "v"):
            states["ip_adapter"][f"{2 * i + 1}.to_{key}_ip.weight"] = torch.randn(width, 32)
    pipe.unet._load_ip_adapter_weights([states])
    return pipe


def text_and_size_unet() -> UNet2DConditionModel:
    return unet(
        64, projection_class_embeddings_input_dim=80, addition_embed_type="text_time", addition_time_embed_dim=8,
        use_linear_projection=True,
    )  # fmt: skip


def from_stable_diffusion_xl(kind: type) -> Any:
    return kind(
        vae=vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projected=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=text_and_size_unet(), scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


@family("sdxl", **SIZE)
def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    return from_stable_diffusion_xl(StableDiffusionXLPipeline)


@family("sdxl-inpaint", image=IMAGE, mask_image=MASK, strength=0.9, **SIZE)
def inpaint_xl() -> StableDiffusionXLInpaintPipeline:
    return from_stable_diffusion_xl(StableDiffusionXLInpaintPipeline)


@family("kandinsky22", prior_num_inference_steps=2, **SIZE)
def kandinsky22() -> KandinskyV22CombinedPipeline:
    """Two pipelines in one call: a prior over image embeddings, then a decoder."""
    denoiser = UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(32, 32),
        layers_per_block=1, encoder_hid_dim=32, encoder_hid_dim_type="image_proj", cross_attention_dim=32,
        attention_head_dim=8, resnet_time_scale_shift="scale_shift",
    ).eval()  # fmt: skip
    movq = VQModel(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
        vq_embed_dim=4,
    ).eval()  # fmt: skip
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1).eval()
    torch.nn.init.ones_(prior.clip_std)
    schedule = DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return KandinskyV22CombinedPipeline(
        unet=denoiser, scheduler=schedule, movq=movq, prior_prior=prior, prior_image_encoder=clip_vision(),
        prior_text_encoder=clip_text(projected=True), prior_tokenizer=clip_tokenizer(),
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=clip_pixels(),
    )  # fmt: skip


@family("ddpm", prompt=dict)
def ddpm() -> DDPMPipeline:
    """Unconditional, on pixels."""
    denoiser = UNet2DModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8, in_channels=3,
        out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    return DDPMPipeline(unet=denoiser, scheduler=DDPMScheduler())


# --- transformers -----------------------------------------------------------------------------------------------


@family("dit", prompt=lambda: {"class_labels": [1]})
def dit() -> DiTPipeline:
    """Class labels; carries both guidance branches through the scheduler."""
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(clip_sample=False))


@family("pixart", use_resolution_binning=False, clean_caption=False, **SIZE)
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


@family("hunyuan-dit", use_resolution_binning=False, height=64, width=64)
def hunyuan_dit() -> HunyuanDiTPipeline:
    """Two text encoders of other kinds; ancestral noise by default."""
    transformer = HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=32,
        activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    decoder = vae(channels=(8, 8, 16, 16))  # the pipeline's positions are those of a factor of 8
    return HunyuanDiTPipeline(
        transformer=transformer, vae=decoder, scheduler=DDPMScheduler(), text_encoder=bert(),
        tokenizer=word_tokenizer(), text_encoder_2=t5(), tokenizer_2=word_tokenizer(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@family("sd3", **SIZE)
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


@family("auraflow", max_sequence_length=16, **SIZE)
def auraflow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    ).eval()  # fmt: skip
    # its memory is not initialised by the class
    torch.nn.init.normal_(transformer.pos_embed.pos_embed, std=0.1)
    return AuraFlowPipeline(
        transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(multilingual=True), tokenizer=word_tokenizer(),
    )  # fmt: skip


@family("flux", **SIZE)
def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(4), text_encoder=clip_text(),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(), tokenizer_2=word_tokenizer(), transformer=transformer,
    )  # fmt: skip


@family("chroma", max_sequence_length=16, **SIZE)
def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    ).eval()  # fmt: skip
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(), text_encoder=t5(),
        tokenizer=word_tokenizer(), transformer=transformer, image_encoder=None, feature_extractor=None,
    )  # fmt: skip


def from_flux2(kind: type) -> Any:
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    ).eval()  # fmt: skip
    decoder = AutoencoderKLFlux2(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, sample_size=32,
    ).eval()  # fmt: skip
    return kind(
        transformer=transformer, vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=qwen3(), tokenizer=chat_tokenizer(),
    )  # fmt: skip


@family("flux2-klein", max_sequence_length=16, text_encoder_out_layers=(1, 2), **SIZE)
def flux2_klein() -> Flux2KleinPipeline:
    """Given latents have another layout than the loop's."""
    return from_flux2(Flux2KleinPipeline)


@family("flux2-klein-kv", image=PICTURE_64, max_sequence_length=16, text_encoder_out_layers=(1, 2), **SIZE)
def flux2_klein_kv() -> Flux2KleinKVPipeline:
    """The first step fills a key/value cache of the reference image, which later steps read."""
    return from_flux2(Flux2KleinKVPipeline)


@family("sana", use_resolution_binning=False, max_sequence_length=16, complex_human_instruction=None, **SIZE)
def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=32,
        sample_size=16,
    ).eval()  # fmt: skip
    decoder = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    ).eval()  # fmt: skip
    return SanaPipeline(
        transformer=transformer, vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=gemma(), tokenizer=word_tokenizer(),
    )  # fmt: skip


@family("lumina2", max_sequence_length=16, system_prompt="photo", cfg_trunc_ratio=0.5, height=64, width=64)
def lumina2() -> Lumina2Pipeline:
    """Guidance ends after half of the steps."""
    transformer = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=2, multiple_of=16, axes_dim_rope=(8, 4, 4), axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    ).eval()  # fmt: skip
    return Lumina2Pipeline(
        transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=gemma(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip


@family("cogview4", **SIZE)
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


@family("z-image", max_sequence_length=32, **SIZE)
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


@family("hidream", max_sequence_length=32, **SIZE)
def hidream() -> HiDreamImagePipeline:
    """Four text encoders, a mixture of experts, and a batch that the pipeline counts by itself."""
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 32], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    ).eval()  # fmt: skip
    pipe = HiDreamImagePipeline(
        transformer=transformer, vae=vae(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=clip_text(projected=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(), tokenizer_3=word_tokenizer(),
        text_encoder_4=llama(with_head=True), tokenizer_4=word_tokenizer(),
    )  # fmt: skip
    pipe.default_sample_size = 16  # every size asked for is scaled to this one
    return pipe


def from_qwen_image(kind: type, **parts: Any) -> Any:
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    decoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    return kind(
        transformer=transformer, vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=qwen_vl(), tokenizer=word_tokenizer(), **parts,
    )  # fmt: skip


@family("qwen-image", negative_prompt="blue", true_cfg_scale=3.0, max_sequence_length=16, **SIZE)
def qwen_image() -> QwenImagePipeline:
    """Guidance in two calls, with norms kept; a mask beside the embeddings."""
    return from_qwen_image(QwenImagePipeline)


def hunyuan_embeds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for sign in ("", "negative_"):
        for end in ("", "_2"):
            made[f"{sign}prompt_embeds{end}"] = torch.randn(1, 6, 32, generator=generator)
            made[f"{sign}prompt_embeds_mask{end}"] = torch.ones(1, 6, dtype=torch.int64)
    return made


@family("hunyuan-image", prompt=hunyuan_embeds, height=16, width=16)
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
