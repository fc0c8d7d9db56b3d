"""The app in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; where there is none, tests are skipped, but in CI they fail."""
    if CHROMIUM is None:
        message = "no chromium: apt-get install chromium"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def served(studio: Any, **options: Any) -> Iterator[str]:
    """The app on a free port; its address."""
    from visearch.app import launch

    demo, url = launch(studio, block=False, **options)
    yield url
    demo.close(verbose=False)


@contextmanager
def visit(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page of its own session; afterwards nothing was wrong on its console, and nothing came from elsewhere."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 1000}, **options})
    page = context.new_page()
    page.set_default_timeout(120_000)
    wrong: list[str] = []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    origin = "/".join(url.split("/")[:3])
    local = (origin, "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(local) or wrong.append(f"asked for {request.url}"))
    page.goto(url)
    page.get_by_role("button", name="Run", exact=True).wait_for()
    page.locator(".vi-cost").first.wait_for()  # the settings of the address are in, and planned
    yield page
    context.close()
    assert not wrong


def serious(page: Any) -> list[str]:
    """What axe finds that shuts people out."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in ("serious", "critical")]
