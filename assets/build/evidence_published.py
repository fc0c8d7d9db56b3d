"""Schedules on published rewards of large models: what `visearch calibrate` finds where the field has recorded.

    git clone https://github.com/TerrysLearning/TTSnap CHECKOUT
    python assets/build/evidence_published.py --ttsnap CHECKOUT     # assets/results/published-rewards.json
    python assets/build/evidence_published.py                       # its table again

The repository of TTSnap (arXiv 2511.22242) holds rewards of the previews after each of 20 steps, 200 prompts x 200
seeds, by plain rewards (``base``) and by those trained on noisy previews (``naft``, up to step 12 or 15; later ones are
taken from the plain one, and so are finals). It carries no licence, so only what is computed from it is kept here. The
first 64 seeds are used; schedules are tuned on even prompts, everything is reported on the odd ones, at the honest cost
of best-of-N. A decode and score is priced at half a step (there, 1.2 of 9.9 TFLOPs for the score, decoding is free).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import yaml

from visearch.calibrate import calibrate
from visearch.pool import Pool
from visearch.report import markdown_table, write_json
from visearch.statistics import Interval

OUT = Path(__file__).parents[1] / "results" / "published-rewards.json"
MODELS, REWARDS, KINDS = ("flux", "sdxl"), {"imr": "ImageReward", "hps": "HPS", "pic": "PickScore"}, ("base", "naft")
SEEDS, STEPS, PRICE, BUDGETS, RISK = 64, 20, 0.5, (4, 8, 16), 0.1


def read(folder: Path) -> dict[int, np.ndarray]:
    """Step -> (prompts, seeds)."""
    found = {}
    for path in sorted(folder.glob("p200_i200_s*.yaml")):
        by_prompt = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
        found[int(path.stem[-2:])] = np.array([by_prompt[p] for p in sorted(by_prompt)])[:, :SEEDS]
    return found


def measure(checkout: Path, model: str, reward: str, kind: str) -> list[dict]:
    values = checkout / "simulation" / "values"
    steps = read(values / f"{model}_{reward}_val_base")
    if kind != "base":
        steps |= read(values / f"{model}_{reward}_val_{kind}")
    pool = Pool.from_arrays(np.stack([steps[s] for s in range(STEPS)], axis=2), price=PRICE)
    found = calibrate(pool, budgets=BUDGETS, risk=RISK)
    facts = {"model": model, "reward": REWARDS[reward], "kind": kind}
    schedules = [{"name": e.name, "budget": e.budget, "search": e.search, "worth": e.multiplier} for e in found.entries]
    margins = [
        {"name": "conformal", "budget": c.entry.budget, "search": c.entry.search, "worth": c.entry.multiplier}
        for c in found.conformal
        if c.entry.search.startswith("conformal")
    ]
    return [{**facts, **row, "worth": row["worth"].to_dict()} for row in (*schedules, *margins)]


def table(rows: list[dict], budget: int) -> str:
    names = [n for n in dict.fromkeys(r["name"] for r in rows) if n != "best-of-n"]
    found = {(r["model"], r["reward"], r["kind"], r["name"]): r for r in rows if r["budget"] == budget}
    lines = []
    for model, reward, kind in dict.fromkeys(key[:3] for key in found):
        cells = [found.get((model, reward, kind, name)) for name in names]
        shown = [f"{Interval(**cell['worth']):.2f}" if cell else "" for cell in cells]
        lines.append([model, reward, {"base": "plain", "naft": "trained on previews"}[kind], *shown])
    return markdown_table(["model", "reward", "previews scored by", *names], lines)


def means(rows: list[dict], budget: int) -> str:
    """Geometric mean over models and rewards, and the worst and best of them."""
    worth: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["budget"] == budget and row["name"] != "best-of-n":
            worth.setdefault(row["name"], {}).setdefault(row["kind"], []).append(row["worth"]["mean"])
    shown = [
        [name, *(f"{geometric_mean(of[kind]):.2f} ({min(of[kind]):.2f} to {max(of[kind]):.2f})" for kind in KINDS)]
        for name, of in worth.items()
    ]
    return markdown_table(["schedule", "plain", "trained on previews"], shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ttsnap", type=Path, metavar="CHECKOUT", help="measure, from TTSnap's repository")
    options = parser.parse_args()
    if options.ttsnap is not None:
        sets = [(options.ttsnap, model, reward, kind) for model in MODELS for reward in REWARDS for kind in KINDS]
        rows = [row for one in sets for row in measure(*one)]
        write_json(OUT, {"seeds": SEEDS, "price": PRICE, "risk": RISK, "rows": rows})
    rows = json.loads(OUT.read_text())["rows"]
    for budget in BUDGETS:
        print(f"N = {budget}: worth N times (95 %)\n\n{table(rows, budget)}\n\n{means(rows, budget)}\n")


if __name__ == "__main__":
    main()
