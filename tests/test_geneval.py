"""GenEval: the published prompt file, every documented edge of its verdict, and its summary."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import assets, geneval
from visearch.geneval import COLORS, RELATIONS, Verdict, judge, summarize

DOG = [400, 400, 500, 500]


def no_color(name, boxes):
    raise AssertionError(f"a colour was asked for {name}")


def box(left, top, score=0.95, side=100):
    return [left, top, left + side, top + side, score]


def disjoint(*scores):
    """Boxes in a row that never touch, with these scores."""
    return [[200 * i, 0, 200 * i + 100, 100, score] for i, score in enumerate(scores)]


def line(tag, *include, exclude=()):
    metadata = {"tag": tag, "include": list(include), "prompt": "a photo"}
    return metadata | ({"exclude": list(exclude)} if exclude else {})


def counting(name, count):
    return line("counting", {"class": name, "count": count}, exclude=[{"class": name, "count": count + 1}])


def cat_near_dog(relation, left, top, **options):
    metadata = line(
        "position",
        {"class": "dog", "count": 1},
        {"class": "cat", "count": 1, "position": [relation, 0]},
    )
    return judge(metadata, {"dog": [[*DOG, 0.95]], "cat": [box(left, top)]}, no_color, **options)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_the_published_files():
    published = {
        "evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        "object_names.txt": "608f6a0e5c8ca1c7a92b818430141fe268c85b7930b50f4160f1d65893b5bacd",
    }
    for name, expected in published.items():
        assert hashlib.sha256(assets.path(f"geneval/{name}").read_bytes()).hexdigest() == expected
    assert "Copyright (c) 2023 Dhruba Ghosh" in assets.path("geneval/LICENSE").read_text()


def test_prompts_have_the_published_composition():
    prompts = geneval.load_prompts()
    numbers = {tag: sum(p["tag"] == tag for p in prompts) for tag in geneval.TAGS}
    assert numbers == dict(zip(geneval.TAGS, (80, 99, 80, 94, 100, 100), strict=True))
    relations = [c["position"][0] for p in prompts for c in p["include"] if "position" in c]
    assert [relations.count(r) for r in RELATIONS] == [19, 27, 26, 28]
    targets = [p["include"][0]["count"] for p in prompts if p["tag"] == "counting"]
    assert [targets.count(n) for n in (2, 3, 4)] == [26, 28, 26]
    assert {c["class"] for p in prompts for c in p["include"]} <= set(geneval.class_names())


def test_class_names_follow_coco_order_with_three_renamed():
    names = geneval.class_names()
    assert len(names) == len(set(names)) == 80
    assert (names[0], names[64], names[65], names[66], names[79]) == (
        "person",
        "computer mouse",
        "tv remote",
        "computer keyboard",
        "toothbrush",
    )


def test_build_script_makes_the_shipped_files(tmp_path):
    script = Path(__file__).parents[1] / "assets" / "build" / "make_geneval_prompts.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    for name in ("evaluation_metadata.jsonl", "object_names.txt"):
        assert (tmp_path / name).read_bytes() == assets.path(f"geneval/{name}").read_bytes()


def test_load_prompts_names_the_bad_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    good = json.dumps(counting("bus", 2))
    file.write_text(f"{good}\n{good}\n")
    assert geneval.load_prompts(file) == [counting("bus", 2)] * 2
    file.write_text(f'{good}\n{{"tag": "colors"}}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2.*keys tag, include and prompt"):
        geneval.load_prompts(file)
    file.write_text("{torn\n")
    with pytest.raises(ValueError, match="line 1"):
        geneval.load_prompts(file)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "cat"}, "keys class and count"),
        ({"class": "cat", "count": 0}, "count 0"),
        ({"class": "cat", "count": True}, "count True"),
        ({"class": "cat", "count": 1, "color": "teal"}, "color 'teal'"),
        ({"class": "cat", "count": 1, "position": ["near", 0]}, "relation 'near'"),
        ({"class": "cat", "count": 1, "position": ["above", 1]}, "clause 1"),
    ],
)
def test_metadata_that_breaks_the_schema_is_refused(clause, message):
    with pytest.raises(ValueError, match=message):
        judge(line("position", {"class": "dog", "count": 1}, clause), {}, no_color)


# --- verdict: the worked cases ---------------------------------------------------------------------------------------


def test_score_equal_to_the_threshold_in_float32_does_not_count():
    metadata = line("single_object", {"class": "bench", "count": 1})
    score = float(np.float32(0.3))
    assert score > 0.3
    assert judge(metadata, {"bench": [box(0, 0, score)]}, no_color) == Verdict(False, "expected bench>=1, found 0")
    above = float(np.nextafter(np.float32(0.3), np.float32(1)))
    assert judge(metadata, {"bench": [box(0, 0, above)]}, no_color) == Verdict(True, "")


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((0.99, 0.95, 0.90), Verdict(False, "expected bus>=3, found 2")),
        ((0.95, 0.95, 0.95, 0.90), Verdict(True, "")),
        ((0.95, 0.95, 0.95, 0.95), Verdict(False, "expected bus<4, found 4")),
    ],
)
def test_counting_three_buses(scores, verdict):
    assert judge(counting("bus", 3), {"bus": disjoint(*scores)}, no_color) == verdict


def test_at_most_sixteen_boxes_count():
    twenty = disjoint(*[0.95] * 20)
    assert judge(counting("bus", 4), {"bus": twenty}, no_color) == Verdict(False, "expected bus<5, found 16")
    assert judge(line("single_object", {"class": "bench", "count": 1}), {"bench": twenty}, no_color).correct


def test_overlapping_boxes_count_unless_suppressed():
    buses = [[0, 0, 100, 100, 0.99], [1, 1, 100, 100, 0.98], [300, 0, 400, 100, 0.97]]
    assert judge(counting("bus", 2), {"bus": buses}, no_color) == Verdict(False, "expected bus<3, found 3")
    assert judge(counting("bus", 2), {"bus": buses}, no_color, max_overlap=0.5).correct


def test_overlap_equal_to_the_limit_is_suppressed():
    boxes = {"bus": [[0, 0, 99, 99, 0.9], [0, 0, 99, 49, 0.8]]}
    assert len(geneval.filter_detections(boxes, max_overlap=0.5)["bus"]) == 1
    assert len(geneval.filter_detections(boxes, max_overlap=0.5001)["bus"]) == 2


def test_only_the_best_boxes_are_asked_for_their_colour():
    metadata = line(
        "color_attr",
        {"class": "wine glass", "count": 1, "color": "purple"},
        {"class": "apple", "count": 1, "color": "black"},
    )
    colors = {("wine glass", 0.9): "red", ("wine glass", 0.8): "purple", ("apple", 0.7): "black"}
    detections = {"wine glass": disjoint(0.8, 0.9), "apple": disjoint(0.7)}
    asked = []

    def classify(name, boxes):
        asked.append((name, len(boxes)))
        return [colors[name, round(b[4], 3)] for b in boxes]

    verdict = judge(metadata, detections, classify)
    assert verdict == Verdict(False, "expected purple wine glass>=1, found 0 purple; and 1 red")
    assert asked == [("wine glass", 1), ("apple", 1)]


def test_colours_seen_are_listed_in_fixed_order():
    metadata = line("colors", {"class": "dog", "count": 2, "color": "red"})
    colors = {0.9: "blue", 0.8: "red", 0.7: "red"}
    verdict = judge(metadata, {"dog": disjoint(0.9, 0.8, 0.7)}, lambda _, bs: [colors[round(b[4], 3)] for b in bs])
    assert verdict == Verdict(False, "expected red dog>=2, found 1 red; and 1 red, 1 blue")


def test_position_dead_zone():
    assert cat_near_dog("left of", 380, 400) == Verdict(False, "expected cat left of target, found  target")
    assert cat_near_dog("left of", 380, 400, position_threshold=0).correct


def test_position_half_is_not_enough():
    assert not cat_near_dog("left of", 360, 400).correct
    assert cat_near_dog("left of", 359, 400).correct


def test_two_relations_may_hold_on_a_diagonal():
    assert not cat_near_dog("left of", 332, 332).correct
    assert cat_near_dog("left of", 331, 331).correct
    assert cat_near_dog("above", 331, 331).correct
    expected = "expected cat right of target, found above and left of target"
    assert cat_near_dog("right of", 331, 331) == Verdict(False, expected)


def test_no_target_when_its_clause_failed():
    cat = {"class": "cat", "count": 1, "position": ["left of", 0]}
    metadata = line("position", {"class": "dog", "count": 1}, cat)
    missing = judge(metadata, {"cat": [box(0, 400)]}, no_color)
    assert missing == Verdict(False, "expected dog>=1, found 0\nno target for cat to be left of")
    metadata = line("position", {"class": "dog", "count": 1, "color": "red"}, cat)
    detections = {"dog": [[*DOG, 0.95]], "cat": [box(0, 400)]}
    wrong_color = judge(metadata, detections, lambda _, boxes: ["blue"] * len(boxes))
    assert wrong_color.reason.splitlines()[1:] == ["no target for cat to be left of"]


def test_only_the_best_target_counts():
    metadata = line("position", {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    dogs = [[*DOG, 0.6], [0, 400, 50, 500, 0.9]]
    verdict = judge(metadata, {"dog": dogs, "cat": [box(100, 400)]}, no_color)
    assert verdict == Verdict(False, "expected cat left of target, found right of target")
    assert judge(metadata, {"dog": dogs[:1], "cat": [box(100, 400)]}, no_color).correct


def test_counting_threshold_is_for_counting_alone():
    single = line("single_object", {"class": "bus", "count": 1})
    assert judge(single, {"bus": disjoint(0.4)}, no_color).correct
    assert not judge(single, {"bus": disjoint(0.4)}, no_color, threshold=0.5).correct
    assert not judge(counting("bus", 1), {"bus": disjoint(0.4)}, no_color).correct
    assert judge(counting("bus", 1), {"bus": disjoint(0.4)}, no_color, counting_threshold=0.35).correct


def test_bad_boxes_options_and_colours_are_refused():
    single = line("colors", {"class": "bus", "count": 1, "color": "red"})
    with pytest.raises(ValueError, match="'bus' have shape"):
        judge(single, {"bus": [[0, 0, 1, 1]]}, no_color)
    with pytest.raises(ValueError, match=r"max_overlap is 1\.5"):
        judge(single, {}, no_color, max_overlap=1.5)
    with pytest.raises(ValueError, match="max_objects is 0"):
        judge(single, {}, no_color, max_objects=0)
    with pytest.raises(ValueError, match="2 colours for 1 boxes"):
        judge(single, {"bus": disjoint(0.9)}, lambda *_: ["red", "red"])
    with pytest.raises(ValueError, match="teal"):
        judge(single, {"bus": disjoint(0.9)}, lambda *_: ["teal"])


# --- verdict: against a slow reference in exact arithmetic -----------------------------------------------------------


def reference_relations(a, b):
    """Relations in rational numbers: revised / norm > 1/2 exactly when revised > 0 and 4 revised^2 > norm^2."""
    revised, offsets = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = Fraction(a[low] + a[high], 2) - Fraction(b[low] + b[high], 2)
        slack = Fraction(abs(a[high] - a[low]) + abs(b[high] - b[low]), 10)
        rest = max(abs(offset) - slack, Fraction(0))
        revised.append(rest if offset > 0 else -rest)
        offsets.append(offset)
    norm = offsets[0] ** 2 + offsets[1] ** 2
    names = []
    for value, (negative, positive) in zip(revised, (("left of", "right of"), ("above", "below")), strict=True):
        if 4 * value**2 > norm:
            names.append(negative if value < 0 else positive)
    return names


def reference_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return Fraction(shared, sum(areas) - shared)


def reference_verdict(metadata, detections, color_of, max_overlap):
    limit = np.float32(0.9 if metadata["tag"] == "counting" else 0.3)
    kept = {}
    for name, boxes in detections.items():
        ranked = sorted(range(len(boxes)), key=lambda i, boxes=boxes: (boxes[i][4], i), reverse=True)
        ranked = [boxes[i] for i in ranked if np.float32(boxes[i][4]) > limit][:16]
        chosen = []
        for candidate in ranked:
            if max_overlap == 1 or all(reference_iou(candidate, other) < max_overlap for other in chosen):
                chosen.append(candidate)
        kept[name] = chosen
    reasons, passed = [], {}
    for index, clause in enumerate(metadata["include"]):
        name, count = clause["class"], clause["count"]
        top = kept.get(name, [])[:count]
        passed[index] = False
        if len(top) != count:
            reasons.append(f"expected {name}>={count}, found {len(top)}")
            continue
        seen = [color_of(b) for b in top]
        if "color" in clause and any(color != clause["color"] for color in seen):
            hits = sum(color == clause["color"] for color in seen)
            listing = [f"{seen.count(color)} {color}" for color in COLORS if seen.count(color)]
            wanted = clause["color"]
            reasons.append(f"expected {wanted} {name}>={count}, found {hits} {wanted}; and {', '.join(listing)}")
            continue
        if "position" in clause:
            relation, target = clause["position"]
            if not passed[target]:
                reasons.append(f"no target for {name} to be {relation}")
                continue
            other = metadata["include"][target]
            pairs = itertools.product(top, kept[other["class"]][: other["count"]])
            wrong = [held for held in (reference_relations(a, b) for a, b in pairs) if relation not in held]
            if wrong:
                reasons.append(f"expected {name} {relation} target, found {' and '.join(sorted(wrong[0]))} target")
                continue
        passed[index] = True
    for clause in metadata.get("exclude", []):
        number = len(kept.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(reasons == [], "\n".join(reasons))


CLASSES = ("cat", "dog", "bus")
SCORES = [float(np.float32(s)) for s in (0.1, 0.3, 0.31, 0.6, 0.9, 0.91, 0.95, 0.99)]
coordinates = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 8), st.integers(1, 8))
boxes_strategy = st.builds(lambda c, s: [c[0], c[1], c[0] + c[2], c[1] + c[3], s], coordinates, st.sampled_from(SCORES))


@st.composite
def metadata_strategy(draw):
    include = []
    for index in range(draw(st.integers(1, 3))):
        clause = {"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(1, 3))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(COLORS[:2]))
        if index and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, index - 1))]
        include.append(clause)
    exclude = [{"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(1, 4))}]
    tag = draw(st.sampled_from(geneval.TAGS))
    return line(tag, *include, exclude=exclude if draw(st.booleans()) else ())


@settings(max_examples=400, deadline=None)
@given(
    metadata=metadata_strategy(),
    detections=st.dictionaries(st.sampled_from(CLASSES), st.lists(boxes_strategy, max_size=20), max_size=3),
    max_overlap=st.sampled_from([1.0, 0.5, 0.25]),
)
def test_verdict_equals_slow_reference(metadata, detections, max_overlap):
    def color_of(b):
        return COLORS[int(b[0] + b[1]) % 2]

    found = judge(metadata, detections, lambda _, boxes: [color_of(b) for b in boxes], max_overlap=max_overlap)
    assert found == reference_verdict(metadata, detections, color_of, max_overlap)


# --- summary ---------------------------------------------------------------------------------------------------------


def run_with(counts, per_prompt=4):
    """Rows of a run with these (correct, images) counts, correct images spread over the tag's prompts in turn."""
    rows = []
    prompts = geneval.load_prompts()
    for tag, (correct, images) in zip(geneval.TAGS, counts, strict=True):
        numbers = [i for i, p in enumerate(prompts) if p["tag"] == tag]
        slots = list(itertools.islice(itertools.product(range(per_prompt), numbers), images))
        for rank, (image, number) in enumerate(slots):
            rows.append(
                {
                    "filename": f"run/{number:05d}/samples/{image:05d}.png",
                    "tag": tag,
                    "prompt": prompts[number]["prompt"],
                    "correct": rank < correct,
                    "reason": "",
                    "metadata": json.dumps(prompts[number]),
                }
            )
    assert sum(images for _, images in counts) == len(rows)
    return rows


