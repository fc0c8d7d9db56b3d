"""A row runs again from its seed, its operations and the batches that carried it: on CPU in fp32 without any drift."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from contract.cases import PixelReward
from tiny import build

from visearch.budget import Ledger, MeteredSampler
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import Batch, Event, Population, Request
from visearch.run import regenerate, run_search
from visearch.search.best_of_n import BestOfN

IMAGE_CALL = {"num_inference_steps": 4, "height": 32, "width": 32}
VIDEO_CALL = {"num_inference_steps": 4, "height": 16, "width": 16, "num_frames": 5}
SAMPLERS = {
    "gaussian": GaussianToy,
    "tokens": TokenToy,
    "sd": lambda: DiffusionSampler(build("sd"), IMAGE_CALL),
    "cogview4": lambda: DiffusionSampler(build("cogview4"), IMAGE_CALL),
    "flux": lambda: DiffusionSampler(build("flux"), IMAGE_CALL),
    "wan": lambda: DiffusionSampler(build("wan"), VIDEO_CALL),
}


@cache
def make(name: str):
    return SAMPLERS[name]()


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return make(request.param)


def search(sampler, request, **options):
    *_, last = run_search(sampler, PixelReward(), BestOfN(n=4), request, **options)
    assert last.result.stopped == "done"
    return last.result


@pytest.mark.parametrize("options", [{}, {"rows": 3}, {"batch_buckets": (1, 2)}])
def test_best_of_n_runs_again_bit_for_bit(sampler, options):
    request = Request(("a cow", "a red car"), seed=3)
    result = search(sampler, request, **options)
    winners = result.winners(2)
    for i in range(len(winners)):
        kept = winners.select([i])
        again = regenerate(sampler, request, kept)
        assert again.drift == 0
        assert again.row.lineage == kept.lineage and torch.equal(again.row.rng[0], kept.rng[0])


def test_a_pruned_row_runs_again_bit_for_bit(sampler):
    request = Request(("a cow",), seed=3)
    metered = MeteredSampler(sampler, Ledger(), rows=3)
    first, last = sampler.milestones[0], sampler.num_stages
    rows = metered.advance(metered.init(request, request.seeds(0, 5)), first)
    left = metered.select(rows, [4, 0])
    assert regenerate(sampler, request, rows.select([2])).drift == 0
    done = metered.advance(left, last)
    for i, size in ((0, 2), (1, 3)):
        assert done.batches[i] == (Batch(0, first, size, 1 - i, ((0, size),)), Batch(first, last, 2, i, ((0, 2),)))
        again = regenerate(sampler, request, done.select([i]))
        assert again.drift == 0
        assert again.row.batches == ((),)  # the unmetered sampler records nothing


def test_forks_moves_and_restarts_run_again(sampler):
    request = Request(("a cow", "a cat"), seed=3)
    metered = MeteredSampler(sampler, Ledger())
    a, b = sampler.milestones[:2]
    rows = metered.advance(metered.init(request, request.seeds(0, 2)), b)
    rows = metered.renoise(metered.select(rows, [1, 1, 1, 2]), a, [11, 12, 13, 14])
    rows = metered.perturb(rows, 0.25, [21, 22, 23, 24])
    rows = metered.advance(metered.select(rows, [2, 2, 3, 0]), sampler.num_stages)
    assert [e.op for e in rows.lineage[1]] == ["init", "fork", "renoise", "perturb", "fork"]
    for i in range(4):
        again = regenerate(sampler, request, rows.select([i]))
        assert again.drift == 0 and again.row.lineage == rows.select([i]).lineage
        alone = regenerate(sampler, request, rows.select([i]), exact=False)
        largest = max(float(t.abs().max()) for t in alone.row.state.tensors.values() if t.is_floating_point())
        assert alone.drift <= 1e-4 * max(1.0, largest)  # latents of random weights reach far beyond 1


def test_what_it_takes_is_not_booked_with_the_search():
    request, sampler = Request(("a",), seed=3), GaussianToy()
    result = search(sampler, request, rows=3)
    spent = result.ledger.nfe
    kept = result.finished.select([1])
    assert regenerate(sampler, request, kept).ledger.nfe == 3 * sampler.nfe(0, 8)
    assert regenerate(sampler, request, kept, exact=False).ledger.nfe == sampler.nfe(0, 8)
    assert result.ledger.nfe == spent and sampler.meter is result.ledger


def test_drift_is_the_largest_difference():
    request = Request(("a",), seed=3)
    kept = search(GaussianToy(), request).winners()
    x = kept.state.tensors["x"].clone()
    x[0, 5] += 0.125
    assert regenerate(GaussianToy(), request, replace(kept, state=kept.state.update(x=x))).drift == pytest.approx(0.125)


def test_a_restart_in_the_middle_is_told_from_the_first_pass():
    """Stage 2 is passed twice; the operation belongs to the second pass."""
    request, sampler = Request(("a",), seed=3), MeteredSampler(GaussianToy(), Ledger())
    rows = sampler.advance(sampler.init(request, request.seeds(0, 2)), 2)
    rows = sampler.renoise(sampler.advance(rows, 6), 1, [5, 6])
    rows = sampler.advance(sampler.perturb(sampler.advance(rows, 2), 0.5, [7, 8]), 8)
    assert [(b.start, b.stop) for b in rows.batches[0]] == [(0, 2), (2, 6), (1, 2), (2, 8)]
    assert regenerate(GaussianToy(), request, rows.select([1])).drift == 0


def test_the_users_generator_may_have_moved_on():
    own = torch.Generator().manual_seed(5)
    request = Request(("a",), generators=(own,))
    kept = search(GaussianToy(), request).finished.select([0])
    torch.randn(3, generator=own)
    assert kept.candidate == (0,) and regenerate(GaussianToy(), request, kept).drift == 0


def test_winners_survive_saving(tmp_path):
    request = Request(("a cow",), seed=3)
    result = search(make("sd"), request, rows=3)
    result.save(tmp_path, k=2)
    assert {p.name for p in tmp_path.iterdir()} == {"winner.safetensors", "winner.json"}
    back = Population.load(tmp_path, name="winner")
    assert back.batches == result.winners(2).batches
    assert [b["rows"] for b in result.ranking[0]["batches"]] in ([3], [1])
    assert regenerate(SAMPLERS["sd"](), request, back.select([1])).drift == 0


def test_batches_follow_the_rows():
    request, sampler = Request(("a", "b"), seed=3), MeteredSampler(GaussianToy(), Ledger())
    rows = sampler.advance(sampler.init(request, request.seeds(0, 2)), 4)
    note = rows.batches[3]
    assert note == (Batch(0, 4, 4, 3, ((0, 2), (1, 2))),)
    joined = sampler.concat([sampler.select(rows, [3, 0]), rows])
    assert joined.batches[0] == joined.batches[5] == note and len(joined.batches) == 6


def test_what_cannot_run_again_is_refused_before_it_runs():
    request, sampler = Request(("a",), seed=3), GaussianToy()
    rows = sampler.advance(sampler.init(request, request.seeds(0, 2)), 8)
    sampler.meter = ledger = Ledger()
    with pytest.raises(ValueError, match="select one"):
        regenerate(sampler, request, rows)
    with pytest.raises(ValueError, match="exact=False"):
        regenerate(sampler, request, rows.select([1]))
    torn = replace(rows.select([1]), batches=((Batch(0, 4, 2, 1, ((0, 2),)),),))
    with pytest.raises(ValueError, match="on from stage 4"):
        regenerate(sampler, request, torn)
    assert ledger.nfe == 0
    assert regenerate(sampler, request, rows.select([1]), exact=False).drift == 0


def test_a_copy_is_the_copy_that_its_lineage_names():
    request, sampler = Request(("a",), seed=3), MeteredSampler(GaussianToy(), Ledger())
    rows = sampler.advance(sampler.init(request, request.seeds(0, 1)), 3)
    rows = sampler.advance(sampler.select(rows, [0, 0, 0]), 8)
    copy = rows.select([2])
    assert copy.lineage[0][-1] == Event("fork", 3, copy.seed[0], 2.0)
    assert regenerate(GaussianToy(), request, copy).row.lineage == copy.lineage
