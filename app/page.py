"""The page: controls, one search as it runs, and what it leaves, in Gradio Blocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from starlette.middleware import Middleware

from visearch.app import compare_tab, favourites_tab, geneval_tab, plots, takehome, views
from visearch.app.frames import Frame, Settings
from visearch.app.guard import Guard
from visearch.app.sessions import Sessions
from visearch.app.studio import Studio
from visearch.app.theme import look
from visearch.app.widgets import PRIVATE, QUEUED, html

__all__ = ["create_demo", "launch"]

EXAMPLES = (
    "a photo of an apple left of a pizza",
    "a photo of a giraffe right of a bus",
    "a photo of three cows",
    "a photo of a green chair and a yellow car",
)
CLOSED = {  # of what Gradio serves beside the page
    "show_error": True,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "quiet": True,
}
HANDS = 16  # threads for what takes no time, while all who may wait do so


def create_demo(studio: Studio | None = None, folders: Sequence[Path] = ()) -> gr.Blocks:
    """The app; :func:`launch` serves it dressed and guarded.

    Args:
        studio: what it offers; default the embedded models.
        folders: results of ``visearch geneval`` for the browser of failures.
    """
    return _Page(studio or Studio()).build(folders)


def launch(
    studio: Studio | None = None,
    folders: Sequence[Path] = (),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: Sequence[tuple[str, str]] = (),
    inbrowser: bool = False,
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serve the app and print its addresses; returns it and the local one.

    What the page begins with is loaded first, so that nobody waits for it.

    Args:
        host: address to listen on; the default is reached from this machine alone.
        port: default the first free one from 7860.
        share: also open a public link, by Gradio's tunnel.
        auth: (user, password) pairs that may enter; all may where it is empty.
        inbrowser: open the default browser.
        block: return only after the server was stopped.

    Raises:
        ValueError: what the page begins with cannot be loaded or run.
        OSError: the port is taken.
    """
    page = _Page(studio or Studio())
    page.studio.check(page.default)
    plots.warm()
    demo = page.build(folders)
    limit = page.studio.limits.request
    _, url, _ = demo.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=list(auth) or None,
        inbrowser=inbrowser,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(Guard, limit=limit)]},
        max_file_size=limit,
        max_threads=page.studio.limits.waiting + HANDS,
        **CLOSED,
        **look(),
    )
    print(url, *filter(None, [demo.share_url]), sep="\n", flush=True)
    if block:
        demo.block_thread()
    return demo, url


