"""What do sets that are chosen to be diverse gain and cost? Measured on emoji-64, at equal cost.

    python assets/build/measure_diversity.py draw     # 24 validation prompts x 16 seeds in bfloat16; minutes on a CPU
    python assets/build/measure_diversity.py table    # prints the tables from assets/results/diversity-validation.json

Four of sixteen finished images are chosen by every method of set selection, and the sixteen are pruned to four by two
checks of halving, by score alone and by coverage, in the same number of model rows. Sets are chosen by features of the
CLIP that guides; distances are told in those and in thumbnails, which chose nothing. Modes of a prompt are clusters of
its sixteen finals, as ``coverage`` finds them, in thumbnails. Verdicts are of judges that no search sees.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visearch.report import markdown_table
from visearch.statistics import mean_interval, paired_interval

PROMPTS, SEEDS, CHOSEN = 24, 16, 4
RECORD = Path(__file__).parents[1] / "results" / "diversity-validation.json"
JUDGES = ("a", "b", "c")
METHODS = {
    "exhaustive": ("exhaustive", 1.0),
    "greedy": ("greedy", 1.0),
    "exhaustive, weight .3": ("exhaustive", 0.3),
    "dpp": ("dpp", 1.0),
    "dpp, weight .3": ("dpp", 0.3),
    "k-means": ("k-means", 1.0),
    "coverage": ("coverage", 1.0),
}
RULES = (None, "coverage", "dpp", "greedy")


def draw() -> None:
    """Draw the images and write what each choice of four is worth, prompt by prompt."""
    import torch

    from visearch.assets import scenes
    from visearch.budget import Ledger
    from visearch.pipelines import emoji
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.rewards import resolve
    from visearch.rewards.detector import load_judge
    from visearch.search.successive_halving import SuccessiveHalving

    lines, begin = scenes.prompts("validation"), time.perf_counter()
    sampler, reward = DiffusionSampler(emoji.load(dtype=torch.bfloat16), emoji.DEFAULTS), resolve("emoji-clip")
    judges = [load_judge(name) for name in JUDGES]
    plans = {rule: SuccessiveHalving(n=SEEDS, rule=rule, check_cost=0.0).plan(sampler) for rule in RULES}
    stages = (*plans[None].search.calls, sampler.num_stages)
    rows: list[dict[str, Any]] = []
    sampler.meter = ledger = Ledger()
    for index in np.linspace(0, len(lines) - 1, PROMPTS).round().astype(int).tolist():
        with torch.no_grad():
            seen = draw_prompt(sampler, reward, judges, stages, lines[index], index, ledger)
        chosen = {
            "first 4": list(range(CHOSEN)),
            "best 4": seen.best(),
            **{name: seen.chosen(*method) for name, method in METHODS.items()},
        }
        pruned = {rule or "by score": seen.pruned(plan.search) for rule, plan in plans.items()}
        rows.append(
            {
                "index": index,
                "tag": lines[index]["tag"],
                "modes": int(seen.modes.max()) + 1,
                "chosen": {name: seen.worth(own) for name, own in chosen.items()},
                "pruned": {name: seen.worth(own) for name, own in pruned.items()},
            }
        )
    content = {
        "setting": {"prompts": PROMPTS, "seeds": SEEDS, "chosen": CHOSEN, "dtype": "bfloat16", "stages": stages},
        "halving": {str(rule): {"keep": p.search.keep, "nfe": p.nfe, "scores": p.rewards} for rule, p in plans.items()},
        "ledger": {k: v for k, v in ledger.as_dict().items() if k in ("nfe", "decodes", "rewards", "seconds")},
        "minutes": round((time.perf_counter() - begin) / 60, 2),
        "prompts": rows,
    }
    RECORD.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def draw_prompt(
    sampler: Any,
    reward: Any,
    judges: Sequence[Any],
    stages: Sequence[int],
    line: dict[str, Any],
    seed: int,
    ledger: Any,
) -> Prompt:
    """Candidates of one prompt, scored and described at the stages, judged at the end."""
    from visearch.budget import MeteredFeatures, MeteredReward
    from visearch.geneval import judge_images
    from visearch.protocols import Request
    from visearch.rewards.features import thumbnails
    from visearch.rewards.images import to_pil

    request = Request((line["prompt"],), seed=seed)
    scorer, describe = MeteredReward(reward, ledger), MeteredFeatures(reward.image_features, ledger)
    population, scores, features = sampler.init(request, request.seeds(0, SEEDS)), {}, {}
    for stage in stages:
        population = sampler.advance(population, stage)
        images = sampler.decode(sampler.predict_x0(population))
        scores[stage] = scorer(images, [line["prompt"]] * SEEDS, sampler.noise_level(stage))
        features[stage] = describe(images)
    finals = to_pil(images)
    verdicts = [[v.correct for v in judge_images(j, finals, [line] * SEEDS)] for j in judges]
    return Prompt(scores, features, thumbnails(images), np.array(verdicts, float))


class Prompt:
    """Sixteen candidates of one prompt: their scores and features by stage, what the finals are worth.

    Args:
        scores: stage -> (S,).
        features: stage -> (S, D), by which sets are chosen.
        others: (S, E) of the finals, which choose nothing.
        verdicts: (judges, S), 0 or 1.
    """

    def __init__(self, scores: dict, features: dict, others: Any, verdicts: np.ndarray) -> None:
        from visearch.diversity import _modes

        self.scores, self.features, self.verdicts = scores, features, verdicts
        self.final = max(scores)
        self.apart = {"CLIP": _distances(features[self.final]), "thumbnails": _distances(others)}
        self.modes = np.array(_modes(self.apart["thumbnails"], SEEDS - 1))

    def best(self) -> list[int]:
        return (-self.scores[self.final]).argsort(stable=True)[:CHOSEN].tolist()

    def chosen(self, method: str, weight: float) -> list[int]:
        from visearch.diversity import diverse_subset

        return diverse_subset(self.scores[self.final], self.features[self.final], CHOSEN, method, weight=weight)

    def pruned(self, search: Any) -> list[int]:
        """Who is left after the checks of a planned search."""
        from visearch.diversity import diverse_subset

        alive = list(range(SEEDS))
        for stage, kept in zip(search.calls, search.keep, strict=True):
            scores, features = self.scores[stage][alive], self.features[stage][alive]
            method, weight = ("greedy", 0.0) if search.rule is None else (search.rule.method, search.rule.weight)
            alive = [alive[i] for i in diverse_subset(scores, features, kept, method, weight=weight)]
        return alive

    def worth(self, rows: Sequence[int]) -> dict[str, Any]:
        pairs = np.triu_indices(len(rows), 1)
        scores = self.scores[self.final][rows]
        found = {"reward": float(scores.mean()), "best": float(scores.max())}
        found |= {name: float(d.numpy()[np.ix_(rows, rows)][pairs].mean()) for name, d in self.apart.items()}
        found["modes"] = len(set(self.modes[list(rows)].tolist())) / (int(self.modes.max()) + 1)
        right = self.verdicts[:, list(rows)]
        return {k: round(v, 4) for k, v in found.items()} | {
            "right": right.mean(1).tolist(),
            "any right": right.max(1).tolist(),
        }


def _distances(features: Any) -> Any:
    import torch

    x = torch.nn.functional.normalize(features.double(), dim=1)
    d = (1 - x @ x.T).clamp_min(0)
    return ((d + d.T) / 2).fill_diagonal_(0)


MEASURES = {
    "mean reward": lambda w: w["reward"],
    "best reward": lambda w: w["best"],
    "distance, CLIP": lambda w: w["CLIP"],
    "distance, thumbnails": lambda w: w["thumbnails"],
    "share of modes": lambda w: w["modes"],
    **{f"judge {j.upper()}": lambda w, i=i: w["right"][i] for i, j in enumerate(JUDGES)},
    **{f"one right, {j.upper()}": lambda w, i=i: w["any right"][i] for i, j in enumerate(JUDGES)},
}


def table() -> str:
    if not RECORD.exists():
        raise SystemExit("nothing is recorded; run draw first")
    record = json.loads(RECORD.read_text())
    rows, setting = record["prompts"], record["setting"]
    size = f"{setting['prompts']} prompts x {setting['seeds']} seeds, {setting['dtype']}"
    text = [f"{size}, {record['minutes']} minutes beside other jobs"]
    text.append(f"modes a prompt: {np.mean([r['modes'] for r in rows]):.2f}")
    text.append(f"halving: {record['halving']}")
    for part, base, title in (("chosen", "best 4", "4 chosen of 16"), ("pruned", "by score", "16 pruned to 4")):
        lines = []
        for name in rows[0][part]:
            cells = [name if name != base else f"{name} (bar)"]
            for measure in MEASURES.values():
                own, bar = ([float(measure(r[part][which])) for r in rows] for which in (name, base))
                if name == base:
                    cells.append(f"{mean_interval(own):.3f}")
                else:
                    cells.append(f"{np.mean(own):.3f} ({paired_interval(own, bar):+.3f})")
            lines.append(cells)
        text += ["", markdown_table([title, *MEASURES], lines)]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["draw", "table"])
    if parser.parse_args().command == "draw":
        draw()
    print(table())


if __name__ == "__main__":
    main()
