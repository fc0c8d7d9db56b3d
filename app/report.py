"""A run as one HTML file that opens anywhere, offline: no script, and nothing that comes from elsewhere."""

from __future__ import annotations

import re
import string
from html import escape
from importlib.resources import files

from visearch.app import plots, views
from visearch.app.frames import Candidate, Frame
from visearch.report import versions

__all__ = ["page"]

NO_CODE = "<p>The model was made in code, so no command names it.</p>"


def page(frame: Frame, **again: str) -> str:
    """Baseline and winner, every candidate, what it cost, and how to draw it again.

    Args:
        frame: the last one of a run.
        again: texts that repeat it, if any.
    """
    s = frame.settings
    limit = "" if s.seconds is None else f" and {s.seconds:g} s"
    lead = f"{s.model}, {s.search} guided by {s.reward}, {s.images} images{limit}, seed {s.seed}"
    template = string.Template(_resource("report.html"))
    return template.substitute(
        title=escape(s.prompt),
        style=_style(),
        lead=escape(lead),
        banner=views.banner(frame),
        pair="".join(views.stage(frame)),
        judges=views.judges_table(frame),
        plots="".join(plots.figures(frame)),
        lineage=views.lineage_svg(frame),
        board=_board(frame),
        ledger=views.ledger_table(frame),
        beside=views.beside_table(frame),
        again="".join(f'<pre tabindex="0"><code>{escape(text)}</code></pre>' for text in again.values()) or NO_CODE,
        made=escape("Made with " + ", ".join(f"{name} {version}" for name, version in versions().items())),
    )


def _resource(name: str) -> str:
    return files("visearch.app").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """The page's own sheet, in which dark is a class; here the reader's system says it."""
    sheet = _resource("style.css")
    dark = re.search(r"^\.dark \{(.*?)^\}", sheet, re.DOTALL | re.MULTILINE)
    return f"{sheet}\n@media (prefers-color-scheme: dark) {{ :root {{{dark[1]}}} }}"


def _board(frame: Frame) -> str:
    heads = ("Candidate", "Image", "Score", "State", "Last step", "Seed", "Comes from")
    rows = [
        (
            f'<span id="candidate-{escape(c.id)}">{escape(c.id)}</span>',
            views.media_html(c.media, "no preview"),
            "–" if c.score is None else f"{c.score:.3f}",
            escape(_state(c, frame)),
            f"{c.stage} of {frame.stages}",
            f"<code>{c.seed}</code>",
            escape(c.parent or "–"),
        )
        for c in frame.candidates
    ]
    return views.table(heads, rows, "All candidates, in the order in which they came")


def _state(candidate: Candidate, frame: Frame) -> str:
    if views.won(candidate, frame):
        return "winner"
    return candidate.state if candidate.rank is None else f"{candidate.state}, rank {candidate.rank}"
