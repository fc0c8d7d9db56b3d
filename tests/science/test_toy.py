"""The toys against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import EtaStep, Request


def draw(sampler, n: int, stage: int | None = None):
    request = Request(("a photo of a cow",))
    rows = sampler.init(request, request.seeds(0, n))
    return sampler.advance(rows, sampler.num_stages if stage is None else stage)


def test_the_flow_ends_where_the_closed_form_says():
    sampler = GaussianToy(steps=7, scale=0.3)
    noise = torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    end = sampler.sample("x", torch.Generator().manual_seed(3))
    assert torch.allclose(end, sampler._target("x") + 0.3 * noise, atol=1e-12)


@pytest.mark.parametrize("stage", [2, 5, 8])
def test_every_stage_has_the_marginal_of_its_noise_level(stage):
    sampler = GaussianToy(steps=8, scale=0.5)
    x = draw(sampler, 400, stage).state.tensors["x"]
    t = sampler.time(stage)
    expected = math.sqrt((1 - t) ** 2 * 0.25 + t**2)
    deviation = x - (1 - t) * sampler._target("a photo of a cow")
    assert float(deviation.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(deviation.mean())) < 4 * expected / math.sqrt(x.numel())


def test_the_best_of_n_of_a_linear_reward_is_the_expected_maximum():
    """E max of 8 standard normals is 1.424."""
    sampler = GaussianToy(steps=3)
    ends = draw(sampler, 8 * 300).state.tensors["x"] - sampler._target("a photo of a cow")
    reward = ends.sum(1) / (0.5 * math.sqrt(48))
    assert float(reward.reshape(300, 8).max(1).values.mean()) == pytest.approx(1.424, abs=0.15)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_for_a_single_point_every_eta_keeps_the_noise_level(eta):
    sampler = GaussianToy(steps=6, scale=0.0).view(transition=EtaStep(eta))
    for stage in (2, 4):
        t = sampler.time(stage)
        noise = (draw(sampler, 300, stage).state.tensors["x"] - (1 - t) * sampler._target("a photo of a cow")) / t
        assert float(noise.std()) == pytest.approx(1, rel=0.03)


def test_eta_0_is_the_ode():
    a, b = draw(GaussianToy(), 3), draw(GaussianToy().view(transition=EtaStep(0.0)), 3)
    assert torch.equal(a.state.tensors["x"], b.state.tensors["x"])


def test_renoising_a_single_point_has_exactly_the_noise_of_the_stage():
    sampler = GaussianToy(steps=8, scale=0.0)
    rows = draw(sampler, 400, 6)
    back = sampler.renoise(rows, 2, range(400))
    t = sampler.time(2)
    noise = (back.state.tensors["x"] - (1 - t) * sampler._target("a photo of a cow")) / t
    assert float(noise.std()) == pytest.approx(1, rel=0.02)


def test_the_token_cache_is_a_function_of_the_prefix():
    sampler = TokenToy()
    rows = draw(sampler, 4, 8)
    assert torch.allclose(rows.state.tensors["cache"], sampler._rebuild(rows.state.tensors["tokens"]))


def test_token_perturbation_redraws_the_exact_share_and_renoise_masks_the_rest():
    sampler = TokenToy()
    rows = draw(sampler, 4, 8)
    moved = sampler.perturb(rows, 0.25, [1, 2, 3, 4])
    changed = (moved.state.tensors["tokens"] != rows.state.tensors["tokens"]).sum(1)
    assert int(changed.max()) <= 8 and int(changed.max()) > 0
    back = sampler.renoise(rows, 4, [1, 2, 3, 4])
    assert (back.state.tensors["tokens"] == sampler.mask).sum(1).tolist() == [32] * 4
    assert torch.equal(back.state.tensors["tokens"][:, :16], rows.state.tensors["tokens"][:, :16])


def test_views_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="transition= and cache="):
        GaussianToy().view(guidance=2.0)
    with pytest.raises(ValueError, match="no other view"):
        TokenToy().view(transition=EtaStep())