Z_IMAGE = ((314, 320), (349, 396), (245, 320), (328, 376), (158, 400), (226, 400))


@pytest.mark.parametrize(
    ("counts", "per_prompt", "overall", "images"),
    [
        (Z_IMAGE, 4, "0.74342", "73.24%"),
        (((66, 80), (38, 99), (36, 80), (57, 94), (22, 100), (13, 100)), 1, "0.43587", "41.95%"),
        (((289, 320), (214, 396), (120, 320), (303, 376), (32, 400), (60, 364)), 4, "0.47820", "46.78%"),
        (((318, 320), (384, 394), (225, 320), (320, 372), (202, 400), (231, 400)), 4, "0.76903", "76.16%"),
    ],
    ids=["Z-Image", "BAGEL", "Meissonic", "FlyMyAI"],
)
def test_published_counts_give_published_scores(counts, per_prompt, overall, images):
    text = summarize(run_with(counts, per_prompt)).text()
    assert f"Overall score (avg. over tasks): {overall}" in text
    assert f"% correct images: {images}" in text


def test_text_has_the_reference_lines():
    assert summarize(run_with(Z_IMAGE)).text().splitlines() == [
        "Summary",
        "=======",
        "Total images: 2212",
        "Total prompts: 553",
        "% correct images: 73.24%",
        # 158 and 226 correct images in turn reach all 100 prompts of their tags; so do all other tags.
        "% correct prompts: 100.00%",
        "",
        "Task breakdown",
        "==============",
        "single_object    = 98.12% (314 / 320)",
        "two_object       = 88.13% (349 / 396)",
        "counting         = 76.56% (245 / 320)",
        "colors           = 87.23% (328 / 376)",
        "position         = 39.50% (158 / 400)",
        "color_attr       = 56.50% (226 / 400)",
        "",
        "Overall score (avg. over tasks): 0.74342",
    ]


