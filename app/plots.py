"""Score against cost: a figure of the reward that guides and one of each judge, drawn by matplotlib.

They are SVG in the colours of the page around them: one drawing fits light, dark and the report.
"""

from __future__ import annotations

import io
import re
from functools import lru_cache
from html import escape
from threading import Lock
from typing import Any

from visearch.app.frames import Frame, Settings
from visearch.app.views import number

__all__ = ["figures", "warm"]

Curve = tuple[tuple[float, float], ...]

NO_PLOT = "<p>The curve of score against cost needs matplotlib: <code>pip install 'visearch[plots]'</code></p>"
COLOURS = {"#010203": "ink", "#040506": "accent", "#070809": "muted"}  # stand for what the style sheet says
INK, ACCENT, MUTED = COLOURS
STYLE = {
    "svg.fonttype": "none",  # letters stay letters, in the page's own font
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
_drawing = Lock()  # matplotlib's settings are the whole process's


def figures(frame: Frame) -> list[str]:
    """Scores of the best so far against images spent, from the single sample on; none before one was finished.

    Best-of-n's curve is dashed: the expected best of n candidates, and what a judge says of it.
    """
    if frame.baseline_score is None or not frame.curve:
        return []
    drawn = [(frame.settings.reward, "guides", frame.baseline_score, frame.curve, frame.best_of_n)]
    for name, curve in frame.held_out_curve.items():
        bar = frame.held_out_best_of_n.get(name, ())
        drawn.append((name, "only watches", frame.held_out[name][0], curve, bar))
    try:
        return [_figure(name, role, once, tuple(curve), tuple(bar)) for name, role, once, curve, bar in drawn]
    except ImportError:
        return [NO_PLOT]


def warm() -> None:
    """Draw one, so that nobody waits for matplotlib to look for its fonts."""
    figures(Frame(Settings("a prompt"), "done", baseline_score=0.0, curve=((1.0, 1.0),)))


@lru_cache(maxsize=64)  # most rounds finish no candidate, and change nothing
def _figure(name: str, role: str, once: float, curve: Curve, bar: Curve) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with _drawing, rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(5.5, 2.8), layout="constrained", facecolor="none")
        _draw(figure.subplots(), once, curve, bar)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return (
        f'<figure class="vi-plot"><figcaption><strong>{escape(name)}</strong> {role}</figcaption>'
        f"{_inline(file.getvalue(), name, _told(name, once, curve, bar))}</figure>"
    )


def _draw(axis: Any, once: float, curve: Curve, bar: Curve) -> None:
    axis.axhline(once, color=MUTED, linestyle=":", label="sampled once")
    if bar:
        axis.plot(*zip(*bar, strict=True), color=INK, linestyle="--", linewidth=1.2, label="best of n")
    images, scores = zip((1.0, once), *curve, strict=True)
    axis.plot(images, scores, color=ACCENT, linewidth=2, marker="o", drawstyle="steps-post", label="this search")
    axis.set_xlabel("images of work")
    axis.set_xlim(left=0)
    axis.set_facecolor("none")
    axis.legend(frameon=False)


def _told(name: str, once: float, curve: Curve, bar: Curve) -> str:
    """The figure in words."""
    images, score = curve[-1]
    words = [
        f"{name} against images of work: {number(once)} of one sample",
        f"{number(score)} after {images:.3g} images",
    ]
    if bar:
        words.append(f"{number(bar[-1][1])} of the best of {bar[-1][0]:.0f}")
    return ", ".join(words)


def _inline(svg: str, name: str, label: str) -> str:
    """A file of matplotlib's as an element of the page: its names and rules are its own, its colours the page's."""
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    own = re.sub(r"\W", "-", name)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>plot-{own}-", svg)
    for colour, means in COLOURS.items():
        svg = svg.replace(colour, f"var(--vi-{means})")
    return svg
