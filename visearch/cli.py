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

from visearch import __version__, calibrate, catalogue, compare, record, support, train_reward
from visearch.app import command as app
from visearch.diversity import METHODS
from visearch.geneval import command as geneval
from visearch.options import (
    add_command,
    budget_arguments,
    device_of,
    load,
    model_arguments,
    one_line,
    preview_arguments,
    reward_arguments,
)
from visearch.search import SEARCHES, describe, parse

__all__ = ["main"]

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

SEARCH_HELP = (
    "a name, or one with hyperparameters, which may be searches: 'halving(n=16)', \"refine(first=halving(n=12), "
    f'then=zero-order(k=4))"; names: {", ".join(SEARCHES)}'
)

RUN_EXAMPLES = """
examples:
  visearch run "a photo of two cows"
      eight candidates of the embedded model, the best by its CLIP
  visearch run "a photo of a red car" --n 32 --max-seconds 20 --held-out judge-a
      at most 20 seconds; judge A scores baseline and winner, the search never sees it
  visearch run "a photo of two cows" --search halving --n 16 --set preset=psp
      sixteen begin; after a quarter and after half of the steps the worse half by preview is dropped
  visearch run "a photo of two cows" --n 16 --images 4 --diversity greedy
      four of sixteen that are good and unlike each other
  visearch run "a photo of two cows" --search "cached-drafts(search=halving(n=16), m=2)"
      searches nest: pruned drafts with a step cache, the two best run again in full
  visearch run "a cat" --model stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 --offload model \\
      --reward open-clip:ViT-H-14/laion2b_s32b_b79k
      any diffusers pipeline by hub id or folder, any open_clip model as reward
  visearch run "a cat" --model PATH --reward "average-rank(pick-score, image-reward)" --held-out vqa-score
      two rewards guide, a judge of another family watches; "pick-score + 2 * image-reward" is their weighted sum
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
        print(f"visearch: {one_line(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("visearch: interrupted before anything was finished", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (RuntimeError, OSError) as error:
        print(f"visearch: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("visearch", description="Search at inference time instead of sampling once.")
    parser.add_argument("--version", action="version", version=f"visearch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_run(commands)
    _add_demo(commands)
    support.add_parser(commands)
    catalogue.add_parser(commands)
    calibrate.add_parser(commands)
    compare.add_parser(commands)
    record.add_parser(commands)
    geneval.add_parser(commands)
    train_reward.add_parser(commands)
    app.add_parser(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = add_command(
        commands,
        "run",
        _run,
        help="search for one prompt and keep baseline, winner and every candidate",
        description="Search for one prompt. Writes winner.png, baseline.png (same seed, sampled once), image-1.png to "
        "image-K.png where several are kept, contact-sheet.png, winner.safetensors (its latents) and result.json, "
        "which holds the command that regenerates the winner.",
        examples=RUN_EXAMPLES,
    )
    run.add_argument("prompt", help="what the image should show")
    model_arguments(run).add_argument(
        "--batch-buckets",
        type=_sizes,
        metavar="B,B,...",
        help="the only numbers of candidates in one model call, such as 1,2,4,8, for compiled models",
    )
    what = run.add_argument_group("search")
    what.add_argument("--search", default="best-of-n", metavar="SEARCH", help=SEARCH_HELP)
    what.add_argument("--n", type=int, help="candidates (default: the search's own, 8 for best-of-n)")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a hyperparameter of the search, such as preset=psp or calls=.4,.7; may be repeated",
    )
    reward_arguments(what)
    preview_arguments(what)
    what.add_argument("--images", type=int, metavar="K", help="images to keep (default 1)")
    what.add_argument(
        "--diversity",
        metavar="METHOD",
        help=f"keep a set of good ones that differ, not the best K: {', '.join(METHODS)}",
    )
    what.add_argument(
        "--features",
        metavar="NAME",
        help="what images are compared by, there and in rules of a search: thumbnails, or a reward with an image "
        "encoder (default: the reward's own, or thumbnails)",
    )
    budget_arguments(run)
    run.add_argument("--seed", type=int, default=0, help="of candidate 0, and all others (default %(default)s)")
    run.add_argument(
        "--exact",
        action="store_true",
        help="afterwards run the winner again, in the batch sizes that carried it, and tell how far it drifts",
    )
    run.add_argument("--out", metavar="DIR", help="folder for the results (default outputs/<prompt>)")


def _add_demo(commands: Any) -> None:
    demo = add_command(
        commands,
        "demo",
        _demo,
        help="three prompts of the embedded world: sampled once, searched, and judged",
        description="Runs three prompts on the embedded model, once and as best-of-N, and lets three judges that the "
        "search never saw decide. Needs no network.",
    )
    demo.add_argument("--n", type=int, default=8, help="candidates (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    demo.add_argument("--out", default="outputs/demo", metavar="DIR", help="folder (default %(default)s)")


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
    for name in ("steps", "height", "width", "rows", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed} must lie in [0, 2^63)")
    if options.diversity and (options.images or 1) < 2:
        raise ValueError(f"--diversity {options.diversity} chooses several images; give --images of at least 2")
    from visearch.budget import Budget
    from visearch.diversity import Keep
    from visearch.wrap import make_search

    Keep.of(options.diversity)  # refused before anything is loaded
    n = {} if options.n is None else {"n": options.n}
    search = make_search(options.search, **n, **_hyperparameters(options))
    budget = Budget(
        options.max_nfe,
        options.max_seconds,
        options.target,
        options.patience,
        options.max_images,
        max_memory=options.max_memory,
        min_gain=options.min_gain,
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
    known = [f.name for f in dataclasses.fields(parse(options.search))]
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
    is how far the winner's latents were off when it was run again, ``None`` where it was not; ``chosen`` are the ids of
    the images to keep, best first, where several are; ``report`` holds winner and baseline before the judges.
    """

    search: Any
    price: float | None
    reward: Any
    result: Any
    winner: dict[str, Any]
    baseline: dict[str, Any]
    images: dict[str, Any]
    call: dict[str, Any]
    report: Any
    drift: float | None = None
    chosen: tuple[str, ...] = ()


