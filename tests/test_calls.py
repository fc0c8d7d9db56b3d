"""Calls of every kind, of every kind of pipeline: the wrapped one gives what the plain one gives."""

from __future__ import annotations

import copy
import inspect
import itertools

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from diffusers.utils import BaseOutput
from tiny import FAMILIES

from visearch import BestOfN, SearchPipeline
from visearch.search.successive_halving import SuccessiveHalving

STEPS = {"num_inference_steps": 3}
SMALL = {**STEPS, "height": 32, "width": 32}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def order(images, prompts):
    """The same score for all: ties go to the lower candidate, so winners come in the order of candidates."""
    return [0.0] * len(images)


def brightness(images, prompts):
    return [float(np.asarray(i).mean()) for i in images]


def wrap(pipe, n=1, reward=order):
    return SearchPipeline(pipe, reward, BestOfN(n=n))


def leaves(value) -> list[np.ndarray]:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(itertools.chain.from_iterable(map(leaves, value)))
    if torch.is_tensor(value):
        return [value.float().numpy()]
    return [np.asarray(value)]


def contents(output) -> list[np.ndarray]:
    """Every image of an output."""
    return leaves([v for k, v in vars(output).items() if k != "search"] if isinstance(output, BaseOutput) else output)


def assert_equal(a, b, tolerance: float = 0.0) -> None:
    assert type(a) is type(b)
    a, b = contents(a), contents(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def cogview():
    return tiny.build("cogview4")


@pytest.fixture(scope="module")
def stable():
    return tiny.build("sd")


# --- every class ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_one_candidate_is_the_plain_call_bit_for_bit(name):
    pipe, family = tiny.build(name), FAMILIES[name]
    call = {**family.call, **family.prompt(), **STEPS}
    one, two = seeded(), seeded()
    plain = pipe(**call, generator=one)
    wrapped = wrap(pipe)
    found = wrapped(**call, generator=two)
    assert_equal(plain, found)
    assert torch.equal(one.get_state(), two.get_state())
    assert found.search.ledger.nfe > 0 and wrapped.search_result is found.search
    in_a_tuple = wrapped(**call, generator=seeded(), return_dict=False)
    assert_equal(pipe(**call, generator=seeded(), return_dict=False), in_a_tuple)


# --- several prompts and images -------------------------------------------------------------------------------

PROMPTS = ["a photo of a cow", "two cows", "a"]


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "cogview4", "z-image", "wan"])
def test_prompts_of_other_lengths_each_as_alone(name):
    pipe, call = tiny.build(name), {**FAMILIES[name].call, **STEPS, "output_type": "np"}
    found = wrap(pipe)(PROMPTS, generator=[seeded(i) for i in range(3)], **call)
    alone = [pipe(p, generator=seeded(i), **call) for i, p in enumerate(PROMPTS)]
    for i, plain in enumerate(alone):
        np.testing.assert_allclose(contents(plain)[0][0], contents(found)[0][i], atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "cogview4"])
def test_a_generator_for_each_image_of_each_prompt(name):
    pipe, call = tiny.build(name), {**FAMILIES[name].call, **STEPS, "output_type": "np", "num_images_per_prompt": 2}
    prompts = ["a photo of a cow", "two photo of red car"]
    one, two = ([seeded(i) for i in range(4)] for _ in range(2))
    plain, found = pipe(prompts, generator=one, **call), wrap(pipe)(prompts, generator=two, **call)
    assert_equal(plain, found, 1e-4)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "cogview4"])
def test_a_batch_from_one_generator_is_the_plain_batch(name):
    pipe, call = tiny.build(name), {**FAMILIES[name].call, **STEPS, "output_type": "np", "num_images_per_prompt": 2}
    for prompts in ("a cow", ["a cow", "a cow"], ["a photo of a cow", "two photo of red car"]):
        one, two = seeded(), seeded()
        plain, found = (
            pipe(prompts, generator=one, **call),
            wrap(pipe, reward=brightness)(prompts, generator=two, **call),
        )
        assert_equal(plain, found, 1e-4)
        assert torch.equal(one.get_state(), two.get_state())
        assert not np.allclose(found.images[0], found.images[-1], atol=1e-3)


