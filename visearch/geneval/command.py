"""``visearch geneval generate | score | summary | export | convert``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from visearch.geneval.export import LAYOUTS
from visearch.geneval.folder import IMAGES_PER_PROMPT
from visearch.options import add_command, model_arguments, one_line, reward_arguments, stop_arguments
from visearch.parallel import add_ray_argument
from visearch.prompts import PROMPTS_HELP, share_arguments
from visearch.search import SEARCHES

__all__ = ["add_parser"]

EXIT_OK, EXIT_MISSING, EXIT_CONFLICT, EXIT_INTERRUPTED = 0, 3, 4, 130

EXAMPLES = """
examples:
  visearch geneval generate report --limit 60 --images-per-prompt 1 --outdir outputs/once --search none
  visearch geneval generate report --limit 60 --images-per-prompt 1 --outdir outputs/best --n 8 --held-out judge-b
  visearch geneval score outputs/once --detector tiny
  visearch geneval score outputs/best --detector tiny
  visearch geneval summary outputs/best/results.jsonl --baseline outputs/once/results.jsonl
      the embedded model on 60 prompts, sampled once and as the best of eight, with intervals of the difference
  visearch geneval generate geneval --outdir outputs/sdxl --model stabilityai/stable-diffusion-xl-base-1.0 \\
      --dtype float16 --search "halving(n=16)" --reward open-clip:ViT-H-14/laion2b_s32b_b79k
      GenEval's 553 prompts with four images each; the same command again goes on after a crash
  accelerate launch --num_processes 8 -m visearch geneval generate geneval --outdir outputs/sdxl ...
      the same on eight devices of a machine; on CPUs add --multi_gpu before, --device cpu behind: accelerate's --cpu
      starts one process
  visearch geneval generate geneval --outdir outputs/sdxl ... --ray auto
      the same on a Ray cluster, whose nodes need no common disk