def search_once(options: argparse.Namespace, prompt: str, search: Any, budget: Any, pipe: Any = None) -> Found:
    """Run a search for one prompt with a progress bar.

    Raises:
        ValueError: unknown model, reward or device; a budget too small.
        RuntimeError, KeyboardInterrupt: it ended before one candidate was finished.
    """
    import torch
    from tqdm.auto import tqdm

    from visearch.monitor import check_held_out
    from visearch.pipelines.previews import PreviewDecoder
    from visearch.prompts import check_judgeable
    from visearch.rewards import resolve
    from visearch.rewards.features import resolve_features
    from visearch.rewards.images import to_pil
    from visearch.run import regenerate, run_search
    from visearch.search.nesting import view_of
    from visearch.wrap import BarLedger, Job

    buckets = options.batch_buckets and [int(size) for size in options.batch_buckets.split(",")]
    device = device_of(options.device)
    reward = resolve(options.reward, device)
    features = resolve_features(options.features, reward, device)
    held_out = [resolve(name, device) for name in options.held_out]
    check_held_out([reward], held_out)
    check_judgeable(held_out, [{"prompt": prompt}])
    pipe, call = load(options, device) if pipe is None else pipe
    generator = torch.Generator().manual_seed(options.seed)
    previews = PreviewDecoder(pipe, options.preview, options.preview_decoder)
    job = Job.of(pipe, search, prompt, budget=budget, generator=generator, previews=previews, **call)
    plan, kept = search.plan(job.sampler, budget.rows_a_prompt(job.sampler, 1)), options.images or 1
    if plan.finals < kept:
        raise ValueError(f"--images {kept}: the search finishes {plan.finals}; raise --n or the budget, or prune less")
    with tqdm(total=plan.nfe, desc=options.search, unit="row") as bar:
        for step in run_search(
            job.sampler,
            reward,
            search,
            job.request,
            budget,
            rows=options.rows,
            batch_buckets=buckets,
            ledger=BarLedger(bar=bar),
            features=features,
        ):
            if step.best:
                bar.set_postfix(best=f"{step.best[0]:.3f}")
    result = step.result
    if result.finished is None:
        raise result.error or RuntimeError(f"the search stopped ({result.stopped}) before a candidate was finished")
    drift = None
    if options.exact and result.error is None:
        drift = regenerate(view_of(plan.search, job.sampler), job.request, result.winners()).drift
    ranking, several = result.ranking, result.winners(kept)
    if options.diversity:
        several = result.diverse(kept, features, options.diversity)
    images = {c["id"]: to_pil(result.samples[0, c["id"]][None])[0] for c in ranking}
    with torch.no_grad():  # as SearchPipeline returns them: kernels may round otherwise in the batches of the search
        images.update(zip(several.id, to_pil(job.sampler.decode(several)), strict=True))
    report, first, sample = _judged(job, plan.search, reward, held_out, result, ranking)
    images["plain"] = to_pil(sample[None])[0]
    return Found(
        plan.search, step.state.price, reward, result, ranking[0], first, images, call, report, drift, several.id
    )


