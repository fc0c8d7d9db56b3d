"""The look that Gradio's own widgets take: the project's colours, and fonts that every system has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

__all__ = ["look"]

HERE = Path(__file__).parent
ICON = (
    "<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 2 2'%3E"
    "%3Ccircle cx='1' cy='1' r='.9' fill='%230a7d4f'/%3E%3C/svg%3E\">"
)
GREEN = gr.themes.Color(
    *("#eef8f3", "#d9f0e5", "#b4e1cc", "#84ccab", "#4cc38f", "#16965f"),
    *("#0a7d4f", "#086440", "#074f34", "#06402b", "#03251a"),
)
GREY = gr.themes.Color(
    *("#f7f8f6", "#eff1ee", "#e1e6e2", "#c9d0cb", "#9fb0a7", "#6d7b73"),
    *("#56635c", "#3c4741", "#2a332e", "#171d1a", "#0f1412"),
)
SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue=GREEN, neutral_hue=GREY, font=SANS, font_mono=MONO, radius_size="md")
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="#16201b",
        body_text_color_dark="#ecf1ee",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary_dark="*neutral_900",
        color_accent="*primary_600",
        input_border_width="1px",
        input_border_width_dark="1px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_text_color="*body_text_color",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_900",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px",
        button_primary_border_color="*primary_600",
        button_primary_border_color_dark="*primary_600",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_400",
    )


def look() -> dict[str, Any]:
    """Arguments of ``gr.Blocks.launch`` that dress the page."""
    styles = [HERE / "style.css", HERE / "tabs.css"]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {"theme": _theme(), "css_paths": styles, "head": f"{ICON}<script>{script}</script>"}
