"""Wrapped pipelines whose weights move, are compiled, cached, patched or of half precision.

Accelerate's hooks for whole models also run with the CPU as their device, so most of it is tested everywhere.
"""

from __future__ import annotations

import itertools
from collections import Counter

import accelerate.hooks
import numpy as np
import pytest
import tiny
import torch
from diffusers import FirstBlockCacheConfig
from tiny import FAMILIES
from torch._dynamo.testing import CompileCounter

from visearch import BestOfN, SearchPipeline
from visearch.budget import Ledger, MeteredReward
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import Request
from visearch.rewards import resolve
from visearch.rewards.base import ModelReward
from visearch.rewards.cache import Cached
from visearch.rewards.noise_aware import NoiseAware
from visearch.rewards.video import VideoMean
from visearch.run import run_search
from visearch.search.successive_halving import SuccessiveHalving

CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "np"}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness(images, prompts):
    return [float(np.asarray(i).mean()) for i in images]


def wrap(pipe, n=1, search=None, **options):
    return SearchPipeline(pipe, brightness, search or BestOfN(n=n), **options)


def offload(pipe, mode: str, device: str) -> None:
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")


class Moves:
    """Counts how often each component comes onto the device, through accelerate's own hooks."""

    def __init__(self, monkeypatch, pipe) -> None:
        self.names = {id(m): name for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        self.counts: Counter[str] = Counter()
        self.there: set[str] = set()
        arrive, settle = accelerate.hooks.CpuOffload.pre_forward, accelerate.hooks.CpuOffload.init_hook
        leave = accelerate.hooks.UserCpuOffloadHook.offload

        def pre_forward(hook, module, *args, **kwargs):
            name = self.names[id(module)]
            self.counts[name] += name not in self.there
            self.there.add(name)
            return arrive(hook, module, *args, **kwargs)

        def init_hook(hook, module):
            self.there.discard(self.names[id(module)])
            return settle(hook, module)

        def leaving(hook):
            self.there.discard(self.names[id(hook.model)])
            return leave(hook)

        monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", pre_forward)
        monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", init_hook)
        monkeypatch.setattr(accelerate.hooks.UserCpuOffloadHook, "offload", leaving)


@pytest.mark.parametrize(
    ("mode", "device"),
    [  # accelerate's sequential offload cannot take the CPU as its device
        *itertools.product(("model", "group"), ("cpu",)),
        *(pytest.param(m, "cuda", marks=[pytest.mark.cuda, needs_cuda]) for m in ("model", "sequential", "group")),
    ],
)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_offloaded_pipelines_search_as_others(name, mode, device):
    plain = tiny.build(name).to(device)
    pipe = tiny.build(name)
    offload(pipe, mode, device)
    tolerance = 0 if device == "cpu" else 1e-3
    bare = pipe("a cow", generator=seeded(), **CALL).images
    np.testing.assert_allclose(bare, wrap(pipe)("a cow", generator=seeded(), **CALL).images, atol=tolerance)
    searched, expected = (wrap(p, n=3)("a cow", generator=seeded(), **CALL) for p in (pipe, plain))
    np.testing.assert_allclose(searched.images, expected.images, atol=tolerance)
    assert searched.search.ledger.nfe == expected.search.ledger.nfe
    np.testing.assert_allclose(bare, pipe("a cow", generator=seeded(), **CALL).images, atol=tolerance)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "cogview4"])
def test_each_component_comes_once_a_round(name, monkeypatch):
    pipe = tiny.build(name)
    moves = Moves(monkeypatch, pipe)
    offload(pipe, "model", "cpu")
    wrapped = wrap(pipe, n=4)
    wrapped("a cow", generator=seeded(), **CALL)  # also makes the dry runs, which encode a prompt
    moves.counts.clear()
    wrapped("two cows", generator=seeded(), **CALL)
    # one round; the winner is decoded once more, as the pipeline's own output
    assert moves.counts.pop("vae") == 2
    assert set(moves.counts.values()) == {1} and moves.counts.keys() & {"unet", "transformer"}

    moves.counts.clear()
    halving = SuccessiveHalving(n=4, calls=(1, 2), keep=(0.5, 0.5))
    wrap(pipe, search=halving)("a cow", generator=seeded(), **CALL)
    assert moves.counts["vae"] == 3 + 1 and moves.counts["unet" if hasattr(pipe, "unet") else "transformer"] == 3


