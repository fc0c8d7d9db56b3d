"""A run as one HTML file that opens anywhere, offline: no script, and nothing that comes from elsewhere."""

from __future__ import annotations

import io
import re
import string
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from visearch.app import views
from visearch.app.frames import Candidate, Frame
from visearch.report import versions

__all__ = ["page"]

INK, ACCENT, MUTED = "#010203", "#040506", "#070809"  # stand for what the style sheet says
NO_CODE = "<p>The model was made in code, so no command names it.</p>"
NO_PLOT = "<p>The curve of score against cost needs matplotlib: <code>pip install 'visearch[plots]'</code></p>"


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
        plot=_plot(frame),
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
    if candidate.id == frame.winner:
        return "winner"
    return candidate.state if candidate.rank is None else f"{candidate.state}, rank {candidate.rank}"


# --- score against cost ---------------------------------------------------------------------------------------


def _plot(frame: Frame) -> str:
    """Scores of the best so far against images spent, from the single sample on: by the guide, and by each judge."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return NO_PLOT
    if not frame.curve:
        return ""
    panels = 1 + len(frame.held_out_curve)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "visearch", "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure(figsize=(8, 2.6 * panels), layout="constrained", facecolor="none")
        axes = figure.subplots(panels, 1, squeeze=False, sharex=True)[:, 0]
        _draw(axes[0], frame.settings.reward, frame.baseline_score, frame.curve)
        if frame.best_of_n:
            axes[0].plot(*zip(*frame.best_of_n, strict=True), color=MUTED, linestyle="--", label="best-of-n, expected")
        for axis, (name, curve) in zip(axes[1:], frame.held_out_curve.items(), strict=True):
            _draw(axis, f"{name} (held out)", frame.held_out[name][0], curve)
        axes[0].legend(frameon=False)
        axes[-1].set_xlabel("images spent")
        axes[-1].set_xlim(left=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(file.getvalue(), f"{frame.settings.reward} of the best so far against images spent")


def _draw(axis: Any, name: str, once: float, curve: Sequence[tuple[float, float]]) -> None:
    images, scores = zip((1.0, once), *curve, strict=True)
    axis.plot(images, scores, color=ACCENT, marker="o", drawstyle="steps-post", label="searched")
    axis.axhline(once, color=MUTED, linestyle=":", label="sampled once")
    axis.set_ylabel(name)
    axis.set_facecolor("none")
    axis.tick_params(colors=INK)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _inline(svg: str, label: str) -> str:
    """A file of matplotlib's as an element of the page, in the page's colours."""
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    for colour, name in ((INK, "ink"), (ACCENT, "accent"), (MUTED, "muted")):
        svg = svg.replace(colour, f"var(--vi-{name})")
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
