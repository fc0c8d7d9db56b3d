"""GenEval's detector: Mask2Former (arXiv 2112.01527) with Swin-S on COCO, run as OpenMMLab's mmdet 2 runs it.

The image processor that transformers has for this model resizes, pads and scores otherwise, and so finds other objects;
here images go in, and objects come out, by mmdet's own steps.

Shapes: N images (H, W), resized to (h, w), padded to (h', w'); Q queries, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes

from visearch.assets.words import class_names
from visearch.rewards.colours import clip_colors
from visearch.rewards.detection import ColorNamer, Detector, Instance
from visearch.rewards.images import to_pixels
from visearch.rewards.loading import digest, locate, pretrained

__all__ = ["CHECKPOINT", "Mask2Former", "facebook", "instances_of", "mmdet_converted", "model_input"]

CHECKPOINT = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
CHECKPOINT_SHA256 = CHECKPOINT.removesuffix(".pth").rpartition("-")[2]  # how it begins: OpenMMLab names files by it
FACEBOOK = "facebook/mask2former-swin-small-coco-instance"
RECORD = "conversion.json"
FILES = ("config.json", "*.safetensors|*.bin")

SHORT, LONG, DIVISOR = 800, 1333, 32  # pixels
GREY = 128  # fills up before pixels are normalised
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MOST = 100  # pairs of query and class that are looked at


class Mask2Former:
    """A detector of GenEval's 80 classes, see :class:`visearch.rewards.detection.Detector`.

    Args:
        folder: of a transformers ``Mask2FormerForUniversalSegmentation`` whose labels are COCO's, in COCO's order.
        id, comparability: as of any detector.
        device: where it runs.

    Raises:
        ValueError: weights that do not fit, or another number of labels.
    """

    dtype = "float32"

    def __init__(self, folder: Path, id: str, comparability: str, device: Any = "cpu") -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.id, self.comparability, self.class_names = id, comparability, class_names()
        self.revision = digest(folder, FILES)
        model = pretrained(Mask2FormerForUniversalSegmentation, folder, id, torch.float32)
        if model.config.num_labels != len(self.class_names):
            raise ValueError(
                f"{id} has {model.config.num_labels} labels; give a model of COCO's {len(self.class_names)}"
            )
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], above: float = 0.0) -> list[list[Instance]]:
        """Instances of N RGB images of one size, most probable class first.

        Args:
            images: turned as their EXIF says.
            above: those that cannot score more may be left out.

        Raises:
            RuntimeError: the model gave numbers that are not finite.
        """
        pixels = torch.stack(to_pixels(images)[0]).to(self.model.device)
        inputs, resized = model_input(pixels)
        out = self.model(pixel_values=inputs)
        classes, masks = out.class_queries_logits, out.masks_queries_logits
        if not (classes.isfinite().all() and masks.isfinite().all()):
            raise RuntimeError(f"{self.id} gave numbers that are not finite; check its weights, and try --device cpu")
        sizes = (tuple(inputs.shape[-2:]), resized, tuple(pixels.shape[-2:]))
        return [instances_of(*logits, *sizes, above=above) for logits in zip(classes, masks, strict=True)]


def model_input(pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What the model takes, (N, 3, h', w') float32, and (h, w), from pixels (N, 3, H, W) uint8.

    The shorter side becomes 800 pixels, unless the longer one would exceed 1333; bilinear, without antialiasing,
    rounded to uint8 (OpenCV, by which mmdet resizes, truncates: an eighth of its values are lower by one). Grey fills
    up to multiples of 32 on the right and below.
    """
    height, width = pixels.shape[-2:]
    ratio = min(LONG / max(height, width), SHORT / min(height, width))
    height, width = int(height * ratio + 0.5), int(width * ratio + 0.5)
    values = F.interpolate(pixels.float(), (height, width), mode="bilinear", align_corners=False).round()
    values = F.pad(values, (0, -width % DIVISOR, 0, -height % DIVISOR), value=GREY)
    mean, std = (values.new_tensor(each)[:, None, None] for each in (MEAN, STD))
    return (values - mean) / std, (height, width)


