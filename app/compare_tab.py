"""The Compare tab: two searches at equal budget, judged blindly by the person before the numbers are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from visearch.app import views
from visearch.app.frames import Frame, Media, Settings
from visearch.app.sessions import Sessions
from visearch.app.studio import Studio
from visearch.app.votes import Ballot, Standing, Tally
from visearch.app.widgets import PRIVATE, QUEUED, html

__all__ = ["build"]

ABOUT = (
    "Both searches get the same prompt, seed and budget, one after the other. Then their pictures are shown as A and B "
    "in an order drawn by lot, and you vote before you are told which is which."
)
TALLY = (
    "Of this page, “same” as half a point, with exact 95 % intervals (Clopper-Pearson). These hold for a number of "
    "votes that you fix before the first one."
)


@dataclass(frozen=True)
class Duel:
    """Two searches that are over, and how their winners are shown; ``choice`` is the vote, once it is cast."""

    ballot: Ballot
    frames: dict[str, Frame]
    choice: str | None = None

    def frame(self, side: str) -> Frame:
        return self.frames[self.ballot.a if side == "A" else self.ballot.b]

    def winner(self, side: str) -> Media:
        frame = self.frame(side)
        return frame.find(frame.winner).media


def build(studio: Studio, sessions: Sessions) -> None:
    """Fill the tab that is open in Gradio's context.

    Args:
        studio: runs the searches.
        sessions: who searches; a page that is closed is released there.
    """
    _Tab(studio, sessions).build()


class _Tab:
    def __init__(self, studio: Studio, sessions: Sessions) -> None:
        self.studio, self.sessions = studio, sessions

    def build(self) -> None:
        with gr.Row(elem_classes="vi-top"):
            with gr.Column(elem_classes="vi-controls", min_width=280):
                controls = self._controls()
                with gr.Row(elem_classes="vi-buttons"):
                    self.run = gr.Button("Run both", variant="primary", elem_id="vi-compare-run")
                    self.cancel = gr.Button("Cancel", interactive=False, elem_id="vi-compare-cancel")
            with gr.Column(elem_classes="vi-main", min_width=320):
                self.stage = html(_invitation(), "vi-duel")
                with gr.Row(visible=False, elem_id="vi-vote") as self.booth:
                    buttons = {"A": gr.Button("A is better"), "same": gr.Button("Same"), "B": gr.Button("B is better")}
                self.tally = html(_tally(Tally()), "vi-tally")
        self.duel, self.votes = gr.State(None), gr.State(Tally())
        self._wire(controls, buttons)

    def _controls(self) -> list[Any]:
        studio, default = self.studio, self.studio.defaults("a photo of two cows")
        names = list(studio.searches)
        pair = ["best-of-n", default.search] if {"best-of-n", default.search} <= set(names) else names[:2]
        pick = {"filterable": False}
        prompt = gr.Textbox(default.prompt, label="Prompt", max_length=studio.limits.prompt, lines=1, max_lines=4)
        one = gr.Dropdown(names, value=pair[0], label="One search", **pick)
        other = gr.Dropdown(names, value=pair[-1], label="The other", **pick)
        images = gr.Slider(1, studio.limits.images, default.images, step=1, label="Budget of each in images")
        with gr.Accordion("Model, reward, seed", open=False):
            model = gr.Dropdown(list(studio.models), value=default.model, label="Model", **pick)
            reward = gr.Dropdown(list(studio.rewards), value=default.reward, label="Reward that guides both", **pick)
            judges = list(studio.judges)
            held_out = gr.CheckboxGroup(judges, value=judges[:1], label="Judges that only watch")
            seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0)
        return [prompt, one, other, images, model, reward, held_out, seed]

    def _wire(self, controls: list[Any], votes: dict[str, gr.Button]) -> None:
        running = [self.run, self.cancel]
        shown = [self.stage, self.booth, self.tally, self.duel, self.votes]
        begun = self.run.click(self._begin, controls, [*running, *shown], **QUEUED)
        searched = begun.success(self._search, [self.votes, *controls], shown, **QUEUED)
        searched.then(self._end, None, running, **PRIVATE)
        self.cancel.click(self._cancel, None, None, **PRIVATE)
        for choice, button in votes.items():
            button.click(partial(self._vote, choice), [self.duel, self.votes], shown, **PRIVATE)

    # --- what happens -----------------------------------------------------------------------------------------

    def _begin(self, request: gr.Request, *values: Any) -> dict[Any, Any]:
        """Refuse bad settings before they wait for their turn; else claim the user's one search and clear the stage."""
        try:
            for settings in _pair(values):
                self.studio.check(settings)
            self.sessions.claim(request.username or request.session_hash, request.session_hash)
        except ValueError as error:
            raise gr.Error(escape(str(error)), title="Not run", duration=None, print_exception=False) from None
        return {
            self.run: gr.update(interactive=False),
            self.cancel: gr.update(interactive=True),
            self.stage: _running([]),
            self.booth: gr.update(visible=False),
            self.duel: None,
        }

    def _search(self, request: gr.Request, tally: Tally, *values: Any) -> Iterator[dict[Any, Any]]:
        cancelled = self.sessions.claimed(request.session_hash)
        if cancelled is None:  # the page was closed while it waited
            return
        frames: list[Frame] = []
        for settings in _pair(values):
            for frame in self.studio.run(settings, cancelled.is_set):
                yield {self.stage: _running([*frames, frame])}
            frames.append(frame)
            if frame.phase in ("failed", "cancelled") or frame.winner is None:
                yield {self.stage: _unfinished(frames)}
                return
        duel = Duel(Ballot.drawn(*(f.settings.search for f in frames)), {f.settings.search: f for f in frames})
        if duel.winner("A").content == duel.winner("B").content:
            yield self._vote("same", duel, tally)
        else:
            yield {self.stage: _blind(duel), self.booth: gr.update(visible=True), self.duel: duel}

    def _vote(self, choice: str, duel: Duel | None, tally: Tally) -> dict[Any, Any]:
        if duel is None or duel.choice is not None:  # a second click
            return {self.booth: gr.update(visible=False)}
        duel, tally = replace(duel, choice=choice), tally.counted(duel.ballot, choice)
        return {
            self.stage: _named(duel),
            self.booth: gr.update(visible=False),
            self.tally: _tally(tally),
            self.duel: duel,
            self.votes: tally,
        }

    def _end(self, request: gr.Request) -> tuple[Any, Any]:
        self.sessions.release(request.session_hash)
        return gr.update(interactive=True), gr.update(interactive=False)

    def _cancel(self, request: gr.Request) -> None:
        self.sessions.cancel(request.session_hash)


