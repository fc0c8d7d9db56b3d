"""Noise levels, x0 estimates, stochastic steps and re-noising, as pure functions of tensors.

A level is a pair (alpha, sigma): the sample is ``x = alpha x0 + sigma eps``. Flow: alpha = 1 - sigma. VP:
alpha^2 + sigma^2 = 1. k-diffusion (VE): alpha = 1. All formulas hold for every such pair, so one implementation
serves all schedulers. In each, t is the noisier level (now) and s the cleaner one (next).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visearch.protocols import EtaStep, Ode, Sde, Transition

__all__ = ["Level", "eta_step", "noise_levels", "perturb", "predict", "renoise", "sde_step", "transit"]


class Level(NamedTuple):
    """Signal and noise scale of a sample, both >= 0."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """``log(alpha^2 / sigma^2)``, nats; infinite at either end."""
        if self.sigma == 0:
            return math.inf
        return 2 * math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


def noise_levels(scheduler: Any) -> list[Level] | None:
    """Levels before each of the n calls of a diffusers scheduler's current schedule, and after the last: n + 1.

    ``None`` for schedulers whose samples are not ``alpha x0 + sigma eps`` in a way known here.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if torch.is_tensor(sigmas):
        values = sigmas.double().cpu()
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return [Level(float(a), float(s)) for a, s in map(scheduler._sigma_to_alpha_sigma_t, values)]
        if prediction_type(scheduler) == "flow":
            return [Level(1 - float(s), float(s)) for s in values]
        if prediction_type(scheduler) == "inverted flow":
            return [Level(float(s), 1 - float(s)) for s in values]
        return [Level(1.0, float(s)) for s in values]
    cumulative = getattr(scheduler, "alphas_cumprod", None)
    if not torch.is_tensor(cumulative):
        return None
    steps = scheduler.timesteps.long().cpu()
    last = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double().cpu().reshape(1)
    signal = torch.cat([cumulative.double().cpu()[steps], last])
    return [Level(math.sqrt(a), math.sqrt(1 - a)) for a in signal.tolist()]


def prediction_type(scheduler: Any) -> str:
    """What the model predicts: ``"epsilon"``, ``"v"``, ``"sample"``, ``"flow"``, or ``"inverted flow"`` (Mochi).

    Raises:
        ValueError: the scheduler's ``prediction_type`` is none of these.
    """
    config = scheduler.config
    if config.get("invert_sigmas", False):
        return "inverted flow"
    name = config.get("prediction_type")
    if name is None:
        flow = type(scheduler).__name__.startswith(("FlowMatch", "LTXEuler")) or config.get("use_flow_sigmas", False)
        return "flow" if flow else "epsilon"
    known = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
    if name not in known:
        raise ValueError(
            f"prediction_type {name!r} of {type(scheduler).__name__} is unknown; known: {', '.join(known)}"
        )
    return known[name]


def predict(kind: str, output: Tensor, x: Tensor, level: Level) -> Tensor:
    """x0 estimate from a model output; all shapes (B, ...), float.

    Flow v = eps - x0: ``x0 = x - sigma v``; inverted, v = x0 - eps: ``x0 = x + sigma v``. Epsilon:
    ``x0 = (x - sigma eps) / alpha``. VP v = alpha eps - sigma x0: ``x0 = alpha x - sigma v``, with VE samples scaled
    to VP first.

    Args:
        kind: one of the names that :func:`prediction_type` returns.
        output: the guided model output.
        x: the sample it was computed for.
        level: the level of ``x``.
    """
    if kind == "sample":
        return output
    if kind == "flow":
        return x - level.sigma * output
    if kind == "inverted flow":
        return x + level.sigma * output
    if kind == "epsilon":
        return (x - level.sigma * output) / level.alpha
    scale = math.hypot(level.alpha, level.sigma)
    return (level.alpha * x / scale - level.sigma * output) / scale