def test_summary_does_not_depend_on_the_order_of_rows():
    rows = run_with(Z_IMAGE)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    expected = summarize(rows)
    assert summarize(shuffled) == expected
    assert list(summarize(shuffled).tasks) == list(geneval.TAGS)
    assert summarize(rows, seed=1) != expected


def test_files_are_sorted_by_number_not_by_name():
    rows = [
        {"filename": f"x/{folder}/samples/0.png", "tag": tag, "correct": True, "metadata": {"p": tag}}
        for folder, tag in (("10", "second"), ("9", "first"))
    ]
    assert list(summarize(rows).tasks) == ["first", "second"]
    for row in rows:
        del row["filename"]
    assert list(summarize(rows).tasks) == ["second", "first"]


def test_prompt_accuracy_counts_any_correct_image():
    verdicts = {"a": [True, False], "b": [False, False], "c": [True, True], "d": [False, False]}
    rows = [{"tag": "t", "correct": v, "metadata": p} for p, vs in verdicts.items() for v in vs]
    summary = summarize(rows)
    assert (summary.num_images, summary.num_prompts) == (8, 4)
    assert (summary.images.mean, summary.prompts.mean, summary.overall.mean) == (3 / 8, 1 / 2, 3 / 8)


def test_bootstrap_resamples_prompts_inside_each_tag():
    """Four equal images a prompt carry the information of one: the interval is a binomial's over 100 prompts."""
    rows = [
        {"tag": tag, "correct": prompt < hits, "metadata": f"{tag} {prompt}"}
        for tag, hits in (("a", 50), ("b", 100))
        for prompt in range(100)
        for _ in range(4)
    ]
    summary = summarize(rows)
    a, b = summary.tasks["a"].accuracy, summary.tasks["b"].accuracy
    assert (b.mean, b.low, b.high) == (1, 1, 1)
    half = 1.96 * math.sqrt(0.25 / 100)
    assert a.low == pytest.approx(0.5 - half, abs=0.015) and a.high == pytest.approx(0.5 + half, abs=0.015)
    assert summary.overall.high - summary.overall.low == pytest.approx((a.high - a.low) / 2, abs=1e-9)
    assert summary.prompts.low == pytest.approx(summary.images.low) == pytest.approx(summary.overall.low)


