"""Distil the decoder of emoji-64's autoencoder into an AutoencoderTiny, for cheap previews.

    python assets/build/train_tiny_vae.py --work WORK --minutes 9 --out assets/emoji-64/pipeline/vae_tiny

Teacher: the shipped AutoencoderKL. Its inputs are of two kinds, half and half: latents of composed scenes, and means of
two to four of them, weighted at random, as stand-ins for what previews are decoded from: the clean estimate of an
unfinished candidate is a mean over scenes that it may still become. One thread; ``--minutes`` counts the training
alone. Run again, it goes on with the pairs that WORK/tiny-pairs.pt holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from training import save_checkpoint

from visearch.assets import path, scenes
from visearch.pipelines import emoji

SEED, VALIDATION, BATCH, RATE = 5, 256, 32, 2e-3
SCENES = 3000


def build() -> AutoencoderTiny:
    """51 k parameters. The class insists on an encoder, which is one block wide here and not trained."""
    return AutoencoderTiny(
        latent_channels=16,
        decoder_block_out_channels=(16,) * 4,
        num_decoder_blocks=(3, 2, 1, 0),
        encoder_block_out_channels=(1,),
        num_encoder_blocks=(1,),
    )


@torch.no_grad()
def scene_latents(vae: AutoencoderKL) -> Tensor:
    """(SCENES, 16, 8, 8) of scenes of the training split, as the generator sees latents."""
    rng, parts = np.random.default_rng(SEED), []
    for _ in range(0, SCENES, 100):
        images = np.stack([scenes.make_scene(rng, scenes.sample_metadata(rng)).image for _ in range(100)])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(vae.encode(pixels).latent_dist.mode())
    return torch.cat(parts) * vae.config.scaling_factor


def means(latents: Tensor) -> Tensor:
    """As many means of two to four latents each."""
    generator = torch.Generator().manual_seed(SEED)
    weights = torch.rand(len(latents), 4, generator=generator)
    weights[:, 2:] *= torch.rand(len(latents), 2, generator=generator) < 0.5
    chosen = torch.randint(len(latents), (len(latents), 4), generator=generator)
    return torch.einsum("nk,nkchw->nchw", weights / weights.sum(1, keepdim=True), latents[chosen])


@torch.no_grad()
def pairs(file: Path) -> tuple[Tensor, Tensor]:
    """Latents (N, 16, 8, 8) and what the teacher makes of them, (N, 3, 64, 64) in [-1, 1], in a fixed random order."""
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(path(f"{emoji.NAME}/pipeline/vae"), torch_dtype=torch.float32)
        latents = scene_latents(vae)
        latents = torch.cat([latents, means(latents)])
        latents = latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(SEED))]
        parts = [vae.decode(part / vae.config.scaling_factor).sample.clamp(-1, 1).half() for part in latents.split(50)]
        save_checkpoint({"latents": latents, "images": torch.cat(parts)}, file)
    made = torch.load(file, weights_only=True)
    return made["latents"], made["images"].float()


def train(tiny: AutoencoderTiny, latents: Tensor, images: Tensor, seconds: float) -> int:
    """L1 on pixels and on their differences, the rate falling over the second half; returns the steps."""
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    begin, step = time.process_time(), 0
    while (progress := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - progress) + 0.01)
        rows = np.random.default_rng((SEED, step)).integers(VALIDATION, len(latents), BATCH)
        inputs = latents[rows].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            output = tiny.decode(inputs).sample
        error = output.float() - images[rows]
        loss = error.abs().mean() + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 500 == 0:
            print(f"{step} steps, {psnr(tiny, latents, images):.2f} dB", flush=True)
    return step


@torch.no_grad()
def psnr(tiny: AutoencoderTiny, latents: Tensor, images: Tensor) -> float:
    """Mean over the held-out pairs of the peak signal-to-noise ratio in dB, against the teacher's images."""
    outputs = torch.cat([tiny.decode(part).sample for part in latents[:VALIDATION].split(64)]).clamp(-1, 1)
    errors = ((outputs - images[:VALIDATION]) / 2).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def save(tiny: AutoencoderTiny, folder: Path, quality: dict[str, float]) -> None:
    """The decoder in half precision, and a card of how it was made."""
    tiny.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    card = {
        "script": "assets/build/train_tiny_vae.py",
        "seed": SEED,
        "licence": "Apache-2.0; sprites: see NOTICE",
        "sha256": hashlib.sha256(weights).hexdigest(),
        "quality": quality,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the pairs")
    parser.add_argument("--minutes", type=float, default=9.0, help="of processor time")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    args.work.mkdir(parents=True, exist_ok=True)
    latents, images = pairs(args.work / "tiny-pairs.pt")
    tiny = build().to(memory_format=torch.channels_last)
    steps = train(tiny, latents, images, 60 * args.minutes)
    quality = {"steps": steps, "minutes": args.minutes, "held_out_psnr_db": round(psnr(tiny, latents, images), 2)}
    save(tiny, args.out, quality)
    print(json.dumps(quality))


if __name__ == "__main__":
    main()
