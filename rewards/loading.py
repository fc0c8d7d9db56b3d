"""Weights from a hub or a folder, and the checks that they are whole."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["digest", "file_of", "load_strictly", "locate", "matches", "pretrained", "read_state"]

SHOWN = 4  # keys that an error names
# Position indices, which older checkpoints stored among the weights.
STORED_INDICES = ("position_ids", "relative_position_index")


def locate(
    model: str,
    files: Sequence[str],
    *,
    needed_by: str,
    revision: str | None = None,
    option: str = "model",
    published: str | None = None,
) -> Path:
    """Where the files of a model are: its folder, or the one file.

    Args:
        model: local folder, local file (where one is needed), or hub id, which is downloaded or found in the cache.
        files: globs that must each match, with alternatives in order of preference: ``"*.safetensors|*.bin"``.
        needed_by: name of the reward, for the error.
        revision: commit, branch or tag of the hub id.
        option: what the reward calls ``model``, for the error.
        published: where the files come from, for the error; default ``model``.

    Raises:
        FileNotFoundError: a file is missing, or the hub cannot be reached; the text says what to put where.
    """
    path = Path(model).expanduser()
    remedy = f"download {_named(files)} of {published or model} into a folder and give {option}=FOLDER"
    if path.is_file():
        if len(files) > 1:
            raise FileNotFoundError(f"{needed_by}: {option}={model!r} is one file and not enough; {remedy}")
        return path
    if not path.is_dir():
        try:
            path = _downloaded(model, files, revision)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{needed_by}: {option}={model!r} is no folder or file here, and the hub did not give it "
                f"({type(error).__name__}); {remedy}"
            ) from error
    missing = [glob for glob in files if not matches(path, glob)]
    if missing:
        raise FileNotFoundError(f"{needed_by}: {option}={model!r} has no {_named(missing)}; {remedy}")
    return path


def _downloaded(model: str, files: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    path = Path(snapshot_download(model, revision=revision, allow_patterns=[g.split("|")[0] for g in files]))
    others = [other for glob in files if not matches(path, glob) for other in glob.split("|")[1:]]
    if others:
        snapshot_download(model, revision=revision, allow_patterns=others)
    return path


def matches(folder: Path, glob: str) -> list[Path]:
    """Files of the first alternative that has any."""
    found = (sorted(folder.glob(alternative)) for alternative in glob.split("|"))
    return next((paths for paths in found if paths), [])


def file_of(path: Path, glob: str) -> Path:
    """The file that ``locate`` found for one of its globs; the first of several."""
    return path if path.is_file() else matches(path, glob)[0]


def _named(globs: Iterable[str]) -> str:
    return ", ".join(glob.replace("|", " or ") for glob in globs)


def digest(path: Path, files: Sequence[str]) -> str:
    """sha256 over the contents of a file, or of the files that ``locate`` looked for, in the order of their names."""
    paths = [path] if path.is_file() else sorted(p for glob in files for p in matches(path, glob))
    total = hashlib.sha256()
    for each in paths:
        with each.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def read_state(path: Path, trusted: bool = False) -> dict[str, Any]:
    """Tensors by name, from safetensors or from a PyTorch file that holds nothing but tensors and containers.

    Args:
        path: the file.
        trusted: a PyTorch file may hold other objects as well, and so run code.

    Raises:
        ValueError: another kind of file, or a pickle that would run code when loaded.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=not trusted)
    except (SafetensorError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, pickle.UnpicklingError) and not trusted:
            raise ValueError(
                f"{path} is refused: it is no plain weight file, and loading it could run code; download the published "
                "weights again, or save yours with safetensors"
            ) from error
        raise ValueError(f"{path} is no whole weight file ({error}); download it again") from error
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{path} holds an object that cannot be made here ({error}); install what it comes from, or give a file of "
            "its weights alone"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__} where weights have names; give a file of its state")
    return found


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load weights that fit exactly, by name and shape.

    Raises:
        ValueError: a name is missing or too many, or a shape differs; the first few are named.
    """
    own = module.state_dict()
    found = {k: v for k, v in state.items() if k in own or not k.endswith(STORED_INDICES)}
    check_keys(own.keys() - found.keys(), found.keys() - own.keys(), what)
    wrong = [f"{k} {tuple(v.shape)} for {tuple(own[k].shape)}" for k, v in found.items() if v.shape != own[k].shape]
    if wrong:
        raise ValueError(f"{what}: weights of another shape: {_few(wrong)}; give the checkpoint that was published")
    module.load_state_dict(found)


def check_keys(missing: Iterable[str], extra: Iterable[str], what: str) -> None:
    """Raise unless there are no missing and no extra names of weights.

    Raises:
        ValueError: there are; the first few are named.
    """
    faults = [f"{kind}: {_few(sorted(keys))}" for kind, keys in (("missing", missing), ("unknown", extra)) if keys]
    if faults:
        raise ValueError(f"{what}: the weights do not fit; {'; '.join(faults)}; give the checkpoint that was published")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def pretrained(kind: Any, path: Path, what: str, dtype: torch.dtype, **options: Any) -> Any:
    """A transformers model of class ``kind`` with weights that fit exactly.

    Raises:
        ValueError: a name is missing or too many, a shape differs, or the folder holds no such model.
    """
    try:
        model, report = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{what}: {path} cannot be loaded as {kind.__name__}: {error}") from error
    extra = [k for k in report["unexpected_keys"] if not k.endswith(STORED_INDICES)]
    check_keys(report["missing_keys"], extra, what)
    if report["mismatched_keys"]:
        raise ValueError(f"{what}: weights of another shape: {_few([str(m) for m in report['mismatched_keys']])}")
    return model
