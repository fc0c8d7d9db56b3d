"""The app's engine on tiny pipelines: what each frame shows, what is refused, and who waits for whom."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image, ImageSequence
from torchvision.transforms.functional import pil_to_tensor

from visearch.app.board import media_of
from visearch.app.frames import Frame, Limits, Settings
from visearch.app.studio import SEARCHES, Source, Studio
from visearch.protocols import Scores
from visearch.search.best_of_n import BestOfN

CALL = {"num_inference_steps": 5, "height": 32, "width": 32}
BRIGHT, DARK = "test_app_studio:Brightness", "test_app_studio:Darkness"
PROMPT = "a photo of a cow"


class Brightness:
    """Mean of the pixels; where a prompt says "break", a score is missing once previews of a search come."""

    name, higher_is_better, range = "brightness", True, (0.0, 1.0)
    licence, source, needs = "Apache-2.0", "tests", frozenset({"pixels"})
    sign = 1.0

    def score(self, samples, prompts, *, noise_level=None, metadata=None) -> Scores:
        values = self.sign * samples.flatten(1).mean(1)
        return Scores(values[:-1] if "break" in prompts[0] and len(values) > 1 else values)


class Darkness(Brightness):
    name, sign, range = "darkness", -1.0, (-1.0, 0.0)


def load() -> tuple:
    return tiny.build("cogview4"), dict(CALL)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio({"tiny": load, "twin": load}, rewards=(BRIGHT, DARK), judges=(BRIGHT, DARK))


def settings(prompt: str = PROMPT, **changes) -> Settings:
    given = {"model": "tiny", "reward": BRIGHT, "images": 6, "seed": 3, "best_of_n": False, **changes}
    return Settings(prompt, **given)


def pixels(media) -> bytes:
    return Image.open(io.BytesIO(media.content)).tobytes()


# --- frames ---------------------------------------------------------------------------------------------------


def test_the_first_frame_is_the_plain_sample_of_the_seed_and_costs_the_search_nothing(studio):
    turn, glimpse, first, *_, last = studio.run(settings())
    assert glimpse.phase == "baseline" and glimpse.baseline_score is None
    assert pixels(glimpse.baseline) != pixels(first.baseline)
    assert (turn.phase, turn.baseline, turn.cost.images) == ("baseline", None, studio.plan(settings()).images)
    plain = load()[0](PROMPT, generator=torch.Generator().manual_seed(3), **CALL).images[0]
    assert pixels(first.baseline) == plain.tobytes() and PROMPT in first.baseline.alt
    assert (first.phase, first.index, first.images, first.candidates) == ("searching", 0, 0.0, ())
    assert last.baseline is first.baseline and sum(s.images for s in last.ledger) == pytest.approx(last.images)
    assert [(s.what, s.images) for s in last.beside] == [("baseline", pytest.approx(1.0))]


@pytest.mark.parametrize("search", SEARCHES)
def test_frames_only_ever_add(studio, search):
    asked = settings(search=search, seed=5)
    planned, frames = studio.plan(asked), list(studio.run(asked))
    for before, after in zip(frames, frames[1:]):
        assert before.index <= after.index
        assert before.images <= after.images and before.seconds <= after.seconds
        old, new = ({c.id: c for c in f.candidates} for f in (before, after))
        assert list(new)[: len(old)] == list(old)
        for id, candidate in old.items():
            assert new[id].stage >= candidate.stage and new[id].parent == candidate.parent
            assert candidate.state != "finished" or new[id].state == "finished"
            assert candidate.media is None or new[id].media is not None
    last = frames[-1]
    assert [f.over for f in frames] == [False] * (len(frames) - 1) + [True]
    assert last.phase in ("done", "budget") and last.error is None
    assert last.images <= min(planned.images, asked.images) + 1e-6
    assert not any(c.state == "live" for c in last.candidates)
    consistent(last)


def consistent(frame: Frame) -> None:
    """Ranks, parents and the winner of the last frame fit together."""
    ids = [c.id for c in frame.candidates]
    assert len(set(ids)) == len(ids)
    ranked = sorted((c for c in frame.candidates if c.rank), key=lambda c: c.rank)
    assert [c.rank for c in ranked] == list(range(1, len(ranked) + 1)) and ranked[0].id == frame.winner
    assert [c.score for c in ranked] == sorted((c.score for c in ranked), reverse=True)
    for candidate in frame.candidates:
        assert candidate.history == () or candidate.history[-1][1] == candidate.score
        assert (candidate.parent is None) == (len(candidate.lineage) == 1)
        assert candidate.parent is None or candidate.id.startswith(f"{candidate.parent}/")


def test_a_pruned_candidate_stays_with_the_preview_that_it_left_with(studio):
    frames = list(studio.run(settings(search="halving")))
    early, last = frames[3], frames[-1]
    left = [c for c in early.candidates if c.state == "pruned"]
    assert left and all(last.find(c.id) == c and c.media is not None and 0 < c.stage < last.stages for c in left)
    assert last.best_of_n == ()  # what is finished was chosen


def test_copies_come_from_a_parent_and_show_its_preview_until_they_are_scored(studio):
    frames = list(studio.run(settings(search="smc", seed=5)))
    born = [(f, c) for before, f in zip(frames, frames[1:]) for c in f.candidates if c.parent and not before.find(c.id)]
    assert born, "no particle was copied; choose another seed"
    assert all(c.media == f.find(c.parent).media and c.lineage[-1].op == "fork" for f, c in born)
    assert len({c.media for c in frames[-1].candidates}) == len(frames[-1].candidates)  # by the end they differ
    assert any(c.state == "pruned" for c in frames[-1].candidates)


def test_best_of_n_shows_steps_and_what_fewer_would_have_reached(studio):
    frames = list(studio.run(settings(search="best-of-n")))
    assert [len(f.candidates) for f in frames] == [0, 0, 0, 4, 6, 6]
    scores = [c.score for c in frames[-1].candidates]
    curve = dict(frames[-1].best_of_n)
    assert curve[1] == pytest.approx(sum(scores) / 6) and curve[6] == max(scores)
    assert [images for images, _ in frames[-1].curve] == pytest.approx([4, 6])


def test_best_of_n_follows_a_search_and_is_outside_of_its_budget(studio):
    asked = settings(search="halving", held_out=(DARK,))
    *_, alone = studio.run(asked)
    *_, bar = studio.run(replace(asked, search="best-of-n"))
    frames = list(studio.run(replace(asked, best_of_n=True)))
    over = [f for f in frames if f.over]
    assert [f.comparing for f in over] == [False, True, True, False]  # 4, then 2 candidates, then the end
    assert frames[-1].candidates == alone.candidates and frames[-1].winner == alone.winner
    assert {f.images for f in over} == {alone.images} and all(f.ledger == over[0].ledger for f in over)
    assert dict(frames[-1].best_of_n) == pytest.approx(dict(bar.best_of_n)) and len(bar.best_of_n) == 6
    worse = {n: -score for n, score in bar.best_of_n}  # this judge is the reward turned round
    assert dict(frames[-1].held_out_best_of_n["darkness"]) == pytest.approx(worse)
    drawn, told = frames[-1].beside[-2:]
    assert (drawn.what, drawn.calls, drawn.images) == ("best-of-n", 6, pytest.approx(6.0))
    assert told.what == "judges of best-of-n" and studio.plan(replace(asked, best_of_n=True)).beside == 6


def test_a_search_that_is_best_of_n_is_not_drawn_twice(studio):
    asked = settings(search="best-of-n", best_of_n=True)
    assert studio.plan(asked).beside == 0
    frames = list(studio.run(asked))
    assert sum(f.over for f in frames) == 1 and not any(f.comparing for f in frames)


def test_cancelled_while_best_of_n_is_drawn_the_search_is_as_it_was(studio):
    seen: list[Frame] = []
    for frame in studio.run(settings(search="halving", best_of_n=True), lambda: bool(seen) and seen[-1].comparing):
        seen.append(frame)
    found, last = next(f for f in seen if f.over), seen[-1]
    assert last.phase == "done" and not last.comparing and last.candidates == found.candidates
    assert len(last.best_of_n) == 4 and last.beside[-1].images == pytest.approx(4.0)


def test_a_failure_of_best_of_n_is_a_warning(studio, monkeypatch, caplog):
    class Broken(BestOfN):
        def step(self, state, sampler, evaluate):
            raise RuntimeError("no memory is left")

    monkeypatch.setattr(studio, "_bar", lambda settings: Broken(n=4))
    *_, last = studio.run(settings(search="halving", held_out=(DARK,)))
    assert last.phase == "done" and last.find(last.winner).rank == 1 and last.held_out_best_of_n == {}
    assert "best-of-n was not drawn to its end" in last.warnings[-1] and "no memory is left" in last.warnings[-1]


def test_a_reward_that_rises_while_a_judge_falls_is_told(studio):
    *_, last = studio.run(settings(search="best-of-n", held_out=(DARK,)))
    once, found = last.held_out["darkness"]
    assert once == pytest.approx(-last.baseline_score) and found == pytest.approx(-last.find(last.winner).score)
    assert found < once and "reward hacking" in last.warnings[0]
    assert last.held_out_curve["darkness"] == tuple((n, pytest.approx(-score)) for n, score in last.curve)


def test_a_video_is_kept_whole_and_without_loss():
    video = torch.rand(3, 3, 16, 16)
    media = media_of(video, "a cow walks")
    shown = Image.open(io.BytesIO(media.content))
    frames = [pil_to_tensor(frame.convert("RGB")) for frame in ImageSequence.Iterator(shown)]
    assert media.mime == "image/webp" and torch.equal(torch.stack(frames), (video * 255).round().to(torch.uint8))


def test_the_same_settings_give_the_same_winner(studio):
    for search in ("halving", "evosearch"):
        (*_, one), (*_, two) = (studio.run(settings(search=search)) for _ in range(2))
        assert one.winner == two.winner and one.find(one.winner) == two.find(two.winner)


def test_a_judge_that_cannot_read_the_prompt_is_left_out_and_says_why():
    own = Studio({"tiny": load}, rewards=(BRIGHT,))
    *_, last = own.run(settings("a painting of dusk", images=2, held_out=("judge-a", "judge-b")))
    assert last.phase == "done" and last.held_out == {}
    said = last.warnings[0]
    assert said.startswith("left out: judge-a, judge-b, as prompt") and "GenEval's wording" in said


def test_the_cost_is_known_before_and_its_seconds_after_the_first_run():
    own = Studio({"tiny": load}, rewards=(BRIGHT,))
    asked = settings(search="best-of-n", images=4)
    before = own.plan(asked)
    assert (before.images, before.candidates, before.finals, before.previews, before.seconds) == (4, 4, 4, 0, None)
    assert own.plan(replace(asked, search="halving")).previews > 0
    *_, last = own.run(asked)
    assert own.plan(asked).seconds == pytest.approx(last.seconds, rel=0.5)


# --- ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["best-of-n", "halving", "smc"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_cancelled_after_any_round_the_best_so_far_is_there(studio, search, rounds):
    seen: list[Frame] = []
    for frame in studio.run(settings(search=search), lambda: len(seen) > rounds + 2):
        seen.append(frame)
    last = seen[-1]
    assert last.phase in ("cancelled", "done") and last.find(last.winner).rank == 1
    assert last.images <= settings().images + 1e-6


def test_cancelled_before_the_search_the_baseline_is_there(studio):
    *_, last = studio.run(settings(), lambda: True)
    assert last.phase == "cancelled" and last.baseline is not None and last.winner is None


def test_a_failure_in_the_search_is_one_line_beside_what_was_there(studio, caplog):
    _, _, first, *_, last = studio.run(settings("break", search="halving"))
    assert last.phase == "failed" and "scores of shape" in last.error and "\n" not in last.error
    assert last.baseline == first.baseline and "Traceback" not in last.error
    assert any(record.exc_info for record in caplog.records)  # the trace is in the log
    assert next(studio.run(settings())).phase == "baseline"  # and the model is free


def test_settings_that_are_refused_fail_in_one_line(studio):
    (only,) = studio.run(settings(model="nowhere"))
    assert only.phase == "failed" and only.error == "model='nowhere' is not offered here; choose tiny, twin"


def test_a_reader_that_goes_away_frees_the_model(studio):
    frames = studio.run(settings(search="best-of-n"))
    next(frames), next(frames)
    assert len(studio.model("tiny").turns) == 1
    frames.close()
    assert len(studio.model("tiny").turns) == 0
    *_, last = studio.run(settings(images=1))
    assert last.phase == "done"


def test_who_waits_for_the_model_may_leave(studio):
    first = studio.run(settings())
    next(first)
    waiting = list(studio.run(settings(), lambda: True))
    assert [f.phase for f in waiting] == ["cancelled"] and waiting[0].baseline is None
    first.close()


def test_who_came_first_is_served_first(studio):
    first, second, third = (studio.run(settings(images=1)) for _ in range(3))
    next(first)
    assert [(f.phase, f.ahead) for f in (next(second), next(third))] == [("waiting", 1), ("waiting", 2)]
    first.close()
    assert (next(third).ahead, next(second).phase) == (1, "baseline")
    second.close()
    assert [f.phase for f in third][-1] == "done"


def test_users_at_once_see_their_own_images_alone(studio):
    asked = [settings(f"a photo of {what}", model=model, seed=seed, search="best-of-n", images=4)
             for what, model, seed in (("a cow", "tiny", 1), ("a dog", "tiny", 2), ("a cat", "twin", 3))]  # fmt: skip
    alone = [list(studio.run(one)) for one in asked]
    found: dict[int, list[Frame]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: list(studio.run(asked[i]))})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i, frames in enumerate(alone):
        assert [shown(f) for f in found[i] if f.phase != "waiting"] == [shown(f) for f in frames]
        assert all(f.settings == asked[i] for f in found[i])


def shown(frame: Frame) -> list[bytes]:
    return [m.content for m in (frame.baseline, *(c.media for c in frame.candidates)) if m is not None]


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": " "}, "prompt=' ' is empty"),
        ({"prompt": "x" * 401}, "401 characters; at most 400"),
        ({"prompt": "a cow\nand more"}, "line break or control character"),
        ({"prompt": "a cow\x00"}, "line break or control character"),
        ({"prompt": "\ud800"}, "line break or control character"),
        ({"prompt": None}, "prompt=None is empty"),
        ({"model": "/etc/passwd"}, "not offered here"),
        ({"search": "best-of-n(n=2)"}, "not offered here"),
        ({"reward": "os:system"}, "not offered here"),
        ({"reward": ["a"]}, "not offered here"),
        ({"held_out": ("nobody",)}, "not offered here"),
        ({"images": 0}, "from 1 to 64"),
        ({"images": 65}, "from 1 to 64"),
        ({"images": 2.5}, "from 1 to 64"),
        ({"images": True}, "from 1 to 64"),
        ({"seconds": 0.0}, r"must lie in \(0, 300\]"),
        ({"seconds": float("nan")}, r"must lie in \(0, 300\]"),
        ({"seed": -1}, r"in \[0, 2\^63\)"),
        ({"seed": 2**63}, r"in \[0, 2\^63\)"),
        ({"held_out": (BRIGHT,)}, "given twice"),
    ],
)
def test_bad_settings_are_refused_in_one_line(studio, changes, says):
    with pytest.raises(ValueError, match=says) as refused:
        studio.check(settings(**changes))
    assert "\n" not in str(refused.value)


def test_nothing_is_loaded_for_settings_that_are_refused():
    loaded: list[str] = []

    def load_and_tell() -> Iterator:
        loaded.append("model")
        return load()

    own = Studio({"tiny": load_and_tell}, rewards=("nowhere:Reward",), limits=Limits(images=4))
    with pytest.raises(ValueError, match="images=6"):
        own.check(settings(reward="nowhere:Reward"))
    assert loaded == []


def test_defaults_are_names_that_are_offered():
    assert Studio().defaults("a cow") == Settings("a cow")
    own = Studio({"tiny": load}, {"plain": "best-of-n(n={n})"}, (BRIGHT,), limits=Limits(images=2)).defaults()
    assert (own.model, own.search, own.reward, own.images) == ("tiny", "plain", BRIGHT, 2)


def test_a_source_that_cannot_be_loaded_says_what_to_give():
    with pytest.raises(ValueError, match="emoji-64"):
        Source("emojy-64")()