def test_weights_changed_in_place_are_used():
    """What fusing a LoRA does: W + B A, on the same modules."""
    pipe = tiny.build("sd")
    wrapped = wrap(pipe)
    before = wrapped("a cow", generator=seeded(), **CALL).images
    with torch.no_grad():
        linear = [
            [m for m in part.modules() if isinstance(m, torch.nn.Linear)] for part in (pipe.unet, pipe.text_encoder)
        ]
        for module in (linear[0][3], linear[1][3]):
            a, b = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
            module.weight += b @ a
    after = wrapped("a cow", generator=seeded(), **CALL).images
    assert (after != before).any() and (after == pipe("a cow", generator=seeded(), **CALL).images).all()


def test_an_image_prompt_goes_with_each_row():
    pipe, call = tiny.build("ip-adapter"), {**FAMILIES["ip-adapter"].call, **CALL}
    pipe.set_ip_adapter_scale(0.7)
    found = wrap(pipe, n=3)("a cow", generator=seeded(), num_images_per_prompt=3, **call)
    for candidate, image in zip(found.search.ranking, found.images, strict=True):
        alone = pipe("a cow", generator=seeded(candidate["seed"]), **call).images[0]
        np.testing.assert_allclose(alone, image, atol=1e-4)
    pipe.set_ip_adapter_scale(0.0)
    without = wrap(pipe)("a cow", generator=seeded(), **call).images
    assert not np.allclose(without, found.images[[c["id"] for c in found.search.ranking].index("0")], atol=1e-4)


@pytest.mark.filterwarnings("ignore:a step cache is enabled")
def test_step_caches_begin_afresh():
    pipe = tiny.build("flux")
    call = {**CALL, "num_inference_steps": 6}
    exact = pipe("a cow", generator=seeded(), **call).images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    cached = pipe("a cow", generator=seeded(), **call).images
    assert not np.array_equal(exact, cached)
    assert (cached == wrap(pipe)("a cow", generator=seeded(), **call).images).all()
    wrap(pipe, n=3)("a cow", generator=seeded(), **call)
    assert (cached == pipe("a cow", generator=seeded(), **call).images).all()
    pipe.transformer.disable_cache()
    assert (exact == wrap(pipe)("a cow", generator=seeded(), **call).images).all()


def test_a_compiled_denoiser_is_compiled_once_a_batch_size():
    torch._dynamo.reset()
    pipe, counter = tiny.build("cogview4"), CompileCounter()
    expected = wrap(pipe, n=3)("a cow", generator=seeded(), **CALL).images
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, dynamic=False)
    plain = pipe("a cow", generator=seeded(), **CALL).images
    single = counter.frame_count
    assert (plain == wrap(pipe)("a cow", generator=seeded(), **CALL).images).all()
    assert counter.frame_count == single > 0
    wrapped = wrap(pipe, n=3)
    np.testing.assert_allclose(expected, wrapped("a cow", generator=seeded(), **CALL).images, atol=1e-5)
    both = counter.frame_count
    assert both == 2 * single
    wrapped("two cows", generator=seeded(), **CALL)
    assert counter.frame_count == both
    torch._dynamo.reset()


