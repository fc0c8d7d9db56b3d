"""Batches in the sizes that a compiled model has seen; what a run will hold in memory, known before it runs."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch
from contract.cases import PixelReward, changed, tight
from tiny import build

from visearch.budget import Budget, Ledger, MeteredSampler, memory_bytes
from visearch.memory import TensorMemory, human, plan, probe, tracked
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import EtaStep, Request, Sde
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN
from visearch.search.cached_drafts import CachedDrafts
from visearch.search.successive_halving import SuccessiveHalving

IMAGE_CALL = {"num_inference_steps": 4, "height": 32, "width": 32}


def finish(sampler, search, request, budget=None, **options):
    *_, last = run_search(sampler, PixelReward(), search, request, budget, **options)
    assert last.result.error is None
    return last.result


# --- batch buckets ----------------------------------------------------------------------------------------------


def sizes_seen(model) -> list[int]:
    """Rows of everything that a layer is called with."""
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    ("rows", "buckets", "limit", "parts"),
    [
        (6, (1, 2, 4, 8), None, {4, 2}),
        (7, (4, 2, 1), None, {4, 2, 1}),
        (13, (1, 8), None, {8, 1}),
        (6, (1, 2, 4, 8), 3, {2}),
        (6, (1, 2, 4, 8), 1, {1}),
    ],
)
def test_the_denoiser_sees_bucket_sizes_only(rows, buckets, limit, parts):
    pipe = build("cogview4")  # one model call for each guidance branch, so a call's rows are the candidates
    sampler, request, search = DiffusionSampler(pipe, IMAGE_CALL), Request(("a cow",), seed=3), BestOfN(rows, rows)
    seen = sizes_seen(pipe.transformer.transformer_blocks[0])  # an inner layer: replay stubs the model itself
    whole = finish(sampler, search, request)
    assert set(seen) == {rows}
    seen.clear()
    split = finish(sampler, search, request, rows=limit, batch_buckets=buckets)
    assert set(seen) == parts
    assert sum(seen) == split.ledger.nfe == whole.ledger.nfe  # nothing is padded
    assert {c["batches"][0]["rows"] for c in split.ranking} == parts
    assert [c["id"] for c in split.ranking] == [c["id"] for c in whole.ranking]
    for key, sample in whole.samples.items():
        assert torch.allclose(split.samples[key], sample, rtol=0, atol=1e-4)


def test_rows_that_the_sampler_runs_apart_are_bucketed_apart():
    sampler = GaussianToy()
    sampler.batch_key = lambda prompt, candidate: prompt % 2
    metered = MeteredSampler(sampler, Ledger(), batch_buckets=(1, 2, 4))
    request = Request(("a", "b", "c"), seed=3)
    rows = metered.advance(metered.init(request, request.seeds(0, 3)), 8)
    assert [b[0].rows for b in rows.batches] == [2, 2, 1] * 3
    straight = sampler.advance(sampler.init(request, request.seeds(0, 3)), 8)
    assert torch.equal(rows.state.tensors["x"], straight.state.tensors["x"])


def test_out_of_memory_falls_to_the_next_bucket():
    sampler = changed(GaussianToy(), advance=tight(5))
    result = finish(sampler, BestOfN(n=8), Request(("a",)), batch_buckets=(1, 3, 8))
    assert result.ledger.retries == 1
    assert [c["batches"][0]["rows"] for c in sorted(result.ranking, key=lambda c: c["candidate"])] == [3] * 6 + [1] * 2


def test_what_one_view_learned_when_memory_ran_out_all_views_know():
    """A search may ask for its view anew in every round."""
    metered = MeteredSampler(changed(GaussianToy(), advance=tight(2), decode=tight(2)), ledger := Ledger())
    request = Request(("a",), seed=3)
    for transition in (Sde(), EtaStep(), Sde()):
        view = metered.view(transition=transition)
        view.decode(view.advance(view.init(request, request.seeds(0, 8)), 8))
    assert ledger.retries == 2 * 2  # 8, 4, 2 in the model and in the decoder, once and for all
    rows = metered.advance(metered.init(request, request.seeds(0, 8)), 8)
    assert ledger.retries == 4 and {b[0].rows for b in rows.batches} == {2}


@pytest.mark.parametrize("buckets", [(), (2, 4), (0, 1), (1, -2)])
def test_buckets_that_cannot_sum_to_every_size_are_refused(buckets):
    with pytest.raises(ValueError, match="batch_buckets"):
        MeteredSampler(GaussianToy(), Ledger(), batch_buckets=buckets)


# --- measuring --------------------------------------------------------------------------------------------------


def test_storages_count_once_and_only_while_they_live():
    before = torch.zeros(1000)
    with TensorMemory() as memory:
        view = before[:10]
        before.add_(1)
        assert memory.live == 0 and view.untyped_storage()._cdata == before.untyped_storage()._cdata
        made = before + 1
        part = made.view(10, 100)[2].detach()
        assert memory.live == 4000
        del made
        assert memory.live == 4000  # a view keeps all of its storage
        del part
        assert memory.live == 0
        grown = torch.empty(0).resize_(100)
        assert memory.live == 400
        for _ in range(3):
            before * 2
        assert memory.live == 400 and memory.peak == 4400
        del grown
    after = torch.zeros(5000)
    assert memory.live == 0 and memory.peak == 4400 and len(after) == 5000


def test_storages_without_memory_count_as_those_with():
    with TensorMemory(["meta"]) as memory:
        kept = torch.empty(100, device="meta")
        both = torch.cat([kept, kept])
        torch.empty(100)
        assert memory.live == 1200 and both.shape == (200,)
    assert memory.peak == 1200


@pytest.mark.parametrize(
    ("given", "size"),
    [(10, 10), ("10", 10), ("8GiB", 8 * 2**30), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("7B", 7), ("1TB", 10**12)],
)
def test_amounts_of_memory(given, size):
    assert memory_bytes(given) == size == Budget(max_memory=given).max_memory


@pytest.mark.parametrize("given", [0, -1, "", "much", "8 gigs", "GiB", "0.1B", "8GiBs"])
def test_no_amounts_of_memory(given):
    with pytest.raises(ValueError, match="max_memory="):
        Budget(max_memory=given)


def test_bytes_as_a_person_reads_them():
    assert [human(n) for n in (0, 1023, 1536, 8 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "8.0 GiB"]


# --- predictions ------------------------------------------------------------------------------------------------


def emoji():
    from visearch.pipelines import emoji

    return emoji.load(), {**emoji.DEFAULTS, "num_inference_steps": 3}, "a photo of two cows"


WORLDS = {
    "sd": lambda: (build("sd"), IMAGE_CALL, "a cow"),
    "wan": lambda: (
        build("wan"),
        {"num_inference_steps": 4, "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16},
        "a cow",
    ),
    "emoji-64": emoji,
}


@cache
def world(name: str):
    pipe, call, prompt = WORLDS[name]()
    sampler, reward = DiffusionSampler(pipe, call), PixelReward()
    request = Request((prompt,), seed=3)
    return pipe, call, request, sampler, reward, probe(sampler, reward, request)


def near(predicted: float, measured: float) -> bool:
    return abs(predicted - measured) <= 0.15 * measured


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("rows", [1, 6])
def test_peaks_of_model_and_decoder(name, rows):
    *_, request, sampler, _, footprint = world(name)
    start = sampler.init(request, request.seeds(0, rows))
    gc.collect()
    with torch.no_grad(), tracked() as memory:
        done = sampler.advance(start, sampler.num_stages)
    assert near(footprint.advance(rows), memory.peak)
    with torch.no_grad(), tracked() as memory:
        sampler.decode(done)
    assert near(footprint.decode(rows), memory.peak)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(
    ("search", "sizes"),
    [
        (BestOfN(n=6), {}),
        (BestOfN(n=7, batch=4), {"rows": 3, "decode_rows": 2, "batch_buckets": (1, 2)}),
        (SuccessiveHalving(n=6, calls=(0.5,), keep=(0.5,)), {"rows": 4, "decode_rows": 2}),
    ],
    ids=["whole", "rounds", "halving"],
)
def test_peak_of_a_whole_run(name, search, sizes):
    pipe, call, request, sampler, reward, _ = world(name)
    expected = plan(sampler, reward, search, request, **sizes)
    fresh, again = DiffusionSampler(pipe, call), Request(request.prompts, seed=3)  # nothing encoded yet
    gc.collect()
    with tracked() as memory:
        result = finish(fresh, search, again, **sizes)
    assert near(expected.peak_memory, memory.peak)
    assert (expected.nfe, expected.decodes) == (result.ledger.nfe, result.ledger.decodes)
    assert expected.rewards == result.ledger.rewards["pixel"] and result.ledger.probes == {}


@pytest.mark.parametrize("name", WORLDS)
def test_previews_one_by_one_need_less_than_in_one_batch(name):
    """The traces of PSP (2607.21591): decoding all previews at once sets the peak, one at a time the model does."""
    *_, request, sampler, reward, _ = world(name)
    seen = {}
    rows = sampler.advance(sampler.init(request, request.seeds(0, 8)), 1)
    for size in (None, 1):
        metered = MeteredSampler(sampler, Ledger(), decode_rows=size)
        gc.collect()
        with torch.no_grad(), tracked() as memory:
            metered.decode(metered.predict_x0(rows))
        seen[size] = memory.peak
    assert seen[1] < 0.4 * seen[None]
    together, apart = (plan(sampler, reward, BestOfN(n=8), request, rows=1, decode_rows=d) for d in (8, 1))
    assert together.peak_at == "decoder" and apart.peak_memory < 0.5 * together.peak_memory


# --- the plan ---------------------------------------------------------------------------------------------------


def test_batches_are_cut_to_fit_and_the_run_stays_below():
    pipe, call, request, sampler, reward, footprint = world("sd")
    limit = int(3.2 * footprint.advance(1))  # two rows at once and what eight hold between operations
    found = plan(sampler, reward, BestOfN(n=8), request, Budget(max_memory=limit))
    assert found.peak_memory <= limit == found.max_memory
    assert found.rows == 2 and 1 <= found.decode_rows <= 3
    sampler = DiffusionSampler(pipe, call)
    gc.collect()
    with tracked() as memory:  # the probes keep to the limit, too
        result = finish(sampler, BestOfN(n=8), request, Budget(max_memory=limit))
    assert memory.peak <= limit and result.ledger.probes["nfe"] > 0
    assert {c["batches"][0]["rows"] for c in result.ranking} == {2}
    free = finish(sampler, BestOfN(n=8), request)
    assert {c["batches"][0]["rows"] for c in free.ranking} == {8}
    assert [c["id"] for c in free.ranking] == [c["id"] for c in result.ranking]


def test_drafts_are_rehearsed_as_drafts_and_full_runs_as_full_runs():
    """Two drafts at a time, but the best four of them run again together."""
    search = CachedDrafts(BestOfN(n=8, batch=2), m=4, cache={"every": 2, "warmup": 1})
    found = plan(GaussianToy(), PixelReward(), search, Request(("a",)))
    result = finish(GaussianToy(), search, Request(("a",)))
    assert found.rows == found.decode_rows == found.reward_rows == 4
    assert max(c["batches"][-1]["rows"] for c in result.ranking) == 4 and found.nfe == result.ledger.nfe


def test_without_a_limit_all_rows_run_at_once():
    *_, request, sampler, reward, _ = world("sd")
    found = plan(sampler, reward, BestOfN(n=6), request)
    assert (found.rows, found.decode_rows, found.reward_rows, found.max_memory) == (6, 6, 6, None)
    kept = plan(sampler, reward, BestOfN(n=6), request, Budget(max_nfe=4 * sampler.nfe(0, 4)), decode_rows=2)
    assert (kept.nfe, kept.decodes, kept.rewards, kept.images) == (4 * sampler.nfe(0, 4), 4, 4, pytest.approx(4))
    assert (kept.rows, kept.decode_rows) == (4, 2)
    text = str(kept)
    assert (
        "32 model rows" in text and "4 rows in the model, 2 in the decoder" in text and human(kept.peak_memory) in text
    )


def test_too_little_memory_for_one_row_is_refused_before_the_search():
    pipe, call, request, _, reward, footprint = world("sd")
    ledger = Ledger()
    with pytest.raises(ValueError, match=r"max_memory=.* is too small: .* one row in the"):
        run = run_search(
            DiffusionSampler(pipe, call),
            reward,
            BestOfN(n=4),
            request,
            Budget(max_memory=int(0.9 * footprint.advance(1))),
            ledger=ledger,
        )
        next(run)
    assert ledger.nfe == ledger.decodes == 0 and ledger.probes["nfe"] > 0


def test_memory_that_the_candidates_themselves_fill_is_refused_with_the_remedy():
    request, toy = Request(("a",)), GaussianToy()
    whole = plan(toy, PixelReward(), BestOfN(n=64, batch=64), request)
    with pytest.raises(ValueError, match="ask for fewer"):
        plan(toy, PixelReward(), BestOfN(n=64, batch=64), request, Budget(max_memory=whole.peak_memory // 2))


def test_probes_are_booked_apart_and_made_once():
    request, toy, reward, ledger = Request(("a",)), GaussianToy(), PixelReward(), Ledger()
    probe(toy, reward, request, ledger)
    rows = 1 + 2 + 3
    assert ledger.probes == {"nfe": rows * toy.nfe(0, 2), "decodes": rows, "rewards": rows}
    assert ledger.nfe == ledger.decodes == 0 and not ledger.rewards and ledger.encodes > 0
    again = Ledger()
    probe(toy, reward, Request(("b",), seed=9), again)
    assert again.probes == {} and again.seconds == {}
    probe(toy, reward, Request(("b",), call={"height": 32}), again)
    assert again.probes["decodes"] == rows
    assert Ledger.from_dict(again.as_dict()).probes == again.probes


def test_probes_that_a_limit_cut_short_are_made_again_under_a_larger_one():
    request, toy, reward = Request(("a",)), GaussianToy(), PixelReward()
    one = probe(GaussianToy(), reward, request).advance(1)
    counts = []
    for limit in (1.5 * one, 1.2 * one, 100 * one, 1.5 * one, None):
        ledger = Ledger()
        footprint = probe(toy, reward, request, ledger, limit)
        counts.append((ledger.probes["nfe"] // toy.nfe(0, 2), len(footprint.advance.measured)))
    assert counts == [(1, 1), (0, 1), (6, 3), (0, 3), (0, 3)]


def test_a_reward_that_cannot_hold_two_rows_gets_one():
    class Narrow(PixelReward):
        def score(self, samples, prompts, **context):
            if len(prompts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().score(samples, prompts, **context)

    request, reward = Request(("a",)), Narrow()
    found = plan(GaussianToy(), reward, BestOfN(n=4), request, Budget(max_memory="1GiB"))
    assert (found.rows, found.decode_rows, found.reward_rows) == (4, 4, 1)
    result = finish(GaussianToy(), BestOfN(n=4), request, Budget(max_memory="1GiB"))
    assert result.ledger.retries == 0


def test_the_ledger_says_what_its_peak_is():
    ledger = Ledger()
    ledger.begin_memory()
    assert ledger.peak_memory_of.startswith("process") and ledger.peak_memory > 0
    held = torch.ones(ledger.peak_memory // 4)  # as many bytes as the process ever had, on top of what it has now
    assert ledger.peak_memory_of.startswith("run") and ledger.as_dict()["peak_memory_bytes"] >= held.nbytes


def test_a_wrapped_pipeline_plans_its_calls_and_keeps_to_them():
    import visearch

    pipe = visearch.SearchPipeline(
        build("sd"), PixelReward(), BestOfN(n=4), Budget(max_memory="1.2MiB"), batch_buckets=(1, 2, 4)
    )
    state = torch.get_rng_state()
    found = pipe.plan("a cow", **IMAGE_CALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(found, visearch.Plan) and (found.rows, found.decodes) == (2, 4)
    result = pipe("a cow", generator=torch.Generator().manual_seed(1), **IMAGE_CALL).search
    assert {c["batches"][0]["rows"] for c in result.ranking} == {2}
    assert result.ledger.nfe == found.nfe and result.ledger.probes == {}  # made by the plan
