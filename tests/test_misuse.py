"""A wrapped pipeline that is changed, shared or misused: a clear error, or simply the right result."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FluxPriorReduxPipeline, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as UNet
from tiny.image import unet
from transformers import SiglipVisionConfig, SiglipVisionModel

from visearch import BestOfN, SearchPipeline
from visearch.job import Samplers
from visearch.pipelines.replay import Replay

CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "np"}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(images, prompts):
    return [0.0] * len(images)


def wrap(pipe, n=2, reward=same):
    return SearchPipeline(pipe, reward, BestOfN(n=n))


@pytest.fixture
def pipe():
    return tiny.build("sd")


def assert_as_plain(pipe, wrapped, **call):
    plain = pipe("a cow", generator=seeded(), **CALL | call).images
    assert (plain == wrapped("a cow", generator=seeded(), **CALL | call).images).all()


# --- what cannot be wrapped -----------------------------------------------------------------------------------


def test_a_pipeline_without_a_scheduler_is_refused_when_wrapped(pipe):
    pipe.scheduler = None
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline has no scheduler.* set pipe.scheduler"):
        wrap(pipe)
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
    )
    prior = FluxPriorReduxPipeline(image_encoder=vision, feature_extractor=None, image_embedder=None)
    with pytest.raises(ValueError, match="FluxPriorReduxPipeline has no scheduler"):
        wrap(prior)


def test_what_is_no_pipeline_is_refused(pipe):
    with pytest.raises(TypeError, match="pipe is a UNet2DConditionModel"):
        wrap(pipe.unet)


def test_text_encoders_alone_still_encode(pipe):
    parts = dict.fromkeys(pipe.components) | {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    encoder = wrap(StableDiffusionPipeline(**parts, requires_safety_checker=False))
    embeds, _ = encoder.encode_prompt("a cow", "cpu", 1, False)
    assert torch.equal(embeds, pipe.encode_prompt("a cow", "cpu", 1, False)[0])
    with pytest.raises(ValueError, match="no scheduler"):
        encoder("a cow")


# --- what changes between calls -------------------------------------------------------------------------------


def test_components_replaced_between_calls_are_used(pipe):
    wrapped = wrap(pipe, n=1)
    assert_as_plain(pipe, wrapped)
    torch.manual_seed(9)
    wrapped.unet = unet(32)
    assert pipe.unet is wrapped.unet
    assert_as_plain(pipe, wrapped)


def test_another_scheduler_between_calls_is_probed_anew(pipe):
    wrapped = wrap(pipe, n=1)
    assert_as_plain(pipe, wrapped)
    assert wrapped.search_result.ledger.nfe == 3 * 2
    for scheduler in (
        EulerDiscreteScheduler(),
        DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction"),
    ):
        wrapped.scheduler = scheduler
        assert_as_plain(pipe, wrapped)
    from diffusers import HeunDiscreteScheduler

    pipe.scheduler = HeunDiscreteScheduler()
    assert_as_plain(pipe, wrapped)
    assert wrapped.search_result.ledger.nfe == 5 * 2


@pytest.fixture
def probed(monkeypatch):
    """Counts constructions of Replay, each of which makes dry runs."""
    made, init = [], Replay.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(Replay, "__init__", counted)
    return made


def test_dry_runs_are_made_once_while_nothing_changes(pipe, probed):
    wrapped = wrap(pipe, n=2)
    call = CALL | {"callback_on_step_end": lambda p, i, t, tensors: tensors}
    for prompt, seed in (("a cow", 1), ("two cows and a car", 2)):
        wrapped(prompt, generator=seeded(seed), **call)
        call |= {"callback_on_step_end": lambda p, i, t, tensors: {}}  # another function of the same kind
    wrapped(["a", "a cow"], generator=seeded(), **call)
    assert len(probed) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe, call: call.update(num_inference_steps=4),
        lambda pipe, call: call.update(height=64),
        lambda pipe, call: call.update(guidance_scale=1.0),
        lambda pipe, call: call.update(negative_prompt="a car"),
        lambda pipe, call: setattr(pipe, "scheduler", EulerDiscreteScheduler()),
        lambda pipe, call: pipe.scheduler.register_to_config(timestep_spacing="trailing"),
        lambda pipe, call: setattr(pipe, "unet", UNet.from_config(pipe.unet.config)),
        lambda pipe, call: pipe.to(torch.bfloat16),
    ],
    ids=["steps", "size", "guidance", "negative", "scheduler", "scheduler config", "component", "precision"],
)
def test_dry_runs_are_repeated_when_something_changes(pipe, probed, change):
    wrapped, call = wrap(pipe, n=1), dict(CALL)
    wrapped("a cow", generator=seeded(), **call)
    change(pipe, call)
    assert_as_plain(pipe, wrapped, **call)
    assert len(probed) == 2


def test_images_of_another_size_are_another_call(probed):
    picture = tiny.build("img2img"), tiny.IMAGE
    samplers = Samplers()
    first, again, other = (
        samplers.get(picture[0], {"image": image, "num_inference_steps": 2}, {"prompt": "a cow"})
        for image in (tiny.IMAGE, tiny.IMAGE.clone(), tiny.IMAGE[..., :16])
    )
    assert first is again and other is not first and len(probed) == 2


# --- what changes while a search runs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scheduler", "unet", "vae"])
def test_a_component_replaced_by_a_callback_is_an_error(pipe, name):
    original = getattr(pipe, name)
    another = EulerDiscreteScheduler() if name == "scheduler" else type(original).from_config(original.config)

    def replacing(pipe, step, timestep, tensors):
        setattr(pipe, name, another)
        return tensors

    with pytest.raises(
        RuntimeError, match=rf"pipe\.{name} was replaced by a {type(another).__name__} while a search ran"
    ):
        wrap(pipe)("a cow", generator=seeded(), callback_on_step_end=replacing, **CALL)
    setattr(pipe, name, original)
    assert_as_plain(pipe, wrap(pipe, n=1))


def test_a_component_replaced_by_the_reward_is_an_error(pipe):
    def replacing(images, prompts):
        pipe.unet = unet(32)
        return same(images, prompts)

    with pytest.raises(RuntimeError, match=r"pipe\.unet was replaced"):
        wrap(pipe, reward=replacing)("a cow", generator=seeded(), **CALL)


def test_two_threads_cannot_search_with_one_pipeline(pipe):
    inside, go = threading.Event(), threading.Event()

    def waiting(images, prompts):
        inside.set()
        assert go.wait(60)
        return same(images, prompts)

    first, found = wrap(pipe, reward=waiting), []
    thread = threading.Thread(target=lambda: found.append(first("a cow", generator=seeded(), **CALL)))
    thread.start()
    try:
        assert inside.wait(60)
        for other in (first, wrap(pipe), wrap(StableDiffusionPipeline.from_pipe(pipe))):
            with pytest.raises(RuntimeError, match="is in use by a search of a StableDiffusionPipeline"):
                other("a cow", generator=seeded(), **CALL)
    finally:
        go.set()
        thread.join()
    assert (found[0].images == wrap(pipe)("a cow", generator=seeded(), **CALL).images).all()


def test_a_reward_that_calls_its_own_pipeline_is_an_error(pipe):
    wrapped = wrap(pipe, reward=lambda images, prompts: wrapped("a cow", **CALL))
    with pytest.warns(UserWarning, match="is in use by a search"):
        wrapped("a cow", generator=seeded(), **CALL)


def test_after_an_error_the_pipeline_is_free_and_unchanged(pipe):
    def failing(pipe, step, timestep, tensors):
        raise KeyError("planted")

    wrapped = wrap(pipe, n=1)
    with pytest.raises(KeyError, match="planted"):
        wrapped("a cow", generator=seeded(), callback_on_step_end=failing, **CALL)
    assert_as_plain(pipe, wrapped)
