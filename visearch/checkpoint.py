"""One serializer for the state of every search, so that each of them can stop and resume.

A checkpoint folder holds numbered rounds and ``latest.json``, which names the last complete one: a torn write is never
the latest. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from visearch.protocols import Population, Request, SearchState

__all__ = ["load_state", "save_state"]


def save_state(folder: str | Path, state: SearchState, extra: dict[str, Any]) -> None:
    """Write a round: the state without its request, and JSON-able ``extra`` (ledger, fingerprint)."""
    folder = Path(folder)
    target = folder / f"round-{state.round:06d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    encoded = {f.name: _encode(getattr(state, f.name), target, f.name) for f in fields(state) if f.name != "request"}
    (target / "state.json").write_text(json.dumps({"state": encoded, "extra": extra}))
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
    values = {name: _decode(value, target, device) for name, value in saved["state"].items()}
    return replace(blank, **values), saved["extra"]


def _encode(value: Any, folder: Path, name: str) -> Any:
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


def _decode(value: Any, folder: Path, device: Any) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "population":
        return Population.load(folder / content, device)
    if kind == "tensor":
        return load_file(folder / f"{content}.safetensors")["value"]
    if kind == "dict":
        return {k: _decode(v, folder, device) for k, v in content}
    items = [_decode(v, folder, device) for v in content]
    return tuple(items) if kind == "tuple" else items


def fingerprint(request: Request, search: object, num_stages: int) -> str:
    """What must be equal for a checkpoint to be resumed."""
    return json.dumps([request.reward_prompts, request.seed, repr(search), num_stages])
