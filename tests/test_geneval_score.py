"""Judging folders of images: the rows upstream writes, once each whatever happens, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sketches import Looker

from visearch import geneval
from visearch.geneval.folder import image_path, name_of, read_folder
from visearch.geneval.score import Examiner, Rules, Sample, batches_of, read_meta, score
from visearch.rewards.detection import Instance

LINES = [
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
    {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a car"},
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
]
NAMES = ("car", "cow", "bus")  # not the order of GenEval's list, in which car, bus and cow follow each other


class Detector:
    """Finds what it is told to; names the colour that a mask's first pixel stands for."""

    id, revision, comparability, dtype, class_names = "planted", "1", "tests only", "float32", NAMES

    def __init__(self, *found: Instance) -> None:
        self.found = list(found)
        self.asked: list[tuple[str, int]] = []

    def detect(self, images, above=0.0):
        return [self.found for _ in images]

    def classify(self, image, class_name, instances):
        self.asked.append((class_name, len(instances)))
        return ["red" if instance.mask[0, 0] else "blue" for instance in instances]


def instance(name: str, value: float, left: float = 0.0, red: bool = False) -> Instance:
    return Instance(NAMES.index(name), float(np.float32(value)), (left, 0.0, left + 10.0, 10.0), np.full((1, 1), red))


def row_of(line, *found, **rules):
    detector = Detector(*found)
    (row,) = Examiner(detector, detector, Rules(**rules))(([line], [Image.new("RGB", (8, 8))]))
    return row, detector


# --- a verdict ----------------------------------------------------------------------------------------------------


def test_a_row_holds_the_boxes_that_count_in_the_benchmark_s_order_of_classes():
    row, _ = row_of(LINES[1], instance("cow", 0.5), instance("bus", 0.4), instance("car", 0.3), instance("bus", 0.6))
    assert row["correct"] is False and row["reason"] == "expected car>=1, found 0"
    details = json.loads(row["details"])
    assert list(details) == ["bus", "cow"]
    assert [box[4] for box in details["bus"]] == [pytest.approx(0.6), pytest.approx(0.4)]
    assert details["cow"] == [[0.0, 0.0, 10.0, 10.0, 0.5]]
    assert row["metadata"] == json.dumps(LINES[1]) and row["prompt"] == LINES[1]["prompt"]
    assert list(row) == ["tag", "prompt", "correct", "reason", "metadata", "details"]


def test_counting_has_a_threshold_of_its_own():
    found = [instance("cow", s, left=20 * i) for i, s in enumerate((0.95, 0.91, 0.9))]
    assert row_of(LINES[2], *found)[0]["correct"]
    assert not row_of(LINES[2], *found, counting_threshold=0.5)[0]["correct"]
    assert row_of({**LINES[2], "tag": "two_object"}, *found)[0]["reason"] == "expected cow<3, found 3"


def test_colours_are_asked_with_the_masks_of_the_best_boxes():
    """Two cows in one box: only their masks tell them apart, and only the better one is asked for."""
    row, detector = row_of(LINES[0], instance("cow", 0.8, red=False), instance("cow", 0.9, red=True))
    assert row["correct"] and detector.asked == [("cow", 1)]
    row, _ = row_of(LINES[0], instance("cow", 0.9, red=False), instance("cow", 0.8, red=True))
    assert row["reason"] == "expected red cow>=1, found 0 red; and 1 blue"


instances = st.builds(
    instance, st.sampled_from(NAMES), st.sampled_from([0.2, 0.3, 0.5, 0.9, 0.95]), st.integers(0, 30), st.booleans()
)


