"""Scores that are remembered: what finds them again, what does not, and what a bad file or a full disk costs."""

from __future__ import annotations

import math
import pickle
import sqlite3

import pytest
import torch
from contract.cases import PixelReward
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from remembering import Red, fork, fork_without_the_file, in_processes, pictures, score_on_a_full_disk, scored, work

from visearch.memory import probe
from visearch.pipelines.toy import GaussianToy
from visearch.protocols import Request, Reward, RewardError, Scores
from visearch.rewards.cache import LEAST, Cached
from visearch.rewards.combine import AverageRank, WeightedSum
from visearch.rewards.function import FunctionReward
from visearch.rewards.images import to_pil, to_uint8
from visearch.run import run_search
from visearch.search.best_of_n import BestOfN


def plainly(samples) -> torch.Tensor:
    return Red().score(samples, []).values


def both_batches() -> list[list[float]]:
    """What ``remembering.heard`` scores."""
    return [plainly(pictures(64, seed=seed)).tolist() for seed in (1, 2)]


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "scores.sqlite"


def test_what_was_scored_is_found_again_to_the_last_bit(place):
    cached, images = Cached(Red(), place), pictures(4)
    assert isinstance(cached, Reward) and cached.name == "red"
    first, second = cached.score(images, ["a cow"] * 4), cached.score(images.flip(0), ["a cow"] * 4)
    assert torch.equal(first.values, second.values.flip(0)) and torch.equal(
        first.values, Red().score(images, []).values
    )
    assert torch.equal(first.components["corner"], second.components["corner"].flip(0))
    assert (first.cached, second.cached) == (0, 4)
    assert (cached.calls, cached.evaluations, cached.reward.seen) == (8, 4, [4])


def test_only_what_is_new_is_scored_and_equal_samples_once(place):
    cached, images = Cached(Red(), place), pictures(3)
    scored(cached, images[:1])
    made = cached.score(images[[2, 0, 2, 1]], ["a cow"] * 4)
    assert cached.reward.seen == [1, 2] and made.cached == 2
    assert torch.equal(made.values, plainly(images[[2, 0, 2, 1]]))


def test_a_renamed_copy_hits_and_so_does_any_other_form_of_the_same_pixels(tmp_path):
    cached, images = Cached(Red()), to_uint8(pictures(1))
    (image,) = to_pil(images)
    scored(cached, images)
    for name in ("one.png", "two.png"):
        image.save(tmp_path / name)
        assert scored(cached, [Image.open(tmp_path / name)])[1] == 0
    assert scored(cached, images.float() / 255)[1] == 0 and scored(cached, [image])[1] == 0

    turned = image.rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "exif.png", exif=exif)
    assert scored(cached, [Image.open(tmp_path / "exif.png")])[1] == 0


@pytest.mark.parametrize("place", ["memory"], indirect=True)
def test_one_pixel_the_size_the_prompt_or_the_revision_misses(place):
    cached, images = Cached(Red(), place), to_uint8(pictures(1))
    scored(cached, images)
    changed = images.clone()
    changed[0, 2, 5, 5] ^= 1
    assert scored(cached, changed)[1] == 1
    assert scored(cached, images, "a cow.")[1] == 1
    assert scored(cached, images.reshape(1, 3, 4, 9))[1] == 1
    cached.reward.config_hash = "v2"
    assert scored(cached, images)[1] == 1 and scored(cached, images)[1] == 0


@pytest.mark.parametrize(("needs", "value"), [("noise_level", 1.5), ("metadata", [{"tag": "colors"}])])
def test_noise_level_and_metadata_count_where_the_reward_reads_them(needs, value):
    blind, reading = Cached(Red()), Red()
    reading.needs = frozenset({"pixels", needs})
    reading, images = Cached(reading), pictures(1)
    for cached, again in ((blind, 0), (reading, 1)):
        scored(cached, images)
        assert scored(cached, images, **{needs: value})[1] == again
        assert scored(cached, images, **{needs: value})[1] == 0


