"""The world emoji-64: 64 x 64 scenes of emoji sprites with captions and metadata in GenEval's wording.

Sprites come from three art styles: two to train on (``STYLES``) and one that only a held-out judge may have seen
(``HELD_OUT_STYLE``). Tasks, prompts and verdict rules are those of GenEval (arXiv 2310.11513). For ``two_object``,
``colors``, ``position`` and ``color_attr`` the prompts of the three splits are disjoint, paraphrases included ("a cow
left of a car" and "a car right of a cow" share a split), and every official GenEval prompt belongs to ``report``. For
``single_object`` and ``counting`` there are too few captions to hold some out: splits differ by scenes and seeds only.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from visearch.assets import path
from visearch.assets.words import COLORS, RELATIONS, TAGS

SIZE = 64
SPLITS = ("train", "validation", "report")
CLASSES = (
    "apple", "boat", "book", "bus", "car", "carrot", "cell phone", "chair", "clock", "computer keyboard", "cow",
    "giraffe", "handbag", "hot dog", "laptop", "orange", "pizza", "potted plant", "stop sign", "suitcase", "toilet",
    "toothbrush", "tv", "wine glass",
)  # fmt: skip
STYLES = ("noto", "fluent")
HELD_OUT_STYLE = "twemoji"

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
# Three stops per colour for the dark, the median and the light parts of a sprite, RGB in 0..255.
_RAMPS = {
    "red": ((95, 0, 8), (222, 22, 28), (255, 120, 110)),
    "orange": ((150, 62, 0), (255, 135, 0), (255, 190, 95)),
    "yellow": ((160, 125, 0), (252, 220, 18), (255, 243, 140)),
    "green": ((0, 62, 16), (24, 160, 48), (125, 222, 130)),
    "blue": ((0, 14, 105), (22, 72, 232), (120, 165, 255)),
    "purple": ((48, 0, 82), (132, 36, 190), (196, 130, 240)),
    "pink": ((190, 60, 125), (255, 135, 192), (255, 200, 226)),
    "brown": ((45, 22, 6), (118, 68, 30), (178, 126, 82)),
    "black": ((0, 0, 0), (24, 24, 26), (88, 88, 92)),
    "white": ((150, 150, 154), (240, 240, 242), (255, 255, 255)),
}
# Longest side of a sprite in pixels, by the number of sprites in the scene.
_SIDES = {1: (26, 40), 2: (20, 32), 3: (18, 27), 4: (18, 24)}


@dataclass(frozen=True)
class SceneObject:
    """One sprite; ``box`` is (x0, y0, x1, y1) in pixels, ends exclusive; ``color`` is None for natural colours."""

    name: str
    color: str | None
    box: tuple[float, float, float, float]
    style: str


@dataclass(frozen=True)
class Scene:
    """An image (64, 64, 3) uint8 with its ground truth.

    ``vividness`` in [0, 1] is the nuisance factor (saturation and contrast), independent of the caption. ``caption``
    and ``metadata`` are those that were asked for: a scene of ``wrong_scene`` does not satisfy them.
    """

    image: np.ndarray
    objects: list[SceneObject]
    vividness: float
    caption: str
    metadata: dict


# ---------------------------------------------------------------------------------------------- prompts


def make_metadata(tag: str, include: Sequence[dict]) -> dict:
    """GenEval metadata of a task: ``tag``, ``include``, ``exclude`` (counting only), ``prompt``, in that key order.

    Args:
        tag: one of ``TAGS``.
        include: clauses ``{"class", "count", ["color"], ["position": [relation, 0]]}``.

    Raises:
        ValueError: the tag is unknown.
    """
    if tag not in TAGS:
        raise ValueError(f"tag={tag!r} is not a GenEval task; use one of {', '.join(TAGS)}")
    clauses = [dict(clause) for clause in include]
    names = [f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"] for clause in clauses]
    things = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    if tag == "counting":
        name, count = clauses[0]["class"], clauses[0]["count"]
        prompt = f"{_NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"
        exclude = {"exclude": [{"class": name, "count": count + 1}]}
        return {"tag": tag, "include": clauses, **exclude, "prompt": f"a photo of {prompt}"}
    prompt = f"{things[1]} {clauses[1]['position'][0]} {things[0]}" if tag == "position" else " and ".join(things)
    return {"tag": tag, "include": clauses, "prompt": f"a photo of {prompt}"}


def prompt_key(metadata: dict) -> str:
    """A text that is equal for prompts with the same meaning: what keeps paraphrases in one split."""
    clauses = metadata["include"]
    if metadata["tag"] == "position":
        target, subject = clauses[0]["class"], clauses[1]["class"]
        relation = clauses[1]["position"][0]
        if relation in ("right of", "below"):
            target, subject, relation = subject, target, _OPPOSITE[relation]
        return f"position: {subject} {relation} {target}"
    return f"{metadata['tag']}: {sorted((c['class'], c['count'], c.get('color', '')) for c in clauses)}"


def hash_split(metadata: dict) -> str:
    """Split of a prompt that is not official: 75 % train, 10 % validation, 15 % report, by a hash of its meaning."""
    bucket = int.from_bytes(hashlib.sha256(prompt_key(metadata).encode()).digest()[:4], "big") % 100
    return "train" if bucket < 75 else "validation" if bucket < 85 else "report"


@cache
def _official_keys() -> frozenset[str]:
    return frozenset(prompt_key(row) for row in prompts("report") if row["official"])


def split_of(metadata: dict) -> str | None:
    """The only split a prompt may be used in, or None for ``single_object`` and ``counting`` (in every split)."""
    if metadata["tag"] in ("single_object", "counting"):
        return None
    return "report" if prompt_key(metadata) in _official_keys() else hash_split(metadata)


def prompts(split: str) -> list[dict]:
    """The shipped GenEval metadata of a split, each with ``official``: whether GenEval's own file has it.

    Raises:
        ValueError: the split is not "validation" or "report"; for training prompts use ``sample_metadata``.
    """
    if split not in ("validation", "report"):
        raise ValueError(f"split={split!r} has no prompt file; use 'validation' or 'report' (or sample_metadata)")
    return [json.loads(line) for line in path(f"emoji-64/prompts/{split}.jsonl").read_text().splitlines()]


def draw_metadata(rng: np.random.Generator, tag: str) -> dict:
    """GenEval metadata of one task, uniform over classes, colours, counts 2-4 and relations, from any split."""
    first, second = (str(name) for name in rng.choice(CLASSES, 2, replace=False))
    colors = [str(color) for color in rng.choice(COLORS, 2, replace=False)]
    if tag == "counting":
        include = [{"class": first, "count": int(rng.integers(2, 5))}]
    elif tag == "single_object":
        include = [{"class": first, "count": 1}]
    elif tag == "colors":
        include = [{"class": first, "count": 1, "color": colors[0]}]
    else:
        include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
        if tag == "color_attr":
            include = [{**clause, "color": color} for clause, color in zip(include, colors, strict=True)]
        elif tag == "position":
            include[1]["position"] = [str(rng.choice(RELATIONS)), 0]
    return make_metadata(tag, include)


def sample_metadata(rng: np.random.Generator, tag: str | None = None, split: str = "train") -> dict:
    """Random GenEval metadata whose prompt may be used in ``split``; ``tag=None`` draws the task uniformly.

    Raises:
        ValueError: the tag or the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    tag = str(rng.choice(TAGS)) if tag is None else tag
    while True:
        metadata = draw_metadata(rng, tag)
        if split_of(metadata) in (None, split):
            return metadata


