"""The head that ImageReward and the aesthetic predictor share."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

__all__ = ["linear_head"]


def linear_head(width: int) -> nn.Sequential:
    """(n, width) -> (n, 1): five linear layers, nothing but dropout between them, as published; ten tensors."""
    sizes, dropouts = (width, 1024, 128, 64, 16, 1), (0.2, 0.2, 0.1)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        layers += [nn.Dropout(p) for p in dropouts[i : i + 1]]
    return nn.Sequential(*layers)
