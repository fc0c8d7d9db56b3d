"""Stochastic steps against targets whose every marginal is known."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from visearch.pipelines.flow import Level, transit
from visearch.protocols import EtaStep, FullRenoise, Ode, Sde, transition

SAMPLES = 20_000
ETAS = (0.0, 0.3, 0.7, 1.0)


@pytest.fixture(scope="module")
def measure():
    """The script that measured the documented table."""
    script = Path(__file__).parents[2] / "assets" / "build" / "measure_transitions.py"
    spec = importlib.util.spec_from_file_location("measure_transitions", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid(kind: str, steps: int) -> list[Level]:
    times = [1 - i / steps for i in range(steps + 1)]
    if kind == "flow":
        return [Level(1 - t, t) for t in times]
    return [Level(math.cos(t * 1.5), math.sin(t * 1.5)) for t in times]


@pytest.mark.parametrize("kind", ["flow", "vp"])
@pytest.mark.parametrize("step", [*map(EtaStep, ETAS), EtaStep(1.0, first=1.0), FullRenoise()], ids=str)
def test_for_a_single_point_every_stage_has_exactly_its_noise(kind, step):
    """With x0 known, x_s = alpha_s x0 + sigma_s e with e standard normal, at every stage and every eta."""
    generator, target, levels = torch.Generator().manual_seed(0), 0.7, grid(kind, 7)
    x = levels[0].alpha * target + levels[0].sigma * torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    clean = torch.full_like(x, target)
    for stage, (now, after) in enumerate(pairwise(levels)):
        z = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
        x = transit(step, x, clean, z, now, after, stage)
        if after.sigma > 0:
            e = (x - after.alpha * target) / after.sigma
            assert abs(float(e.mean())) < 4 / math.sqrt(SAMPLES)
            assert float(e.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / SAMPLES))
    torch.testing.assert_close(x, clean)


@pytest.mark.parametrize("eta", ETAS)
def test_the_error_on_a_mixture_shrinks_with_the_number_of_steps(measure, eta):
    distances = [measure.errors(measure.sample(f"eta:{eta}", n, SAMPLES))["distance"] for n in (4, 12, 40)]
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2]


@pytest.mark.parametrize(
    ("form", "ten", "twenty_eight"),
    [
        ("ode", (0.29, 0.31), (0.29, 0.31)),
        ("sde:0.7", (0.295, 0.32), (0.295, 0.31)),
        ("ddpm", (0.26, 0.29), (0.26, 0.29)),
        ("renoise", (0.22, 0.26), (0.18, 0.22)),
    ],
)
def test_which_steps_keep_the_spread_of_a_known_target(measure, form, ten, twenty_eight):
    """Spread 0.3: kept by the marginal-preserving step, some of it lost by the posterior, a third by full renoising."""
    for steps, (low, high) in ((10, ten), (28, twenty_eight)):
        assert low < measure.errors(measure.sample(form, steps, SAMPLES))["spread"] < high


def test_the_recorded_table_is_what_the_steps_give(measure):
    recorded = json.loads(measure.RECORD.read_text())["mixture"]
    assert set(recorded) == set(measure.FORMS)
    for form in measure.FORMS:
        now = measure.errors(measure.sample(form, 10, SAMPLES))
        assert now["spread"] == pytest.approx(recorded[form]["10"]["spread"], abs=0.006)


def test_the_first_eta_step_keeps_the_initial_noise():
    now, after = Level(0.0, 1.0), Level(0.2, 0.8)
    x, x0, z = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = transit(EtaStep(1.0), x, x0, z, now, after, 0)
    torch.testing.assert_close(kept, transit(Ode(), x, x0, z, now, after, 0))
    forgotten = transit(transition("ddpm"), x, x0, z, now, after, 0)
    torch.testing.assert_close(forgotten, transit(FullRenoise(), x, x0, z, now, after, 0))
    torch.testing.assert_close(forgotten, transit(transition("ddpm"), -x, x0, z, now, after, 0))  # whatever x was
    later = transit(EtaStep(1.0), x, x0, z, after, Level(0.5, 0.5), 1)
    torch.testing.assert_close(later, transit(transition("ddpm"), x, x0, z, after, Level(0.5, 0.5), 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ode", Ode()),
        ("sde", Sde(0.7)),
        ("sde:0.4", Sde(0.4)),
        ("eta", EtaStep(1.0)),
        ("eta:0.5", EtaStep(0.5)),
        ("ddpm", EtaStep(1.0, first=1.0)),
        ("renoise", FullRenoise()),
        (Sde(0.2), Sde(0.2)),
    ],
)
def test_transitions_by_name(name, expected):
    assert transition(name) == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("brownian", "use ode, sde"),
        ("ode:1", "unknown"),
        ("eta:x", "no number"),
        ("eta:1.5", "lie in"),
        ("sde:-1", "at least 0"),
    ],
)
def test_a_transition_that_does_not_exist_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        transition(name)
