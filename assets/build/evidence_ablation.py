"""Do gains add up? emoji-64, plain or tuned to its reward; halving that the reward guides, plain or noise-aware;
halving alone, or of fewer candidates and then zero-order search around its winner.

    python assets/build/evidence_ablation.py draw --work WORK --tuned TUNED --aware REWARD --minutes 60
    python assets/build/evidence_ablation.py table

TTSnap (arXiv 2511.22242) finds that the gains of such parts add up. TUNED is the WORK of ``tune_generator.py``, REWARD
the folder that ``visearch train-reward`` or ``evidence_noise_aware.py train`` wrote. ``draw`` runs all eight on report
prompts, beside best-of-n of each generator. The same call goes on after a crash or a time limit; what there is lies in
``assets/results/ablation-emoji-64.jsonl``, which ``table`` reads.

All eight are sized to take the core-seconds of best-of-8, previews and scores counted. The LoRA is merged into the
weights, so that both generators cost the same. Gains are over the best-of-n of the plain generator that takes just as
long, n interpolated, by the clock of the process that ran the search: what is left of a difference in cost does not
count. Whoever guides, the plain reward scores what is finished. Judges A, B and C guide nothing; on other prompts they
chose where the tuning stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from visearch.compare import compare
from visearch.comparison import BAR, POOL, Bar
from visearch.journal import replace_text
from visearch.monitor import hacking
from visearch.report import markdown_table
from visearch.search import parse
from visearch.statistics import LEVEL, Interval, curve_at, curve_reach, resampled_interval

RECORD = Path(__file__).parents[1] / "results" / "ablation-emoji-64.jsonl"
BUDGET, POOL_SIZE, PROMPTS = 8, 12, 60
REWARD, JUDGES = "emoji-clip", ("judge-a", "judge-b", "judge-c")
GENERATORS, GUIDES, ENDS = ("plain", "tuned"), ("plain", "noise-aware"), ("halving", "halving, refined")
STEEP = {  # the core-seconds of best-of-8
    "halving": "halving(n=14, calls=(6, 9, 12), keep=(6, 4, 2))",
    "halving, refined": "refine(first=halving(n=8, calls=(6, 9), keep=(3, 1)), then=zero-order(n=3))",
}
SEARCHES = {"plain": STEEP, "noise-aware": STEEP}  # of each guide
MEASURES = {REWARD: "score", "mean of the judges": "judges", **{f"judge {j[-1].upper()}": j for j in JUDGES}}

Place = tuple[str, str, str]  # generator, guide, search
BASE: Place = (GENERATORS[0], GUIDES[0], BAR)
NONE, ALL = (tuple(kinds[i] for kinds in (GENERATORS, GUIDES, ENDS)) for i in (0, 1))
ALONE = {ALL[i]: (*NONE[:i], ALL[i], *NONE[i + 1 :]) for i in range(3)}
QUESTIONS: dict[str, dict[Place, int]] = {  # what of each cell is added up
    **{f"{name}, alone": {place: 1, NONE: -1} for name, place in ALONE.items()},
    "sum of these": {**dict.fromkeys(ALONE.values(), 1), NONE: -3},
    "all three together": {ALL: 1, NONE: -1},
    "together, less the sum": {ALL: 1, **dict.fromkeys(ALONE.values(), -1), NONE: 2},
}


@dataclass(frozen=True)
class Cell:
    """What one search did. Shapes: P prompts, S candidates of the pool beside it.

    Attributes:
        values: measure -> (P,) of the winners.
        curve: measure -> (P, S) of best-of-n for n = 1 to S, by the same generator.
        seconds: (P,) of one core.
        pace: (P, S) seconds of best-of-n, in the process that ran the search.
    """

    values: Mapping[str, np.ndarray]
    curve: Mapping[str, np.ndarray]
    seconds: np.ndarray
    pace: np.ndarray

    @property
    def n(self) -> float:
        """Of the best-of-n that takes as long."""
        return float(curve_reach(self.pace.mean(0), self.seconds.mean()))


# --- drawing ----------------------------------------------------------------------------------------------------


def draw(options: argparse.Namespace) -> None:
    import torch
    from tune_generator import tuned

    from visearch.assets import scenes
    from visearch.pipelines import emoji

    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    pipelines = {"plain": emoji.load(dtype=torch.bfloat16), "tuned": tuned(options.tuned)}
    guides = {"plain": REWARD, "noise-aware": f"noise-aware:{options.aware}"}
    lines = [json.loads((options.tuned / "card.json").read_text())]
    for generator, guide in product(GENERATORS, GUIDES):
        found = compare(
            pipelines[generator],
            scenes.prompts("report"),
            {name: parse(text) for name, text in SEARCHES[guide].items()},
            (BUDGET,),
            (guides[guide],),
            JUDGES,
            call=emoji.DEFAULTS,
            pool_size=POOL_SIZE,
            batch=BUDGET,
            model=f"emoji-64, {generator}",
            clock="cpu",
            out=options.work / f"{generator}-{guide}",
            limit=options.limit,
            minutes=max(0.0, (end - time.monotonic()) / 60),
        )
        lines += [{"generator": generator, "guide": guide, **compact(r)} for r in found.records if "error" not in r]
    replace_text(RECORD, "".join(json.dumps(line) + "\n" for line in lines))


def compact(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a record of ``visearch compare`` the tables need."""
    kept = {name: record[name] for name in ("prompt", "prompt_id", "tag", "search", "unit", "judges")}
    kept["score"] = np.round(record["score"], 3).tolist()
    if record["unit"] == POOL:
        clock = {name: np.round(record["clock"][name], 4).tolist() for name in ("n", "cpu")}
        return {**kept, "one": record["one"], "clock": clock}
    counts = {name: record["ledger"][name] for name in ("nfe", "decodes", "scores")}
    return {**kept, "seconds": round(record["seconds"]["cpu"], 4), **counts}


