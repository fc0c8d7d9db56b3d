"""``visearch geneval export``: the images of a folder in the layouts of benchmarks whose scorers are their own."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from visearch.geneval.folder import PromptFolder, read_folder
from visearch.journal import replace_text

__all__ = ["LAYOUTS", "geneval2", "t2i_compbench"]


def geneval2(folders: Sequence[PromptFolder], out: Path) -> int:
    """One JSON object, prompt -> path of its first image, as GenEval 2 (arXiv 2512.16853) reads it.

    Returns:
        prompts without an image.

    Raises:
        ValueError: a prompt that is there twice.
    """
    paths: dict[str, str] = {}
    for folder in folders:
        prompt = folder.line["prompt"]
        if prompt in paths:
            raise ValueError(f"{folder.path}: prompt {prompt!r} is there twice, and GenEval 2 knows images by prompts")
        if folder.images:
            paths[prompt] = str(folder.images[min(folder.images)].absolute())
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, json.dumps(paths, indent=1))
    return len(folders) - len(paths)


def t2i_compbench(folders: Sequence[PromptFolder], out: Path) -> int:
    """Copies named ``samples/PROMPT_000000.png`` with a running number, as T2I-CompBench (arXiv 2307.06350) reads them.

    Returns:
        prompts without an image.

    Raises:
        ValueError: a prompt that cannot be told from such a name.
    """
    for folder in folders:
        if set("_/") & set(folder.line["prompt"]):
            raise ValueError(
                f"{folder.path}: prompt {folder.line['prompt']!r} has a '_' or '/', which the names of T2I-CompBench "
                "cannot hold; leave it out"
            )
    (out / "samples").mkdir(parents=True, exist_ok=True)
    images = [(folder, path) for folder in folders for _, path in sorted(folder.images.items())]
    for number, (folder, path) in enumerate(images):
        shutil.copyfile(path, out / "samples" / f"{folder.line['prompt']}_{number:06d}.png")
    return sum(not folder.images for folder in folders)


LAYOUTS: dict[str, Callable[[Sequence[PromptFolder], Path], int]] = {
    "geneval2": geneval2,
    "t2i-compbench": t2i_compbench,
}


def run(options: argparse.Namespace) -> int:
    """Prompts without an image."""
    return LAYOUTS[options.layout](read_folder(Path(options.imagedir), judged=False), Path(options.out))
