"""SearchPipeline behaves as the pipeline that it wraps."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from visearch import BestOfN, Budget, SearchPipeline, SuccessiveHalving
from visearch.budget import RewardError

CALL = {"num_inference_steps": 3, "height": 32, "width": 32}
PIPES = ("sd", "sd3", "cogview4")


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness(images, prompts):
    return [sum(i.convert("L").get_flattened_data()) / 255 for i in images]


@pytest.fixture(scope="module", params=PIPES)
def pipe(request):
    return tiny.build(request.param)


@pytest.fixture(scope="module")
def cogview():
    return tiny.build("cogview4")


class RealRows:
    """Rows that reach the inside of the denoiser: stubs never get there, whatever the ledger says."""

    def __init__(self, pipe) -> None:
        self.denoiser = getattr(pipe, "transformer", None) or pipe.unet
        self.inside = list(self.denoiser.children())[-1]
        self.rows: list[int] = []

    def __enter__(self) -> list[int]:
        self.handle = self.inside.register_forward_hook(lambda module, args, out: self.rows.append(len(_first(out))))
        return self.rows

    def __exit__(self, *_) -> None:
        self.handle.remove()


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def wrap(pipe, n=3, **options):
    return SearchPipeline(pipe, brightness, BestOfN(n=n), **options)


def test_one_candidate_is_the_plain_call_bit_for_bit(pipe):
    for output_type in ("pt", "np", "pil"):
        plain = pipe("a photo of a cow", generator=seeded(), output_type=output_type, **CALL).images
        found = wrap(pipe, n=1)("a photo of a cow", generator=seeded(), output_type=output_type, **CALL)
        assert type(found) is type(pipe("a cow", generator=seeded(), **CALL))
        same = torch.equal if output_type == "pt" else lambda a, b: all((x == y).all() for x, y in zip(a, b))
        if output_type == "pil":
            same = lambda a, b: [x.tobytes() for x in a] == [y.tobytes() for y in b]  # noqa: E731
        assert same(plain, found.images)
        # the searched run went through replay, not through a plain call: its model rows were counted one by one
        assert found.search.ledger.nfe == found.search.ledger.forwards * (2 if found.search.ledger.forwards == 3 else 1)


def test_without_a_generator_one_candidate_continues_the_global_stream(pipe):
    torch.manual_seed(5)
    plain, after = pipe("a cow", output_type="pt", **CALL).images, torch.rand(1)
    torch.manual_seed(5)
    found, after_search = wrap(pipe, n=1)("a cow", output_type="pt", **CALL).images, torch.rand(1)
    assert torch.equal(plain, found) and torch.equal(after, after_search)


def test_the_users_generator_moves_as_in_a_plain_call(pipe):
    one, two = seeded(), seeded()
    pipe("a cow", generator=one, **CALL)
    wrap(pipe)("a cow", generator=two, **CALL)
    assert torch.equal(one.get_state(), two.get_state())


def test_a_second_call_with_the_same_generator_explores_other_candidates(cogview):
    generator, wrapped = seeded(), wrap(cogview)
    first, second = (wrapped("a cow", generator=generator, **CALL).search for _ in range(2))
    assert not {c["seed"] for c in first.ranking[1:]} & {c["seed"] for c in second.ranking if c["id"] != "0"}


def test_the_winner_is_the_best_seed_run_alone(cogview):
    found = wrap(cogview, n=4)("a cow", generator=seeded(), output_type="pt", **CALL)
    scores = {c["seed"]: c["score"] for c in found.search.ranking}
    alone = {s: cogview("a cow", generator=seeded(s), output_type="pt", **CALL).images for s in scores}
    best = max(scores, key=scores.get)
    assert torch.allclose(alone[best], found.images, atol=1e-4)
    from visearch.rewards.images import to_pil

    again = {s: brightness(to_pil(image), [""])[0] for s, image in alone.items()}
    assert max(again, key=again.get) == best


def test_it_is_the_same_class_with_the_same_attributes(cogview):
    wrapped = wrap(cogview)
    assert isinstance(wrapped, type(cogview)) and isinstance(wrapped, DiffusionPipeline)
    assert type(wrapped).__name__ == type(cogview).__name__ and type(wrapped).__module__ == type(cogview).__module__
    assert inspect.signature(wrapped.__call__) == inspect.signature(cogview.__call__)
    assert wrapped.components == cogview.components and wrapped.transformer is cogview.transformer
    wrapped.set_progress_bar_config(disable=True)
    assert cogview._progress_bar_config == {"disable": True}
    assert wrapped.to("cpu") is not None and wrapped.device == cogview.device


def test_it_saves_and_loads_as_the_plain_pipeline(cogview, tmp_path):
    wrap(cogview).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(cogview)


def test_wrapping_twice_does_not_search_twice(cogview):
    found = wrap(wrap(cogview, n=3), n=2)("a cow", generator=seeded(), **CALL)
    assert len(found.search.ranking) == 2


def test_the_pipeline_is_left_as_it_was(cogview):
    before = {k: id(v) for k, v in vars(cogview).items()}
    scheduler = dict(vars(cogview.scheduler))
    wrap(cogview)("a cow", generator=seeded(), **CALL)
    assert {k: id(v) for k, v in vars(cogview).items()} == before
    assert vars(cogview.scheduler).keys() == scheduler.keys()
    assert "forward" not in vars(cogview.transformer) and "step" not in vars(cogview.scheduler)


def test_lists_of_prompts_and_several_images_keep_the_plain_order(cogview):
    prompts = ["a photo of a cow", "two cats"]
    found = wrap(cogview, n=4)(prompts, generator=seeded(), num_images_per_prompt=2, output_type="pt", **CALL)
    assert found.images.shape == (4, 3, 32, 32)
    for p, prompt in enumerate(prompts):
        mine = [c for c in found.search.ranking if c["prompt"] == p][:2]
        for k, c in enumerate(mine):
            alone = cogview(prompt, generator=seeded(c["seed"]), output_type="pt", **CALL).images[0]
            assert torch.allclose(alone, found.images[2 * p + k], atol=1e-4)


def test_a_generator_a_prompt(cogview):
    generators = [seeded(11), seeded(12)]
    plain = cogview(["a cow", "a cat"], generator=generators, output_type="pt", **CALL).images
    found = wrap(cogview, n=1)(["a cow", "a cat"], generator=[seeded(11), seeded(12)], output_type="pt", **CALL).images
    assert torch.allclose(plain, found, atol=1e-4)


def test_tuples_positional_arguments_and_negative_prompts(cogview):
    plain = cogview("a cow", "a cat", num_inference_steps=3, height=32, width=32, generator=seeded(), return_dict=False)
    wrapped = wrap(cogview, n=1)
    found = wrapped("a cow", "a cat", num_inference_steps=3, height=32, width=32, generator=seeded(), return_dict=False)
    assert isinstance(found, tuple) and found[0][0].tobytes() == plain[0][0].tobytes()
    assert wrapped.search_result.stopped == "done"


def test_embeddings_need_a_prompt_for_the_reward(cogview):
    embeds, negative = cogview.encode_prompt("a cow", device="cpu")
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "output_type": "pt", **CALL}
    with pytest.raises(ValueError, match="reward_prompt="):
        wrap(cogview)(generator=seeded(), **call)
    plain = cogview(generator=seeded(), **call).images
    found = wrap(cogview, n=1)(generator=seeded(), reward_prompt="a cow", **call)
    assert torch.equal(plain, found.images) and found.search.request.reward_prompts == ("a cow",)


def test_the_users_callback_hears_of_each_winning_step_as_in_a_plain_call(cogview):
    def steps(call):
        heard = []
        call("a cow", generator=seeded(), callback_on_step_end=lambda p, i, t, kw: heard.append(i) or kw, **CALL)
        return heard

    assert steps(wrap(cogview, n=1)) == steps(cogview)


def test_held_out_rewards_score_winners_and_candidate_0(cogview):
    def dark(images, prompts):
        return [-v for v in brightness(images, prompts)]

    with pytest.warns(UserWarning, match="possible reward hacking: brightness rises while dark falls"):
        found = wrap(cogview, n=3, held_out=[dark])("a cow", generator=seeded(), num_images_per_prompt=2, **CALL).search
    best = found.winners(2)
    assert found.held_out["dark"] == pytest.approx((-best.score).tolist())
    base = next(c["score"] for c in found.ranking if c["id"] == "0")
    judge = found.report.judges[0]
    assert (judge.base, judge.picked) == (pytest.approx((-base,)), pytest.approx((-float(best.score[0]),)))
    assert any("reward hacking" in warning for warning in found.warnings) and "dark" not in found.ledger.rewards


def test_candidate_0_is_not_drawn_again_where_the_budget_leaves_a_plain_sample(cogview):
    """Particles take stochastic steps; a single one, which is all that is paid for here, takes the pipeline's own."""

    def dark(images, prompts):
        return [-value for value in brightness(images, prompts)]

    one = 2 * CALL["num_inference_steps"]
    wrapped = SearchPipeline(cogview, brightness, "smc(n=4)", Budget(max_nfe=one), held_out=[dark])
    found = wrapped("a cow", generator=seeded(), **CALL).search
    assert found.ledger.nfe == one and found.report.ledger.nfe == 0
    assert found.report.guided.base == found.report.guided.picked


