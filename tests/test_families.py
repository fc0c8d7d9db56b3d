"""Real classes of every family through stop, drop, copy, resume, preview and decode."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput
from probes import Probe, assert_same, attributes
from tiny import FAMILIES, PROMPT, build

from visearch.budget import Ledger
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.protocols import Population, Request

STEPS = 4
# kernels differ in the last bits between batch shapes
CLOSE = {"atol": 1e-4, "rtol": 0}

ROWS = {
    "controlnet-inpaint": "the noise that encodes the image is the first row's, for the whole batch",
    "sdxl-inpaint": "the noise that encodes the image is the first row's, for the whole batch",
}
STRATEGY = {name: "rows" if name in ROWS else "batch" for name in FAMILIES}

# by their scheduler: a row that is copied before this stage goes its own way
STOCHASTIC = {"hunyuan-dit": STEPS - 1, "ddpm": STEPS - 1, "kandinsky22": 1}
MULTISTEP = {"pixart", "wan", "skyreels", "stable-audio"}
BLENDED = {"controlnet-inpaint", "sdxl-inpaint"}  # what lies outside the mask is put back after each step

every_family = pytest.mark.parametrize("name", FAMILIES)


def sampler_for(pipe: Any, name: str, **call: Any) -> DiffusionSampler:
    family = FAMILIES[name]
    example = {"prompt": None, **family.prompt()}
    return DiffusionSampler(pipe, {"num_inference_steps": STEPS, **family.call, **call}, example=example)


@functools.cache
def shared(name: str) -> DiffusionSampler:
    """One sampler a family; that nothing is left behind on its pipeline has its own test."""
    return sampler_for(build(name), name)


def request(name: str, **options: Any) -> Request:
    arguments = dict(FAMILIES[name].prompt())
    prompt = arguments.pop("prompt", None)
    per_prompt = {k: (v,) for k, v in arguments.items()}
    return Request((prompt,), seed=7, reward_prompts=("two cows",), per_prompt=per_prompt, **options)


def start(sampler: DiffusionSampler, name: str, candidates: int) -> Population:
    own = request(name)
    return sampler.init(own, own.seeds(0, candidates))


def bare(pipe: Any, name: str, **call: Any) -> BaseOutput:
    generator = torch.Generator().manual_seed(7)
    arguments = {"num_inference_steps": STEPS, **FAMILIES[name].call, **FAMILIES[name].prompt(), **call}
    return pipe(generator=generator, **arguments)


def samples(population: Population) -> dict[str, torch.Tensor]:
    """What the schedulers' last steps gave; a video pipeline with sound has two."""
    return {k: v for k, v in population.state.tensors.items() if k.endswith(".prev_sample")}


def assert_rows(rows: Population, full: Population, index: list[int]) -> None:
    made, expected = samples(rows), samples(full.select(index))
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        # latents of untrained models grow to tens or hundreds
        torch.testing.assert_close(made[key] / value.std(), value / value.std(), **CLOSE)


@every_family
def test_strategy(name):
    sampler = shared(name)
    assert sampler.strategy == STRATEGY[name], sampler.replay.reason
    assert sampler.num_stages > 1


@every_family
def test_one_row_stopped_at_every_stage_is_the_bare_call(name):
    sampler = shared(name)
    rows = start(sampler, name, 1)
    for stage in range(1, sampler.num_stages + 1):
        rows = sampler.advance(rows, stage)
    own, expected = sampler.output(rows), bare(sampler.pipe, name)
    assert type(own) is type(expected)
    assert own.keys() == expected.keys()
    for key, value in expected.items():
        assert type(own[key]) is type(value), key
        if value is not None:
            assert np.array_equal(np.asarray(own[key]), np.asarray(value)), key
    assert np.asarray(next(iter(expected.values())), dtype=float).std() > 0.05


