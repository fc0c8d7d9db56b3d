"""GenEval's detector: mmdet's steps on images and masks against slow references, and its checkpoint converted."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask2formers import as_mmdet, tiny_config, tiny_model
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from visearch.cli import main
from visearch.rewards.detection import DETECTORS
from visearch.rewards.mask2former import (
    CHECKPOINT_SHA256,
    MEAN,
    RECORD,
    STD,
    Mask2Former,
    instances_of,
    model_input,
)
from visearch.rewards.mask2former_convert import UNUSED, convert, published_config, renamed


@pytest.fixture(scope="module")
def model() -> Mask2FormerForUniversalSegmentation:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("facebook")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def detector(folder) -> Mask2Former:
    return Mask2Former(folder, "tiny", "tests only")


@pytest.fixture
def small(monkeypatch):
    """Images are made 64 pixels high, so that the model runs in no time."""
    monkeypatch.setattr("visearch.rewards.mask2former.SHORT", 64)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


# --- from an image to the model: traps 1 to 3 of the stock processor ------------------------------------------------


def bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centres, two neighbours on each axis whatever the scale; float64."""

    def axis(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, source - 1), at - low

    top, bottom, down = axis(image.shape[0], height)
    left, right, across = axis(image.shape[1], width)
    across = across[None, :, None] if image.ndim == 3 else across[None]
    down = down[:, None, None] if image.ndim == 3 else down[:, None]
    rows = image[:, left] * (1 - across) + image[:, right] * across
    return rows[top] * (1 - down) + rows[bottom] * down


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((1024, 576), (750, 1333), (768, 1344)),
        ((576, 1024), (1333, 750), (1344, 768)),
        ((640, 480), (800, 1067), (800, 1088)),
    ],
)
def test_images_keep_their_shape_and_are_padded(size, resized, padded):
    """Not 384 x 384, and not stretched to multiples of 32."""
    inputs, found = model_input(torch.zeros(1, 3, size[1], size[0], dtype=torch.uint8))
    assert found == resized and tuple(inputs.shape) == (1, 3, *padded)


@pytest.mark.parametrize("size", [(90, 50), (1500, 700)])
def test_pixels_are_resized_without_antialiasing_and_rounded(size):
    image = noise(*size)
    inputs, (height, width) = model_input(pixels_of(image))
    expected = bilinear(np.array(image).astype(float), height, width)
    mean, std = np.array(MEAN), np.array(STD)
    found = inputs[0, :, :height, :width].permute(1, 2, 0).double().numpy() * std + mean
    assert np.abs(found - found.round()).max() < 1e-3
    off = np.abs(found.round() - expected)
    assert off.max() < 0.55  # the half of rounding, and positions in float32
    grey = inputs[0].permute(1, 2, 0).double().numpy() * std + mean
    assert np.allclose(grey[height:], 128, atol=1e-4) and np.allclose(grey[:, width:], 128, atol=1e-4)


# --- from masks to instances: traps 4 to 6 --------------------------------------------------------------------------


def slow_instances(classes, masks, padded, resized, original) -> list[tuple]:
    """(label, score, box, mask) of every pair, most probable first, in float64."""
    exponents = np.exp(classes - classes.max(1, keepdims=True))
    table = exponents / exponents.sum(1, keepdims=True)
    pairs = [(table[q, c], q, c) for q in range(len(table)) for c in range(table.shape[1] - 1)]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        whole = bilinear(masks[query], *padded)[: resized[0], : resized[1]]
        logits = bilinear(whole, *original)
        mask = np.zeros(original, dtype=bool)
        total = 0.0
        for row in range(original[0]):
            for column in range(original[1]):
                if logits[row, column] > 0:
                    mask[row, column] = True
                    total += 1 / (1 + math.exp(-logits[row, column]))
        box = (0.0, 0.0, 0.0, 0.0)
        if mask.any():
            ys, xs = np.nonzero(mask)
            box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        found.append((label, probability * total / (mask.sum() + 1e-6), box, mask))
    return found


