"""Stock pipelines through stop, drop, copy, resume and decode equal the plain call."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny import FAMILIES, OTHERS, PIPELINES, build, hunyuan_embeds

from visearch.budget import Ledger
from visearch.pipelines import flow
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.protocols import EtaStep, Population, Request, Sampler, Sde, transition

CALL = {"height": 32, "width": 32, "num_inference_steps": 6}
PROMPT, OTHER = "a photo of two cows", "a red car"
ALL = list(PIPELINES)
# kernels differ in the last bits between batch shapes
CLOSE = {"atol": 1e-4, "rtol": 0}


def request(*texts: str, **options: Any) -> Request:
    return Request(**{"prompts": texts or (PROMPT,), "seed": 7, **options})


def start(sampler: DiffusionSampler, candidates: int, *prompts: str, **options: Any) -> Population:
    own = request(*prompts, **options)
    return sampler.init(own, own.seeds(0, candidates))


def plain(pipe: Any, prompt: str = PROMPT, seed: int = 7, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **{**CALL, **options}).images


def finish(sampler: DiffusionSampler, rows: Population, *stages: int) -> torch.Tensor:
    for stage in (*stages, sampler.num_stages):
        rows = sampler.advance(rows, stage)
    return sampler.decode(rows)


# --- equality with the plain call -------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(), (1, 2, 5)], ids=["through", "stopping"])
@pytest.mark.parametrize("name", ALL)
def test_one_candidate_is_the_plain_call(name, stops):
    pipe = build(name)
    expected = plain(pipe)
    sampler = DiffusionSampler(pipe, CALL)
    assert isinstance(sampler, Sampler)
    assert torch.equal(finish(sampler, start(sampler, 1), *stops), expected)
    assert expected.std() > 0.05


@pytest.mark.parametrize("name", ALL)
def test_every_candidate_is_the_plain_call_with_its_seed(name):
    pipe = build(name)
    sampler = DiffusionSampler(pipe, CALL)
    own = request(PROMPT, OTHER)
    images = finish(sampler, sampler.init(own, own.seeds(0, 2)), 3)
    expected = [plain(pipe, own.prompts[s.prompt], s.value) for s in own.seeds(0, 2)]
    torch.testing.assert_close(images, torch.cat(expected), **CLOSE)


@pytest.mark.parametrize("stage", [1, 3, 5])
@pytest.mark.parametrize(("rows", "index"), [(3, [1]), (4, [3, 0]), (3, [2, 0, 0, 1])])
@pytest.mark.parametrize("name", ALL)
def test_dropped_copied_and_permuted_rows_go_on_unchanged(name, rows, index, stage):
    sampler = DiffusionSampler(build(name), CALL)
    full = finish(sampler, start(sampler, rows))
    live = sampler.advance(start(sampler, rows), stage).select(index)
    torch.testing.assert_close(finish(sampler, live), full[index], **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_saved_rows_resume_in_another_sampler(name, tmp_path):
    sampler = DiffusionSampler(build(name), CALL)
    expected = finish(sampler, start(sampler, 2))
    for stage in (0, 3, 6):
        rows = start(sampler, 2)
        (sampler.advance(rows, stage) if stage else rows).save(tmp_path)
        fresh = DiffusionSampler(build(name), CALL)
        with pytest.raises(ValueError, match="no request"):
            fresh.advance(Population.load(tmp_path), 6) if stage < 6 else fresh.decode(Population.load(tmp_path))
        fresh.request = request()
        assert torch.equal(finish(fresh, Population.load(tmp_path)), expected)


IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
OTHER_CALLS = {
    "wan": {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 5},
    "pixart": {**CALL, "use_resolution_binning": False, "clean_caption": False},
    "z-image": {"height": 32, "width": 32, "num_inference_steps": 4, "max_sequence_length": 32},
    "hunyuan-image": {"height": 16, "width": 16, "num_inference_steps": 5},
    "img2img": {"image": IMAGE, "strength": 0.7, "num_inference_steps": 6},
    "controlnet": {"image": IMAGE, "num_inference_steps": 4},
    "controlnet-inpaint": {
        "image": IMAGE, "mask_image": (IMAGE[:, :1] > 0.5).float(), "control_image": IMAGE, "num_inference_steps": 4
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_loops(name):
    pipe, call = build(name), OTHER_CALLS[name]
    prompt = hunyuan_embeds() if name == "hunyuan-image" else {"prompt": PROMPT}
    own = request(**prompt_of(prompt))
    sampler = DiffusionSampler(pipe, call, example={"prompt": None, **prompt})
    assert sampler.replay.together == (name != "controlnet-inpaint")

    rows = sampler.init(own, own.seeds(0, 1))
    for stage in range(1, sampler.num_stages + 1):
        rows = sampler.advance(rows, stage)
    expected = pipe(**prompt, generator=torch.Generator().manual_seed(7), **call)
    field = "frames" if name == "wan" else "images"
    assert np.array_equal(np.asarray(getattr(sampler.output(rows), field)), np.asarray(getattr(expected, field)))

    full = finish(sampler, sampler.init(own, own.seeds(0, 3)))
    assert full.shape[:2] == ((3, 5) if name == "wan" else (3, 3))
    live = sampler.advance(sampler.init(own, own.seeds(0, 3)), 2).select([2, 0])
    torch.testing.assert_close(finish(sampler, live, 3), full[[2, 0]], **CLOSE)
    alone = [finish(sampler, sampler.init(own, [seed])) for seed in own.seeds(0, 3)]
    torch.testing.assert_close(torch.cat(alone), full, **CLOSE)


def prompt_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields of a request for the arguments of one prompt."""
    if "prompt" in arguments:
        return {}
    return {"prompts": (None,), "reward_prompts": (PROMPT,), "per_prompt": {k: (v,) for k, v in arguments.items()}}


SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(steps_offset=1, clip_sample=False),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "dpm++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++-3": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3),
    "dpm++-sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm-single": lambda: diffusers.DPMSolverSinglestepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(steps_offset=1),
    "euler-a": lambda: diffusers.EulerAncestralDiscreteScheduler(steps_offset=1),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "ipndm": lambda: diffusers.IPNDMScheduler(),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "kdpm2-a": lambda: diffusers.KDPM2AncestralDiscreteScheduler(),
    "lcm": lambda: diffusers.LCMScheduler(original_inference_steps=50),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "sasolver": lambda: diffusers.SASolverScheduler(),
    "tcd": lambda: diffusers.TCDScheduler(original_inference_steps=50),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_zoo(name):
    """One row bit for bit; [0, 2] of 3, resumed at a step where history matters, as the full batch."""
    pipe = build("sd", SCHEDULERS[name]())
    sampler = DiffusionSampler(pipe, CALL)
    assert torch.equal(finish(sampler, start(sampler, 1), 1, 4), plain(pipe))
    full = finish(sampler, start(sampler, 3))
    for stage in (1, 3):
        live = sampler.advance(start(sampler, 3), stage).select([0, 2])
        torch.testing.assert_close(finish(sampler, live), full[[0, 2]], **CLOSE)


def test_order_two_steps_are_one_stage_and_two_forwards():
    sampler = DiffusionSampler(build("sd", SCHEDULERS["heun"]()), CALL)
    assert sampler.num_stages == 6
    assert [sampler.nfe(i, i + 1) for i in range(6)] == [4, 4, 4, 4, 4, 2]
    levels = [sampler.noise_level(i) for i in range(7)]
    assert levels == sorted(levels)
    assert len(set(levels)) == 7


def test_stochastic_flow_scheduler_draws_from_each_rows_own_stream():
    pipe = build("flux", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True))
    sampler = DiffusionSampler(pipe, CALL)
    full = finish(sampler, start(sampler, 3))
    assert torch.equal(finish(sampler, start(sampler, 3)), full)
    live = sampler.advance(start(sampler, 3), 3).select([2, 1])
    torch.testing.assert_close(finish(sampler, live), full[[2, 1]], **CLOSE)


# --- prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_prompts_share_batches_and_change_nothing(name):
    pipe = build(name)
    sampler = DiffusionSampler(pipe, CALL)
    rows = start(sampler, 2, PROMPT, OTHER)
    batches = []
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    forward = denoiser.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        batches.append(1)
        return forward(*args, **kwargs)

    denoiser.forward = counted
    images = finish(sampler, rows.select([2, 0, 3, 1]))
    assert len(batches) == 6 * (2 if name == "cogview4" else 1)
    for prompt, index in ((0, [1, 3]), (1, [0, 2])):
        own = request(PROMPT, OTHER)
        alone = finish(sampler, sampler.init(own, own.seeds(0, 2, [prompt])))
        torch.testing.assert_close(images[index], alone, **CLOSE)


