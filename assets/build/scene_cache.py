"""Composed training scenes on disk, and the image augmentation that the reward and the judges train with.

Shapes: N scenes, M = `MAX_OBJECTS` object slots (empty slots have class -1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visearch.assets import scenes

MAX_OBJECTS = 8
NATURAL = len(scenes.COLORS)  # colour index of an object that was not tinted


@dataclass(frozen=True)
class SceneCache:
    """images (N, 64, 64, 3) uint8 memory map; classes, colours (N, M) int64; boxes (N, M, 4) float32, pixels;
    vividness (N,) float32; metadata: N GenEval-schema records of what each scene was composed for.

    Only `images`, `metadata` (for the caption) and `vividness` may be read by the reward's training.
    """

    images: np.ndarray
    classes: np.ndarray
    colours: np.ndarray
    boxes: np.ndarray
    vividness: np.ndarray
    metadata: list[dict]


def load_or_compose(
    folder: Path,
    count: int,
    seed: int,
    *,
    styles: tuple[str, ...] = scenes.STYLES,
    free: bool = False,
    paired: bool = False,
    split: str = "train",
) -> SceneCache:
    """Compose `count` scenes once (about 0.6 ms each) and map them from disk afterwards.

    Args:
        folder: where the arrays live; a complete cache found there is used as it is.
        styles: sprite styles to draw from.
        free: also compose wrong scenes and distractors (for detectors); False: each scene fits its caption.
        paired: scene 2 i + 1 is one step away from scene 2 i (a hard pair for contrastive training).
    """
    paths = {name: folder / f"{name}.npy" for name in ("images", "classes", "colours", "boxes", "vividness")}
    meta_path = folder / "metadata.jsonl"  # written last: its presence marks a complete cache
    if not meta_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compose(folder, paths, meta_path, count, np.random.default_rng(seed), styles, free, paired, split)
    arrays = {name: np.load(path, mmap_mode="r" if name == "images" else None) for name, path in paths.items()}
    metadata = [json.loads(line) for line in meta_path.read_text().splitlines()]
    if len(metadata) != count:
        raise ValueError(
            f"count={count}, but {folder} holds {len(metadata)} scenes: delete the folder or pass its size."
        )
    return SceneCache(**arrays, metadata=metadata)


def _compose(folder, paths, meta_path, count, rng, styles, free, paired, split) -> None:
    images = np.lib.format.open_memmap(paths["images"], mode="w+", dtype=np.uint8, shape=(count, 64, 64, 3))
    classes = np.full((count, MAX_OBJECTS), -1, np.int64)
    colours = np.full((count, MAX_OBJECTS), NATURAL, np.int64)
    boxes = np.zeros((count, MAX_OBJECTS, 4), np.float32)
    vividness = np.zeros(count, np.float32)
    lines = []
    metadata: dict = {}
    for i in range(count):
        metadata = neighbour(rng, metadata, split) if paired and i % 2 else scenes.sample_metadata(rng, split=split)
        kind = rng.random() if free else 1.0
        if kind < 0.25:
            scene = scenes.wrong_scene(rng, metadata, styles=styles)
        else:
            distractors = int(rng.integers(1, 3)) if kind < 0.5 else 0
            scene = scenes.make_scene(rng, metadata, styles=styles, distractors=distractors)
        images[i], vividness[i] = scene.image, scene.vividness
        for j, item in enumerate(scene.objects[:MAX_OBJECTS]):
            classes[i, j] = scenes.CLASSES.index(item.name)
            colours[i, j] = NATURAL if item.color is None else scenes.COLORS.index(item.color)
            boxes[i, j] = item.box
        lines.append(json.dumps(metadata))
    images.flush()
    for name, array in (("classes", classes), ("colours", colours), ("boxes", boxes), ("vividness", vividness)):
        np.save(paths[name], array)
    meta_path.write_text("\n".join(lines) + "\n")


def neighbour(rng: np.random.Generator, metadata: dict, split: str) -> dict:
    """Metadata one step away whose prompt may be used in `split`; after eight failures, any other of the same task."""
    for _ in range(8):
        near = scenes.wrong_metadata(rng, metadata)
        if scenes.split_of(near) in (None, split):
            return near
    return scenes.sample_metadata(rng, metadata["tag"], split)


@torch.inference_mode()
def reconstruct(images: Tensor, vae_folder: Path, batch_size: int = 32) -> Tensor:
    """Scenes (N, 3, 64, 64) uint8 through a diffusers AutoencoderKL (mean latents), uint8 again."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder).float().eval()
    parts = []
    for part in images.split(batch_size):
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae(part.float() / 127.5 - 1).sample
        parts.append(((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)


def load_or_reconstruct(cache: SceneCache, path: Path, count: int, vae_folder: Path) -> np.ndarray:
    """The first `count` scenes of a cache through an autoencoder, (count, 64, 64, 3) uint8, kept at `path`."""
    if not path.exists():
        images = torch.from_numpy(np.array(cache.images[:count])).permute(0, 3, 1, 2)
        np.save(path, reconstruct(images, vae_folder).permute(0, 2, 3, 1).numpy())
    return np.load(path, mmap_mode="r")


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Degrade scenes (N, 3, 64, 64) in [0, 1] the way small generators do: softness, grain, colour drift.

    Each sample gets one softening of four (none, a 3 x 3 blur, a resample through 32 or 44 pixels), then a drift
    of brightness, contrast and channel gains (at most about 8 %) and, for half of them, low- or full-resolution noise.
    """
    n = images.shape[0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    choice = torch.multinomial(torch.tensor([0.45, 0.2, 0.15, 0.2]), n, replacement=True, generator=generator)
    out = images.clone()
    if (rows := choice == 1).any():
        out[rows] = F.avg_pool2d(F.pad(images[rows], (1, 1, 1, 1), mode="replicate"), 3, 1)
    for code, size in ((2, 32), (3, 44)):
        if (rows := choice == code).any():
            small = F.interpolate(images[rows], size=size, mode="bilinear", antialias=True, align_corners=False)
            out[rows] = F.interpolate(small, size=64, mode="bicubic", align_corners=False)
    # A softening mixed in part keeps edges of every degree between sharp and soft.
    mix = uniform(n, 1, 1, 1)
    out = images + (out - images) * mix.sqrt()
    gain = 1 + strength * 0.08 * (uniform(n, 3, 1, 1) * 2 - 1)
    shift = strength * 0.06 * (uniform(n, 1, 1, 1) * 2 - 1)
    contrast = 1 + strength * 0.12 * (uniform(n, 1, 1, 1) * 2 - 1)
    out = ((out - 0.5) * contrast + 0.5) * gain + shift
    coarse = F.interpolate(torch.randn(n, 3, 16, 16, generator=generator), size=64, mode="bilinear")
    fine = torch.randn(n, 3, 64, 64, generator=generator)
    level = strength * 0.05 * uniform(n, 1, 1, 1) * (uniform(n, 1, 1, 1) < 0.5)
    return (out + level * (0.6 * fine + coarse)).clamp(0, 1)
