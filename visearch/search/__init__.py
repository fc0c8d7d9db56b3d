"""Search algorithms, one short file each, by name."""

from visearch.protocols import Registry

__all__ = ["SEARCHES"]

SEARCHES = Registry(
    "search",
    {
        "best-of-n": "visearch.search.best_of_n:BestOfN",
        "halving": "visearch.search.successive_halving:SuccessiveHalving",
    },
)
