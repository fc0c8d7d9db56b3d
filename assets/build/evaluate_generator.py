"""Measure a generator of emoji-64 on validation prompts, one sample each, and draw its sample sheet and loss curves.

python assets/build/evaluate_generator.py                                   # writes card.json and samples.png
python assets/build/evaluate_generator.py --steps 10 15 25 --guidance 2 4 6 --shift 1 2 3   # a table, no files
python assets/build/evaluate_generator.py --speed                           # only the seconds in card.json
python assets/build/evaluate_generator.py --model emoji-64-v                # the four-step one; its card and samples
python assets/build/evaluate_generator.py --curves WORK                     # curves.png from the training logs
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from visearch import geneval
from visearch.assets import scenes
from visearch.pipelines import MODELS, emoji
from visearch.rewards.detector import load_judge

FOLDER = Path(__file__).resolve().parents[1] / "emoji-64"
BATCH = 16


def sample(
    pipeline: Any, rows: list[dict], seed: int, steps: int, guidance: float, model: str = emoji.NAME
) -> list[Image.Image]:
    """One image per row of metadata; row i starts from the noise of seed ``1000 * seed + i``."""
    images = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        generators = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))]
        options = {**emoji.CALLS[model], "num_inference_steps": steps, "guidance_scale": guidance}
        images += pipeline([row["prompt"] for row in part], generator=generators, **options).images
    return images


def accuracy(name: str, images: list[Image.Image], rows: list[dict]) -> dict[str, float]:
    """GenEval-style accuracy of one judge by task, and their mean as "overall"."""
    metadata = [{key: value for key, value in row.items() if key != "official"} for row in rows]
    correct = [verdict.correct for verdict in geneval.judge_images(load_judge(name), images, metadata)]
    tags = np.array([row["tag"] for row in rows])
    by_task = {tag: round(float(np.mean(np.array(correct)[tags == tag])), 3) for tag in scenes.TAGS}
    return {**by_task, "overall": round(float(np.mean(list(by_task.values()))), 3)}


def seconds_per_image(pipeline: Any, batch: int, call: dict[str, Any]) -> float:
    """Seconds per image at the default settings, one prompt, after one warm-up call."""
    prompt = "a photo of a red car and a blue cow"
    pipeline(prompt, num_images_per_prompt=batch, **{**call, "num_inference_steps": 2})
    begin = time.perf_counter()
    pipeline(prompt, num_images_per_prompt=batch, **call)
    return round((time.perf_counter() - begin) / batch, 3)


def speeds(pipeline: Any, call: dict[str, Any]) -> dict[str, float]:
    """Seconds per image by precision, threads and batch; the best of three, so that a passing load does not count."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipeline.to(dtype=dtype)
        for threads, batch in ((1, 1), (1, 8), (2, 1), (2, 8)):
            torch.set_num_threads(threads)
            key = f"{str(dtype).removeprefix('torch.')}, {threads} threads, batch {batch}"
            found[key] = min(seconds_per_image(pipeline, batch, call) for _ in range(3))
    return found


def sheet(images: list[Image.Image], rows: list[dict], path: Path, columns: int = 12) -> None:
    """The first images of each task, one line per task."""
    page = Image.new("RGB", (66 * columns, 66 * len(scenes.TAGS)), "white")
    for y, tag in enumerate(scenes.TAGS):
        chosen = [image for image, row in zip(images, rows, strict=True) if row["tag"] == tag][:columns]
        for x, image in enumerate(chosen):
            page.paste(image, (66 * x + 1, 66 * y + 1))
    page.save(path, optimize=True)


def curves(work: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, log, title, keys in (
        (axes[0], "vae.jsonl", "autoencoder: pixels, edges, KL", ("loss",)),
        (axes[1], "generator.jsonl", "generator: velocity error", ("loss", "validation")),
    ):
        rows = [json.loads(line) for line in (work / log).read_text().splitlines()]
        for key in keys:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), label=key)
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=emoji.CALLS, default=emoji.NAME)
    parser.add_argument("--pipeline", type=Path, help="of the flow model, instead of the one that ships")
    parser.add_argument("--steps", type=int, nargs="+", help="default: the model's")
    parser.add_argument("--guidance", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--shift", type=float, nargs="+", help="values to try; default: what the pipeline ships")
    parser.add_argument("--seeds", type=int, default=1, help="samples per prompt")
    parser.add_argument("--limit", type=int, help="prompts per task")
    parser.add_argument("--judges", nargs="+", default=["a", "b"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="only measure the seconds per image, for card.json")
    parser.add_argument("--curves", type=Path, metavar="WORK", help="only draw WORK's training logs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.curves:
        curves(args.curves, FOLDER / "curves.png")
        return
    call, kind = emoji.CALLS[args.model], args.model.removeprefix(emoji.NAME)
    folder, card_file = FOLDER / f"pipeline{kind}", FOLDER / f"card{kind}.json"
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline) if args.pipeline else MODELS.load(args.model)()
    pipeline.set_progress_bar_config(disable=True)
    if args.speed:
        card = json.loads(card_file.read_text())
        card["seconds_per_image"] = speeds(pipeline, call)
        card_file.write_text(json.dumps(card, indent=1) + "\n")
        print(json.dumps(card["seconds_per_image"], indent=1))
        return
    rows = []
    for tag in scenes.TAGS:
        rows += [row for row in scenes.prompts("validation") if row["tag"] == tag][: args.limit]
    shifts = args.shift or [pipeline.scheduler.config.get("shift")]
    steps_tried = args.steps or [call["num_inference_steps"]]
    settings = [(s, g, h) for s in steps_tried for g in args.guidance or [call["guidance_scale"]] for h in shifts]
    for steps, guidance, shift in settings:
        if shift is not None:
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=shift)
        drawn = (sample(pipeline, rows, seed, steps, guidance, args.model) for seed in range(args.seeds))
        images = [image for part in drawn for image in part]
        results = {name: accuracy(name, images, rows * args.seeds) for name in args.judges}
        print(json.dumps({"steps": steps, "guidance": guidance, "shift": shift, **results}), flush=True)
    if len(settings) > 1 or args.limit or args.pipeline:
        return
    files = sorted(folder.rglob("*.safetensors"))
    card = {
        "settings": {"num_inference_steps": steps, "guidance_scale": guidance} | ({"shift": shift} if shift else {}),
        "prompts": f"{len(rows)} validation prompts, {args.seeds} samples each",
        "accuracy": results,
        "parameters": {
            part: sum(p.numel() for p in getattr(pipeline, part).parameters())
            for part in ("vae", "transformer", "text_encoder")
        },
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "sha256": {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    }
    card["seconds_per_image"] = speeds(pipeline, call)
    card_file.write_text(json.dumps(card, indent=1) + "\n")
    sheet(images[: len(rows)], rows, FOLDER / f"samples{kind}.png")


if __name__ == "__main__":
    main()