SIZES = {"padded": (32, 64), "resized": (30, 50), "original": (11, 17)}


def logits_of(seed: int, queries: int = 5, labels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = 3 * torch.randn(queries, labels + 1, generator=generator)
    masks = torch.randn(queries, 8, 16, generator=generator) - 0.3
    masks[0] = -1.0
    return classes, masks


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), labels=st.sampled_from([6, 40]))
def test_masks_boxes_and_scores_are_those_of_a_slow_reference(seed, labels):
    classes, masks = logits_of(seed, labels=labels)
    expected = slow_instances(classes.double().numpy(), masks.double().numpy(), **SIZES)
    found = instances_of(classes, masks, **SIZES)
    assert len(found) == min(5 * labels, 100)
    for one, (label, score, box, mask) in zip(found, expected, strict=True):
        assert one.label == label and one.score == pytest.approx(score, rel=1e-4, abs=1e-7)
        assert one.box == box and np.array_equal(one.mask, mask)
        assert one.score == float(np.float32(one.score))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), above=st.floats(0, 1, exclude_max=True))
def test_what_is_left_out_scores_no_more_than_was_said(seed, above):
    classes, masks = logits_of(seed)
    everything, some = (instances_of(classes, masks, **SIZES, above=limit) for limit in (0.0, above))

    def scoring(instances):
        return [(i.label, i.score, i.box) for i in instances if np.float32(i.score) > np.float32(above)]

    assert scoring(some) == scoring(everything)


def test_a_pixel_at_zero_is_outside_a_mask():
    """The stock processor keeps it."""
    masks = torch.zeros(1, 8, 16)
    masks[0, 2:4, 2:4] = 40.0
    sizes = {"padded": (8, 16), "resized": (8, 16), "original": (8, 16)}
    (one,) = instances_of(torch.tensor([[9.0, -9.0]]), masks, **sizes)
    assert one.box == (2.0, 2.0, 4.0, 4.0) and one.mask.sum() == 4
    assert one.score == pytest.approx(1.0, abs=1e-6)


def test_scores_are_not_rounded():
    """To six digits, as the stock processor does."""
    classes, masks = logits_of(3)
    scores = [one.score for one in instances_of(classes, masks, **SIZES) if one.score]
    assert any(abs(score - round(score, 6)) > 1e-8 for score in scores)


def test_one_query_may_be_of_two_classes_and_an_empty_mask_scores_nothing():
    classes = torch.tensor([[4.0, 4.0, -9.0]])
    found = instances_of(classes, torch.full((1, 8, 16), 5.0), **SIZES)
    assert sorted(one.label for one in found) == [0, 1] and all(0.45 < one.score < 0.5 for one in found)
    for one in instances_of(classes, torch.full((1, 8, 16), -5.0), **SIZES):
        assert one.score == 0 and one.box == (0, 0, 0, 0) and not one.mask.any()


# --- the detector ---------------------------------------------------------------------------------------------------


def test_a_detector_joins_these_steps(detector, small):
    images = [noise(90, 70, seed) for seed in range(2)]
    inputs, resized = model_input(torch.cat([pixels_of(image) for image in images]))
    with torch.inference_mode():
        out = detector.model(pixel_values=inputs)
    found = detector.detect(images)
    for row, instances in enumerate(found):
        logits = (out.class_queries_logits[row], out.masks_queries_logits[row])
        expected = instances_of(*logits, tuple(inputs.shape[-2:]), resized, (70, 90))
        assert [one[:3] for one in instances] == [one[:3] for one in expected] and len(instances) == 100
        assert all(np.array_equal(one.mask, other.mask) for one, other in zip(instances, expected))
    limit = max(one.score for one in found[0]) * 0.9
    assert 0 < len(detector.detect(images[:1], above=limit)[0]) < 100


def test_exif_turns_an_image(detector, small):
    image = noise(90, 70)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 270 degrees
    (first,), (second,) = detector.detect([image]), detector.detect([turned])
    assert [(a.label, a.score, a.box) for a in first] == [(b.label, b.score, b.box) for b in second]


