"""The tab in which the person is the reward: choose favourites, and the next generation is bred from them."""

from __future__ import annotations

import asyncio
import json
from html import escape
from typing import Any

import gradio as gr

from visearch.app import takehome, views
from visearch.app.favourites import Answer, Breeding, Family, Picture, Wish
from visearch.app.frames import Settings
from visearch.app.sessions import Sessions
from visearch.app.studio import Studio
from visearch.app.widgets import PRIVATE, QUEUED, html

__all__ = ["build"]

PACE = 0.1  # seconds between two looks whether the next generation is there
ABOUT = (
    "No model judges here, you do. Choose the pictures that you like, any number of them; the next generation is bred "
    "from those, and each begins later in the drawing: first the composition settles, then the details."
)
CHOOSE = "Choose any number. If you choose none, the latest favourites breed again."
LAST = "The last generation: the picture that you choose first wins."
TOGGLE = """
let count = 0;
const pressed = () => [...element.querySelectorAll('[data-picture][aria-pressed="true"]')]
  .sort((a, b) => a.dataset.order - b.dataset.order);
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-picture]');
  if (!button) return;
  button.setAttribute('aria-pressed', String(button.getAttribute('aria-pressed') !== 'true'));
  button.dataset.order = ++count;
  element.querySelectorAll('.vi-place').forEach((place) => (place.textContent = ''));
  pressed().forEach((one, i) => (one.querySelector('.vi-place').textContent = i + 1));
});
"""
CHOSEN = """() => [JSON.stringify(
  [...document.querySelectorAll('#vi-breeding [data-picture][aria-pressed="true"]')]
    .sort((a, b) => a.dataset.order - b.dataset.order).map((one) => Number(one.dataset.picture)))]"""


def build(studio: Studio, demo: gr.Blocks) -> None:
    """Fill the tab that is open in Gradio's context.

    Args:
        studio: lends its models.
        demo: tells which page was closed.
    """
    _Tab(studio).build(demo)


class _Tab:
    """One breeding a user; its thread lends the model to others while the user thinks."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.sessions = studio, Sessions()
        self.breedings: dict[str, tuple[Breeding, Settings]] = {}

    def build(self, demo: gr.Blocks) -> None:
        with gr.Row(elem_classes="vi-top"):
            with gr.Column(elem_classes="vi-controls", min_width=280):
                controls = self._controls()
                with gr.Row(elem_classes="vi-buttons"):
                    self.start = gr.Button("Start", variant="primary", elem_id="vi-breed-start")
                    self.stop = gr.Button("Cancel", interactive=False, elem_id="vi-breed-stop")
            with gr.Column(elem_classes="vi-main", min_width=320):
                self.stage = gr.HTML(
                    views.heading("You are the reward", ABOUT),
                    apply_default_css=False,
                    elem_id="vi-breeding",
                    js_on_load=TOGGLE,
                )
                with gr.Row(visible=False, elem_classes="vi-buttons") as self.booth:
                    self.next = gr.Button("Breed the next generation", variant="primary", elem_id="vi-breed-next")
                    self.finish = gr.Button("Finish with these", elem_id="vi-breed-finish")
                self.family = html(id="vi-family")
        self._wire(demo, controls)

    def _controls(self) -> list[Any]:
        studio, default = self.studio, self.studio.defaults("a photo of two cows")
        prompt = gr.Textbox(default.prompt, label="Prompt", max_length=studio.limits.prompt, lines=1, max_lines=4)
        pictures = gr.Slider(4, 12, Wish.pictures, step=1, label="Pictures of a generation")
        generations = gr.Slider(2, 6, Wish.generations, step=1, label="Generations")
        with gr.Accordion("Model, seed", open=False):
            model = gr.Dropdown(list(studio.models), value=default.model, label="Model", filterable=False)
            seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0)
        return [prompt, model, pictures, generations, seed]

    def _wire(self, demo: gr.Blocks, controls: list[Any]) -> None:
        shown = [self.stage, self.family, self.booth, self.next, self.start, self.stop]
        waiting = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
        self.start.click(self._start, controls, shown, **QUEUED).success(self._wait, None, shown, **waiting)
        chosen = gr.Textbox(visible=False)
        for button, last in ((self.next, False), (self.finish, True)):

            def answered(chosen: str, request: gr.Request, last: bool = last) -> dict[Any, Any]:
                return self._answer(chosen, last, request)

            button.click(answered, chosen, shown, js=CHOSEN, **PRIVATE).success(self._wait, None, shown, **waiting)
        self.stop.click(self._stop, None, None, **PRIVATE).success(self._wait, None, shown, **waiting)
        demo.unload(self._leave)

    # --- what happens -----------------------------------------------------------------------------------------

    def _start(
        self, prompt: str, model: str, pictures: int, generations: int, seed: int | None, request: gr.Request
    ) -> dict[Any, Any]:
        session, studio = request.session_hash, self.studio
        settings = Settings(prompt, model, seed=seed)
        self._leave(request)
        try:
            for what in ("prompt", "model", "seed"):
                studio.check_value(what, getattr(settings, what))
            wish = Wish(prompt, seed, pictures, generations)
            lent = studio.model(model)
            self.sessions.claim(request.username or session, session)
            self.breedings[session] = Breeding(wish, lent, images=studio.limits.images), settings
        except ValueError as error:
            self.sessions.release(session)
            raise _refused(error) from None
        return {
            self.stage: _drawing(Family(wish)),
            self.family: "",
            self.booth: gr.update(visible=False),
            self.start: gr.update(interactive=False),
            self.stop: gr.update(interactive=True),
        }

    async def _wait(self, request: gr.Request) -> dict[Any, Any]:
        """The next generation, or the end, as soon as it is there."""
        session = request.session_hash
        breeding, settings = self.breedings.get(session, (None, None))
        while breeding is not None and (family := breeding.shown(0)) is None:
            await asyncio.sleep(PACE)
            breeding, settings = self.breedings.get(session, (None, None))
        if breeding is None:  # the page was closed
            return {self.stage: gr.skip()}
        if family.ended is None:
            more = gr.update(visible=True)
            step = gr.update(visible=not family.final)
            return {self.stage: _choices(family), self.family: _earlier(family), self.booth: more, self.next: step}
        self._leave(request)
        return {
            self.stage: _end(family, self._home(settings)),
            self.family: _earlier(family, all=True),
            self.booth: gr.update(visible=False),
            self.start: gr.update(interactive=True),
            self.stop: gr.update(interactive=False),
        }

    def _answer(self, chosen: str, last: bool, request: gr.Request) -> dict[Any, Any]:
        breeding, _ = self.breedings.get(request.session_hash, (None, None))
        try:
            if breeding is None:
                raise ValueError("this breeding is over; start another one")
            breeding.answer(Answer(_numbers(chosen), last))
        except ValueError as error:
            raise _refused(error) from None
        return {self.stage: _drawing(breeding.family), self.booth: gr.update(visible=False)}

    def _stop(self, request: gr.Request) -> None:
        breeding, _ = self.breedings.get(request.session_hash, (None, None))
        if breeding is not None:
            breeding.close()

    def _leave(self, request: gr.Request) -> None:
        """End this page's breeding and forget it."""
        breeding, _ = self.breedings.pop(request.session_hash, (None, None))
        if breeding is not None:
            breeding.close()
        self.sessions.release(request.session_hash)

    def _home(self, settings: Settings) -> str:
        try:
            return views.code("Python", f"<code>{escape(takehome.bred(settings, self.studio))}</code>")
        except ValueError as error:  # a model that was made in code
            return views.notes([str(error)])


