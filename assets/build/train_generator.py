"""Train the text-to-image generator of emoji-64 on precomputed latents and save it as a CogView4Pipeline.

    python assets/build/train_vae.py --work WORK
    python assets/build/train_generator.py --work WORK --until 14:45 --out assets/emoji-64/pipeline

Flow matching in the convention of FlowMatchEulerDiscreteScheduler: x_s = (1 - s) x + s e, the model is told 1000 s and
predicts e - x (arXiv 2210.02747, 2403.03206). The text encoder is trained along. As representation alignment (arXiv
2410.06940) does with a pretrained encoder, a linear head on a middle block, dropped afterwards, has to name what covers
each latent token: class, colour and box, which the composed scenes know. Training runs against the clock; a killed run
resumes, and every ten minutes the averaged weights are saved to WORK/pipeline.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from scene_cache import NATURAL, SceneCache, load_or_compose
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional
from train_vae import SCENES, VALIDATION
from train_vae import SEED as SCENE_SEED
from training import parse_deadline, save_checkpoint
from transformers import GlmConfig, GlmModel, PreTrainedTokenizerFast

from visearch.assets import scenes

fused_attention = functional.scaled_dot_product_attention
SEED, BATCH, EMA, UNCONDITIONAL = 2, 64, 0.997, 0.1
MUON_RATE, ADAM_RATE = 2.5e-3, 1e-3
ALIGNMENT, ALIGNED_BLOCK = 0.25, 2
TEXT_LENGTH = 16  # the pipeline pads to multiples of 16; no caption is longer
# relations and attributes are the hardest to learn
TAG_WEIGHTS = {
    "single_object": 0.6,
    "two_object": 1.0,
    "counting": 1.1,
    "colors": 0.8,
    "position": 2.2,
    "color_attr": 1.4,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world; a first token, so that the empty negative prompt is not an empty sequence."""
    sentences = ["a photo of an and", *scenes.COLORS, *scenes.RELATIONS]
    for name in scenes.CLASSES:
        sentences += [name] + [
            scenes.make_metadata("counting", [{"class": name, "count": count}])["prompt"] for count in (2, 3, 4)
        ]
    words = list(dict.fromkeys(word for sentence in sentences for word in sentence.split()))
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<bos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side="left"
    )


