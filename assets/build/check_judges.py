"""Measure each judge's own error: GenEval-style verdicts on composed scenes whose truth is known.

    python assets/build/check_judges.py                # judges a, b and c on 720 scenes; writes judge-*/card.json
    python assets/build/check_judges.py --reconstruct  # also through the generator's autoencoder (printed, not gated)

Validation prompts, fresh scenes, half of them wrong on purpose, all six tasks alike. Exit status 1 when judge a or b
is wrong on more than 5 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scene_cache import reconstruct
from scipy.stats import binomtest
from torch import Tensor

from visearch import geneval
from visearch.assets import path, scenes
from visearch.rewards.detector import Judge, load_judge

FOLDER = Path(__file__).resolve().parents[1] / "emoji-64"
GATE = {"a": 0.05, "b": 0.05}


@dataclass(frozen=True)
class Trial:
    """images (N, 3, 64, 64) uint8, their prompts' metadata, and whether each satisfies it."""

    images: Tensor
    metadata: list[dict]
    right: np.ndarray


def compose(count: int, seed: int, styles: Sequence[str] = scenes.STYLES) -> Trial:
    rng = np.random.default_rng(seed)
    images, metadata, right = [], [], []
    for i in range(count):
        wanted = scenes.sample_metadata(rng, scenes.TAGS[i % len(scenes.TAGS)], "validation")
        wrong = (i // len(scenes.TAGS)) % 2 == 1
        scene = (scenes.wrong_scene if wrong else scenes.make_scene)(rng, wanted, styles=styles)
        images.append(scene.image)
        metadata.append(wanted)
        right.append(scenes.satisfies(scene.objects, wanted))
    return Trial(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), metadata, np.array(right))


def verdicts(judge: Judge, trial: Trial) -> np.ndarray:
    """The judge's verdict on each image, (N,) bool."""
    found = judge.detect(trial.images)
    return np.array(
        [
            geneval.judge(metadata, detections, functools.partial(judge.classify_color, image)).correct
            for metadata, detections, image in zip(trial.metadata, found, trial.images, strict=True)
        ]
    )


def errors(verdict: np.ndarray, trial: Trial) -> dict[str, dict[str, float]]:
    """Error rate by task and overall with 95 % Wilson bounds; overall also by direction."""
    wrong = verdict != trial.right
    tags = np.array([metadata["tag"] for metadata in trial.metadata])
    groups = {tag: tags == tag for tag in scenes.TAGS}
    groups |= {"overall": np.ones_like(wrong), "right judged wrong": trial.right, "wrong judged right": ~trial.right}
    table = {}
    for name, mask in groups.items():
        interval = binomtest(int(wrong[mask].sum()), int(mask.sum())).proportion_ci(method="wilson")
        table[name] = {
            "rate": round(float(wrong[mask].mean()), 4),
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
            "n": int(mask.sum()),
        }
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judges", nargs="*", default=["a", "b", "c"])
    parser.add_argument("--scenes", type=int, default=720)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--reconstruct", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    trial = compose(args.scenes, args.seed)
    held_out = compose(args.scenes // 2, args.seed + 1, (scenes.HELD_OUT_STYLE,))
    trials = {"error": trial, "error_held_out_style": held_out}
    if args.reconstruct:
        trials["error_reconstructed"] = Trial(
            reconstruct(trial.images, path("emoji-64/pipeline/vae")), trial.metadata, trial.right
        )
    failed = []
    for name in args.judges:
        judge = load_judge(name)
        tables = {key: errors(verdicts(judge, each), each) for key, each in trials.items()}
        for key, table in tables.items():
            print(f"\njudge {name} ({judge.revision[:12]}), {key}, {len(trials[key].right)} composed scenes")
            for group, row in table.items():
                print(f"  {group:<20} {row['rate']:7.2%}  [{row['low']:.2%}, {row['high']:.2%}]  n = {row['n']}")
        card = {"id": judge.id, "sha256": judge.revision, "scenes": args.scenes, "seed": args.seed, **tables}
        (FOLDER / f"judge-{name}" / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        if tables["error"]["overall"]["rate"] > GATE.get(name, 1.0):
            failed.append(name)
    if failed:
        print(f"over the gate of 5 %: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