def noise_of(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """``eps`` in ``x = alpha x0 + sigma eps``; sigma > 0."""
    return (x - level.alpha * x0) / level.sigma


def fresh_share(t: Level, s: Level) -> float:
    """``sqrt(1 - r^2)``, ``r = alpha_t sigma_s / (alpha_s sigma_t)``: share of t's noise that is not in s."""
    r = t.alpha * s.sigma / (s.alpha * t.sigma)
    return math.sqrt(max(0.0, 1 - r * r))


def eta_step(x: Tensor, x0: Tensor, noise: Tensor, t: Level, s: Level, eta: float) -> Tensor:
    """DDIM step of 2010.02502 for any level pair.

    ``x_s = alpha_s x0 + sqrt(sigma_s^2 - k^2) eps + k z`` with ``k = eta sigma_s sqrt(1 - r^2)``. eta = 0 is the ODE
    step (DDIM, Euler flow); eta = 1 the DDPM posterior, also first-order SDE-DPM-Solver++.

    Args:
        x: (B, ...) sample at ``t``.
        x0: (B, ...) clean estimate made from ``x``.
        noise: (B, ...) standard normal z.
        t: level now, sigma > 0.
        s: next level.
        eta: in [0, 1].
    """
    k = eta * s.sigma * fresh_share(t, s)
    kept = math.sqrt(max(0.0, s.sigma**2 - k * k))
    return s.alpha * x0 + kept * noise_of(x, x0, t) + k * noise


def sde_step(x: Tensor, x0: Tensor, noise: Tensor, t: Level, s: Level, a: float) -> Tensor:
    """Marginal-preserving stochastic step of Flow-GRPO (2505.05470).

    In flow coordinates, where the time of a level is ``u = sigma / (alpha + sigma)``:
    ``x' = x + [v + g^2 / (2u) eps] (u' - u) + g sqrt(u - u') z`` with ``v = eps - x0``, ``g = a sqrt(u / (1 - u))``;
    at u = 1, g is taken at u'. A step that ends clean (u' = 0) takes no noise: it is the ODE step, ``x' = x0``.
    Samples of other schedules are scaled to flow coordinates and back, which keeps their marginals too.

    Args:
        x: (B, ...) sample at ``t``.
        x0: (B, ...) clean estimate made from ``x``.
        noise: (B, ...) standard normal z.
        t: level now, sigma > 0.
        s: next level.
        a: noise strength, >= 0; 0 is the ODE step.
    """
    now, after = t.sigma / (t.alpha + t.sigma), s.sigma / (s.alpha + s.sigma)
    eps = noise_of(x, x0, t)
    u = now if now < 1 else after
    g = a * math.sqrt(u / (1 - u)) if after > 0 else 0.0
    drift = eps - x0 + g * g / (2 * now) * eps
    moved = x / (t.alpha + t.sigma) + drift * (after - now) + g * math.sqrt(now - after) * noise
    return moved * (s.alpha + s.sigma)


def transit(kind: Transition, x: Tensor, x0: Tensor, noise: Tensor, t: Level, s: Level, stage: int) -> Tensor:
    """One step of the transition ``kind`` from level t to level s; arguments as in :func:`eta_step`.

    Args:
        stage: where the step begins; 0 is the first call.
    """
    if isinstance(kind, Sde):
        return sde_step(x, x0, noise, t, s, kind.a)
    if isinstance(kind, (Ode, EtaStep)):
        return eta_step(x, x0, noise, t, s, kind.at(stage) if isinstance(kind, EtaStep) else 0.0)
    return s.alpha * x0 + s.sigma * noise


def renoise(x: Tensor, noise: Tensor, s: Level, t: Level) -> Tensor:
    """Back from level s to a noisier level t: ``x_t = (alpha_t / alpha_s) x_s + sigma_t sqrt(1 - r^2) z``.

    Exact: if ``x`` has the marginal of s, the result has the marginal of t. x, noise: (B, ...); alpha_s > 0.
    """
    return t.alpha / s.alpha * x + t.sigma * fresh_share(t, s) * noise


def perturb(x: Tensor, x0: Tensor, noise: Tensor, level: Level, strength: float) -> Tensor:
    """Turn the noise in ``x`` towards a fresh draw: ``eps -> sqrt(1 - b^2) eps + b z``; x0 and the level stay.

    Args:
        x: (B, ...) sample at ``level``.
        x0: (B, ...) clean estimate; at pure noise (alpha = 0) it has no effect.
        noise: (B, ...) standard normal z.
        level: level of ``x``, sigma > 0.
        strength: b in [0, 1].
    """
    eps = noise_of(x, x0, level)
    return x + level.sigma * ((math.sqrt(1 - strength**2) - 1) * eps + strength * noise)
