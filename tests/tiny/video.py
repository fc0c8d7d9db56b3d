"""Video and audio pipelines at toy size."""

from __future__ import annotations

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLTemporalDecoder,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from tiny.parts import (
    PICTURE,
    awaken,
    clip_pixels,
    clip_text,
    clip_tokenizer,
    clip_vision,
    gemma3,
    llama,
    qwen_vl,
    t5,
    unet,
    vae,
    video_vae,
    word_tokenizer,
)
from tiny.registry import family

SIZE = {"height": 16, "width": 16}
NO_TEMPLATE = {"template": "{}", "crop_start": 0}


@family("wan", num_frames=5, **SIZE)
def wan() -> WanPipeline:
    """Two denoisers in turn, multistep."""
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
            qk_norm="rms_norm_across_heads",
        ).eval()
        for _ in range(2)
    ]  # fmt: skip
    return WanPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), vae=video_vae(), transformer=transformers[0],
        transformer_2=transformers[1], boundary_ratio=0.9,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


@family("cogvideox", num_frames=5, max_sequence_length=16, **SIZE)
def cogvideox() -> CogVideoXPipeline:
    """Takes the number of videos and sets it to one; guidance that follows the timestep."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=32, num_layers=1, sample_width=4, sample_height=4, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    ).eval()  # fmt: skip
    decoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()  # fmt: skip
    return CogVideoXPipeline(
        transformer=transformer, vae=decoder, scheduler=CogVideoXDDIMScheduler(), text_encoder=t5(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip


@family("ltx", num_frames=9, max_sequence_length=16, height=32, width=32)
def ltx() -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    ).eval()  # fmt: skip
    decoder = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, decoder_inject_noise=(False,) * 5,
        spatio_temporal_scaling=(True, True, False, False), upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
        decoder_spatio_temporal_scaling=(True, True, False, False), timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    ).eval()  # fmt: skip
    return LTXPipeline(
        transformer=transformer, vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=t5(), tokenizer=word_tokenizer(),
    )  # fmt: skip


@family(
    "hunyuan-video", num_frames=5, max_sequence_length=16, prompt_template={"template": "{}", "crop_start": 0}, **SIZE
)
def hunyuan_video() -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=32,
        pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    ).eval()  # fmt: skip
    decoder = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    return HunyuanVideoPipeline(
        transformer=transformer, vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=llama(), tokenizer=word_tokenizer(), text_encoder_2=clip_text(), tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


@family("mochi", num_frames=7, max_sequence_length=16, **SIZE)
def mochi() -> MochiPipeline:
    """Noise levels that run the other way."""
    transformer = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1, pooled_projection_dim=16,
        in_channels=12, qk_norm="rms_norm", text_embed_dim=32, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()  # fmt: skip
    decoder = AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1,) * 5,
    ).eval()  # fmt: skip
    return MochiPipeline(
        transformer=awaken(transformer), vae=decoder, text_encoder=t5(), tokenizer=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )  # fmt: skip


@family("animatediff", num_frames=3, **SIZE)
def animatediff() -> AnimateDiffPipeline:
    """A UNet whose rows are frames."""
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=4
    ).eval()
    pipe = AnimateDiffPipeline(
        vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=unet(32), motion_adapter=adapter,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False), feature_extractor=None, image_encoder=None,
    )  # fmt: skip
    pipe.unet.eval()
    return pipe


@family("wan-i2v", image=PICTURE, num_frames=5, **SIZE)
def wan_image_to_video() -> WanImageToVideoPipeline:
    """An image in the latents and in cross-attention."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16,
        text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32, image_dim=32,
        qk_norm="rms_norm_across_heads", added_kv_proj_dim=24,
    ).eval()  # fmt: skip
    return WanImageToVideoPipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), vae=video_vae(), transformer=transformer, transformer_2=None,
        image_encoder=clip_vision(), image_processor=clip_pixels(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


@family("skyreels", num_frames=5, **SIZE)
def skyreels() -> SkyReelsV2Pipeline:
    transformer = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    return SkyReelsV2Pipeline(
        tokenizer=word_tokenizer(), text_encoder=t5(), vae=video_vae(), transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0),
    )  # fmt: skip


@family("kandinsky5", num_frames=5, height=32, width=32)
def kandinsky5() -> Kandinsky5T2VPipeline:
    """Lengths of prompts beside their embeddings."""
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 2, 2), visual_cond=False,
        attention_type="regular",
    ).eval()  # fmt: skip
    decoder = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    return Kandinsky5T2VPipeline(
        transformer=awaken(transformer), vae=decoder, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=qwen_vl(), tokenizer=word_tokenizer(), text_encoder_2=clip_text(), tokenizer_2=clip_tokenizer(),
    )  # fmt: skip


@family("ltx2", num_frames=9, max_sequence_length=16, spatio_temporal_guidance_blocks=[0], height=32, width=32)
def ltx2() -> LTX2Pipeline:
    """Video and sound: two latents, a scheduler each, the second a copy made in the call."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=1, caption_channels=32,
        rope_double_precision=False, rope_type="split",
    ).eval()  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=3, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=8, video_connector_num_layers=1, audio_connector_num_attention_heads=4,
        video_connector_num_learnable_registers=None, audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1, audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32,
        rope_theta=10000.0, rope_double_precision=False, causal_temporal_positioning=False, rope_type="split",
    ).eval()  # fmt: skip
    decoder = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    ).eval()  # fmt: skip
    sound = AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0,
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8,
    ).eval()  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    ).eval()  # fmt: skip
    return LTX2Pipeline(
        transformer=transformer, vae=decoder, audio_vae=sound, connectors=connectors, vocoder=vocoder,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder=gemma3(),
        tokenizer=word_tokenizer(),
    )  # fmt: skip


@family("svd", prompt=lambda: {"image": PICTURE}, num_frames=2, height=32, width=32)
def stable_video_diffusion() -> StableVideoDiffusionPipeline:
    """No text; noise is added to the image before it is encoded."""
    denoiser = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=16, num_attention_heads=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), cross_attention_dim=32,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ).eval()  # fmt: skip
    decoder = AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4
    ).eval()
    return StableVideoDiffusionPipeline(
        unet=denoiser, vae=decoder, image_encoder=clip_vision(224), feature_extractor=clip_pixels(224),
        scheduler=EulerDiscreteScheduler(
            interpolation_type="linear", prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
            timestep_spacing="leading", timestep_type="continuous", steps_offset=1, use_karras_sigmas=True,
        ),
    )  # fmt: skip


@family("stable-audio")
def stable_audio() -> StableAudioPipeline:
    transformer = StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4, out_channels=4,
        num_key_value_attention_heads=2, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=32,
        cross_attention_input_dim=16,
    ).eval()  # fmt: skip
    decoder = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[1, 2], decoder_channels=4, decoder_input_channels=4,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=8,
    ).eval()  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=16, min_value=0, max_value=32).eval()
    return StableAudioPipeline(
        transformer=transformer, vae=decoder, text_encoder=t5(), tokenizer=word_tokenizer(),
        projection_model=projection, scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    )  # fmt: skip