def test_videos_are_told_apart_by_their_frames():
    cached = Cached(FunctionReward(lambda videos, prompts: [float(len(v)) for v in videos], "length"))
    video = pictures(4)[None]
    assert scored(cached, video) == ([4.0], 1) and scored(cached, video[:, :3]) == ([3.0], 1)
    assert scored(cached, to_pil(video)) == ([4.0], 0) and scored(cached, video.flip(1)) == ([4.0], 1)


def test_failures_are_not_remembered_and_keep_their_reason(place):
    cached, images = Cached(Red(), place), torch.stack([pictures(1)[0], torch.zeros(3, 6, 6)])
    for asked in ([2], [2, 1]):
        made = cached.score(images, ["a cow"] * 2)
        assert cached.reward.seen == asked and made.reasons == {1: "it is black"}
        assert made.values.isnan().tolist() == [False, True]


def test_a_sample_without_numbers_is_not_taken_for_the_picture_that_it_rounds_to():
    cached, images = Cached(FunctionReward(lambda images, prompts: [1.0] * len(images), "any")), torch.zeros(2, 3, 4, 4)
    images[1] = math.nan
    assert scored(cached, images)[1] == 2


def test_an_exception_of_the_reward_passes_and_nothing_is_kept(place):
    broken = FunctionReward(lambda images, prompts: 1 / 0, "broken")
    cached = Cached(broken, place, config="v1")
    with pytest.raises(ZeroDivisionError):
        scored(cached, pictures(1))
    broken.function = lambda images, prompts: [7.0]
    assert scored(cached, pictures(1)) == ([7.0], 1)


def test_a_wrong_number_of_scores_is_refused_and_not_kept():
    cached = Cached(FunctionReward(lambda images, prompts: [1.0] * (len(images) - 1), "short"))
    for _ in range(2):
        with pytest.raises(RewardError, match=r"shape \(1,\) for 2 samples"):
            scored(cached, pictures(2))


def test_rewards_that_it_cannot_serve_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"average-rank\(red\) is relative.*cache members"):
        Cached(AverageRank([Red()]))
    with pytest.raises(ValueError, match=r"bright has no config_hash.*config="):
        Cached(FunctionReward(lambda images, prompts: [], "bright"), tmp_path / "scores")
    with pytest.raises(ValueError, match=f"max_bytes=1 must be at least {LEAST}"):
        Cached(Red(), max_bytes=1)


# --- files ----------------------------------------------------------------------------------------------------


def test_a_file_serves_later_processes(tmp_path):
    path, images = tmp_path / "scores", pictures(3)
    values, _ = scored(Cached(Red(), path), images)
    assert scored(Cached(Red(), path), images) == (values, 0)


def test_processes_share_a_file_from_its_first_moment(tmp_path):
    path = tmp_path / "scores"
    found = in_processes(work, *((path, seed) for seed in range(4)))
    after = Cached(Red(), path)
    for seed, values in enumerate(found):
        assert scored(after, pictures(40, seed=100 + seed)) == (values, 0)
    assert all(scored(after, pictures(8, seed=i))[1] == 0 for i in range(5))


def test_a_forked_process_gets_a_connection_of_its_own(tmp_path):
    """The child finds what the parent had scored; the parent what the child scored."""
    assert in_processes(fork, (tmp_path / "scores",)) == [[0, 2, 0]]


def test_a_forked_process_that_cannot_open_the_file_loses_no_score(tmp_path):
    path = tmp_path / "scores"
    [(values, told)] = in_processes(fork_without_the_file, (path,))
    assert values == both_batches()
    assert len(told) == 1 and f"path={str(path)!r} is no cache of scores" in told[0]


def test_a_pickled_cache_opens_its_file_again(tmp_path):
    cached, images = Cached(Red(), tmp_path / "scores"), pictures(2)
    values, _ = scored(cached, images)
    assert scored(pickle.loads(pickle.dumps(cached)), images) == (values, 0)


def test_the_cap_holds_and_the_least_recently_used_go_first(tmp_path):
    path, old, new = tmp_path / "scores", pictures(1, seed=1000, side=1), pictures(60, seed=2000, side=1)
    cached = Cached(Red(), path, max_bytes=LEAST)
    scored(cached, old)
    for seed in range(40):
        scored(cached, pictures(60, seed=seed, side=1))
        assert scored(cached, old)[1] == 0, "what is in use stays"
        assert path.stat().st_size <= LEAST
    scored(cached, new)
    assert scored(cached, new)[1] == 0 and scored(cached, pictures(60, seed=0, side=1))[1] == 60
    (kept,) = sqlite3.connect(path).execute("SELECT count(*) FROM scores").fetchone()
    assert kept > 300  # of 2,461: not emptied more than need be