@every_family
def test_any_rows_go_on_from_any_stage_unchanged(name):
    sampler = shared(name)
    for count, index in ((3, [1]), (4, [3, 0]), (3, [2, 0, 0, 1])):
        stages = [start(sampler, name, count)]
        for stage in range(1, sampler.num_stages + 1):
            stages.append(sampler.advance(stages[-1].snapshot(), stage))
        full = stages[-1]
        for rows in stages[:-1]:
            live = sampler.advance(rows.select(index), sampler.num_stages)
            firsts = [i for i, row in enumerate(index) if row not in index[:i]]
            same = firsts if name in STOCHASTIC else range(len(index))
            assert_rows(live.select(same), full, [index[i] for i in same])
            if name in STOCHASTIC and rows.stage < STOCHASTIC[name]:
                for i in set(range(len(index))) - set(firsts):
                    pair = samples(live.select([index.index(index[i]), i]))["out.0.prev_sample"]
                    assert (pair[0] - pair[1]).abs().max() > 1e-3  # the copy draws from a stream of its own
            images, kept = sampler.decode(full), sampler.decode(live)
            expected = images[[index[i] for i in same]]
            # within [0, 1] the limit is absolute; Kandinsky's "pt" comes as the decoder gave it, here 36 wide
            unit = max(1.0, float(images.std()))
            torch.testing.assert_close(kept[list(same)] / unit, expected / unit, **CLOSE)


def levels(pipe: Any, stages: int) -> list[tuple[float, float]]:
    """(alpha, sigma) of the samples after each step, from what the bare call left on its scheduler."""
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        sigmas = scheduler.sigmas.double()[-stages:].tolist()
        return [(s, 1 - s) if config.invert_sigmas else (1 - s, s) for s in sigmas]
    if isinstance(scheduler, diffusers.EulerDiscreteScheduler):
        return [(1.0, s) for s in scheduler.sigmas.double()[-stages:].tolist()]
    assert isinstance(scheduler, (diffusers.DDIMScheduler, diffusers.CogVideoXDDIMScheduler))
    products = scheduler.alphas_cumprod.double()[scheduler.timesteps[1:]].tolist()
    products = [*products, float(scheduler.final_alpha_cumprod)][-stages:]
    return [(p**0.5, (1 - p) ** 0.5) for p in products]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in STOCHASTIC.keys() | MULTISTEP | BLENDED])
def test_previews_are_the_clean_estimates(name):
    """Two neighbouring samples of a first-order ODE determine x0 and eps: x_t = a_t x0 + s_t eps, x_s likewise."""
    sampler = shared(name)
    bare(sampler.pipe, name)
    known = levels(sampler.pipe, sampler.num_stages)
    before = sampler.advance(start(sampler, name, 2), 1)
    for stage in range(2, sampler.num_stages + 1):
        after = sampler.advance(before.snapshot(), stage)
        (a_t, s_t), (a_s, s_s) = known[stage - 2], known[stage - 1]
        preview = sampler.predict_x0(after)
        assert preview.stage == sampler.num_stages
        for key, x_t in samples(before).items():
            x_t, x_s = x_t.double(), samples(after)[key].double()
            x0 = (x_t * s_s - x_s * s_t) / (a_t * s_s - a_s * s_t)
            torch.testing.assert_close(samples(preview)[key].double(), x0, atol=2e-3, rtol=2e-3)
        before = after
    assert sampler.predict_x0(before) is before
    assert len(sampler.decode(preview)) == 2


@every_family
def test_nothing_is_left_behind(name):
    pipe = build(name)
    probe = Probe(pipe)
    bare(pipe, name)  # what one call of its own leaves there stays
    mine = torch.Generator().manual_seed(3)
    before, drawn, ambient = attributes(pipe), mine.get_state(), torch.get_rng_state()

    def check() -> None:
        assert_same(before, attributes(pipe))
        assert torch.equal(mine.get_state(), drawn)
        assert torch.equal(torch.get_rng_state(), ambient)

    sampler = sampler_for(pipe, name)
    check()
    own = request(name, generators=(mine,))
    rows = sampler.init(own, own.seeds(0, 2))
    check()
    first = sampler.milestones[0]
    rows = sampler.advance(rows, first)
    check()
    for error in (RuntimeError("planted"), KeyboardInterrupt()):
        probe.fail_at, probe.error = probe.calls + 1, error
        with pytest.raises(type(error)):
            sampler.advance(rows.snapshot(), sampler.num_stages)
        check()
    if first < sampler.num_stages:
        sampler.decode(sampler.predict_x0(rows))
        check()
    sampler.output(sampler.advance(rows, sampler.num_stages))
    check()


