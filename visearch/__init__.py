"""Inference-time search for image and video generators."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Allocated": "visearch.search.allocated",
    "BestOfN": "visearch.search.best_of_n",
    "Budget": "visearch.budget",
    "CachedDrafts": "visearch.search.cached_drafts",
    "Comparison": "visearch.comparison",
    "ConformalHalving": "visearch.search.conformal",
    "EvolutionarySearch": "visearch.search.evosearch",
    "FKSteering": "visearch.search.smc",
    "Keep": "visearch.diversity",
    "Ledger": "visearch.budget",
    "LowFrequencyCrossEntropy": "visearch.search.ses",
    "Plan": "visearch.memory",
    "Pool": "visearch.pool",
    "Population": "visearch.protocols",
    "Refine": "visearch.search.refine",
    "Request": "visearch.protocols",
    "Reward": "visearch.protocols",
    "Sampler": "visearch.protocols",
    "Scores": "visearch.protocols",
    "Search": "visearch.protocols",
    "SearchOverPaths": "visearch.search.paths",
    "SearchPipeline": "visearch.wrap",
    "SearchResult": "visearch.run",
    "SequentialMonteCarlo": "visearch.search.smc",
    "StepCache": "visearch.pipelines.cache",
    "SuccessiveHalving": "visearch.search.successive_halving",
    "ZeroOrder": "visearch.search.zero_order",
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
