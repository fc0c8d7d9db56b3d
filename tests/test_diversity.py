"""Set selection: the checks of its specification, on random items and by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import pytest
import tiny
import torch
from contract.cases import PixelReward
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from visearch import BestOfN, Budget, Keep, Ledger, Request, SearchPipeline, SuccessiveHalving, plan, run_search
from visearch.budget import Evaluator, MeteredFeatures, MeteredReward, MeteredSampler
from visearch.cli import main
from visearch.diversity import METHODS, _distinct, _dpp, _exchange, _exhaustive, _greedy, _terms, diverse_subset
from visearch.diversity import _value as value
from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.rewards import resolve
from visearch.rewards.features import resolve_features, thumbnails
from visearch.selection import prune, top_k

WEIGHED = ("auto", "exhaustive", "greedy", "dpp")
# Each of four directions has two images close to it; by quality alone, the first direction takes the first places.
ANGLES = torch.tensor([0, 2, 90, 93, 180, 184, 270, 275]).deg2rad()
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
FALLING = torch.arange(8, 0, -1.0)


@st.composite
def items(draw, least: int = 2, most: int = 9):
    """Qualities on a coarse grid, so that they tie, and features without copies up to that."""
    count = draw(st.integers(least, most))
    quality = draw(st.lists(st.integers(-8, 8), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = torch.randn(count, draw(st.integers(2, 6)), generator=generator)
    return torch.tensor(quality) / 4, features, draw(st.integers(1, count))


def cosine_distances(features: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.normalize(features.double(), dim=1)
    return (1 - x @ x.T).clamp_min(0)


def objective(quality, features, chosen, weight=1.0) -> float:
    """By the printed formula, one pair at a time."""
    q, d = quality.double(), cosine_distances(features)
    pairs = torch.stack([d[i, j] for i, j in combinations(range(len(q)), 2)])

    def z(v, among):
        spread = among.std(correction=0)
        return float((v - among.mean()) / spread) if spread > 1e-9 else 0.0

    goodness = sum(z(q[i], q) for i in chosen) / len(chosen)
    spread = [z(d[i, j], pairs) for i, j in combinations(chosen, 2)]
    return goodness + (weight * sum(spread) / len(spread) if spread else 0.0)


@pytest.mark.parametrize("method", WEIGHED)
@settings(deadline=None, max_examples=40)
@given(items())
def test_without_weight_the_best_are_chosen(method, drawn):
    quality, features, k = drawn
    best = sorted(range(len(quality)), key=lambda i: (-float(quality[i]), i))[:k]
    assert diverse_subset(quality, features, k, method, weight=0) == best
    assert diverse_subset(quality, features, k, method, weight=0, scale="sums") == best


@settings(deadline=None, max_examples=60)
@given(items(), st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from(["means", "sums"]))
def test_exchanges_beat_greedy_choice_and_trying_all_beats_both(drawn, weight, scale):
    quality, features, k = drawn
    order = quality.argsort(descending=True, stable=True)
    q, d = _terms(quality[order].double(), cosine_distances(features)[order][:, order], k, weight, scale)
    d = d.fill_diagonal_(0)
    sets = [_greedy(q, d, k), _exchange(q, d, _greedy(q, d, k)), _exhaustive(q, d, k)]
    assert all(len(set(s)) == k for s in sets)
    greedy, exchanged, best = (float(v) for v in value(q, d, torch.tensor(sets)))
    assert greedy <= exchanged + 1e-9 and exchanged <= best + 2e-9


@settings(deadline=None, max_examples=40)
@given(items(most=7), st.sampled_from([0.3, 1.0, 4.0]))
def test_exhaustive_is_the_maximum_of_the_printed_formula(drawn, weight):
    quality, features, k = drawn
    found = objective(quality, features, diverse_subset(quality, features, k, "exhaustive", weight=weight), weight)
    every = [objective(quality, features, s, weight) for s in combinations(range(len(quality)), k)]
    assert found == pytest.approx(max(every), abs=1e-6)


def test_exchanges_mend_what_greedy_choice_did_wrong():
    """The best item lies between the two that belong together."""
    q = torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64)
    d = torch.tensor([[0, 0.5, 0.5], [0.5, 0, 2], [0.5, 2, 0]], dtype=torch.float64)
    assert _greedy(q, d, 2) == [0, 1]
    assert sorted(_exchange(q, d, [0, 1])) == _exhaustive(q, d, 2) == [1, 2]


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(items(least=3), st.randoms(use_true_random=False))
def test_the_order_of_items_changes_nothing(method, drawn, random):
    quality, features, k = drawn
    names = [f"{i:02}" for i in range(len(quality))]
    order = list(range(len(quality)))
    random.shuffle(order)
    straight = diverse_subset(quality, features, k, method, keys=names)
    mixed = diverse_subset(quality[order], features[order], k, method, keys=[names[i] for i in order])
    assert straight == [order[i] for i in mixed]
    assert len(set(straight)) == k
    assert [float(quality[i]) for i in straight] == sorted((float(quality[i]) for i in straight), reverse=True)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=30)
@given(items(least=3, most=7), st.data())
def test_a_copy_never_displaces_a_distinct_item_that_is_as_good(method, drawn, data):
    quality, features, k = drawn
    count = len(quality)
    copied = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3))
    assume(len(_distinct(cosine_distances(features), range(count))) == count)
    more, doubled = torch.cat([quality, quality[copied]]), torch.cat([features, features[copied]])
    chosen = diverse_subset(more, doubled, k, method)
    assert set(chosen) <= set(range(count))  # k distinct ones are there, and of copies the first is the item
    everything = diverse_subset(more, doubled, count + 1, method)
    assert set(range(count)) <= set(everything) and len(everything) == count + 1


@settings(deadline=None, max_examples=40)
@given(items(), st.sampled_from([0.5, 1.0, 2.0]))
def test_gains_of_the_determinantal_process_are_ratios_of_determinants(drawn, weight):
    quality, features, k = drawn
    q, similarity = quality.double(), 1 - cosine_distances(features)
    kernel = ((q[:, None] + q) / (2 * weight)).exp() * similarity
    k = min(k, features.shape[1])  # beyond it the determinant is 0
    chosen, gains = _dpp(q, similarity, k, weight)
    for step, gain in enumerate(gains):
        own, before = chosen[: step + 1], chosen[:step]
        others = [i for i in range(len(q)) if i not in before]

        def determinant(rows):
            return float(torch.linalg.det(kernel[rows][:, rows])) if rows else 1.0

        ratio = determinant(own) / determinant(before)
        if ratio < 1e-6:
            continue  # two of them nearly coincide: the determinants themselves are rounding
        assert math.exp(gain / weight) == pytest.approx(ratio, rel=1e-4)
        best = max(determinant([*before, i]) for i in others) / determinant(before)
        assert ratio == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_of_four_directions_is_chosen(method):
    """On a circle sums of distances are as large for opposite pairs, so the directions are orthogonal here."""
    features = torch.nn.functional.one_hot(torch.arange(8) // 2).float()
    features += 0.1 * torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert diverse_subset(FALLING, features, 4, "greedy", weight=0) == [0, 1, 2, 3]
    assert diverse_subset(FALLING, features, 4, method, weight=4.0 if method in WEIGHED else 1.0) == [0, 2, 4, 6]


def test_coverage_takes_the_best_of_each_mode_and_then_the_best_of_the_rest():
    assert diverse_subset(FALLING, CIRCLE, 6, "coverage") == [0, 1, 2, 3, 4, 6]


def test_coverage_without_modes_is_the_k_best():
    spread = torch.eye(8)  # all equally far apart
    assert diverse_subset(FALLING, spread, 4, "coverage") == [0, 1, 2, 3]


def test_k_means_repeats_with_its_seed():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    quality = features[:, 0]
    sets = [tuple(diverse_subset(quality, features, 7, "k-means", seed=s)) for s in (0, 0, 1, 2, 3)]
    assert sets[0] == sets[1] and len(set(sets)) > 1


def test_sums_as_published_and_means_weigh_differently_as_k_grows():
    quality, features = torch.tensor([3.0, 2.9, 2.8, 0.0, 0.0, 0.0]), torch.eye(6)
    features[:3] = torch.tensor([1.0, 0.1, 0, 0, 0, 0])
    features[1, 1], features[2, 2] = 0.2, 0.2
    for k in (2, 3):
        sums = diverse_subset(quality, features, k, "exhaustive", weight=1.5, scale="sums")
        by_hand = max(
            combinations(range(6), k),
            key=lambda s: (
                float(quality[list(s)].sum())
                + 1.5 * sum(float(cosine_distances(features)[i, j]) for i, j in combinations(s, 2))
            ),
        )
        assert tuple(sorted(sums)) == by_hand


def test_distances_serve_as_well_as_features():
    d = cosine_distances(CIRCLE)
    d = ((d + d.T) / 2).fill_diagonal_(0)
    for method in ("auto", "greedy", "dpp", "coverage"):
        assert diverse_subset(FALLING, None, 4, method, distances=d) == diverse_subset(FALLING, CIRCLE, 4, method)


def test_failed_items_come_last_and_infinite_ones_first():
    quality = torch.tensor([math.nan, 1.0, -math.inf, 2.0, math.inf])
    for method in METHODS:
        features = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        assert set(diverse_subset(quality, features, 3, method)) == {1, 3, 4}
        assert diverse_subset(quality, features, 4, method) in ([4, 3, 1, 2], [4, 3, 1, 0])
        assert diverse_subset(quality, features, 9, method)[:3] == [4, 3, 1]
        assert diverse_subset(quality[:0], features[:0], 2, method) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"method": "gurobi"}, "gurobi.*one of"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"scale": "ranks"}, "scale='ranks'"),
        ({"features": None}, "neither features nor distances"),
        ({"features": torch.ones(3, 2)}, r"\(3, 2\) for 8"),
        ({"features": torch.full((8, 2), math.nan)}, "finite"),
        ({"features": None, "distances": -torch.ones(8, 8)}, "symmetric"),
        ({"features": None, "distances": torch.zeros(8, 8), "method": "k-means"}, "needs features"),
    ],
)
def test_bad_input_is_refused(change, message):
    given_ = {"quality": FALLING, "features": CIRCLE, "k": 3, **change}
    with pytest.raises(ValueError, match=message):
        diverse_subset(**given_)


def test_too_many_sets_are_refused_by_name_and_greedy_by_auto():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"658008 sets.*greedy"):
        diverse_subset(features[:, 0], features, 5, "exhaustive")
    chosen = diverse_subset(features[:, 0], features, 5)
    assert chosen == diverse_subset(features[:, 0], features, 5, "greedy")


# --- rules on populations -------------------------------------------------------------------------------------


def population(count: int = 8):
    sampler, request = GaussianToy(steps=4), Request(("a", "b"), seed=3)
    rows = sampler.init(request, request.seeds(0, count))
    return rows.scored(torch.cat([FALLING[:count], FALLING[:count].flip(0)]))


def test_a_rule_chooses_within_each_prompt():
    rows, features = population(), torch.cat([CIRCLE, CIRCLE])
    kept, dropped = prune(rows, 4, (0, 1), Keep("coverage"), features)
    assert kept == [0, 2, 4, 6, 9, 11, 13, 15] and len(dropped) == 8
    assert prune(rows, 4, (1,), Keep("coverage"), features)[0] == [9, 11, 13, 15]
    assert sorted(Keep("greedy", weight=0).choose(rows, 3, features)) == sorted(top_k(rows, 3))
    assert prune(rows, 4, (0, 1)) == prune(rows, 4, (0, 1), Keep("greedy", weight=0), features)


def test_survivors_are_rounded_up_and_enough_for_the_set():
    assert [Keep().survivors(rows, 0.5) for rows in (1, 5, 8)] == [1, 3, 4]
    assert [Keep(least=4).survivors(rows, 0.25) for rows in (2, 8, 20)] == [2, 4, 5]
    assert Keep().survivors(20, 0.55) == 11  # 0.55 * 20 is 11.000000000000002


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"method": "best"}, "best"), ({"weight": -0.1}, "weight"), ({"scale": ""}, "scale"), ({"least": 0}, "least=0")],
)
def test_a_bad_rule_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Keep(**fields)


def test_a_rule_needs_features_of_all_rows():
    with pytest.raises(ValueError, match="4 rows for 16"):
        Keep().choose(population(), 2, CIRCLE[:4])


# --- searches -------------------------------------------------------------------------------------------------

COVERING = SuccessiveHalving(n=8, calls=(0.4, 0.7), keep=(0.5, 0.5), rule="coverage", check_cost=0.0)


def colours(samples: torch.Tensor) -> torch.Tensor:
    """Elementwise, as the toy itself: exact on any batch split."""
    return samples.flatten(1)[:, ::5] - 0.5


def run(search, sampler=None, features=colours, prompts=("a", "b"), budget=None, **options):
    request = Request(tuple(prompts), seed=3)
    made = run_search(
        sampler or GaussianToy(steps=20), PixelReward(), search, request, budget, features=features, **options
    )
    return [*made][-1].result


@pytest.mark.parametrize("toy", [lambda: GaussianToy(steps=20), TokenToy])
@pytest.mark.parametrize("rule", ["coverage", "k-means", "greedy", "dpp", "auto"])
def test_halving_by_a_rule_does_not_depend_on_companions_or_chunks(rule, toy):
    search = SuccessiveHalving(n=8, preset="psp", rule=rule)
    whole = run(search, toy())
    for split in (
        run(search, toy(), rows=1, decode_rows=3, reward_rows=2),
        run(search, toy(), rows=3, decode_rows=1),
    ):
        assert [(c["id"], c["score"]) for c in split.ranking] == [(c["id"], c["score"]) for c in whole.ranking]
        assert split.pruned == whole.pruned
    for p, prompt in enumerate(("a", "b")):
        alone = run(search, toy(), prompts=[prompt])
        mine = [c for c in whole.ranking if c["prompt"] == p]
        assert [(c["id"], c["score"]) for c in mine] == [(c["id"], c["score"]) for c in alone.ranking]


def test_halving_by_coverage_keeps_other_rows_than_by_score_and_costs_the_same():
    covering, plain = run(COVERING), run(replace(COVERING, rule=None))
    assert covering.ledger.nfe == plain.ledger.nfe and covering.ledger.decodes == plain.ledger.decodes
    assert covering.ledger.rewards["pixel"] == plain.ledger.rewards["pixel"]
    assert covering.ledger.rewards["features"] == 2 * (8 + 4) and "features" not in plain.ledger.rewards
    assert {c["id"] for c in covering.pruned} != {c["id"] for c in plain.pruned}
    unpruned = {(c["prompt"], c["id"]): c["score"] for c in run(BestOfN(n=8)).ranking}
    assert all(unpruned[c["prompt"], c["id"]] == c["score"] for c in covering.ranking)


def test_a_rule_keeps_enough_for_a_set():
    sampler = GaussianToy(steps=20)
    halving = SuccessiveHalving(n=12, preset="psp", rule=Keep(least=5))
    plan = halving.plan(sampler)
    assert plan.search.keep == (6, 5) and plan.finals == 5
    assert SuccessiveHalving(n=7, preset="psp", rule="coverage").plan(sampler).search.keep == (4, 2)
    assert len(run(halving, prompts=["a"]).finished) == 5
    one = sampler.nfe(0, 20)
    assert halving.plan(sampler, one).search.n == 1 and halving.plan(sampler, one).nfe == one


@pytest.mark.filterwarnings("ignore:halving")  # two candidates and no check left
@pytest.mark.parametrize("least", [1, 3])
def test_a_rule_keeps_to_its_budget(least):
    sampler, search = GaussianToy(steps=20), SuccessiveHalving(n=8, preset="psp", rule=Keep("greedy", least=least))
    for rows in range(40, 400, 37):
        plan = search.plan(sampler, rows)
        spent = run(search, prompts=["a"], budget=Budget(max_nfe=rows)).ledger
        assert spent.nfe == plan.nfe <= rows and spent.decodes == plan.decodes
        assert plan.finals >= min(least, plan.search.n)
    late = run(search, budget=Budget(max_nfe=2 * 40 * 4 - 1))
    assert set(late.winners().prompt.tolist()) == {0, 1}


def test_features_see_the_samples_that_were_scored_and_decode_nothing_again():
    ledger = Ledger()
    sampler, request = MeteredSampler(GaussianToy(steps=4), ledger), Request(("a",), seed=3)
    evaluate = Evaluator(sampler, MeteredReward(PixelReward(), ledger), request, MeteredFeatures(colours, ledger))
    rows = sampler.advance(sampler.init(request, request.seeds(0, 3)), 2)
    scored = evaluate(rows)
    features = evaluate.features(scored)
    assert ledger.decodes == 3 and ledger.rewards["features"] == 3
    assert torch.equal(features, colours(sampler.inner.decode(sampler.predict_x0(rows))))
    ledger.decodes = 0
    fewer = evaluate.features(scored.select([2, 0]))  # other rows are decoded
    assert ledger.decodes == 2 and torch.equal(fewer, features[[2, 0]])
    evaluate.forget()
    assert torch.equal(evaluate.features(scored), features)


def test_a_rule_without_features_is_refused_before_anything_runs():
    sampler = GaussianToy(steps=20)
    sampler.init = lambda *args: pytest.fail("something ran")
    with pytest.raises(ValueError, match="compares candidates by features and none are given"):
        run(COVERING, sampler, features=None)
    with pytest.raises(ValueError, match="one of auto"):
        SuccessiveHalving(rule="best")
    with pytest.raises(TypeError, match="no rule"):
        SuccessiveHalving(rule=3)


@pytest.mark.parametrize(
    "features",
    [
        lambda samples: samples.flatten(1)[:-1],
        lambda samples: samples.flatten(),
        lambda samples: samples.flatten(1) / 0 * 0,
    ],
)
def test_features_that_break_their_contract_end_the_run(features):
    result = run(COVERING, features=features)
    assert result.stopped == "failed" and "features returned shape" in str(result.error)


def test_a_covering_search_resumes(tmp_path):
    whole = run(COVERING)
    request = Request(("a", "b"), seed=3)
    first = run_search(GaussianToy(steps=20), PixelReward(), COVERING, request, features=colours, checkpoint=tmp_path)
    next(first)
    first.close()
    resumed = run(COVERING, checkpoint=tmp_path)
    assert [c["id"] for c in resumed.ranking] == [c["id"] for c in whole.ranking]
    assert resumed.pruned == whole.pruned


def test_a_budget_of_memory_counts_rules():
    sampler, request = GaussianToy(steps=20), Request(("a", "b"), seed=3)
    assert plan(sampler, PixelReward(), COVERING, request).nfe == 2 * COVERING.plan(sampler).nfe
    limited = run(COVERING, budget=Budget(max_memory="1MB"))
    assert [c["id"] for c in limited.ranking] == [c["id"] for c in run(COVERING).ranking]


# --- sets of winners ------------------------------------------------------------------------------------------


def test_a_diverse_set_of_winners_is_chosen_among_all_that_were_finished():
    result = run(BestOfN(n=12, batch=4))
    for rule in (*METHODS, Keep("greedy", weight=3.0)):
        chosen = result.diverse(4, colours, rule)
        assert chosen.prompt.tolist() == [0] * 4 + [1] * 4
        for prompt in (0, 1):
            scores = chosen.score[chosen.prompt == prompt].tolist()
            assert scores == sorted(scores, reverse=True) and len(set(chosen.id)) >= 4
    best, apart = result.winners(4), result.diverse(4, colours, Keep("exhaustive", weight=3.0))
    assert result.diverse(4, colours, Keep("exhaustive", weight=0.0)).id == best.id

    def spread(rows):
        samples = torch.stack([result.samples[0, i] for i in rows.id[:4]])
        return float(cosine_distances(colours(samples)).sum())

    assert spread(apart) > spread(best)
    assert result.ledger.rewards["features"] == 24 * (len(METHODS) + 3)


def test_a_diverse_set_needs_something_to_choose_from():
    result = run(BestOfN(n=2))
    assert len(result.diverse(4, colours)) == 4  # two of each prompt
    with pytest.raises(ValueError, match="k=0"):
        result.diverse(0, colours)
    with pytest.raises(RuntimeError, match="samples are gone"):
        replace(result, samples={}).diverse(2, colours)
    with pytest.raises(RuntimeError, match="before any candidate"):
        replace(result, finished=None).diverse(2, colours)


def test_a_pipeline_returns_a_diverse_set():
    pipe, call = tiny.build("cogview4"), {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}

    def made(**options):
        wrapped = SearchPipeline(pipe, PixelReward(), BestOfN(n=6), **options)
        generator = torch.Generator().manual_seed(1)
        output = wrapped("a cow", num_images_per_prompt=3, generator=generator, **call)
        return output.images, output.search

    judge = PixelReward()
    judge.name = "judge"
    apart, result = made(diversity=Keep("exhaustive", weight=5.0), features="thumbnails", held_out=[judge])
    best, _ = made()
    same, _ = made(diversity=Keep("exhaustive", weight=0.0), features=lambda samples: samples.flatten(1))
    assert torch.equal(same, best) and not torch.equal(apart, best)
    chosen = result.diverse(3, thumbnails, Keep("exhaustive", weight=5.0))
    # The output is decoded for the set, the samples were for a round: other batches, which round differently.
    assert_close(apart, torch.stack([result.samples[0, i] for i in chosen.id]), atol=1e-4, rtol=0)
    assert result.held_out["judge"] == pytest.approx(chosen.score.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="one of auto"):
        SearchPipeline(pipe, PixelReward(), diversity="best")
    with pytest.raises(ValueError, match="no image encoder"):
        SearchPipeline(pipe, PixelReward(), diversity="greedy", features="judge-a")


# --- features -------------------------------------------------------------------------------------------------


def test_thumbnails_tell_layouts_apart_and_take_videos():
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = thumbnails(images)
    assert features.shape == (3, 192) and features.dtype == torch.float32
    by_hand = images.unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean((3, 5)).permute(0, 2, 3, 1).flatten(1) - 0.5
    assert torch.allclose(features, by_hand, atol=1.5 / 255)
    videos = torch.stack([images, images.flip(0)]).repeat_interleave(2, 1)
    assert thumbnails(videos).shape == (2, 768)
    assert torch.equal(thumbnails(videos)[0, :192], features[0]) and torch.equal(
        thumbnails(videos)[1, :192], features[2]
    )
    left, right = torch.zeros(2, 3, 16, 16)
    left[..., :8], right[..., 8:] = 1, 1
    assert cosine_distances(thumbnails(torch.stack([left, right])))[0, 1] == pytest.approx(2)


def test_a_clip_describes_what_it_scores():
    clip = resolve("emoji-clip")
    assert resolve_features(None, clip) == clip.image_features
    assert resolve_features(None, PixelReward()) is thumbnails
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = clip.image_features(images)
    assert features.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    text = clip.encoder.texts(["a photo of a cow"])[0]
    score = clip.score(images, ["a photo of a cow"] * 2).values
    assert torch.allclose(100 * features @ text, score, atol=1e-4)
    assert torch.equal(resolve_features("emoji-clip", PixelReward())(images), features)
    with pytest.raises(TypeError, match="name or a function"):
        resolve_features(3, clip)


def test_the_command_line_keeps_a_diverse_set(tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    tiny.build("cogview4").save_pretrained(model)
    words = ["run", "a cow", "--model", str(model), "--steps", "2", "--height", "32", "--width", "32", "--n", "6"]
    words += ["--device", "cpu", "--features", "thumbnails", "--out", str(out)]
    assert main([*words, "--images", "3", "--diversity", "k-means"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert len(set(result["images"])) == 3
    scores = {c["id"]: c["score"] for c in result["ranking"]}
    assert [scores[i] for i in result["images"]] == sorted((scores[i] for i in result["images"]), reverse=True)
    assert sorted(p.name for p in out.glob("image-*.png")) == ["image-1.png", "image-2.png", "image-3.png"]
    best = result["images"].index(result["winner"]["id"]) + 1  # k-means always holds the best of all
    assert (out / f"image-{best}.png").read_bytes() == (out / "winner.png").read_bytes()
    assert result["ledger"]["rewards"]["features"] == 6
    assert "--diversity k-means" in result["command"] and "--diversity" not in result["winner_command"]

    assert main([*words, "--search", "halving", "--set", "rule=coverage", "--set", "check_cost=0.0"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["search"]["rule"]["method"] == "coverage" and result["ledger"]["rewards"]["features"] == 6
    capsys.readouterr()

    refused = {
        ("--images", "7", "--search", "halving", "--set", "preset=psp"): "--images 7: the search finishes",
        ("--images", "0"): "--images 0 must be at least 1",
        ("--diversity", "greedy"): "give --images of at least 2",
        ("--images", "2", "--diversity", "best"): "use one of auto",
        ("--features", "judge-b"): "no image encoder",
    }
    for more, message in refused.items():
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
