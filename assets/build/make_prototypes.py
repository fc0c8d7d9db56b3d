"""Measure judge C's prototypes and reference colours on sprites; writes `assets/emoji-64/judge-c/`. Nothing is trained.

    python assets/build/make_prototypes.py

Prototypes: mean ImageNet feature of a class in one training style, over crops of composed scenes, natural and tinted;
one of the scenes as they are, one of their reconstructions by the generator's autoencoder.
References: k-means centres, in CIELAB, of the pixels of all sprites of a colour at vividness 0 to 1. Needs the extra
`judge` and judge B's weights (for the calibration); about three minutes on one thread.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scene_cache import reconstruct
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torchvision.ops import box_iou

from visearch.assets import path, scenes
from visearch.rewards.detector import Features, class_similarity, load_judge, to_lab

FOLDER = Path(__file__).resolve().parents[1] / "emoji-64" / "judge-c"
SEED = 31
CROPS = 16  # of each class in each style
CENTRES = 8  # of each colour


def to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def object_crops(rng: np.random.Generator, name: str, style: str, count: int):
    """Scenes holding one object of the class, beside others in half of them: image (3, 64, 64) and box (1, 4)."""
    for i in range(count):
        clause = {"class": name, "count": 1}
        if i % 2:
            clause["color"] = str(rng.choice(scenes.COLORS))
        metadata = scenes.make_metadata("colors" if i % 2 else "single_object", [clause])
        scene = scenes.make_scene(rng, metadata, styles=(style,), distractors=(i // 2) % 3)
        box = next(item.box for item in scene.objects if item.name == name)
        yield to_tensor(scene.image), torch.tensor([box])


def prototypes(features: Features, rng: np.random.Generator, vae: Path) -> Tensor:
    """(C, 2 S, D), unit length: each style as composed and as reconstructed."""
    rows = []
    for name in scenes.CLASSES:
        for style in scenes.STYLES:
            images, boxes = zip(*object_crops(rng, name, style, CROPS), strict=True)
            for version in (torch.stack(images), reconstruct(torch.stack(images), vae)):
                crops = [features(image, box)[0] for image, box in zip(version, boxes, strict=True)]
                rows.append(torch.nn.functional.normalize(torch.stack(crops).mean(0), dim=0))
    return torch.stack(rows).unflatten(0, (len(scenes.CLASSES), 2 * len(scenes.STYLES)))


def references() -> Tensor:
    """(K, R, 3) CIELAB centres of each colour's sprite pixels."""
    centres = []
    for color in scenes.COLORS:
        pixels = []
        for style in scenes.STYLES:
            for name in scenes.CLASSES:
                sprite = np.asarray(scenes._cell(style, name, color))
                opaque = sprite[..., :3][sprite[..., 3] > 250][::7]
                pixels += [scenes.set_vividness(opaque, v) for v in (0.0, 0.5, 1.0)]
        lab = to_lab(torch.from_numpy(np.concatenate(pixels)).float() / 255).numpy()
        centres.append(KMeans(CENTRES, n_init=2, random_state=SEED).fit(lab).cluster_centers_)
    return torch.from_numpy(np.stack(centres)).float()


def calibrate(
    features: Features, means: Tensor, rng: np.random.Generator, vae: Path, count: int = 160
) -> dict[str, float]:
    """Probability that the nearest class is right, from its lead over the second.

    Measured on B's boxes in validation scenes, half of them reconstructed.
    """
    composed = [scenes.make_scene(rng, scenes.sample_metadata(rng, split="validation")) for _ in range(count)]
    images = torch.stack([to_tensor(scene.image) for scene in composed])
    images[count // 2 :] = reconstruct(images[count // 2 :], vae)
    index = {name: i for i, name in enumerate(scenes.CLASSES)}
    leads, right = [], []
    for scene, image, detections in zip(composed, images, load_judge("b").detect(images), strict=True):
        found = [box[:4] for boxes in detections.values() for box in boxes if box[4] > 0.5]
        if not found:
            continue
        boxes = torch.tensor(found)
        overlap, nearest = box_iou(boxes, torch.tensor([item.box for item in scene.objects])).max(1)
        truth = torch.tensor([index[item.name] for item in scene.objects])[nearest]
        similarity = class_similarity(features(image, boxes), means)
        best = similarity.topk(2, 1).values
        leads += (best[:, 0] - best[:, 1])[overlap > 0.5].tolist()
        right += (similarity.argmax(1) == truth)[overlap > 0.5].tolist()
    fit = LogisticRegression(C=1e6).fit(np.array(leads)[:, None], right)
    print(f"class of {len(right)} boxes right: {np.mean(right):.3f}")
    return {"slope": round(float(fit.coef_[0, 0]), 3), "bias": round(float(fit.intercept_[0]), 3)}


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    features, vae = Features(torch.device("cpu")), path("emoji-64/pipeline/vae")
    means = prototypes(features, rng, vae)
    FOLDER.mkdir(exist_ok=True)
    save_file({"prototypes": means.half(), "references": references().half()}, FOLDER / "model.safetensors")
    config = {
        "name": "c",
        "id": "emoji-64/judge-c/1",
        "architecture": "efficientnet-lite0 prototypes",
        "class_names": scenes.CLASSES,
        "color_names": scenes.COLORS,
        "calibration": calibrate(features, means, rng, vae),
        "training": {"script": "assets/build/make_prototypes.py", "seed": SEED, "styles": scenes.STYLES},
    }
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