def build_pipeline(vae: AutoencoderKL) -> CogView4Pipeline:
    tokenizer = build_tokenizer()
    # the pipeline reads hidden_states[-2], so only two of the three layers are used and trained
    text = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.pad_token_id,
    )
    transformer = CogView4Transformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=5,
        num_attention_heads=8,
        attention_head_dim=32,
        text_embed_dim=128,
        time_embed_dim=64,
        condition_dim=16,
        sample_size=8,
    )
    # adaLN-zero (arXiv 2212.09748): each block begins as the identity, the velocity as zero
    for layer in (*(block.norm1.linear for block in transformer.transformer_blocks), transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return CogView4Pipeline(tokenizer, GlmModel(text), vae, transformer, FlowMatchEulerDiscreteScheduler(shift=1.0))


def encode_captions(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Token ids (N, 16), padded as CogView4Pipeline pads one prompt: on the left."""
    rows = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")["input_ids"]
    tokenizer.backend_tokenizer.no_padding()  # the last call's padding would be saved with the tokenizer
    if rows.shape[1] != TEXT_LENGTH or (rows == tokenizer.unk_token_id).any():
        raise ValueError(f"a caption is longer than {TEXT_LENGTH} tokens or has an unknown word; extend the vocabulary")
    return rows


class Velocity(nn.Module):
    """Text encoder and transformer as the pipeline runs them: (x (B, 16, 8, 8), s (B,) in [0, 1], ids) -> velocity."""

    def __init__(self, pipeline: CogView4Pipeline):
        super().__init__()
        self.text_encoder, self.transformer = pipeline.text_encoder, pipeline.transformer
        self.features: Tensor | None = None  # (B, 64, 256): image tokens after the middle block of the last forward

    def _keep(self, block: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        self.features = outputs[0]

    def forward(self, x: Tensor, level: Tensor, ids: Tensor) -> Tensor:
        text = self.text_encoder(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
        size = torch.full((len(x), 2), float(scenes.SIZE))
        hook = self.transformer.transformer_blocks[ALIGNED_BLOCK].register_forward_hook(self._keep)
        velocity = self.transformer(x, text, 1000 * level, size, size, torch.zeros_like(size), return_dict=False)[0]
        hook.remove()
        return velocity


def plain_attention(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Softmax attention by two matrix products: the fused CPU kernel's backward made training 1.4 times slower."""
    if options.get("attn_mask") is not None or options.get("is_causal") or options.get("enable_gqa"):
        return fused_attention(query, key, value, **options)
    weights = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return weights.softmax(-1).to(value.dtype) @ value


def layout_targets(cache: SceneCache) -> tuple[Tensor, Tensor, Tensor]:
    """What covers the centre of each of the 64 latent tokens of N scenes, the sprite painted last winning.

    Returns: classes (N, 64) uint8, ``len(CLASSES)`` for background; colours (N, 64) uint8; box corners relative to the
    token's centre (N, 64, 4) float16, in units of 16 pixels, 0 for background.
    """
    count = len(cache.metadata)
    classes = np.full((count, 64), len(scenes.CLASSES), np.uint8)
    colours = np.full((count, 64), NATURAL, np.uint8)
    corners = np.zeros((count, 64, 4), np.float16)
    grid = np.arange(4, scenes.SIZE, 8, dtype=np.float32)
    centre = np.tile(np.stack(np.meshgrid(grid, grid, indexing="xy"), -1).reshape(64, 2), 2)  # (64, 4): x, y, x, y
    for slot in range(cache.boxes.shape[1]):
        offset = cache.boxes[:, slot, None] - centre
        inside = (offset[..., :2] <= 0).all(-1) & (offset[..., 2:] > 0).all(-1) & (cache.classes[:, slot, None] >= 0)
        classes = np.where(inside, cache.classes[:, slot, None], classes).astype(np.uint8)
        colours = np.where(inside, cache.colours[:, slot, None], colours).astype(np.uint8)
        corners[inside] = offset[inside] / 16
    return torch.from_numpy(classes), torch.from_numpy(colours), torch.from_numpy(corners)


def alignment_loss(head: nn.Linear, features: Tensor, classes: Tensor, colours: Tensor, corners: Tensor) -> Tensor:
    """Cross-entropies of class and colour and L1 of the corners; colours and corners count on sprites only."""
    output = head(features.float())
    split = output.split([len(scenes.CLASSES) + 1, NATURAL + 1, 4], dim=-1)
    sprite = classes < len(scenes.CLASSES)
    return (
        functional.cross_entropy(split[0].flatten(0, 1), classes.long().flatten())
        + 0.5 * functional.cross_entropy(split[1][sprite], colours[sprite].long())
        + functional.l1_loss(split[2][sprite], corners[sprite].float())
    )


def flow_loss(model: Velocity, x: Tensor, noise: Tensor, level: Tensor, ids: Tensor) -> Tensor:
    """Mean squared error of the velocity, per sample (B,)."""
    s = level.view(-1, 1, 1, 1)
    plain = mock.patch.object(functional, "scaled_dot_product_attention", plain_attention)
    with plain, torch.autocast("cpu", torch.bfloat16):
        velocity = model((1 - s) * x + s * noise, level, ids)
    return (velocity.float() - (noise - x)).square().flatten(1).mean(1)


def head_for(width: int) -> nn.Linear:
    """Features of a latent token -> logits of class and colour, box corners."""
    return nn.Linear(width, len(scenes.CLASSES) + NATURAL + 6)


def sampling_weights(cache: SceneCache) -> np.ndarray:
    """Probabilities of the training scenes (those not held out), by task."""
    weights = np.array([TAG_WEIGHTS[metadata["tag"]] for metadata in cache.metadata[: SCENES - VALIDATION]])
    return weights / weights.sum()


def optimizers(*models: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, AdamW for everything else (tables of biases are no matrices)."""
    named = [pair for model in models for pair in model.named_parameters()]
    matrices = [p for n, p in named if "transformer_blocks" in n and p.ndim == 2 and not n.endswith("table")]
    chosen = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def save_pipeline(pipeline: CogView4Pipeline, folder: Path) -> None:
    """Write fp16 safetensors that load as float32; ``pipeline`` itself keeps its precision."""
    half = copy.deepcopy(pipeline)
    half.to(dtype=torch.float16)
    half.save_pretrained(folder)
    # transformers loads in the precision that the config names, diffusers in float32: they have to agree; and diffusers
    # records the folder that the autoencoder came from
    for part, changes in (("text_encoder", {"dtype": "float32"}), ("vae", {"_name_or_path": ""})):
        config = folder / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}, indent=2) + "\n")


def train(pipeline: CogView4Pipeline, work: Path, deadline: float) -> None:
    cache = load_or_compose(work / "scenes", SCENES, SCENE_SEED, styles=scenes.STYLES, free=False)
    latents = torch.from_numpy(np.load(work / "latents.npy"))
    ids = encode_captions(pipeline.tokenizer, [metadata["prompt"] for metadata in cache.metadata])
    empty = encode_captions(pipeline.tokenizer, [""])
    weights = sampling_weights(cache)

    model = Velocity(pipeline)
    head = head_for(256)
    averaged = copy.deepcopy(pipeline)
    average = Velocity(averaged).requires_grad_(False)
    steppers = optimizers(model, head)
    layout = layout_targets(cache)
    saved, spent, step = work / "generator.ckpt", 0.0, 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        average.load_state_dict(state["average"])
        for stepper, content in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(content)
        spent, step = state["spent"], state["step"]
    total = spent + deadline - time.time()
    begin, last_saved, last_exported = time.time() - spent, spent, spent
    held_out = slice(SCENES - VALIDATION, SCENES)
    fixed = torch.Generator().manual_seed(SEED)
    fixed_noise = torch.randn(latents[held_out].shape, generator=fixed)
    fixed_level = (torch.arange(VALIDATION) + 0.5) / VALIDATION
    losses: list[tuple[float, float]] = []
    while True:
        spent = time.time() - begin
        progress = spent / total
        # warm up, hold, decay linearly to zero over the last 40 %
        factor = min(1.0, (step + 1) / 200) * min(1.0, max(0.0, (1 - progress) / 0.4) + 0.005)
        for stepper, rate in zip(steppers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in stepper.param_groups:
                group["lr"] = rate * factor
        rng = np.random.default_rng((SEED, step))
        rows = torch.from_numpy(rng.choice(len(weights), BATCH, p=weights))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        x = latents[rows].float()
        noise = torch.randn(x.shape, generator=generator)
        level = torch.sigmoid(torch.randn(BATCH, generator=generator) + 0.2)  # logit-normal (arXiv 2403.03206)
        text = torch.where(torch.rand(BATCH, 1, generator=generator) < UNCONDITIONAL, empty, ids[rows])
        loss = flow_loss(model, x, noise, level, text).mean()
        aligned = alignment_loss(head, model.features, *(target[rows] for target in layout))
        for stepper in steppers:
            stepper.zero_grad()
        (loss + ALIGNMENT * aligned).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        step += 1
        losses.append((loss.item(), aligned.item()))
        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))
            for target, source in zip(average.parameters(), model.parameters(), strict=True):
                target.lerp_(source, 1 - decay)
        finished = time.time() >= deadline
        if step % 100 == 0:
            recent = np.mean(losses[-100:], axis=0)
            row = {"step": step, "images": step * BATCH, "seconds": round(spent), "loss": round(float(recent[0]), 5)}
            row["alignment"] = round(float(recent[1]), 4)
            if step % 500 == 0:
                with torch.no_grad():
                    values = flow_loss(average, latents[held_out].float(), fixed_noise, fixed_level, ids[held_out])
                row["validation"] = round(float(values.mean()), 5)
            with (work / "generator.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if spent - last_saved > 180 or finished:
            state = {
                "model": model.state_dict(),
                "head": head.state_dict(),
                "average": average.state_dict(),
                "optimizers": [stepper.state_dict() for stepper in steppers],
                "spent": spent,
                "step": step,
            }
            save_checkpoint(state, saved)
            last_saved = spent
        if spent - last_exported > 600 or finished:
            save_pipeline(averaged, work / "pipeline")
            last_exported = spent
        if finished:
            break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that train_vae.py wrote to")
    parser.add_argument("--until", type=parse_deadline, required=True, help="time of day to stop at, HH:MM")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    pipeline = build_pipeline(AutoencoderKL.from_pretrained(args.work / "vae"))
    train(pipeline, args.work, args.until)


if __name__ == "__main__":
    main()