def test_prompts_of_other_encoded_lengths_run_apart():
    pipe = build("cogview4")
    sampler = DiffusionSampler(pipe, CALL)
    long = " ".join(["a photo of two cows and"] * 4)  # beyond 16 tokens, the pipeline's padding unit
    rows = start(sampler, 2, PROMPT, long)
    images = finish(sampler, rows.select([2, 0, 3, 1]), 2)
    expected = torch.cat([plain(pipe, p, 7) for p in (long, PROMPT)])
    torch.testing.assert_close(images[:2], expected, **CLOSE)


@pytest.mark.parametrize("name", ["sd", "sdxl", "cogview4"])
def test_negative_prompts_belong_to_their_prompt(name):
    pipe = build(name)
    sampler = DiffusionSampler(pipe, CALL)
    images = finish(sampler, start(sampler, 1, PROMPT, OTHER, per_prompt={"negative_prompt": ("blue", "three cat")}), 3)
    expected = [plain(pipe, PROMPT, negative_prompt="blue"), plain(pipe, OTHER, negative_prompt="three cat")]
    torch.testing.assert_close(images, torch.cat(expected), **CLOSE)


def test_embeddings_instead_of_prompts():
    pipe = build("sd")
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    generator = torch.Generator().manual_seed(7)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    expected = pipe(generator=generator, output_type="pt", **embeds, **CALL).images
    pipe.text_encoder = None
    sampler = DiffusionSampler(pipe, CALL, example={"prompt": None, **embeds})
    own = Request((None,), seed=7, reward_prompts=(PROMPT,), per_prompt={k: (v,) for k, v in embeds.items()})
    assert torch.equal(finish(sampler, sampler.init(own, own.seeds(0, 1)), 2), expected)


def test_the_users_generator_is_continued_and_not_moved():
    pipe = build("sd", SCHEDULERS["euler-a"]())
    generator = torch.Generator().manual_seed(11)
    torch.randn(5, generator=generator)
    state = generator.get_state()
    own = request(generators=(generator,))
    sampler = DiffusionSampler(pipe, CALL)
    images = finish(sampler, sampler.init(own, own.seeds(0, 1)), 2)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(images, pipe(PROMPT, generator=generator, output_type="pt", **CALL).images)


# --- costs and levels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("sd", {}, 2),
        ("sd", {"guidance_scale": 1.0}, 1),
        ("sdxl", {}, 2),
        ("sd3", {}, 2),
        ("flux", {}, 1),
        ("flux", {"true_cfg_scale": 2.0, "negative_prompt": "blue"}, 2),
        ("cogview4", {}, 2),
        ("cogview4", {"guidance_scale": 1.0}, 1),
    ],
)
def test_cost_is_known_before_running(name, options, rows):
    sampler = DiffusionSampler(build(name), {**CALL, **options})
    assert [sampler.nfe(i, i + 1) for i in range(6)] == [rows] * 6
    assert sampler.cost(0, 6) == 1
    assert sampler.cost(2, 4) == pytest.approx(1 / 3)
    assert sampler.milestones == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("name", ALL)
def test_noise_falls_from_stage_to_stage(name):
    sampler = DiffusionSampler(build(name), CALL)
    levels = [sampler.noise_level(i) for i in range(7)]
    assert levels == sorted(levels)
    assert levels[-1] == float("inf")


@pytest.mark.parametrize("name", ALL)
def test_previews_are_the_clean_estimates(name):
    """Two neighbouring samples of a first-order ODE determine x0 and eps: x_t = a_t x0 + s_t eps, x_s likewise."""
    sampler = DiffusionSampler(build(name), CALL)
    stages = [sampler.advance(start(sampler, 2), i) for i in range(1, 7)]
    for before, after in zip(stages, stages[1:]):
        t, s = (sampler._level(p.stage) for p in (before, after))
        x_t, x_s = (p.state.tensors["out.0.prev_sample"].double() for p in (before, after))
        expected = (x_t * s.sigma - x_s * t.sigma) / (t.alpha * s.sigma - s.alpha * t.sigma)
        preview = sampler.predict_x0(after)
        assert preview.stage == 6
        x0 = preview.state.tensors["out.0.prev_sample"].double()
        torch.testing.assert_close(x0, expected, atol=2e-3, rtol=2e-3)
    assert sampler.predict_x0(stages[-1]) is stages[-1]


