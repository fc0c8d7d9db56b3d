"""How long the app's page takes to its first paint, and after Run to its first preview, in a headless Chromium.

    python assets/build/measure_app.py [--rounds 5] [--prompt TEXT]

Serves the embedded model on this machine, opens a fresh browser context a round, and prints medians with the lowest and
the highest. Needs Playwright and Debian's chromium.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from typing import Any

from playwright.sync_api import sync_playwright

from visearch.app import launch

FIRST = "#vi-stage .vi-figure:nth-child(1) img"  # a preview of the single sample, then that
SECOND = "#vi-stage .vi-figure:nth-child(2) img"  # the best preview
HAND = 1000  # milliseconds from the prompt to the button


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="a photo of three cows")
    options = parser.parse_args()
    demo, url = launch(block=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        rounds = [_round(browser, url, options.prompt) for _ in range(options.rounds)]
        browser.close()
    demo.close(verbose=False)
    for what in rounds[0]:
        values = [taken[what] for taken in rounds]
        print(f"{what}: {statistics.median(values):.2f} s [{min(values):.2f}, {max(values):.2f}]")


def _round(browser: Any, url: str, prompt: str) -> dict[str, float]:
    """Seconds from the request, or from the click on Run."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.goto(url)
    page.locator("#vi-run").wait_for()
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    usable = page.evaluate("performance.now()") / 1000
    page.get_by_label("Prompt").first.fill(prompt)
    page.locator(".vi-cost").first.wait_for()
    page.wait_for_timeout(HAND)
    begun = time.monotonic()
    page.locator("#vi-run").click()
    page.locator(FIRST).wait_for()
    first = time.monotonic() - begun
    page.locator(SECOND).wait_for()
    second = time.monotonic() - begun
    page.locator("#vi-status", has_text="Done").wait_for()
    end = time.monotonic() - begun
    context.close()
    return {
        "first paint": paint,
        "page usable": usable,
        "first preview after Run": first,
        "first preview of a candidate": second,
        "end of the search": end,
    }


if __name__ == "__main__":
    main()
