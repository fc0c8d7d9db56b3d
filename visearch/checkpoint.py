"""One serializer for the state of every search, so that each of them can stop and resume.

A checkpoint folder holds numbered rounds and ``latest.json``, which names the last complete one: a torn write is never
the latest. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from visearch.protocols import Population, Request, Reward, SearchState, identity

__all__ = ["load_state", "save_state"]


def save_state(folder: str | Path, state: SearchState, extra: dict[str, Any]) -> None:
    """Write a round: the state without its request, and JSON-able ``extra`` (ledger, fingerprint)."""
    folder = Path(folder)
    target = folder / f"round-{state.round:06d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "state.json").write_text(json.dumps({"state": _fields(state, target), "extra": extra}))
    pointer = folder / "latest.part"
    pointer.write_text(json.dumps(target.name))
    os.replace(pointer, folder / "latest.json")
    for old in folder.glob("round-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def load_state(
    folder: str | Path, blank: SearchState, device: Any = "cpu"
) -> tuple[SearchState, dict[str, Any]] | None:
    """The latest complete round and its extra, or ``None`` where there is none.

    Args:
        folder: what :func:`save_state` wrote.
        blank: a fresh state of the same search and request: gives the type and the request.
        device: where the sampler's tensors go.
    """
    folder = Path(folder)
    if not (folder / "latest.json").exists():
        return None
    target = folder / json.loads((folder / "latest.json").read_text())
    saved = json.loads((target / "state.json").read_text())
    values = {name: _decode(value, target, device, blank.request) for name, value in saved["state"].items()}
    return replace(blank, **values), saved["extra"]


def _fields(state: SearchState, folder: Path, prefix: str = "") -> dict[str, Any]:
    """All fields but the request, which is not saved."""
    names = [f.name for f in fields(state) if f.name != "request"]
    return {name: _encode(getattr(state, name), folder, prefix + name) for name in names}


def _encode(value: Any, folder: Path, name: str) -> Any:
    if isinstance(value, SearchState):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        _state_type(kind)  # refused now rather than when it is read
        return {"state": [kind, _fields(value, folder, f"{name}.")]}
    if isinstance(value, Population):
        value.save(folder / name)
        return {"population": name}
    if isinstance(value, Tensor):
        save_file({"value": value.detach().contiguous().clone()}, folder / f"{name}.safetensors")
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _encode(v, folder, f"{name}.{i}")] for i, (k, v) in enumerate(value.items())]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, folder, f"{name}.{i}") for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"search state field {name!r} holds a {type(value).__name__}; only populations, tensors, scalars and "
        "containers of them can be saved"
    )


def _decode(value: Any, folder: Path, device: Any, request: Request) -> Any:
    """``request`` is that of the whole search: nested states have no other."""
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "state":
        name, values = content
        return _state_type(name)(request, **{k: _decode(v, folder, device, request) for k, v in values.items()})
    if kind == "population":
        return Population.load(folder / content, device)
    if kind == "tensor":
        return load_file(folder / f"{content}.safetensors")["value"]
    if kind == "dict":
        return {k: _decode(v, folder, device, request) for k, v in content}
    items = [_decode(v, folder, device, request) for v in content]
    return tuple(items) if kind == "tuple" else items


def _state_type(name: str) -> type[SearchState]:
    """One of this package's own kinds of state, as far as loaded: names are looked up, nothing is imported or run."""
    known, todo = {}, [SearchState]
    while todo:
        kind = todo.pop()
        known[f"{kind.__module__}:{kind.__qualname__}"] = kind
        todo += kind.__subclasses__()
    if not name.startswith("visearch.") or name not in known:
        raise TypeError(f"a nested search state of type {name!r} can be neither saved nor read; use visearch's own")
    return known[name]


def fingerprint(request: Request, search: object, reward: Reward, num_stages: int, call: Mapping[str, Any]) -> str:
    """What must be equal for a checkpoint to be resumed; of the generator's call, what is a number or a text."""
    plain = {k: v for k, v in call.items() if isinstance(v, (bool, int, float, str, type(None)))}
    texts = [list(request.prompts), list(request.reward_prompts)]
    scored = [reward.name, identity(reward)]
    seeds = [request.seed, *request.prompt_seeds]
    return json.dumps([*texts, seeds, repr(search), scored, num_stages, plain], sort_keys=True)
