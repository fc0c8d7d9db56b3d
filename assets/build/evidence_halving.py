"""Does pruning by previews beat best-of-N at equal honest cost? Every preset of halving, measured on emoji-64.

    python assets/build/evidence_halving.py draw --minutes 25   # records the pool; resumes
    python assets/build/evidence_halving.py table               # prints the tables

``draw`` carries 16 seeds of each of 64 validation prompts through all stages, scores the preview after every one of
them, and writes one line a prompt to ``assets/results/halving-validation.jsonl``: the reward by stage and seed, the
verdicts of three judges on the finals, and the seconds by kind of work. (28 of the recorded prompts were drawn with 32
seeds and cut to the first 16; their nfe, decodes and seconds are of all 32.) No image is kept. Searches that
only select are evaluated on that pool exactly, without drawing anything again.

Honest cost counts what a search spends beyond model rows: one decode and score costs y model rows, measured in the
same run. Every search gets what best-of-N costs, ``N (one + y)`` with ``one`` the rows of one candidate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visearch.search.successive_halving import SuccessiveHalving
from visearch.statistics import Interval, expected_best, paired_interval, resample

SEEDS, PROMPTS, DRAWS = 16, 64, 20_000
BARS = (3, 4, 6)
RECORD = Path(__file__).parents[1] / "results" / "halving-validation.jsonl"
JUDGES = ("a", "b", "c")


def draw(minutes: float) -> None:
    """Record prompts until all are there or the time is up."""
    import torch

    from visearch.assets import scenes
    from visearch.budget import Ledger, MeteredReward
    from visearch.geneval import judge_images
    from visearch.pipelines import emoji
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.protocols import Request
    from visearch.rewards import resolve
    from visearch.rewards.detector import load_judge
    from visearch.rewards.images import to_pil

    lines = scenes.prompts("validation")
    recorded = {row["index"] for row in load()} if RECORD.exists() else set()
    sampler, reward = DiffusionSampler(emoji.load(), emoji.DEFAULTS), resolve("emoji-clip")
    judges, end = [load_judge(name) for name in JUDGES], time.perf_counter() + 60 * minutes
    chosen = np.linspace(0, len(lines) - 1, PROMPTS).round().astype(int)
    for index in np.random.default_rng(0).permutation(chosen).tolist():  # a part of them covers all tasks too
        if index in recorded:
            continue
        if time.perf_counter() > end:
            break
        line, request = lines[index], Request((lines[index]["prompt"],), seed=index)
        sampler.meter = ledger = Ledger()
        scorer, rewards = MeteredReward(reward, ledger), []
        with torch.no_grad():
            rows = sampler.init(request, request.seeds(0, SEEDS))
            for stage in sampler.milestones:
                rows = sampler.advance(rows, stage)
                images = sampler.decode(sampler.predict_x0(rows))
                scores = scorer(images, [line["prompt"]] * SEEDS, sampler.noise_level(stage), [None] * SEEDS)
                rewards.append([round(v, 3) for v in scores.tolist()])
        finals = to_pil(images)
        row = {
            "index": index,
            "tag": line["tag"],
            "prompt": line["prompt"],
            "rewards": rewards,
            "verdicts": {
                judge.name: [int(v.correct) for v in judge_images(judge, finals, [line] * SEEDS)] for judge in judges
            },
            "nfe": ledger.nfe,
            "decodes": ledger.decodes,
            "seconds": {kind: round(s, 3) for kind, s in ledger.seconds.items()},
        }
        with RECORD.open("a") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def load() -> list[dict[str, Any]]:
    if not RECORD.exists():
        raise SystemExit("nothing is recorded; run draw first")
    return sorted((json.loads(line) for line in RECORD.read_text().splitlines()), key=lambda row: row["index"])


def price(rows: Sequence[dict[str, Any]]) -> float:
    """Model rows that one decode and score cost: median over prompts, whose seconds were measured side by side."""

    def of(row: dict[str, Any]) -> float:
        seconds = row["seconds"]
        return (seconds["decode"] + seconds["reward"]) / row["decodes"] * row["nfe"] / seconds["denoiser"]

    return float(np.median([of(row) for row in rows]))


def value(row: dict[str, Any], search: SuccessiveHalving, draws: int = DRAWS) -> np.ndarray:
    """Mean final reward and verdicts of what a planned search picks on one prompt, over random sets of seeds."""
    if not search.calls:
        return best_of(row, search.n)
    scores, rng = np.array(row["rewards"]), np.random.default_rng(row["index"])
    alive = rng.random((draws, SEEDS)).argsort(1)[:, : search.n]
    for stage, kept in (*zip(search.calls, search.keep, strict=True), (len(scores), 1)):
        best = (-scores[stage - 1][alive]).argsort(1, kind="stable")[:, :kept]
        alive = np.take_along_axis(alive, best, 1)
    worth = np.array([scores[-1], *row["verdicts"].values()])
    return worth[:, alive[:, 0]].mean(1)


def best_of(row: dict[str, Any], n: int) -> np.ndarray:
    """The same for best-of-n, in closed form."""
    finals = row["rewards"][-1]
    return np.array([expected_best(finals, n, worth) for worth in (finals, *row["verdicts"].values())])


def worth(found: np.ndarray, curves: np.ndarray, bar: int) -> tuple[float, np.ndarray]:
    """How many times N best-of-N needs for the same mean reward, and its 95 % interval over resampled prompts.

    Args:
        found: (P,) rewards of a search, one a prompt.
        curves: (P, S) rewards of best-of-n for n = 1 to S.
        bar: N.
    """

    def of(mean: np.ndarray) -> float:
        return float(np.interp(mean[0], mean[1:], np.arange(1, len(mean)))) / bar

    both = np.column_stack([found, curves])
    draws = resample(both, np.random.default_rng(0)) / len(both)
    return of(both.mean(0)), np.quantile([of(mean) for mean in draws], (0.025, 0.975))


def show(interval: Interval, digits: int) -> str:
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def table() -> str:
    from visearch.pipelines.toy import GaussianToy

    rows = load()
    sampler, y = GaussianToy(steps=len(rows[0]["rewards"])), price(rows)  # a stage costs two model rows there too
    one = sampler.nfe(0, sampler.num_stages)
    assert all(row["nfe"] * sampler.num_stages == row["decodes"] * one for row in rows)
    judges = list(rows[0]["verdicts"])
    curves = np.array([[best_of(row, n) for n in range(1, SEEDS + 1)] for row in rows])  # prompts, n, measures
    tags = ", ".join(f"{sum(row['tag'] == t for row in rows)} {t}" for t in dict.fromkeys(row["tag"] for row in rows))
    text = [
        f"{len(rows)} validation prompts ({tags}) x {SEEDS} seeds; one decode and score costs {y:.2f} model rows, one "
        f"candidate {one}\n"
    ]
    columns = ["N", "search", "candidates @ stage", "rows", "scores", "reward", "over best of N (95 %)"]
    columns += ["worth N x (95 %)", *(f"judge {j[-1].upper()} over best of N (95 %)" for j in judges)]
    text += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    factors: dict[str, list[float]] = {}
    hacked = []
    for bar in BARS:
        base = curves[:, bar - 1]
        cells = [f"{bar}", "best-of-n", f"{bar}", f"{bar * one}", f"{bar}", f"{base[:, 0].mean():.2f}", "", "1"]
        text.append("| " + " | ".join([*cells, *(f"{v:.3f}" for v in base[:, 1:].mean(0))]) + " |")
        for preset in ("auto", "psp", "ttsnap-single", "ttsnap-multi"):
            plan = SuccessiveHalving(n=SEEDS, preset=preset, check_cost=y).plan(sampler, bar * one)
            found = np.array([value(row, plan.search) for row in rows])
            gain, *verdicts = (paired_interval(found[:, i], base[:, i]) for i in range(found.shape[1]))
            factor, spread = worth(found[:, 0], curves[:, :, 0], bar)
            factors.setdefault(preset, []).append(factor)
            steps = zip(plan.search.calls, plan.search.keep, strict=True)
            cells = ["", preset, " ".join([f"{plan.search.n}", *(f"{k}@{c}" for c, k in steps)]), f"{plan.nfe}"]
            cells += [f"{plan.rewards}", f"{found[:, 0].mean():.2f}", show(gain, 2)]
            cells += [f"{factor:.2f} [{spread[0]:.2f}, {spread[1]:.2f}]", *(show(v, 3) for v in verdicts)]
            text.append("| " + " | ".join(cells) + " |")
            falls = [j for j, v in zip(judges, verdicts, strict=True) if v.high < 0]
            hacked += [f"{preset} at N = {bar} ({', '.join(falls)})"] if gain.low > 0 and falls else []
    means = ", ".join(f"{preset} {np.exp(np.mean(np.log(f))):.2f} ({min(f):.2f})" for preset, f in factors.items())
    text.append(f"\nWorth N x, geometric mean over N = {', '.join(map(str, BARS))} (worst): {means}.")
    text.append(f"Reward up and a judge down, both beyond their intervals: {'; '.join(hacked) or 'nowhere'}.\n")

    stages = range(1, sampler.num_stages + 1, 2)
    text += ["| stage of 15 | " + " | ".join(map(str, stages)) + " |", "|---|" + "---|" * len(stages)]
    found = [np.mean([spearman(row["rewards"][s - 1], row["rewards"][-1]) for row in rows]) for s in stages]
    text.append("| Spearman of preview and final reward | " + " | ".join(f"{v:.2f}" for v in found) + " |")
    return "\n".join(text)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["draw", "table"])
    parser.add_argument("--minutes", type=float, default=25, help="draw for at most so long (default %(default)s)")
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.minutes)
    else:
        print(table())


if __name__ == "__main__":
    main()
