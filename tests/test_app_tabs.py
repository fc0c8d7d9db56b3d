"""The app's further tabs in a real browser: blind votes, breeding by favourites, GenEval's failures."""

from __future__ import annotations

import base64
import io
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from app_browser import chromium, serious, served, visit
from app_results import judged
from app_studio import MadeUpStudio
from tiny import FAMILIES, build

from visearch.app.compare_tab import _tally
from visearch.app.frames import Frame, Settings
from visearch.app.studio import Model
from visearch.app.votes import Ballot, Tally

SIZES = [{"width": 1440, "height": 1000}, {"width": 390, "height": 844}]
STAGE = "#vi-breeding"


class Rehearsal(MadeUpStudio):
    """Each search finds a picture of its own, but for twins; breeding runs a tiny pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = Model(build("sd3"), {**FAMILIES["sd3"].call, "num_inference_steps": 4})

    def run(self, settings: Settings, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Frame]:
        own = settings.prompt if "twins" in settings.prompt else f"{settings.prompt} {settings.search}"
        for frame in super().run(replace(settings, prompt=own), cancelled):
            yield replace(frame, settings=settings)

    def model(self, name: str) -> Model:
        return self.lent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("results")
    best, once = judged(root / "best", dict.fromkeys(range(20), False)), dict.fromkeys(range(20), True)
    with served(Rehearsal(), folders=[best, judged(root / "once", once)]) as url:
        yield url


@pytest.fixture
def page(browser: Any, site: str) -> Iterator[Any]:
    with visit(browser, site) as opened:
        yield opened


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


# --- compare ------------------------------------------------------------------------------------------------------


def compare(page: Any, prompt: str) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    button(page, "Run both").click()


def test_the_vote_is_blind_and_then_all_is_told(page: Any) -> None:
    compare(page, "two cows")
    button(page, "A is better").wait_for()
    before = page.locator("#vi-duel").inner_html()
    assert "halving" not in before and "best-of-n" not in before and "hue" not in before
    assert page.locator("#vi-duel img").count() == 2
    seen = [image.get_attribute("src") for image in page.locator("#vi-duel img").all()]
    button(page, "A is better").click()
    page.locator("#vi-tally table").wait_for()
    assert [image.get_attribute("src") for image in page.locator("#vi-duel img").all()] == seen
    names = page.locator("#vi-duel .vi-title").all_inner_texts()
    assert sorted(names) == ["best-of-n", "halving"]
    assert f"A, which is {names[0]}" in page.locator("#vi-duel .vi-say").inner_text()
    table = page.locator("#vi-duel table").inner_text()
    assert all(word in table for word in ("emoji-clip", "judge-a", "Images spent", "Seconds"))
    won = "1, 0, 0" if names[0] == "best-of-n" else "0, 0, 1"
    row = page.locator("#vi-tally tbody tr").inner_text()
    assert won in row and "1 vote" in row and "not decided yet" in row
    assert not button(page, "A is better").is_visible()


def test_the_tally_grows_with_the_session_and_is_its_own(browser: Any, site: str, page: Any) -> None:
    for votes in ("1 vote", "2 votes"):
        compare(page, "two dogs")
        button(page, "Same").click()
        page.locator("#vi-tally", has_text=votes).wait_for()
    assert "50%" in page.locator("#vi-tally").inner_text()
    with visit(browser, site) as other:
        other.get_by_role("tab", name="Compare").click()
        assert not other.locator("#vi-tally table").count()


def test_the_same_picture_twice_needs_no_vote(page: Any) -> None:
    compare(page, "twins")
    page.locator("#vi-duel", has_text="the same picture").wait_for()
    assert "0, 1, 0" in page.locator("#vi-tally").inner_text()
    assert not button(page, "Same").is_visible()


def test_what_was_cancelled_or_failed_is_not_voted_on(page: Any) -> None:
    compare(page, "hold")
    page.locator("#vi-duel .vi-meter").first.wait_for()
    page.locator("#vi-compare-cancel").click()
    page.locator("#vi-duel", has_text="was cancelled: a vote needs two searches").wait_for()
    page.locator("#vi-compare-run:not([disabled])").wait_for()
    compare(page, "break")
    page.get_by_role("alert").filter(has_text="ran out of memory").wait_for()
    assert not page.locator("#vi-tally table").count() and not button(page, "Same").is_visible()


def test_a_search_is_not_compared_with_itself(page: Any) -> None:
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("The other").click()
    page.get_by_role("option", name="best-of-n").click()
    button(page, "Run both").click()
    page.locator(".toast-body", has_text="both searches are 'best-of-n'; choose two different ones").wait_for()
    assert page.locator("#vi-compare-run").is_enabled()


def test_six_votes_of_six_decide() -> None:
    tally = Tally()
    for votes in range(1, 7):
        tally = tally.counted(Ballot("smc", "<b>halving"), "A")
        assert ("not decided yet" in _tally(tally)) == (votes < 6)
    assert "smc is preferred" in _tally(tally) and "<b>" not in _tally(tally)


# --- you are the reward -------------------------------------------------------------------------------------------


def breed(page: Any, prompt: str = "a photo of two cows") -> None:
    page.get_by_role("tab", name="You are the reward").click()
    page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.locator("#vi-breed-start").click()


def pictures(page: Any, generation: int) -> Any:
    page.locator(STAGE, has_text=f"Generation {generation} of 4").locator("[data-picture]").first.wait_for()
    return page.locator(f"{STAGE} [data-picture]")


def no_thread_is_left() -> None:
    deadline = time.monotonic() + 60
    while any(t.name == "visearch-favourites" for t in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread outlives its page"
        time.sleep(0.05)


def test_favourites_breed_by_keyboard_to_a_winner_to_take_home(page: Any) -> None:
    breed(page)
    for generation in (1, 2, 3):
        pictures(page, generation).nth(2).focus()
        page.keyboard.press("Space")
        assert pictures(page, generation).nth(2).get_attribute("aria-pressed") == "true"
        button(page, "Breed the next generation").focus()
        page.keyboard.press("Enter")
    shown = pictures(page, 4)
    assert not button(page, "Breed the next generation").is_visible()
    assert {one.get_attribute("aria-label").split()[-1] for one in shown.all()} == {"19"}
    shown.nth(5).click()
    shown.nth(0).click()
    assert [place.inner_text() for place in page.locator(".vi-place").all() if place.inner_text()] == ["2", "1"]
    best = shown.nth(5).locator("img").get_attribute("src")
    button(page, "Finish with these").click()
    page.locator(STAGE, has_text="picture 30 won").wait_for()
    assert page.locator(f"{STAGE} .vi-figure img").get_attribute("src") == best
    assert page.locator("#vi-family .vi-liked").count() == 5
    with page.expect_download() as download:
        page.locator(".vi-download").click()
    with zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes())) as archive:
        assert archive.read("winner.png") == base64.b64decode(best.split(",", 1)[1])
        assert {"winner.json", "winner.safetensors"} <= set(archive.namelist())
    no_thread_is_left()


def test_a_choice_can_be_taken_back(page: Any) -> None:
    breed(page)
    shown = pictures(page, 1)
    for _ in range(2):
        shown.nth(1).click()
    button(page, "Finish with these").click()
    page.locator(STAGE, has_text="no favourite was chosen").wait_for()


def test_cancel_and_a_closed_browser_end_the_thread(browser: Any, site: str, page: Any) -> None:
    breed(page)
    pictures(page, 1)
    page.locator("#vi-breed-stop").click()
    page.locator(STAGE, has_text="cancelled").wait_for()
    no_thread_is_left()
    with visit(browser, site) as other:
        breed(other)
        pictures(other, 1)
        assert any(t.name == "visearch-favourites" for t in threading.enumerate())
    no_thread_is_left()


def test_an_empty_prompt_breeds_nothing(page: Any) -> None:
    breed(page, "  ")
    page.locator(".toast-body", has_text="is empty; say what the image should show").wait_for()
    assert page.locator("#vi-breed-start").is_enabled()
    no_thread_is_left()


# --- GenEval ------------------------------------------------------------------------------------------------------


def test_failures_are_filtered_and_paged(page: Any) -> None:
    page.get_by_role("tab", name="GenEval").click()
    count = page.locator(".vi-count")
    page.locator("#vi-shots", has_text="1 to 12 of 20 images").wait_for()
    assert page.locator(".vi-shot").first.locator("img").count() == 2
    button(page, "Next").click()
    page.locator("#vi-shots", has_text="13 to 20 of 20 images").wait_for()
    page.get_by_label("only the search is right").check()
    page.locator("#vi-shots", has_text="No image here").wait_for()
    page.get_by_label("only the baseline is right").check()
    page.get_by_role("combobox", name="Task").click()
    page.get_by_role("option", name="colors").click()
    page.locator("#vi-shots", has_text="1 to 10 of 10 images").wait_for()
    assert count.is_visible() and not button(page, "Next").is_visible()


def test_without_results_the_tab_says_how_to_make_them(browser: Any) -> None:
    with served(Rehearsal()) as url, visit(browser, url) as page:
        page.get_by_role("tab", name="GenEval").click()
        code = page.locator("pre[aria-label=Commands]").inner_text()
    assert [line.split()[:3] for line in code.splitlines()] == [
        ["visearch", "geneval", "generate"],
        ["visearch", "geneval", "score"],
        ["visearch", "app", "--geneval"],
    ]


def test_bad_results_stop_the_app_before_it_serves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no results.jsonl"), served(Rehearsal(), folders=[tmp_path]):
        pass


# --- for everyone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_is_accessible_and_fits(browser: Any, site: str, scheme: str) -> None:
    with visit(browser, f"{site}?__theme={scheme}") as page:

        def check(what: str) -> None:
            for size in SIZES:
                page.set_viewport_size(size)
                assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], (what, size)
            page.set_viewport_size(SIZES[0])
            assert serious(page) == [], what

        compare(page, "two cows")
        button(page, "B is better").wait_for()
        check("vote")
        button(page, "B is better").click()
        page.locator("#vi-tally table").wait_for()
        check("told")
        breed(page)
        pictures(page, 1).nth(3).click()
        check("favourites")
        button(page, "Finish with these").click()
        page.locator(f"{STAGE} .vi-won").wait_for()
        check("winner")
        page.get_by_role("tab", name="GenEval").click()
        page.locator(".vi-count").wait_for()
        check("GenEval")