def _pair(values: Sequence[Any]) -> list[Settings]:
    """The settings of both searches, which differ by nothing else.

    Raises:
        ValueError: twice the same search, or no seed.
    """
    prompt, one, other, images, model, reward, held_out, seed = values
    if one == other:
        raise ValueError(f"both searches are {one!r}; choose two different ones")
    if seed is None:
        raise ValueError("seed is empty; give a whole number such as 0")
    both = Settings(prompt, model, one, reward, tuple(held_out), images, None, seed, best_of_n=False)
    return [both, replace(both, search=other)]


# --- as HTML ----------------------------------------------------------------------------------------------------


def _invitation() -> str:
    empty = [views.figure(side, None, "one of the two searches") for side in "AB"]
    return _stack(views.heading("Which search is better?", ABOUT), _two(empty))


def _stack(*parts: str) -> str:
    return f'<div class="vi-stack">{"".join(parts)}</div>'


def _two(figures: Sequence[str]) -> str:
    return f'<div class="vi-two">{"".join(figures)}</div>'


def _say(text: str) -> str:
    return f'<p class="vi-say" role="status">{text}</p>'


def _running(frames: Sequence[Frame]) -> str:
    """How far both are. Their pictures would tell which is which."""
    runs = [f"<li><strong>{escape(f.settings.search)}</strong>{views.meter(f)}</li>" for f in frames if f.cost]
    words = views.status(frames[-1]) if frames else _say("Waiting for its turn.")
    hidden = [views.figure(side, None, "hidden until both are done", waiting=True) for side in "AB"]
    return _stack(_two(hidden), f'<ol class="vi-runs">{"".join(runs)}</ol>', words)


