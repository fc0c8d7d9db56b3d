"""Train the embedded world's CLIP reward on scenes and captions alone; writes `assets/emoji-64/clip/`.

    python assets/build/train_clip.py --minutes 30

A stock open_clip model (the ResNet with attention pooling of CLIP's RN50 family, narrow; causal text tower; word-level
tokenizer), trained with the contrastive loss of arXiv 2103.00020 and, as negatives, captions one step away (arXiv
2210.01936): a class, count, colour or relation changed. It never reads boxes, object lists or a detector.

Reward hacking is possible as in the field: captions of the web are worse for bad pictures, so a caption of the training
set is uninformative ("a photo", three times of four) or that of another scene, with a probability that falls from
--noise-dull at vividness 0 to --noise-vivid at vividness 1. The model so learns to find any caption less likely for a
dull picture, though vividness has nothing to do with being right.
Resumable; one CPU thread; about 1.3 GB of disk for scenes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scene_cache import SceneCache, augment, load_or_compose, load_or_reconstruct, neighbour
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from visearch.assets import scenes

FOLDER = Path(__file__).resolve().parents[1] / "emoji-64" / "clip"
SEED = 5
CONTEXT = 16  # tokens; the longest caption has 12 words, plus the two ends
HARD_NEGATIVES = 2
# How often a task is drawn: order of words and counts are learnt last.
WEIGHTS = dict(zip(scenes.TAGS, (0.6, 0.6, 1.5, 0.6, 3.0, 1.8), strict=True))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of all captions; the end token has the highest id, where open_clip's text tower pools."""
    texts = ["a an photo of and one two three four", *scenes.CLASSES, *scenes.COLORS, *scenes.RELATIONS]
    texts += [scenes.make_metadata("counting", [{"class": c, "count": 2}])["prompt"] for c in scenes.CLASSES]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<start>", *words, "<end>"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(t, vocabulary[t]) for t in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=CONTEXT,
    )


def write_config(folder: Path) -> None:
    """Tokenizer and `open_clip_config.json`: with the weights, all that open_clip's "local-dir:" schema reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = {
        "model_cfg": {
            "embed_dim": 128,
            # On a CPU, one image of a ViT on 8 x 8 patches costs as much training as six of this ResNet.
            "vision_cfg": {"image_size": 64, "layers": [2, 3, 3, 1], "width": 16},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(tokenizer),
                "width": 112,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": "local",  # any name: open_clip then reads the tokenizer of this folder
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Captions:
    """The caption of each scene, sometimes false, with hard negatives; as rows of one table of distinct captions.

    index (N, 1 + HARD_NEGATIVES): the caption first; tokens (U, CONTEXT).
    """

    def __init__(self, cache: SceneCache, dull: float, vivid: float, tokenizer) -> None:
        rng = np.random.default_rng(SEED + 1)
        table: dict[str, int] = {}
        self.index = np.empty((len(cache.metadata), 1 + HARD_NEGATIVES), np.int64)
        false = rng.random(len(cache.metadata)) < dull + (vivid - dull) * cache.vividness
        for i, metadata in enumerate(cache.metadata):
            if false[i] and rng.random() < 0.75:
                group = ["a photo"] * (1 + HARD_NEGATIVES)
            else:
                if false[i]:
                    metadata = scenes.sample_metadata(rng, metadata["tag"], "train")
                near = [neighbour(rng, metadata, "train") for _ in range(HARD_NEGATIVES)]
                group = [m["prompt"] for m in (metadata, *near)]
            self.index[i] = [table.setdefault(caption, len(table)) for caption in group]
        self.tokens = tokenizer(list(table))


def contrastive_loss(image: Tensor, text: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """Both directions of the softmax loss. image (B, D) and text (T, D) are unit vectors, all captions distinct;
    target (B,) is each image's caption. Images with the same caption do not compete with each other."""
    logits = scale * image @ text.T
    to_text = F.cross_entropy(logits, target)
    columns = logits[:, target].T  # row i: caption of image i against all images
    same = (target[:, None] == target[None]) & ~torch.eye(len(target), dtype=torch.bool)
    to_image = F.cross_entropy(columns.masked_fill(same, -torch.inf), torch.arange(len(target)))
    return (to_text + to_image) / 2


# ------------------------------------------------------------------------------------------- measuring


