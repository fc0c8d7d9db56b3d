"""The world emoji-64: scenes fit their captions, wrong scenes do not, splits stay apart."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

from visearch.assets import path, scenes

COLOURED = {"colors": 1, "color_attr": 2}


def judged_again(objects, metadata):
    """GenEval's verdict written a second time, by counting names instead of filtering clauses."""
    names = collections.Counter(item.name for item in objects)
    looks = collections.Counter((item.name, item.color) for item in objects)
    tag, include = metadata["tag"], metadata["include"]
    if tag == "counting":
        return names[include[0]["class"]] == include[0]["count"]
    if tag in COLOURED:
        return all(looks[clause["class"], clause["color"]] >= 1 for clause in include)
    if any(names[clause["class"]] < 1 for clause in include):
        return False
    if tag != "position":
        return True
    target, subject = (next(item.box for item in objects if item.name == clause["class"]) for clause in include)
    centre = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (subject, target)]
    axis = 0 if include[1]["position"][0] in ("left of", "right of") else 1
    offset = centre[0][axis] - centre[1][axis]
    slack = 0.1 * (subject[axis + 2] - subject[axis] + target[axis + 2] - target[axis])
    distance = np.hypot(centre[0][0] - centre[1][0], centre[0][1] - centre[1][1])
    sign = -1 if include[1]["position"][0] in ("left of", "above") else 1
    return sign * offset - slack > 0.5 * distance


@pytest.mark.parametrize("tag", scenes.TAGS)
def test_scenes_satisfy_their_metadata_and_wrong_scenes_do_not(tag):
    rng = np.random.default_rng(0)
    for _ in range(200):
        metadata = scenes.sample_metadata(rng, tag)
        right, wrong = scenes.make_scene(rng, metadata), scenes.wrong_scene(rng, metadata)
        for scene, expected in ((right, True), (wrong, False)):
            assert scenes.satisfies(scene.objects, metadata) is expected, (metadata, scene.objects)
            assert bool(judged_again(scene.objects, metadata)) is expected
            assert scene.caption == metadata["prompt"] and 0 <= scene.vividness <= 1
        wanted = [clause["class"] for clause in metadata["include"] for _ in range(clause["count"])]
        assert sorted(item.name for item in right.objects) == sorted(wanted)


@pytest.mark.parametrize("tag", scenes.TAGS)
def test_wrong_metadata_contradicts_in_both_directions(tag):
    rng = np.random.default_rng(1)
    for _ in range(60):
        metadata = scenes.sample_metadata(rng, tag)
        other = scenes.wrong_metadata(rng, metadata)
        assert other["tag"] == tag and other["prompt"] != metadata["prompt"]
        assert not scenes.satisfies(scenes.make_scene(rng, other).objects, metadata)
        assert not scenes.satisfies(scenes.make_scene(rng, metadata).objects, other)


def test_images_and_boxes():
    rng = np.random.default_rng(2)
    for _ in range(200):
        scene = scenes.make_scene(rng, scenes.sample_metadata(rng), distractors=int(rng.integers(2)))
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert {item.style for item in scene.objects} <= set(scenes.STYLES)
        for item in scene.objects:
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            assert 12 <= max(x1 - x0, y1 - y0) <= 40


def test_distractors_are_of_other_classes():
    rng = np.random.default_rng(3)
    for _ in range(60):
        metadata = scenes.sample_metadata(rng, "two_object")
        scene = scenes.make_scene(rng, metadata, distractors=2)
        assert len(scene.objects) == 4 and scenes.satisfies(scene.objects, metadata)
        assert sum(item.name in {clause["class"] for clause in metadata["include"]} for item in scene.objects) == 2


def test_same_seed_same_scene():
    def draw(seed):
        rng = np.random.default_rng(seed)
        return [scenes.make_scene(rng, scenes.sample_metadata(rng)) for _ in range(20)]

    first, second, third = draw(5), draw(5), draw(6)
    assert all((a.image == b.image).all() and a.objects == b.objects for a, b in zip(first, second, strict=True))
    assert any((a.image != b.image).any() for a, b in zip(first, third, strict=True))