def wrong_metadata(rng: np.random.Generator, metadata: dict) -> dict:
    """Metadata of the same task, one step away: a class, colour or relation changed, colours swapped, count off by one.

    A scene made for the result never satisfies ``metadata``, and the other way round. Its split is not controlled.
    """
    tag, include = metadata["tag"], [dict(clause) for clause in metadata["include"]]
    used = {clause["class"] for clause in include}
    used_colors = {clause.get("color") for clause in include}
    which = include[int(rng.integers(len(include)))]

    def swap_class():
        which["class"] = str(rng.choice([name for name in CLASSES if name not in used]))

    def change_color():
        which["color"] = str(rng.choice([color for color in COLORS if color not in used_colors]))

    def swap_colors():
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]

    def change_count():
        count = include[0]["count"]
        include[0]["count"] = int(rng.choice([n for n in (count - 1, count + 1) if n in _NUMBERS]))

    def mirror():
        relation = include[1]["position"][0]
        include[1]["position"] = [_OPPOSITE[relation], 0]

    def turn():
        relation = include[1]["position"][0]
        others = [r for r in RELATIONS if r not in (relation, _OPPOSITE[relation])]
        include[1]["position"] = [str(rng.choice(others)), 0]

    changes = {
        "single_object": [swap_class],
        "two_object": [swap_class],
        "counting": [change_count, change_count, swap_class],
        "colors": [change_color, change_color, swap_class],
        "position": [mirror, mirror, turn, swap_class],
        "color_attr": [swap_colors, swap_colors, change_color, swap_class],
    }[tag]
    changes[int(rng.integers(len(changes)))]()
    return make_metadata(tag, include)


