"""The GenEval tab: accuracies by task, and the images behind them with what the detector saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from visearch.app import views
from visearch.app.verdicts import SHOWN, Results, Shot, drawn, read_results
from visearch.app.widgets import PRIVATE, html

__all__ = ["build"]

EACH = 12  # images of a page
ALL = "all tasks"
WORDS = {"gained": "only the search is right", "lost": "only the baseline is right"}
COMMANDS = """visearch geneval generate report --limit 60 --images-per-prompt 1 --outdir outputs/best --n 8
visearch geneval score outputs/best --detector tiny
visearch app --geneval outputs/best"""
HOW = views.heading(
    "No results yet",
    "These lines make sixty images, judge them and open them here. Name a second run, such as one of search none, by "
    "another --geneval, and it stands beside them as the baseline.",
) + views.code("Commands", f"<code>{COMMANDS}</code>")


def build(folders: Sequence[Path] = ()) -> None:
    """Fill the tab that is open in Gradio's context.

    Args:
        folders: results named on the command line: of one run, or of a search and its baseline. The page names none.

    Raises:
        ValueError: results that cannot be read, or do not go together.
    """
    if not folders:
        html(HOW)
        return
    results = read_results([Path(folder) for folder in folders])
    html(_summary(results))
    with gr.Row(elem_classes="vi-filters"):
        tag = gr.Dropdown([ALL, *results.tags], value=ALL, label="Task", filterable=False)
        shown = gr.Radio(_verdicts(results), value="wrong", label="Verdict")
    gallery = html(_page(results, ALL, "wrong", 0), "vi-shots")
    with gr.Row(elem_classes="vi-pager", visible=_several(results, ALL, "wrong")) as pager:
        back, forth = gr.Button("Previous"), gr.Button("Next")
    page = gr.State(0)

    def turn(step: int) -> Callable[..., Any]:
        def turned(tag: str, shown: str, page: int) -> tuple[Any, ...]:
            last = (len(results.matching(_tag(tag), shown)) - 1) // EACH
            page = max(0, min(page + step, last)) if step else 0
            return _page(results, tag, shown, page), page, gr.update(visible=_several(results, tag, shown))

        return turned

    for event, step in ((tag.change, 0), (shown.change, 0), (back.click, -1), (forth.click, 1)):
        event(turn(step), [tag, shown, page], [gallery, page, pager], **PRIVATE)


def _several(results: Results, tag: str, shown: str) -> bool:
    return len(results.matching(_tag(tag), shown)) > EACH


def _verdicts(results: Results) -> list[tuple[str, str]]:
    return [(WORDS.get(v, v), v) for v in SHOWN if results.baseline is not None or v not in WORDS]


def _tag(chosen: str) -> str | None:
    return None if chosen == ALL else chosen


# --- as HTML ----------------------------------------------------------------------------------------------------


def _summary(results: Results) -> str:
    heads = ["Task", "Right", "Accuracy, 95 % interval"]
    if results.baseline is not None:
        heads += ["Baseline", "Gain in points, 95 % interval"]
    lines = [f"<p>{escape(results.outcome.protocol())}.</p>"]
    if results.baseline is not None:
        lines.append(f"<p>Baseline: {escape(results.baseline.protocol())}.</p>")
    rows = [_line(row) for row in results.table]
    return f'<div class="vi-about">{"".join(lines)}</div>{views.table(heads, rows, "Accuracy by task")}'


def _line(row: Mapping[str, Any]) -> list[str]:
    cells = [
        escape(_words(row["task"])),
        f"{row['correct']} of {row['images']}",
        f"{row['accuracy']:.0%} <small>{row['low']:.0%} to {row['high']:.0%}</small>",
    ]
    if "gain" in row:
        gain = f"{_points(row['gain'])} <small>{_points(row['gain_low'])} to {_points(row['gain_high'])}</small>"
        cells += [f"{row['baseline']:.0%}", gain]
    return cells


def _points(value: float) -> str:
    """Percentage points with their sign."""
    return f"{100 * value:+.0f}".replace("-", "−")


def _words(tag: str) -> str:
    return tag.replace("_", " ")


def _page(results: Results, tag: str, shown: str, page: int) -> str:
    """One page of images, grouped by task."""
    found = results.matching(_tag(tag), shown)
    if not found:
        return '<p class="vi-count" role="status">No image here: choose another task or verdict.</p>'
    some = found[EACH * page : EACH * (page + 1)]
    first = EACH * page + 1
    count = f"{first} to {first + len(some) - 1} of {len(found)} images"
    groups = {shot.tag: [s for s in some if s.tag == shot.tag] for shot in some}
    parts = [
        f'<section><h3>{escape(_words(name))}</h3><div class="vi-shots">{"".join(map(_card, shots))}</div></section>'
        for name, shots in groups.items()
    ]
    return f'<p class="vi-count" role="status">{count}</p>{"".join(parts)}'


def _card(shot: Shot) -> str:
    pictures = [_figure(shot, "Search" if shot.baseline else "")]
    if shot.baseline is not None:
        pictures.insert(0, _figure(shot.baseline, "Baseline"))
    wide = " vi-pair" * (shot.baseline is not None)
    return f'<article class="vi-shot{wide}"><h4>{escape(shot.prompt)}</h4><div>{"".join(pictures)}</div></article>'


def _figure(shot: Shot, title: str) -> str:
    picture = drawn(shot)
    media = '<p class="vi-gone">The image file is gone.</p>' if picture is None else views.media_html(picture)
    name = f'<span class="vi-title">{title}</span> ' * bool(title)
    verdict = '<b class="vi-right">✓ right</b>' if shot.correct else '<b class="vi-wrong">✗ wrong</b>'
    reasons = "".join(f"<li>{escape(line)}</li>" for line in shot.reason.splitlines())
    return (
        f"<figure>{media}<figcaption>{name}{verdict}{f'<ul>{reasons}</ul>' * bool(reasons)}"
        f"<small>image {escape(shot.key)}</small></figcaption></figure>"
    )
