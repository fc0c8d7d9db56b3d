"""Train emoji-64's second text-to-image generator, a v-prediction denoiser for PixArtSigmaPipeline.

    python assets/build/train_second.py --work WORK --until 18:30
    python assets/build/train_second.py --work WORK --evaluate --steps 15 --guidance 3 5

WORK holds the scene cache and latents.npy of train_vae.py. Autoencoder, tokenizer and text encoder are those of
assets/emoji-64/pipeline, frozen; only the denoiser is new. It is trained on v-prediction (arXiv 2202.00512) over the
cosine schedule (arXiv 2102.09672) with zero terminal signal (arXiv 2305.08891), so that sampling begins at pure noise,
as training did. Aligned with the scenes as in train_generator.py. Training runs against the clock; a killed run resumes
from WORK/second.ckpt; WORK/second holds the averaged weights in the layout to ship, WORK/second.jsonl the log.
"""

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from evaluate_generator import accuracy, sample
from scene_cache import load_or_compose
from torch import Tensor, nn
from torch.nn import functional
from train_generator import (
    ADAM_RATE,
    ALIGNMENT,
    BATCH,
    MUON_RATE,
    TEXT_LENGTH,
    UNCONDITIONAL,
    alignment_loss,
    encode_captions,
    head_for,
    layout_targets,
    optimizers,
    sampling_weights,
)
from train_vae import SCENES, VALIDATION
from train_vae import SEED as SCENE_SEED
from training import parse_deadline, save_checkpoint
from transformers import AutoTokenizer, GlmModel

from visearch.assets import path, scenes

SEED, EMA, ALIGNED_BLOCK, WIDTH = 3, 0.998, 3, 192
SAVE_EVERY = 300  # seconds
# seconds of processor time, so that a busy machine does not spend what little it leaves on measuring
EXPORT_EVERY, EVALUATE_EVERY = 600, 1500
GUIDANCE = 5.0
# the class would bin 64 x 64 to the resolutions of large models; its default of 300 tokens gives the same, slower
CALL = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": TEXT_LENGTH}


def build_transformer() -> PixArtTransformer2DModel:
    """3.94 M parameters, 7.9 MB in float16; zero gates and outputs (arXiv 2212.09748, 2310.00426)."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=WIDTH // 32,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        cross_attention_dim=WIDTH,
        caption_channels=128,
        sample_size=8,
        patch_size=1,
        use_additional_conditions=False,
    )
    for layer in (
        transformer.adaln_single.linear,
        transformer.proj_out,
        *(block.attn2.to_out[0] for block in transformer.transformer_blocks),
    ):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)
    return transformer


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def build_pipeline(transformer: PixArtTransformer2DModel) -> PixArtSigmaPipeline:
    """The stock pipeline around ``transformer``, its other parts those that the first generator ships."""
    shared = path("emoji-64/pipeline")
    pipeline = PixArtSigmaPipeline(
        AutoTokenizer.from_pretrained(shared / "tokenizer"),
        GlmModel.from_pretrained(shared / "text_encoder").requires_grad_(False),
        AutoencoderKL.from_pretrained(shared / "vae").requires_grad_(False),
        transformer,
        build_scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def angles(scheduler: DDIMScheduler) -> Tensor:
    """phi (1000,) in (0, pi/2], by timestep: x_t = cos(phi) x + sin(phi) e."""
    return scheduler.alphas_cumprod.sqrt().clamp(0, 1).acos()


def broadcast(phi: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of (B,) angles, shaped (B, 1, 1, 1)."""
    phi = phi.view(-1, 1, 1, 1)
    return phi.cos(), phi.sin()


def masked_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
    """Softmax attention by two matrix products, for the reason given in train_generator.plain_attention."""
    weights = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if attn_mask is not None:
        weights = weights + attn_mask
    return weights.softmax(-1).to(value.dtype) @ value


@dataclass(frozen=True)
class Batch:
    """rows (B,) of the scene cache; x (B, 16, 8, 8) clean latents; text (B, 16, 128) and mask (B, 16) as the pipeline
    computes them; generator: the source of all further randomness of this step."""

    rows: Tensor
    x: Tensor
    text: Tensor
    mask: Tensor
    generator: torch.Generator