# --- tables -----------------------------------------------------------------------------------------------------


def cells_of(lines: Iterable[Mapping[str, Any]]) -> dict[Place, Cell]:
    """All searches, and best-of-8 of every run as ``best-of-n``, on the prompts that all runs finished.

    Raises:
        ValueError: there is no such prompt.
    """
    found: dict[Place, dict[str, Mapping[str, Any]]] = {p: {} for p in product(GENERATORS, GUIDES, (BAR, *ENDS))}
    for line in lines:
        found[line["generator"], line["guide"], line["search"]][line["prompt_id"]] = line
    first, *others = found.values()
    whole = [prompt for prompt in first if all(prompt in runs for runs in others)]
    if not whole:
        raise ValueError("no prompt was finished by all eight searches; let draw run on")
    cells: dict[Place, Cell] = {}
    for generator, guide in product(GENERATORS, GUIDES):
        pools = [found[generator, guide, BAR][prompt] for prompt in whole]
        none = {"nuisance": {}, "diversity": [None] * len(pools[0]["score"])}
        bar = Bar([{**pool, **none} for pool in pools], "cpu")
        curve = with_mean(bar.curve)
        best = {name: values[:, BUDGET - 1] for name, values in curve.items()}
        cells[generator, guide, BAR] = Cell(best, curve, bar.seconds[:, BUDGET - 1], bar.seconds)
        for end in ENDS:
            runs = [found[generator, guide, end][prompt] for prompt in whole]
            judged = {judge: np.array([run["judges"][judge] for run in runs], dtype=float) for judge in JUDGES}
            values = with_mean({"score": np.array([run["score"] for run in runs]), **judged})
            seconds = np.array([run["seconds"] for run in runs])
            cells[generator, guide, end] = Cell(values, curve, seconds, bar.seconds)
    return cells


def with_mean(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**values, "judges": np.mean([values[judge] for judge in JUDGES], axis=0)}


