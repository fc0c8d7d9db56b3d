"""What cheap previews are worth: how they rank seeds, and what they cost, measured on emoji-64.

    python assets/build/measure_previews.py draw --work WORK    # records; resumes
    python assets/build/measure_previews.py table               # prints the tables

``draw`` runs 8 seeds of each of 64 validation prompts and scores previews of them after several steps, as each decoder
shows them, with the guided reward: the autoencoder itself (full), a linear map fitted in this prompt's own run, on its
full previews after step 4 (linear) or on its 8 results (linear, results), and an AutoencoderTiny (tiny) where one lies
in ``assets/emoji-64/pipeline/vae_tiny``. It keeps all scores and the processor seconds of every decode and score in
``assets/results/previews.json``, and the rows themselves in WORK, so that another decoder can be measured without the
generator.

``table`` tells Spearman's correlation over the seeds of a prompt, mean over prompts with a 95 % interval: of previews
with the same previews in full, and with the results; and the cost of an image in a batch of 8.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from visearch.report import markdown_table
from visearch.statistics import mean_interval

SEEDS, PROMPTS = 8, 64
STAGES, FIT = (2, 4, 6, 8, 10), 4
RECORD = Path(__file__).parents[1] / "results" / "previews.json"


def draw(work: Path) -> None:
    """Record the prompts and decoders that are not there yet."""
    import torch

    from visearch.assets import scenes
    from visearch.pipelines import emoji
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.pipelines.previews import PreviewDecoder
    from visearch.protocols import Request
    from visearch.rewards import resolve

    torch.set_num_threads(1)
    pipe, reward, lines, record = emoji.load(), resolve("emoji-clip"), scenes.prompts("validation"), load()
    sampler = DiffusionSampler(pipe, emoji.DEFAULTS)
    views = {mode: sampler.view(previews=PreviewDecoder(pipe, mode)) for mode in ("full", "linear", "auto")}
    chosen = np.linspace(0, len(lines) - 1, PROMPTS).round().astype(int).tolist()
    for index in (*chosen[::2], *chosen[1::2]):  # spread, also where it ends early
        row = next((r for r in record if r["index"] == index), None)
        if row is None:
            row = {"index": index, "prompt": lines[index]["prompt"], "scores": {}, "seconds": {}}
            record.append(row)
        request = Request((row["prompt"],), seed=index)
        with torch.no_grad():
            _measure(row, views, reward, request, _rows(row, sampler, request, work / str(index)))
        save(record)


def _rows(row: dict[str, Any], sampler: Any, request: Any, folder: Path) -> dict[int, Any]:
    """Stage -> the candidates there, drawn once."""
    from visearch.protocols import Population

    rows, kept = sampler.init(request, request.seeds(0, SEEDS)), {}
    for stage in (*STAGES, sampler.num_stages):
        if (folder / f"{stage}.json").exists():
            kept[stage] = rows = Population.load(folder, name=str(stage))
            continue
        begin, before = time.process_time(), rows
        rows = kept[stage] = sampler.advance(before, stage)
        seconds = (time.process_time() - begin) / SEEDS / sampler.nfe(before.stage, stage)
        row["seconds"].setdefault("model", []).append(seconds)
        rows.save(folder, name=str(stage))
    return kept


def _measure(row: dict[str, Any], views: dict[str, Any], reward: Any, request: Any, rows: dict[int, Any]) -> None:
    """Scores by decoder and stage, and seconds an image by what they went to."""

    def timed(what: str, run: Callable[[], Any]) -> Any:
        begin = time.process_time()
        made = run()
        row["seconds"].setdefault(what, []).append((time.process_time() - begin) / SEEDS)
        return made

    def look(name: str, view: Any, stage: int) -> list[float]:
        shown = view.predict_x0(rows[stage])
        images = timed(name, lambda: view.decode(shown))
        scores = timed("score", lambda: reward.score(images, [row["prompt"]] * SEEDS))
        return [round(v, 3) for v in scores.values.tolist()]

    full, linear, tiny = (views[name] for name in ("full", "linear", "auto"))
    scores, last = row["scores"], full.num_stages
    if "full" not in scores:
        linear.learned = None
        row["result"] = look("full", linear, last)  # and the map is fitted on it
        scores["linear, results"] = {s: look("linear", linear, s) for s in STAGES}
        scores["full"] = {s: look("full", full, s) for s in STAGES}
        linear.learned = None
        linear.decode(linear.predict_x0(rows[FIT]))
        scores["linear"] = {s: look("linear", linear, s) for s in STAGES if s > FIT}
    if "tiny" not in scores and tiny.previews.decoder is not None:
        tiny.decode(tiny.predict_x0(rows[FIT]))  # the first is compared
        scores["tiny"] = {s: look("tiny", tiny, s) for s in STAGES}


def save(record: list[dict[str, Any]]) -> None:
    rows = [row | {"seconds": {k: [round(s, 6) for s in v] for k, v in row["seconds"].items()}} for row in record]
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    RECORD.write_text(f"[\n{body}\n]\n")


def load() -> list[dict[str, Any]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def table() -> str:
    """Correlations by decoder and stage, and seconds."""
    record = load()
    names = [name for name in ("full", "tiny", "linear", "linear, results") if name in record[0]["scores"]]

    def cell(name: str, stage: int, against: Callable[[dict[str, Any]], list[float]]) -> str:
        pairs = [(row["scores"].get(name, {}).get(str(stage)), against(row)) for row in record]
        found = [spearmanr(a, b).statistic for a, b in pairs if a is not None]
        return f"{mean_interval(found):.2f}" if found else ""

    heads = ["Spearman with", "decoder", *(f"step {s}" for s in STAGES)]
    lines = [["the result", name, *(cell(name, s, lambda row: row["result"]) for s in STAGES)] for name in names]
    for name in names[1:]:
        same = [cell(name, s, lambda row, s=s: row["scores"]["full"][str(s)]) for s in STAGES]
        lines.append(["the full preview", name, *same])
    spent = {k: np.concatenate([row["seconds"].get(k, []) for row in record]) for k in record[0]["seconds"]}
    cost = {k: 1000 * float(np.median(v)) for k, v in spent.items()}
    kinds = [[k, f"{v:.2f}", f"{v / cost['model']:.2f}"] for k, v in cost.items()]
    return "\n\n".join(
        (
            f"{len(record)} validation prompts x {SEEDS} seeds of emoji-64, 15 steps",
            markdown_table(heads, lines),
            markdown_table(("one image of 8", "core-milliseconds", "model rows"), kinds),
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("draw").add_argument("--work", type=Path, required=True)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.work)
    else:
        print(table())
