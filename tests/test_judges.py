"""The embedded world's judges and its CLIP, on scenes composed here: what is true of them is known exactly."""

from __future__ import annotations

import functools
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from visearch import assets, geneval
from visearch.assets import scenes
from visearch.rewards import detector

TRAINED = ("a", "b")


@functools.cache
def judge(name: str) -> detector.Judge:
    return detector.load_judge(name)


@functools.cache
def composed(count: int = 60, seed: int = 7) -> tuple[list[Image.Image], list[dict], np.ndarray]:
    """Scenes of all six tasks, the second half wrong on purpose."""
    rng = np.random.default_rng(seed)
    wanted = [scenes.sample_metadata(rng, scenes.TAGS[i % 6], "validation") for i in range(count)]
    made = [(scenes.make_scene if 2 * i < count else scenes.wrong_scene)(rng, m) for i, m in enumerate(wanted)]
    right = np.array([scenes.satisfies(scene.objects, m) for scene, m in zip(made, wanted, strict=True)])
    return [Image.fromarray(scene.image) for scene in made], wanted, right


def flat(found: dict[str, list[list[float]]]) -> list[tuple]:
    return sorted((name, *box) for name, boxes in found.items() for box in boxes)


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert {k: len(v) for k, v in a.items()} == {k: len(v) for k, v in b.items()}
        for x, y in zip(flat(a), flat(b), strict=True):
            assert x[0] == y[0]
            np.testing.assert_allclose(x[1:], y[1:], atol=1e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_description(name: str) -> None:
    each = judge(name)
    assert each.name == name
    assert each.class_names == scenes.CLASSES
    assert each.color_names == scenes.COLORS
    assert len(each.revision) == 64
    assert each.licence.startswith("Apache-2.0")
    assert set(scenes.TAGS) | {"overall"} <= set(each.error)
    assert each.error["overall"]["low"] <= each.error["overall"]["rate"] <= each.error["overall"]["high"]


def test_error_belongs_to_the_shipped_weights() -> None:
    for name in TRAINED:
        card = json.loads((assets.path(f"emoji-64/judge-{name}") / "card.json").read_text())
        assert card["sha256"] == judge(name).revision, f"judge {name} was retrained: run assets/build/check_judges.py"


@pytest.mark.parametrize("name", TRAINED)
def test_boxes_do_not_depend_on_companions_or_order(name: str) -> None:
    images = composed()[0][:12]
    together = judge(name).detect(images)
    assert any(together)
    assert_same(together, [judge(name).detect([image])[0] for image in images])
    assert_same(together, judge(name).detect(images, batch_size=5))
    order = np.random.default_rng(0).permutation(len(images))
    assert_same([together[i] for i in order], judge(name).detect([images[i] for i in order]))


@pytest.mark.parametrize("name", TRAINED)
def test_input_forms_agree(name: str) -> None:
    images = composed()[0][:4]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    assert_same(judge(name).detect(images), judge(name).detect(pixels))
    assert_same(judge(name).detect(images), judge(name).detect(pixels.float() / 255))
    assert judge(name).detect([]) == []


def test_boxes_come_back_in_the_pixels_of_the_image() -> None:
    image = composed()[0][0]
    small, large = (
        judge("a").detect([each])[0] for each in (image, image.resize((256, 128), Image.Resampling.NEAREST))
    )
    assert small.keys() == large.keys()
    for name in small:
        np.testing.assert_allclose(np.array(small[name])[0, :4] * [4, 2, 4, 2], np.array(large[name])[0, :4], atol=6)


@pytest.mark.parametrize("name", TRAINED)
def test_verdicts_on_composed_scenes(name: str) -> None:
    images, wanted, right = composed()
    verdicts = [
        geneval.judge(metadata, found, functools.partial(judge(name).classify_color, image)).correct
        for metadata, found, image in zip(wanted, judge(name).detect(images), images, strict=True)
    ]
    assert 0.4 < right.mean() < 0.6
    assert np.mean(np.array(verdicts) != right) < 0.12


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"name='d'.*a, b, c"):
        detector.load_judge("d")
    with pytest.raises(ValueError, match=r"\(2, 64, 64\).*\(N, 3, H, W\)"):
        judge("a").detect(torch.zeros(2, 64, 64))
    with pytest.raises(ValueError, match=r"class_name='zebra'.*giraffe"):
        judge("a").classify_color(composed()[0][0], "zebra", [[0, 0, 9, 9, 1.0]])


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is not None, reason="the extra 'judge' is installed"
)
def test_judge_c_without_its_extra() -> None:
    with pytest.raises(ImportError, match=r"pip install \"visearch\[judge\]\""):
        detector.load_judge("c")


