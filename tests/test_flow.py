"""Formulas of noise levels and stochastic steps, on Gaussians whose every marginal is known."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from visearch.pipelines import flow
from visearch.pipelines.flow import Level

MEAN, STD, SAMPLES = 0.8, 0.4, 100_000


def schedule(kind: str, steps: int) -> list[Level]:
    times = [1 - i / steps for i in range(steps + 1)]
    if kind == "flow":
        return [Level(1 - t, t) for t in times]
    if kind == "vp":
        return [Level(math.cos(t * 1.5), math.sin(t * 1.5)) for t in times]
    return [Level(1.0, 20 * t**3) for t in times]


def posterior_mean(x: torch.Tensor, level: Level) -> torch.Tensor:
    """``E[x0 | x]`` for x0 ~ N(MEAN, STD^2)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def sample(kind: str, step, steps: int) -> torch.Tensor:
    torch.manual_seed(0)
    levels = schedule(kind, steps)
    x = levels[0].alpha * (MEAN + STD * torch.randn(SAMPLES)) + levels[0].sigma * torch.randn(SAMPLES)
    for now, after in zip(levels, levels[1:]):
        x = step(x, posterior_mean(x, now), torch.randn(SAMPLES), now, after)
    return x


@pytest.mark.parametrize("kind", ["flow", "vp", "ve"])
@pytest.mark.parametrize(
    ("step", "steps", "slack"),
    [
        (lambda *a: flow.eta_step(*a, eta=0.0), 200, 0.02),
        (lambda *a: flow.eta_step(*a, eta=1.0), 400, 0.03),
        (lambda *a: flow.sde_step(*a, a=0.7), 100, 0.03),
    ],
    ids=["ode", "eta", "sde"],
)
def test_steps_reach_the_target(kind, step, steps, slack):
    x = sample(kind, step, steps)
    assert x.mean().item() == pytest.approx(MEAN, rel=slack)
    assert x.std().item() == pytest.approx(STD, rel=slack)


def test_sde_keeps_variance_where_the_posterior_loses_it():
    sde = sample("flow", lambda *a: flow.sde_step(*a, a=0.7), 28).std().item()
    eta = sample("flow", lambda *a: flow.eta_step(*a, eta=1.0), 28).std().item()
    assert abs(sde - STD) < abs(eta - STD)
    assert eta < 0.97 * STD


def test_sde_without_noise_is_the_ode_and_ends_clean():
    x, x0, z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).double()
    for now, after in [
        (Level(0.2, 0.8), Level(0.6, 0.4)),
        (Level(0.6, 0.8), Level(0.8, 0.6)),
        (Level(1, 9), Level(1, 2)),
    ]:
        torch.testing.assert_close(
            flow.sde_step(x, x0, z, now, after, a=0.0), flow.eta_step(x, x0, z, now, after, eta=0.0)
        )
    torch.testing.assert_close(flow.sde_step(x, x0, z, Level(0.9, 0.1), Level(1.0, 0.0), a=0.7), x0)


@pytest.mark.parametrize("inverted", [False, True])
def test_eta_step_is_the_flow_euler_step(inverted):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=inverted)
    scheduler.set_timesteps(7)
    levels = flow.noise_levels(scheduler)
    x, v = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        x0 = flow.predict("inverted flow" if inverted else "flow", v, x, levels[i])
        mine = flow.eta_step(x, x0, torch.zeros_like(x), levels[i], levels[i + 1], eta=0.0)
        x = scheduler.step(v, t, x).prev_sample
        torch.testing.assert_close(mine, x)
    torch.testing.assert_close(x, x0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_step_is_ddim(eta):
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(10)
    levels = flow.noise_levels(scheduler)
    x, output, z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for i, t in enumerate(scheduler.timesteps):
        real = scheduler.step(output, t, x, eta=eta, variance_noise=z if eta else None)
        x0 = flow.predict("epsilon", output, x, levels[i])
        torch.testing.assert_close(x0, real.pred_original_sample, rtol=1e-4, atol=1e-4)
        mine = flow.eta_step(x, x0, z, levels[i], levels[i + 1], eta=eta)
        torch.testing.assert_close(mine, real.prev_sample, rtol=1e-4, atol=1e-4)
        x = real.prev_sample


@pytest.mark.parametrize("kind", ["flow", "vp", "ve"])
def test_renoise_lands_exactly_on_the_level(kind):
    levels = schedule(kind, 12)
    for s, t in [(12, 3), (7, 2), (7, 6), (12, 0)]:
        clean, noisy = levels[s], levels[t]
        x0, eps, z = torch.eye(3).double()  # coefficients of the three independent parts
        x = flow.renoise(clean.alpha * x0 + clean.sigma * eps, z, clean, noisy)
        assert x[0].item() == pytest.approx(noisy.alpha, abs=1e-12)
        assert x[1:].norm().item() == pytest.approx(noisy.sigma, rel=1e-12)


def test_perturb_keeps_signal_and_level():
    level = Level(0.6, 0.4)
    x0, eps, z = torch.eye(3).double()
    x = level.alpha * x0 + level.sigma * eps
    for strength in (0.0, 0.3, 1.0):
        moved = flow.perturb(x, x0, z, level, strength)
        assert moved[0].item() == pytest.approx(level.alpha)
        assert moved[1:].norm().item() == pytest.approx(level.sigma)
        assert moved[2].item() == pytest.approx(level.sigma * strength)


@pytest.mark.parametrize(
    "scheduler",
    [
        *[DDIMScheduler(clip_sample=False, prediction_type=p) for p in ("epsilon", "v_prediction", "sample")],
        *[EulerDiscreteScheduler(prediction_type=p) for p in ("epsilon", "v_prediction")],
    ],
    ids=["ddim-eps", "ddim-v", "ddim-sample", "euler-eps", "euler-v"],
)
def test_predict_agrees_with_schedulers(scheduler):
    scheduler.set_timesteps(8)
    levels = flow.noise_levels(scheduler)
    x, output = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        real = scheduler.step(output, t, x).pred_original_sample
        mine = flow.predict(flow.prediction_type(scheduler), output, x, levels[i])
        torch.testing.assert_close(mine, real, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_predict_agrees_with_multistep_solvers(family, prediction):
    scheduler = family(prediction_type=prediction, use_flow_sigmas=prediction == "flow_prediction")
    scheduler.set_timesteps(8)
    levels = flow.noise_levels(scheduler)
    x, output = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        if scheduler.step_index is None:
            scheduler._init_step_index(t)
        real = scheduler.convert_model_output(output, sample=x)
        mine = flow.predict(flow.prediction_type(scheduler), output, x, levels[i])
        torch.testing.assert_close(mine, real, rtol=1e-4, atol=1e-4)
        scheduler.step(output, t, x)


def test_log_snr_is_infinite_at_the_ends():
    assert Level(1.0, 0.0).log_snr == math.inf
    assert Level(0.0, 1.0).log_snr == -math.inf
    assert Level(0.5, 0.5).log_snr == 0.0