def test_summary_as_json_and_as_text_agree():
    summary = summarize(run_with(Z_IMAGE))
    data = json.loads(json.dumps(summary.to_dict()))
    assert data["tasks"]["single_object"]["correct"] == 314
    assert data["tasks"]["single_object"]["mean"] == 0.98125
    assert data["overall"]["low"] < data["overall"]["mean"] < data["overall"]["high"]
    printed = str(summary)
    assert printed.startswith(summary.text() + "\n\n95% intervals")
    overall = data["overall"]
    assert printed.endswith(f"overall          = [{overall['low']:.2%}, {overall['high']:.2%}]")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "results is empty"),
        ([{"tag": "t", "correct": True}], "lacks metadata"),
        ([{"tag": "t", "correct": "yes", "metadata": "m"}], "correct='yes'"),
        ([{"tag": "t", "correct": True, "metadata": "m", "filename": "a.png"}], "'a.png' is not of the form"),
        (
            [
                {"tag": "t", "correct": True, "metadata": "m"},
                {"tag": "t", "correct": True, "metadata": "m", "filename": "0/samples/0.png"},
            ],
            "1 of 2 results have a filename",
        ),
    ],
)
def test_bad_results_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        summarize(rows)


def test_importing_the_module_alone_does_not_load_torch():
    """``visearch/__init__`` is stood in for by an empty package: what is tested is this module's own imports."""
    code = (
        "import importlib.util, sys, types\n"
        "spec = importlib.util.find_spec('visearch')\n"
        "bare = types.ModuleType('visearch'); bare.__path__ = list(spec.submodule_search_locations)\n"
        "sys.modules['visearch'] = bare\n"
        "import visearch.geneval\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
        "print(len(visearch.geneval.load_prompts()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "553"


def test_every_published_prompt_is_parsed_back_into_its_line():
    for line in geneval.load_prompts():
        assert geneval.parse_prompt(line["prompt"]) == line


@pytest.mark.parametrize("prompt", ["two cows", "a photo of five cows", "a photo of a unicorn", "a photo of"])
def test_other_wording_is_refused_with_examples(prompt):
    with pytest.raises(ValueError, match=r"GenEval's wording.*a photo of two cows"):
        geneval.parse_prompt(prompt)
