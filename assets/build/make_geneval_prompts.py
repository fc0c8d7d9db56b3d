"""Rebuild GenEval's prompt file and class names (arXiv 2310.11513) and check both against the published hashes.

    python assets/build/make_geneval_prompts.py [FOLDER]

FOLDER defaults to ``assets/geneval``. The drawing order follows the benchmark's published prompt set: one numpy
generator with seed 43 serves the six tasks in turn, and exact duplicates are dropped afterwards.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
NAMES_SHA256 = "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd"

# COCO's 80 classes in label order; GenEval renames mouse, remote and keyboard.
COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
NAMES = COCO.split(", ")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def draw(seed: int = 43) -> list[dict]:
    """The prompts in drawing order, duplicates included. Colours never fall on class 0, "person"."""
    rng = np.random.default_rng(seed)

    def pick(size: int, number: int, offset: int = 0) -> list[str]:
        return [NAMES[i + offset] for i in rng.choice(size, size=number, replace=False)]

    lines = [
        {
            "tag": "single_object",
            "include": [{"class": name, "count": 1}],
            "prompt": f"a photo of {with_article(name)}",
        }
        for name in pick(80, 80)
    ]
    for _ in range(100):
        a, b = pick(80, 2)
        lines.append(
            {
                "tag": "two_object",
                "include": [{"class": a, "count": 1}, {"class": b, "count": 1}],
                "prompt": f"a photo of {with_article(a)} and {with_article(b)}",
            }
        )
    for _ in range(100):
        name = NAMES[rng.choice(80)]
        count = int(rng.integers(2, 4, endpoint=True))
        lines.append(
            {
                "tag": "counting",
                "include": [{"class": name, "count": count}],
                "exclude": [{"class": name, "count": count + 1}],
                "prompt": f"a photo of {NUMBERS[count]} {plural(name)}",
            }
        )
    for _ in range(100):
        name = NAMES[rng.choice(79) + 1]
        color = COLORS[rng.choice(10)]
        lines.append(
            {
                "tag": "colors",
                "include": [{"class": name, "count": 1, "color": color}],
                "prompt": f"a photo of {with_article(f'{color} {name}')}",
            }
        )
    for _ in range(100):
        a, b = pick(80, 2)
        relation = RELATIONS[rng.choice(4)]
        lines.append(
            {
                "tag": "position",
                "include": [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
                "prompt": f"a photo of {with_article(a)} {relation} {with_article(b)}",
            }
        )
    for _ in range(100):
        a, b = pick(79, 2, offset=1)
        color_a, color_b = (COLORS[i] for i in rng.choice(10, size=2, replace=False))
        lines.append(
            {
                "tag": "color_attr",
                "include": [
                    {"class": a, "count": 1, "color": color_a},
                    {"class": b, "count": 1, "color": color_b},
                ],
                "prompt": f"a photo of {with_article(f'{color_a} {a}')} and {with_article(f'{color_b} {b}')}",
            }
        )
    return lines


def main(folder: Path) -> None:
    """Write both files into ``folder``.

    Raises:
        RuntimeError: this numpy draws other numbers than the published file was made with.
    """
    unique = dict.fromkeys(json.dumps(line) for line in draw())
    files = {
        "evaluation_metadata.jsonl": ("".join(f"{line}\n" for line in unique), METADATA_SHA256),
        "object_names.txt": ("".join(f"{name}\n" for name in NAMES), NAMES_SHA256),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (text, expected) in files.items():
        found = hashlib.sha256(text.encode()).hexdigest()
        if found != expected:
            raise RuntimeError(f"{name}: sha256 {found}, expected {expected}; use a numpy with the published streams")
        (folder / name).write_bytes(text.encode())
        print(f"{folder / name}: {text.count(chr(10))} lines, sha256 {found}")


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "geneval"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