def instances_of(
    classes: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    *,
    above: float = 0.0,
) -> list[Instance]:
    """The 100 most probable pairs of query and class of one image; a query may give several classes.

    An instance scores the probability of its class times the mean probability of the pixels inside its mask, and so
    never more than the former. An empty mask scores 0.

    Args:
        classes: logits (Q, C + 1), the last of "nothing".
        masks: logits (Q, h' / 4, w' / 4).
        padded, resized, original: (h', w'), (h, w) and (H, W).
        above: pairs of at most this probability are left out.
    """
    count = classes.shape[-1] - 1
    table = classes.softmax(-1)[:, :-1].flatten()
    best = table.topk(min(MOST, len(table)))
    likely = best.values > above
    probabilities, pairs = best.values[likely], best.indices[likely]
    if len(pairs) == 0:
        return []
    queries, which = (pairs // count).unique(return_inverse=True)
    logits = _at_size(masks[queries], padded, resized, original)
    inside = logits > 0
    area = inside.flatten(1).sum(1)
    certainty = (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    boxes = logits.new_zeros(len(queries), 4)
    boxes[area > 0] = masks_to_boxes(inside[area > 0]) + logits.new_tensor([0, 0, 1, 1])
    labels, scores, which = (pairs % count).tolist(), (probabilities * certainty[which]).tolist(), which.tolist()
    corners, shapes = [tuple(box) for box in boxes.tolist()], inside.cpu().numpy()
    return [Instance(labels[i], scores[i], corners[k], shapes[k]) for i, k in enumerate(which)]


def _at_size(masks: Tensor, padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Mask logits (Q, H, W): enlarged to the model's input, cut to the image in it, brought to the image's own size."""
    whole = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)
    image = whole[..., : resized[0], : resized[1]]
    return F.interpolate(image, original, mode="bilinear", align_corners=False)[0]


# --- by name --------------------------------------------------------------------------------------------------


def mmdet_converted(path: str | None, device: Any, **options: str) -> tuple[Detector, ColorNamer]:
    """The weights that GenEval was published with, as ``visearch geneval convert`` writes them.

    Raises:
        FileNotFoundError: no ``path``, or no such folder.
        ValueError: weights that do not fit, or an unknown option.
    """
    made = f"the folder that `visearch geneval convert FILE FOLDER` makes of {CHECKPOINT}"
    if path is None:
        raise FileNotFoundError(f"mmdet-converted needs weights: give --detector-path FOLDER, {made}")
    folder = locate(path, (*FILES, RECORD), needed_by="mmdet-converted", option="--detector-path", published=made)
    source = json.loads((folder / RECORD).read_text(encoding="utf-8"))["source"]["sha256"]
    comparability = "GenEval's own weights, converted: meant for comparison with published GenEval scores"
    if not source.startswith(CHECKPOINT_SHA256):
        comparability = (
            f"converted from weights of sha256 {source[:8]}..., where GenEval was published with "
            f"{CHECKPOINT_SHA256}...: not comparable with published GenEval scores"
        )
    colors = clip_colors(device, **options)
    return Mask2Former(folder, "mmdet-converted", comparability, device), colors


def facebook(path: str | None, device: Any, **options: str) -> tuple[Detector, ColorNamer]:
    """The same architecture of another training run, which needs no conversion.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: weights that do not fit, or an unknown option.
    """
    folder = locate(path or FACEBOOK, FILES, needed_by="facebook", option="--detector-path", published=FACEBOOK)
    colors = clip_colors(device, **options)
    comparability = "another training run than that of GenEval's detector: not comparable on counting"
    return Mask2Former(folder, FACEBOOK, comparability, device), colors