def test_a_held_out_reward_that_guides_is_refused_before_anything_runs(cogview):
    with pytest.raises(ValueError, match="brightness is given twice; a judge is held out only if it does not guide"):
        wrap(cogview, held_out=[brightness])


def test_budgets_cut_the_search(cogview):
    one = 2 * CALL["num_inference_steps"]
    found = wrap(cogview, n=5, budget=Budget(max_nfe=2 * one + 1))("a cow", generator=seeded(), **CALL)
    assert len(found.search.ranking) == 2 and found.search.ledger.nfe == 2 * one
    with pytest.raises(ValueError, match="too small"):
        wrap(cogview, budget=Budget(max_nfe=one - 1))("a cow", generator=seeded(), **CALL)


@pytest.mark.filterwarnings("ignore:halving .* has no check left")
@pytest.mark.parametrize("budget", [Budget(max_images=3), Budget(max_nfe=18)])
def test_a_search_may_take_its_size_from_the_budget_of_all_prompts(cogview, budget):
    """Three images for two prompts are one each, and for one prompt three."""
    search = SuccessiveHalving(n=None, calls=(), keep=())
    pipe = SearchPipeline(cogview, brightness, search, budget)
    assert len(pipe("a cow", generator=seeded(), **CALL).search.ranking) == 3
    assert len(pipe(["a cow", "a dog"], generator=seeded(), **CALL).search.ranking) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt='' is empty"),
        ({"prompt": []}, "empty list"),
        ({}, "prompt is missing"),
        ({"prompt": ["a cow", "a cat"], "latents": torch.zeros(3, 4, 4, 4)}, r"latents is of shape \(3, 4, 4, 4\)"),
        (
            {"prompt": "a cow", "num_images_per_prompt": 0},
            "num_images_per_prompt=0 must be a whole number of at least 1",
        ),
        ({"prompt": ["a cow", None]}, "prompt_embeds without prompt"),
        ({"prompt": ["a cow", "a cat"], "negative_prompt": ["x"]}, "negative_prompt has 1 entries for 2 prompts"),
        ({"prompt": "a cow", "generator": [seeded(), seeded()]}, "generator has 2 entries for 1 prompts"),
    ],
)
def test_bad_calls_are_refused_before_any_model_runs(cogview, arguments, message):
    with RealRows(cogview) as rows, pytest.raises(ValueError, match=message):
        wrap(cogview)(**arguments, **CALL)
    assert not rows


