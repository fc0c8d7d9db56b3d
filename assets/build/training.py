"""What the trainings here share: they run against the clock and are resumed from a checkpoint that is never torn."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["parse_deadline", "save_checkpoint"]


def parse_deadline(text: str) -> float:
    """Seconds since the epoch of the next HH:MM."""
    now = datetime.datetime.now()
    deadline = datetime.datetime.combine(now.date(), datetime.time.fromisoformat(text))
    return (deadline if deadline > now else deadline + datetime.timedelta(days=1)).timestamp()


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Replace a checkpoint in one step."""
    part = path.with_suffix(".tmp")
    torch.save(dict(state), part)
    part.replace(path)
