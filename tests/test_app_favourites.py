"""A person as the reward: favourites breed, the first choice wins, and no thread outlives its page."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops
from tiny import FAMILIES, PROMPT, build

from visearch.app.favourites import Answer, Breeding, Family, Picture, Wish
from visearch.app.frames import Media, Settings
from visearch.app.studio import Model, Studio
from visearch.app.takehome import bred as bred_again
from visearch.protocols import Event, Population
from visearch.run import regenerate, run_search
from visearch.search.best_of_n import BestOfN

SOON = 60.0  # seconds; whatever takes longer hangs
WISH = Wish(PROMPT, seed=3, pictures=4, generations=3)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(build("sd3"), {**FAMILIES["sd3"].call, "num_inference_steps": 5})


def breeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "visearch-favourites"]


@pytest.fixture(autouse=True)
def no_zombie():
    yield
    deadline = time.monotonic() + SOON
    while (left := breeders()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


def bred(model: Model, *choices, wish: Wish = WISH, **options) -> list[Family]:
    """What was shown to a person who gives these answers: places among the pictures, or an :class:`Answer`'s."""
    breeding, families = Breeding(wish, model, **options), []
    for choice in choices:
        families.append(breeding.shown(SOON))
        numbers = [p.number for p in families[-1].generations[-1]]
        breeding.answer(choice if isinstance(choice, Answer) else Answer(tuple(numbers[i] for i in choice)))
    return [*families, breeding.shown(SOON)]


# --- what is bred from what -------------------------------------------------------------------------------------


def test_children_come_from_favourites_alone(model):
    first, second, third, end = bred(model, [2], [1, 3], [0])
    assert [len(f.generations) for f in (first, second, third)] == [1, 2, 3]
    assert [p.number for p in third.pictures] == list(range(1, 13))
    assert {p.parent for p in first.pictures} == {None}
    assert {p.parent for p in second.generations[1]} == {3}
    assert {p.parent for p in third.generations[2]} <= {6, 8}
    assert first.ended is None and end.ended == "Done: picture 9 won"


def test_every_favourite_becomes_a_parent(model):
    wish = Wish(PROMPT, seed=1, pictures=8, generations=2)
    family = bred(model, [0, 5], [], wish=wish)[-1]
    assert {p.parent for p in family.generations[1]} == {1, 6}


def test_without_new_favourites_the_latest_ones_breed_again(model):
    third = bred(model, [1], [], [])[2]
    assert {p.parent for p in third.generations[2]} == {2}


def test_children_look_unlike_their_parents_and_each_other(model):
    family = bred(model, [0], [0], [0])[-1]
    assert len({p.media.content for p in family.pictures}) == 12


def test_the_person_is_asked_once_a_generation_and_all_is_the_same_again(model):
    """The driver scores the best and the worst of a batch twice; nobody is to be asked about that."""
    one, other = (bred(model, [0], [1], [2])[-1] for _ in range(2))
    assert one.pictures == other.pictures and one.winner == other.winner


# --- who wins ---------------------------------------------------------------------------------------------------


def test_the_first_choice_of_the_last_generation_wins(model):
    end = bred(model, [0], [0], [3, 1])[-1]
    assert end.winner == 12 and end.find(12).place == 1 and end.find(10).place == 2


def test_finishing_early_keeps_the_first_choice(model):
    end = bred(model, Answer((2, 4), last=True))[-1]
    assert (len(end.generations), end.winner) == (1, 2)


def test_an_earlier_favourite_wins_where_none_follows(model):
    assert bred(model, [2], [], [])[-1].winner == 3


def test_who_likes_nothing_gets_no_winner(model):
    end = bred(model, [], [], [])[-1]
    assert end.winner is None and end.archive is None and "no favourite" in end.ended and not end.failed


PICTURE = Picture(1, "0", 0, (Event("init", 0, 0),), None, Media("image", "image/png", b"", ""))


@given(st.integers(2, 5), st.permutations(range(1, 7)), st.integers(0, 6), st.booleans())
def test_favourites_score_above_all_others_and_above_earlier_ones(g, numbers, chosen, final):
    shown = tuple(Picture(**{**vars(PICTURE), "number": n}) for n in range(1, 7))
    family = Family(WISH, ((),) * (g - 1) + (shown,)).chosen(Answer(tuple(numbers[:chosen])))
    score = dict(zip(range(1, 7), family.scores(final)))
    liked = [score[n] for n in numbers[:chosen]]
    assert all(s == 0 for n, s in score.items() if n not in numbers[:chosen])
    assert all(s >= g for s in liked)
    assert liked == sorted(liked, reverse=True) and len(set(liked)) == (chosen if final else min(chosen, 1))


# --- turns ------------------------------------------------------------------------------------------------------


def test_others_search_with_the_model_while_the_person_thinks_and_no_bit_changes(model):
    alone = bred(model, [0], [1], [2])[-1]
    breeding = Breeding(WISH, model)
    for place in (0, 1, 2):
        family = breeding.shown(SOON)
        with model.turns.held(lambda: False) as mine:
            assert mine
            job = model.job(BestOfN(n=3), "another user's prompt", 11)
            for _ in run_search(job.sampler, Brightness(), job.search, job.request):
                pass
        breeding.answer(Answer((family.generations[-1][place].number,)))
    assert breeding.shown(SOON).pictures == alone.pictures


