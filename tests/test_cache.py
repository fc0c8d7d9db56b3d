"""Step caches: fixed patterns on every kind of loop, thresholds, and diffusers' own caches."""

from __future__ import annotations

import math

import probes
import pytest
import tiny
import torch
from diffusers import (
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from visearch.budget import Ledger, MeteredSampler
from visearch.pipelines.cache import ModelCall, Reuse, StepCache, computed, resolve
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import EtaStep, Population, Request, RowState

STEPS = 6
EVERY_SECOND = StepCache(every=2, warmup=1, order=1)
SAMPLERS: dict[str, DiffusionSampler] = {}


def sampler_of(name: str) -> DiffusionSampler:
    """One sampler a family, with six steps; ``heun`` takes two model calls a stage."""
    if name not in SAMPLERS:
        heun = HeunDiscreteScheduler() if name == "heun" else None
        family = tiny.FAMILIES["sd" if heun else name]
        call = {**family.call, "num_inference_steps": STEPS}
        SAMPLERS[name] = DiffusionSampler(tiny.build("sd" if heun else name, heun), call, example=family.prompt())
    return SAMPLERS[name]


def request_of(name: str, prompts: int = 1) -> Request:
    given = tiny.FAMILIES[name].prompt() if name in tiny.FAMILIES else {"prompt": tiny.PROMPT}
    if "prompt" in given:
        return Request((given["prompt"], "a photo of a cat")[:prompts], seed=3)
    own = {k: (v,) for k, v in given.items()}
    return Request((None,), seed=3, reward_prompts=("x",), per_prompt=own)


def latents(rows: Population) -> torch.Tensor:
    """(B, N) of all that the last step of each loop gave."""
    state = rows.state
    names = sorted(k for k in state.tensors if k.startswith("out.") and k.endswith("prev_sample"))
    return torch.cat([state.tensors[k].movedim(state.axes[k], 0).flatten(1) for k in names], 1).float()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# --- patterns ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 6), st.one_of(st.integers(1, 8), st.floats(0.01, 0.99)), st.integers(0, 5))
def test_patterns_run_the_first_and_last_stages_and_one_of_every(stages, every, warmup, tail):
    skipped = StepCache(every=every, warmup=warmup, tail=tail).stages(stages)
    first = warmup if isinstance(warmup, int) else math.ceil(warmup * stages - 1e-9)
    assert skipped <= set(range(max(1, first), stages - tail))
    assert all(any(j not in skipped for j in range(a, a + every)) for a in range(stages - every + 1))
    assert bool(skipped) == (every > 1 and first < stages - tail)


@given(
    st.lists(st.sampled_from(["one", "both", "second"]), min_size=2, max_size=12),
    st.sets(st.integers(1, 11)),
    st.integers(0, 11),
)
def test_computed_calls_are_those_with_nothing_to_repeat(loops, skip, start):
    """A stage calls one model once, both guidance branches in turn, or a second model."""
    names = {"one": ["a"], "both": ["a", "a"], "second": ["b"]}
    calls = [ModelCall(clock, name, 1) for clock, kind in enumerate(loops) for name in names[kind]]
    real = computed(calls, range(len(loops) + 1), frozenset(skip), start)
    kept, place = set(), 0
    for stage, kind in enumerate(loops):
        for branch, name in enumerate(names[kind]):
            repeats = stage in skip and (name, branch) in kept
            assert real[place] == (stage >= start and not repeats)
            kept |= {(name, branch)} if real[place] else set()
            place += 1


@settings(deadline=None)
@given(st.integers(0, 2), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.data())
def test_extrapolation_is_exact_for_polynomials_of_its_order(order, rows, blocks, rows_first, data):
    coefficients = [
        torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=rows * blocks, max_size=rows * blocks))).float()
        for _ in range(order + 1)
    ]
    reuse = Reuse(StepCache(skip=(order + 2,), order=order), range(9), rows, {"m": rows_first})

    def output(stage: int) -> tuple[torch.Tensor]:
        return (sum(c * stage**power for power, c in enumerate(coefficients)),)

    batch = torch.zeros(rows * blocks)
    for stage in range(order + 2):
        key, skipped = reuse.begin("m", stage, batch, len(batch))
        assert not skipped
        reuse.keep(key, "m", output(stage), listed=False)
    again = Reuse(reuse.cache, range(9), rows, {"m": rows_first})
    again.load(RowState(reuse.tensors))
    key, skipped = again.begin("m", order + 2, batch, len(batch))
    assert skipped
    torch.testing.assert_close(again.recall(key, "m", (batch,), listed=False)[0], output(order + 2)[0])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"every": 0}, "every=0"),
        ({"warmup": 0}, "warmup=0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"tail": -1}, "tail=-1"),
        ({"order": 3}, "order=3"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"skip": (0, 2)}, "first stage has no output"),
        ({"skip": (2,), "tau": 0.1}, "give one of them"),
        ("every=two", "is no number"),
        ("often=2", "no field 'often'"),
        (0.5, "is no step cache"),
    ],
)
def test_bad_caches_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        resolve(given, 8)


