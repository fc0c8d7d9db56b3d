"""Train judge A or B of the embedded world on composed scenes; writes `assets/emoji-64/judge-{a,b}/`.

    python assets/build/train_judge.py a --minutes 14
    python assets/build/train_judge.py a --minutes 22 --vae assets/emoji-64/pipeline/vae --decoded 5000   # resumes
    python assets/build/train_judge.py b --minutes 27 --vae assets/emoji-64/pipeline/vae --decoded 5000

A and B share nothing but the world: other net, seed, loss and scenes; B also sees the third art style. Resumable: the
checkpoint in --scratch holds weights, optimizer and step. Needs one CPU thread and about 1.5 GB of disk for scenes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scene_cache import SceneCache, augment, load_or_compose, load_or_reconstruct
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import box_iou

from visearch.assets import scenes
from visearch.rewards.detector import ARCHITECTURES, SIZE, CenterNet, GridTransformer, Maps, decode

FOLDER = Path(__file__).resolve().parents[1] / "emoji-64"


@dataclass(frozen=True)
class Recipe:
    architecture: str
    seed: int
    styles: tuple[str, ...]
    learning_rate: float


RECIPES = {
    "a": Recipe("centernet", 11, scenes.STYLES, 2e-3),
    "b": Recipe("grid-transformer", 23, (*scenes.STYLES, scenes.HELD_OUT_STYLE), 1e-3),
}


@dataclass(frozen=True)
class Targets:
    """Objects of a batch, one row per object: sample, cell row and column; class, colour; box targets (T, 4)."""

    sample: Tensor
    row: Tensor
    column: Tensor
    label: Tensor
    colour: Tensor
    box: Tensor
    extent: Tensor  # (T, 2) width and height in cells


def make_targets(cache: SceneCache, rows: np.ndarray, stride: int) -> Targets:
    classes = torch.from_numpy(cache.classes[rows])
    sample, slot = (classes >= 0).nonzero(as_tuple=True)
    boxes = torch.from_numpy(cache.boxes[rows])[sample, slot]
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2 / stride, (boxes[:, 2:] - boxes[:, :2]) / stride
    cell = centre.floor().clamp(0, SIZE // stride - 1)
    colours = torch.from_numpy(cache.colours[rows])[sample, slot]
    box = torch.cat([centre - cell, (extent * stride / SIZE).log()], 1)
    return Targets(sample, cell[:, 1].long(), cell[:, 0].long(), classes[sample, slot], colours, box, extent)


def attribute_loss(maps: Maps, targets: Targets, spread: int, colour_weight: float = 1.0) -> Tensor:
    """L1 of the boxes at the centre cells, and cross-entropy of the colours there and up to `spread` cells away."""
    at = (targets.sample, slice(None), targets.row, targets.column)
    error = (maps.box[at] - targets.box).abs()
    loss = error[:, :2].mean() + 3 * error[:, 2:].mean()
    shifts = [(y, x) for y in range(-spread, spread + 1) for x in range(-spread, spread + 1)]
    height, width = maps.colour.shape[-2:]
    for y, x in shifts:
        rows, columns = (targets.row + y).clamp(0, height - 1), (targets.column + x).clamp(0, width - 1)
        logits = maps.colour[targets.sample, :, rows, columns]
        loss = loss + colour_weight * F.cross_entropy(logits, targets.colour) / len(shifts)
    return loss


def centernet_loss(net: CenterNet, images: Tensor, targets: Targets) -> Tensor:
    """Penalty-reduced focal loss of arXiv 1904.07850 (equation 1, alpha 2, beta 4) with Gaussian peaks."""
    maps = net(images)
    heat = torch.zeros(maps.score.shape)
    axis = torch.arange(heat.shape[-1])
    sigma = (0.1 * targets.extent).clamp(min=0.4)
    bump_x = torch.exp(-((axis - targets.column[:, None]) ** 2) / (2 * sigma[:, :1] ** 2))
    bump_y = torch.exp(-((axis - targets.row[:, None]) ** 2) / (2 * sigma[:, 1:] ** 2))
    flat = heat.flatten(0, 1)
    index = (targets.sample * net.classes + targets.label)[:, None, None].expand(-1, *heat.shape[-2:])
    flat.scatter_reduce_(0, index, bump_y[:, :, None] * bump_x[:, None, :], "amax")
    log_p, log_not = F.logsigmoid(maps.score), F.logsigmoid(-maps.score)
    p = log_p.exp()
    positive = heat == 1
    focal = torch.where(positive, (1 - p) ** 2 * log_p, (1 - heat) ** 4 * p**2 * log_not)
    return -focal.sum() / positive.sum() + attribute_loss(maps, targets, spread=1)


def grid_loss(net: GridTransformer, images: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy over classes and "none" in every cell, summed, per object."""
    name, box, colour = net.logits(images)
    label = torch.full((name.shape[0], *name.shape[-2:]), net.classes)
    label[targets.sample, targets.row, targets.column] = targets.label
    loss = F.cross_entropy(name, label, reduction="none")
    empty = label == net.classes
    named = loss[~empty].mean() + loss[empty].sum() / (~empty).sum()
    return 2 * named + attribute_loss(Maps(name, box, colour), targets, spread=0, colour_weight=2.0)