def test_unknown_arguments_are_refused_as_by_the_pipeline(cogview):
    with pytest.raises(TypeError, match="num_steps"):
        wrap(cogview)("a cow", num_steps=3)


def test_a_broken_reward_raises_and_keeps_what_was_finished(cogview):
    calls = []

    def broken(images, prompts):
        calls.append(len(images))
        return brightness(images, prompts) if len(calls) < 4 else [0.0]

    wrapped = SearchPipeline(cogview, broken, BestOfN(n=4, batch=2))
    with pytest.raises(RewardError, match="one number a sample"):
        wrapped("a cow", generator=seeded(), **CALL)
    assert len(wrapped.search_result.ranking) == 2


def test_ctrl_c_raises_and_keeps_what_was_finished(cogview):
    calls = []

    def interrupting(images, prompts):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return brightness(images, prompts)

    wrapped = SearchPipeline(cogview, interrupting, BestOfN(n=4, batch=2))
    with pytest.raises(KeyboardInterrupt):
        wrapped("a cow", generator=seeded(), **CALL)
    assert wrapped.search_result.stopped == "interrupted" and len(wrapped.search_result.ranking) == 2


def test_the_ledger_agrees_with_an_independent_hook_when_memory_runs_out_midway(pipe, monkeypatch):
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    forward, seen = type(denoiser).forward, []

    def tight(self, *args, **kwargs):
        sample = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        seen.append(len(sample))
        if len(sample) > 2 and len(seen) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    whole = wrap(pipe, n=3)("a cow", generator=seeded(), output_type="pt", **CALL)
    monkeypatch.setattr(type(denoiser), "forward", tight)
    with RealRows(pipe) as rows:
        found = wrap(pipe, n=3)("a cow", generator=seeded(), output_type="pt", **CALL)
    ledger = found.search.ledger
    assert sum(rows) == ledger.nfe > 3 * 2 * 3 and ledger.retries > 0
    assert torch.allclose(whole.images, found.images, atol=1e-4)


def test_the_ledger_agrees_with_an_independent_hook(pipe):
    with RealRows(pipe) as rows:
        found = wrap(pipe, n=3)("a cow", generator=seeded(), **CALL)
    assert sum(rows) == found.search.ledger.nfe == 3 * 2 * 3