def _refused(error: ValueError) -> gr.Error:
    return gr.Error(escape(str(error)), title="Not run", duration=None, print_exception=False)


def _numbers(chosen: str) -> tuple[int, ...]:
    """What the page's script sends.

    Raises:
        ValueError: something else.
    """
    try:
        numbers = json.loads(chosen or "[]")
    except json.JSONDecodeError:
        numbers = None
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise ValueError("favourites are no list of numbers; reload the page")
    return tuple(numbers)


# --- as HTML ----------------------------------------------------------------------------------------------------


def _title(family: Family, generation: int) -> str:
    return f"Generation {generation} of {family.wish.generations}"


def _drawing(family: Family) -> str:
    ended = family.generations and family.final
    title = "The winner" if ended else _title(family, len(family.generations) + 1)
    waiting = f'<div class="vi-choice vi-waiting">{views.media_html(None, "being drawn")}</div>'
    grid = "" if ended else f'<div class="vi-choices">{waiting * family.wish.pictures}</div>'
    return f"{views.heading(title, 'Drawing.')}{_status(f'{title}: drawing.')}{grid}"


def _status(text: str) -> str:
    return f'<p class="vi-aloud" role="status">{escape(text)}</p>'


def _choices(family: Family) -> str:
    title = _title(family, len(family.generations))
    cards = "".join(_choice(picture) for picture in family.generations[-1])
    return (
        f"{views.heading(title, LAST if family.final else CHOOSE)}{_status(f'{title} is there to choose from.')}"
        f'<div class="vi-choices" role="group" aria-label="Pictures of {title.lower()}">{cards}</div>'
    )


def _choice(picture: Picture) -> str:
    """A button that stays pressed; the page's script numbers the pressed ones in their order."""
    bred = "" if picture.parent is None else f", bred from picture {picture.parent}"
    return (
        f'<button type="button" class="vi-choice" data-picture="{picture.number}" aria-pressed="false" '
        f'aria-label="Picture {picture.number}{bred}">{views.media_html(picture.media)}'
        f'<span class="vi-place" aria-hidden="true"></span>{_caption(picture)}</button>'
    )


def _caption(picture: Picture) -> str:
    bred = "" if picture.parent is None else f" <small>from {picture.parent}</small>"
    return f'<span class="vi-caption"><b>{picture.number}</b>{bred}</span>'


def _earlier(family: Family, all: bool = False) -> str:
    """Generations that were judged, the latest first."""
    judged = list(enumerate(family.generations if all else family.generations[:-1], 1))
    rows = [
        f'<section><h3>Generation {g}</h3><ol class="vi-strip">{"".join(map(_member, pictures))}</ol></section>'
        for g, pictures in reversed(judged)
    ]
    return views.heading("The family", "What you chose, and what was bred from it.") + "".join(rows) if rows else ""


def _member(picture: Picture) -> str:
    liked = picture.place is not None
    mark = ' <span class="vi-mark">chosen</span>' * liked
    return f'<li class="{"vi-liked" * liked}">{views.media_html(picture.media)}{_caption(picture)}{mark}</li>'


def _end(family: Family, home: str) -> str:
    winner = family.find(family.winner)
    if winner is None:
        return views.errors([family.ended]) if family.failed else views.heading("No winner", family.ended)
    files = views.downloads({"winner.zip": family.archive})
    made = "".join(f"<li>{escape(views.operation(event))}</li>" for event in winner.lineage)
    return (
        f'{views.heading("Your winner", family.ended)}{_status(family.ended)}<div class="vi-won">'
        f"{views.figure(f'Picture {winner.number}', winner.media, f'seed {winner.seed}', best=True)}"
        f"<div><h3>How it was made</h3><ol>{made}</ol>{files}</div></div>{home}"
    )