def foreign(path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")


def torn(path) -> None:
    scored(Cached(Red(), path), pictures(600, side=1))
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 // 4096 * 4096])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("no database at all, whatever its name is " * 9), "file is not a database"),
        (foreign, "it is marked"),
        (torn, "malformed|Page"),
        (lambda path: path.mkdir(), "unable to open"),
    ],
    ids=["text", "foreign", "torn", "folder"],
)
def test_a_file_that_is_no_cache_is_refused_and_left_as_it_is(tmp_path, make, says):
    path = tmp_path / "scores"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ValueError, match=f"scores' is no cache of scores: .*({says}).*; choose another file"):
        Cached(Red(), path)
    assert before is None or path.read_bytes() == before


def test_a_full_disk_loses_no_score(tmp_path):
    """Scores come back, one warning is given, and what was kept before is found."""
    cached = Cached(Red(), tmp_path / "scores")
    first, _ = scored(cached, pictures(4))
    [(values, told, again)] = in_processes(score_on_a_full_disk, (cached,))
    assert values == both_batches()
    assert len(told) == 1 and f"{tmp_path / 'scores'}: " in told[0] and again == (first, 0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["a cow", "a cat"])), min_size=1, max_size=12))
def test_a_cache_changes_no_score(asked):
    """Whatever is asked for in whatever batches, with repeats."""
    images, cached, plain = pictures(6), Cached(Red()), Red()
    for start in range(0, len(asked), 3):
        rows, prompts = zip(*asked[start : start + 3])
        made = cached.score(images[list(rows)], prompts)
        assert torch.equal(made.values, plain.score(images[list(rows)], prompts).values)
    assert cached.evaluations == len(set(asked)) and cached.calls == len(asked)


# --- in a search ----------------------------------------------------------------------------------------------


def search(reward, **options):
    *_, last = run_search(GaussianToy(), reward, BestOfN(n=6, batch=3), Request(("a cow", "a cat")), **options)
    return last.result


def test_found_scores_count_as_calls_and_the_ledger_tells_how_many_were_computed(tmp_path):
    plain = search(Red())
    for computed in (12, 0):
        result = search(Cached(Red(), tmp_path / "scores"))
        assert [c["score"] for c in result.ranking] == [c["score"] for c in plain.ranking]
        assert result.ledger.rewards == plain.ledger.rewards and result.ledger.rewards["red"] == 12
        assert result.ledger.rewards["red"] - result.ledger.cached["red"] == computed
        assert result.ledger.as_dict()["cached"] == ({} if computed else {"red": 12})


def test_what_reports_read_of_a_judge_is_read_of_its_cache():
    judge = Red()
    judge.checker, judge.family, judge.note = True, "detector", "wrong in one of ten"
    cached = Cached(judge)
    assert (cached.checker, cached.family, cached.note) == (True, "detector", "wrong in one of ten")


def test_a_member_of_an_ensemble_may_be_remembered():
    cached = Cached(Red())
    plain, joined = (search(WeightedSum([red, PixelReward()], [1, 2])) for red in (Red(), cached))
    assert [c["components"] for c in joined.ranking] == [c["components"] for c in plain.ranking]
    assert search(0.5 * cached).ledger.cached["red"] == 12


def test_probes_of_memory_look_past_a_cache():
    """They show copies of one sample, which a cache would score once."""
    cached = Cached(Red())
    probe(GaussianToy(), cached, Request(("a cow",)))
    assert cached.reward.seen == [1, 2, 3] and cached.calls == 0


def test_scores_of_other_samples_are_noticed_behind_a_cache():
    mixed = Red()
    given = mixed.score
    mixed.score = lambda samples, prompts, **context: Scores(given(samples, prompts).values.roll(1))
    result = search(Cached(mixed))
    assert result.stopped == "failed" and "input order" in str(result.error)
