"""Frames as HTML and SVG: pure functions whose every word from outside is escaped.

Lists of strings are the pieces of one region, so that the page sends only those that changed.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from visearch.app.frames import Candidate, Cost, Frame, Media, Settings, Share
from visearch.protocols import Event

__all__ = [
    "LEGEND",
    "banner",
    "beside_table",
    "board",
    "code",
    "cost_line",
    "count",
    "data_uri",
    "downloads",
    "errors",
    "explanation",
    "figure",
    "gain",
    "header",
    "heading",
    "inspector",
    "judges_table",
    "ledger_table",
    "lineage_svg",
    "media_html",
    "meter",
    "notes",
    "number",
    "operation",
    "problem_line",
    "seconds",
    "stage",
    "status",
    "table",
    "take_home",
    "won",
]

TINY = 160  # pixels; below it an image is shown with its pixels, not smoothed
LANE = 26  # height of one candidate in the lineage tree, in pixels
LEFT, RIGHT = 12.0, 84.0  # where its first and its last stage lie, in percent of its width

STATES = {"live": "at step", "pruned": "left at step", "replaced": "gave way at step"}
ENDINGS = {
    "done": "Done",
    "budget": "Budget used up",
    "cancelled": "Cancelled; the best so far is kept",
    "failed": "Stopped by an error",
}


# --- small parts ----------------------------------------------------------------------------------------------


def data_uri(media: Media) -> str:
    return f"data:{escape(media.mime)};base64,{base64.b64encode(media.content).decode()}"


def media_html(media: Media | None, waiting: str = "waiting for the first preview") -> str:
    """An image or a video; a skeleton with the words of ``waiting`` where there is none yet."""
    if media is None:
        return f'<div class="vi-media vi-skeleton" role="img" aria-label="{escape(waiting)}"></div>'
    if media.kind == "video":
        return (
            f'<video class="vi-media" src="{data_uri(media)}" aria-label="{escape(media.alt)}" '
            "autoplay loop muted playsinline></video>"
        )
    crisp = " vi-tiny" if max(_size(media)) <= TINY else ""
    return f'<img class="vi-media{crisp}" src="{data_uri(media)}" alt="{escape(media.alt)}">'


def _size(media: Media) -> tuple[int, int]:
    return Image.open(io.BytesIO(media.content)).size  # reads the header alone


def number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def gain(value: float, base: float) -> str:
    return f"{value - base:+.2f}".replace("-", "−")


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _when(candidate: Candidate) -> str:
    if candidate.state == "finished":
        return "finished" if candidate.rank is None else f"finished, rank {candidate.rank}"
    return f"{STATES[candidate.state]} {candidate.stage}"


def won(candidate: Candidate, frame: Frame) -> bool:
    """Whether it is the winner; a search that ended before anything was finished has none."""
    return frame.over and candidate.id == frame.winner and candidate.state == "finished"


def _label(candidate: Candidate, frame: Frame) -> str:
    best = ", the winner" if won(candidate, frame) else ""
    return f"Candidate {candidate.id}{best}: {_when(candidate)}, score {number(candidate.score)}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Cells are HTML already; the first of each row names it."""
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="vi-scroll" tabindex="0" role="region" aria-label="{caption}"><table class="vi-table">'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# --- the page's own words -------------------------------------------------------------------------------------

LEGEND = (
    "Left to right: the steps of the model. ★ best, ● finished, ○ running, × left early, ◇ gave way to others; dotted: "
    "copied or changed from another. Choose one to see it."
)


def header() -> str:
    return (
        '<header class="vi-header"><h1>visearch</h1><p>Search instead of sampling once: many candidates are drawn, the '
        "unpromising ones leave early, the best one stays.</p></header>"
    )


def heading(title: str, text: str) -> str:
    return f'<div class="vi-heading"><h2>{escape(title)}</h2><p>{escape(text)}</p></div>'


def explanation(text: str) -> str:
    return f'<p class="vi-explained">{escape(text)}</p>'