# ---------------------------------------------------------------------------------------------- verdicts


def relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """Relations of one box (x0, y0, x1, y1) to another under GenEval's rule (arXiv 2310.11513, evaluate_images.py)."""
    dx, dy = _direction(box, target)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, held in holds.items() if held}


def _direction(box: Sequence[float], target: Sequence[float]) -> tuple[float, float]:
    offsets, revised = [], []
    for axis in (0, 1):
        offset = (box[axis] + box[axis + 2] - target[axis] - target[axis + 2]) / 2
        extent = box[axis + 2] - box[axis] + target[axis + 2] - target[axis]
        offsets.append(offset)
        revised.append(np.sign(offset) * max(abs(offset) - 0.1 * extent, 0.0))
    norm = float(np.hypot(*offsets))
    if max(abs(revised[0]), abs(revised[1])) < 1e-3:
        return 0.0, 0.0
    return revised[0] / norm, revised[1] / norm


def satisfies(scene_objects: Sequence[SceneObject], metadata: dict) -> bool:
    """GenEval's verdict on ground-truth objects.

    Without detector scores there is no "top n" of a class: a colour clause needs ``count`` objects of that colour, a
    position clause must hold between all objects of both classes. An object in natural colours has no colour.
    """
    groups = []
    for clause in metadata["include"]:
        found = [item for item in scene_objects if item.name == clause["class"]]
        if "color" in clause:
            found = [item for item in found if item.color == clause["color"]]
        if len(found) < clause["count"]:
            return False
        if "position" in clause:
            relation, group = clause["position"]
            if not all(relation in relations(item.box, target.box) for item in found for target in groups[group]):
                return False
        groups.append(found)
    return all(
        sum(item.name == clause["class"] for item in scene_objects) < clause["count"]
        for clause in metadata.get("exclude", [])
    )


# ---------------------------------------------------------------------------------------------- pixels


@cache
def _atlas() -> tuple[Image.Image, dict]:
    index = json.loads(path("emoji-64/atlas.json").read_text())
    return Image.open(path("emoji-64/atlas.png")).convert("RGBA"), index


@lru_cache(maxsize=4096)
def _cell(style: str, name: str, color: str | None) -> Image.Image:
    """A sprite of the atlas, trimmed to its opaque pixels, tinted."""
    atlas, index = _atlas()
    if style not in index["rows"]:
        raise ValueError(f"style={style!r} is not in the atlas; use one of {', '.join(index['rows'])}")
    if name not in index["columns"]:
        raise ValueError(f"name={name!r} is not in the atlas; use one of {', '.join(CLASSES)}")
    cell, x, y = index["cell"], index["columns"].index(name), index["rows"].index(style)
    sprite = atlas.crop((cell * x, cell * y, cell * (x + 1), cell * (y + 1)))
    sprite = sprite.crop(sprite.getchannel("A").getbbox())
    return sprite if color is None else tint(sprite, color)


