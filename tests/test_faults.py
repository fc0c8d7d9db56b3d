"""What goes wrong in rewards, budgets and arguments: clear lines, nothing finished is lost."""

from __future__ import annotations

import math

import pytest
import torch
from contract.cases import PixelReward

from visearch.budget import Budget, Ledger, MeteredReward, MeteredSampler, RewardError
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import Registry, Request, Scores
from visearch.rewards import resolve
from visearch.rewards.combine import WeightedSum
from visearch.run import run_search
from visearch.search import SEARCHES
from visearch.search.best_of_n import BestOfN


class Faulty(PixelReward):
    """A pixel reward whose ``fault(values, call)`` may change or replace what it returns."""

    name = "faulty"

    def __init__(self, fault) -> None:
        super().__init__()
        self.fault = fault

    def score(self, samples, prompts, **kwargs) -> Scores:
        values = super().score(samples, prompts, **kwargs).values
        return Scores(self.fault(values, len(self.calls)))


def finish(reward, n=4, batch=2, prompts=("a",), **options):
    search = BestOfN(n=n, batch=batch)
    return list(run_search(GaussianToy(), reward, search, Request(tuple(prompts)), **options))[-1].result


def fail(text="the GPU fell off"):
    raise RuntimeError(text)


def test_a_reward_that_fails_once_is_retried():
    result = finish(Faulty(lambda v, call: fail() if call == 1 else v))
    assert result.stopped == "done" and result.ledger.retries == 1 and not result.warnings
    assert all(math.isfinite(c["score"]) for c in result.ranking)


def test_one_bad_sample_does_not_take_its_batch_along():
    bad = float(GaussianToyScores.second)
    result = finish(Faulty(lambda v, call: fail() if torch.isclose(v, torch.tensor(bad)).any() else v))
    scores = {c["candidate"]: c["score"] for c in result.ranking}
    assert scores[1] == -math.inf and all(math.isfinite(scores[k]) for k in (0, 2, 3))
    assert any("scored -inf" in w and "the GPU fell off" in w for w in result.warnings)


class GaussianToyScores:
    second = next(c["score"] for c in finish(PixelReward()).ranking if c["candidate"] == 1)


def test_nan_is_minus_infinity_with_a_warning():
    result = finish(Faulty(lambda v, call: torch.where(torch.arange(len(v)) == 0, math.nan, v)))
    assert {c["candidate"] for c in result.ranking if c["score"] == -math.inf} == {0, 2}
    assert any("NaN" in w for w in result.warnings)


def test_if_every_sample_fails_candidate_0_is_returned():
    with pytest.warns(UserWarning, match="every candidate"):
        result = finish(Faulty(lambda v, call: fail()))
    assert result.winners().candidate == (0,)
    assert any("every candidate of 'a'" in w for w in result.warnings)


def test_wrong_length_ends_the_run_and_keeps_what_was_finished():
    result = finish(Faulty(lambda v, call: v[:-1] if call == 4 else v))
    assert result.stopped == "failed" and isinstance(result.error, RewardError)
    assert "shape (1,) for 2 samples" in str(result.error) and "one number a sample" in str(result.error)
    assert len(result.finished) == 2


def test_wrong_order_is_noticed():
    for fault in (lambda v, call: v.flip(0), lambda v, call: v.roll(1), lambda v, call: v.sort(descending=True).values):
        results = [finish(Faulty(fault), n=4, batch=4, prompts=(prompt,)) for prompt in ("a", "b")]
        assert any(r.stopped == "failed" and "input order" in str(r.error) for r in results)


def test_a_constant_reward_is_no_order_fault_and_ties_go_to_candidate_0():
    result = finish(Faulty(lambda v, call: torch.zeros_like(v)))
    assert result.stopped == "done" and result.winners().candidate == (0,)


def test_lower_is_better_rewards_are_flipped():
    class Distance(PixelReward):
        name, higher_is_better = "distance", False

    up, down = finish(PixelReward()), finish(Distance())
    assert up.ranking[0]["candidate"] == down.ranking[-1]["candidate"]
    assert down.ranking[0]["score"] == -min(-c["score"] for c in down.ranking)


@pytest.mark.parametrize("field", ["n", "batch"])
def test_best_of_n_refuses_less_than_one(field):
    with pytest.raises(ValueError, match=f"{field}=0 must be at least 1"):
        BestOfN(**{field: 0})


def test_a_cap_in_image_equivalents():
    result = finish(PixelReward(), n=9, budget=Budget(max_images=3.9))
    assert len(result.finished) == 3 and result.ledger.images == pytest.approx(3)
    with pytest.raises(ValueError, match="too small"):
        finish(PixelReward(), budget=Budget(max_images=0.9))


def test_an_unforeseen_error_keeps_what_was_finished(monkeypatch):
    sampler, calls = GaussianToy(), []
    decode = sampler.decode

    def broken(rows):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return decode(rows)

    sampler.decode = broken
    last = list(run_search(sampler, PixelReward(), BestOfN(n=4, batch=2), Request(("a",))))[-1].result
    assert last.stopped == "failed" and "illegal memory access" in str(last.error) and len(last.finished) == 2


@pytest.mark.parametrize("limits", [{"max_nfe": 0}, {"max_seconds": -1.0}, {"patience": 0}, {"max_images": 0}])
def test_budget_limits_must_be_positive(limits):
    (name, _), *_ = limits.items()
    with pytest.raises(ValueError, match=f"{name}=.* greater than 0"):
        Budget(**limits)


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match="unknown search 'best-of-k'; did you mean 'best-of-n'"):
        SEARCHES.load("best-of-k")
    with pytest.raises(ValueError, match="unknown reward 'emoji-clop'; did you mean 'emoji-clip'"):
        resolve("emoji-clop")
    with pytest.raises(TypeError, match="function \\(images, prompts\\)"):
        resolve(3)