def inspector() -> str:
    """Where the page's script shows the candidate that was chosen."""
    return (
        '<section class="vi-inspector" aria-label="Chosen candidate" aria-live="polite"><h2>Candidate</h2>'
        '<div id="vi-inspector"></div></section>'
    )


# --- before a run ---------------------------------------------------------------------------------------------


def cost_line(settings: Settings, cost: Cost, query: str) -> str:
    """The planned cost; ``query`` restores the settings, and becomes the page's address."""
    took = "time known after the first run" if cost.seconds is None else f"about {seconds(cost.seconds)}"
    if settings.seconds:
        took += f", at most {seconds(settings.seconds)}"
    work = f"{count(cost.candidates, 'candidate')}, {cost.finals} to the end, {count(cost.previews, 'preview')}"
    if cost.beside:
        work += f"; then best of {cost.beside:.0f} to compare"
    return (
        f'<p class="vi-cost" data-query="{escape(query)}"><strong>{cost.images:.3g}</strong> '
        f"{'image' if cost.images == 1 else 'images'} of work, {took}<br><span>{work}</span></p>"
    )


def problem_line(problem: str) -> str:
    """Why these settings cannot run."""
    return f'<p class="vi-cost vi-problem">{escape(problem)}</p>'


# --- while it runs --------------------------------------------------------------------------------------------


def stage(frame: Frame | None) -> list[str]:
    """Baseline and winner, each a figure with its score."""
    if frame is None:
        return [
            figure("Sampled once", None, "what the model gives you"),
            figure("Searched", None, "what a search finds"),
        ]
    best = frame.find(frame.winner)
    base = f"score {number(frame.baseline_score)}"
    if frame.phase in ("waiting", "baseline"):
        base = "waiting" if frame.baseline is None else "a preview"
    return [
        figure("Sampled once", frame.baseline, base, waiting=not frame.over),
        figure("Searched", best.media if best else None, _found(frame, best), waiting=not frame.over, best=True),
    ]


def figure(title: str, media: Media | None, caption: str, waiting: bool = False, best: bool = False) -> str:
    kind = "vi-figure" + " vi-best" * best + " vi-waiting" * (waiting and media is None)
    return (
        f'<figure class="{kind}"><figcaption><span class="vi-title">{title}</span>'
        f"<span>{caption}</span></figcaption>{media_html(media, f'{title}: no image yet')}</figure>"
    )


def _found(frame: Frame, best: Candidate | None) -> str:
    if best is None:
        if frame.over:
            return "nothing was finished"
        return "drawing the first candidates" if frame.phase == "searching" else "waiting"
    score = f"score {number(best.score)}"
    if best.score is not None and frame.baseline_score is not None:
        score += f' <b class="vi-gain">{gain(best.score, frame.baseline_score)}</b>'
    preview = "" if best.state == "finished" else f", preview of step {best.stage} of {frame.stages}"
    return f"{score}{preview}"


def meter(frame: Frame) -> str:
    """How much of the budget is spent, and how long the rest will take."""
    planned = frame.cost.images if frame.cost else float(frame.settings.images)
    share = 100 * min(1.0, frame.images / planned) if planned else 0.0
    words = [f"{frame.images:.3g} of {planned:.3g} images", seconds(frame.seconds)]
    if not frame.over and frame.eta is not None:
        words.append(f"about {seconds(frame.eta)} left")
    return (
        f'<div class="vi-meter" role="progressbar" aria-label="Budget spent" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share:.0f}" aria-valuetext="{escape(", ".join(words))}">'
        f'<div style="width:{share:.1f}%"></div></div>'
        f'<p class="vi-words">{"".join(f"<span>{escape(w)}</span>" for w in words)}</p>'
    )


def status(frame: Frame | None, before: str = "Ready.") -> str:
    """One sentence, read aloud by screen readers whenever it changes; ``before`` where there is no frame."""
    return f'<p role="status" aria-live="polite">{escape(before) if frame is None else _progress(frame)}</p>'