def test_specs_of_caches():
    assert (
        resolve("every=2, warmup=0.5", 8) == StepCache(every=2, warmup=0.5) == resolve({"every": 2, "warmup": 0.5}, 8)
    )
    assert resolve("auto", 4).stages(4) == frozenset()
    for stages in (8, 15, 25, 50):
        assert 0.35 <= len(resolve("auto", stages).stages(stages)) / stages <= 0.6
    with pytest.raises(ValueError, match="goes beyond the last of 6 stages"):
        sampler_of("sd").view(cache=StepCache(skip=(6,)))


# --- fixed patterns on real loops -------------------------------------------------------------------------------

LOOPS = ("sd", "heun", "cogview4", "wan", "z-image", "controlnet", "sdxl", "dit", "kandinsky22")


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("order", [0, 2])
def test_rows_end_alike_whatever_their_stops_and_companions(name, order):
    """Guidance in one batch or two calls, lists of rows, several models and loops, order 2, rows one by one."""
    sampler = sampler_of(name)
    request, view = request_of(name), sampler.view(cache=StepCache(every=3, warmup=1, tail=0, order=order))
    view.meter = ledger = Ledger()
    end, seeds = view.num_stages, request.seeds(0, 3)
    whole = view.advance(view.init(request, seeds), end)
    assert ledger.nfe == 3 * view.nfe(0, end) < 3 * sampler.nfe(0, end)
    assert ledger.nfe + ledger.skipped_rows == 3 * sampler.nfe(0, end)
    assert ledger.images == pytest.approx(3 * view.cost(0, end))

    rows = view.init(request, seeds)
    for stage in view.milestones:
        rows = view.advance(rows, stage)
        if stage == end // 2:
            rows = view.select(rows, [2, 0])
    assert close(latents(rows), latents(whole)[[2, 0]])
    plain = sampler.advance(sampler.init(request, seeds), end)
    assert not close(latents(whole), latents(plain))


@pytest.mark.parametrize("name", ["sd", "cogview4"])
def test_skipped_calls_repeat_the_last_output_and_nothing_else_runs(name):
    """Against a pipeline whose own denoiser was patched by hand to repeat itself; counted by a hook deep inside."""
    sampler, skip = sampler_of(name), (2, 3, 5)
    pipe, calls = sampler.pipe, 2 if name == "cogview4" else 1
    denoiser = pipe.transformer if name == "cogview4" else pipe.unet
    real, made = denoiser.forward, []

    def repeating(*args, **kwargs):
        stage = len(made) // calls
        made.append(made[-calls] if stage in skip else real(*args, **kwargs))
        return made[-1]

    denoiser.forward = repeating
    try:
        expected = pipe(
            tiny.PROMPT, generator=torch.Generator().manual_seed(3), output_type="pt", **sampler.call
        ).images
    finally:
        del denoiser.forward
    probe = probes.Probe(pipe)
    view, request = sampler.view(cache=StepCache(skip=skip, order=0)), request_of(name)
    rows = view.advance(view.init(request, request.seeds(0, 1)), STEPS)
    assert torch.equal(view.decode(rows), expected)
    assert probe.rows == view.nfe(0, STEPS) == 2 * (STEPS - len(skip))


def test_a_pattern_that_skips_nothing_is_the_plain_sampler():
    sampler, request = sampler_of("sd"), request_of("sd")
    rows, cached = (
        s.advance(s.init(request, request.seeds(0, 2)), STEPS)
        for s in (sampler, sampler.view(cache=StepCache(skip=())))
    )
    assert torch.equal(latents(rows), latents(cached))
    assert sampler.view(cache=StepCache(tau=0.0)).nfe(0, STEPS) == sampler.nfe(0, STEPS)


def test_rows_are_saved_with_what_they_repeat(tmp_path):
    sampler, request = sampler_of("cogview4"), request_of("cogview4")
    view = sampler.view(cache=EVERY_SECOND)
    half = view.advance(view.init(request, request.seeds(0, 2)), 3)
    whole = view.advance(half.snapshot(), STEPS)
    half.save(tmp_path)
    assert torch.equal(latents(view.advance(Population.load(tmp_path), STEPS)), latents(whole))
    assert not any(k.startswith("cache.") for k in whole.state.tensors)