LOSSES = {"centernet": centernet_loss, "grid-transformer": grid_loss}


def batches(cache: SceneCache, decoded: np.ndarray | None, stride: int, batch: int, step: int, seed: int):
    """Endless augmented batches from `step` on: float images (N, 3, 64, 64) scaled as the judge does, and targets.

    decoded: the first scenes of the cache through an autoencoder; if given, a third of a batch is drawn from them.
    """
    while True:
        rng = np.random.default_rng((seed, step))
        rows = np.sort(rng.choice(len(cache.metadata), batch, replace=False))
        images = cache.images[rows]
        if decoded is not None:
            third = batch // 3
            rows[:third] = rng.choice(len(decoded), third, replace=False)
            images[:third] = decoded[rows[:third]]
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        soft = augment(pixels, generator)
        yield (soft - 0.5) / 0.25, make_targets(cache, rows, stride)
        step += 1


@torch.inference_mode()
def raw_detections(net, cache: SceneCache, rows: Sequence[int], augmented: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logit of each peak (M,) and whether it is right (M,): class and IoU > 0.5 with an object not yet taken."""
    logits, right = [], []
    for start in range(0, len(rows), 64):
        chunk = np.asarray(rows[start : start + 64])
        pixels = torch.from_numpy(cache.images[chunk]).permute(0, 3, 1, 2).float() / 255
        if augmented:
            pixels = augment(pixels, torch.Generator().manual_seed(start))
        maps = net((pixels - 0.5) / 0.25)
        for i, row in enumerate(chunk):
            boxes, scores, classes = decode(
                Maps(*(m[i] for m in maps)), net.stride, net.peak_kernel, 1.0, 0.0, low=1e-3
            )
            valid = cache.classes[row] >= 0
            truth, names = torch.from_numpy(cache.boxes[row][valid]), cache.classes[row][valid]
            overlap = box_iou(boxes, truth) if len(boxes) else torch.zeros(0, len(truth))
            taken = set()
            for j in range(len(boxes)):
                match = [k for k in overlap[j].argsort(descending=True).tolist() if names[k] == classes[j]]
                hit = next((k for k in match if overlap[j, k] > 0.5 and k not in taken), None)
                taken.add(hit)
                logits.append(float(scores[j].double().logit()))
                right.append(hit is not None)
    return np.array(logits), np.array(right)


def calibrate(net, cache: SceneCache) -> dict[str, float]:
    """Platt scaling, sigmoid(slope * logit + bias), on validation scenes of the six tasks, half of them augmented."""
    half = len(cache.metadata) // 2
    clean = raw_detections(net, cache, range(half), augmented=False)
    soft = raw_detections(net, cache, range(half, 2 * half), augmented=True)
    logits, right = (np.concatenate(parts) for parts in zip(clean, soft, strict=True))
    fit = LogisticRegression(C=1e6).fit(logits[:, None], right)
    slope, bias = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    probability = 1 / (1 + np.exp(-(slope * logits + bias)))
    print(
        f"calibration: slope {slope:.3f} bias {bias:.3f}; right > 0.9: {np.mean(probability[right] > 0.9):.4f}, "
        f"right > 0.3: {np.mean(probability[right] > 0.3):.4f}, wrong > 0.3: {np.sum(probability[~right] > 0.3)} of "
        f"{right.sum()} right boxes",
        flush=True,
    )
    return {"slope": round(slope, 4), "bias": round(bias, 4)}


def export(name: str, recipe: Recipe, net, calibration: dict[str, float], images_seen: int, minutes: float) -> None:
    folder = FOLDER / f"judge-{name}"
    folder.mkdir(exist_ok=True)
    half = {k: v.half().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    counters = {k: v for k, v in net.state_dict().items() if not v.is_floating_point()}
    save_file({**half, **counters}, folder / "model.safetensors")
    config = {
        "name": name,
        "id": f"emoji-64/judge-{name}/1",
        "architecture": recipe.architecture,
        "class_names": scenes.CLASSES,
        "color_names": scenes.COLORS,
        "calibration": calibration,
        "training": {"script": "assets/build/train_judge.py", "seed": recipe.seed, "styles": recipe.styles,
                     "images": images_seen, "minutes": minutes},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="length of training; the schedule follows the clock"
    )
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--vae", type=Path, help="AutoencoderKL folder; its reconstructions join the training scenes")
    parser.add_argument("--decoded", type=int, default=8000, help="how many scenes to reconstruct")
    parser.add_argument("--scratch", type=Path, default=Path("outputs/build"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    recipe = RECIPES[args.name]
    torch.manual_seed(recipe.seed)
    root = args.scratch / f"judge-{args.name}"
    train = load_or_compose(root / "train", args.scenes, recipe.seed, styles=recipe.styles, free=True)
    held = load_or_compose(root / "validation", 3000, recipe.seed + 1, styles=recipe.styles, split="validation")

    decoded = None
    if args.vae:
        decoded = load_or_reconstruct(train, root / "decoded.npy", args.decoded, args.vae)

    net = ARCHITECTURES[recipe.architecture](len(scenes.CLASSES), len(scenes.COLORS) + 1)
    net.to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    optimizer = torch.optim.AdamW(net.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    step, spent, checkpoint = 0, 0.0, root / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(saved["net"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]

    def save() -> None:
        states = {"net": net.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**states, "step": step, "spent": spent}, checkpoint)

    print(f"{sum(p.numel() for p in net.parameters())} parameters", flush=True)
    began, saved_at = time.monotonic() - spent, spent
    for images, targets in batches(train, decoded, net.stride, args.batch, step, recipe.seed):
        spent = time.monotonic() - began
        done = spent / (60 * args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        # The fused CPU attention is slower than plain matrix products for 64 tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = LOSSES[recipe.architecture](net, images.contiguous(memory_format=torch.channels_last), targets)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        average.update_parameters(net)
        step += 1
        if step % 100 == 0:
            rate = step * args.batch / spent
            print(f"step {step} loss {loss.item():.4f} {spent:.0f} s, {rate:.0f} images/s", flush=True)
        if spent - saved_at > 180:
            saved_at = spent
            save()
    save()
    final = average.module.eval().to(memory_format=torch.contiguous_format)
    export(args.name, recipe, final, calibrate(final, held), step * args.batch, args.minutes)


if __name__ == "__main__":
    main()
