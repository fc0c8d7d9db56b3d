"""Data that ships with the package: the embedded world emoji-64."""

from importlib.resources import files
from pathlib import Path


def path(name: str) -> Path:
    """Folder or file of the shipped assets, for example ``path("emoji-64/pipeline")``.

    Raises:
        FileNotFoundError: nothing of that name was installed.
    """
    found = Path(str(files("visearch.assets") / name))
    if not found.exists():
        raise FileNotFoundError(f"asset {name!r} is not installed (looked for {found}); reinstall visearch")
    return found
