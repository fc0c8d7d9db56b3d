"""Prompts rewritten per candidate: the generator reads the new text, the reward the original."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from visearch import BestOfN, SearchPipeline
from visearch.budget import Budget
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.protocols import Request
from visearch.run import regenerate, run_search
from visearch.search.successive_halving import SuccessiveHalving

CALL = {"num_inference_steps": 3, "height": 32, "width": 32}
WORDS = ("a red dog", "two blue cars and a horse", "a cat")


def rewrite(prompt: str, candidate: int) -> str:
    return f"{prompt}, {WORDS[candidate % 3]}"


@pytest.fixture(scope="module", params=("sd", "cogview4"))
def pipe(request):
    return tiny.build(request.param)


class Reads:
    """A reward that keeps the texts it was given."""

    def __init__(self) -> None:
        self.texts: set[str] = set()

    def __call__(self, images, prompts):
        self.texts |= set(prompts)
        return [sum(i.convert("L").get_flattened_data()) / 255 for i in images]


def test_each_candidate_is_the_plain_call_with_its_own_text(pipe):
    reward = Reads()
    searched = SearchPipeline(pipe, reward, BestOfN(n=4), rewrite=rewrite)
    result = searched(list(WORDS[:2]), generator=torch.Generator().manual_seed(3), **CALL).search
    assert reward.texts == set(WORDS[:2])
    for candidate in result.ranking:
        prompt, k = WORDS[candidate["prompt"]], candidate["candidate"]
        text = prompt if k == 0 else rewrite(prompt, k)
        assert candidate["text"] == text
        plain = pipe(text, generator=torch.Generator().manual_seed(candidate["seed"]), output_type="pt", **CALL)
        assert torch.allclose(plain.images[0], result.samples[candidate["prompt"], candidate["id"]], atol=1e-4)


def test_one_candidate_keeps_the_prompt(pipe):
    searched = SearchPipeline(pipe, Reads(), BestOfN(n=1), rewrite=rewrite)
    for call in (pipe, searched):
        images = call("a cat", generator=torch.Generator().manual_seed(3), output_type="pt", **CALL).images
    plain = pipe("a cat", generator=torch.Generator().manual_seed(3), output_type="pt", **CALL).images
    assert torch.equal(images, plain)


def test_pruned_survivors_keep_their_texts(pipe):
    search = SuccessiveHalving(n=4, calls=(1, 2), keep=(0.5, 1))
    searched = SearchPipeline(pipe, Reads(), search, rewrite=rewrite)
    result = searched("a cat", generator=torch.Generator().manual_seed(3), **CALL).search
    (best,) = result.ranking
    text = "a cat" if best["candidate"] == 0 else rewrite("a cat", best["candidate"])
    plain = pipe(text, generator=torch.Generator().manual_seed(best["seed"]), output_type="pt", **CALL).images[0]
    assert torch.allclose(plain, result.samples[0, best["id"]], atol=1e-4)


def test_a_rewriter_is_asked_once_also_after_a_restart(pipe, tmp_path):
    asked = []

    def counting(prompt: str, candidate: int) -> str:
        asked.append(candidate)
        return f"{prompt} {len(asked)}"  # another answer each time, as a language model gives

    def rounds():
        sampler = DiffusionSampler(pipe, CALL)
        request = Request(("a cat",), seed=1, rewrite=counting)
        search, reward = BestOfN(n=4, batch=2), _Mean()
        return run_search(sampler, reward, search, request, Budget(), checkpoint=tmp_path), sampler

    (first, *_), _ = (list(itertools.islice(rounds()[0], 1)), None)
    (*_, last), sampler = (list((made := rounds())[0]), made[1])
    assert asked == [1, 2, 3]
    texts = {c["candidate"]: c["text"] for c in last.result.ranking}
    assert texts == {0: "a cat", 1: "a cat 1", 2: "a cat 2", 3: "a cat 3"}
    assert len(first.result.finished) == 2
    again = regenerate(sampler, last.result.request, last.result.winners(), exact=False)
    assert again.drift < 1e-4


class _Mean:
    name, higher_is_better, range = "mean", True, (0.0, 1.0)
    licence, source, needs = "Apache-2.0", "tests", frozenset({"pixels"})

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        from visearch.protocols import Scores

        return Scores(samples.flatten(1).mean(1).float())


@pytest.mark.parametrize("text", ["", "  ", None, 3])
def test_a_rewriter_that_gives_no_text_is_named(pipe, text):
    searched = SearchPipeline(pipe, Reads(), BestOfN(n=2), rewrite=lambda prompt, candidate: text)
    with pytest.raises(ValueError, match="rewrite gave"):
        searched("a cat", **CALL)


def test_rewriting_needs_texts(pipe):
    with pytest.raises(ValueError, match="rewrite needs prompts"):
        SearchPipeline(pipe, Reads(), BestOfN(n=2), rewrite="shout")("a cat", **CALL)