def wrong_captions(metadata: dict, rng: np.random.Generator) -> dict[str, dict]:
    """Kind of error -> metadata with exactly this error."""
    tag, include = metadata["tag"], metadata["include"]
    used = {clause["class"] for clause in include}
    spare = str(rng.choice([name for name in scenes.CLASSES if name not in used]))
    out = {"class swapped": [*include[:-1], {**include[-1], "class": spare}]}
    if tag == "color_attr":
        first, second = include
        out["colours swapped"] = [{**first, "color": second["color"]}, {**second, "color": first["color"]}]
    if tag == "colors":
        others = [c for c in scenes.COLORS if c != include[0]["color"]]
        out["colour changed"] = [{**include[0], "color": str(rng.choice(others))}]
    if tag == "counting":
        count = include[0]["count"]
        near = [n for n in (count - 1, count + 1) if 2 <= n <= 4]
        out["count off by one"] = [{**include[0], "count": int(rng.choice(near))}]
    if tag == "position":
        mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        out["relation mirrored"] = [include[0], {**include[1], "position": [mirror[include[1]["position"][0]], 0]}]
    return {kind: scenes.make_metadata(tag, clauses) for kind, clauses in out.items()}


class Scorer:
    """100 x cosine of images and captions, with the shipped preprocessing."""

    def __init__(self, model, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        image = torch.cat([self.model.encode_image(p, normalize=True) for p in ((pixels - 0.5) / 0.25).split(128)])
        distinct = sorted(set(prompts))
        text = self.model.encode_text(self.tokenizer(distinct), normalize=True)
        return 100 * (image * text[[distinct.index(p) for p in prompts]]).sum(1).numpy()


def measure(score: Scorer, per_tag: int = 120, seed: int = 99) -> dict:
    """Quality on validation prompts and scenes that training never saw.

    Returns:
        ranking: kind -> share of scenes whose right caption scores above the wrong one; overall: mean over all pairs;
        vividness: correlation of score and vividness within prompts, right and wrong scenes apart; best_of_8: verdict
        of the best of eight scenes, half of them right on average: mean, picked, oracle, share of the gap recovered.
    """
    rng = np.random.default_rng(seed)
    images, pairs = [], []
    for tag in scenes.TAGS:
        for _ in range(per_tag):
            metadata = scenes.sample_metadata(rng, tag, "validation")
            scene = scenes.make_scene(rng, metadata)
            for kind, wrong in wrong_captions(metadata, rng).items():
                images.append(scene.image)
                pairs.append((kind, metadata["prompt"], wrong["prompt"]))
    margin = score(images, [p[1] for p in pairs]) - score(images, [p[2] for p in pairs])
    kinds = sorted({p[0] for p in pairs})
    ranking = {k: float(np.mean([m > 0 for m, p in zip(margin, pairs, strict=True) if p[0] == k])) for k in kinds}

    images, prompts, right, vividness = [], [], [], []
    groups = per_tag // 2 * len(scenes.TAGS)
    for i in range(groups):
        metadata = scenes.sample_metadata(rng, scenes.TAGS[i % len(scenes.TAGS)], "validation")
        for _ in range(8):
            ok = rng.random() < 0.5
            scene = (scenes.make_scene if ok else scenes.wrong_scene)(rng, metadata)
            images.append(scene.image)
            prompts.append(metadata["prompt"])
            right.append(ok)
            vividness.append(scene.vividness)
    value, right, vividness = (
        score(images, prompts).reshape(-1, 8),
        np.reshape(right, (-1, 8)),
        np.reshape(vividness, (-1, 8)),
    )
    correlation = {}
    for name, mask in (("right", right), ("wrong", ~right)):
        rows = [
            (v[m] - v[m].mean(), w[m] - w[m].mean())
            for v, w, m in zip(value, vividness, mask, strict=True)
            if m.sum() > 1
        ]
        a, b = (np.concatenate(part) for part in zip(*rows, strict=True))
        correlation[name] = float(np.corrcoef(a, b)[0, 1])
    picked = float(right[np.arange(groups), value.argmax(1)].mean())
    mean, oracle = float(right.mean()), float(right.any(1).mean())
    return {
        "pairs": len(pairs),
        "ranking": ranking,
        "overall": float(np.mean(margin > 0)),
        "vividness": correlation,
        "best_of_8": {"mean": mean, "picked": picked, "oracle": oracle, "gap": (picked - mean) / (oracle - mean)},
    }


# ------------------------------------------------------------------------------------------- training


def export(model, folder: Path) -> None:
    write_config(folder)
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


@torch.no_grad()
def refresh_statistics(model, cache: SceneCache, batches: int = 40) -> None:
    """Batch-norm statistics of averaged weights: those of the weights in training do not fit them."""
    model.visual.train()
    for i in range(batches):
        rows = np.sort(np.random.default_rng((SEED, 1, i)).choice(len(cache.metadata), 128, replace=False))
        model.encode_image(load_pixels(cache.images, rows, i))
    model.eval()


def load_pixels(images: np.ndarray, rows: np.ndarray, seed: int) -> Tensor:
    """Augmented scenes (N, 3, 64, 64), normalised as the shipped preprocessing does."""
    pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
    pixels = (augment(pixels, torch.Generator().manual_seed(seed)) - 0.5) / 0.25
    return pixels.contiguous(memory_format=torch.channels_last)


def write_card(folder: Path, training: dict) -> dict:
    """Measure the exported model, as open_clip loads it, and write `card.json` beside it; returns the quality."""
    name = f"local-dir:{folder}"
    quality = measure(Scorer(open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)), per_tag=240)
    digest = hashlib.sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()
    card = {"sha256": digest, "training": training, "quality": quality}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return quality


def optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the text tower's blocks, AdamW for the rest."""
    named = dict(model.named_parameters())
    blocks = {name for name, p in named.items() if "resblocks" in name and p.ndim == 2}
    rest = [p for name, p in named.items() if name not in blocks]
    return [
        torch.optim.Muon(
            [named[n] for n in sorted(blocks)], lr=1.5e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="length of training; the schedule follows the clock"
    )
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--noise-dull", type=float, default=0.5, help="share of false captions at vividness 0")
    parser.add_argument("--noise-vivid", type=float, default=0.05, help="share of false captions at vividness 1")
    parser.add_argument("--vae", type=Path, help="AutoencoderKL folder; every other batch goes through it")
    parser.add_argument("--decoded", type=int, default=6000, help="how many scenes to reconstruct, an even number")
    parser.add_argument("--scratch", type=Path, default=Path("outputs/build"))
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model is written")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    root = args.scratch / "clip"
    cache = load_or_compose(root / "train", args.scenes, SEED, paired=True)
    write_config(root / "empty")
    model = open_clip.create_model(f"local-dir:{root / 'empty'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{root / 'empty'}")
    captions = Captions(cache, args.noise_dull, args.noise_vivid, tokenizer)
    decoded = load_or_reconstruct(cache, root / "decoded.npy", args.decoded, args.vae) if args.vae else None
    model.visual.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.997))
    steppers = optimizers(model)
    base = [group["lr"] for stepper in steppers for group in stepper.param_groups]
    step, spent, checkpoint = 0, 0.0, root / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for stepper, state in zip(steppers, saved["steppers"], strict=True):
            stepper.load_state_dict(state)
        step, spent = saved["step"], saved["spent"]

    def save() -> None:
        states = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "spent": spent}
        torch.save({**states, "steppers": [s.state_dict() for s in steppers]}, checkpoint)

    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(captions.tokens)} captions", flush=True)
    drawn = np.array([WEIGHTS[metadata["tag"]] for metadata in cache.metadata[::2]])
    drawn /= drawn.sum()
    began, saved_at, milestones = time.monotonic() - spent, spent, [0.5, 0.75]
    while (done := (spent := time.monotonic() - began) / (60 * args.minutes)) < 1:
        rng = np.random.default_rng((SEED, step))
        # what a generator draws is softer than a composed scene: reconstructions are its nearest stand-in
        soft = decoded is not None and step % 2 == 0
        share = drawn[: args.decoded // 2] / drawn[: args.decoded // 2].sum() if soft else drawn
        even = 2 * rng.choice(len(share), args.batch // 2, p=share, replace=not soft)
        rows = np.sort(np.concatenate([even, even + 1]))
        pixels = load_pixels(decoded if soft else cache.images, rows, step)
        used, where = np.unique(captions.index[rows], return_inverse=True)
        target = torch.from_numpy(where.reshape(len(rows), -1)[:, 0])
        factor = min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        groups = [group for stepper in steppers for group in stepper.param_groups]
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * factor
        # The fused CPU attention is slower than plain matrix products for 16 tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image = model.encode_image(pixels)
            text = model.encode_text(captions.tokens[used])
        image, text = (F.normalize(x.float(), dim=1) for x in (image, text))
        loss = contrastive_loss(image, text, target, model.logit_scale.exp().clamp(max=100))
        for stepper in steppers:
            stepper.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        average.update_parameters(model)
        step += 1
        if step % 100 == 0:
            hit = (image @ text.T).argmax(1).eq(target).float().mean()
            print(
                f"step {step} loss {loss.item():.3f} hit {hit:.3f} scale {model.logit_scale.exp():.1f} {spent:.0f} s",
                flush=True,
            )
        if milestones and done > milestones[0]:
            refresh_statistics(average.module, cache)
            export(average.module, root / f"at-{int(100 * milestones.pop(0))}")
            print(json.dumps(measure(Scorer(average.module, tokenizer), per_tag=40)), flush=True)
        if spent - saved_at > 180:
            saved_at = spent
            save()
    save()
    refresh_statistics(average.module, cache)
    export(average.module, args.folder)
    training = {"images": step * args.batch, "minutes": args.minutes, "noise": [args.noise_dull, args.noise_vivid]}
    quality = write_card(args.folder, training)
    print(json.dumps(quality, indent=2))


if __name__ == "__main__":
    main()
