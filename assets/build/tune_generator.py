"""Tune emoji-64 to the reward that guides its searches, to ask whether the gains of both add up.

    python assets/build/tune_generator.py --work WORK --minutes 25

DRaFT-LV (arXiv 2309.17400): images are sampled without gradients, noised again a little, and the gradient of the reward
goes through the steps that finish them and through the decoder to a LoRA (2106.09685) of the transformer. The last of
the 15 steps removes a noise of .001 only, so that the gradient goes through more than one. Nothing but the choice of
where to stop holds the tuned generator near the old one: after every 40 steps three judges, which the reward has
nothing to do with, look at an image of each validation prompt, and the LoRA that they like best is taken.

A killed run resumes from WORK/checkpoint.pt. WORK/STEP holds a LoRA as diffusers saves it, WORK/card.json all
measurements and the choice. It serves ``evidence_ablation.py`` and does not ship.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import CogView4Pipeline
from evaluate_generator import accuracy, sample
from evidence_noise_aware import training_prompts
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn import functional
from train_generator import Velocity, encode_captions, plain_attention
from training import save_checkpoint

from visearch.assets import scenes
from visearch.pipelines import emoji
from visearch.report import write_json
from visearch.rewards import resolve
from visearch.rewards.base import ModelReward

SEED, BATCH, RATE = 7, 4, 1e-3
RANK, SCALE = 8, 0.5  # of the LoRA
LAST = 3  # steps with gradients
VARIANTS = 2  # noises that each image is finished from
EVERY, PATIENCE = 40, 3  # steps from one measurement to the next; measurements without a better one before it ends
SAVE_EVERY = 10  # steps
REWARD, JUDGES = "emoji-clip", ("a", "b", "c")
KEPT = ("losses", "rows", "seconds")
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


class Tuning:
    """emoji-64 in float32, with a LoRA that follows the gradient of a reward. Shapes: B images.

    Attributes:
        pipeline: only its LoRA is trainable.
        losses: of every step, minus the mean reward.
        rows: what was measured.
        seconds: of one core, of all processes so far.
    """

    def __init__(self, reward: ModelReward, call: dict[str, Any] = emoji.DEFAULTS, rate: float = RATE) -> None:
        self.reward, self.call, self.pipeline = reward, call, emoji.load()
        for part in ("text_encoder", "vae", "transformer"):
            getattr(self.pipeline, part).requires_grad_(False)
        torch.manual_seed(SEED)  # of the LoRA
        self.pipeline.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=MODULES))
        self.velocity = Velocity(self.pipeline)
        self.weights = [p for p in self.pipeline.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, rate, weight_decay=0.0)
        self.losses: list[float] = []
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0

    def sample(self, texts: Sequence[str], generator: torch.Generator) -> Tensor:
        """Clean latents (B, 16, 8, 8) of the stock pipeline, without gradients."""
        return self.pipeline(list(texts), generator=generator, output_type="latent", **self.call).images

    def finish(self, latents: Tensor, texts: Sequence[str], last: int) -> Tensor:
        """The last steps of the latest call of the pipeline on latents (B, 16, 8, 8), with gradients."""
        scheduler, guidance = self.pipeline.scheduler, self.call["guidance_scale"]
        ids = encode_captions(self.pipeline.tokenizer, [*texts, *[""] * len(texts)])
        levels = (scheduler.timesteps / scheduler.config.num_train_timesteps)[-last:]
        for level, by in zip(levels, scheduler.sigmas.diff()[-last:], strict=True):
            given, without = self.velocity(latents.repeat(2, 1, 1, 1), level.repeat(len(ids)), ids).chunk(2)
            latents = latents + by * (without + guidance * (given - without))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1], with gradients."""
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    def images(self, texts: Sequence[str], generator: torch.Generator) -> Tensor:
        """New ones (VARIANTS B, 3, 64, 64) in [0, 1], with gradients to the LoRA."""
        clean = self.sample(texts, generator).float().repeat(VARIANTS, 1, 1, 1)
        level = self.pipeline.scheduler.sigmas[-LAST - 1]
        noisy = (1 - level) * clean + level * torch.randn(clean.shape, generator=generator)
        return self.decode(self.finish(noisy, [*texts] * VARIANTS, LAST))

    def step(self, lines: Sequence[dict]) -> None:
        """Follow the gradient once, on prompts and noises that the number of the step decides."""
        rng = np.random.default_rng((SEED, len(self.losses)))
        texts = [lines[i]["prompt"] for i in rng.choice(len(lines), BATCH)]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        plain = mock.patch.object(functional, "scaled_dot_product_attention", plain_attention)
        with plain, torch.autocast("cpu", torch.bfloat16):
            images = self.images(texts, generator)
        loss = -self.reward.estimate(list(images), texts * VARIANTS).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())

    def lora(self) -> dict[str, Tensor]:
        return get_peft_model_state_dict(self.pipeline.transformer)

    def export(self, folder: Path) -> None:
        """Write the LoRA as diffusers loads it, with its scale."""
        metadata = self.pipeline.transformer.peft_config["default"].to_dict()
        CogView4Pipeline.save_lora_weights(folder, self.lora(), transformer_lora_adapter_metadata=metadata)

    def save(self, path: Path) -> None:
        own = {name: getattr(self, name) for name in KEPT}
        save_checkpoint({"lora": self.lora(), "optimizer": self.optimizer.state_dict(), **own}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        set_peft_model_state_dict(self.pipeline.transformer, state["lora"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in KEPT:
            setattr(self, name, state[name])


def fused(folder: Path, dtype: torch.dtype = torch.bfloat16) -> CogView4Pipeline:
    """emoji-64 with a LoRA merged into its weights, so that it costs what the plain one does."""
    pipeline = emoji.load()
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline.to(dtype=dtype)


def tuned(work: Path) -> CogView4Pipeline:
    """What the judges chose, in bfloat16."""
    return fused(work / str(json.loads((work / "card.json").read_text())["chosen"]["step"]))


def measure(pipeline: CogView4Pipeline, lines: Sequence[dict]) -> dict[str, Any]:
    """The reward, and what each judge says, of one image a line; ``judges`` is their mean."""
    images = sample(pipeline, lines, 0, emoji.DEFAULTS["num_inference_steps"], emoji.DEFAULTS["guidance_scale"])
    reward = resolve(REWARD).score(images, [line["prompt"] for line in lines]).values.mean()
    found = {name: accuracy(name, images, lines)["overall"] for name in JUDGES}
    return {"reward": round(float(reward), 3), **found, "judges": round(float(np.mean([*found.values()])), 4)}


def ended(rows: Sequence[dict]) -> bool:
    """Whether the judges have liked nothing better than an earlier one for some measurements."""
    liked = [row["judges"] for row in rows]
    return len(rows) - liked.index(max(liked)) > PATIENCE


def tune(work: Path, minutes: float) -> None:
    work.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    tuning, lines, validation = Tuning(resolve(REWARD)), training_prompts(), scenes.prompts("validation")
    if (work / "checkpoint.pt").exists():
        tuning.load(work / "checkpoint.pt")
    before = tuning.seconds - time.process_time()
    if not tuning.rows:
        tuning.rows.append({"step": 0, **measure(emoji.load(dtype=torch.bfloat16), validation)})
    while time.monotonic() < end and not ended(tuning.rows):
        tuning.step(lines)
        step = len(tuning.losses)
        if step % EVERY == 0:
            tuning.export(work / str(step))
            trained = round(-float(np.mean(tuning.losses[-EVERY:])), 3)
            tuning.rows.append({"step": step, "trained": trained, **measure(fused(work / str(step)), validation)})
            print(json.dumps(tuning.rows[-1]), flush=True)
        tuning.seconds = before + time.process_time()
        if step % SAVE_EVERY == 0:
            tuning.save(work / "checkpoint.pt")
        if step % EVERY == 0:
            chosen = max(tuning.rows[1:], key=lambda row: row["judges"])
            write_json(work / "card.json", {"seconds": round(tuning.seconds), "rows": tuning.rows, "chosen": chosen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder of this tuning alone")
    parser.add_argument("--minutes", type=float, default=25, help="begin no further step after so long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tune(options.work, options.minutes)


if __name__ == "__main__":
    main()