def test_judge_c_agrees_with_b_on_places_and_mostly_on_names() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason='needs the extra "judge"')
    images, wanted, right = composed()
    third, rows = judge("c"), range(0, 60, 3)
    found = third.detect([images[i] for i in rows])
    verdicts = [
        geneval.judge(wanted[i], each, functools.partial(third.classify_color, images[i])).correct
        for i, each in zip(rows, found, strict=True)
    ]
    assert np.mean(np.array(verdicts) != right[list(rows)]) < 0.35
    again = third.detect([images[i] for i in reversed(rows)])
    assert_same(found, again[::-1])


def test_lab_of_known_colours() -> None:
    # CIE 15 values of the sRGB primaries and white under D65.
    rgb = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    known = [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [0, 0, 0]]
    np.testing.assert_allclose(detector.to_lab(rgb).numpy(), known, atol=0.15)


def test_decode_puts_a_peak_where_the_maps_say() -> None:
    maps = detector.Maps(torch.full((2, 16, 16), -9.0), torch.zeros(4, 16, 16), torch.zeros(11, 16, 16))
    maps.score[1, 3, 5] = 2.0
    maps.score[1, 3, 6] = 1.0  # neighbour of the peak, suppressed
    maps.box[:, 3, 5] = torch.tensor([0.5, 0.25, np.log(0.5), np.log(0.25)])
    boxes, scores, classes = detector.decode(maps, stride=4, peak_kernel=3, slope=2.0, bias=-1.0)
    np.testing.assert_allclose(boxes.numpy(), [[22 - 16, 13 - 8, 22 + 16, 13 + 8]], atol=1e-4)
    np.testing.assert_allclose(scores.numpy(), [1 / (1 + np.exp(-3.0))], atol=1e-6)
    assert classes.tolist() == [1]


def test_clip_loads_through_open_clip_and_ranks_captions() -> None:
    import open_clip

    folder = f"local-dir:{assets.path('emoji-64/clip')}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    tokenizer = open_clip.get_tokenizer(folder)
    model.eval()
    rng = np.random.default_rng(3)
    images, right, wrong = [], [], []
    for i in range(60):
        metadata = scenes.sample_metadata(rng, scenes.TAGS[i % 6], "validation")
        images.append(preprocess(Image.fromarray(scenes.make_scene(rng, metadata).image)))
        right.append(metadata["prompt"])
        wrong.append(scenes.wrong_metadata(rng, metadata)["prompt"])
    tokens = tokenizer(right + wrong)
    assert tokens.shape == (120, 16)
    unknown = tokenizer.tokenizer.unk_token_id
    assert not (tokens == unknown).any()
    assert (tokenizer(["a photo of a zebra"]) == unknown).sum() == 1
    with torch.inference_mode():
        image = model.encode_image(torch.stack(images), normalize=True)
        text = model.encode_text(tokens, normalize=True)
    scores = (image.repeat(2, 1) * text).sum(1)
    assert (scores[:60] > scores[60:]).float().mean() >= 0.8


def test_weights_keep_to_their_quotas() -> None:
    def size(name: str) -> int:
        return sum(f.stat().st_size for f in assets.path(f"emoji-64/{name}").rglob("*.safetensors"))

    assert 0 < size("clip") <= 4_000_000
    assert 0 < size("judge-a") + size("judge-b") <= 3_000_000
