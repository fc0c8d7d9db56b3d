"""Does best-of-8 by the CLIP reward beat one sample? The gates of emoji-64, measured.

    python assets/build/evidence_best_of_n.py draw   --split report --work WORK   # 8 candidates a prompt; resumes
    python assets/build/evidence_best_of_n.py score  --split report --work WORK   # scores and judges them
    python assets/build/evidence_best_of_n.py table  --split report               # prints the tables
    python assets/build/evidence_best_of_n.py readme --split report               # and puts them into README.md

``score`` writes one line a prompt to ``assets/results/best_of_n-<split>.jsonl``. Each line holds, for 8 candidates,
the reward, the reward of the preview after 12, 25 and 50 % of the steps, the verdicts of the judges, and the mean
saturation. Everything below is computed from those lines. Nothing is tuned on the report split; it is recorded once a
release.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from visearch.report import markdown_table
from visearch.statistics import expected_best, minimum_detectable_effect, paired_interval

N = 8
PREVIEWS = (0.125, 0.25, 0.5)
BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"
RESULTS = Path(__file__).parents[1] / "results"
FIELD = {"base": "0.43 SD1.5, 0.53 SDXL, 0.71 SD3.5", "recovery": "61 %, 45 %, 23 %", "spearman": (0.32, 0.66, 0.90)}


def draw(split: str, limit: int | None, work: Path, shard: tuple[int, int]) -> None:
    """Draw N candidates a prompt and keep finals and previews as uint8: WORK/<split>-<index>.npz."""
    import torch
    from tqdm import tqdm

    from visearch.assets import scenes
    from visearch.pipelines import emoji
    from visearch.rewards.images import to_uint8
    from visearch.search.best_of_n import BestOfN
    from visearch.wrap import Job

    work.mkdir(parents=True, exist_ok=True)
    pipe, lines = emoji.load(), scenes.prompts(split)
    chosen = range(0, len(lines), 1 if limit is None else max(1, len(lines) // limit))
    for index in tqdm(list(chosen)[shard[0] :: shard[1]]):
        path = work / f"{split}-{index:04d}.npz"
        if path.exists():
            continue
        begin = time.perf_counter()
        seeded = torch.Generator().manual_seed(index)
        with torch.no_grad():
            job = Job.of(pipe, BestOfN(n=N), lines[index]["prompt"], generator=seeded, **emoji.DEFAULTS)
            sampler, request = job.sampler, job.request
            rows, previews = sampler.init(request, request.seeds(0, N)), []
            for share in PREVIEWS:
                rows = sampler.advance(rows, max(1, round(share * sampler.num_stages)))
                previews.append(to_uint8(sampler.decode(sampler.predict_x0(rows))).numpy())
            finals = to_uint8(sampler.decode(sampler.advance(rows, sampler.num_stages))).numpy()
        part = path.with_suffix(".part.npz")
        np.savez(part, finals=finals, previews=np.stack(previews), seconds=time.perf_counter() - begin)
        part.replace(path)


def score(split: str, work: Path, names: Sequence[str]) -> None:
    """Score and judge what :func:`draw` kept, and write the record."""
    import torch
    from tqdm import tqdm

    from visearch.assets import scenes
    from visearch.geneval import judge_images
    from visearch.rewards import resolve
    from visearch.rewards.detector import load_judge
    from visearch.rewards.images import to_pil

    reward, judges, lines = resolve("emoji-clip"), [load_judge(name) for name in names], scenes.prompts(split)
    rows = []
    for path in tqdm(sorted(p for p in work.glob(f"{split}-*.npz") if ".part" not in p.name)):
        index, kept = int(path.stem.split("-")[-1]), np.load(path)
        line, prompt = lines[index], [lines[index]["prompt"]] * N
        finals = torch.from_numpy(kept["finals"])
        images = to_pil(finals)
        pixels = finals.float() / 255
        saturation = (pixels.amax(1) - pixels.amin(1)).mean((1, 2)).tolist()
        row = {
            "index": index,
            "tag": line["tag"],
            "prompt": line["prompt"],
            "official": line.get("official", False),
            "reward": reward.score(finals, prompt).values.tolist(),
            "previews": [reward.score(torch.from_numpy(p), prompt).values.tolist() for p in kept["previews"]],
            "verdicts": {j.name: [v.correct for v in judge_images(j, images, [line] * N)] for j in judges},
            "errors": {j.name: j.error.get("overall", {}).get("rate") for j in judges},
            "saturation": [round(s, 4) for s in saturation],
            "seconds": round(float(kept["seconds"]), 3),
        }
        rows.append(json.dumps(row) + "\n")
    path = RESULTS / f"best_of_n-{split}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".part").write_text("".join(rows))
    path.with_suffix(".part").replace(path)


def load(split: str) -> list[dict[str, Any]]:
    path = RESULTS / f"best_of_n-{split}.jsonl"
    if not path.exists():
        raise SystemExit(f"nothing is recorded for split {split!r}; run draw and score first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def overall(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """GenEval's overall: unweighted mean of the tasks' means."""
    tags = list(dict.fromkeys(r["tag"] for r in rows))
    return float(np.mean([np.mean([value(r) for r in rows if r["tag"] == t]) for t in tags]))


def table(split: str) -> str:
    rows = load(split)
    judges = list(rows[0]["verdicts"])
    for r in rows:
        r["order"] = np.argsort(-np.array(r["reward"]), kind="stable")
        r["verdicts"] = {j: np.array(v, dtype=float) for j, v in r["verdicts"].items()}
    official = sum(r["official"] for r in rows)
    parts = [f"{len(rows)} {split} prompts x {N} candidates ({official} of GenEval's own prompts)"]
    parts += [
        gains(rows, judges),
        tasks(rows, judges),
        growth(rows, judges),
        previews(rows),
        nuisances(rows, judges[0]),
    ]
    return "\n\n".join(parts)


def gains(rows: Sequence[dict[str, Any]], judges: Sequence[str]) -> str:
    """What each judge says of one sample, of the best of N and of the one that it would pick itself."""
    heads = ["judge", "own error", "one sample", "best of 8", "paired gain (95 %)", "detectable", "oracle", "share"]
    lines = []
    for j in judges:
        once = [r["verdicts"][j][0] for r in rows]
        best = [r["verdicts"][j][r["order"][0]] for r in rows]
        first, picked, mean, oracle = (
            overall(rows, lambda r, j=j, of=of: of(r["verdicts"][j], r["order"]))
            for of in (lambda v, o: v[0], lambda v, o: v[o[0]], lambda v, o: v.mean(), lambda v, o: v.max())
        )
        error = rows[0]["errors"].get(j)
        cells = [j.upper(), "-" if error is None else f"{error:.1%}", f"{first:.3f}", f"{picked:.3f}"]
        cells += [f"{paired_interval(best, once):+.3f}"]
        cells += [f"{minimum_detectable_effect(np.subtract(best, once)):.3f}", f"{oracle:.3f}"]
        lines.append([*cells, f"{(picked - mean) / (oracle - mean):.0%}" if oracle > mean else "nan%"])
    lines.append(["field", "", FIELD["base"], "", "", "", "", FIELD["recovery"]])
    return markdown_table(heads, lines)


def tasks(rows: Sequence[dict[str, Any]], judges: Sequence[str]) -> str:
    lines = []
    for tag in dict.fromkeys(r["tag"] for r in rows):
        mine = [r for r in rows if r["tag"] == tag]
        cells = [tag, len(mine)]
        for j in judges:
            values = (
                np.mean([of(r["verdicts"][j], r["order"]) for r in mine])
                for of in (lambda v, o: v.mean(), lambda v, o: v[o[0]], lambda v, o: v.max())
            )
            cells.append(", ".join(f"{v:.2f}" for v in values))
        lines.append(cells)
    return markdown_table(["task", "prompts", *(f"{j.upper()}: mean, best of 8, oracle" for j in judges)], lines)


def growth(rows: Sequence[dict[str, Any]], judges: Sequence[str]) -> str:
    numbers, lines = range(1, N + 1), []
    for j in judges:
        curve = [overall(rows, lambda r, n=n, j=j: expected_best(r["reward"], n, r["verdicts"][j])) for n in numbers]
        lines.append([j.upper(), *(f"{v:.3f}" for v in curve)])
    curve = [np.mean([expected_best(r["reward"], n) for r in rows]) for n in numbers]
    lines.append(["guided reward", *(f"{v:.2f}" for v in curve)])
    return markdown_table(["best of n by reward", *numbers], lines)


def previews(rows: Sequence[dict[str, Any]]) -> str:
    found = [np.mean([spearmanr(r["previews"][i], r["reward"]).statistic for r in rows]) for i in range(len(PREVIEWS))]
    lines = [(name, *(f"{v:.2f}" for v in own)) for name, own in (("emoji-64", found), ("field", FIELD["spearman"]))]
    return markdown_table(["Spearman of preview and final reward", "12 %", "25 %", "50 % of steps"], lines)


def nuisances(rows: Sequence[dict[str, Any]], judge: str) -> str:
    saturation, reward, right = (
        np.concatenate([center(value(r)) for r in rows])
        for value in (lambda r: r["saturation"], lambda r: r["reward"], lambda r: r["verdicts"][judge])
    )
    return (
        f"Within a prompt, saturation correlates {np.corrcoef(saturation, reward)[0, 1]:+.2f} with the reward and "
        f"{np.corrcoef(saturation, right)[0, 1]:+.2f} with being right (judge {judge.upper()}); "
        f"{np.median([r['seconds'] for r in rows]) / N:.2f} s an image with three previews, batch of {N}."
    )


def center(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values - values.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["draw", "score", "table", "readme"])
    parser.add_argument("--split", choices=["report", "validation"], default="validation")
    parser.add_argument("--work", type=Path, help="folder for the images that draw makes and score reads")
    parser.add_argument("--limit", type=int, help="only about so many prompts, evenly spread")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="draw every N-th prompt from I (default 0/1)")
    parser.add_argument("--judges", default="a,b,c", help="comma-separated (default %(default)s)")
    options = parser.parse_args()
    if options.command in ("draw", "score"):
        if options.work is None:
            parser.error(f"{options.command} needs --work, a folder for the images")
        if options.command == "draw":
            index, count = map(int, options.shard.split("/"))
            draw(options.split, options.limit, options.work, (index, count))
        else:
            score(options.split, options.work, options.judges.split(","))
        return
    text = table(options.split)
    print(text)
    if options.command == "readme":
        readme = RESULTS.parents[1] / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        readme.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
