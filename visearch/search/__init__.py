"""Search algorithms, one short file each, by name, and the text that stands for one with its hyperparameters."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from visearch.protocols import Registry, Search

__all__ = ["SEARCHES", "describe", "parse"]

SEARCHES = Registry(
    "search",
    {
        "allocated": "visearch.search.allocated:Allocated",
        "best-of-n": "visearch.search.best_of_n:BestOfN",
        "cached-drafts": "visearch.search.cached_drafts:CachedDrafts",
        "conformal": "visearch.search.conformal:ConformalHalving",
        "evosearch": "visearch.search.evosearch:EvolutionarySearch",
        "fk": "visearch.search.smc:FKSteering",
        "halving": "visearch.search.successive_halving:SuccessiveHalving",
        "paths": "visearch.search.paths:SearchOverPaths",
        "refine": "visearch.search.refine:Refine",
        "ses": "visearch.search.ses:LowFrequencyCrossEntropy",
        "smc": "visearch.search.smc:SequentialMonteCarlo",
        "zero-order": "visearch.search.zero_order:ZeroOrder",
    },
)

PARTS = Registry(
    "part of a search",
    {
        "eta": "visearch.protocols:EtaStep",
        "keep": "visearch.diversity:Keep",
        "ode": "visearch.protocols:Ode",
        "renoise": "visearch.protocols:FullRenoise",
        "sde": "visearch.protocols:Sde",
    },
)
_WORDS = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|(?<![\w.])[A-Za-z_]\w*(?:-[A-Za-z_]\w*)+""")


def parse(text: str) -> Search:
    """A search from its text: a registered name, alone or with hyperparameters, some of which may be searches.

    ``"halving"``, ``"halving(n=16, preset='psp')"``, ``"refine(first=halving(n=12), then=zero-order(k=4))"``. Values
    are Python literals, searches, or parts of them such as ``keep(method='dpp')`` or ``eta(eta=0.5)``; nothing is
    evaluated.

    Raises:
        ValueError: what is written is no such text, names no search, or gives it a field that it does not have or take.
    """
    dashed = _WORDS.sub(lambda word: word[0] if word[0][0] in "'\"" else word[0].replace("-", "_"), text)
    try:
        node = ast.parse(dashed.strip(), mode="eval").body
        return _built(node, SEARCHES)
    except SyntaxError as error:
        raise ValueError(
            f"search {text!r} cannot be read ({error.msg}); write NAME or NAME(field=value, ...)"
        ) from None
    except ValueError as error:
        raise ValueError(f"search {text!r}: {error}") from error


def describe(search: Search) -> str:
    """The short text that :func:`parse` reads as an equal search: fields that differ from the defaults alone.

    Raises:
        ValueError: the search, or what one of its fields holds, has no text.
    """
    kind = f"{type(search).__module__}:{type(search).__qualname__}"
    name = next((n for registry in (SEARCHES, PARTS) for n, target in registry.items() if target == kind), None)
    if name is None:
        raise ValueError(f"{search!r} has no text: {kind} is not registered; add it with SEARCHES.add")
    given = {f.name: getattr(search, f.name) for f in fields(search) if f.init}
    for field in tuple(given):
        fewer = {k: v for k, v in given.items() if k != field}
        try:
            given = fewer if type(search)(**fewer) == search else given
        except (TypeError, ValueError):  # not without this one
            continue
    inside = ", ".join(f"{field}={_written(value, field)}" for field, value in given.items())
    return f"{name}({inside})" if inside else name


def _built(node: ast.expr, *registries: Registry) -> Any:
    """What a name or a call of one stands for."""
    called = node.func if isinstance(node, ast.Call) else node
    if not isinstance(called, ast.Name):
        raise ValueError(f"{ast.unparse(node)} is no search; write NAME or NAME(field=value, ...)")
    name = called.id.replace("_", "-")
    make = next((r for r in registries if name in r), registries[0]).load(name)
    given = {}
    if isinstance(node, ast.Call):
        if node.args or any(word.arg is None for word in node.keywords):
            raise ValueError(f"give the fields of {name} by name, such as {name}(n=8)")
        takes = list(inspect.signature(make).parameters)
        for word in node.keywords:
            if word.arg in given:
                raise ValueError(f"{name} is given {word.arg} twice")
            if word.arg not in takes:
                near = get_close_matches(word.arg, takes, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(takes)}"
                raise ValueError(f"{name} has no field {word.arg!r}; {hint}")
            given[word.arg] = _value(word.value, f"{name}({word.arg}=...)")
    try:
        return make(**given)
    except TypeError as error:  # a value of a kind that the field cannot be compared with
        raise ValueError(f"{name} does not take these values ({error})") from error


def _value(node: ast.expr, where: str) -> Any:
    if isinstance(node, ast.Tuple | ast.List):
        kind = tuple if isinstance(node, ast.Tuple) else list
        return kind(_value(item, where) for item in node.elts)
    if isinstance(node, ast.Name) and not any(node.id.replace("_", "-") in r for r in (SEARCHES, PARTS)):
        near = get_close_matches(node.id.replace("_", "-"), SEARCHES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"{where}: {node.id} is no search; {hint}text stands in quotes: {node.id!r}")
    if isinstance(node, ast.Call | ast.Name):
        return _built(node, SEARCHES, PARTS)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{where}: {ast.unparse(node)} is neither a literal nor a search") from None


def _written(value: Any, field: str) -> str:
    if is_dataclass(value):
        return describe(value)
    if isinstance(value, tuple | list):
        items = ", ".join(_written(item, field) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})"
    text = repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ValueError(f"{field}={value!r} has no text; only literals, searches and parts of searches have")
    return text
