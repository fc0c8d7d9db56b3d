"""GenEval's results as the app browses them: which images, with what on them, and from where."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from app_results import judged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from visearch.app.geneval_tab import _page, _summary
from visearch.app.verdicts import SHOWN, drawn, read_results

VERDICTS = {0: True, 1: False, 2: False, 3: True}


@pytest.fixture
def one(tmp_path):
    return read_results([judged(tmp_path / "one", VERDICTS)])


@pytest.fixture
def both(tmp_path):
    once = {0: False, 1: False, 2: True, 3: True}
    return read_results([judged(tmp_path / "best", VERDICTS), judged(tmp_path / "once", once)])


def keys(results, *filters) -> list[int]:
    return [int(shot.key[:5]) for shot in results.matching(*filters)]


# --- which --------------------------------------------------------------------------------------------------------


def test_images_are_filtered_by_task_and_verdict(both):
    found = {shown: keys(both, None, shown) for shown in SHOWN}
    assert found == {"wrong": [1, 2], "right": [0, 3], "all": [0, 1, 2, 3], "gained": [0], "lost": [2]}
    assert keys(both, "colors", "wrong") == [1] and keys(both, "colors", "lost") == []
    with pytest.raises(ValueError, match="'worst' is unknown; choose one of wrong, right"):
        both.matching(None, "worst")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 30), st.booleans(), min_size=1, max_size=8), st.data())
def test_right_and_wrong_are_all_and_gained_minus_lost_is_the_gain(tmp_path_factory, verdicts, data):
    root = tmp_path_factory.mktemp("runs")
    once = {number: data.draw(st.booleans()) for number in verdicts}
    results = read_results([judged(root / "a", verdicts), judged(root / "b", once)])
    found = {shown: len(results.matching(None, shown)) for shown in SHOWN}
    assert found["right"] + found["wrong"] == found["all"] == len(verdicts)
    assert found["gained"] - found["lost"] == sum(verdicts.values()) - sum(once.values())


def test_without_a_baseline_nothing_is_gained(one):
    assert keys(one, None, "gained") == keys(one, None, "lost") == []


def test_the_table_is_that_of_the_summary_with_its_gain(both, one):
    tasks = [row["task"] for row in both.table]
    assert tasks == ["counting", "colors", "overall"] and both.table[-1]["gain"] == 0.0
    assert "Gain" in _summary(both) and "Gain" not in _summary(one)


# --- what is on them ----------------------------------------------------------------------------------------------


def test_the_box_is_where_the_detector_saw_it(one):
    """32 pixels become 384, twelve each; the label lies above the box."""
    shot = drawn(one.shots[0])
    pixels = np.asarray(Image.open(io.BytesIO(shot.content)).convert("RGB")).astype(int)
    assert pixels.shape == (384, 384, 3)
    rows, columns = (pixels[..., 1] > pixels[..., 0] + 60).nonzero()
    left, right, bottom = columns.min(), columns.max(), rows.max()
    assert (left, right, bottom) == pytest.approx((48, 240, 288), abs=3)
    assert shot.alt.endswith("the detector found 1 cow, 0 bus")


def test_a_box_beyond_the_image_is_drawn_within(tmp_path):
    details = json.dumps({"cow": [[-50.0, -50.0, 90.0, 10.0, 0.5], [31.5, 31.5, 40.0, 40.0, 0.4]]})
    assert drawn(read_results([judged(tmp_path / "run", {0: True}, details=details)]).shots[0]) is not None


def test_results_without_boxes_show_the_reason_alone(tmp_path):
    results = read_results([judged(tmp_path / "run", {1: False}, details="")])
    assert "detector" not in drawn(results.shots[0]).alt
    assert "expected red cow" in _page(results, "all tasks", "wrong", 0)


def test_an_image_that_is_gone_leaves_its_verdict(one):
    one.shots[1].file.unlink()
    page = _page(one, "all tasks", "wrong", 0)
    assert "The image file is gone." in page and page.count("<img") == 1


def test_words_of_prompts_and_reasons_are_never_markup(both):
    page = _page(both, "all tasks", "all", 0) + _summary(both)
    assert "<b>prompt" not in page and "<i>none" not in page
    assert "&lt;b&gt;prompt" in page and "&amp; &lt;i&gt;none" in page


def test_pages_hold_every_image_once(tmp_path):
    results = read_results([judged(tmp_path / "run", dict.fromkeys(range(30), False))])
    pages = [_page(results, "all tasks", "wrong", page) for page in range(3)]
    assert [page.count("<article") for page in pages] == [12, 12, 6]
    assert "25 to 30 of 30 images" in pages[2]


# --- from where ---------------------------------------------------------------------------------------------------


def test_images_come_from_the_named_folder_whatever_the_results_say(tmp_path):
    run = judged(tmp_path / "run", {7: True}, filename="/etc/00007/samples/00000.png")
    (shot,) = read_results([run / "results.jsonl"]).shots
    assert shot.file == run / "00007/samples/00000.png"


@pytest.mark.parametrize("name", ["../../etc/passwd", "00000/../x/samples/00000.png", "a/b.png"])
def test_other_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not of the form"):
        read_results([judged(tmp_path / "run", {0: True}, filename=name)])


def test_bad_folders_are_one_clear_line(tmp_path):
    (tmp_path / "empty").mkdir()
    run = judged(tmp_path / "run", {0: True})
    with pytest.raises(ValueError, match=r"empty holds no results.jsonl; run: visearch geneval score"):
        read_results([tmp_path / "empty"])
    with pytest.raises(ValueError, match="names 3 folders; give one, or a search and its baseline"):
        read_results([run] * 3)
    with pytest.raises(ValueError, match="1 and 1 prompts, 0 of them in common"):
        read_results([run, judged(tmp_path / "other", {1: True})])
