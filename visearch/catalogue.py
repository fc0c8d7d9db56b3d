"""``visearch rewards``: which rewards there are, what they were trained on, and where their weights come from."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from visearch.options import add_command
from visearch.rewards import CLASSES, REWARDS

__all__ = ["add_parser", "facts"]

COLUMNS = ("name", "family", "parameters", "range", "held out for GenEval", "licence", "training data")
DESCRIBED = (
    "family",
    "modality",
    "range",
    "scale",
    "higher_is_better",
    "licence",
    "training_data",
    "size",
    "source",
    "needs_prompt",
)
LISTED = ("needs", "not_held_out_for", "files")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

EXAMPLES = """
examples:
  visearch rewards                  all of them; none is loaded, but those that come with this package
  visearch rewards pick-score       one in full, with how to get its weights
  visearch rewards --json           for scripts

Beside these: open-clip:MODEL/PRETRAINED for any open_clip model, package.module:Name for a reward of your own.
A reward that guides a search should be judged by one of another family, trained on other data. "Held out for GenEval"
says whether GenEval's own judge is independent of it.
"""


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = add_command(
        commands,
        "rewards",
        _rewards,
        help="which rewards there are, under which licence, and where their weights come from",
        description="Prints what is known of every reward that has a name.",
        examples=EXAMPLES,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one reward, in full")
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")


def facts(name: str) -> dict[str, Any]:
    """What a reward says of itself, JSON-able; ``"missing"`` says why one that ships cannot be loaded here.

    Classes are read without being loaded. What a function makes comes with the package, and is made.

    Raises:
        ValueError: unknown name; near ones are suggested.
    """
    factory, missing = REWARDS.load(name), None
    described = factory
    if not inspect.isclass(factory):
        try:
            described = factory()
        except (ImportError, FileNotFoundError) as error:
            described, missing = None, str(error)
    known = {key: getattr(described, key, None) for key in DESCRIBED}
    known |= {key: sorted(getattr(described, key, ())) for key in LISTED}
    about = inspect.cleandoc((factory if inspect.isclass(factory) else type(described)).__doc__ or "")
    return {"name": name, **known, "about": about, "missing": missing}


def _rewards(options: argparse.Namespace) -> int:
    known = [facts(name) for name in ([options.name] if options.name else REWARDS)]
    if options.json:
        print(json.dumps(known, indent=1))
    elif options.name:
        print(_in_full(known[0]))
    else:
        _print([COLUMNS, *(_row(each) for each in known)])
    return 0


def _row(known: dict[str, Any]) -> tuple[str, ...]:
    if known["missing"]:
        return (known["name"], "", "", "", "", "", known["missing"])
    return (
        known["name"],
        known["family"] or "",
        _count(known["size"]),
        _range(known["range"]),
        _held_out(known["not_held_out_for"]),
        (known["licence"] or "").split(" (")[0],
        known["training_data"] or "",
    )


def _count(parameters: int | None) -> str:
    return "-" if not parameters else f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _range(bounds: Sequence[float] | None) -> str:
    return "" if bounds is None else " to ".join(f"{bound:g}" for bound in bounds)


def _held_out(shared: Sequence[str]) -> str:
    """Whether GenEval's judge is independent of a reward that shares what ``shared`` names."""
    if "GenEval" in shared:
        return "no"
    parts = [name.removeprefix("GenEval's ") for name in shared if name.startswith("GenEval's ")]
    return f"but for {', '.join(parts)}" if parts else "yes"


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _in_full(known: dict[str, Any]) -> str:
    lines = {
        "family": known["family"],
        "scores": known["modality"],
        "scale": known["scale"],
        "range": _range(known["range"]) + ("" if known["higher_is_better"] else ", lower is better"),
        "prompt": "ignored" if known["needs_prompt"] is False else "read",
        "parameters": _count(known["size"]),
        "licence": known["licence"],
        "training data": known["training_data"],
        "GenEval": f"held out: {_held_out(known['not_held_out_for'])}",
        "needs": ", ".join(known["needs"]),
        "source": known["source"],
        "missing": known["missing"],
    }
    text = "\n".join(f"  {label:14} {value}" for label, value in lines.items() if value)
    return f"{known['name']}\n\n{known['about']}\n\n{text}\n{_weights(known)}"


def _weights(known: dict[str, Any]) -> str:
    """How to get them."""
    name, source, files = known["name"], known["source"], known["files"]
    if not files:
        return ""
    use = f"  --reward {name}:FOLDER, or {_class_of(name)}('FOLDER') in Python"
    if HUB_ID.fullmatch(source):
        wanted = [glob.split("|")[0] for glob in files]
        include = " ".join(f"--include {shlex.quote(glob)}" for glob in wanted)
        return (
            f"\nweights: --reward {name} downloads them; without a network, elsewhere\n"
            f"  hf download {source} {include} --local-dir FOLDER\nthen\n{use}\n"
        )
    return f"\nweights: put {', '.join(files)} of\n  {source}\ninto FOLDER, then\n{use}\n"


def _class_of(name: str) -> str:
    factory = REWARDS.load(name).__name__
    return f"visearch.rewards.{factory}" if factory in CLASSES else factory
