"""The mechanism: what is shadowed, that it is restored, what is counted, who hears of steps."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FirstBlockCacheConfig
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
from probes import Probe, assert_same, attributes
from tiny import PIPELINES, build

from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.replay import _passes
from visearch.protocols import Request

CALL = {"height": 32, "width": 32, "num_inference_steps": 4}
PROMPT = "a photo of two cows"
ALL = list(PIPELINES)


class Count:
    """A meter that adds up rows by kind."""

    def __init__(self) -> None:
        self.rows = {"denoiser": 0, "decode": 0, "encode": 0}
        self.images = 0.0

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        assert seconds >= 0
        self.rows[kind] += rows
        self.images += images

    def decode(self, rows: int, seconds: float) -> None:
        self.rows["decode"] += rows

    def encode(self, rows: int, seconds: float) -> None:
        self.rows["encode"] += rows


def request(*prompts: str, **options: Any) -> Request:
    return Request(prompts=prompts or (PROMPT,), seed=7, **options)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_behind(name):
    pipe = build(name)
    probe = Probe(pipe)
    pipe(PROMPT, generator=torch.Generator().manual_seed(0), **CALL)
    before, module = attributes(pipe), dict(vars(pipe_module(pipe)))
    sampler = DiffusionSampler(pipe, CALL)
    assert_same(before, attributes(pipe))
    rows = sampler.init(request(), request().seeds(0, 2))
    assert_same(before, attributes(pipe))
    rows = sampler.advance(rows, 2)
    assert_same(before, attributes(pipe))
    for error in (RuntimeError("planted"), KeyboardInterrupt()):
        probe.fail_at, probe.error = probe.calls + 2, error
        with pytest.raises(type(error)):
            sampler.advance(rows, 4)
        assert_same(before, attributes(pipe))
    sampler.decode(sampler.predict_x0(rows))
    assert_same(before, attributes(pipe))
    assert dict(vars(pipe_module(pipe))) == module


def pipe_module(pipe: Any) -> ModuleType:
    return sys.modules[type(pipe).__module__]


def test_earlier_instance_attributes_come_back():
    pipe = build("sd")
    seen = []
    own, step = pipe.unet.forward, pipe.scheduler.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0].shape[0])
        return own(*args, **kwargs)

    pipe.unet.forward, pipe.scheduler.step = patched, step
    sampler = DiffusionSampler(pipe, CALL)
    sampler.advance(sampler.advance(sampler.init(request(), request().seeds(0, 2)), 2), 4)
    assert seen == [4] * 4  # 2 rows with CFG; stubs do not reach it
    assert vars(pipe.unet)["forward"] is patched
    assert vars(pipe.scheduler)["step"] is step


def test_accelerate_hooks_stay_and_run():
    pipe = build("sd")
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **CALL).images
    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple:
            calls.append(1)
            return args, kwargs

    add_hook_to_module(pipe.unet, Hook())
    forward = vars(pipe.unet)["forward"]
    sampler = DiffusionSampler(pipe, CALL)
    rows = sampler.init(request(), request().seeds(0, 1))
    for stage in (1, 3, 4):
        rows = sampler.advance(rows, stage)
    assert torch.equal(sampler.decode(rows), plain)
    assert len(calls) == 4
    assert vars(pipe.unet)["forward"] is forward


@pytest.mark.parametrize("name", ALL)
def test_meter_agrees_with_a_hook_inside_the_model(name):
    pipe = build(name)
    probe, meter = Probe(pipe), Count()
    sampler = DiffusionSampler(pipe, CALL)
    assert probe.rows == 0  # the dry run computes nothing
    sampler.meter = meter
    rows = sampler.init(request(), request().seeds(0, 3))
    assert probe.rows == 0
    rows = sampler.advance(rows, 1)
    rows = sampler.advance(rows.select([2, 0]), 3)
    probe.fail_at, probe.error = probe.calls + 1, torch.OutOfMemoryError("planted")
    with pytest.raises(torch.OutOfMemoryError):
        sampler.advance(rows, 4)
    done = [sampler.advance(rows.select([i]), 4) for i in (0, 1)]
    sampler.decode(sampler.concat(done))
    assert meter.rows["denoiser"] == probe.rows
    assert probe.rows == 3 * sampler.nfe(0, 1) + 2 * sampler.nfe(1, 4)
    assert meter.images == pytest.approx(3 * sampler.cost(0, 1) + 2 * sampler.cost(1, 4))
    assert meter.rows["decode"] == 2


@pytest.mark.parametrize("name", ALL)
def test_out_of_memory_leaves_rows_intact(name):
    pipe = build(name)
    probe = Probe(pipe)
    sampler = DiffusionSampler(pipe, CALL)
    rows = sampler.advance(sampler.init(request(), request().seeds(0, 2)), 2)
    expected = sampler.advance(rows.snapshot(), 4).state.tensors["out.0.prev_sample"]
    probe.fail_at, probe.error = probe.calls + 2, torch.OutOfMemoryError("planted")
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        sampler.advance(rows, 4)
    assert torch.equal(sampler.advance(rows, 4).state.tensors["out.0.prev_sample"], expected)


@pytest.mark.parametrize("name", ALL)
def test_text_is_encoded_once_a_request(name):
    pipe = build(name)
    encoders = [m for k, m in pipe.components.items() if k.startswith("text_encoder") and m is not None]
    sampler = DiffusionSampler(pipe, CALL)
    calls = []
    for encoder in encoders:
        encoder.register_forward_hook(lambda module, args, output: calls.append(module))
    pipe(PROMPT, generator=torch.Generator().manual_seed(0), **CALL)
    plain = len(calls)
    sampler.meter = meter = Count()
    calls.clear()
    own = request()
    rows = sampler.init(own, own.seeds(0, 3))
    rows = sampler.advance(sampler.advance(rows, 1).select([0, 0, 2, 1]), 3)
    sampler.decode(sampler.advance(rows.select([1]), 4))
    sampler.advance(sampler.init(own, own.seeds(3, 5)), 1)
    assert len(calls) == plain
    assert meter.rows["encode"] == 1
    other = request("a red car")
    sampler.init(other, other.seeds(0, 1))
    assert len(calls) == 2 * plain


def test_callbacks_hear_every_step_once():
    pipe, heard = build("sd"), []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        heard.append((step, tuple(tensors["latents"].shape)))
        return tensors

    own = request(call={"callback_on_step_end": callback})
    sampler = DiffusionSampler(pipe, CALL)
    rows = sampler.init(own, own.seeds(0, 2))
    for stage in (1, 3, 4):
        rows = sampler.advance(rows, stage)
    sampler.decode(rows)
    assert heard == [(i, (2, 4, 16, 16)) for i in range(3)]
    sampler.output(rows.select([0]))  # the last step's call is due in the final decode
    assert heard[3:] == [(3, (1, 4, 16, 16))]


def test_callbacks_may_change_latents():
    pipe = build("sd")

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        return {"latents": tensors["latents"] * (0.9 if step == 1 else 1.0)}

    options = {**CALL, "callback_on_step_end": callback}
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **options).images
    sampler = DiffusionSampler(pipe, options)
    for stops in ((4,), (2, 4), (1, 2, 3, 4)):
        rows = sampler.init(request(), request().seeds(0, 1))
        for stage in stops:
            rows = sampler.advance(rows, stage)
        assert torch.equal(sampler.decode(rows), plain), stops


@pytest.mark.parametrize("stops", [(4,), (1, 4), (2, 3, 4)])
def test_callbacks_that_set_the_loop_up_hear_of_skipped_steps(stops):
    pipe = build("sd")
    options = {**CALL, "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)}
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **options).images
    sampler = DiffusionSampler(pipe, options)
    assert [sampler.nfe(i, i + 1) for i in range(4)] == [2, 2, 1, 1]
    rows = sampler.init(request(), request().seeds(0, 1))
    for stage in stops:
        rows = sampler.advance(rows, stage)
    assert torch.equal(sampler.decode(rows), plain)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(steps_offset=1), DPMSolverMultistepScheduler()])
def test_loops_that_set_their_timesteps_anew(scheduler):
    """As chunks of a video do: the second loop's first step has no history, and its rows are resumed in either."""

    class Chunks(PipelineCallback):
        tensor_inputs = ()

        def callback_fn(self, pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            if step == 1:
                pipe.scheduler.set_timesteps(4)
                pipe.scheduler.set_begin_index(2) if hasattr(pipe.scheduler, "set_begin_index") else None
            return tensors

    pipe = build("sd", scheduler)
    options = {**CALL, "callback_on_step_end": Chunks(cutoff_step_ratio=1.0)}
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **options).images
    sampler = DiffusionSampler(pipe, options)
    assert sampler.strategy == "batch"
    assert len(set(sampler.schedule.slots)) == 2
    full = sampler.advance(sampler.init(request(), request().seeds(0, 3)), 4)
    for stage in (1, 2, 3):
        rows = sampler.advance(sampler.init(request(), request().seeds(0, 3)), stage).select([2, 0])
        images = sampler.decode(sampler.advance(rows, 4))
        torch.testing.assert_close(images, sampler.decode(full)[[2, 0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(images[1:], plain, atol=1e-4, rtol=0)


def test_passes_of_several_schedulers():
    assert _passes([0, 0, 0]) == [1, 2, 3]
    assert _passes([0, 1, 0, 1]) == [2, 4]
    assert _passes([0, 0, 1, 1, 1]) == [1, 2, 3, 4, 5]


def test_copied_schedulers_are_watched_and_let_go():
    pipe, copies = build("sd"), []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        made = copy.deepcopy(pipe.scheduler)
        assert vars(made)["step"].owner is made
        copies.append(made)
        return {}

    sampler = DiffusionSampler(pipe, {**CALL, "callback_on_step_end": callback})
    sampler.advance(sampler.init(request(), request().seeds(0, 1)), 4)
    x, output = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(4)
    t = pipe.scheduler.timesteps[1]
    expected = pipe.scheduler.step(output, t, x).prev_sample
    assert torch.equal(copies[0].step(output, t, x).prev_sample, expected)


def test_noise_is_replaced_without_touching_the_module():
    draw = pipeline_stable_diffusion.randn_tensor
    pipe = build("sd")
    sampler = DiffusionSampler(pipe, CALL)
    rows = sampler.init(request(), request().seeds(0, 2))
    assert pipeline_stable_diffusion.randn_tensor is draw
    swapped = rows.state.tensors["noise"].flip(0)
    tensors = {**rows.state.tensors, "noise": swapped}
    moved = replace(rows, state=replace(rows.state, tensors=tensors))
    a, b = sampler.decode(sampler.advance(rows, 4)), sampler.decode(sampler.advance(moved, 4))
    torch.testing.assert_close(a.flip(0), b, atol=1e-5, rtol=0)


def test_step_caches_are_reset_after_an_abort():
    pipe = build("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    plain, again = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **CALL).images for _ in range(2)
    )
    assert torch.equal(plain, again)
    with pytest.warns(UserWarning, match="step cache"):
        sampler = DiffusionSampler(pipe, CALL)
    sampler.advance(sampler.init(request(), request().seeds(0, 3)), 2)
    again = pipe(PROMPT, generator=torch.Generator().manual_seed(7), output_type="pt", **CALL).images
    assert torch.equal(again, plain)


def test_the_global_stream_is_left_alone():
    pipe = build("sd")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    sampler = DiffusionSampler(pipe, CALL)
    sampler.decode(sampler.advance(sampler.init(request(), request().seeds(0, 2)), 4))
    assert torch.equal(torch.get_rng_state(), state)


def test_pipelines_without_a_loop_are_refused():
    pipe = build("sd")
    pipe.register_modules(scheduler=None)
    with pytest.raises(ValueError, match="no scheduler"):
        DiffusionSampler(pipe, CALL)


@pytest.mark.parametrize("name", ["prompt", "generator", "latents", "num_images_per_prompt"])
def test_reserved_arguments_are_refused(name):
    with pytest.raises(ValueError, match=name):
        DiffusionSampler(build("sd"), {**CALL, name: 1})