def _progress(frame: Frame) -> str:
    if frame.phase == "waiting":
        return f"Waiting for its turn{f': {frame.ahead} before it' * bool(frame.ahead)}."
    if frame.phase == "baseline":
        return "Drawing the baseline: one sample, no search."
    if not frame.candidates:
        return f"{ENDINGS[frame.phase].partition(';')[0]}: nothing found." if frame.over else "Drawing the first ones."
    left = sum(c.state == "pruned" for c in frame.candidates)
    ended = sum(c.state == "finished" for c in frame.candidates)
    counts = f"{count(len(frame.candidates), 'candidate')}, {ended} finished, {left} left early"
    if not frame.over:
        return f"Round {frame.index}: {counts}."
    beside = f" Drawing best of {frame.settings.images} to compare." if frame.comparing else ""
    return f"{ENDINGS[frame.phase]}: {counts}.{beside}"


def banner(frame: Frame) -> str:
    """What went wrong, and what to be wary of; empty where nothing is."""
    return errors([frame.error] if frame.error else ()) + notes(frame.warnings)


def errors(texts: Sequence[str]) -> str:
    """Failures as banners."""
    return _banners("error", "Error", texts)


def notes(texts: Sequence[str]) -> str:
    """Warnings as banners."""
    return _banners("warning", "Warning", texts)


def _banners(kind: str, word: str, texts: Sequence[str]) -> str:
    return "".join(
        f'<div class="vi-banner vi-{kind}" role="alert"><strong>{word}</strong> <span>{escape(text)}</span></div>'
        for text in texts
    )


# --- candidates -----------------------------------------------------------------------------------------------


def board(frame: Frame) -> list[str]:
    """One card a candidate, in the order in which they came, each with the details that the inspector shows."""
    return [_card(c, frame) for c in frame.candidates]


def _card(candidate: Candidate, frame: Frame) -> str:
    name, label = escape(candidate.id), escape(_label(candidate, frame))
    best = candidate.id == frame.winner
    badge = f'<span class="vi-badge">{"Winner" if won(candidate, frame) else "Best so far"}</span>' * best
    return (
        f'<article class="vi-card vi-{candidate.state}{" vi-winner" * best}" id="candidate-{name}">'
        f'<button type="button" class="vi-pick" data-candidate="{name}" aria-label="{label}">'
        f"{media_html(candidate.media, f'candidate {candidate.id}')}{badge}</button>"
        f'<p class="vi-score">{number(candidate.score)}</p>'
        f'<p class="vi-note">{escape(_when(candidate))}</p>'
        f'<p class="vi-note vi-seed" title="seed {candidate.seed}">#{candidate.number} · seed {candidate.seed}</p>'
        f'<div class="vi-detail" hidden>{_detail(candidate, frame)}</div></article>'
    )


def _detail(candidate: Candidate, frame: Frame) -> str:
    rows = [
        ("Candidate", f"<code>{escape(candidate.id)}</code>"),
        ("State", escape(_when(candidate))),
        ("Score", number(candidate.score)),
        ("Seed", f"<code>{candidate.seed}</code>"),
    ]
    if candidate.parent is not None:
        rows.append(("Comes from", f"<code>{escape(candidate.parent)}</code>"))
    if candidate.history:
        rows.append(("Scores", ", ".join(f"{number(score)} (step {stage})" for stage, score in candidate.history)))
    facts = "".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in rows)
    made = "".join(f"<li>{escape(operation(event))}</li>" for event in candidate.lineage)
    return f"<dl>{facts}</dl><h3>How it was made</h3><ol>{made}</ol>"


def operation(event: Event) -> str:
    texts = {
        "init": "Initial noise of seed {seed}",
        "fork": "Step {stage}: copied with a random stream of its own, seed {seed}",
        "perturb": "Step {stage}: moved by strength {value:.3g}, seed {seed}",
        "renoise": "Step {stage}: noised back to step {value:.0f}, seed {seed}",
        "noise": "Step {stage}: fresh noise, seed {seed}",
    }
    return texts.get(event.op, "Step {stage}: {op}, seed {seed}").format(**event._asdict())