def test_rows_exchanged_inside_the_loop_take_their_outputs_along():
    sampler, request = sampler_of("sd"), request_of("sd")
    view = sampler.view(cache=EVERY_SECOND, transition=EtaStep(1.0))
    rows = view.init(request, request.seeds(0, 3))
    inside = view.advance(rows, STEPS, resample={3: lambda _: [2, 0, 2]})
    outside = view.advance(view.select(view.advance(rows, 3), [2, 0, 2]), STEPS)
    assert torch.equal(latents(inside), latents(outside)) and inside.id == outside.id
    assert not torch.equal(latents(inside)[0], latents(inside)[2])


def test_views_of_steps_and_of_caches_compose_in_any_order():
    sampler, request = sampler_of("sd"), request_of("sd")
    both = sampler.view(transition=EtaStep(1.0)).view(cache=EVERY_SECOND)
    other = sampler.view(cache=EVERY_SECOND).view(transition=EtaStep(1.0))
    ends = [s.advance(s.init(request, request.seeds(0, 2)), STEPS) for s in (both, other)]
    assert torch.equal(*map(latents, ends)) and sampler.cache is None


def test_rows_move_to_stages_that_are_computed_only():
    sampler, request = sampler_of("sd"), request_of("sd")
    view = sampler.view(cache=EVERY_SECOND)  # skips 1 and 3
    view.meter = ledger = Ledger()
    rows = view.advance(view.init(request, request.seeds(0, 2)), 5)
    for stage in (1, 3):
        with pytest.raises(ValueError, match=r"skipped: \[1, 3\]"):
            view.renoise(rows, stage, [1, 2])
    with pytest.raises(ValueError, match="move to stage 3"):
        view.perturb(view.advance(view.init(request, request.seeds(0, 2)), 3), 0.5, [1, 2])
    spent = ledger.nfe
    for moved in (view.renoise(rows, 2, [1, 2]), view.renoise(rows, 0, [1, 2])):
        view.advance(moved, STEPS)
        assert ledger.nfe - spent == 2 * view.nfe(moved.stage, STEPS)
        spent = ledger.nfe


def test_a_pipeline_that_runs_whole_has_no_cache(monkeypatch):
    sampler = sampler_of("sd")
    monkeypatch.setattr(sampler.replay, "strategy", "whole")
    with pytest.raises(ValueError, match="runs whole only"):
        sampler.view(cache="auto")


# --- thresholds -------------------------------------------------------------------------------------------------


def test_thresholds_are_decided_by_each_row_alone():
    sampler, request = sampler_of("cogview4"), request_of("cogview4", 2)
    counts = []
    for tau in (0.0, 0.3, 1e9):
        view = sampler.view(cache=StepCache(tau=tau, warmup=1, order=0))
        view.meter = ledger = Ledger()
        seeds = request.seeds(0, 2)
        together = view.advance(view.init(request, seeds), STEPS)
        assert ledger.nfe <= 4 * view.nfe(0, STEPS) and view.exact_nfe == (tau == 0)
        assert ledger.nfe + ledger.skipped_rows == 4 * sampler.nfe(0, STEPS)
        counts.append(ledger.skipped_rows)
        for row, seed in enumerate(seeds):
            alone = view.advance(view.advance(view.init(request, [seed]), 3), STEPS)
            assert torch.equal(latents(alone)[0], latents(together)[row]) or tau == 0
            assert close(latents(alone)[0], latents(together)[row])
    assert counts[0] == 0 < counts[1] < counts[2] == 4 * 2 * (STEPS - 2)


def test_a_stage_runs_again_once_its_input_has_moved_by_the_threshold():
    """One row whose input grows by 10 % a stage: with tau = .25, two stages are skipped after each that runs."""
    reuse, ran = Reuse(StepCache(tau=0.25, warmup=1, tail=0), range(10), 1, {"m": False}), []
    for stage in range(9):
        batch = torch.full((1, 4), 1.1**stage)
        key, skipped = reuse.begin("m", stage, batch, 1)
        if not skipped:
            ran.append(stage)
            reuse.keep(key, "m", (batch,), listed=False)
    assert ran == [0, 3, 6]


# --- diffusers' own caches --------------------------------------------------------------------------------------

MAG = MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=0.2, threshold=0.5)
TAYLOR = TaylorSeerCacheConfig(
    cache_interval=2,
    disable_cache_before_step=2,
    taylor_factors_dtype=torch.float32,
    cache_identifiers=[r"transformer_blocks\.\d+\.attn1"],
)
FIRST_BLOCK = FirstBlockCacheConfig(threshold=0.5)


