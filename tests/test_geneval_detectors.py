"""``visearch geneval score`` with GenEval's detector and colours, the real classes at tiny size with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mask2formers import as_mmdet, tiny_config, tiny_model
from PIL import Image, ImageColor
from test_geneval_score import make_folder

from visearch import geneval
from visearch.geneval.score import read_meta
from visearch.rewards.colours import ClipColors
from visearch.rewards.mask2former import Mask2Former

SIDE, TINTS = 64, ("red", "gold", "blue")


@pytest.fixture(scope="module")
def model():
    """So sure of its classes that scores pass the thresholds."""
    model = tiny_model()
    with torch.no_grad():
        model.class_predictor.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("facebook")
    model.save_pretrained(path)
    return path


@pytest.fixture
def small(monkeypatch):
    """The command alone reads and writes the published size: here images are 64 pixels, the model a tiny one."""
    monkeypatch.setattr("visearch.rewards.mask2former.SHORT", SIDE)
    monkeypatch.setattr("visearch.rewards.mask2former_convert.published_config", tiny_config)


def seen(images: list[Path], folder: Path, clip: str) -> list[dict[str, list[tuple[list[float], str]]]]:
    """Image -> class -> boxes with scores and colours of the kept instances, best first, without the command."""
    detector, colors = Mask2Former(folder, "tiny", "tests only"), ClipColors(clip)
    found = []
    for path in images:
        image = Image.open(path).convert("RGB")
        kept: dict[str, list] = {}
        for one in sorted(detector.detect([image])[0], key=lambda one: -one.score):
            if one.score > 0.3:
                kept.setdefault(detector.class_names[one.label], []).append(one)
        found.append(
            {
                name: [([*i.box, i.score], c) for i, c in zip(ones, colors.classify(image, name, ones), strict=True)]
                for name, ones in kept.items()
            }
        )
    return found


def lines_for(found: list[dict]) -> list[dict]:
    """Of each image: asked for what is there, for its colour, for another colour, and for what is not there."""
    lines = []
    for classes in found:
        name, ((_, color), *_) = next(iter(classes.items()))
        other = next(c for c in geneval.COLORS if c != color)
        absent = next(n for n in geneval.class_names() if n not in classes)
        for tag, more in (
            ("single_object", {"class": name}),
            ("colors", {"class": name, "color": color}),
            ("colors", {"class": name, "color": other}),
            ("single_object", {"class": absent}),
        ):
            words = f"a photo of a {more.get('color', '')} {more['class']}".replace("  ", " ")
            lines.append({"tag": tag, "include": [{**more, "count": 1}], "prompt": words})
    return lines


def rows_of(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def check_rows(rows: list[dict], found: list[dict]) -> None:
    """Boxes are the detector's, verdicts and reasons those of its boxes and the CLIP's colours."""
    assert all(found) and [row["correct"] for row in rows] == [True, True, False, False] * len(found)
    for p, row in enumerate(rows):
        boxes = json.loads(row["details"])
        assert boxes == {
            name: [pytest.approx(box, abs=1e-4) for box, _ in ones[:16]] for name, ones in found[p // 4].items()
        }
        asked = json.loads(row["metadata"])["include"][0]
        if p % 4 == 2:
            right = json.loads(rows[p - 1]["metadata"])["include"][0]["color"]
            expected = f"{asked['color']} {asked['class']}>=1, found 0 {asked['color']}; and 1 {right}"
            assert row["reason"] == f"expected {expected}"
        if p % 4 == 3:
            assert row["reason"] == f"expected {asked['class']}>=1, found 0"


def check_alike(rows: list[dict], others: list[dict]) -> None:
    """All but the name of the settings is equal; boxes and scores up to how weights were stored."""
    for row, other in zip(rows, others, strict=True):
        boxes, found = json.loads(row.pop("details")), json.loads(other.pop("details"))
        assert row.pop("config") != other.pop("config") and row == other and boxes.keys() == found.keys()
        for name, ones in boxes.items():
            assert found[name] == [pytest.approx(one, abs=1e-3) for one in ones]


def test_the_real_classes_from_images_to_summaries(step, small, model, folder, quick_gelu_clip, tmp_path):
    """The command finds what detector and CLIP find by themselves; weights in either layout give the same verdicts."""
    pictures = [tmp_path / f"{tint}.png" for tint in TINTS]
    for path, noise in zip(pictures, np.random.default_rng(0).integers(-40, 40, (len(TINTS), SIDE, SIDE, 3))):
        Image.fromarray((ImageColor.getrgb(path.stem) + noise).clip(0, 255).astype(np.uint8)).save(path)
    found = seen(pictures, folder, quick_gelu_clip)
    root = make_folder(tmp_path / "images", lines_for(found), images=0)
    for p, line in enumerate(sorted(root.glob("[0-9]*"))):
        (line / "samples" / "00000.png").write_bytes(pictures[p // 4].read_bytes())
    source, converted = tmp_path / "mmdet.pth", tmp_path / "converted"
    torch.save({"meta": {"epoch": 50}, "state_dict": as_mmdet(model.state_dict())}, source)
    assert step("convert", source, converted)[0] == 0
    results = {}
    for name, path in (("facebook", folder), ("mmdet-converted", converted)):
        results[name] = tmp_path / f"{name}.jsonl"
        words = ("score", root, "--detector", name, "--detector-path", path, "--outfile", results[name])
        words += ("--options", f"clip_model={quick_gelu_clip}", "--images-per-prompt", 1, "--device", "cpu")
        status, _, err = step(*words)
        assert status == 0 and "not comparable" in err
    check_rows(rows_of(results["facebook"]), found)
    check_alike(*map(rows_of, results.values()))
    assert "not comparable on counting" in read_meta(results["facebook"])["comparability"]
    assert "not comparable with published" in read_meta(results["mmdet-converted"])["comparability"]
    for path in results.values():
        status, out, _ = step("summary", path)
        assert status == 0 and "Total images: 12" in out and "% correct images: 50.00%" in out
        assert "single_object    = 50.00% (3 / 6)" in out and "colors           = 50.00% (3 / 6)" in out
        assert "Overall score (avg. over tasks): 0.50000" in out
    assert step("summary", *results.values())[0] == 4  # two detectors are never summed up together
