"""Fixtures that tests of several files share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest


@pytest.fixture
def step(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run ``visearch geneval ...``; returns (exit status, standard output, standard error)."""
    from visearch.cli import main

    def call(*words):
        status = main(["geneval", *map(str, words)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


@pytest.fixture(scope="session")
def quick_gelu_clip(tmp_path_factory) -> str:
    """open_clip's name of the embedded world's CLIP with QuickGELU in place of its GELU."""
    from visearch import assets

    folder = tmp_path_factory.mktemp("clip") / "clip"
    shutil.copytree(assets.path("emoji-64/clip"), folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["quick_gelu"] = True
    path.write_text(json.dumps(config))
    return f"local-dir:{folder}"
