"""``visearch demo``: three prompts, sampled once and searched, before judges that never guided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from visearch.assets import scenes
from visearch.budget import Budget, Ledger
from visearch.geneval import judge_images
from visearch.pipelines import emoji
from visearch.report import contact_sheet, side_by_side, versions, write_image, write_json
from visearch.rewards import resolve
from visearch.rewards.detector import load_judge
from visearch.rewards.images import to_pil, to_uint8
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN
from visearch.wrap import BarLedger, Job

__all__ = ["run_demo"]

TASKS = ("two_object", "counting", "color_attr")
RUNS = 4  # independent seeds a prompt: one image proves nothing


def run_demo(n: int, seed: int, out: Path) -> int:
    """Search ``RUNS`` times for each of three validation prompts, print the table, write pictures and demo.json."""
    pipe, reward = emoji.load(), resolve("emoji-clip")
    judges = _judges()
    prompts = [next(p for p in scenes.prompts("validation") if p["tag"] == task) for task in TASKS]
    rows, pictures = [], []
    search, ledger = BestOfN(n=n), Ledger()
    with tqdm(total=None, unit="row", desc="searching") as bar:
        for line in prompts:
            for run in range(RUNS):
                generator = torch.Generator().manual_seed(seed + 1000 * run)
                job = Job.of(pipe, search, line["prompt"], generator=generator, **emoji.DEFAULTS)
                ledger = BarLedger(bar=bar)
                bar.total = bar.total or len(prompts) * RUNS * search.plan(job.sampler).nfe
                *_, last = run_search(job.sampler, reward, search, job.request, Budget(), ledger=ledger)
                result = last.result
                if result.error is not None:
                    raise result.error
                rows.append(_row(line, run, result, judges))
                pictures.append((line, result))
    _write(out, rows, pictures, judges)
    print(_table(rows, judges, n))
    print(f"\npictures and numbers: {out}/comparison.png, contact-sheet-*.png, demo.json")
    return 0


def _judges() -> list[Any]:
    found = []
    for name in ("a", "b", "c"):
        try:
            found.append(load_judge(name))
        except ImportError as error:
            print(f"judge {name.upper()} is left out: {error}")
    return found


def _row(line: Mapping[str, Any], run: int, result: Any, judges: Sequence[Any]) -> dict[str, Any]:
    ranking = result.ranking
    winner, baseline = ranking[0], next(c for c in ranking if c["id"] == "0")
    pair = to_uint8(torch.stack([result.samples[0, c["id"]] for c in (baseline, winner)]))
    verdicts = {j.name: [v.correct for v in judge_images(j, to_pil(pair), [line] * 2)] for j in judges}
    return {
        "prompt": line["prompt"],
        "tag": line["tag"],
        "run": run,
        "reward": [baseline["score"], winner["score"]],
        "verdicts": verdicts,
        "winner": winner,
        "ledger": result.ledger.as_dict(),
    }


def _table(rows: Sequence[Mapping[str, Any]], judges: Sequence[Any], n: int) -> str:
    """Sampled once -> searched, by prompt and in all."""
    names = [j.name for j in judges]
    header = ["prompt", "reward", *(f"judge {name.upper()}" for name in names), "model rows", "seconds"]
    lines = []
    prompts = list(dict.fromkeys(r["prompt"] for r in rows))
    for label in [*prompts, "all"]:
        mine = [r for r in rows if label in ("all", r["prompt"])]
        reward = [sum(r["reward"][i] for r in mine) / len(mine) for i in (0, 1)]
        cells = [label, f"{reward[0]:.2f} -> {reward[1]:.2f}"]
        for name in names:
            right = [sum(r["verdicts"][name][i] for r in mine) for i in (0, 1)]
            cells.append(f"{right[0]} -> {right[1]} of {len(mine)} right")
        spent = sum(r["ledger"]["nfe"] for r in mine), sum(r["ledger"]["seconds"]["total"] for r in mine)
        lines.append([*cells, f"{spent[0] // n} -> {spent[0]}", f"{spent[1]:.1f}"])
    widths = [max(len(row[i]) for row in [header, *lines]) for i in range(len(header))]
    text = [
        f"\nsampled once -> best of {n}, {RUNS} seeds a prompt; images right by judges that never guided the search\n"
    ]
    text += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *lines]]
    errors = [f"{j.name.upper()} {j.error['overall']['rate']:.1%}" for j in judges if "overall" in j.error]
    text.append("\nthe judges' own error on composed scenes: " + ", ".join(errors))
    text.append("a dozen images illustrate; the measured evidence on the report prompts is in the README")
    return "\n".join(text)


def _write(
    out: Path, rows: Sequence[Mapping[str, Any]], pictures: Sequence[tuple[Any, Any]], judges: Sequence[Any]
) -> None:
    compared = []
    shown = [_shown(rows, line["prompt"], judges) for line in {p[0]["prompt"]: p[0] for p in pictures}.values()]
    for i, k in enumerate(shown):
        line, result = pictures[k]
        ranking = result.ranking
        images = to_pil(torch.stack([result.samples[0, c["id"]] for c in ranking]))
        captions = [f"{c['score']:.2f}  #{c['id']}\nseed {c['seed']}" for c in ranking]
        write_image(out / f"contact-sheet-{i + 1}.png", contact_sheet(images, captions, line["prompt"], marked=0))
        first = next(k for k, c in enumerate(ranking) if c["id"] == "0")
        marks = [_marks(rows[k], which, judges) for which in (0, 1)]
        compared.append((line["prompt"], images[first], f"once {marks[0]}", images[0], f"searched {marks[1]}"))
    write_image(out / "comparison.png", side_by_side(compared))
    write_json(out / "demo.json", {"rows": rows, "versions": versions()})


def _shown(rows: Sequence[Mapping[str, Any]], prompt: str, judges: Sequence[Any]) -> int:
    """Which run the pictures show: the first whose single sample the first judge calls wrong, else the first."""
    mine = [i for i, r in enumerate(rows) if r["prompt"] == prompt]
    return next((i for i in mine if not rows[i]["verdicts"][judges[0].name][0]), mine[0])


def _marks(row: Mapping[str, Any], which: int, judges: Sequence[Any]) -> str:
    return ", ".join(f"{j.name.upper()} {'right' if row['verdicts'][j.name][which] else 'wrong'}" for j in judges)