def test_numbers_that_are_not_finite_are_an_error(folder, small):
    broken = Mask2Former(folder, "broken", "tests only")
    with torch.no_grad():
        broken.model.class_predictor.bias[3] = math.nan
    with pytest.raises(RuntimeError, match="broken gave numbers that are not finite"):
        broken.detect([noise(64, 64)])


def test_a_kernel_that_is_missing_is_an_error(detector, small, monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(detector.model, "forward", missing)
    with pytest.raises(RuntimeError, match="no kernel image"):
        detector.detect([noise(64, 64)])


def test_another_number_of_labels_is_refused(tmp_path):
    Mask2FormerForUniversalSegmentation(tiny_config(labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other has 3 labels; give a model of COCO's 80"):
        Mask2Former(tmp_path, "other", "tests only")


# --- conversion -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    path = tmp_path / "source.pth"
    torch.save({"meta": {"epoch": 50}, "state_dict": as_mmdet(model.state_dict())}, path)
    return path


def test_the_published_model_has_757_tensors_from_625():
    with torch.device("meta"):
        full = Mask2FormerForUniversalSegmentation(published_config())
        theirs = as_mmdet(full.state_dict())
    assert len(theirs) == 625 + 1
    ours = {name: tuple(tensor.shape) for name, tensor in full.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in renamed(theirs).items()}
    assert len(found) == 757 and found.items() <= ours.items()
    left = ours.keys() - found.keys()
    assert len(left) == 3 and all(name.endswith(UNUSED) for name in left)


@pytest.mark.parametrize("version", [2, 3])
def test_names_of_both_versions_give_the_same_weights(model, version):
    state = model.state_dict()
    found = renamed(as_mmdet(state, version))
    assert len(found) == len(state) - 3
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name


def test_a_converted_checkpoint_is_the_same_detector(model, checkpoint, tmp_path, small):
    record = convert(checkpoint, tmp_path / "out", config=tiny_config())
    assert json.loads((tmp_path / "out" / RECORD).read_text()) == record
    assert record["source"]["name"] == "source.pth" and len(record["source"]["sha256"]) == 64
    assert len(record["tensors"]["left as made"]) == 3 and record["tensors"]["written"] == len(model.state_dict()) - 3
    converted = Mask2Former(tmp_path / "out", "converted", "tests only")
    assert converted.revision == record["revision"]
    inputs, _ = model_input(pixels_of(noise(64, 64)))
    found, expected = (m(pixel_values=inputs) for m in (converted.model, model))
    assert torch.allclose(found.class_queries_logits, expected.class_queries_logits, atol=1e-5)
    assert torch.allclose(found.masks_queries_logits, expected.masks_queries_logits, atol=1e-4)


def test_the_order_of_merged_patches_matters(model, small):
    """Without it the model runs all the same, and gives something else."""
    theirs = as_mmdet(model.state_dict())
    plain = {name: tensor for name, tensor in theirs.items() if ".downsample." in name}
    assert len(plain) == 9
    for name, tensor in renamed(plain).items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert not torch.equal(
            tensor, plain[name.replace("model.pixel_level_module.encoder.swin.encoder.layers", "backbone.stages")]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("panoptic_head.query_feat.weight"),
            "missing: model.transformer_module.queries_features",
        ),
        (lambda state: state.update({"bbox_head.weight": torch.zeros(1)}), "bbox_head.weight is no weight of"),
        (
            lambda state: state.update({"panoptic_head.cls_embed.extra": torch.zeros(1)}),
            "unknown: class_predictor.extra",
        ),
        (
            lambda state: state.update({"panoptic_head.cls_embed.bias": torch.zeros(3)}),
            "another shape: class_predictor",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(model, tmp_path, change, message):
    state = as_mmdet(model.state_dict())
    change(state)
    torch.save({"state_dict": state}, tmp_path / "source.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source.pth", tmp_path / "out", config=tiny_config())
    assert not (tmp_path / "out").exists()


class Foreign:
    """What no weight file holds."""


def test_a_pickle_needs_a_flag(model, tmp_path):
    path = tmp_path / "source.pth"
    torch.save({"state_dict": as_mmdet(model.state_dict()), "meta": Foreign()}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match=r"loading it could run code.*--allow-pickle"):
        convert(path, tmp_path / "out", config=tiny_config())
    assert convert(path, tmp_path / "out", config=tiny_config(), allow_pickle=True)["source"]["pickle"] is True


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torn_pickle_is_one_clear_line(tmp_path, capsys, zipped):
    whole = tmp_path / "whole.pth"
    content = {"state_dict": {"a": torch.zeros(64)}, "meta": Foreign()}
    torch.save(content, whole, pickle_module=pickle, _use_new_zipfile_serialization=zipped)
    torn, data = tmp_path / "torn.pth", whole.read_bytes()
    for end in range(0, len(data), 97):
        torn.write_bytes(data[:end])
        assert main(["geneval", "convert", str(torn), str(tmp_path / "out"), "--allow-pickle"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{torn} is no whole weight file" in line and "download it again" in line


def test_a_pickle_of_something_else_is_one_clear_line(tmp_path, monkeypatch):
    source = tmp_path / "source.pth"
    torch.save([torch.zeros(1)], source)
    with pytest.raises(ValueError, match="holds a list where weights have names"):
        convert(source, tmp_path / "out", allow_pickle=True)
    torch.save({"state_dict": {}, "meta": Foreign()}, source, pickle_module=pickle)
    monkeypatch.delattr(f"{__name__}.Foreign")
    with pytest.raises(ValueError, match=r"holds an object that cannot be made here.*Foreign.*weights alone"):
        convert(source, tmp_path / "out", allow_pickle=True)


def test_the_command_says_what_is_wrong(checkpoint, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, out, message in (
        (tmp_path / "none.pth", tmp_path / "out", "743b7d99.pth"),
        (checkpoint, tmp_path / "full", "is not empty"),
    ):
        assert main(["geneval", "convert", str(source), str(out)]) == 2
        assert message in capsys.readouterr().err


# --- by name --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_colours(monkeypatch):
    monkeypatch.setattr("visearch.rewards.mask2former.clip_colors", lambda device, **options: options)


def test_only_geneval_s_own_weights_are_comparable(checkpoint, tmp_path, no_colours):
    out = tmp_path / "out"
    record = convert(checkpoint, out, config=tiny_config())
    load = DETECTORS.load("mmdet-converted")
    detector, options = load(str(out), "cpu", crop="0")
    assert options == {"crop": "0"} and detector.id == "mmdet-converted"
    assert "not comparable" in detector.comparability and record["source"]["sha256"][:8] in detector.comparability
    record["source"]["sha256"] = CHECKPOINT_SHA256 + "0" * 56
    (out / RECORD).write_text(json.dumps(record))
    again, _ = load(str(out), "cpu")
    assert "not comparable" not in again.comparability and again.revision == detector.revision


def test_the_other_training_run_says_so(folder, no_colours):
    detector, _ = DETECTORS.load("facebook")(str(folder), "cpu")
    assert "not comparable on counting" in detector.comparability


def test_missing_weights_say_what_to_put_where(folder, monkeypatch, no_colours):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    converted, facebook = DETECTORS.load("mmdet-converted"), DETECTORS.load("facebook")
    with pytest.raises(FileNotFoundError, match=r"--detector-path FOLDER.*geneval convert FILE FOLDER.*743b7d99\.pth"):
        converted(None, "cpu")
    with pytest.raises(FileNotFoundError, match=r"has no conversion\.json.*geneval convert"):
        converted(str(folder), "cpu")
    with pytest.raises(
        FileNotFoundError, match=r"facebook/mask2former-swin-small-coco-instance.*--detector-path=FOLDER"
    ):
        facebook("/nowhere/at/all", "cpu")