# --- the lineage tree -----------------------------------------------------------------------------------------


def lineage_svg(frame: Frame) -> str:
    """The candidates as lanes from the first stage to the last one that each reached; copies branch off their parents.

    Nodes are links to ``#candidate-<id>``, which the page makes buttons. Positions are in percent, so that it fits any
    width with letters of one size. Colours are the text's own unless a style sheet says otherwise.
    """
    order = _tree_order(frame.candidates)
    lane = {candidate.id: place for place, candidate in enumerate(order)}
    links = [_branch(c, lane, frame) for c in order if c.parent in lane]
    nodes = [_lane(c, lane[c.id], frame) for c in order]
    return (
        f'<svg class="vi-tree" width="100%" height="{LANE * max(1, len(order))}" role="group" aria-label="Lineage of '
        f'{count(len(order), "candidate")}" font-size="12" fill="currentColor">{"".join(links + nodes)}</svg>'
    )


def _tree_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Parents before their children, children right below."""
    known = {c.id for c in candidates}
    children: dict[str | None, list[Candidate]] = {}
    for c in candidates:
        children.setdefault(c.parent if c.parent in known else None, []).append(c)
    order, waiting = [], children.get(None, [])[::-1]
    while waiting:
        order.append(waiting.pop())
        waiting += children.get(order[-1].id, [])[::-1]
    return order


def _across(stage: float, frame: Frame) -> str:
    return f"{LEFT + (RIGHT - LEFT) * min(1.0, stage / max(1, frame.stages)):.2f}%"


def _birth(candidate: Candidate) -> float:
    """The stage where it begins: a re-noised one goes back to an earlier one."""
    last = candidate.lineage[-1] if candidate.lineage else Event("init", 0, 0)
    return last.value if last.op == "renoise" else last.stage


def _branch(candidate: Candidate, lane: Mapping[str, int], frame: Frame) -> str:
    x = _across(_birth(candidate), frame)
    above, below = (int(LANE * (lane[name] + 0.5)) for name in (candidate.parent, candidate.id))
    return (
        f'<line class="vi-branch" x1="{x}" x2="{x}" y1="{above}" y2="{below}" stroke="currentColor" '
        'stroke-opacity=".6" stroke-dasharray="2 3"/>'
    )


def _lane(candidate: Candidate, place: int, frame: Frame) -> str:
    name, label, y = escape(candidate.id), escape(_label(candidate, frame)), int(LANE * (place + 0.5))
    start, end = _across(_birth(candidate), frame), _across(candidate.stage, frame)
    best = candidate.id == frame.winner
    ticks = "".join(f'<circle cx="{_across(s, frame)}" cy="{y}" r="2"/>' for s, _ in candidate.history)
    return (
        f'<a class="vi-node vi-{candidate.state}{" vi-winner" * best}" href="#candidate-{name}" '
        f'data-candidate="{name}" aria-label="{label}"><title>{label}</title>'
        f'<rect class="vi-hit" y="{y - LANE // 2 + 1}" width="100%" height="{LANE - 2}" rx="4" fill="transparent"/>'
        f'<text x="6" y="{y + 4}">#{candidate.number}</text>'
        f'<line x1="{start}" x2="{end}" y1="{y}" y2="{y}" stroke="currentColor" stroke-width="1.5"/>{ticks}'
        f'<svg x="{end}" y="{y}" overflow="visible">{_marker(candidate, best)}</svg>'
        f'<text x="99%" y="{y + 4}" text-anchor="end">{number(candidate.score)}</text></a>'
    )


def _marker(candidate: Candidate, best: bool) -> str:
    """Each state has a shape of its own: nothing is said by colour alone."""
    if best:
        return '<path d="M0-8 2.4-2.6 8-2.1 3.8 1.7 5 7.5 0 4.5-5 7.5-3.8 1.7-8-2.1-2.4-2.6z"/>'
    line = 'stroke="currentColor" stroke-width="2" fill="none"'
    return {
        "live": f'<circle r="4.5" {line}/>',
        "pruned": f'<path d="M-4-4 4 4M4-4-4 4" {line}/>',
        "replaced": f'<path d="M0-5 5 0 0 5-5 0z" {line}/>',
        "finished": '<circle r="5"/>',
    }[candidate.state]


# --- evidence -------------------------------------------------------------------------------------------------


def judges_table(frame: Frame) -> str:
    """What the guide and the judges, which did not guide, say of a single sample, of best-of-n and of the winner."""
    best = frame.find(frame.winner)
    if best is None or not won(best, frame) or frame.baseline_score is None:
        return ""
    rows = [(f"{frame.settings.reward} (guides)", frame.baseline_score, frame.best_of_n, best.score)]
    for name, (base, found) in frame.held_out.items():
        rows.append((name, base, frame.held_out_best_of_n.get(name, ()), found))
    heads, cells = ["Reward", "Sampled once", "Searched", "Gain"], []
    for name, base, curve, found in rows:
        bar = [number(curve[-1][1] if curve else None)] if frame.best_of_n else []
        cells.append([escape(name), number(base), *bar, number(found), gain(found, base)])
    if frame.best_of_n:
        heads.insert(2, f"Best of {frame.best_of_n[-1][0]}")
    return table(heads, cells, "What each reward says")


def ledger_table(frame: Frame) -> str:
    """What the search spent on what."""
    if not frame.ledger:
        return ""
    total = Share("Total", sum(s.calls for s in frame.ledger), frame.seconds, frame.images)
    rows = [
        (escape(share.what), f"{share.calls}", f"{share.images:.2f}" if share.images else "", f"{share.seconds:.2f}")
        for share in (*frame.ledger, total)
    ]
    return table(("Spent on", "Calls", "Images", "Seconds"), rows, "Ledger of the search; the baseline is not in it")


def beside_table(frame: Frame) -> str:
    """What the baseline and the judges took outside of the budget."""
    rows = [(escape(s.what), f"{s.calls}", f"{s.images:.2f}", f"{s.seconds:.2f}") for s in frame.beside]
    return table(("Beside the search", "Calls", "Images", "Seconds"), rows, "Outside of the budget") if rows else ""


# --- take-home ------------------------------------------------------------------------------------------------


def take_home(python: str, command: str, query: str) -> str:
    """The code, the command and the link that give what is on screen again."""
    link = f'<code data-link="{escape(query)}">{escape(query)}</code>'
    return (
        heading("Take it home", "The very image on screen again, on your machine.")
        + '<div class="vi-home">'
        + code("Python", f"<code>{escape(python)}</code>")
        + code("Command line", f"<code>{escape(command)}</code>")
        + code("Link to these settings", link)
        + "</div>"
    )


def code(title: str, text: str) -> str:
    """A block with a button that copies it; ``text`` is HTML with a ``code`` element."""
    return (
        f'<div class="vi-code"><div class="vi-code-head"><h3>{title}</h3><button type="button" class="vi-copy" '
        f'aria-label="Copy: {title}">Copy</button></div><pre tabindex="0" aria-label="{title}">{text}</pre></div>'
    )


def downloads(files: Mapping[str, bytes]) -> str:
    """Links that hold their files themselves, so that no address on the server leads to them."""
    links = "".join(
        f'<a class="vi-download" download="{escape(name)}" href="data:application/octet-stream;base64,'
        f'{base64.b64encode(content).decode()}">{escape(name)}<small>{_size_of(len(content))}</small></a>'
        for name, content in files.items()
    )
    return f'<nav class="vi-downloads" aria-label="Downloads">{links}</nav>'


def _size_of(length: int) -> str:
    return f"{length / 1e6:.1f} MB" if length >= 1e6 else f"{max(1, round(length / 1e3))} kB"