def tint(sprite: Image.Image, color: str) -> Image.Image:
    """Recolour an RGBA sprite, keeping its luminance pattern: its dark, median and light parts follow one colour ramp.

    Raises:
        ValueError: the colour is not one of ``COLORS``.
    """
    if color not in _RAMPS:
        raise ValueError(f"color={color!r} is unknown; use one of {', '.join(COLORS)}")
    pixels = np.asarray(sprite).astype(np.float32)
    luminance = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    dark, median, light = np.quantile(luminance[pixels[..., 3] > 128], (0.05, 0.5, 0.95))
    # flat sprites have nearly equal quantiles: the ramp then keeps a minimum width, so that noise is not stretched
    stops = (min(dark, median - 40), median, max(light, median + 40))
    for channel, values in enumerate(zip(*_RAMPS[color], strict=True)):
        pixels[..., channel] = np.interp(luminance, stops, values)
    return Image.fromarray(pixels.round().astype(np.uint8))


@lru_cache(maxsize=32768)
def _sprite(style: str, name: str, color: str | None, side: int) -> Image.Image:
    cell = _cell(style, name, color)
    scale = side / max(cell.size)
    size = tuple(max(1, round(length * scale)) for length in cell.size)
    return cell.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")


@lru_cache(maxsize=4096)
def _mean_color(style: str, name: str, color: str | None) -> np.ndarray:
    pixels = np.asarray(_cell(style, name, color)).reshape(-1, 4).astype(np.float32)
    return np.average(pixels[:, :3], axis=0, weights=pixels[:, 3])


