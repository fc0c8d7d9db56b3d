"""``visearch pipelines``: which pipeline classes can be searched, and how well a model of yours can."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from visearch.options import add_command, device_of, load, model_arguments

__all__ = ["add_parser"]

STRATEGIES = ("batch", "rows", "whole", "refused")
EXACT_STEPS = 4

EXAMPLES = """
strategies:
  batch    candidates are stopped, dropped, copied and resumed at any step, together in one batch
  rows     the same, one candidate at a time: the class refuses batches, or its rows share random draws
  whole    candidates are drawn whole, so only best-of-n can choose among them
  refused  not searchable; the reason says why

columns:
  exact    largest difference between pruned, copied or resumed candidates and uninterrupted ones, images on [0, 1];
           0 is bit for bit; measured with tiny random models in float32 on a CPU; the limit is 1e-4, beyond it only
           where float64 shows that it is rounding (see the notes with --json)
  can      p: previews of unfinished candidates, m: moves (re-noise, perturb), s: stochastic steps on demand

examples:
  visearch pipelines Flux                     the classes whose name contains it
  visearch pipelines --strategy rows --json   for scripts
  visearch pipelines --model PATH_OR_HUB_ID   your model and settings; the denoiser does not run
  visearch pipelines --model PATH_OR_HUB_ID --exact --height 512 --width 512
      also runs about twenty short generations and compares; status 1 if anything differs

A class that is not listed may well work: ask with --model. Pipelines that need more than a prompt (images, masks) are
probed from Python: visearch.pipelines.support.probe(pipe, {"prompt": ..., "image": ...}, exact=True).
"""


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = add_command(
        commands,
        "pipelines",
        lambda options: _probe(options) if options.model else _table(options),
        help="which pipeline classes can be searched, and how exactly",
        description="Without --model, prints what was measured for diffusers' pipeline classes. With --model, loads a "
        "pipeline and finds out for it.",
        examples=EXAMPLES,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only classes whose name contains it, in any case")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="only these; may be repeated")
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
    parser.add_argument("--exact", action="store_true", help="with --model: also run the model and compare")
    parser.add_argument("--prompt", default="a photo of two cows", help="with --model (default %(default)s)")
    model_arguments(parser, default=None)


def _table(options: argparse.Namespace) -> int:
    from visearch.pipelines.support import measured_with, support_table

    if options.exact:
        raise ValueError("--exact needs --model: the table is measured already")
    rows = [
        row
        for name, row in support_table().items()
        if (not options.names or any(part.lower() in name.lower() for part in options.names))
        and (not options.strategy or row.strategy in options.strategy)
    ]
    if not rows:
        raise ValueError(
            f"no measured class matches {' '.join(options.names + (options.strategy or []))}; see them all with "
            "`visearch pipelines`, or probe yours with --model"
        )
    versions = measured_with()
    if options.json:
        print(json.dumps({"measured_with": versions, "pipelines": [row.as_dict() for row in rows]}, indent=1))
        return 0
    _print([(row.pipeline, row.strategy, _exactness(row), _can(row), row.reason or "") for row in rows])
    counts = Counter(row.strategy for row in rows)
    tally = ", ".join(f"{counts[s]} {s}" for s in STRATEGIES if counts[s])
    exact = sum(row.verdict == "exact" for row in rows)
    print(f"\n{len(rows)} classes: {tally}; {exact} exact. Measured with "
          f"{', '.join(f'{k} {v}' for k, v in versions.items())}.")  # fmt: skip
    return 0


def _probe(options: argparse.Namespace) -> int:
    from visearch.pipelines.support import probe

    if options.names or options.strategy:
        raise ValueError("names and --strategy choose lines of the table; leave them out with --model")
    if not options.prompt.strip():
        raise ValueError(f"--prompt {options.prompt!r} is empty; say what the image should show")
    pipe, call = load(options, device_of(options.device))
    known = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in known:
        call = {"prompt": options.prompt, **call}
    if options.exact and options.steps is None and "num_inference_steps" in known:
        call["num_inference_steps"] = EXACT_STEPS
    found = probe(pipe, call, exact=options.exact, progress=lambda what: print(f"... {what}", file=sys.stderr))
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print(f"{found.pipeline}: {found.strategy}" + (f" ({found.reason})" if found.reason else ""))
        if found.strategy != "refused":
            print(f"  {found.stages} stages, {found.nfe} model rows a candidate, {found.peak_rows} at once")
            print(f"  noise levels {'known' if found.levels else 'unknown: no previews, no moves'}")
        if options.exact and found.strategy != "refused":
            print(f"  {found.verdict}: {_exactness(found)}; can: {_can(found) or 'nothing more'}")
            for name, value in found.differences.items():
                print(f"    {name:10} {value:.2g}")
        for note in found.notes:
            print(f"  note: {note}")
    return int(found.strategy == "refused" or found.verdict in ("wrong", "failed"))


def _exactness(row: Any) -> str:
    if row.verdict != "exact":
        return row.verdict if row.strategy != "refused" else "-"
    return f"{max((v for k, v in row.differences.items() if k != 'apart'), default=0.0):.1g}"


def _can(row: Any) -> str:
    marks = {"p": row.preview, "m": row.renoise and row.perturb, "s": row.stochastic}
    return "".join(mark for mark, works in marks.items() if works)


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    heads = ("pipeline", "strategy", "exact", "can", "why not batch")
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(4)]
    for row in (heads, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[4][:100]]).rstrip())
