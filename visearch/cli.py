"""The command line: ``visearch run`` searches for one prompt, ``visearch demo`` shows what that is worth."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visearch import __version__, support
from visearch.pipelines import MODELS
from visearch.rewards import REWARDS
from visearch.search import SEARCHES

__all__ = ["main"]

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

RUN_EXAMPLES = """
examples:
  visearch run "a photo of two cows"
      eight candidates of the embedded model, the best by its CLIP
  visearch run "a photo of a red car" --n 32 --max-seconds 20 --held-out judge-a
      at most 20 seconds; judge A scores baseline and winner, the search never sees it
  visearch run "a photo of two cows" --search halving --n 16 --set preset=psp
      sixteen begin; after a quarter and after half of the steps the worse half by preview is dropped
  visearch run "a cat" --model stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 --offload model \\
      --reward open-clip:ViT-H-14/laion2b_s32b_b79k
      any diffusers pipeline by hub id or folder, any open_clip model as reward
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "command"):
        parser.print_help()
        return EXIT_USAGE
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return options.command(options)
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"visearch: {_one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("visearch: interrupted before anything was finished", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (RuntimeError, OSError) as error:
        print(f"visearch: {_one_line(error)}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("visearch", description="Search at inference time instead of sampling once.")
    parser.add_argument("--version", action="version", version=f"visearch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="search for one prompt and keep baseline, winner and every candidate",
        description="Search for one prompt. Writes winner.png, baseline.png (same seed, sampled once), "
        "contact-sheet.png, winner.safetensors (its latents) and result.json, which holds the command that regenerates "
        "the winner.",
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(command=_run)
    run.add_argument("prompt", help="what the image should show")
    _model_arguments(run)
    what = run.add_argument_group("search")
    what.add_argument("--search", default="best-of-n", metavar="NAME", help=f"one of: {', '.join(SEARCHES)}")
    what.add_argument("--n", type=int, default=8, help="candidates (default %(default)s)")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a hyperparameter of the search, such as preset=psp or calls=.4,.7; may be repeated",
    )
    what.add_argument(
        "--reward",
        default="emoji-clip",
        metavar="NAME",
        help=f"guides the search: {', '.join(REWARDS)}, or open-clip:MODEL/PRETRAINED (default %(default)s)",
    )
    what.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="NAME",
        help="scores baseline and winner without guiding; may be repeated",
    )
    limits = run.add_argument_group("budget")
    limits.add_argument("--max-nfe", type=int, metavar="N", help="most model rows, both guidance branches counted")
    limits.add_argument("--max-seconds", type=float, metavar="S", help="most seconds; overrun by at most one operation")
    limits.add_argument("--target", type=float, metavar="R", help="stop once a finished candidate scores this much")
    limits.add_argument("--patience", type=int, metavar="K", help="stop after K finished candidates without a new best")
    limits.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="most bytes beyond the weights, such as 8GiB: batches are cut to fit (default: 0.9 of a free CUDA device)",
    )
    run.add_argument("--seed", type=int, default=0, help="of candidate 0, and all others (default %(default)s)")
    run.add_argument(
        "--exact",
        action="store_true",
        help="afterwards run the winner again, in the batch sizes that carried it, and tell how far it drifts",
    )
    run.add_argument("--out", metavar="DIR", help="folder for the results (default outputs/<prompt>)")

    demo = commands.add_parser(
        "demo",
        help="three prompts of the embedded world: sampled once, searched, and judged",
        description="Runs three prompts on the embedded model, once and as best-of-N, and lets three judges that the "
        "search never saw decide. Needs no network.",
    )
    demo.set_defaults(command=_demo)
    demo.add_argument("--n", type=int, default=8, help="candidates (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    demo.add_argument("--out", default="outputs/demo", metavar="DIR", help="folder (default %(default)s)")
    support.add_parser(commands, _model_arguments, lambda options: _load(options, _device(options.device)))
    return parser


def _model_arguments(parser: argparse.ArgumentParser, default: str | None = "emoji-64") -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default=default,
        metavar="NAME|PATH|HUB_ID",
        help=f"{', '.join(MODELS)}, a folder, or a hub id of a diffusers pipeline"
        + f" (default {default})" * bool(default),
    )
    model.add_argument("--steps", type=int, metavar="K", help="inference steps (default: the model's)")
    model.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the model's)")
    model.add_argument("--negative-prompt", metavar="TEXT")
    model.add_argument("--height", type=int)
    model.add_argument("--width", type=int)
    model.add_argument("--device", help="cpu, cuda, mps ... (default: the best there is)")
    model.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on cpu)")
    model.add_argument("--offload", choices=["model", "sequential"], help="keep weights on the CPU between uses")
    model.add_argument("--rows", type=int, metavar="B", help="most candidates in one model call")
    model.add_argument(
        "--batch-buckets",
        type=_sizes,
        metavar="B,B,...",
        help="the only numbers of candidates in one model call, such as 1,2,4,8, for compiled models",
    )


