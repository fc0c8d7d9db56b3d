"""Batches in the sizes that a compiled model has seen; what a run will hold in memory, known before it runs."""

from __future__ import annotations

import pytest
import torch
from contract.cases import PixelReward
from tiny import build

from visearch.budget import Ledger, MeteredSampler
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import Request
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN

IMAGE_CALL = {"num_inference_steps": 4, "height": 32, "width": 32}


def finish(sampler, search, request, budget=None, **options):
    *_, last = run_search(sampler, PixelReward(), search, request, budget, **options)
    assert last.result.error is None
    return last.result


# --- batch buckets ----------------------------------------------------------------------------------------------


def sizes_seen(model) -> list[int]:
    """Rows of everything that a layer is called with."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    ("rows", "buckets", "limit", "parts"),
    [
        (6, (1, 2, 4, 8), None, {4, 2}),
        (7, (4, 2, 1), None, {4, 2, 1}),
        (13, (1, 8), None, {8, 1}),
        (6, (1, 2, 4, 8), 3, {2}),
        (6, (1, 2, 4, 8), 1, {1}),
    ],
)
def test_the_denoiser_sees_bucket_sizes_only(rows, buckets, limit, parts):
    pipe = build("cogview4")  # one model call for each guidance branch, so a call's rows are the candidates
    sampler, request, search = DiffusionSampler(pipe, IMAGE_CALL), Request(("a cow",), seed=3), BestOfN(rows, rows)
    seen = sizes_seen(pipe.transformer.transformer_blocks[0])  # an inner layer: replay stubs the model itself
    whole = finish(sampler, search, request)
    assert set(seen) == {rows}
    seen.clear()
    split = finish(sampler, search, request, rows=limit, batch_buckets=buckets)
    assert set(seen) == parts
    assert sum(seen) == split.ledger.nfe == whole.ledger.nfe  # nothing is padded
    assert {c["batches"][0]["rows"] for c in split.ranking} == parts
    assert [c["id"] for c in split.ranking] == [c["id"] for c in whole.ranking]
    for key, sample in whole.samples.items():
        assert torch.allclose(split.samples[key], sample, rtol=0, atol=1e-4)


def test_rows_that_the_sampler_runs_apart_are_bucketed_apart():
    sampler = GaussianToy()
    sampler.batch_key = lambda prompt: prompt % 2
    metered = MeteredSampler(sampler, Ledger(), batch_buckets=(1, 2, 4))
    request = Request(("a", "b", "c"), seed=3)
    rows = metered.advance(metered.init(request, request.seeds(0, 3)), 8)
    assert [b[0].rows for b in rows.batches] == [2, 2, 1] * 3
    straight = sampler.advance(sampler.init(request, request.seeds(0, 3)), 8)
    assert torch.equal(rows.state.tensors["x"], straight.state.tensors["x"])


def test_out_of_memory_falls_to_the_next_bucket():
    sampler = GaussianToy()
    advance = sampler.advance

    def tight(rows, to):
        if len(rows) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(rows, to)

    sampler.advance = tight
    result = finish(sampler, BestOfN(n=8), Request(("a",)), batch_buckets=(1, 3, 8))
    assert result.ledger.retries == 1
    assert [c["batches"][0]["rows"] for c in sorted(result.ranking, key=lambda c: c["candidate"])] == [3] * 6 + [1] * 2


@pytest.mark.parametrize("buckets", [(), (2, 4), (0, 1), (1, -2)])
def test_buckets_that_cannot_sum_to_every_size_are_refused(buckets):
    with pytest.raises(ValueError, match="batch_buckets"):
        MeteredSampler(GaussianToy(), Ledger(), batch_buckets=buckets)