def test_lora_weights_are_searched_with(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny.build("sd")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    other = tiny.build("sd")
    wrapped = wrap(other)
    before = wrapped("a cow", generator=seeded(), **CALL).images
    wrapped.load_lora_weights(tmp_path)
    after = wrapped("a cow", generator=seeded(), **CALL).images
    assert (after != before).any() and (after == other("a cow", generator=seeded(), **CALL).images).all()


# --- rewards that move ----------------------------------------------------------------------------------------


class Weighed(torch.nn.Module):
    """A parameter, and how often it was sent somewhere else than it stands by now."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.here, self.moves = torch.nn.Parameter(torch.ones(())), "", []

    def to(self, place):
        if str(place) != self.here:
            self.here = str(place)
            self.moves.append(self.here)
        return self


class Elsewhere(ModelReward):
    """Mean brightness by a model on a device of its own; notes what it gets to see, and where the model is then."""

    name, family, licence, source, scale = "elsewhere", "pixel", "MIT", "tests", "brightness"

    def _load(self):
        return Weighed()

    def _score(self, images, prompts):
        self.seen = [*getattr(self, "seen", []), *images]
        assert self.module.here == "meta"
        return torch.stack([i.float().mean() for i in images])


def elsewhere(monkeypatch, name: str = "elsewhere", offload: str = "cpu") -> Elsewhere:
    monkeypatch.setattr("visearch.rewards.base.locate", lambda *_, **__: None)
    reward = Elsewhere(device="meta", offload=offload)
    reward.name = name
    if offload != "lazy":
        reward.module.moves.clear()
    return reward


@pytest.mark.parametrize(
    "join",
    [lambda r: r, lambda r: [r, brightness], Cached, NoiseAware],
    ids=["alone", "ensemble", "cached", "noise-aware"],
)
def test_an_offloaded_reward_comes_once_a_round_whatever_the_size_of_its_batches(monkeypatch, join):
    reward = elsewhere(monkeypatch)
    halving = SuccessiveHalving(n=4, calls=(1, 2), keep=(0.5, 0.5))
    sampler = GaussianToy(steps=3)
    *_, last = run_search(sampler, resolve(join(reward)), halving, Request(("a cow",)), reward_rows=1)
    assert last.result.error is None and max(last.result.ledger.rewards.values()) == 4 + 2 + 1
    assert reward.module.moves == ["meta", "cpu"] * 3


def test_an_offloaded_reward_of_frames_comes_once_whatever_the_size_of_its_batches(monkeypatch):
    reward = elsewhere(monkeypatch)
    scored = MeteredReward(VideoMean(reward), Ledger(), batch_size=1)(torch.rand(3, 2, 3, 4, 4), ["a cow"] * 3)
    assert scored.isfinite().all() and reward.module.moves == ["meta", "cpu"]


def test_members_of_an_ensemble_are_never_on_the_device_together(monkeypatch):
    first, second = (elsewhere(monkeypatch, name) for name in "ab")
    first.module.moves = second.module.moves = []
    *_, last = run_search(GaussianToy(), first + second, BestOfN(n=2), Request(("a cow",)), reward_rows=1)
    assert last.result.error is None and first.module.moves == ["meta", "cpu"] * 2


def test_a_lazy_reward_is_loaded_at_its_first_score(monkeypatch):
    reward = elsewhere(monkeypatch, offload="lazy")
    search = run_search(GaussianToy(), reward, BestOfN(n=2), Request(("a cow",)))
    assert "module" not in vars(reward)
    *_, last = search
    assert last.result.error is None and reward.module.moves == ["meta"]


def test_only_pixels_go_to_a_reward(monkeypatch):
    """Eight bits a channel, a quarter of what the decoder gave; not the latents, nor anything else of the row."""
    reward = elsewhere(monkeypatch)
    found = SearchPipeline(tiny.build("sd"), reward, BestOfN(n=2))("a cow", generator=seeded(), **CALL).search
    assert {(i.dtype, i.shape) for i in reward.seen} == {(torch.uint8, (3, 32, 32))}
    assert len(found.ranking) == 2


# --- accelerators ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(device, dtype):
    pipe = tiny.build("sd3").to(device, dtype)
    plain = pipe("a cow", generator=seeded(), **CALL).images
    found = wrap(pipe)("a cow", generator=seeded(), **CALL)
    np.testing.assert_allclose(plain, found.images, atol=0 if device == "cpu" else 1e-3)
    assert np.isfinite(wrap(pipe, n=3)("a cow", generator=seeded(), **CALL).images).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_drift_between_batch_sizes(name, device, record_property, capsys):
    """Kernels may round otherwise for other batch sizes: reported, and bounded on the CPU only."""
    pipe = tiny.build(name).to(device)
    call = {**FAMILIES[name].call, **CALL}
    found = wrap(pipe, n=8)("a cow", generator=seeded(), **call)
    best = found.search.ranking[0]
    alone = pipe("a cow", generator=seeded(best["seed"]), **call)
    images = [next(iter(output.values())) for output in (found, alone)]
    drift = float(np.abs(np.asarray(images[0]) - np.asarray(images[1])).max())
    record_property("drift", drift)
    with capsys.disabled():
        print(f"\n{name} on {device}: drift {drift:.2e} between a batch of 8 and one row")
    assert np.isfinite(drift) and (device != "cpu" or drift < 1e-4)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_in_half_precision(compiled):
    pipe = tiny.build("flux").to("cuda", torch.bfloat16)
    if compiled:
        pipe.transformer.compile_repeated_blocks(dynamic=True)
    plain = pipe("a cow", generator=seeded(), **CALL).images
    found = wrap(pipe)("a cow", generator=seeded(), **CALL).images
    np.testing.assert_allclose(plain, found, atol=1e-2)
    own = torch.Generator("cuda").manual_seed(1)
    assert len(wrap(pipe, n=4)("a cow", generator=own, **CALL).search.ranking) == 4


def test_decoding_in_parts_brings_the_decoder_once_a_round(monkeypatch):
    pipe = tiny.build("sd")
    moves = Moves(monkeypatch, pipe)
    offload(pipe, "model", "cpu")
    wrap(pipe, n=4, decode_rows=1)("a cow", generator=seeded(), **CALL)
    assert moves.counts == {"text_encoder": 1, "unet": 1, "vae": 2}
