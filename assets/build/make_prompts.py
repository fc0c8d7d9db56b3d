"""Write the prompt files of emoji-64: GenEval's official prompts that the world covers, plus generated ones.

The official ones come from ``assets/geneval/evaluation_metadata.jsonl`` (djghosh13/geneval, MIT, (c) 2023 Dhruba
Ghosh; arXiv 2310.11513), which ``make_geneval_prompts.py`` writes.

    python assets/build/make_prompts.py
"""

import argparse
import json
from pathlib import Path

import numpy as np

from visearch.assets import path, scenes

REPORT_PER_TASK, VALIDATION_PER_TASK = 60, 20


def covered(metadata: dict) -> bool:
    return all(clause["class"] in scenes.CLASSES for clause in metadata["include"])


def generate(rng: np.random.Generator, taken: set[str], split: str, tag: str, count: int) -> list[dict]:
    """``count`` new prompts of a task, fewer where the task has no more (24 single objects, 72 counts)."""
    rows: list[dict] = []
    for _ in range(20_000):
        if len(rows) >= count:
            break
        metadata = scenes.draw_metadata(rng, tag)
        free = tag in ("single_object", "counting") or scenes.hash_split(metadata) == split
        if free and metadata["prompt"] not in taken:
            taken.add(metadata["prompt"])
            rows.append({**metadata, "official": False})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "emoji-64" / "prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    official = [json.loads(line) for line in path("geneval/evaluation_metadata.jsonl").read_text().splitlines()]
    report = [{**row, "official": True} for row in official if covered(row)]
    held_out = {row["prompt"] for row in report}
    official_keys = {scenes.prompt_key(row) for row in report}
    validation = []
    for tag in scenes.TAGS:
        known = sum(row["tag"] == tag for row in report)
        report += generate(rng, held_out, "report", tag, REPORT_PER_TASK - known)
        count = len(scenes.CLASSES) if tag == "single_object" else VALIDATION_PER_TASK
        fresh = generate(rng, set(), "validation", tag, 2 * count)
        free = tag in ("single_object", "counting")
        validation += [row for row in fresh if free or scenes.prompt_key(row) not in official_keys][:count]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("report", report), ("validation", validation)):
        rows.sort(key=lambda row: (scenes.TAGS.index(row["tag"]), not row["official"]))
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