class Data:
    """The training scenes: latents, captions as PixArtSigmaPipeline encodes them, layouts."""

    def __init__(self, pipeline: PixArtSigmaPipeline, work: Path):
        cache = load_or_compose(work / "scenes", SCENES, SCENE_SEED, styles=scenes.STYLES, free=False)
        prompts = [metadata["prompt"] for metadata in cache.metadata]
        captions = ["", *dict.fromkeys(prompts)]  # caption 0 is the empty one
        encode_captions(pipeline.tokenizer, captions)  # raises where the pipeline would truncate silently
        parts = [self._encode(pipeline, captions[start : start + 512]) for start in range(0, len(captions), 512)]
        self.text, self.mask = (torch.cat(part) for part in zip(*parts, strict=True))
        index = {caption: i for i, caption in enumerate(captions)}
        self.caption = torch.tensor([index[prompt] for prompt in prompts])
        self.latents = torch.from_numpy(np.load(work / "latents.npy"))
        self.layout = layout_targets(cache)
        self.weights = sampling_weights(cache)

    @staticmethod
    @torch.no_grad()
    def _encode(pipeline: PixArtSigmaPipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
        return pipeline.encode_prompt(captions, False, max_sequence_length=TEXT_LENGTH)[:2]

    def batch(self, seed: int, step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        rows = torch.from_numpy(rng.choice(len(self.weights), BATCH, p=self.weights))
        return self.at(rows, torch.Generator().manual_seed(int(rng.integers(2**62))))

    def held_out(self) -> Batch:
        return self.at(torch.arange(SCENES - VALIDATION, SCENES), torch.Generator().manual_seed(SEED))

    def at(self, rows: Tensor, generator: torch.Generator) -> Batch:
        caption = self.caption[rows]
        return Batch(rows, self.latents[rows].float(), self.text[caption], self.mask[caption], generator)

    def drop_captions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Text and mask with a share of UNCONDITIONAL rows replaced by the empty caption (arXiv 2207.12598)."""
        dropped = torch.rand(len(batch.rows), generator=batch.generator) < UNCONDITIONAL
        text = torch.where(dropped.view(-1, 1, 1), self.text[0], batch.text)
        return text, torch.where(dropped.view(-1, 1), self.mask[0], batch.mask)


def predict(transformer: PixArtTransformer2DModel, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """v (B, 16, 8, 8) float32 of noisy latents at integer timesteps t (B,), computed in bfloat16."""
    plain = mock.patch.object(functional, "scaled_dot_product_attention", masked_attention)
    with plain, torch.autocast("cpu", torch.bfloat16):
        return transformer(x, text, t, encoder_attention_mask=mask, return_dict=False)[0].float()


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,) in [0, 1000): log(noise / signal) normal around 0.2, as the first generator's; 30 % uniform,
    because the few steps of a sampler begin at the last timestep, which the normal hardly ever draws."""
    ratio = torch.exp(torch.randn(count, generator=generator) + 0.2)
    level = torch.where(
        torch.rand(count, generator=generator) < 0.3,
        torch.rand(count, generator=generator),
        ratio.atan() * 2 / math.pi,
    )
    return (1000 * level).long().clamp(max=999)


def v_loss(transformer: PixArtTransformer2DModel, phi: Tensor, x: Tensor, noise: Tensor, t: Tensor, *text: Tensor):
    """Mean squared error of v = cos(phi) e - sin(phi) x."""
    cos, sin = broadcast(phi[t])
    v = predict(transformer, cos * x + sin * noise, t, *text)
    return functional.mse_loss(v, cos * noise - sin * x)


def export(transformer: PixArtTransformer2DModel, folder: Path) -> None:
    """Write transformer/ (float16 safetensors) and scheduler/: what the second generator ships."""
    half = copy.deepcopy(transformer).half()
    half.save_pretrained(folder / "transformer")
    build_scheduler().save_pretrained(folder / "scheduler")


def evaluate(transformer: PixArtTransformer2DModel, steps: int, guidance: float, seeds: int = 1) -> dict:
    """Accuracy by judges A and B on the validation prompts, ``seeds`` samples each."""
    pipeline = functools.partial(build_pipeline(transformer), **CALL)
    rows = [row for tag in scenes.TAGS for row in scenes.prompts("validation") if row["tag"] == tag]
    images = [image for seed in range(seeds) for image in sample(pipeline, rows, seed, steps, guidance)]
    found = {name: accuracy(name, images, rows * seeds) for name in ("a", "b")}
    return {"steps": steps, "guidance": guidance, "samples": len(images), **found}


def fit(
    name: str,
    model: nn.ModuleDict,
    losses_of: Callable[[int], dict[str, Tensor]],
    measure: Callable[[PixArtTransformer2DModel], dict],
    work: Path,
    deadline: float,
    *,
    rate: float = 1.0,
    warm_up: int = 200,
    decay_from: float = 0.6,
    ema: float = EMA,
    steps: int | None = None,
) -> None:
    """Train ``model["transformer"]`` (and a "head", where there is one) until the deadline, resumably.

    Args:
        name: of the checkpoint, log and export in ``work``.
        losses_of: step number -> named losses, already weighted; their sum is minimised.
        measure: averaged transformer -> a row for the log, every 25 minutes of processor time and at the end.
        deadline: in seconds since the epoch.
        rate: factor on the learning rates of train_generator.py.
        warm_up: steps of linear warm-up.
        decay_from: share of the time after which the rates fall linearly to zero.
        ema: decay of the averaged weights.
        steps: stop after this many steps in all, for trials.
    """
    transformer = model["transformer"]
    average = copy.deepcopy(transformer).requires_grad_(False)
    steppers = optimizers(model)
    saved, spent, step = work / f"{name}.ckpt", 0.0, 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for stepper, content in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(content)
        spent, step = state["spent"], state["step"]
    total = spent + deadline - time.time()
    begin = time.time() - spent
    last_saved = last_logged = spent
    last_exported = last_measured = last_logged_processor = time.process_time()
    recent: list[dict[str, float]] = []

    def write(row: dict) -> None:
        row = {"step": step, "images": step * BATCH, "seconds": round(spent), **row}
        with (work / f"{name}.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    while True:
        spent = time.time() - begin
        remaining = max(0.0, 1 - spent / total)
        factor = rate * min(1.0, (step + 1) / warm_up) * min(1.0, remaining / (1 - decay_from) + 0.005)
        for stepper, peak in zip(steppers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in stepper.param_groups:
                group["lr"] = peak * factor
        losses = losses_of(step)
        for stepper in steppers:
            stepper.zero_grad()
        sum(losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        step += 1
        recent.append({key: value.item() for key, value in losses.items()} | {"norm": norm.item()})
        with torch.no_grad():
            decay = min(ema, (1 + step) / (10 + step))
            for target, source in zip(average.parameters(), transformer.parameters(), strict=True):
                target.lerp_(source, 1 - decay)
        finished = time.time() >= deadline or step == steps
        if step % 100 == 0:
            means = {key: round(float(np.mean([row[key] for row in recent])), 5) for key in recent[0]}
            spent, processor = time.time() - begin, time.process_time()
            speeds = [len(recent) * BATCH / past for past in (spent - last_logged, processor - last_logged_processor)]
            names = ("images_per_second", "images_per_processor_second")
            write({**means, **{key: round(speed, 1) for key, speed in zip(names, speeds, strict=True)}})
            recent, last_logged, last_logged_processor = [], spent, processor
        if spent - last_saved > SAVE_EVERY or finished:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": [stepper.state_dict() for stepper in steppers],
                "spent": spent,
                "step": step,
            }
            save_checkpoint(state, saved)
            last_saved = spent
        if time.process_time() - last_exported > EXPORT_EVERY or finished:
            export(average, work / name)
            last_exported = time.process_time()
        if time.process_time() - last_measured > EVALUATE_EVERY or finished:
            write(measure(average))
            last_measured = last_logged_processor = time.process_time()
            last_logged, recent = time.time() - begin, []
        if finished:
            break


def train(work: Path, deadline: float, steps: int | None) -> None:
    transformer = build_transformer()
    model = nn.ModuleDict({"transformer": transformer, "head": head_for(WIDTH)})
    pipeline = build_pipeline(transformer)
    data, phi = Data(pipeline, work), angles(pipeline.scheduler)
    features: dict[str, Tensor] = {}
    transformer.transformer_blocks[ALIGNED_BLOCK].register_forward_hook(lambda *call: features.update(last=call[-1]))

    def losses_of(step: int) -> dict[str, Tensor]:
        batch = data.batch(SEED, step)
        noise = torch.randn(batch.x.shape, generator=batch.generator)
        t = draw_timesteps(BATCH, batch.generator)
        loss = v_loss(transformer, phi, batch.x, noise, t, *data.drop_captions(batch))
        aligned = alignment_loss(model["head"], features["last"], *(target[batch.rows] for target in data.layout))
        return {"loss": loss, "alignment": ALIGNMENT * aligned}

    @torch.no_grad()
    def measure(average: PixArtTransformer2DModel) -> dict:
        batch = data.held_out()
        noise = torch.randn(batch.x.shape, generator=batch.generator)
        t = (torch.arange(VALIDATION) * 1000) // VALIDATION
        held_out = v_loss(average, phi, batch.x, noise, t, batch.text, batch.mask)
        return {"validation": round(held_out.item(), 5), **evaluate(average, 15, GUIDANCE)}

    fit("second", model, losses_of, measure, work, deadline, steps=steps)


def load(folder: Path) -> PixArtTransformer2DModel:
    """Exported weights in a new module, whose config names no folder of this machine."""
    transformer = build_transformer()
    transformer.load_state_dict(PixArtTransformer2DModel.from_pretrained(folder / "transformer").state_dict())
    return transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that train_vae.py wrote to")
    parser.add_argument("--until", type=parse_deadline, help="time of day to stop at, HH:MM")
    parser.add_argument("--max-steps", type=int, help="stop after this many training steps, for trials")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="only measure WORK/second on the validation prompts")
    parser.add_argument("--name", default="second", help="with --evaluate: folder in WORK to measure")
    parser.add_argument("--steps", type=int, nargs="+", default=[15])
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--seeds", type=int, default=1, help="samples per prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    if args.evaluate:
        transformer = load(args.work / args.name)
        for steps in args.steps:
            for guidance in args.guidance:
                print(json.dumps(evaluate(transformer, steps, guidance, args.seeds)), flush=True)
    elif args.until:
        train(args.work, args.until, args.max_steps)
    else:
        parser.error("--until HH:MM is needed to train; --evaluate measures what was trained")


if __name__ == "__main__":
    main()