@settings(max_examples=200, deadline=None)
@given(line=st.sampled_from(LINES), found=st.lists(instances, max_size=12), overlap=st.sampled_from([1.0, 0.5]))
def test_the_verdict_is_that_of_judge(line, found, overlap):
    boxes: dict[str, list] = {}
    for one in found:
        boxes.setdefault(NAMES[one.label], []).append([*one.box, one.score])

    def color_of(name, asked):
        """Of equal boxes, the later one comes first."""
        mine, colors = [one for one in reversed(found) if NAMES[one.label] == name], []
        for box in asked:
            match = next(one for one in mine if [*one.box, one.score] == list(box))
            mine.remove(match) if overlap == 1 else None
            colors.append("red" if match.mask[0, 0] else "blue")
        return colors

    expected = geneval.judge(line, boxes, color_of, max_overlap=overlap)
    row, _ = row_of(line, *found, max_overlap=overlap)
    assert (row["correct"], row["reason"]) == (expected.correct, expected.reason)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"threshold": 1.0}, r"threshold is 1\.0"),
        ({"counting_threshold": -0.1}, "counting_threshold is -0.1"),
        ({"max_objects": 0}, "max_objects is 0"),
        ({"max_overlap": 2.0}, r"max_overlap is 2\.0"),
        ({"position_threshold": float("nan")}, "position_threshold is nan"),
    ],
)
def test_rules_out_of_range_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Rules(**rules)


def test_prompts_that_the_detector_cannot_judge_are_refused():
    detector = Detector()
    examiner = Examiner(detector, detector, Rules())
    examiner.check(LINES)
    with pytest.raises(ValueError, match="planted does not know 'cat' of 'a photo of a cat'"):
        examiner.check([{"include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"}])


# --- the file of results --------------------------------------------------------------------------------------------


