"""Frames as HTML and SVG."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from app_studio import STAGES, MadeUpStudio, candidate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visearch.app import plots, views
from visearch.app.frames import Cost, Frame, Media, Settings, Share
from visearch.protocols import Event

MARKS = ("<script>", "</div>", '"', "'", "&", "<b onclick=x>", "javascript:", "`${1}`")
HOSTILE = st.lists(st.sampled_from(MARKS) | st.text(max_size=6), max_size=4).map(lambda parts: "x" + "".join(parts))


def frames() -> list[Frame]:
    return list(MadeUpStudio().run(Settings("two cows, hack")))


class Parsed(HTMLParser):
    """Tags, attributes and text of HTML; fails where tags do not match."""

    VOID = ("img", "br", "line", "circle", "rect", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def everything(frame: Frame) -> str:
    pieces = [*views.stage(frame), views.meter(frame), views.status(frame), views.banner(frame), *views.board(frame)]
    pieces += [views.lineage_svg(frame), views.judges_table(frame), views.ledger_table(frame)]
    pieces += [views.take_home(frame.settings.prompt, frame.settings.prompt, frame.settings.prompt)]
    pieces += [views.cost_line(frame.settings, Cost(8.0, 8, 2, 12, 3.0), frame.settings.prompt)]
    pieces += [views.problem_line(frame.settings.prompt), views.explanation(frame.settings.prompt)]
    pieces += plots.figures(frame)
    return "".join(pieces) + views.downloads({frame.settings.prompt: b"x"})


@given(HOSTILE)
@settings(max_examples=60, deadline=None)
def test_no_word_from_outside_becomes_markup(text: str) -> None:
    """Whatever is typed, or comes from a reward, a model or an error: tags and handlers stay those of plain words."""

    def spoilt(frame: Frame, text: str) -> Frame:
        media = Media("image", "image/png", frame.baseline.content, text)
        rows = (replace(candidate(0, STAGES, "finished"), id=text, parent=text, media=media),)
        rows += (candidate(1, 4, lineage=(Event(text, 0, 1),)),)
        return replace(
            frame,
            settings=replace(frame.settings, prompt=text, reward=text),
            baseline=media,
            candidates=rows,
            winner=text,
            ledger=(Share(text, 1, 1.0),),
            held_out={text: (0.0, 1.0)},
            held_out_curve={text: frame.curve},
            held_out_best_of_n={text: frame.best_of_n},
            warnings=(text,),
            error=text,
        )

    plain, hostile = (Parsed(everything(spoilt(frames()[-1], words))) for words in ("word", text))
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    assert text in hostile.text


@pytest.mark.parametrize("media", [None, "image", "video"])
def test_previews_may_be_missing_stills_or_videos(media: str | None) -> None:
    shown = media and Media(media, f"{media}/x", frames()[-1].baseline.content, "two cows")
    html = views.media_html(shown or None)
    parsed = Parsed(html)
    assert parsed.tags == {{None: "div", "image": "img", "video": "video"}[media]}
    label = dict(parsed.attributes).get("alt") or dict(parsed.attributes)["aria-label"]
    assert label == ("two cows" if media else "waiting for the first preview")


@pytest.mark.parametrize(("side", "crisp"), [(64, True), (512, False)])
def test_only_tiny_images_show_their_pixels(side: int, crisp: bool) -> None:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    assert ("vi-tiny" in views.media_html(Media("image", "image/png", file.getvalue(), ""))) == crisp


def test_cards_of_candidates_that_left_do_not_change() -> None:
    """Nor do they travel again: their pictures are the bulk of a frame."""
    before, after = frames()[3:5]
    gone = [k for k, c in enumerate(before.candidates) if c.state == "pruned"]
    assert gone
    assert [views.board(before)[k] for k in gone] == [views.board(after)[k] for k in gone]


@given(st.lists(st.integers(0, 9), max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_the_tree_shows_each_candidate_once_below_its_parent(parents: list[int], data: st.DataObject) -> None:
    rows = [candidate(0, STAGES, "finished")]
    for number, parent in enumerate(parents, 1):
        known = rows[parent % len(rows)].id
        state = data.draw(st.sampled_from(["live", "pruned", "replaced", "finished"]))
        op = data.draw(st.sampled_from(["fork", "renoise", "perturb"]))
        lineage = (Event("init", 0, 1), Event(op, 8, number, 4))
        rows.append(candidate(number, data.draw(st.integers(8, STAGES)), state, parent=known, lineage=lineage))
    frame = Frame(Settings("x"), "searching", stages=STAGES, candidates=rows[::-1], winner="0")
    svg = ElementTree.fromstring(views.lineage_svg(frame))
    nodes = {n.get("data-candidate"): float(n.find("line").get("y1")) for n in svg.iter("a")}
    assert sorted(nodes) == sorted(c.id for c in rows)
    assert len(set(nodes.values())) == len(rows)
    assert max(nodes.values()) < float(svg.get("height"))
    assert all(nodes[c.parent] < nodes[c.id] for c in rows if c.parent)
    branches = [(float(b.get("y1")), float(b.get("y2"))) for b in svg.findall("line")]
    assert sorted(branches) == sorted((nodes[c.parent], nodes[c.id]) for c in rows if c.parent)
    assert all(0 <= float(x.rstrip("%")) <= 100 for n in svg.iter("line") for x in (n.get("x1"), n.get("x2")))


def test_what_was_noised_back_begins_at_the_stage_it_went_back_to() -> None:
    child = candidate(1, STAGES, lineage=(Event("init", 0, 1), Event("renoise", STAGES, 2, 0)), parent="0")
    copy = candidate(2, STAGES, lineage=(Event("init", 0, 1), Event("fork", STAGES, 2, 1)), parent="0")
    frame = Frame(Settings("x"), "searching", stages=STAGES, candidates=(candidate(0, STAGES), child, copy))
    nodes = ElementTree.fromstring(views.lineage_svg(frame)).iter("a")
    starts = {node.get("data-candidate"): node.find("line").get("x1") for node in nodes}
    assert starts["1"] == starts["0"] != starts["2"]


def test_each_state_has_a_shape_of_its_own() -> None:
    rows = [candidate(k, 8, state) for k, state in enumerate(["live", "pruned", "replaced", "finished"])]
    frame = Frame(Settings("x"), "done", stages=STAGES, candidates=(*rows, candidate(4, 8, "finished")), winner="4")
    shapes = re.findall(r'overflow="visible">(.*?)</svg>', views.lineage_svg(frame))
    assert len(set(shapes)) == 5


@given(st.floats(0, 1e6), st.floats(0, 100))
def test_the_meter_stays_within_its_bounds(spent: float, planned: float) -> None:
    frame = replace(frames()[-1], images=spent, cost=Cost(planned, 1, 1, 0, None))
    attributes = dict(Parsed(views.meter(frame)).attributes)
    assert 0 <= int(attributes["aria-valuenow"]) <= 100


def test_progress_tells_how_it_ends() -> None:
    last = frames()[-1]
    texts = {phase: views.status(replace(last, phase=phase)) for phase in ("done", "budget", "cancelled", "failed")}
    assert len(set(texts.values())) == 4
    assert all("8 candidates, 2 finished, 6 left early" in text for text in texts.values())


def test_there_is_a_figure_of_the_guide_and_of_each_judge_with_best_of_n_dashed() -> None:
    guide, judge = plots.figures(frames()[-1])
    for figure in (guide, judge):
        ids, used = re.findall(r'\bid="(.*?)"', figure), re.findall(r'(?:url\(|href=")#(.*?)[)"]', figure)
        assert len(set(ids)) == len(ids) and used and set(used) <= set(ids)
        assert figure.count("stroke-dasharray: 4.44,1.92") == 2  # best of n, in the plot and in its legend
        assert "<style" not in figure and not re.search("#0[1-7]0[2-8]0[3-9]", figure)
        assert {"sampled once", "best of n", "this search"} <= set(re.findall(r">([a-z ]+)</text>", figure))
    assert not set(re.findall(r'\bid="(.*?)"', guide)) & set(re.findall(r'\bid="(.*?)"', judge))
    alone = replace(frames()[-1], best_of_n=(), held_out_best_of_n={})
    assert all("best of n" not in figure and "best of" not in figure for figure in plots.figures(alone))


def test_there_is_no_figure_before_something_was_finished() -> None:
    assert [len(plots.figures(frame)) for frame in frames()] == [0, 0, 0, 0, 1, 2, 2, 2, 2]


def test_the_table_of_judges_is_there_at_the_end_and_takes_best_of_n_in_when_it_comes() -> None:
    first, *_, last = frames()
    assert views.judges_table(first) == views.judges_table(replace(last, phase="searching")) == ""
    assert "Best of 4" in views.judges_table(last)
    assert "Best of" not in views.judges_table(replace(last, best_of_n=(), held_out_best_of_n={}))


def test_downloads_hold_their_files() -> None:
    html = views.downloads({"winner.png": b"\x89PNG", "result.json": b"{}"})
    links = re.findall(r'download="(.*?)" href="[^,]*,(.*?)"', html)
    held = {name: base64.b64decode(content) for name, content in links}
    assert held == {"winner.png": b"\x89PNG", "result.json": b"{}"}