def gained(cells: Mapping[Place, Cell], weights: Mapping[Place, float], measure: str) -> Interval:
    """Weighted sum of what searches gain over the plain generator's best-of-n of the same core-seconds.

    Prompts are resampled for all cells together, and n is found anew in every draw.
    """
    bar = cells[BASE].curve[measure]
    size, count = bar.shape[1], len(bar)
    columns = [bar]
    for place in weights:
        cell = cells[place]
        columns += [cell.values[measure], cell.seconds, cell.pace]

    def total(sums: np.ndarray) -> np.ndarray:
        best, parts = sums[:, :size], np.split(sums[:, size:], len(weights), axis=1)
        gains = (part[:, 0] - curve_at(best, curve_reach(part[:, 2:], part[:, 1])) for part in parts)
        return sum(weight * gain for weight, gain in zip(weights.values(), gains, strict=True)) / count

    return resampled_interval(np.column_stack(columns), total)


def table(cells: Mapping[Place, Cell]) -> str:
    """Markdown: every search, what it costs and gains."""
    heads = ["generator", "guide", "search", "core-seconds", "best-of-n in these", *MEASURES]
    lines = []
    for place in [(g, GUIDES[0], BAR) for g in GENERATORS] + list(product(GENERATORS, GUIDES, ENDS)):
        cell = cells[place]
        name = f"best-of-{BUDGET}" if place[2] == BAR else place[2]
        gains = [f"{gained(cells, {place: 1}, measure):+.3f}" for measure in MEASURES.values()]
        lines.append([*place[:2], name, f"{cell.seconds.mean():.2f}", f"{cell.n:.2f}", *gains])
    return markdown_table(heads, lines)


def added_up(cells: Mapping[Place, Cell]) -> str:
    """Markdown: what each part gains alone, and all together."""
    lines = [
        [question, *(f"{gained(cells, weights, measure):+.3f}" for measure in MEASURES.values())]
        for question, weights in QUESTIONS.items()
    ]
    return markdown_table(["over halving, plain", *MEASURES], lines)


def beware(cells: Mapping[Place, Cell]) -> list[str]:
    """Where the reward rises and a judge falls."""
    found = []
    for place in product(GENERATORS, GUIDES, ENDS):
        over = {name: {"best-of-n": gained(cells, {place: 1}, measure)} for name, measure in MEASURES.items()}
        for name in list(MEASURES)[1:]:
            if told := hacking(REWARD, over[REWARD], name, over[name]):
                found.append(f"{'' if told[1] else 'possible '}reward hacking: {', '.join(place)}: {told[0]}")
    return found


def tuning(card: Mapping[str, Any]) -> str:
    """Markdown: how the generator was tuned, one image a validation prompt."""
    heads = ["step", REWARD, "mean of the judges", "A", "B", "C", ""]
    rows = ([*(row[k] for k in ("step", "reward", "judges", "a", "b", "c")), row] for row in card["rows"])
    return markdown_table(heads, [[*row, "taken" * (last == card["chosen"])] for *row, last in rows])


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    card, *runs = lines
    cells = cells_of(runs)
    base = ", ".join(f"{name} {cells[BASE].values[measure].mean():.3f}" for name, measure in MEASURES.items())
    parts = [
        f"{len(cells[BASE].seconds)} report prompts; means of the plain generator's best-of-{BUDGET}: {base}. Gains "
        f"are over its best-of-n of the same core-seconds; intervals are {LEVEL:.0%}, over prompts.",
        table(cells),
        added_up(cells),
        "\n".join(f"- {line}" for line in beware(cells)),
        f"The tuned generator, {card['seconds']} core-seconds:",
        tuning(card),
    ]
    return "\n\n".join(part for part in parts if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--work", type=Path, required=True, help="scratch folder of this TUNED and this REWARD alone")
    drawing.add_argument("--tuned", type=Path, required=True, help="the folder of tune_generator.py")
    drawing.add_argument("--aware", type=Path, required=True, help="folder of the trained reward")
    drawing.add_argument("--limit", type=int, default=PROMPTS, help="report prompts")
    drawing.add_argument("--minutes", type=float, default=60, help="begin nothing more after so long")
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "draw":
        draw(options)
    else:
        print(report([json.loads(line) for line in RECORD.read_text().splitlines()]))


if __name__ == "__main__":
    main()