def make_folder(root: Path, lines=LINES, images: int = 2, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for p, line in enumerate(lines):
        (root / name_of(p) / "samples").mkdir(parents=True)
        (root / name_of(p) / "metadata.jsonl").write_text(json.dumps(line))
        for k in range(images):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(image_path(root, p, k))
    return root


def samples_of(root: Path) -> list[Sample]:
    return [Sample(path, f.line) for f in read_folder(root) for _, path in sorted(f.images.items())]


def judged(root: Path, outfile: Path, key: str = "k", **options) -> int:
    return score(Looker, batches_of(samples_of(root), 2), outfile, key, **options)


def test_a_run_cut_off_at_any_byte_of_its_last_line_ends_as_if_it_had_not_been(tmp_path):
    root = make_folder(tmp_path / "images", LINES[:1])
    assert judged(root, tmp_path / "whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        assert judged(root, tmp_path / "cut.jsonl") == 0
        assert (tmp_path / "cut.jsonl").read_bytes() == whole, cut
    (tmp_path / "cut.jsonl").write_bytes(whole[:first] + b"\0\0\0\n")
    assert judged(root, tmp_path / "cut.jsonl") == 0 and (tmp_path / "cut.jsonl").read_bytes() == whole


def test_damage_elsewhere_and_other_settings_are_errors(tmp_path):
    root, outfile = make_folder(tmp_path / "images", LINES[:1]), tmp_path / "results.jsonl"
    judged(root, outfile)
    good = outfile.read_text()
    for text, message in (
        ("{torn\n" + good, "line 1 is damaged"),
        ('{"other": 1}\n' + good, "line 1 is no result"),
        (good.replace('"config":"k"', '"config":"j"', 1), "line 1 is of other settings"),
    ):
        outfile.write_text(text)
        with pytest.raises(ValueError, match=message):
            judged(root, outfile)
        assert outfile.read_text() == text


def test_nothing_is_judged_twice_wherever_the_folder_lies(tmp_path):
    root, outfile = make_folder(tmp_path / "images"), tmp_path / "results.jsonl"
    judged(root, outfile)
    whole = outfile.read_bytes()
    moved = root.rename(tmp_path / "moved")
    assert score(lambda: pytest.fail("loaded"), batches_of(samples_of(moved), 2), outfile, "k") == 0
    assert outfile.read_bytes() == whole


def test_shares_together_are_the_whole_file(tmp_path):
    root = make_folder(tmp_path / "images")
    judged(root, tmp_path / "whole.jsonl")
    parts = b""
    for index in (2, 1):
        assert judged(root, tmp_path / f"{index}.jsonl", shard=(index, 2)) == 0
        parts += (tmp_path / f"{index}.jsonl").read_bytes()
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(parts.splitlines()) == whole.splitlines() == sorted(whole.splitlines())


def test_lines_are_written_as_upstream_writes_them(tmp_path):
    root = make_folder(tmp_path / "images", LINES[:1], images=1)
    judged(root, tmp_path / "ours.jsonl")
    for _ in range(2):  # goes on without our key too
        judged(root, tmp_path / "theirs.jsonl", upstream=True)
    ours, theirs = ((tmp_path / f"{name}.jsonl").read_text() for name in ("ours", "theirs"))
    assert theirs.startswith('{"filename":"' + str(root).replace("/", "\\/")) and ", " not in theirs.split("reason")[0]
    assert r"value\/" in theirs
    assert json.loads(ours) == {**json.loads(theirs), "config": "k"} and list(json.loads(ours))[-1] == "config"


def test_only_images_of_one_size_are_judged_together(tmp_path):
    root = make_folder(tmp_path / "images")
    Image.new("RGB", (9, 8)).save(image_path(root, 1, 0))
    sizes = [{Image.open(sample.path).size for sample in batch} for batch in batches_of(samples_of(root), 4)]
    assert sizes == [{(8, 8)}, {(9, 8)}, {(8, 8)}]
    assert [len(batch) for batch in batches_of(samples_of(root), 4)] == [2, 1, 3]


# --- bad folders ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_image_is_named(tmp_path):
    root = make_folder(tmp_path)
    path = image_path(root, 1, 1)
    whole = path.read_bytes()
    path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"00001/samples/00001\.png does not open \(no image\)"):
        batches_of(samples_of(root), 4)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00001/samples/00001\.png does not open"):
        judged(root, tmp_path / "results.jsonl")


def test_names_may_have_any_number_of_digits_and_other_files_are_ignored(tmp_path):
    root = make_folder(tmp_path, LINES[:1])
    (root / "00000").rename(root / "7")
    (root / "7" / "samples" / "00001.png").rename(root / "7" / "samples" / "12.png")
    (root / "7" / "grid.png").write_bytes(b"")
    (root / "7" / "samples" / "00000.part").write_bytes(b"")
    (root / "notes").mkdir()
    (folder,) = read_folder(root)
    assert folder.number == 7 and sorted(folder.images) == [0, 12]
    make_folder(root / "again", LINES[:1])
    (root / "again" / "00000").rename(root / "007")
    with pytest.raises(ValueError, match="have one number"):
        read_folder(root)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), ("{torn", "line 1"), ('{"prompt": "x"}', "keys tag, include")]
)
def test_a_prompt_s_folder_without_its_line_is_named(tmp_path, content, message):
    path = make_folder(tmp_path, LINES[:1]) / "00000" / "metadata.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"00000/metadata\.jsonl.*{message}"):
        read_folder(tmp_path)


# --- the command ----------------------------------------------------------------------------------------------------