def test_a_registry_refuses_to_overwrite():
    registry = Registry("search", {"a": "m:A"})
    registry.add("a", "m:A")
    with pytest.raises(ValueError, match="already m:A"):
        registry.add("a", "m:B")


def test_any_function_is_a_reward():
    seen = []

    def brightness(images, prompts):
        seen.extend((type(i).__name__, p) for i, p in zip(images, prompts))
        return [float(sum(i.getpixel((0, 0)))) for i in images]

    result = finish(resolve(brightness))
    assert result.stopped == "done" and result.ledger.rewards["brightness"] == 4
    assert set(seen) == {("Image", "a")}


def test_a_request_checks_its_lengths():
    with pytest.raises(ValueError, match="prompts is empty"):
        Request(())
    with pytest.raises(ValueError, match="negative_prompt has 1 entries for 2 prompts"):
        Request(("a", "b"), per_prompt={"negative_prompt": ["x"]})


def test_equal_prompts_get_different_candidates():
    request = Request(("a", "a"))
    assert request.seed_of(0, 1) != request.seed_of(1, 1) and request.seed_of(0, 0) == request.seed_of(1, 0)


def test_a_users_generator_is_continued_and_not_advanced():
    own = torch.Generator().manual_seed(5)
    torch.rand(3, generator=own)
    state = own.get_state()
    request = Request(("a",), generators=(own,))
    rows = GaussianToy().init(request, request.seeds(0, 1))
    expected = torch.Generator()
    expected.set_state(state)
    assert torch.equal(rows.state.tensors["x"][0], torch.randn(48, generator=expected, dtype=torch.float64))
    assert torch.equal(own.get_state(), state)


def test_a_full_disk_costs_the_checkpoint_only(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visearch.run.save_state", full)
    with pytest.warns(UserWarning, match="No space left"):
        result = finish(PixelReward(), checkpoint=tmp_path)
    assert result.stopped == "done" and any("No space left" in w for w in result.warnings)


def test_a_torn_checkpoint_falls_back_to_the_last_complete_round(tmp_path):
    run = run_search(GaussianToy(), PixelReward(), BestOfN(n=6, batch=2), Request(("a",)), checkpoint=tmp_path)
    next(run)
    run.close()
    torn = tmp_path / "round-000002"
    torn.mkdir()
    (torn / "state.json").write_text('{"state": {"fin')
    result = list(run_search(GaussianToy(), PixelReward(), BestOfN(n=6, batch=2), Request(("a",)), checkpoint=tmp_path))
    assert result[-1].result.stopped == "done" and len(result[-1].result.finished) == 6


def test_patience_closes_a_prompt_that_stopped_improving():
    result = finish(Faulty(lambda v, call: torch.zeros_like(v)), n=20, batch=1, budget=Budget(patience=3))
    assert result.stopped == "closed" and len(result.finished) == 4


def test_cancel_returns_the_best_so_far():
    ledger, search = Ledger(), BestOfN(n=6, batch=2)
    rounds = run_search(
        GaussianToy(), PixelReward(), search, Request(("a",)), cancelled=lambda: ledger.nfe > 0, ledger=ledger
    )
    last = list(rounds)[-1].result
    assert last.stopped == "cancelled" and len(last.finished) == 2


def test_advance_only_to_milestones_ahead():
    sampler = MeteredSampler(GaussianToy(steps=4), Ledger())
    request = Request(("a",))
    rows = sampler.advance(sampler.init(request, request.seeds(0, 1)), 2)
    for to in (2, 1, 5):
        with pytest.raises(ValueError, match="milestones ahead: \\[3, 4\\]"):
            sampler.advance(rows, to)


@pytest.mark.parametrize("name", ["rows", "decode_rows"])
def test_row_limits_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        MeteredSampler(GaussianToy(), Ledger(), **{name: 0})


def test_reward_batches_split_and_keep_order():
    reward = PixelReward()
    metered = MeteredReward(reward, ledger := Ledger(), batch_size=2)
    samples = torch.rand(5, 3, 4, 4)
    values = metered(samples, list("abcde"))
    assert reward.calls == [2, 2, 1, 1, 1] and ledger.rewards["pixel"] == 5
    assert torch.equal(values, PixelReward().score(samples, "abcde").values.float())


def test_the_callers_grad_mode_is_left_alone_between_rounds():
    rounds = run_search(GaussianToy(), PixelReward(), BestOfN(n=4, batch=2), Request(("a",)))
    next(rounds)
    assert torch.is_grad_enabled()
    rounds.close()


def test_a_checkpoint_of_another_call_is_refused(tmp_path):
    """Guidance is no part of the prompt, but rows of two guidance scales do not belong together."""

    def first_round(scale: float):
        request = Request(("a cow",), seed=1, call={"guidance_scale": scale})
        return next(run_search(GaussianToy(), PixelReward(), BestOfN(n=4, batch=1), request, checkpoint=tmp_path))

    first_round(3.0)
    with pytest.raises(ValueError, match="of another run"):
        first_round(5.0)


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_checkpoint_of_a_reward_of_other_weights_is_refused(tmp_path, ensemble):
    def first_round(weights: str):
        reward, blind = PixelReward(), PixelReward()
        reward.config_hash, blind.name = weights, "blind"
        guide = WeightedSum([reward, blind]) if ensemble else reward  # of which one member has no hash
        return next(
            run_search(GaussianToy(), guide, BestOfN(n=4, batch=1), Request(("a cow",), seed=1), checkpoint=tmp_path)
        )

    assert first_round("1").index == 1 and first_round("1").index == 2
    with pytest.raises(ValueError, match="of another run"):
        first_round("2")