@every_family
def test_ledger_agrees_with_a_hook_inside_the_model(name):
    pipe = build(name)
    probe, ledger = Probe(pipe), Ledger()
    sampler = sampler_for(pipe, name)
    sampler.meter = ledger
    assert ledger.nfe == probe.rows  # of the self-check, mostly none
    before = ledger.nfe
    last = sampler.num_stages
    rows = sampler.advance(start(sampler, name, 3), 1)
    assert ledger.nfe - before == 3 * sampler.nfe(0, 1)
    live = sampler.advance(rows.snapshot().select([2, 0]), last)
    assert ledger.nfe - before == 3 * sampler.nfe(0, 1) + 2 * sampler.nfe(1, last)
    assert ledger.nfe == probe.rows
    probe.fail_at, probe.error = probe.calls + 1, torch.OutOfMemoryError("planted")
    with pytest.raises(torch.OutOfMemoryError):
        sampler.advance(rows, last)
    assert ledger.nfe == probe.rows
    sampler.decode(live)
    assert ledger.nfe == probe.rows
    assert ledger.decodes == 2


# --- schedulers of flow models ----------------------------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS: dict[str, tuple[str, type, Mapping[str, Any]]] = {
    "dynamic-terminal": (
        "flux", diffusers.FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True, "shift_terminal": 0.1}
    ),
    "linear-shift": (
        "qwen-image", diffusers.FlowMatchEulerDiscreteScheduler,
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    ),
    "karras": ("sd3", diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "use_karras_sigmas": True}),
    "stochastic": ("sana", diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}),
    "heun": ("sd3", diffusers.FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "lcm": ("sana", diffusers.FlowMatchLCMScheduler, {"shift": 3.0}),
    "unipc": ("sd3", diffusers.UniPCMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
    "unipc-dynamic": ("flux", diffusers.UniPCMultistepScheduler, {**FLOW, "use_dynamic_shifting": True}),
    "dpm++": ("sana", diffusers.DPMSolverMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
    "dpm++-dynamic": ("flux", diffusers.DPMSolverMultistepScheduler, {**FLOW, "use_dynamic_shifting": True}),
    "dpm++-3": ("wan", diffusers.DPMSolverMultistepScheduler, {**FLOW, "flow_shift": 3.0, "solver_order": 3}),
    "dpm++-sde": (
        "sana", diffusers.DPMSolverMultistepScheduler, {**FLOW, "flow_shift": 3.0, "algorithm_type": "sde-dpmsolver++"}
    ),
    "deis": ("sd3", diffusers.DEISMultistepScheduler, {**FLOW, "flow_shift": 3.0}),
    "sasolver": ("sana", diffusers.SASolverScheduler, {**FLOW, "flow_shift": 3.0}),
}  # fmt: skip


@pytest.mark.parametrize("label", SCHEDULERS)
def test_flow_schedulers(label):
    """One row bit for bit; [2, 0] of 3 from every stage as in the full batch."""
    name, kind, options = SCHEDULERS[label]
    pipe = build(name, kind(**options))
    steps = {"num_inference_steps": 5}
    sampler = sampler_for(pipe, name, **steps)
    assert (sampler.strategy, sampler.num_stages) == ("batch", 5)
    alone, expected = start(sampler, name, 1), bare(pipe, name, output_type="pt", **steps)
    for stage in range(1, 6):
        alone = sampler.advance(alone, stage)
    assert torch.equal(torch.as_tensor(sampler.decode(alone)), torch.as_tensor(next(iter(expected.values()))))
    stages = [start(sampler, name, 3)]
    for stage in range(1, 6):
        stages.append(sampler.advance(stages[-1].snapshot(), stage))
    for rows in stages[:-1]:
        assert_rows(sampler.advance(rows.select([2, 0]), 5), stages[-1], [2, 0])


def test_rows_survive_a_pipeline_that_writes_into_its_latents():
    pipe, family = build("kandinsky5"), FAMILIES["kandinsky5"]
    sampler = DiffusionSampler(pipe, family.call)
    request = Request((PROMPT,), seed=7)
    rows = sampler.init(request, request.seeds(0, 2))
    noise = rows.state.tensors["noise"].clone()
    first = sampler.advance(rows, 2).state.tensors["out.0.prev_sample"]
    assert torch.equal(rows.state.tensors["noise"], noise)
    assert torch.equal(sampler.advance(rows, 2).state.tensors["out.0.prev_sample"], first)
