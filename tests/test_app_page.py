"""The app's page in a real browser, on frames that are made up; the last tests run the embedded model."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from app_browser import chromium, serious, served, visit
from app_studio import MadeUpStudio, picture
from PIL import Image, ImageChops

PHONE = {"viewport": {"width": 390, "height": 844}}
SHOWN = "#vi-stage .vi-figure:nth-child({}) img"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def studio() -> MadeUpStudio:
    return MadeUpStudio()


@pytest.fixture(scope="module")
def site(studio: MadeUpStudio) -> Iterator[str]:
    with served(studio) as url:
        yield url


@pytest.fixture
def page(browser: Any, studio: MadeUpStudio, site: str) -> Iterator[Any]:
    studio.go.clear()
    with visit(browser, site) as opened:
        yield opened


def run(page: Any, prompt: str | None = None) -> None:
    if prompt is not None:
        page.get_by_label("Prompt").first.fill(prompt)
    page.get_by_role("button", name="Run", exact=True).click()


def ended(page: Any, word: str = "Done") -> None:
    page.locator("#vi-status", has_text=word).wait_for()
    page.locator("#vi-run:not([disabled])").wait_for()


def shown(page: Any, which: int) -> bytes:
    source = page.locator(SHOWN.format(which)).get_attribute("src")
    return base64.b64decode(source.split(",", 1)[1])


def holds(page: Any, prompt: str) -> None:
    from playwright.sync_api import expect

    expect(page.get_by_label("Prompt").first).to_have_value(prompt, timeout=120_000)


def hue(prompt: str) -> int:
    return sum(prompt.encode()) % 256


def test_a_run_ends_with_baseline_winner_candidates_evidence_and_files(page: Any) -> None:
    run(page, "two cows")
    ended(page)
    assert shown(page, 1) == picture(hue("two cows")).content
    assert shown(page, 2) == picture(hue("two cows") + 140).content  # candidate 7
    assert page.locator(".vi-card").count() == page.locator(".vi-node").count() == 8
    assert page.locator(".vi-card.vi-pruned").count() == 6
    assert page.locator(".vi-card.vi-winner").get_attribute("id") == "candidate-7"
    assert page.locator("[role=progressbar]").first.get_attribute("aria-valuenow") == "100"
    assert page.locator("#vi-plots figcaption").all_inner_texts() == ["emoji-clip guides", "judge-a only watches"]
    said = page.locator("#vi-plots svg[role=img]").first.get_attribute("aria-label")
    assert said.endswith("53.00 of the best of 4")
    words = page.locator("#vi-judges tr").all_inner_texts()
    assert [row.split("\t") for row in words] == [
        ["Reward", "Sampled once", "Best of 4", "Searched", "Gain"],
        ["emoji-clip (guides)", "51.50", "53.00", "58.50", "+7.00"],
        ["judge-a", "0.20", "0.50", "0.90", "+0.70"],
    ]
    assert "denoiser" in page.locator("#vi-ledger").inner_text()
    assert 'search="halving' in page.locator("#vi-home code").first.inner_text()
    with page.expect_download() as download:
        page.locator(".vi-download").first.click()
    assert download.value.suggested_filename == "winner.png"
    assert download.value.path().read_bytes() == shown(page, 2)


def test_the_page_lives_while_it_runs(page: Any, studio: MadeUpStudio) -> None:
    """Previews are there, candidates have left, a part of the budget is spent: all that before the end."""
    run(page, "hold")
    page.locator(".vi-card.vi-pruned").nth(3).wait_for()
    assert page.locator(".vi-card.vi-live").count() == 4
    assert page.locator("#vi-board img").count() == 8
    assert page.locator("[role=progressbar]").first.get_attribute("aria-valuenow") == "75"
    assert "about 0.5 s left" in page.locator("#vi-budget").inner_text()
    assert page.locator("#vi-run").is_disabled() and page.locator("#vi-cancel").is_enabled()
    studio.go.set()
    ended(page)
    assert page.locator("#vi-cancel").is_disabled()


def test_cancel_keeps_the_best_so_far(page: Any) -> None:
    run(page, "hold")
    page.locator(SHOWN.format(2)).wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    ended(page, "Cancelled")
    assert page.locator(".vi-card.vi-finished").count() == 0
    assert page.locator(".vi-badge").inner_text() == "Best so far"  # nothing has won
    assert page.locator(SHOWN.format(2)).is_visible()
    run(page, "the next one")
    ended(page)


def test_best_of_n_follows_and_may_be_cancelled(page: Any) -> None:
    run(page, "compare slowly")
    page.locator("#vi-status", has_text="Done: 8 candidates, 2 finished, 6 left early. Drawing best of 8").wait_for()
    assert page.locator(".vi-card.vi-winner .vi-badge").inner_text() == "Winner"
    assert page.locator("#vi-home .vi-code").count() == 3
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.locator("#vi-run:not([disabled])").wait_for()
    assert "Drawing" not in page.locator("#vi-status").inner_text()
    assert "Best of 2" in page.locator("#vi-judges").inner_text()


def test_best_of_n_may_be_left_out(browser: Any, site: str) -> None:
    with visit(browser, f"{site}?prompt=two+cows&best_of_n=False") as page:
        page.get_by_role("button", name="Model, reward, seed").first.click()
        assert not page.get_by_label("Draw best-of-n too").is_checked()
        run(page)
        ended(page)
        assert "Best of" not in page.locator("#vi-judges").inner_text()
        assert page.locator("#vi-plots svg", has_text="best of n").count() == 0
        page.get_by_label("Draw best-of-n too").check()
        page.wait_for_url(lambda url: "best_of_n" not in url)


def test_bad_input_is_one_clear_line_and_nothing_runs(page: Any) -> None:
    run(page, "  ")
    page.locator(".vi-problem", has_text="is empty; say what").wait_for()
    toast = page.locator(".toast-body", has_text="is empty; say what")
    toast.wait_for()
    said = toast.inner_text()
    assert "Traceback" not in said and len(said.splitlines()) <= 3
    assert page.locator("#vi-run").is_enabled() and not page.locator("#vi-results").is_visible()


def test_a_failure_keeps_what_was_found_and_says_why(page: Any) -> None:
    run(page, "break")
    ended(page, "Stopped by an error")
    assert page.get_by_role("alert").filter(has_text="ran out of memory").is_visible()
    assert page.locator(".vi-card").count() == 8


def test_a_suspicious_winner_comes_with_a_warning(page: Any) -> None:
    run(page, "hack")
    ended(page)
    assert page.get_by_role("alert").filter(has_text="the guide rises while judge-a falls").is_visible()


def test_words_of_the_prompt_are_never_markup(page: Any) -> None:
    prompt = "<img src=x onerror=\"document.title='taken'\"> ${document.title='taken'} `x` hack"
    run(page, prompt)
    ended(page)
    assert page.title() == "visearch"
    assert prompt.split()[1] in page.locator("#vi-home").inner_text()


def test_the_address_holds_the_settings(browser: Any, site: str) -> None:
    with visit(browser, f"{site}?prompt=two+red+cows&images=12&seed=5&search=best-of-n&color=blue") as page:
        holds(page, "two red cows")
        assert page.get_by_role("alert").filter(has_text="color in the address is unknown").is_visible()
        page.get_by_label("Prompt").first.fill("three green cows")
        page.wait_for_url(re.compile("three"))
        assert {"images=12", "seed=5", "search=best-of-n"} <= set(page.url.split("?")[1].split("&"))
        page.reload()
        holds(page, "three green cows")


def test_everything_is_done_by_keyboard(page: Any) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(80):
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"{selector} is not reached by Tab")

    tab_to("textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type("by keyboard")
    page.keyboard.press("Enter")
    ended(page)
    inspector = page.locator("#vi-inspector dl")
    assert "finished" in inspector.inner_text()  # the winner, until another one is chosen
    tab_to(".vi-node[data-candidate='2']")
    page.keyboard.press("Enter")
    assert "left at step 4" in inspector.inner_text()
    assert page.locator(".vi-pick[data-candidate='2']").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Tab")
    page.keyboard.press(" ")
    assert page.locator(".vi-node[data-candidate='3']").get_attribute("aria-pressed") == "true"


def test_a_choice_outlasts_the_next_round(page: Any, studio: MadeUpStudio) -> None:
    run(page, "hold")
    page.locator(".vi-pick[data-candidate='0']").click()
    studio.go.set()
    ended(page)
    assert page.locator("#vi-inspector dd").first.inner_text() == "0"
    assert page.locator(".vi-pick[data-candidate='0']").get_attribute("aria-pressed") == "true"


def test_two_users_at_once_see_their_own_images(browser: Any, site: str) -> None:
    with visit(browser, site) as ann, visit(browser, site) as bob:
        run(ann, "ann's cow")
        run(bob, "bob's very own cow")
        ended(ann)
        ended(bob)
        assert shown(ann, 1) == picture(hue("ann's cow")).content
        assert shown(bob, 1) == picture(hue("bob's very own cow")).content
        assert shown(ann, 2) != shown(bob, 2)


def test_who_comes_second_waits_and_may_leave_the_line(browser: Any, site: str, page: Any) -> None:
    run(page, "hold, the first")
    page.locator(".vi-card.vi-pruned").first.wait_for()
    with visit(browser, site) as second, visit(browser, site) as third:
        for other in (second, third):
            run(other)
            other.locator("#vi-status", has_text="Waiting for its turn").wait_for()
        third.locator("#vi-status", has_text="2 before it").wait_for()
        second.get_by_role("button", name="Cancel", exact=True).click()
        ended(second, "Cancelled: nothing found")
        third.locator("#vi-status", has_text="1 before it").wait_for()
        page.get_by_role("button", name="Cancel", exact=True).click()
        ended(third)


def test_a_user_has_one_search_at_a_time(page: Any, studio: MadeUpStudio) -> None:
    run(page, "hold, the first")
    page.locator("#vi-cancel:not([disabled])").wait_for()
    page.get_by_label("Prompt").first.press("Enter")
    page.locator(".toast-body", has_text="still running").wait_for()
    studio.go.set()
    ended(page)
    assert shown(page, 1) == picture(hue("hold, the first")).content


def test_a_closed_browser_frees_the_model(browser: Any, studio: MadeUpStudio, site: str) -> None:
    studio.go.clear()
    with visit(browser, site) as page:
        run(page, "hold, left alone")
        late = time.monotonic() + 60.0
        page.locator(".vi-card.vi-pruned").first.wait_for()
        assert len(studio.turns) == 1
    with studio.turns.held(lambda: time.monotonic() > late) as mine:
        assert mine


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [{}, PHONE], ids=["desk", "phone"])
def test_it_is_accessible_and_fits_in_light_and_dark(browser: Any, site: str, scheme: str, size: dict) -> None:
    with visit(browser, site, color_scheme=scheme, **size) as page:
        assert serious(page) == []
        run(page, "hack")
        ended(page)
        page.locator("#vi-plots svg").nth(1).wait_for()
        page.wait_for_timeout(600)  # transitions
        assert serious(page) == []
        width = size.get("viewport", {"width": 1440})["width"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        )
        assert (red + green + blue < 120) == (scheme == "dark")


def test_the_server_has_no_interface_but_the_page(site: str) -> None:
    def get(path: str, **request: Any) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(site + path, **request)) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    assert get("gradio_api/info") == (200, b'{"named_endpoints":{},"unnamed_endpoints":{}}')
    assert get("gradio_api/upload", data=b"x")[0] == get("gradio_api/file=/etc/passwd")[0] == 403
    assert get("gradio_api/queue/join", data=b"x" * 70_000)[0] == 413
    assert b"api" not in get("")[1].partition(b"footer_links")[2][:40]


def test_who_has_no_password_stays_outside(browser: Any, studio: MadeUpStudio) -> None:
    with served(studio, auth=[("ann", "secret")]) as url, closing(browser.new_context()) as context:
        for path in ("config", "gradio_api/info", "gradio_api/queue/data?session_hash=x"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url + path)
        page = context.new_page()
        page.goto(url)
        for password in ("wrong", "secret"):
            page.get_by_label("username").fill("ann")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            page.get_by_text("Incorrect").or_(page.locator("#vi-run")).first.wait_for()
            assert page.locator("#vi-run").count() == (password == "secret")
        page.locator(".vi-cost").first.wait_for()  # the address is read
        run(page, "ann's cow")
        ended(page)
        assert shown(page, 1) == picture(hue("ann's cow")).content


# --- the embedded model -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_code_on_screen_draws_the_image_on_screen(browser: Any, tmp_path: Any) -> None:
    from visearch.app.studio import Studio

    with served(Studio()) as url, visit(browser, f"{url}?images=2&seed=3&prompt=a+photo+of+a+red+car") as page:
        begun = time.monotonic()
        run(page)
        page.locator(SHOWN.format(1)).wait_for()
        assert time.monotonic() - begun < 60.0  # seconds on a busy machine; assets/build/measure_app.py measures it
        ended(page)
        code, image = page.locator("#vi-home code").first.text_content(), shown(page, 2)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    drawn, seen = (Image.open(file).convert("RGB") for file in (tmp_path / "winner.png", io.BytesIO(image)))
    assert ImageChops.difference(drawn, seen).getbbox() is None
