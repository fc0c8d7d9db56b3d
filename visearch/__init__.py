"""Inference-time search for image and video generators."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "BestOfN": "visearch.search.best_of_n",
    "Budget": "visearch.budget",
    "Ledger": "visearch.budget",
    "Plan": "visearch.memory",
    "Population": "visearch.protocols",
    "Request": "visearch.protocols",
    "Reward": "visearch.protocols",
    "Sampler": "visearch.protocols",
    "Scores": "visearch.protocols",
    "Search": "visearch.protocols",
    "SearchPipeline": "visearch.wrap",
    "SearchResult": "visearch.run",
    "SuccessiveHalving": "visearch.search.successive_halving",
    "plan": "visearch.memory",
    "regenerate": "visearch.run",
    "run_search": "visearch.run",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that ``import visearch`` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'visearch' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