def test_exit_statuses(step, tmp_path):
    root = make_folder(tmp_path / "images", size=64)
    words = ("score", root, "--detector", "tiny", "--device", "cpu")
    status, out, err = step(*words)
    assert status == 3 and "6 images are missing" in err and "not comparable" in err
    results = root / "results.jsonl"
    assert out.strip() == str(results)
    assert len(results.read_text().splitlines()) == 6
    assert step(*words, "--images-per-prompt", 2)[0] == 0
    assert step(*words, "--allow-missing")[0] == 0
    status, out, err = step("summary", results)
    assert status == 3  # as many as were expected when they were scored
    assert "Total images: 6" in out and "17.7 %" in err and "single objects are found" in err
    step(*words, "--images-per-prompt", 2)
    assert step("summary", results)[0] == 0
    assert step("summary", results, "--prompts", "validation")[0] == 3
    assert step("summary", results, "--prompts", "validation", "--allow-missing")[0] == 0
    assert step("summary", tmp_path / "none.jsonl")[0] == 2
    other = tmp_path / "other.jsonl"
    assert step(*words, "--images-per-prompt", 2, "--outfile", other, "--options", "threshold=0.2")[0] == 0
    status, _, err = step("summary", results, other)
    assert status == 4 and "other settings" in err
    (tmp_path / "empty").mkdir()
    status, _, err = step("score", tmp_path / "empty", "--detector", "tiny")
    assert status == 3 and "holds no prompt's folder" in err


def test_results_of_other_settings_are_refused(step, tmp_path):
    root = make_folder(tmp_path / "images", size=64)
    words = ("score", root, "--detector", "tiny", "--device", "cpu", "--images-per-prompt", 2)
    assert step(*words)[0] == 0
    before = (root / "results.jsonl").read_bytes()
    for more, message in (
        (("--options", "max_objects=3"), "'max_objects': 16"),
        (("--options", "max_objects=x"), "'x' is no number"),
        (("--options", "crop=1"), "takes no --options crop"),
        (("--options", "crop"), "write NAME=VALUE"),
        (("--detector-path", "x"), "takes no --detector-path x"),
        (("--detector", "tinny"), "did you mean 'tiny'"),
        (("--detector", "tiny-b"), "scored with"),
        (("--batch-size", 0), "must be at least 1"),
    ):
        status, _, err = step(*words, *more)
        assert status == 2 and message in err
    assert (root / "results.jsonl").read_bytes() == before
    (root / "results.jsonl.meta.json").unlink()
    assert step(*words)[0] == 2


def test_provenance_tells_what_was_judged_and_by_whom(step, tmp_path):
    root = make_folder(tmp_path / "images", size=64)
    settings = {"model": "m", "search": "best-of-n(n=2)", "reward": "judge-a"}
    (root / "config.json").write_text(json.dumps({"settings": settings, "images_per_prompt": 2}))
    told = {"00000": {"not_held_out_for": ["GenEval"]}}
    (root / "00000" / "search.json").write_text(json.dumps({"config": "x", "images": told}))
    status, _, err = step("score", root, "--detector", "tiny", "--device", "cpu", "--options", "threshold=0.4")
    assert status == 0 and "knows what GenEval asks for" in err
    meta = read_meta(root / "results.jsonl")
    assert meta["search_knew"] == ["GenEval"] and meta["images"] == settings and meta["benchmark"] == "GenEval-style"
    assert meta["prompts"]["count"] == 3 and meta["expected"] == 6 and meta["device"] == "cpu"
    assert meta["settings"]["rules"]["threshold"] == 0.4 and len(meta["settings"]["detector"]["revision"]) == 64
    assert {"torch", "visearch"} <= set(meta["versions"])
    rows = [json.loads(line) for line in (root / "results.jsonl").read_text().splitlines()]
    assert {row["config"] for row in rows} == {meta["config"]}
    (root / "config.json").write_text(json.dumps({"settings": {**settings, "seed": 1}, "images_per_prompt": 2}))
    assert step("score", root, "--detector", "tiny", "--device", "cpu", "--options", "threshold=0.4")[0] == 2


def test_the_published_prompts_are_recognized(tmp_path):
    from visearch.geneval.score import _origin

    lines = geneval.load_prompts()
    folders = read_folder(make_folder(tmp_path, lines[:1], images=0))
    whole = [replace(folders[0], number=p, line=line) for p, line in enumerate(lines)]
    assert _origin(tmp_path, whole)["benchmark"] == "GenEval"
    assert _origin(tmp_path, whole[:-1])["benchmark"] == "GenEval-style"