exit status: 0 all there, 1 failed, 2 bad arguments, 3 images are missing, 4 results that do not go together
"""


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = commands.add_parser(
        "geneval",
        help="GenEval as a batch job: make the images of a prompt file with a search, judge them, sum up",
        description="GenEval (arXiv 2310.11513) as a batch job that can be shared and goes on after a crash.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(title="steps", metavar="STEP", required=True)
    _add_generate(steps)
    _add_score(steps)
    _add_summary(steps)
    _add_export(steps)
    _add_convert(steps)


def _add_generate(steps: Any) -> None:
    parser = add_command(
        steps,
        "generate",
        partial(_step, "generate"),
        help="make the images",
        description="Makes images in GenEval's layout, each the winner of a search of its own. DIR/NUMBER/search.json "
        "tells what each took and from which seeds it came.",
    )
    parser.add_argument("prompts", metavar="PROMPTS", help=PROMPTS_HELP)
    parser.add_argument("--outdir", required=True, metavar="DIR", help="where the images go")
    model_arguments(parser)
    what = parser.add_argument_group("search")
    what.add_argument(
        "--search",
        default="best-of-n",
        metavar="SEARCH",
        help=f"none (each image sampled once), a name, or one with hyperparameters as in 'halving(n=16)': "
        f"{', '.join(SEARCHES)} (default %(default)s)",
    )
    what.add_argument("--n", type=int, help="candidates an image (default: the search's own, 8 for best-of-n)")
    reward_arguments(what)
    stop_arguments(what)
    what.add_argument(
        "--images-per-prompt", type=int, default=IMAGES_PER_PROMPT, metavar="K", help="(default %(default)s)"
    )
    what.add_argument("--seed", type=int, default=0, help="each image derives its own from it (default %(default)s)")
    job = parser.add_argument_group("the run")
    share_arguments(job)
    job.add_argument(
        "--together",
        type=int,
        metavar="P",
        help="prompts that are searched at once (default: as many as begin with 32 candidates)",
    )
    job.add_argument("--allow-missing", action="store_true", help="exit with 0 though images are missing")
    add_ray_argument(job)


def _add_score(steps: Any) -> None:
    parser = add_command(
        steps,
        "score",
        partial(_step, "score"),
        help="judge the images",
        description="Judges each image by its prompt's line, and appends a line to the results in upstream's format, "
        "with one more key, the name of the settings. Beside it, OUTFILE.meta.json tells where they come from.",
    )
    parser.add_argument("imagedir", metavar="IMAGEDIR", help="in GenEval's layout, whoever made it")
    parser.add_argument("--outfile", metavar="FILE", help="(default IMAGEDIR/results.jsonl)")
    parser.add_argument(
        "--detector",
        default="mmdet-converted",
        metavar="NAME",
        help="mmdet-converted (GenEval's own weights, see visearch geneval convert), facebook (other weights: not "
        "comparable on counting), tiny (the embedded world's judge A), tiny-b or tiny-c (default %(default)s)",
    )
    parser.add_argument("--detector-path", metavar="PATH|HUB_ID", help="its weights (default: its own)")
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="threshold, counting_threshold, max_objects, max_overlap, position_threshold; and with "
        "mmdet-converted or facebook clip_model, bgcolor, crop",
    )
    parser.add_argument("--device", help="cpu, cuda ... (default: the best there is)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="(default %(default)s)")
    parser.add_argument(
        "--images-per-prompt", type=int, metavar="K", help=f"expected (default: as made, or {IMAGES_PER_PROMPT})"
    )
    parser.add_argument("--upstream-format", action="store_true", help="leave out the key that upstream does not have")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 though images are missing")
    share_arguments(parser)
    add_ray_argument(parser)


def _add_summary(steps: Any) -> None:
    parser = add_command(
        steps,
        "summary",
        partial(_step, "outcome"),
        help="sum up",
        description="Prints the benchmark's own lines, then accuracies with 95 % intervals from resampled prompts, "
        "what an image cost, and, where generate had held-out judges, what an oracle would have chosen.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="results, in any number of parts")
    parser.add_argument("--baseline", nargs="+", metavar="FILE", help="results of another run on the same prompts")
    parser.add_argument("--prompts", metavar="PROMPTS", help=f"all of which should be there: {PROMPTS_HELP}")
    for kind in ("json", "csv", "markdown"):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the same as {kind}")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 though images are missing")


def _add_export(steps: Any) -> None:
    parser = add_command(
        steps,
        "export",
        partial(_step, "export"),
        help="give the images to another benchmark",
        description="geneval2 writes OUT, a JSON object prompt -> path; t2i-compbench copies to OUT/samples. Their "
        "prompts, as a text file, are what generate was given; their scorers are their own.",
    )
    parser.add_argument("imagedir", metavar="IMAGEDIR", help="what generate made")
    parser.add_argument("--layout", required=True, choices=list(LAYOUTS))
    parser.add_argument("--out", required=True, metavar="OUT", help="a file, or a folder")
    parser.add_argument("--allow-missing", action="store_true", help="exit with 0 though images are missing")


def _add_convert(steps: Any) -> None:
    parser = add_command(
        steps,
        "convert",
        _convert,
        help="make GenEval's detector from mmdet's checkpoint",
        description="Writes OUT, a folder for score --detector mmdet-converted --detector-path OUT, and tells in "
        "OUT/conversion.json what it was made of.",
    )
    parser.add_argument("source", metavar="SOURCE", help="mmdet's checkpoint, a .pth file")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read a file that holds more than tensors, and may run code: only one that you trust",
    )


def _convert(options: argparse.Namespace) -> int:
    from visearch.rewards.mask2former_convert import convert

    record = convert(options.source, options.out, allow_pickle=options.allow_pickle)
    print(f"{options.out}: {record['tensors']['written']} tensors of {record['source']['sha256']}")
    return EXIT_OK


def _step(module: str, options: argparse.Namespace) -> int:
    """Run a step and tell what is missing."""
    from visearch.geneval.outcome import Conflict

    run: Callable[[argparse.Namespace], int] = import_module(f"visearch.geneval.{module}").run
    try:
        missing = run(options)
    except Conflict as conflict:
        print(f"visearch: {one_line(conflict)}", file=sys.stderr)
        return EXIT_CONFLICT
    except KeyboardInterrupt:
        print("visearch: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    if missing:
        print(f"visearch: {missing} images are missing; the same command goes on", file=sys.stderr)
    return EXIT_MISSING if missing and not options.allow_missing else EXIT_OK