def _background(rng: np.random.Generator, avoid: list[np.ndarray]) -> np.ndarray:
    """Float32 (64, 64, 3) in 0..255: plain, gradient, stripes, checks or noise, away from the colours to avoid."""

    def draw() -> np.ndarray:
        grey = rng.uniform(70, 235)
        return np.clip(grey + rng.uniform(-65, 65, 3), 30, 245)

    base = max((draw() for _ in range(6)), key=lambda c: min(80.0, *(float(np.linalg.norm(c - a)) for a in avoid)))
    field = np.empty((SIZE, SIZE, 3), np.float32)
    field[:] = base
    kind = rng.choice(5, p=(0.4, 0.2, 0.15, 0.15, 0.1))
    if kind == 0:
        return field
    if kind == 4:
        coarse = rng.normal(0, 9, (SIZE // 4, SIZE // 4, 1)).astype(np.float32)
        return field + coarse.repeat(4, 0).repeat(4, 1)
    ramp = np.arange(SIZE, dtype=np.float32)
    shift = rng.uniform(-28, 28, 3).astype(np.float32)
    if kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        pattern = (np.cos(angle) * ramp[None] + np.sin(angle) * ramp[:, None]) / SIZE
    else:
        period = int(rng.choice((8, 16)))
        x, y = (ramp // period) % 2, (ramp[:, None] // period) % 2
        pattern = np.abs(x - y) if kind == 3 else np.broadcast_to(x if rng.random() < 0.5 else y, (SIZE, SIZE))
    return field + pattern[..., None] * shift


def _overlaps(box: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the intersection covers more than 8 % of the smaller box."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return False
    return width * height > 0.08 * min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))


def _clearly(relation: str, box: Sequence[float], target: Sequence[float]) -> bool:
    """The relation holds with a margin and is the only one."""
    dx, dy = _direction(box, target)
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return (along if relation in ("right of", "below") else -along) > 0.6 and abs(across) < 0.45


_Item = tuple[str, str | None]


def _compose(
    rng: np.random.Generator,
    items: list[_Item],
    relation: str | None,
    metadata: dict,
    styles: Sequence[str],
) -> Scene:
    """Place the sprites without crowding; ``relation`` is that of items[1] to items[0]."""
    shared = str(rng.choice(styles)) if rng.random() < 0.5 else None
    looks = [(shared or str(rng.choice(styles)), name, color) for name, color in items]
    low, high = _SIDES.get(len(items), (14, 19))
    shrink = 1.0
    while True:
        sprites = [_sprite(*look, round(shrink * int(rng.integers(low, high + 1)))) for look in looks]
        boxes: list[tuple[float, float, float, float]] = []
        for sprite in sprites:
            for _ in range(20):
                x = int(rng.integers(1, SIZE - sprite.width))
                y = int(rng.integers(1, SIZE - sprite.height))
                box = (float(x), float(y), float(x + sprite.width), float(y + sprite.height))
                related = relation is None or len(boxes) != 1 or _clearly(relation, box, boxes[0])
                if related and not any(_overlaps(box, other) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(sprites):
            break
        shrink = max(0.75, 0.99 * shrink)
    image = Image.fromarray(np.clip(_background(rng, [_mean_color(*look) for look in looks]), 0, 255).astype(np.uint8))
    for sprite, box in zip(sprites, boxes, strict=True):
        image.paste(sprite, (int(box[0]), int(box[1])), sprite)
    vividness = float(rng.random())
    objects = [SceneObject(n, c, box, s) for (s, n, c), box in zip(looks, boxes, strict=True)]
    return Scene(set_vividness(np.asarray(image), vividness), objects, vividness, metadata["prompt"], metadata)


def set_vividness(image: np.ndarray, vividness: float) -> np.ndarray:
    """Scale saturation (0.6 to 1.2) and contrast (0.7 to 1.05) of a uint8 image (..., 3) by ``vividness`` in [0, 1]."""
    saturation, contrast = 0.6 + 0.6 * vividness, 0.7 + 0.35 * vividness
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    matrix = contrast * (saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * luma[:, None])
    out = image.astype(np.float32) @ matrix.astype(np.float32) + (1 - contrast) * 128
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


def _items(metadata: dict) -> tuple[list[_Item], str | None]:
    items, relation = [], None
    for clause in metadata["include"]:
        items += [(clause["class"], clause.get("color"))] * clause["count"]
        relation = clause["position"][0] if "position" in clause else relation
    return items, relation


def make_scene(rng: np.random.Generator, metadata: dict, styles: Sequence[str] = STYLES, distractors: int = 0) -> Scene:
    """A scene that satisfies the metadata, with exactly the objects named (counts are exact), in random places.

    Args:
        rng: the only source of randomness.
        metadata: as ``sample_metadata`` gives it; a position holds with a margin and is the only relation.
        styles: art styles to draw from.
        distractors: number of further objects, of classes that the metadata does not name, in natural colours.

    Raises:
        ValueError: more than 8 objects in all, which 64 x 64 pixels do not hold apart; or an unknown style or class.
    """
    items, relation = _items(metadata)
    room = 8 - len(items)
    if not 0 <= distractors <= room:
        raise ValueError(f"distractors={distractors} beside {len(items)} named objects; use 0 to {room}")
    if distractors:
        named = {name for name, _ in items}
        others = [name for name in CLASSES if name not in named]
        items = items + [(str(name), None) for name in rng.choice(others, distractors)]
    return _compose(rng, items, relation, metadata, styles)


def wrong_scene(rng: np.random.Generator, metadata: dict, styles: Sequence[str] = STYLES) -> Scene:
    """A scene close to the metadata that does not satisfy it.

    Either a scene of ``wrong_metadata`` or, where several objects are asked for, one with an object missing, replaced
    or (counting) one too many.
    """
    items, relation = _items(metadata)
    spare = [name for name in CLASSES if name not in {name for name, _ in items}]
    which = int(rng.integers(len(items)))
    choice = rng.random()
    if metadata["tag"] == "counting" and choice < 0.25:
        items.append(items[0])
    elif len(items) > 1 and choice < 0.5:
        if choice < 0.25 or metadata["tag"] == "counting":
            del items[which]
        else:
            items[which] = items[1 - which] if rng.random() < 0.5 else (str(rng.choice(spare)), None)
        relation = relation if len(items) == 2 else None
    else:
        items, relation = _items(wrong_metadata(rng, metadata))
    return _compose(rng, items, relation, metadata, styles)