def test_official_geneval_prompts_are_covered_and_unchanged():
    lines = path("geneval/evaluation_metadata.jsonl").read_text().splitlines()
    covered = [row for row in map(json.loads, lines) if all(c["class"] in scenes.CLASSES for c in row["include"])]
    official = [row for row in scenes.prompts("report") if row.pop("official")]
    assert len(official) == 149
    assert {json.dumps(row) for row in official} == {json.dumps(row) for row in covered}


@pytest.mark.parametrize("split", ["validation", "report"])
def test_prompt_files_follow_the_schema(split):
    rows = scenes.prompts(split)
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        row.pop("official")
        assert list(row) == ["tag", "include", "exclude", "prompt"] if row["tag"] == "counting" else len(row) == 3
        assert scenes.make_metadata(row["tag"], row["include"]) == row
        assert scenes.split_of(row) in (None, split)
    counts = collections.Counter(row["tag"] for row in rows)
    assert set(counts) == set(scenes.TAGS)
    assert min(counts.values()) >= (24 if split == "report" else 19)


def test_no_paraphrase_crosses_splits():
    rng = np.random.default_rng(7)
    keys = {split: {scenes.prompt_key(row) for row in scenes.prompts(split)} for split in ("validation", "report")}
    drawn = [scenes.sample_metadata(rng, tag) for tag in ("two_object", "colors", "position", "color_attr")
             for _ in range(400)]  # fmt: skip
    for metadata in drawn:
        assert scenes.split_of(metadata) == "train"
        assert scenes.prompt_key(metadata) not in keys["validation"] | keys["report"]
    cow, car = {"class": "cow", "count": 1}, {"class": "car", "count": 1}
    left = scenes.make_metadata("position", [car, {**cow, "position": ["left of", 0]}])
    right = scenes.make_metadata("position", [cow, {**car, "position": ["right of", 0]}])
    assert (left["prompt"], right["prompt"]) == ("a photo of a cow left of a car", "a photo of a car right of a cow")
    assert scenes.split_of(left) == scenes.split_of(right)


def test_tints_are_told_apart_on_every_sprite():
    luma = np.array([0.299, 0.587, 0.114])
    for style in (*scenes.STYLES, scenes.HELD_OUT_STYLE):
        for name in scenes.CLASSES:
            means = np.stack([scenes._mean_color(style, name, color) for color in scenes.COLORS])
            distance = np.linalg.norm(means[:, None] - means[None], axis=-1) + 1e3 * np.eye(len(means))
            assert distance.min() > 25, (style, name)
            assert (means @ luma)[scenes.COLORS.index("black")] == (means @ luma).min()


def test_relations_follow_genevals_worked_cases():
    dog = (400, 400, 500, 500)

    def cat(x, y):
        return scenes.relations((x, y, x + 100, y + 100), dog)

    assert cat(380, 400) == set() and cat(360, 400) == set() and cat(359, 400) == {"left of"}
    assert cat(332, 332) == set() and cat(331, 331) == {"left of", "above"}


def test_vividness_leaves_greys_ordered_and_scales_saturation():
    red = np.full((1, 1, 3), (200, 40, 40), np.uint8)
    spread = [np.ptp(scenes.set_vividness(red, v).astype(int)) for v in (0.0, 0.5, 1.0)]
    assert spread[0] < spread[1] < spread[2]
    assert np.ptp(scenes.set_vividness(np.full((1, 1, 3), 90, np.uint8), 0.3)) == 0


def test_atlas_and_notice_ship():
    atlas = Image.open(path("emoji-64/atlas.png"))
    assert atlas.size == (48 * len(scenes.CLASSES), 48 * 3) and atlas.mode == "RGBA"
    assert path("emoji-64/atlas.png").stat().st_size < 500_000
    notice = path("emoji-64/NOTICE").read_text()
    assert all(word in notice for word in ("Noto Emoji", "Fluent Emoji", "Twemoji", "CC-BY 4.0", "Dhruba Ghosh"))


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda rng: scenes.sample_metadata(rng, split="test"), "split='test'"),
        (lambda rng: scenes.sample_metadata(rng, tag="shape"), "tag='shape'"),
        (lambda rng: scenes.prompts("train"), "split='train'"),
        (lambda rng: scenes.make_scene(rng, scenes.sample_metadata(rng), styles=("oil",)), "style='oil'"),
        (lambda rng: scenes.make_scene(rng, scenes.sample_metadata(rng), distractors=9), "distractors=9"),
    ],
)
def test_errors_name_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call(np.random.default_rng(0))