def _judged(
    job: Any, search: Any, reward: Any, held_out: Sequence[Any], result: Any, ranking: Sequence[dict[str, Any]]
) -> tuple[Any, dict[str, Any], Any]:
    """The report, the baseline as an entry of a ranking, and its sample; the entries get what the judges say."""
    from visearch.monitor import baselines, judged
    from visearch.run import SearchResult

    found, ledger = baselines(job.sampler, search, reward, result)
    report, _ = judged(reward, held_out, result, found, ledger)
    (drawn,) = SearchResult(job.request, found[0].row, ledger, "done").ranking
    first = next((c for c in ranking if c["id"] == found[0].id), drawn)
    for view in report.judges:
        for candidate, (value,) in ((first, view.base), (ranking[0], view.picked)):
            candidate.setdefault("held_out", {})[view.name] = value
    return report, first, found[0].sample


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
    limits = ("max_nfe", "max_images", "max_seconds", "target", "patience", "min_gain")
    unused = dict.fromkeys((*limits, "images", "diversity", "features", "preview", "preview_decoder"))
    changes = {**unused, "set": [], "exact": False}
    return command_line(options, search="best-of-n", n=1, seed=found.winner["seed"], **changes)


def _write(out: Path, options: argparse.Namespace, found: Found) -> bool:
    from visearch.report import contact_sheet, versions, write_image, write_json

    result, ranking, text = found.result, found.result.ranking, describe(found.search)
    captions = [f"{c['score']:.3f}  #{c['id']}\nseed {c['seed']}" for c in ranking]
    title = f"{options.prompt}   |   {options.search}, {_count(result)}, {found.reward.name}"
    content = {
        "prompt": options.prompt,
        "model": options.model,
        "call": found.call,
        "search": {"name": text.partition("(")[0], "text": text, **dataclasses.asdict(found.search)},
        "reward": {k: getattr(found.reward, k) for k in ("name", "licence", "source", "higher_is_better")},
        "stopped": result.stopped,
        "error": None if result.error is None else repr(result.error),
        "warnings": [*result.warnings, *found.report.warnings],
        "report": found.report.as_dict(),
        "winner": found.winner,
        "images": found.chosen,
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
        for place, name in enumerate(found.chosen if len(found.chosen) > 1 else (), 1):
            write_image(out / f"image-{place}.png", found.images[name])
        write_image(out / "baseline.png", found.images["plain"])
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
    (once,), (best,) = found.report.guided.base, found.report.guided.picked
    print(
        f"{found.reward.name}: {once:.3f} sampled once, {best:.3f} searched ({best - once:+.3f}); {_count(result)}, "
        f"{spent['nfe']} model rows, {spent['seconds']['total']:.1f} s"
    )
    if found.report.judges:
        print(found.report)
    if found.drift is not None:
        print(f"run again in the same batch sizes, the winner's latents differ by at most {found.drift:.3g}")
    if result.stopped != "done":
        reason = {"interrupted": "interrupted by Ctrl-C", "failed": f"stopped: {one_line(result.error or '')}"}
        print(f"{reason.get(result.stopped, f'stopped: {result.stopped}')}; the best of what was finished is kept")
    for warning in (*result.warnings, *found.report.warnings):
        print(f"warning: {warning}", file=sys.stderr)


def _count(result: Any) -> str:
    finished, pruned = len(result.ranking), len(result.pruned)
    return f"{finished} of {finished + pruned} candidates finished" if pruned else f"{finished} candidates"


def _slug(text: str) -> str:
    words = "".join(c if c.isalnum() else "-" for c in text.lower()).split("-")
    return "-".join(w for w in words if w)[:60] or "run"


# --- visearch demo --------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from visearch.demo import run_demo
    from visearch.report import check_folder

    if options.n < 2:
        raise ValueError(f"--n {options.n} must be at least 2 to compare a search with one sample")
    return run_demo(options.n, options.seed, check_folder(options.out))