class Brightness:
    name, higher_is_better, range, licence, source = "brightness", True, (0.0, 1.0), "MIT", "this file"
    needs = frozenset({"pixels"})

    def score(self, samples, prompts, *, noise_level=None, metadata=None):
        from visearch import Scores

        return Scores(torch.stack([s.float().mean() for s in samples]))


# --- ends -------------------------------------------------------------------------------------------------------


def is_free(model: Model) -> bool:
    with model.turns.held(lambda: True) as mine:
        return mine


def test_who_does_not_answer_loses_the_thread_and_keeps_the_best(model):
    breeding = Breeding(WISH, model, wait=0.05)
    assert breeding.shown(SOON).ended is None
    end = breeding.shown(SOON)
    assert "no answer for 0.000833 minutes" in end.ended and not end.failed and is_free(model)


def test_who_leaves_while_thinking_keeps_the_favourites_of_before(model):
    breeding = Breeding(WISH, model)
    breeding.answer(Answer((breeding.shown(SOON).pictures[1].number,)))
    assert len(breeding.shown(SOON).generations) == 2
    breeding.close()
    end = breeding.shown(SOON)
    assert end.winner == 2 and end.ended == "cancelled: picture 2 won" and is_free(model)


def test_who_leaves_while_it_computes_ends_it_before_the_next_model_call(model):
    """The first real forward closes; the next one must not happen. Those that are stubbed never reach a block."""
    breeding, calls = None, []

    def forward(*given, **named):
        calls.append(1)
        while breeding is None:
            time.sleep(0.001)
        breeding.close()

    hook = model.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(forward)
    try:
        breeding = Breeding(WISH, model)
        end = breeding.shown(SOON)
    finally:
        hook.remove()
    assert end.ended.startswith("cancelled") and end.pictures == () and is_free(model)
    assert len(calls) == 1


def test_who_leaves_while_another_has_the_model_does_not_wait(model):
    with model.turns.held(lambda: False):
        breeding = Breeding(WISH, model)
        assert breeding.shown(0.3) is None
        breeding.close()
        assert breeding.shown(SOON).ended == "cancelled"
    assert is_free(model)


def test_a_broken_model_is_one_line(model):
    def broken(*given, **named):
        raise RuntimeError("the denoiser is\nbroken")

    hook = model.pipe.transformer.register_forward_pre_hook(broken)
    try:
        end = Breeding(WISH, model).shown(SOON)
    finally:
        hook.remove()
    assert end.failed and "the denoiser is" in end.ended and "\n" not in end.ended and is_free(model)


# --- take-home --------------------------------------------------------------------------------------------------


def test_the_archive_regenerates_the_winner(model, tmp_path):
    end = bred(model, [1], [2], [3])[-1]
    with zipfile.ZipFile(io.BytesIO(end.archive)) as archive:
        archive.extractall(tmp_path)
    winner = end.find(end.winner)
    assert (tmp_path / "winner.png").read_bytes() == winner.media.content
    assert json.loads((tmp_path / "winner.json").read_text())["lineage"] == [[list(e) for e in winner.lineage]]
    job = model.job(WISH.search, PROMPT, WISH.seed)
    again = regenerate(job.sampler, job.request, Population.load(tmp_path, name="winner"))
    assert again.drift == 0


@pytest.mark.slow
def test_the_script_on_screen_draws_the_winner_again(tmp_path):
    studio, settings = Studio(), Settings('a photo of "two" cows', "emoji-64-v", seed=5)
    wish = Wish(settings.prompt, settings.seed, pictures=2, generations=2)
    end = bred(studio.model(settings.model), [1], [0], wish=wish)[-1]
    zipfile.ZipFile(io.BytesIO(end.archive)).extractall(tmp_path)
    (tmp_path / "again.py").write_text(bred_again(settings, studio), encoding="utf-8")
    done = subprocess.run([sys.executable, "again.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    winner, again = (Image.open(tmp_path / name) for name in ("winner.png", "again.png"))
    assert float(done.stdout.rpartition(": ")[2]) < 1e-4  # it was bred in a batch, and is drawn alone
    assert max(most for _, most in ImageChops.difference(winner, again).getextrema()) <= 1


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(99,), (1, 1), (0,)])
def test_a_picture_that_was_not_shown_cannot_be_chosen(model, numbers):
    breeding = Breeding(WISH, model)
    breeding.shown(SOON)
    with pytest.raises(ValueError, match=r"not all among the pictures shown"):
        breeding.answer(Answer(numbers))
    breeding.close()


def test_a_wish_beyond_the_limit_is_refused_before_anything_runs(model):
    with pytest.raises(ValueError, match=r"3 generations of 4 pictures cost 9.6 images, more than 5"):
        Breeding(WISH, model, images=5)


@pytest.mark.parametrize("field", ["pictures", "generations"])
def test_one_of_something_leaves_nothing_to_choose(field):
    with pytest.raises(ValueError, match=f"{field}=1"):
        Wish(PROMPT, **{field: 1})
