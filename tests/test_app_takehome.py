"""What is taken home gives the very image on screen again, links come back, and the report stands alone."""

from __future__ import annotations

import ast
import html
import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from visearch.app import takehome
from visearch.app.frames import Candidate, Frame, Limits, Settings, Share
from visearch.app.studio import GUIDES, JUDGES, MODELS, SEARCHES, Source, Studio
from visearch.cli import main
from visearch.protocols import Event

NASTY = """-a photo of "two" 'cows' $HOME `ls` \\n <b>&amp;</b> ${x} 𓃔"""
PROMPTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=60).filter(str.strip)
SETTINGS = st.builds(
    Settings,
    PROMPTS,
    model=st.sampled_from(list(MODELS)),
    search=st.sampled_from(list(SEARCHES)),
    reward=st.sampled_from(list(GUIDES)),
    held_out=st.lists(st.sampled_from(list(JUDGES)), unique=True).map(tuple),
    images=st.integers(1, Limits.images),
    seconds=st.none() | st.floats(0, Limits.seconds, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
    best_of_n=st.booleans(),
)
STUDIO = Studio()
TREE, CURVE = 'class="vi-tree"', "against images of work"


# --- code and command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model by its path, which has a quote in it."""
    made = tmp_path_factory.mktemp("it's a model")
    tiny.build("cogview4").save_pretrained(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("which", ["embedded", "folder"])
def test_code_and_command_draw_the_very_image_on_screen(which, folder, tmp_path):
    asked = Settings(NASTY, model="emoji-64-v", search="halving-steep", images=4, seed=5)
    if which == "folder":
        asked = replace(asked, prompt="a photo of a cow", model="mine", search="smc", images=2)
    studio = Studio({**MODELS, "mine": Source(str(folder))})
    *_, last = studio.run(asked)
    assert last.phase == "done", last.error
    (tmp_path / "again.py").write_text(takehome.python(asked, studio), encoding="utf-8")
    env = {**os.environ, "PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))}
    for words in ([sys.executable, "again.py"], ["sh", "-c", takehome.command(asked, studio)]):
        subprocess.run(words, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)
    (written,) = (tmp_path / "outputs").iterdir()
    screen = Image.open(io.BytesIO(last.find(last.winner).media.content))
    for again in (tmp_path / "winner.png", written / "winner.png"):
        assert Image.open(again).tobytes() == screen.tobytes()
    assert json.loads((written / "result.json").read_text())["winner"]["id"] == last.winner


@given(SETTINGS.filter(lambda s: not s.held_out))
@example(Settings(NASTY))
def test_code_and_command_say_the_settings_and_nothing_else(settings):
    calls = [node for node in ast.walk(ast.parse(takehome.python(settings, STUDIO))) if isinstance(node, ast.Call)]
    by_name = {node.func.id: node for node in calls if isinstance(node.func, ast.Name)}
    assert ast.literal_eval(by_name["pipe"].args[0]) == settings.prompt
    given_ = {word.arg: word.value for word in by_name["SearchPipeline"].keywords}
    assert ast.literal_eval(given_["search"]) == STUDIO.text(settings)
    assert ast.literal_eval(given_["reward"]) == settings.reward
    budget = {word.arg: ast.literal_eval(word.value) for word in by_name["Budget"].keywords}
    assert budget.get("max_seconds") == settings.seconds and budget["max_images"] == settings.images
    words = shlex.split(takehome.command(settings, STUDIO))
    assert words[:2] == ["visearch", "run"] and words[-2:] == ["--", settings.prompt]
    options = dict(zip(words[2:-2:2], words[3:-2:2]))
    assert options["--search"] == STUDIO.text(settings) and options["--seed"] == str(settings.seed)
    assert float(options.get("--max-seconds", "nan")) == (settings.seconds or pytest.approx(float("nan"), nan_ok=True))


def test_the_command_reaches_the_search_with_its_arguments(tmp_path, capsys):
    """Refused by the budget, so that nothing runs."""
    asked = Settings(NASTY, search="refine", images=8)
    words = shlex.split(takehome.command(asked, STUDIO))[1:]
    at = words.index("--max-images") + 1
    assert main([*words[:1], "--out", str(tmp_path), *words[1:at], "0", *words[at + 1 :]]) == 2
    assert "max_images=0.0 must be greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize("make", [takehome.python, takehome.command])
def test_bad_settings_are_not_written_down(make):
    with pytest.raises(ValueError, match="line break"):
        make(Settings("a cow\nimport os"), STUDIO)
    with pytest.raises(ValueError, match="not offered"):
        make(Settings("a cow", model="../secret"), STUDIO)
    with pytest.raises(ValueError, match="made in code"):
        make(Settings("a cow", model="mine"), Studio({"mine": lambda: None}))


def test_judges_that_cannot_read_the_prompt_are_not_in_the_code():
    free, strict = (Settings(p, held_out=("judge-a",)) for p in ("a painting of dusk", "a photo of two cows"))
    assert "judge-a" not in takehome.python(free, STUDIO) + takehome.command(free, STUDIO)
    assert 'held_out=["judge-a"]' in takehome.python(strict, STUDIO)
    assert "--held-out judge-a" in takehome.command(strict, STUDIO)


# --- links ----------------------------------------------------------------------------------------------------


@given(SETTINGS)
def test_a_link_brings_the_settings_back(settings):
    assert takehome.restore(takehome.query(settings), STUDIO) == (settings, ())


@given(st.text(max_size=200) | st.lists(st.tuples(st.sampled_from([*vars(Settings("")), "x"]), st.text())).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)))  # fmt: skip
@example("?" + "&".join("x=1" for _ in range(100)))
@example("seed=" + "9" * 5000)
@example("images=nan&seconds=nan&prompt=%00%ff")
def test_a_broken_link_gives_settings_that_can_be_shown(text):
    settings, notes = takehome.restore(text, STUDIO)
    assert isinstance(notes, tuple) and takehome.from_query(text, STUDIO) == settings
    for what, value in vars(settings).items():
        if (what, value) != ("prompt", ""):
            STUDIO.check_value(what, value)


def test_what_is_wrong_in_a_link_is_told():
    settings, notes = takehome.restore("prompt=a+cow&model=/etc/passwd&images=zwei&seed=4&evil=1", STUDIO)
    assert settings == Settings("a cow", seed=4)
    assert [note.split()[0] for note in notes] == ["evil", "model", "images"]


# --- report and files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frame() -> Frame:
    """The last frame of a run with copies, pruned candidates and judges, with a prompt that is code elsewhere."""
    studio = Studio({**MODELS})
    *_, last = studio.run(
        Settings("a photo of two cows", model="emoji-64-v", search="smc", images=3, held_out=("judge-a",))
    )
    assert last.phase == "done", last.error
    evil = f"{NASTY}<script>alert(1)</script>"
    strange = Candidate("9<i>", 9, 1, "pruned", 2, None, (), (Event("init", 0, 1, 9),))
    return replace(
        last,
        settings=replace(last.settings, prompt=evil, held_out=()),
        candidates=(*last.candidates, strange),
        warnings=("<i>hacked</i>",),
        ledger=(*last.ledger, Share("<i>", 1, 0.0)),
    )


class Page(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset", "data")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag == "img":
            self.images.append(found)


def test_the_report_stands_alone_and_shows_words_as_words(frame):
    text = takehome.report_html(frame, STUDIO)
    page = Page(text)
    assert page.addresses and all(a.startswith(("data:", "#")) for a in page.addresses)
    assert not re.findall(r"url\((?!['\"]?(?:data:|#))|@import", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert not {"script", "link", "iframe", "object", "form", "i"} & set(page.tags)
    assert page.images and all(image.get("alt") for image in page.images)
    assert TREE in text and CURVE in text
    assert {a[1:] for a in page.addresses if a.startswith("#candidate")} <= set(page.ids)
    plain = html.unescape(text)
    for said in (NASTY, "9<i>", "<i>hacked</i>", takehome.python(frame.settings, STUDIO), "judge-a"):
        assert said in plain


def test_the_report_does_without_matplotlib(frame, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    another = replace(frame, baseline_score=frame.baseline_score + 1)  # whose plot was not drawn before
    text = takehome.report_html(another, STUDIO)
    assert "visearch[plots]" in text and TREE in text and CURVE not in text


def test_a_run_that_finished_nothing_has_files_too():
    settings = Settings("a photo of two cows", model="emoji-64-v")
    found = takehome.files(STUDIO, Frame(settings, "failed", error="out of memory"))
    assert set(found) == {"result.json", "report.html", "again.py", "visearch.zip"}
    assert "out of memory" in found["report.html"].decode()


def test_a_model_that_was_made_in_code_has_files_without_code():
    found = takehome.files(Studio({"mine": lambda: None}), Frame(Settings("a cow", model="mine"), "cancelled"))
    assert "again.py" not in found and "no command names it" in found["report.html"].decode()
    assert "command" not in json.loads(found["result.json"])


def test_files_hold_what_is_on_screen(frame, tmp_path):
    found = STUDIO.files(frame, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in found} == found
    assert found["winner.png"] == frame.find(frame.winner).media.content
    assert found["baseline.png"] == frame.baseline.content
    result = json.loads(found["result.json"])
    assert result["candidates"][0]["id"] == result["winner"] == frame.winner
    assert result["settings"]["seed"] == frame.settings.seed and result["command"].startswith("visearch run")
    assert Image.open(io.BytesIO(found["contact-sheet.png"])).width > 256
    with zipfile.ZipFile(io.BytesIO(found["visearch.zip"])) as archive:
        assert {n: archive.read(n) for n in archive.namelist()} == {
            n: c for n, c in found.items() if n != "visearch.zip"
        }
