"""Train the f8, 16-channel autoencoder of emoji-64 and encode the training scenes with it.

    python assets/build/train_vae.py --work WORK                  # trains, freezes the encoder, writes the latents
    python assets/build/train_vae.py --work WORK --decoder-only   # goes on with the decoder, encoder frozen

WORK/scenes is the scene cache, WORK/vae the result (a diffusers folder), WORK/latents.npy (N, 16, 8, 8) float16 the
normalised latent means, in the order of the cache. Training runs against the clock; a killed run resumes.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scene_cache import SceneCache, load_or_compose
from torch import Tensor, nn
from training import save_checkpoint

from visearch.assets import scenes

SEED, SCENES, VALIDATION = 1, 96_000, 512
BATCH, RATE, KL_WEIGHT = 32, 2e-3, 2e-4


def build() -> AutoencoderKL:
    """1.6 M parameters. One norm group: with a group per channel the norms would erase the colour of flat areas."""
    vae = AutoencoderKL(
        block_out_channels=[8, 16, 64, 96],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
    )
    # start with little posterior noise: from a variance of 1 the first thousand steps are spent on reducing it
    nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -5.0)
    return vae


def batch_of(cache: SceneCache, rows: np.ndarray) -> Tensor:
    """Images (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(cache.images[np.sort(rows)]).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """L1 on pixels and on their differences, and a KL term per latent dimension."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
    error = output.float() - images
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return error.abs().mean() + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB of mean reconstructions, clamped to [0, 1]."""
    outputs = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(64)])
    errors = ((outputs.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def train(vae: AutoencoderKL, cache: SceneCache, work: Path, seconds: float, decoder_only: bool) -> None:
    name = "decoder" if decoder_only else "vae"
    vae.encoder.requires_grad_(not decoder_only)
    vae.quant_conv.requires_grad_(not decoder_only)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    # Muon takes matrices only: it steps two-dimensional views that share the kernels' memory
    kernels = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) >= 8]
    matrices = [nn.Parameter(p.detach().flatten(1)) for p in kernels]
    chosen = {id(p) for p in kernels}
    optimizers = [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in parameters if id(p) not in chosen], lr=RATE, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    saved, spent, step = work / f"{name}.ckpt", 0.0, 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        vae.load_state_dict(state["model"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        spent, step = state["spent"], state["step"]
    held_out = batch_of(cache, np.arange(SCENES - VALIDATION, SCENES))
    begin, last_saved = time.monotonic() - spent, spent
    while (spent := time.monotonic() - begin) < seconds:
        progress = spent / seconds
        peak = RATE / 2 if decoder_only else RATE
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            # warm up, hold, then decay to zero over the second half
            group["lr"] = peak * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - progress) + 0.01)
        rows = np.random.default_rng((SEED, step)).integers(0, SCENES - VALIDATION, BATCH)
        loss = loss_of(vae, batch_of(cache, rows))
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for kernel, matrix in zip(kernels, matrices, strict=True):
            matrix.grad = kernel.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 50 == 0:
            row = {"step": step, "seconds": round(spent), "loss": round(loss.item(), 5)}
            if step % 500 == 0:
                row["psnr"] = round(psnr(vae, held_out), 3)
            with (work / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if spent - last_saved > 120:
            state = {
                "model": vae.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "spent": spent,
                "step": step,
            }
            save_checkpoint(state, saved)
            last_saved = spent
    print(f"{name}: {step} steps, {psnr(vae, held_out):.2f} dB on {VALIDATION} held-out scenes")


@torch.no_grad()
def encode(vae: AutoencoderKL, cache: SceneCache, path: Path) -> None:
    """Write normalised latent means, and set the factor that makes their variance 1.

    CogView4Pipeline divides by ``scaling_factor`` and knows no shift, so the mean stays (it is small against 1).
    """
    latents = np.empty((SCENES, 16, 8, 8), np.float32)
    for start in range(0, SCENES, 256):
        rows = np.arange(start, min(start + 256, SCENES))
        with torch.autocast("cpu", torch.bfloat16):
            latents[rows] = vae.encode(batch_of(cache, rows)).latent_dist.mode().float().numpy()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    print(f"latent mean {latents.mean():.3f}, std {latents.std():.3f}, channel std {latents.std((0, 2, 3)).round(2)}")
    np.save(path, (latents * vae.config.scaling_factor).astype(np.float16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the scene cache, checkpoints and results")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    cache = load_or_compose(args.work / "scenes", SCENES, SEED, styles=scenes.STYLES, free=False)
    vae = AutoencoderKL.from_pretrained(args.work / "vae") if args.decoder_only else build()
    train(vae, cache, args.work, 60 * args.minutes, args.decoder_only)
    if not args.decoder_only:
        encode(vae, cache, args.work / "latents.npy")
    vae.save_pretrained(args.work / ("vae-decoder" if args.decoder_only else "vae"))


if __name__ == "__main__":
    main()
