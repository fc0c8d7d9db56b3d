"""What tests look at from outside: what a run left behind on a pipeline, and how many rows its models really saw."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior_prior")
# layers that see one entry a row along their first axis, best first
INNER = (
    "time_embedding", "proj_in", "t_embedder", "time_embeddings", "time_embed", "img_in", "x_embedder",
    "patch_embed", "pos_embed", "preprocess_conv", "proj_out",
)  # fmt: skip


class Probe:
    """Counts rows inside the denoisers, where stubs never come; can fail at the n-th call."""

    def __init__(self, pipe: Any) -> None:
        self.rows, self.calls, self.fail_at, self.error = 0, 0, None, None
        for denoiser in (m for k, m in pipe.components.items() if k in DENOISERS and m is not None):
            inner = next(n for n in INNER if getattr(denoiser, n, None) is not None)
            getattr(denoiser, inner).register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, FakeTensor):  # a call on shapes alone
            return
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        self.rows += (args[0] if args else next(iter(kwargs.values()))).shape[0]


def attributes(pipe: Any) -> dict[str, dict[str, Any]]:
    """Everything that a run could have left behind, by object; tensors and containers as copies."""
    objects = {"pipe": pipe, **pipe.components}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            objects |= {f"{name}.{k}": m for k, m in component.named_modules()}
    return {k: {a: copied(v) for a, v in vars(o).items()} for k, o in objects.items() if hasattr(o, "__dict__")}


def copied(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.clone()
    return type(value)(value) if type(value) in (list, dict, set) else value


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].keys() == after[name].keys(), name
        for key, old in before[name].items():
            new = after[name][key]
            same = torch.equal(old, new) if torch.is_tensor(old) else old is new or old == new
            assert same, (name, key)
