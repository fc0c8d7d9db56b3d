"""Files of prompts, and which part of them a process works on: for all commands that run over many."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visearch.protocols import Request, Reward, stable_hash

__all__ = [
    "PROMPTS_HELP",
    "check_judgeable",
    "metadata_of",
    "read_prompts",
    "request_of",
    "seed_of",
    "share_arguments",
    "spread",
]

SETS = ("validation", "report", "geneval")
PROMPTS_HELP = "a text file with one prompt a line, a file of GenEval's JSON lines, or an embedded set: " + ", ".join(
    SETS
)


def read_prompts(source: str) -> list[dict[str, Any]]:
    """Lines with ``prompt`` from a text file, GenEval's JSON lines, or an embedded set by name.

    Raises:
        ValueError: neither a file nor a set; no prompt in it; a line of JSON that breaks GenEval's schema.
    """
    if source == "geneval":
        from visearch.geneval import load_prompts

        return load_prompts()
    if source in SETS:
        from visearch.assets import scenes

        return scenes.prompts(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"prompts {source!r} are no file; give a text file, GenEval's JSON lines, or {SETS}")
    if path.suffix == ".jsonl":
        from visearch.geneval import load_prompts

        lines = load_prompts(path)
    else:
        texts = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        lines = [{"prompt": text} for text in texts if text]
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


def spread(count: int, limit: int | None = None, shard: tuple[int, int] = (1, 1)) -> list[int]:
    """Prompts spread evenly over a file, in an order of which every beginning and every part covers all kinds.

    Args:
        count: prompts in the file.
        limit: most prompts, of all parts together.
        shard: (i, n): only part i of n, from 1.

    Raises:
        ValueError: there is no such part, or ``limit`` below 1.
    """
    _check(shard)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    chosen = np.linspace(0, count - 1, min(limit or count, count)).round().astype(int)
    return np.random.default_rng(0).permutation(chosen)[shard[0] - 1 :: shard[1]].tolist()


def seed_of(prompt_id: int, seed: int) -> int:
    """A prompt's own seed in a job over many, from which all its candidates derive.

    A noise that serves all prompts would tie their results together, and intervals over prompts would be too narrow.
    """
    return stable_hash(seed, prompt_id)


def request_of(line: Mapping[str, Any], prompt_id: int, seed: int) -> Request:
    """The request for one prompt of a file, alone; its seed is :func:`seed_of`.

    Args:
        line: with ``prompt``; GenEval's lines are metadata for rewards that read it.
        prompt_id: fixed for the whole file, whatever part of it is run.
        seed: of the whole job.
    """
    own = seed_of(prompt_id, seed)
    return Request((line["prompt"],), own, prompt_ids=(prompt_id,), metadata=(metadata_of(line),))


def check_judgeable(rewards: Sequence[Reward], lines: Sequence[Mapping[str, Any]]) -> None:
    """Show a blank image to each reward that reads metadata: a prompt that it cannot judge is refused before any work.

    Raises:
        ValueError: what such a reward says.
    """
    import torch

    for reward in (r for r in rewards if "metadata" in r.needs):
        for line in lines:
            reward.score(torch.zeros(1, 3, 64, 64), [line["prompt"]], metadata=[metadata_of(line)])


def metadata_of(line: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What judges read of a prompt's line: all of GenEval's, nothing of a mere text."""
    return line if "include" in line else None


def share_arguments(parser: Any) -> None:
    """``--limit``, ``--shard`` and ``--minutes``; ``parser`` may be a group of one.

    Where ``accelerate launch`` or ``torchrun`` started several processes, each gets its part without being told.
    """
    parser.add_argument("--limit", type=int, metavar="N", help="most prompts, spread evenly over the file")
    parser.add_argument(
        "--shard",
        type=_part,
        default=_launched(),
        metavar="I/N",
        help="only part I of N, to share the work (default: all, or this process's part under accelerate launch)",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing more after M minutes")


def _launched() -> tuple[int, int]:
    """The part of this process among those that a launcher of PyTorch's started."""
    return int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1))


def _part(text: str) -> tuple[int, int]:
    if _launched()[1] > 1:
        raise argparse.ArgumentTypeError("the launcher shares the work among its processes already; leave it out")
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write it as 1/4")
    shard = int(first), int(second)
    try:
        _check(shard)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return shard


def _check(shard: tuple[int, int]) -> None:
    if not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard {shard[0]}/{shard[1]} does not exist; count from 1/{max(1, shard[1])}")
