"""The app: baseline and search side by side in a browser."""

from __future__ import annotations

from typing import Any

__all__ = ["create_demo", "launch"]


def __getattr__(name: str) -> Any:
    """Public names on their first use: importing ``visearch.app`` does not load Gradio."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from visearch.app import page

    return getattr(page, name)