@pytest.mark.parametrize("config", [MAG, TAYLOR, FIRST_BLOCK], ids=lambda c: type(c).__name__)
def test_caches_of_diffusers_run_from_noise_to_end_and_leave_no_trace(config):
    sampler, request = sampler_of("cogview4"), request_of("cogview4")
    sampler.advance(sampler.init(request, request.seeds(0, 1)), 1)  # what the first call of a pipeline sets up
    before = probes.attributes(sampler.pipe)
    view = sampler.view(cache=config)
    assert view.milestones == (STEPS,) and not view.exact_nfe
    view.meter = ledger = Ledger()
    seeds = request.seeds(0, 3)
    rows = view.advance(view.init(request, seeds), STEPS)
    assert 0 < ledger.nfe < 3 * view.nfe(0, STEPS) == 3 * sampler.nfe(0, STEPS)
    assert ledger.nfe + ledger.skipped_rows == 3 * sampler.nfe(0, STEPS)
    assert ledger.images == pytest.approx(ledger.nfe / sampler.nfe(0, STEPS), abs=0.05)
    for row, seed in enumerate(seeds):
        alone = view.advance(view.init(request, [seed]), STEPS)
        assert close(latents(alone)[0], latents(rows)[row])
    plain = sampler.advance(sampler.init(request, seeds), STEPS)
    assert not close(latents(rows), latents(plain))
    probes.assert_same(before, probes.attributes(sampler.pipe))
    with pytest.raises(ValueError, match="without a stop"):
        view.advance(view.init(request, seeds), 3)
    with pytest.raises(ValueError, match="milestones ahead"):
        MeteredSampler(view, ledger).advance(view.init(request, seeds), 3)


def test_a_cache_of_diffusers_gives_what_the_pipeline_gives_with_it():
    sampler, request = sampler_of("cogview4"), request_of("cogview4")
    pipe, generator = sampler.pipe, torch.Generator().manual_seed(3)
    pipe.transformer.enable_cache(TAYLOR)
    try:
        expected = pipe(tiny.PROMPT, generator=generator, output_type="pt", **sampler.call).images
    finally:
        pipe.transformer.disable_cache()
    view = sampler.view(cache=TAYLOR)
    rows = view.advance(view.init(request, request.seeds(0, 1)), STEPS)
    assert torch.equal(view.decode(rows), expected)


def test_a_failing_call_turns_the_cache_off():
    sampler, request = sampler_of("cogview4"), request_of("cogview4")
    view = sampler.view(cache=MAG)
    rows = view.init(request, request.seeds(0, 1))
    before, hook = probes.attributes(sampler.pipe), None

    def fail(*_):
        raise RuntimeError("broken")

    try:
        hook = sampler.pipe.transformer.proj_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            view.advance(rows, STEPS)
    finally:
        hook.remove()
    probes.assert_same(before, probes.attributes(sampler.pipe))


def test_denoisers_without_the_hook_are_named():
    with pytest.raises(ValueError, match="UNet2DConditionModel has no step caches"):
        sampler_of("sd").view(cache=MAG)
    with pytest.raises(ValueError, match="finds nothing to skip in CogView4Transformer2DModel; use StepCache"):
        sampler_of("cogview4").view(cache=TaylorSeerCacheConfig())  # its patterns know other names of attention
    denoiser = sampler_of("cogview4").pipe.transformer
    denoiser.enable_cache(FIRST_BLOCK)
    try:
        with pytest.raises(ValueError, match="enabled already, FirstBlockCacheConfig"):
            sampler_of("cogview4").view(cache=MAG)
        assert denoiser.is_cache_enabled
    finally:
        denoiser.disable_cache()


# --- toys -------------------------------------------------------------------------------------------------------


def test_toys():
    toy, request = GaussianToy(), Request(("a",), seed=1)
    view = toy.view(cache=EVERY_SECOND)
    view.meter = ledger = Ledger()
    rows = view.advance(view.init(request, request.seeds(0, 3)), 8)
    assert ledger.nfe == 3 * view.nfe(0, 8) == 3 * 2 * 5 and ledger.skipped_rows == 3 * 2 * 3
    assert ledger.images == pytest.approx(3 * view.cost(0, 8))
    plain = toy.advance(toy.init(request, request.seeds(0, 3)), 8)
    gap = (rows.state.tensors["x"] - plain.state.tensors["x"]).abs().max()
    assert 0 < gap < 0.5
    for cache in (MAG, StepCache(tau=0.1)):
        with pytest.raises(ValueError, match="fixed pattern only"):
            toy.view(cache=cache)
    with pytest.raises(ValueError, match="no other view"):
        TokenToy().view(cache="auto")
