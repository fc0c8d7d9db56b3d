"""One table of tiny pipelines: how each is built and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PROMPT = "a photo of two cows"


@dataclass(frozen=True)
class Family:
    """A pipeline class at toy size.

    Args:
        make: builds it with the weights of the global random stream.
        call: arguments of its call that make it small, without steps.
        prompt: arguments that stand for one prompt; a function where they are costly.
    """

    make: Callable[[], Any]
    call: Mapping[str, Any]
    prompt: Callable[[], Mapping[str, Any]]


FAMILIES: dict[str, Family] = {}


def family(name: str, *, prompt: Callable[[], Mapping[str, Any]] | None = None, **call: Any) -> Callable:
    """Enter a builder into :data:`FAMILIES`; without ``prompt`` the pipeline takes text."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        FAMILIES[name] = Family(make, call, prompt or (lambda: {"prompt": PROMPT}))
        return make

    return register
