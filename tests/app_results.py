"""Folders of judged images as ``visearch geneval`` leaves them, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

TASKS = ("counting", "colors")


def judged(root: Path, verdicts: dict[int, bool], **more: Any) -> Path:
    """One image a prompt, grey, with one box; even prompts count, odd ones are about colours."""
    rows = []
    for number, correct in verdicts.items():
        line = {"tag": TASKS[number % 2], "include": [], "prompt": f"a photo of <b>prompt</b> {number}"}
        file = root / f"{number:05d}" / "samples" / "00000.png"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (32, 32), "#808080").save(file)
        rows.append(
            {
                "filename": f"elsewhere/{number:05d}/samples/00000.png",
                "tag": line["tag"],
                "prompt": line["prompt"],
                "correct": correct,
                "reason": "" if correct else "expected cow>=1, found 0 & <i>none</i>\nexpected red cow",
                "metadata": json.dumps(line),
                "details": json.dumps({"cow": [[4.0, 8.0, 20.0, 24.0, 0.9]], "bus": []}),
                **more,
            }
        )
    (root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