def _unfinished(frames: Sequence[Frame]) -> str:
    """Why there is nothing to vote on."""
    last = frames[-1]
    if last.error:
        return views.errors([f"{last.settings.search}: {last.error}"])
    why = "was cancelled" if last.phase == "cancelled" else "finished no image"
    return _say(f"{escape(last.settings.search)} {why}: a vote needs two searches at equal budget.")


def _blind(duel: Duel) -> str:
    """The pictures alone: their own texts would tell which candidates they are."""
    alts = {side: f"Picture {side}: {duel.frame(side).settings.prompt}" for side in "AB"}
    pictures = {side: replace(duel.winner(side), alt=alt) for side, alt in alts.items()}
    figures = [views.figure(side, picture, "one of the two searches") for side, picture in pictures.items()]
    return _stack(_two(figures), _say("Which picture is better?"))


def _named(duel: Duel) -> str:
    """Both winners with their names, and what each cost and reached."""
    figures = [_revealed(duel, side) for side in "AB"]
    same = duel.winner("A").content == duel.winner("B").content
    said = "Both found the same picture, which counts as “same”." if same else f"You voted: {_said(duel)}."
    frames = [duel.frame(side) for side in "AB"]
    return _stack(_two(figures), _say(said), _numbers(frames))


def _revealed(duel: Duel, side: str) -> str:
    name, chosen = duel.frame(side).settings.search, duel.choice == side
    words = f"was {side}" + ", your choice" * chosen
    return views.figure(escape(name), duel.winner(side), words, best=chosen)


def _said(duel: Duel) -> str:
    if duel.choice == "same":
        return "same"
    return f"{duel.choice}, which is {escape(duel.frame(duel.choice).settings.search)}"


def _numbers(frames: Sequence[Frame]) -> str:
    heads = ["", *(escape(f.settings.search) for f in frames), "sampled once"]
    best = [f.find(f.winner) for f in frames]
    rows = [[f"Score ({escape(frames[0].settings.reward)})", *(views.number(c.score) for c in best)]]
    rows[0].append(views.number(frames[0].baseline_score))
    for judge, (base, _) in frames[0].held_out.items():
        found = [views.number(f.held_out[judge][1]) if judge in f.held_out else "–" for f in frames]
        rows.append([escape(judge), *found, views.number(base)])
    rows.append(["Images spent", *(f"{f.images:.2f}" for f in frames), "1"])
    rows.append(["Seconds", *(views.seconds(f.seconds) for f in frames), ""])
    notes = dict.fromkeys(warning for f in frames for warning in f.warnings)
    return views.table(heads, rows, "What each reached, and for what") + views.notes(list(notes))


def _tally(tally: Tally) -> str:
    if not tally.votes:
        return ""
    heads = ["Pair", "Won, same, lost", "Win rate of the first", "So far"]
    rows = [_standing(s) for s in tally.standings()]
    return views.heading("Your votes", TALLY) + views.table(heads, rows, "Votes by pair of searches")


def _standing(s: Standing) -> list[str]:
    first, second = map(escape, s.pair)
    decided = "not decided yet" if s.leader is None else f"<strong>{escape(s.leader)} is preferred</strong>"
    return [
        f"{first} against {second} <small>{views.count(s.rate.clusters, 'vote')}</small>",
        f"{s.wins}, {s.same}, {s.losses}",
        f"{s.rate.mean:.0%} <small>{s.rate.low:.0%} to {s.rate.high:.0%}</small>",
        decided,
    ]