@dataclass(frozen=True)
class _Controls:
    """In the order of the fields of :class:`Settings`."""

    prompt: gr.Textbox
    model: gr.Dropdown
    search: gr.Dropdown
    reward: gr.Dropdown
    held_out: gr.CheckboxGroup
    images: gr.Slider
    seconds: gr.Slider
    seed: gr.Number
    best_of_n: gr.Checkbox

    def all(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class _Regions:
    """What frames are shown in."""

    banner: gr.HTML
    stage: gr.HTML
    meter: gr.HTML
    status: gr.HTML
    board: gr.HTML
    tree: gr.HTML
    plots: gr.HTML
    judges: gr.HTML
    ledger: gr.HTML

    def of(self, frame: Frame) -> dict[Any, Any]:
        """What a frame puts into each."""
        return {
            self.banner: views.banner(frame),
            self.stage: views.stage(frame),
            self.meter: views.meter(frame),
            self.status: views.status(frame),
            self.board: views.board(frame),
            self.tree: views.lineage_svg(frame),
            self.plots: plots.figures(frame),
            self.judges: views.judges_table(frame),
            self.ledger: views.ledger_table(frame) + views.beside_table(frame),
        }


def _settings(values: Sequence[Any]) -> Settings:
    """What the controls say.

    Raises:
        ValueError: the seed is no whole number.
    """
    given = dict(zip((f.name for f in fields(_Controls)), values, strict=True))
    if given["seed"] is None:
        raise ValueError("seed is empty; give a whole number such as 0")
    given["held_out"] = tuple(given["held_out"])
    given["seconds"] = given["seconds"] or None
    return Settings(**given)


class _Page:
    def __init__(self, studio: Studio) -> None:
        self.studio, self.sessions = studio, Sessions(studio.limits.waiting)
        self.default = replace(
            studio.defaults(EXAMPLES[0]), model=next(iter(studio.models)), held_out=tuple(studio.judges)[:1]
        )

    def build(self, folders: Sequence[Path]) -> gr.Blocks:
        with gr.Blocks(title="visearch", analytics_enabled=False, fill_width=True) as demo:
            html(views.header())
            with gr.Tabs(elem_id="vi-tabs"):
                with gr.Tab("Search"):
                    self._search_tab(demo)
                with gr.Tab("Compare"):
                    compare_tab.build(self.studio, self.sessions)
                with gr.Tab("You are the reward"):
                    favourites_tab.build(self.studio, demo)
                with gr.Tab("GenEval"):
                    geneval_tab.build(folders)
        return demo.queue(default_concurrency_limit=1, api_open=False)

    # --- what is on the page ----------------------------------------------------------------------------------

    def _search_tab(self, demo: gr.Blocks) -> None:
        with gr.Row(elem_classes="vi-top"):
            with gr.Column(elem_classes="vi-controls", min_width=280):
                self.controls = self._controls()
                self.cost = html(id="vi-planned", watch="address")
                with gr.Row(elem_classes="vi-buttons"):
                    self.run = gr.Button("Run", variant="primary", elem_id="vi-run")
                    self.cancel = gr.Button("Cancel", interactive=False, elem_id="vi-cancel")
            with gr.Column(elem_classes="vi-main", min_width=320):
                banner = html(id="vi-banners")
                stage = html(views.stage(None), "vi-stage")
                meter = html(id="vi-budget")
                status = html(views.status(None), "vi-status")
        with gr.Column(elem_id="vi-results"):  # hidden by the style sheet until it has candidates
            self.regions = _Regions(banner, stage, meter, status, **self._results())
            self.home, self.files = html(id="vi-home", watch="links"), html(id="vi-files")
        self.last = gr.State(None)
        self._wire(demo)

    def _controls(self) -> _Controls:
        studio, limits, default = self.studio, self.studio.limits, self.default
        prompt = gr.Textbox(default.prompt, label="Prompt", max_length=limits.prompt, lines=1, max_lines=4)
        gr.Examples(list(map(list, zip(EXAMPLES))), prompt, label="Or try", api_visibility="private")
        search = gr.Dropdown(list(studio.searches), value=default.search, label="Search", filterable=False)
        self.explained = html(id="vi-explained")
        images = gr.Slider(1, limits.images, default.images, step=1, label="Budget in images")
        with gr.Accordion("Model, reward, seed", open=False):
            model = gr.Dropdown(list(studio.models), value=default.model, label="Model", filterable=False)
            rewards = {"choices": list(studio.rewards), "value": default.reward, "filterable": False}
            reward = gr.Dropdown(**rewards, label="Reward that guides")
            judges = [(f"{name}: {line}" if line != name else name, name) for name, line in studio.judges.items()]
            held_out = gr.CheckboxGroup(judges, value=list(default.held_out), label="Judges that only watch")
            seconds = gr.Slider(0, limits.seconds, 0, step=5, label="Budget in seconds", info="0: no limit")
            seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0)
            best_of_n = gr.Checkbox(
                default.best_of_n, label="Draw best-of-n too", info="After the search, beside its budget, to compare"
            )
        return _Controls(prompt, model, search, reward, held_out, images, seconds, seed, best_of_n)

    def _results(self) -> dict[str, Any]:
        """Components of the regions below the stage, by the names of :class:`_Regions`."""
        shown: dict[str, Any] = {}
        with gr.Row(elem_classes="vi-explore"):
            with gr.Column(elem_classes="vi-wide", min_width=320):
                html(views.heading("Candidates", "Every one that was drawn, with its latest preview and score."))
                shown["board"] = html([], "vi-board", watch="refresh")
                html(views.heading("Lineage", views.LEGEND))
                shown["tree"] = html(id="vi-lineage", watch="refresh")
            with gr.Column(elem_classes="vi-side", min_width=260):
                html(views.inspector())
        html(views.heading("Evidence", "What the reward gained for its cost, and what judges that it never saw say."))
        shown["plots"] = html([], "vi-plots")
        with gr.Row(elem_classes="vi-evidence"):
            shown["judges"], shown["ledger"] = html(id="vi-judges"), html(id="vi-ledger")
        return shown

    # --- what happens -----------------------------------------------------------------------------------------

    def _wire(self, demo: gr.Blocks) -> None:
        controls, planned = self.controls.all(), [self.explained, self.cost]
        restored = demo.load(self._restore, outputs=[*controls, self.regions.banner], **PRIVATE)
        restored.then(self._plan, controls, planned, **PRIVATE)
        for control in controls:
            control.change(self._plan, controls, planned, trigger_mode="always_last", **PRIVATE)
        regions = [getattr(self.regions, f.name) for f in fields(_Regions)]
        buttons = [self.run, self.cancel]
        outputs = [*regions, self.home, self.files, self.last]
        starts = [self.run.click, self.controls.prompt.submit]
        begun = gr.on(starts, self._begin, controls, [*buttons, *outputs], **QUEUED)
        begun.success(None, js="() => window.visearch.reveal()", api_visibility="private")
        searched = begun.success(self._search, controls, outputs, **QUEUED)
        ended = searched.then(self._end, None, buttons, **PRIVATE)
        ended.then(self._files, self.last, self.files, **PRIVATE)
        ended.then(self._plan, controls, planned, **PRIVATE)  # which knows this machine's pace now
        self.cancel.click(self._cancel, None, None, **PRIVATE)
        demo.unload(self._leave)

    def _restore(self, request: gr.Request) -> list[Any]:
        """The controls as the address of the page says, and what of it could not be read."""
        query = [(name, value) for name, value in request.query_params.multi_items() if not name.startswith("__")]
        settings, notes = takehome.restore(urlencode(query), self.studio) if query else (self.default, ())
        values = {f.name: getattr(settings, f.name) for f in fields(_Controls)}
        values |= {"held_out": list(settings.held_out), "seconds": settings.seconds or 0}
        return [*values.values(), views.notes(notes)]

    def _plan(self, *values: Any) -> tuple[str, str]:
        try:
            settings = _settings(values)
            explained = views.explanation(self.studio.searches[settings.search])
            self.studio.check(settings)
            return explained, views.cost_line(settings, self.studio.plan(settings), takehome.query(settings))
        except ValueError as error:
            return gr.skip(), views.problem_line(str(error))

    def _begin(self, request: gr.Request, *values: Any) -> dict[Any, Any]:
        """Refuse bad settings before they wait for their turn; else claim the user's one search and clear the stage."""
        try:
            settings = _settings(values)
            self.studio.check(settings)
            self.sessions.claim(request.username or request.session_hash, request.session_hash)
        except ValueError as error:
            raise gr.Error(escape(str(error)), title="Not run", duration=None, print_exception=False) from None
        empty = Frame(settings, "waiting")
        return {
            self.run: gr.update(interactive=False),
            self.cancel: gr.update(interactive=True),
            **self.regions.of(empty),
            self.home: "",
            self.files: "",
            self.last: None,
        }

    def _search(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        cancelled = self.sessions.claimed(request.session_hash)
        if cancelled is None:  # the page was closed while it waited
            return
        settings = _settings(values)
        for frame in self.studio.run(settings, cancelled.is_set):
            shown = self.regions.of(frame)
            if frame.over and frame.winner is not None:
                shown |= {self.last: frame, self.home: self._home(settings)}
            yield shown

    def _home(self, settings: Settings) -> str:
        studio, link = self.studio, takehome.query(settings)
        try:
            return views.take_home(takehome.python(settings, studio), takehome.command(settings, studio), link)
        except ValueError as error:  # a model that was made in code: no command names it
            return views.notes([str(error)])

    def _end(self, request: gr.Request) -> tuple[Any, Any]:
        self.sessions.release(request.session_hash)
        return gr.update(interactive=True), gr.update(interactive=False)

    def _cancel(self, request: gr.Request) -> None:
        self.sessions.cancel(request.session_hash)

    def _files(self, frame: Frame | None) -> str:
        if frame is None:
            return ""
        with tempfile.TemporaryDirectory() as folder:
            return views.downloads(self.studio.files(frame, Path(folder)))

    def _leave(self, request: gr.Request) -> None:
        self.sessions.release(request.session_hash)
