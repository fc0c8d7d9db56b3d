"""Pieces of Gradio that the page and its tabs share."""

from __future__ import annotations

import gradio as gr

__all__ = ["PRIVATE", "QUEUED", "html"]

PRIVATE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of events that take no time and are none of an API's business."""
QUEUED = PRIVATE | {"queue": True, "concurrency_limit": None}
"""The same for events that refuse, which outside of Gradio's queue are failed requests, and for searches, which wait
for their turn by themselves."""


def html(value: str | list[str] = "", id: str | None = None, watch: str | None = None) -> gr.HTML:
    """A region of HTML; of a list, only the pieces that changed are sent. ``watch`` is called after each change."""
    return gr.HTML(
        value,
        html_template='<div class="vi-pieces">${value.join("")}</div>' if isinstance(value, list) else "${value}",
        js_on_load=watch and f"watch('value', () => window.visearch.{watch}());",
        apply_default_css=False,
        elem_id=id,
    )
