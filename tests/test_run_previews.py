"""Rounds that hold what was decoded in them: for whoever watches a search."""

from __future__ import annotations

import pytest
import torch
from contract.cases import PROMPTS, REFUSALS, PixelReward, make_search

from visearch.pipelines.toy import GaussianToy, TokenToy
from visearch.protocols import Request
from visearch.run import run_search
from visearch.search import SEARCHES


def rounds(name: str, **options):
    sampler = GaussianToy() if (name, "token-toy") in REFUSALS else TokenToy()
    return list(run_search(sampler, PixelReward(), make_search(name), Request(PROMPTS, seed=7), **options))


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_each_round_holds_what_it_scored_and_costs_nothing(name):
    plain, watched = rounds(name), rounds(name, previews=True)
    last, ledger = watched[-1].result, watched[-1].ledger
    counts = [(r.ledger.nfe, r.ledger.decodes, r.ledger.rewards["pixel"]) for r in (plain[-1], watched[-1])]
    assert counts[0] == counts[1] and last.ranking == plain[-1].result.ranking
    assert sum(len(rows) for r in watched for rows in r.scored) == ledger.decodes
    for step in watched:
        assert {key for rows in step.scored for key in keys(rows)} == set(step.previews)
        assert not any(rows.state.tensors or rows.score.isnan().any() for rows in step.scored)
    seen = {key: sample for step in watched for key, sample in step.previews.items()}
    assert all(torch.equal(seen[key], sample) for key, sample in last.samples.items())
    assert {(c["prompt"], c["id"]) for c in last.pruned if c["score"] is not None} <= set(seen)
    assert not any(r.previews or r.scored for r in plain)


def keys(rows) -> list[tuple[int, str]]:
    return list(zip(rows.prompt.tolist(), rows.id, strict=True))


def test_a_pruned_candidate_shows_the_preview_that_it_was_dropped_for():
    first, *_ = watched = rounds("halving", previews=True)
    dropped = {
        (c["prompt"], c["id"]): c["score"] for c in watched[-1].result.pruned if c["stage"] == first.scored[0].stage
    }
    assert dropped and dropped.keys() <= first.previews.keys()
    reward = PixelReward()
    for key, score in dropped.items():
        assert reward.score(first.previews[key][None], [""]).values.item() == pytest.approx(score)
    assert not any(key in step.previews for step in watched[1:] for key in dropped)