def _sizes(text: str) -> str:
    """Comma-separated sizes, checked."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; write it as 1,2,4,8")
    return text


# --- visearch run ---------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from visearch.report import check_folder

    if not options.prompt.strip():
        raise ValueError(f"prompt {options.prompt!r} is empty; say what the image should show")
    for name in ("steps", "height", "width", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed} must lie in [0, 2^63)")
    from visearch.budget import Budget
    from visearch.wrap import make_search

    search = make_search(options.search, **{"n": options.n, **_hyperparameters(options)})
    budget = Budget(
        options.max_nfe, options.max_seconds, options.target, options.patience, max_memory=options.max_memory
    )
    out = check_folder(options.out or Path("outputs") / _slug(options.prompt))
    found = search_once(options, options.prompt, search, budget)
    written = _write(out, options, found)
    _tell(options, found, written)
    if found.result.stopped == "interrupted":
        return EXIT_INTERRUPTED
    return EXIT_OK if written and found.result.error is None else EXIT_FAILED


def _hyperparameters(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` says; values are Python literals, all else is text."""
    known = [f.name for f in dataclasses.fields(SEARCHES.load(options.search))]
    given = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--set {setting}: give NAME=VALUE; {options.search} has {', '.join(known)}")
        try:
            given[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[name] = value
    return given


@dataclass(frozen=True)
class Found:
    """One search of one prompt with everything that is reported about it.

    ``search`` is cut to the budget; ``price`` is what one decode and score cost in model rows, as measured; ``drift``
    is how far the winner's latents were off when it was run again, ``None`` where it was not.
    """

    search: Any
    price: float | None
    reward: Any
    result: Any
    winner: dict[str, Any]
    baseline: dict[str, Any]
    images: dict[str, Any]
    call: dict[str, Any]
    notes: dict[str, str]
    drift: float | None = None


def search_once(options: argparse.Namespace, prompt: str, search: Any, budget: Any, pipe: Any = None) -> Found:
    """Run a search for one prompt with a progress bar.

    Raises:
        ValueError: unknown model, reward or device; a budget too small.
        RuntimeError, KeyboardInterrupt: it ended before one candidate was finished.
    """
    import torch
    from tqdm.auto import tqdm

    from visearch.rewards import resolve
    from visearch.rewards.images import to_pil
    from visearch.run import regenerate, run_search
    from visearch.wrap import BarLedger, Job

    buckets = options.batch_buckets and [int(size) for size in options.batch_buckets.split(",")]
    device = _device(options.device)
    reward = resolve(options.reward, device)
    held_out = [resolve(name, device) for name in options.held_out]
    pipe, call = _load(options, device) if pipe is None else pipe
    generator = torch.Generator().manual_seed(options.seed)
    job = Job.of(pipe, search, prompt, max_nfe=budget.max_nfe, generator=generator, **call)
    plan = search.plan(job.sampler, budget.max_nfe)
    with tqdm(total=plan.nfe, desc=f"{options.search} n={getattr(plan.search, 'n', '')}", unit="row") as bar:
        for step in run_search(
            job.sampler,
            reward,
            search,
            job.request,
            budget,
            rows=options.rows,
            batch_buckets=buckets,
            ledger=BarLedger(bar=bar),
        ):
            if step.best:
                bar.set_postfix(best=f"{step.best[0]:.3f}")
    result = step.result
    if result.finished is None:
        raise result.error or RuntimeError(f"the search stopped ({result.stopped}) before a candidate was finished")
    drift = (
        regenerate(job.sampler, job.request, result.winners()).drift if options.exact and result.error is None else None
    )
    ranking = result.ranking
    images = {c["id"]: to_pil(result.samples[0, c["id"]][None])[0] for c in ranking}
    first = next((c for c in ranking if c["id"] == "0"), None)
    if first is None:
        plain = Job.of(pipe, make_baseline(), prompt, generator=torch.Generator().manual_seed(options.seed), **call)
        *_, last = run_search(plain.sampler, reward, make_baseline(), plain.request)
        first = last.result.ranking[0]
        images["0"] = to_pil(last.result.samples[0, "0"][None])[0]
    for judge in held_out:
        pair = torch.stack([torch.as_tensor(_pixels(images[c["id"]])) for c in (ranking[0], first)])
        values = judge.score(pair, [prompt] * 2, metadata=[None] * 2).values.tolist()
        for candidate, value in zip((ranking[0], first), values, strict=True):
            candidate.setdefault("held_out", {})[judge.name] = value
    notes = {judge.name: getattr(judge, "note", "") for judge in held_out}
    return Found(plan.search, step.state.price, reward, result, ranking[0], first, images, call, notes, drift)


def make_baseline() -> Any:
    """One plain sample."""
    from visearch.search.best_of_n import BestOfN

    return BestOfN(n=1)


def _pixels(image: Any) -> Any:
    import numpy as np

    return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available here ({_one_line(error)}); use --device cpu") from error
    return name


def _load(options: argparse.Namespace, device: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device, and the arguments of its call."""
    import torch

    dtype = getattr(torch, options.dtype) if options.dtype else torch.float32 if device == "cpu" else torch.float16
    call: dict[str, Any] = {}
    if options.model in MODELS:
        from visearch.pipelines import emoji

        pipe = MODELS.load(options.model)(dtype=dtype)
        call |= emoji.DEFAULTS
    else:
        pipe = _load_diffusers(options.model, dtype)
    if options.offload and device == "cpu":
        raise ValueError(f"--offload {options.offload} needs an accelerator; leave it out on the CPU")
    if options.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    given = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "height": options.height,
        "width": options.width,
    }
    return pipe, {**call, **{k: v for k, v in given.items() if v is not None}}


def _load_diffusers(model: str, dtype: Any) -> Any:
    from diffusers import DiffusionPipeline

    if not Path(model).is_dir() and "/" not in model:
        MODELS.load(model)  # says which names are near
    try:
        return DiffusionPipeline.from_pretrained(model, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"--model {model} could not be loaded ({_one_line(error)}); give a folder or hub id of a diffusers "
            f"pipeline with safetensors weights, or one of: {', '.join(MODELS)}"
        ) from error


# --- what a run leaves behind ---------------------------------------------------------------------------------


def command_line(options: argparse.Namespace, **changes: Any) -> str:
    """The command that repeats a run, with some options changed."""
    values = {**vars(options), **changes}
    words = ["visearch", "run", values["prompt"]]
    skipped = {"command", "prompt", "out"}
    for name, value in values.items():
        if name in skipped or value is None or value is False or value == []:
            continue
        if value is True:
            words.append("--" + name.replace("_", "-"))
            continue
        for entry in value if isinstance(value, list) else [value]:
            words += ["--" + name.replace("_", "-"), str(entry)]
    return shlex.join(words)


def winner_command(options: argparse.Namespace, found: Found) -> str:
    """Regenerates the winner alone where a seed suffices, else repeats the whole search."""
    if len(found.winner["lineage"]) > 1:
        return command_line(options)
    limits = {**dict.fromkeys(("max_nfe", "max_seconds", "target", "patience")), "set": [], "exact": False}
    return command_line(options, search="best-of-n", n=1, seed=found.winner["seed"], **limits)


def _write(out: Path, options: argparse.Namespace, found: Found) -> bool:
    from visearch.report import contact_sheet, versions, write_image, write_json

    result, ranking = found.result, found.result.ranking
    captions = [f"{c['score']:.3f}  #{c['id']}\nseed {c['seed']}" for c in ranking]
    title = f"{options.prompt}   |   {options.search}, {_count(result)}, {found.reward.name}"
    content = {
        "prompt": options.prompt,
        "model": options.model,
        "call": found.call,
        "search": {"name": options.search, **dataclasses.asdict(found.search)},
        "reward": {k: getattr(found.reward, k) for k in ("name", "licence", "source", "higher_is_better")},
        "stopped": result.stopped,
        "error": None if result.error is None else repr(result.error),
        "warnings": list(result.warnings),
        "winner": found.winner,
        "baseline": found.baseline,
        "ranking": ranking,
        "pruned": result.pruned,
        "price_of_a_check": found.price,
        "ledger": result.ledger.as_dict(),
        "command": command_line(options),
        "winner_command": winner_command(options, found),
        "drift": found.drift,
        "versions": versions(),
    }
    try:
        write_json(out / "result.json", content)
        result.save(out)
        write_image(out / "winner.png", found.images[found.winner["id"]])
        write_image(out / "baseline.png", found.images["0"])
        sheet = contact_sheet([found.images[c["id"]] for c in ranking], captions, title, marked=0)
        write_image(out / "contact-sheet.png", sheet)
    except OSError as error:
        print(
            f"visearch: could not write all of {out}: {error}; make room or choose another --out, then regenerate the "
            f"winner with\n  {content['winner_command']}",
            file=sys.stderr,
        )
        return False
    print(out / "winner.png")
    return True


def _tell(options: argparse.Namespace, found: Found, written: bool) -> None:
    result = found.result
    spent = result.ledger.as_dict()
    gain = found.winner["score"] - found.baseline["score"]
    print(
        f"{found.reward.name}: {found.baseline['score']:.3f} sampled once, {found.winner['score']:.3f} searched "
        f"({gain:+.3f}); {_count(result)}, {spent['nfe']} model rows, {spent['seconds']['total']:.1f} s"
    )
    for name, value in found.winner.get("held_out", {}).items():
        once, note = found.baseline["held_out"][name], found.notes[name]
        print(f"{name} (held out): {once:.3f} sampled once, {value:.3f} searched" + (f"; {note}" if note else ""))
    if found.drift is not None:
        print(f"run again in the same batch sizes, the winner's latents differ by at most {found.drift:.3g}")
    if result.stopped != "done":
        reason = {"interrupted": "interrupted by Ctrl-C", "failed": f"stopped: {_one_line(result.error or '')}"}
        print(f"{reason.get(result.stopped, f'stopped: {result.stopped}')}; the best of what was finished is kept")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _count(result: Any) -> str:
    finished, pruned = len(result.ranking), len(result.pruned)
    return f"{finished} of {finished + pruned} candidates finished" if pruned else f"{finished} candidates"


def _slug(text: str) -> str:
    words = "".join(c if c.isalnum() else "-" for c in text.lower()).split("-")
    return "-".join(w for w in words if w)[:60] or "run"


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- visearch demo --------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from visearch.demo import run_demo
    from visearch.report import check_folder

    if options.n < 2:
        raise ValueError(f"--n {options.n} must be at least 2 to compare a search with one sample")
    return run_demo(options.n, options.seed, check_folder(options.out))