def test_previews_are_decoded_by_the_pipelines_own_vae():
    pipe = build("sd")
    sampler = DiffusionSampler(pipe, CALL)
    rows = sampler.predict_x0(sampler.advance(start(sampler, 3), 2))
    with torch.no_grad():
        image = pipe.vae.decode(rows.state.tensors["out.0.prev_sample"] / pipe.vae.config.scaling_factor).sample
    assert torch.equal(sampler.decode(rows), (image / 2 + 0.5).clamp(0, 1))


def test_previews_and_finished_rows_share_a_population():
    sampler = DiffusionSampler(build("sd", SCHEDULERS["dpm++"]()), CALL)
    rows = sampler.advance(start(sampler, 2), 3)
    joined = sampler.concat([sampler.predict_x0(rows), sampler.advance(rows, 6)])
    assert sampler.decode(joined).shape == (4, 3, 32, 32)


# --- stochastic steps, re-noising, moves ------------------------------------------------------------------------


def test_full_eta_is_the_schedulers_own_ddim_noise():
    pipe = build("sd")
    expected = plain(pipe, eta=1.0)
    sampler = DiffusionSampler(pipe, CALL).view(transition("ddpm"))
    torch.testing.assert_close(finish(sampler, start(sampler, 1), 1, 4), expected, **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_zero_noise_transitions_are_the_ode(name):
    sampler = DiffusionSampler(build(name), CALL)
    expected = finish(sampler, start(sampler, 2))
    for step in (EtaStep(0.0), Sde(0.0)):
        view = sampler.view(step)
        torch.testing.assert_close(finish(view, start(view, 2), 2), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["sde", "eta", "ddpm", "renoise"])
@pytest.mark.parametrize("name", ALL)
def test_stochastic_rows_are_their_own(name, kind):
    sampler = DiffusionSampler(build(name), CALL)
    view = sampler.view(transition(kind))
    ode, full = finish(sampler, start(sampler, 3)), finish(view, start(view, 3))
    assert (full - ode).abs().amax((1, 2, 3)).min() > 1e-3
    live = view.advance(start(view, 3), 2).select([2, 0])
    torch.testing.assert_close(finish(view, live, 4), full[[2, 0]], **CLOSE)
    twins = finish(view, view.advance(start(view, 1), 2).select([0, 0]))
    torch.testing.assert_close(twins[0], full[0], **CLOSE)
    assert (twins[0] - twins[1]).abs().max() > 1e-3  # the copy has a stream of its own


def test_copies_at_stage_zero_share_noise_but_not_the_stream():
    view = DiffusionSampler(build("sd"), CALL).view(EtaStep(1.0))
    rows = start(view, 1).select([0, 0])
    assert torch.equal(*rows.state.tensors["noise"])
    images = finish(view, rows)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++", "unipc", "heun"])
def test_moved_rows_resume_at_their_stage(scheduler):
    """Re-noised rows whose sample is set to that of a plain run go on as the plain run without history would."""
    sampler = DiffusionSampler(build("sd", SCHEDULERS[scheduler]()), CALL)
    done, there = (sampler.advance(start(sampler, 2), stage) for stage in (6, 2))
    moved = sampler.renoise(done, 2, [1, 2])
    assert moved.stage == 2
    assert [events[-1][:2] for events in moved.lineage] == [("renoise", 6)] * 2
    x = there.state.tensors["out.0.prev_sample"]
    same = replace(moved, state=replace(moved.state, tensors={**moved.state.tensors, "out.0.prev_sample": x}))
    a, b = finish(sampler, same, 4), finish(sampler, there)
    if scheduler in ("dpm++", "unipc"):  # second order needs a step to warm up again
        assert 0 < (a - b).abs().max() < 0.5
    else:
        torch.testing.assert_close(a, b, **CLOSE)
    assert sampler.nfe(2, 6) == (14 if scheduler == "heun" else 8)


@pytest.mark.parametrize("name", ALL)
def test_renoising_follows_the_formula(name):
    sampler = DiffusionSampler(build(name), CALL)
    rows = sampler.advance(start(sampler, 2), 4)
    moved = sampler.renoise(rows, 1, [5, 6])
    x = rows.state.tensors["out.0.prev_sample"]
    z = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    expected = flow.renoise(x, z, sampler._level(4), sampler._level(1))
    assert torch.equal(moved.state.tensors["out.0.prev_sample"], expected)
    assert torch.isfinite(finish(sampler, moved)).all()
    alone = sampler.renoise(rows.select([1]), 1, [6])
    torch.testing.assert_close(finish(sampler, alone), finish(sampler, moved)[1:], **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_renoising_to_the_start(name):
    sampler = DiffusionSampler(build(name), CALL)
    rows = sampler.advance(start(sampler, 2), 3)
    moved = sampler.renoise(rows, 0, [5, 6])
    assert moved.stage == 0
    noise = moved.state.tensors["noise"]
    assert noise.shape == start(sampler, 2).state.tensors["noise"].shape
    z = torch.stack([torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    x, (now, first) = rows.state.tensors["out.0.prev_sample"], map(sampler._level, (3, 0))
    scale = sampler.pipe.scheduler.init_noise_sigma if name in ("sd", "sdxl") else 1.0
    assert torch.equal(noise, flow.renoise(x, z, now, first) / scale if first.alpha > 0 else z)
    images = finish(sampler, moved)
    assert torch.isfinite(images).all()
    assert (images - finish(sampler, start(sampler, 2))).abs().amax((1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", ALL)
def test_perturbation(name, stage):
    sampler = DiffusionSampler(build(name), CALL)
    rows = start(sampler, 2)
    rows = sampler.advance(rows, stage) if stage else rows
    assert sampler.perturb(rows, 0.0, [1, 2]) is rows
    plain_images = finish(sampler, rows)
    changes = []
    for strength in (1e-3, 0.3, 1.0):
        moved = sampler.perturb(rows, strength, [1, 2])
        assert moved.stage == stage
        assert [e[-1][0] for e in moved.lineage] == ["perturb"] * 2
        assert not any(torch.equal(a, b) for a, b in zip(moved.rng, rows.rng, strict=True))
        changes.append((finish(sampler, moved) - plain_images).abs().mean().item())
    assert 0 < changes[0] < 0.01
    assert changes == sorted(changes)


def test_full_perturbation_at_the_start_is_a_fresh_draw():
    sampler = DiffusionSampler(build("sd"), CALL)
    rows = sampler.perturb(start(sampler, 1), 1.0, [42])
    torch.testing.assert_close(finish(sampler, rows), plain(sampler.pipe, seed=42), **CLOSE)


# --- outputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_output_is_the_pipelines_own(name):
    pipe = build(name)
    sampler = DiffusionSampler(pipe, CALL, decode_batch=2)
    one, three = (sampler.advance(start(sampler, n), 6) for n in (1, 3))
    for options in ({}, {"output_type": "np"}, {"output_type": "latent"}):
        own = sampler.output(one, **options)
        expected = pipe(PROMPT, generator=torch.Generator().manual_seed(7), **options, **CALL)
        assert type(own) is type(expected)
        assert np.array_equal(np.asarray(own.images[0]), np.asarray(expected.images[0]))
        (images, *_) = sampler.output(three, return_dict=False, **options)
        assert type(images) is type(expected.images)
        assert len(images) == 3


def test_decoding_in_parts_changes_nothing():
    whole, parts = (DiffusionSampler(build("sd3"), CALL, decode_batch=n) for n in (16, 2))
    images = [finish(s, start(s, 5)) for s in (whole, parts)]
    torch.testing.assert_close(*images, **CLOSE)


# --- errors -----------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    sampler = DiffusionSampler(build("sd", SCHEDULERS["pndm"]()), CALL)
    rows = start(sampler, 1)
    with pytest.raises(ValueError, match="no preview"):
        sampler.predict_x0(rows)
    with pytest.raises(ValueError, match="predict_x0"):
        sampler.decode(rows)
    with pytest.raises(ValueError, match="stages end at 7"):
        sampler.advance(rows, 8)
    with pytest.raises(ValueError, match="earlier stage"):
        sampler.renoise(rows, 0, [1])
    with pytest.raises(ValueError, match="strength"):
        sampler.perturb(rows, 1.5, [1])
    with pytest.raises(ValueError, match="one a row"):
        sampler.perturb(rows, 0.5, [1, 2])
    rows = sampler.advance(rows, 3)
    with pytest.raises(ValueError, match="cannot advance"):
        sampler.advance(rows, 2)
    with pytest.raises(ValueError, match="PNDM"):
        sampler.renoise(rows, 1, [1])
    with pytest.raises(ValueError, match="last stage"):
        sampler.perturb(sampler.advance(rows, 7), 0.5, [1])
    with pytest.raises(ValueError, match="is no step cache; give 'auto'"):
        sampler.view(cache="first-block")
    with pytest.raises(ValueError, match="leave guidance out"):
        sampler.view(guidance=1.0)
    with pytest.raises(ValueError, match="at least one seed"):
        sampler.init(request(), [])
    unknown = DiffusionSampler(build("sd", SCHEDULERS["ipndm"]()), CALL)
    assert unknown.noise_level(6) == float("inf")
    with pytest.raises(ValueError, match="noise levels of IPNDM"):
        unknown.predict_x0(unknown.advance(start(unknown, 1), 2))
    heun = DiffusionSampler(build("sd", SCHEDULERS["heun"]()), CALL)
    with pytest.raises(ValueError, match="order 1"):
        heun.view(Sde())


@pytest.mark.parametrize("name", ["sd", "cogview4", "sd-dpm++", "sd-euler-a", "sdxl-inpaint"])
def test_resampling_inside_the_loop(name):
    """Rows exchanged inside one call of the pipeline go on as if it had been left and entered again."""
    base, _, scheduler = name.partition("-") if name != "sdxl-inpaint" else (name, "", "")
    pipe = build(base, SCHEDULERS[scheduler]() if scheduler else None)
    family = FAMILIES[base]
    call = {**family.call, "num_inference_steps": 4}
    sampler, entries, seen = DiffusionSampler(pipe, call), [], []
    loop = pipe.scheduler.set_timesteps

    @functools.wraps(loop)
    def counted(*args: Any, **kwargs: Any) -> Any:
        entries.append(1)
        return loop(*args, **kwargs)

    vars(pipe.scheduler)["set_timesteps"] = counted

    def keep(rows: Population) -> list[int]:
        seen.append(sampler.decode(sampler.predict_x0(rows)))
        return [2, 0, 2]

    entries.clear()
    last = sampler.num_stages
    moved = sampler.advance(start(sampler, 3), last, resample={1: keep, last - 1: lambda rows: [1, 2, 0]})
    inside = len(entries)
    by_hand = sampler.advance(start(sampler, 3), 1)
    preview = sampler.decode(sampler.predict_x0(by_hand))
    by_hand = sampler.advance(by_hand.select([2, 0, 2]), last - 1)
    by_hand = sampler.advance(by_hand.select([1, 2, 0]), last)
    together = sampler.strategy == "batch"
    assert inside == (3 if together else len(entries) - inside)  # initial noise, the loop, the preview
    torch.testing.assert_close(seen[0], preview, **CLOSE)
    torch.testing.assert_close(sampler.decode(moved), sampler.decode(by_hand), **CLOSE)
    assert moved.lineage == by_hand.lineage
    assert all(torch.equal(a, b) for a, b in zip(moved.rng, by_hand.rng, strict=True))
    with pytest.raises(ValueError, match="one row for each"):
        sampler.advance(start(sampler, 3), last, resample={2: lambda rows: [0]})
    with pytest.raises(ValueError, match="resample names stages"):
        sampler.advance(start(sampler, 3), last, resample={last: keep})


def test_only_a_refused_output_type_is_answered_by_another():
    pipe = build("sd")
    sampler = DiffusionSampler(pipe, CALL)
    rows = sampler.advance(start(sampler, 1), 6)
    expected, real, tries = sampler.decode(rows), pipe.image_processor.postprocess, []

    def postprocess(image: torch.Tensor, output_type: str = "pil", **options: Any) -> Any:
        tries.append(output_type)
        if message or output_type == "pt":
            raise ValueError(message or f"Only the output types `pil` and `np` are supported not {output_type=}")
        return real(image, output_type=output_type, **options)

    message = ""
    pipe.image_processor.postprocess = postprocess
    fresh, other = (DiffusionSampler(pipe, CALL) for _ in range(2))
    fresh.request = other.request = sampler.request
    tries.clear()
    torch.testing.assert_close(fresh.decode(rows), expected)
    assert tries == ["pt", "np"]
    message = "planted: the output is too large"
    tries.clear()
    with pytest.raises(ValueError, match="planted"):
        other.decode(rows)
    assert tries == ["pt"]


def test_model_calls_of_the_self_check_are_booked_apart():
    sampler, ledger = DiffusionSampler(build("sd"), CALL), Ledger()
    sampler.replay.spent.append((3, 0.5))
    sampler.meter = ledger
    assert (ledger.nfe, ledger.probes["nfe"], ledger.seconds["probe"]) == (0, 3, 0.5)
    sampler.meter = other = Ledger()
    assert not other.probes
