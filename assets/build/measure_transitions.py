"""Which stochastic step should particles take? Measured on a target whose spread is known, and on emoji-64.

    python assets/build/measure_transitions.py mixture   # seconds
    python assets/build/measure_transitions.py copies    # seconds
    python assets/build/measure_transitions.py model     # 3 CPU minutes
    python assets/build/measure_transitions.py table     # prints what is recorded

``mixture``: an equal mixture of two Gaussians at -1 and 1 with standard deviation 0.3, on a uniform flow grid, with the
exact x0 estimate: the only errors are those of the steps. ``copies``: how far copies diverge there. ``model``: plain
samples of validation prompts, no search, the same seeds under every transition, in bfloat16; verdicts of judge A and
the CLIP reward. All write to ``assets/results/transitions.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visearch.pipelines.flow import Level, transit
from visearch.protocols import transition
from visearch.report import markdown_table
from visearch.statistics import paired_interval

FORMS = ("ode", "sde:0.7", "eta:0.5", "eta:1", "ddpm", "renoise")
STEPS, EVENTS = (4, 8, 10, 15, 25, 28), (0.3, 0.5, 0.7)
MODES, SPREAD, SAMPLES = (-1.0, 1.0), 0.3, 200_000
PROMPTS, SEEDS, BATCH = 24, 4, 6
RECORD = Path(__file__).parents[1] / "results" / "transitions.json"


def estimate(x: Tensor, level: Level) -> Tensor:
    """``E[x0 | x]`` of the mixture; x: (N,)."""
    modes = torch.tensor(MODES, dtype=x.dtype)
    variance = level.alpha**2 * SPREAD**2 + level.sigma**2
    away = x[:, None] - level.alpha * modes
    share = (-away.square() / (2 * variance)).softmax(1)
    return (share * (modes + level.alpha * SPREAD**2 / variance * away)).sum(1)


def sample(form: str, steps: int, samples: int = SAMPLES, fork: int | None = None) -> Tensor:
    """(N,) the mixture's samples, float64, with a uniform flow grid of ``steps``.

    The first half are copies of the second up to the stage ``fork``, if given, and draw their own noise from there.
    """
    generator = torch.Generator().manual_seed(0)
    levels = [Level(i / steps, 1 - i / steps) for i in range(steps + 1)]
    x = torch.randn(samples, generator=generator, dtype=torch.float64)
    for stage, (now, after) in enumerate(pairwise(levels)):
        if stage == fork:
            x = x[samples // 2 :].repeat(2)
        noise = torch.randn(samples, generator=generator, dtype=torch.float64)
        x = transit(transition(form), x, estimate(x, now), noise, now, after, stage)
    return x


def divergence(form: str, steps: int, share: float) -> float:
    """How far copies made after that share of the steps end apart, in units of unrelated samples."""
    a, b = sample(form, steps, fork=round(share * steps)).chunk(2)
    return float((a - b).square().mean().sqrt() / (math.sqrt(2) * a.std()))


def errors(x: Tensor) -> dict[str, float]:
    """Spread within the modes (0.3 is right) and the Wasserstein-1 distance from exact samples."""
    generator = torch.Generator().manual_seed(1)
    side = torch.tensor(MODES, dtype=x.dtype)[torch.randint(2, (len(x),), generator=generator)]
    exact = side + SPREAD * torch.randn(len(x), generator=generator, dtype=x.dtype)
    spread = (x - x.sign()).square().mean().sqrt()
    return {"spread": float(spread), "distance": float((x.sort().values - exact.sort().values).abs().mean())}


def copies() -> dict[str, Any]:
    forms = [form for form in FORMS if form != "ode"]
    return {form: {str(n): [round(divergence(form, n, s), 3) for s in EVENTS] for n in (15, 28)} for form in forms}


def mixture() -> dict[str, Any]:
    return {
        form: {str(n): {k: round(v, 4) for k, v in errors(sample(form, n)).items()} for n in STEPS} for form in FORMS
    }


def model() -> dict[str, Any]:
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
    lines = [lines[i] for i in np.linspace(0, len(lines) - 1, PROMPTS).round().astype(int)]
    sampler, judge = DiffusionSampler(emoji.load(dtype=torch.bfloat16), emoji.DEFAULTS), load_judge("a")
    scorer, made = MeteredReward(resolve("emoji-clip"), Ledger()), {}
    for form in FORMS:
        rewards, verdicts, begin = [], [], time.process_time()
        for start in range(0, PROMPTS, BATCH):
            part = lines[start : start + BATCH]
            request = Request(tuple(line["prompt"] for line in part), seed=start)
            view = sampler.view(transition=transition(form))
            with torch.no_grad():
                rows = view.advance(view.init(request, request.seeds(0, SEEDS)), view.num_stages)
                images = view.decode(rows).float()
            rewards += scorer(images, [request.prompts[p] for p in rows.prompt.tolist()]).tolist()
            judged = judge_images(judge, to_pil(images), [part[p] for p in rows.prompt.tolist()])
            verdicts += [int(v.correct) for v in judged]
        made[form] = {
            "reward": [round(v, 3) for v in rewards],
            "judge-a": verdicts,
            "cpu_seconds": round(time.process_time() - begin, 1),
        }
        print(form, f"{made[form]['cpu_seconds']} s", flush=True)
    return {"prompts": [line["prompt"] for line in lines], "seeds": SEEDS, "steps": sampler.num_stages, "forms": made}


def table(recorded: dict[str, Any]) -> str:
    mixed, text = recorded["mixture"], []
    for title, key, digits in (
        ("spread within a mode (0.300)", "spread", 3),
        ("distance from the target", "distance", 4),
    ):
        lines = [(form, *(f"{row[str(n)][key]:.{digits}f}" for n in STEPS)) for form, row in mixed.items()]
        text.append(markdown_table([title, *(f"{n} steps" for n in STEPS)], lines))
    lines = [
        (f"{form}, {n}", *(f"{v:.2f}" for v in found))
        for form, row in recorded.get("copies", {}).items()
        for n, found in row.items()
    ]
    text.append(markdown_table(["how far copies diverge, steps", *(f"made at {s:.0%}" for s in EVENTS)], lines))
    return "\n\n".join([*text, *([model_table(recorded["model"])] if "model" in recorded else [])])


def model_table(found: dict[str, Any]) -> str:
    clusters = [p for p in found["prompts"] for _ in range(found["seeds"])]
    lines = []
    for form, row in found["forms"].items():
        cells = [form]
        for key, spec in (("reward", ".2f"), ("judge-a", ".3f")):
            gain = paired_interval(row[key], found["forms"]["ode"][key], clusters)
            cells += [f"{np.mean(row[key]):{spec}}", "" if form == "ode" else f"{gain:+{spec}}"]
        lines.append(cells)
    heads = ("transition", "CLIP reward", "over ode (95 %)", "judge A", "over ode (95 %)")
    size = f"{len(found['prompts'])} validation prompts x {found['seeds']} seeds, {found['steps']} steps"
    return f"emoji-64, {size}\n\n{markdown_table(heads, lines)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["mixture", "copies", "model", "table"])
    command = parser.parse_args().command
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if command != "table":
        recorded[command] = {"mixture": mixture, "copies": copies, "model": model}[command]()
        RECORD.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")
    print(table(recorded))


if __name__ == "__main__":
    main()