def test_more_images_than_candidates_widen_the_search(cogview):
    found = wrap(cogview, n=2, reward=brightness)("a cow", generator=seeded(), num_images_per_prompt=3, **SMALL)
    assert len(found.images) == 3 == len(found.search.ranking)


def test_unconditional_images():
    pipe = tiny.build("ddpm")
    call = {"num_inference_steps": 3, "output_type": "np"}
    found = wrap(pipe, n=4, reward=brightness)(batch_size=2, generator=seeded(), **call)
    alone = [pipe(generator=seeded(c["seed"]), **call).images[0] for c in found.search.ranking[:2]]
    np.testing.assert_allclose(np.stack(alone), found.images, atol=1e-4)
    assert len(found.search.ranking) == 4


def test_class_labels_are_prompts():
    pipe, call = tiny.build("dit"), {**STEPS, "output_type": "np"}
    found = wrap(pipe)(class_labels=[3, 5], generator=[seeded(1), seeded(2)], **call)
    alone = [pipe(class_labels=[label], generator=seeded(s), **call).images[0] for s, label in ((1, 3), (2, 5))]
    np.testing.assert_allclose(np.stack(alone), found.images, atol=1e-4)
    with_texts = wrap(pipe, n=2, reward=lambda images, prompts: [len(p) for p in prompts])
    found = with_texts(class_labels=[3, 5], reward_prompt=["a dog", "an apple"], generator=seeded(), **call)
    assert [c["score"] for c in found.search.ranking] == [8.0, 8.0, 5.0, 5.0]


def test_an_image_for_each_prompt():
    pipe = tiny.build("img2img")
    pictures = [tiny.IMAGE, tiny.IMAGE.flip(-1)]
    call = {"num_inference_steps": 4, "strength": 0.75, "output_type": "np"}
    found = wrap(pipe)(["a cow", "two cows"], image=pictures, generator=[seeded(0), seeded(1)], **call)
    for i, (prompt, picture) in enumerate(zip(("a cow", "two cows"), pictures, strict=True)):
        plain = pipe(prompt, image=picture, generator=seeded(i), **call).images[0]
        np.testing.assert_allclose(plain, found.images[i], atol=1e-4)


