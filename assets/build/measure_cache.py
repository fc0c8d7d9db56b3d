"""How well do cached drafts pick seeds? Patterns of skipped steps, measured on emoji-64.

    python assets/build/measure_cache.py draw --steps 15 --minutes 6   # records; resumes
    python assets/build/measure_cache.py table                         # prints the table

``draw`` runs 8 seeds of each of 25 validation prompts once in full and once under each pattern, in bfloat16, and keeps
the guided reward of every result in ``assets/results/cache-validation.json``.

Of each pattern the table tells q, the share of model rows skipped; capture, (full score of the draft's pick - mean) /
(best - mean), sums over prompts (arXiv 2607.23159); the median over prompts of Spearman's correlation between drafts
and full runs; how often both pick the same seed; and the capture of best-of-n that costs as many model rows as the 8
drafts and one full run (between whole n by interpolation), which is what cached drafts have to beat.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from visearch.drafts import calibrate_drafts
from visearch.report import markdown_table
from visearch.statistics import best_of_curve, curve_at

SEEDS, PROMPTS = 8, 25
RECORD = Path(__file__).parents[1] / "results" / "cache-validation.json"
FIRST = 13  # prompts that see every pattern; the others those that were still open after these
PATTERNS = {
    15: (
        "warmup=0.33,every=4,order=0", "warmup=0.33,every=5,order=0", "every=2,order=0", "every=3,order=0",
    ),
    25: ("warmup=0.33,every=4,order=0", "warmup=0.33,every=5,order=0"),
}  # fmt: skip
SETTLED = {
    15: (
        "every=3,order=1", "warmup=0.33,every=4,order=1", "warmup=0.33,every=5,order=1", "every=2,order=1",
        "every=3,order=2", "every=3,warmup=3,order=1", "every=4,order=1", "warmup=0.4,every=9,order=0",
    ),
    25: (),
}  # fmt: skip


def draw(steps: int, minutes: float) -> None:
    """Record prompts until all are there or the time is up."""
    import torch

    from visearch.assets import scenes
    from visearch.budget import Ledger, MeteredReward
    from visearch.pipelines import emoji
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.protocols import Request
    from visearch.rewards import resolve

    lines, end = scenes.prompts("validation"), time.perf_counter() + 60 * minutes
    sampler = DiffusionSampler(emoji.load(dtype=torch.bfloat16), {**emoji.DEFAULTS, "num_inference_steps": steps})
    scorer, record = MeteredReward(resolve("emoji-clip"), Ledger()), load()
    chosen = np.linspace(0, len(lines) - 1, PROMPTS).round().astype(int).tolist()
    for place, index in enumerate(chosen):
        prompt = lines[index]["prompt"]
        request = Request((prompt,), seed=index)
        row = next((r for r in record if (r["index"], r["steps"]) == (index, steps)), None)
        if row is None:
            row = {"index": index, "steps": steps, "prompt": prompt, "runs": {}}
            record.append(row)
        wanted = ("", *PATTERNS[steps], *(SETTLED[steps] if place < FIRST else ()))
        for pattern in (p for p in wanted if p not in row["runs"]):
            if time.perf_counter() > end:
                return
            with torch.no_grad():
                view = sampler.view(cache=pattern) if pattern else sampler
                view.meter = ledger = Ledger()
                rows = view.advance(view.init(request, request.seeds(0, SEEDS)), steps)
                scores = scorer(view.decode(rows), [prompt] * SEEDS, sampler.noise_level(steps))
            row["runs"][pattern] = {
                "scores": [round(v, 3) for v in scores.tolist()],
                "rows": [ledger.nfe, ledger.skipped_rows],
            }
            body = ",\n".join(json.dumps(r, separators=(",", ":")) for r in record)
            RECORD.write_text(f"[\n{body}\n]\n")


def load() -> list[dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def table() -> str:
    heads = ("steps", "pattern", "prompts", "q", "capture", "best-of-n", "Spearman", "same pick")
    lines = []
    for steps, patterns in PATTERNS.items():
        for pattern in (*patterns, *SETTLED[steps]):
            rows = [row for row in load() if row["steps"] == steps and pattern in row["runs"]]
            if not rows:
                continue
            full, draft = (np.array([r["runs"][p]["scores"] for r in rows]) for p in ("", pattern))
            ran, skipped = np.sum([r["runs"][pattern]["rows"] for r in rows], 0)
            q = skipped / (ran + skipped)
            capture = calibrate_drafts({pattern: draft}, full, {pattern: q}).capture[0].mean
            equal = curve_at(best_of_curve(full), SEEDS * (1 - q) + 1).sum()
            bar = (equal - full.mean(1).sum()) / (full.max(1) - full.mean(1)).sum()
            correlation = np.median([spearmanr(a, b).statistic for a, b in zip(full, draft, strict=True)])
            same = (full.argmax(1) == draft.argmax(1)).mean()
            shares = (f"{capture:.3f}", f"{bar:.3f}", f"{correlation:.3f}", f"{same:.2f}")
            lines.append((steps, pattern, len(rows), f"{q:.2f}", *shares))
    return markdown_table(heads, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--steps", type=int, choices=PATTERNS, default=15)
    drawing.add_argument("--minutes", type=float, default=6)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.steps, options.minutes)
    else:
        print(table())
