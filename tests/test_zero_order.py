"""Zero-order search: neighbours of equal norm at a given cosine, centres that move or give way, nothing run twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from contract.cases import PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch import Budget, Ledger, Request, run_search
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import EtaStep, Scores
from visearch.run import regenerate
from visearch.search.zero_order import ZeroOrder, neighbour

CALL = {"num_inference_steps": 3, "height": 32, "width": 32}


def finish(search, sampler=None, reward=None, prompts=("a",), budget=None, **options):
    sampler = sampler or GaussianToy(steps=4)
    request = Request(tuple(prompts), seed=3)
    *_, last = run_search(sampler, reward or PixelReward(), search, request, budget, **options)
    assert last.result.error is None
    return last.result


class Ranked:
    """Scores the samples in the order in which they come by a list, so that a test decides who is better."""

    name, higher_is_better, range = "ranked", True, (-10.0, 10.0)
    licence, source, needs, relative = "Apache-2.0", "tests", frozenset({"pixels"}), True

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        return Scores(torch.tensor([self.scores.pop(0) for _ in prompts]))


def in_order(result):
    """Finished rows as they were run: (candidate, whether it is a neighbour)."""
    rows = result.finished
    return [(rows.candidate[r], rows.noise[r] is not None) for r in range(len(rows))]


# --- neighbours -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda s: torch.Size(s).numel() > 2),
    tau=st.sampled_from([0.0, 0.5, 0.95, 0.999]),
    seed=st.integers(0, 2**62),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_neighbour_has_the_cosine_and_the_norm(shape, tau, seed, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 12345), dtype=dtype)
    y = neighbour(x, tau, seed)
    a, b = x.double().flatten(), y.double().flatten()
    assert y.shape == x.shape and y.dtype == dtype
    assert float(b.norm() / a.norm()) == pytest.approx(1, abs=1e-6)
    assert float(a @ b / (a.norm() * b.norm())) == pytest.approx(tau, abs=1e-6)
    assert torch.equal(y, neighbour(x, tau, seed)) and not torch.equal(y, neighbour(x, tau, seed + 1))


def test_neighbours_spread_evenly_around_their_centre():
    x = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.stack([(neighbour(x, 0.6, s) - 0.6 * x) / (0.8 * x.norm()) for s in range(4000)])
    assert w.mean(0).norm() < 3 * 4000**-0.5
    u = x / x.norm()
    assert torch.allclose(w.T @ w / 4000, (torch.eye(30, dtype=torch.float64) - u[:, None] * u) / 29, atol=0.004)


# --- rounds ---------------------------------------------------------------------------------------------------


def test_centres_move_stay_and_give_way():
    #               0  and two of its own; none better: 1 and two, the last is better, two of that one, and so on
    reward = Ranked(5.0, 1.0, 2.0, 3.0, 2.0, 4.0, 3.5, 6.0, 1.0, 2.0, 0.0)
    result = finish(ZeroOrder(n=11, k=2), reward=reward)
    assert in_order(result) == [
        *[(0, False), (0, True), (0, True)],
        *[(1, False), (1, True), (1, True)],
        *[(1, True), (1, True)],
        *[(1, True), (1, True)],
        (2, False),
    ]
    rows = result.finished
    x = rows.noise
    moved_to = [float(torch.dot(x[a], x[b]) / (x[a].norm() * x[b].norm())) for a, b in ((5, 6), (5, 7), (7, 8), (7, 9))]
    assert moved_to == pytest.approx([0.95] * 4, abs=1e-6)
    assert result.winners().id[0] == rows.id[7]


def test_the_answer_is_at_least_as_good_as_every_centre_and_no_row_runs_twice():
    ledger = Ledger()
    result = finish(ZeroOrder(n=40, k=3), prompts=("a", "b"), ledger=ledger)
    for prompt, best in enumerate(result.winners().score.tolist()):
        mine = [c for c in result.ranking if c["prompt"] == prompt]
        assert best == max(c["score"] for c in mine) and len({c["id"] for c in mine}) == len(mine) == 40
    assert len({n.numpy().tobytes() for n in result.finished.noise if n is not None}) == sum(
        n is not None for n in result.finished.noise
    )
    assert ledger.decodes == ledger.rewards["pixel"] == 80


def test_it_climbs():
    once = finish(ZeroOrder(n=1)).winners().score[0]
    climbed = finish(ZeroOrder(n=61, k=4, tau=0.9)).winners()
    assert climbed.score[0] > once and climbed.noise[0] is not None


@pytest.mark.parametrize("search", [ZeroOrder(k=0), ZeroOrder(n=1)])
@pytest.mark.parametrize("make", [lambda: GaussianToy(steps=4), TokenToy])
def test_without_neighbours_it_is_the_unwrapped_run(search, make):
    sampler = make()
    result = finish(search, sampler)
    name = "x" if "x" in result.finished.state.tensors else "tokens"
    assert result.finished.id == ("0",) and search.plan(sampler).nfe == sampler.nfe(0, sampler.num_stages)
    own = sampler.sample("a", torch.Generator().manual_seed(3))
    assert torch.equal(result.finished.state.tensors[name][0], own)


def test_neighbours_keep_the_stream_of_their_centre():
    sampler = GaussianToy(steps=4, scale=0.5).view(transition=EtaStep(1.0))
    rows = finish(ZeroOrder(n=4, k=3), sampler).finished
    assert all(torch.equal(stream, rows.rng[0]) for stream in rows.rng) and len(set(rows.id)) == 4
    still = finish(ZeroOrder(n=4, k=3, tau=1 - 1e-12), sampler).finished.state.tensors["x"]
    assert torch.allclose(still, still[:1].expand_as(still), atol=1e-4)  # all that differs is the initial noise


def test_a_closed_prompt_gets_no_more():
    result = finish(ZeroOrder(n=9, k=2), prompts=("a", "b"), budget=Budget(target=-100.0))
    assert result.stopped == "closed" and len(result.finished) == 6


def test_a_tight_room_shrinks_the_round_and_the_neighbourhood_is_filled_up_later():
    sampler, search, request = GaussianToy(steps=4), ZeroOrder(n=9, k=3), Request(("a",), seed=3)
    score = lambda rows: rows.scored(torch.linspace(0, -1, len(rows)) - rows.stage)  # noqa: E731
    state = search.init(sampler, request)
    sizes = []
    for room in (1.0, 2.5, 9.0, None):
        before = 0 if state.finished is None else len(state.finished)
        state = search.step(replace(state, room=room), sampler, score)
        sizes.append(len(state.finished) - before)
    assert sizes == [1, 2, 1, 4] and state.finished.candidate == (0, 0, 0, 0, 1, 1, 1, 1)


# --- a real pipeline ------------------------------------------------------------------------------------------


def test_on_a_pipeline_neighbours_have_the_cosine_and_are_regenerated():
    sampler = DiffusionSampler(tiny.build("cogview4"), CALL)
    result = finish(ZeroOrder(n=4, k=3), sampler)
    request = Request(("a",), seed=3)
    own = sampler.noise(sampler.init(request, request.seeds(0, 1)))[0].flatten().double()
    rows = result.finished
    moved = [r for r in range(len(rows)) if rows.noise[r] is not None]
    assert len(moved) == 3
    for r in moved:
        x = rows.noise[r].flatten().double()
        assert float(x @ own / (x.norm() * own.norm())) == pytest.approx(0.95, abs=1e-6)
        assert float(x.norm() / own.norm()) == pytest.approx(1, abs=1e-6)
        assert regenerate(sampler, request, rows.select([r])).drift == 0


def test_a_generator_whose_noise_is_unknown_is_refused_before_anything_runs(monkeypatch):
    sampler, ledger = DiffusionSampler(tiny.build("cogview4"), CALL), Ledger()
    monkeypatch.setattr(DiffusionSampler, "strategy", "whole")
    with pytest.raises(ValueError, match="runs whole only"):
        finish(ZeroOrder(n=4), sampler, ledger=ledger)
    assert ledger.nfe == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number of at least 1"),
        ({"n": 2.5}, "n=2.5"),
        ({"k": -1}, "k=-1 must be a whole number of at least 0"),
        ({"tau": 1.0}, r"tau=1.0 must lie in \[0, 1\)"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ZeroOrder(**fields)