def test_embeddings_in_lists():
    pipe, call = tiny.build("z-image"), {**FAMILIES["z-image"].call, **STEPS, "output_type": "np"}
    embeds, negative = pipe.encode_prompt(PROMPTS[:2], device="cpu")
    call |= {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert isinstance(embeds, list) and embeds[0].shape != embeds[1].shape
    found = wrap(pipe)(generator=[seeded(0), seeded(1)], **call)
    for i in range(2):
        own = call | {"prompt_embeds": embeds[i : i + 1], "negative_prompt_embeds": negative[i : i + 1]}
        np.testing.assert_allclose(pipe(generator=seeded(i), **own).images[0], found.images[i], atol=1e-4)


# --- noise of the user's own ----------------------------------------------------------------------------------


def own_latents(pipe, rows=1):
    """Noise in the pipeline's own layout, which may be packed."""
    kept = []

    def note(pipe, step, timestep, tensors):
        kept.append(tensors["latents"])
        return tensors

    pipe(
        "a cow",
        generator=[seeded(i) for i in range(rows)],
        num_images_per_prompt=rows,
        callback_on_step_end=note,
        **SMALL,
    )
    return torch.randn(kept[0].shape, generator=seeded(11))


@pytest.mark.parametrize("name", ["sd", "flux", "cogview4"])
def test_latents_are_the_noise_of_candidate_0(name):
    pipe = tiny.build(name)
    call = {**SMALL, "output_type": "np", "latents": own_latents(pipe)}
    plain = pipe("a cow", generator=seeded(), **call)
    assert_equal(plain, wrap(pipe)("a cow", generator=seeded(), **call))
    searched = wrap(pipe, n=3, reward=brightness)("a cow", generator=seeded(), num_images_per_prompt=3, **call)
    ranking = searched.search.ranking
    images = {c["candidate"]: image for c, image in zip(ranking, searched.images, strict=True)}
    np.testing.assert_allclose(plain.images[0], images[0], atol=1e-4)
    del call["latents"]
    for c in ranking:
        if c["candidate"]:
            alone = pipe("a cow", generator=seeded(c["seed"]), **call).images[0]
            np.testing.assert_allclose(alone, images[c["candidate"]], atol=1e-4)


def test_latents_for_each_image(cogview):
    call = {**SMALL, "output_type": "np", "num_images_per_prompt": 2, "latents": own_latents(cogview, 2)}
    plain, found = (p("a cow", generator=[seeded(1), seeded(2)], **call) for p in (cogview, wrap(cogview)))
    assert_equal(plain, found, 1e-4)


# --- callbacks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux", "cogview4"])
def test_a_callback_that_writes(name):
    pipe = tiny.build(name)

    def flip_once(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (-1 if step == 1 else 1)}

    call = {**SMALL, "output_type": "np", "callback_on_step_end": flip_once}
    plain = pipe("a cow", generator=seeded(), **call)
    assert_equal(plain, wrap(pipe)("a cow", generator=seeded(), **call))
    found = wrap(pipe, n=3, reward=brightness)("a cow", generator=seeded(), num_images_per_prompt=3, **call)
    for c, image in zip(found.search.ranking, found.images, strict=True):
        np.testing.assert_allclose(pipe("a cow", generator=seeded(c["seed"]), **call).images[0], image, atol=1e-4)


def test_callbacks_may_ask_for_other_tensors(cogview):
    heard = []

    def note(pipe, step, timestep, tensors):
        heard.append((step, float(timestep), sorted(tensors), pipe.guidance_scale))
        return tensors

    call = {**SMALL, "callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    cogview("a cow", generator=seeded(), **call)
    plain, heard = heard, []
    wrap(cogview)("a cow", generator=seeded(), **call)
    assert heard == plain and len(heard) == 3


def test_what_a_callback_sets_on_the_pipeline_lasts(cogview):
    def guide_more(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    call = {**SMALL, "guidance_scale": 2.0, "output_type": "np", "callback_on_step_end": guide_more}
    plain, wrapped = cogview("a cow", generator=seeded(), **call), wrap(cogview)
    assert_equal(plain, wrapped("a cow", generator=seeded(), **call))
    assert wrapped.guidance_scale == 5.0
    halving = SuccessiveHalving(n=4, calls=(1, 2), keep=(0.5, 0.5))
    found = SearchPipeline(cogview, brightness, halving)("a cow", generator=seeded(), **call)
    alone = cogview("a cow", generator=seeded(found.search.ranking[0]["seed"]), **call)
    np.testing.assert_allclose(alone.images[0], found.images[0], atol=1e-4)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupted_call_returns_the_sample_so_far(stable, stop):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == stop
        return tensors

    call = {**SMALL, "output_type": "latent", "callback_on_step_end": interrupt}
    plain, found = (p("a cow", generator=seeded(), **call) for p in (stable, wrap(stable)))
    assert_equal(plain, found)
    assert found.search.ledger.nfe == 2 * (stop + 1)
    assert_equal(*(p("a cow", generator=seeded(), **SMALL) for p in (stable, wrap(stable))))


def test_older_callbacks_hear_of_live_steps_once():
    pipe, heard, size = tiny.build("pixart"), [], FAMILIES["pixart"].call

    def note(step, timestep, latents):
        heard.append((step, float(timestep), latents.sum().item()))

    call = {**size, **STEPS, "callback": note, "callback_steps": 1}
    pipe("a cow", generator=seeded(), **call)
    plain, heard = heard, []
    wrap(pipe)("a cow", generator=seeded(), **call)
    assert heard == plain and len(heard) == 3


# --- schedules and settings -----------------------------------------------------------------------------------


def test_timesteps_and_sigmas_of_the_users_own(cogview):
    size = {"height": 32, "width": 32, "output_type": "np"}
    euler = tiny.build("sd", EulerDiscreteScheduler())
    for pipe, own in ((euler, {"timesteps": [900, 500, 20]}), (cogview, {"sigmas": [1.0, 0.6, 0.2], **STEPS})):
        plain = pipe("a cow", generator=seeded(), **own, **size)
        found = wrap(pipe)("a cow", generator=seeded(), **own, **size)
        assert_equal(plain, found)
        assert found.search.ledger.nfe == 3 * 2


def test_settings_read_as_after_a_plain_call(cogview):
    wrapped = wrap(cogview)
    for scale in (2.5, 1.0):
        wrapped("a cow", generator=seeded(), guidance_scale=scale, **SMALL)
        assert wrapped.guidance_scale == scale and wrapped.num_timesteps == 3
        assert wrapped.do_classifier_free_guidance == (scale > 1)


def test_precision_and_device_follow_the_pipeline():
    pipe = tiny.build("cogview4")
    wrapped = wrap(pipe)
    wrapped("a cow", generator=seeded(), **SMALL)
    assert wrapped.to(torch.bfloat16) is wrapped and pipe.dtype == torch.bfloat16
    call = {**SMALL, "output_type": "latent"}
    plain, found = pipe("a cow", generator=seeded(), **call), wrapped("a cow", generator=seeded(), **call)
    assert found.images.dtype == torch.bfloat16 and torch.equal(plain.images, found.images)


# --- the object -----------------------------------------------------------------------------------------------


def test_objects_made_from_a_wrapped_one_search_for_themselves(cogview, tmp_path):
    wrapped = wrap(cogview, n=2, reward=brightness)
    wrapped.save_pretrained(tmp_path)
    loaded = type(wrapped).from_pretrained(tmp_path)
    copied, shared = copy.deepcopy(wrapped), copy.copy(wrapped)
    loaded.set_progress_bar_config(disable=True)
    expected = wrapped("a cow", generator=seeded(), **SMALL)
    for made in (loaded, copied, shared):
        assert made.search_result is None and isinstance(made, type(cogview))
        found = made("a cow", generator=seeded(), **SMALL)
        assert_equal(expected, found)
        assert len(found.search.ranking) == 2
    with torch.no_grad():
        next(loaded.transformer.parameters()).zero_()
    assert not np.array_equal(contents(loaded("a cow", generator=seeded(), **SMALL))[0], contents(expected)[0])
    assert copied.transformer is not cogview.transformer and shared.transformer is cogview.transformer


def test_other_pipelines_are_made_from_a_wrapped_one(stable):
    other = StableDiffusionImg2ImgPipeline.from_pipe(wrap(stable))
    assert type(other) is StableDiffusionImg2ImgPipeline and other.unet is stable.unet
    back = type(stable).from_pipe(wrap(other))
    assert type(back) is type(stable)
    assert_equal(*(p("a cow", generator=seeded(), **SMALL) for p in (stable, back)))


def test_it_is_made_and_called_with_the_same_arguments(cogview):
    wrapped = wrap(cogview)
    for name in ("__init__", "__call__"):
        assert inspect.signature(getattr(type(wrapped), name)) == inspect.signature(getattr(type(cogview), name))
    assert wrapped.config == cogview.config and isinstance(wrapped, DiffusionPipeline)
    assert not isinstance(tiny.build("sd"), type(wrapped))
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapped.no_such_thing  # noqa: B018
