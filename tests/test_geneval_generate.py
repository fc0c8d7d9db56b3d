"""Making GenEval's images: what a pack gives, the same bytes however the work is cut, shared or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from contract.cases import PixelReward
from PIL import Image
from sketches import Sketcher

from visearch.bench import World
from visearch.budget import Budget
from visearch.cli import _parser
from visearch.geneval.generate import Painter, Wanted, generate, packs_of
from visearch.options import device_of
from visearch.prompts import request_of
from visearch.protocols import Request, Scores
from visearch.search.allocated import Allocated
from visearch.search.best_of_n import BestOfN
from visearch.search.successive_halving import SuccessiveHalving

TESTS = Path(__file__).parent
EMBEDDED = ("--model", "emoji-64-v", "--device", "cpu", "--images-per-prompt", "1")
CALL = {"num_inference_steps": 2, "height": 32, "width": 32}
LINES = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    for name in ("cow", "car", "bus", "cat", "dog", "cow")
]


def pack_of(*prompts: int, images: int = 1) -> list[Wanted]:
    (pack,) = packs_of(LINES, images, len(LINES))
    return [one for p in prompts for one in pack if one.prompt == p]


def pixels(drawn) -> np.ndarray:
    return np.stack([np.asarray(one.picture) for one in drawn]).astype(int)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# --- a pack -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return tiny.build("cogview4")


def test_none_is_the_bare_pipeline(pipe):
    (drawn,) = Painter(pipe, CALL, None, None, seed=3)(pack_of(2))
    seed = drawn.record["candidates"][0]["seed"]
    (plain,) = pipe(LINES[2]["prompt"], generator=torch.Generator().manual_seed(seed), **CALL).images
    assert np.array_equal(np.asarray(plain), np.asarray(drawn.picture))
    assert drawn.record["score"] is None and drawn.record["rewards"] == 0 and drawn.record["nfe"] == 2 * 2


@pytest.mark.parametrize("search", [None, BestOfN(n=3), SuccessiveHalving(n=3, calls=(1,), keep=(2,))])
def test_images_of_a_pack_are_those_made_one_by_one(pipe, search):
    paint = Painter(pipe, CALL, search, search and PixelReward())
    pack = pack_of(0, 1, 5, images=2)  # 0 and 5 are one text twice
    together, alone = paint(pack), [drawn for one in pack for drawn in paint([one])]
    assert abs(pixels(together) - pixels(alone)).max() <= 1
    for a, b in zip(together, alone):
        assert a.wanted == b.wanted and a.record["winner"] == b.record["winner"]
        for kind in ("nfe", "decodes", "rewards"):
            assert a.record[kind] == b.record[kind]
    images = pixels(together)
    assert all(abs(images[i] - images[j]).max() > 1 for i in range(6) for j in range(i))


def test_each_image_tells_what_it_took_and_whence_it_came(pipe):
    judge = PixelReward()
    judge.name = "judge"
    drawn = Painter(pipe, CALL, BestOfN(n=3), PixelReward(), [judge])(pack_of(0, 1))
    for one in drawn:
        told = one.record
        assert (told["nfe"], told["decodes"], told["rewards"]) == (3 * 2 * 2, 3, 3) and told["seconds"] > 0
        scores = [candidate["score"] for candidate in told["candidates"]]
        assert scores == sorted(scores, reverse=True) and told["score"] == scores[0]
        assert told["winner"] == told["candidates"][0]["id"]
        for candidate in told["candidates"]:
            assert candidate["held_out"]["judge"] == pytest.approx(candidate["score"], abs=1e-5)
            generator = torch.Generator().manual_seed(candidate["seed"])
            image = pipe(one.wanted.line["prompt"], generator=generator, output_type="pt", **CALL).images
            assert candidate["score"] == pytest.approx(float(PixelReward().score(image, [""]).values[0]), abs=1e-3)


def test_candidates_of_image_0_are_those_of_compare_and_record(pipe):
    drawn = Painter(pipe, CALL, BestOfN(n=3), PixelReward(), seed=7)(pack_of(0, 1, images=2))
    seeds = [{int(c["id"]): c["seed"] for c in one.record["candidates"]} for one in drawn]
    assert len({seed for of in seeds for seed in of.values()}) == 2 * 2 * 3
    world = World(pipe, LINES, CALL, seed=7)
    for prompt, of in zip((0, 1), seeds[::2]):
        for request in (world.of(prompt)[1], request_of(LINES[prompt], world.ids[prompt], 7)):
            assert of == {seed.candidate: seed.value for seed in request.seeds(0, 3)}


def test_an_image_that_is_good_enough_gets_no_more_candidates(pipe):
    """What is drawn until then is the beginning of the whole search, for each image of a pack alone."""
    pack, search = pack_of(0, 1, 2, 3), BestOfN(n=4, batch=1)
    whole = [one.record["candidates"] for one in Painter(pipe, CALL, search, PixelReward())(pack)]
    scores = [[c["score"] for c in sorted(found, key=lambda c: int(c["id"]))] for found in whole]
    target = sorted(max(found) for found in scores)[1] - 1e-6  # three of four reach it
    drawn = Painter(pipe, CALL, search, PixelReward(), budget=Budget(target=target))(pack)
    for one, all_of in zip(drawn, scores):
        needed = next((k for k, score in enumerate(all_of, 1) if score >= target), 4)
        assert len(one.record["candidates"]) == needed and one.record["nfe"] == needed * 2 * 2
        assert one.record["score"] == pytest.approx(max(all_of[:needed]), abs=1e-4)
    assert sum(one.record["nfe"] for one in drawn) < 4 * 4 * 2 * 2


def test_rewards_and_judges_get_the_line_of_the_prompt(pipe):
    class Reader(PixelReward):
        needs, not_held_out_for = frozenset({"pixels", "metadata"}), ("GenEval",)

        def score(self, samples, prompts, *, noise_level=None, metadata=None) -> Scores:
            assert [line["prompt"] for line in metadata] == list(prompts)
            return super().score(samples, prompts)

    for one in Painter(pipe, CALL, BestOfN(n=2), Reader())(pack_of(0, 1)):
        assert one.record["warnings"] == [] and one.record["not_held_out_for"] == ["GenEval"]


def test_a_reward_that_cannot_be_trusted_ends_the_run(pipe):
    class Short(PixelReward):
        def score(self, samples, prompts, **context) -> Scores:
            return Scores(torch.zeros(len(prompts) + 1))

    with pytest.raises(Exception, match="one number a sample"):
        Painter(pipe, CALL, BestOfN(n=2), Short())(pack_of(0))


# --- how the work is cut ------------------------------------------------------------------------------------------


def test_packs_hold_whole_prompts_and_every_image_once():
    packs = packs_of(LINES, 3, 4)
    assert [len(pack) for pack in packs] == [12, 6]
    everything = [one for pack in packs for one in pack]
    assert {(one.prompt, one.image) for one in everything} == {(p, k) for p in range(6) for k in range(3)}
    assert len({one.id for one in everything}) == 18
    ids = Request(tuple(line["prompt"] for line in LINES)).prompt_ids
    assert all(one.id == ids[one.prompt] for one in everything if one.image == 0)
    assert {one.prompt for one in packs_of(LINES, 1, 9, limit=3)[0]} == {0, 2, 5}


@pytest.mark.parametrize(("options", "message"), [((0, 1), "images-per-prompt 0"), ((1, 0), "together 0")])
def test_numbers_below_one_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        packs_of(LINES, *options)


def sketch(root, packs=None, settings=None, pause=0.0, **options) -> int:
    packs = packs_of(LINES, 2, 2) if packs is None else packs
    return generate(partial(Sketcher, pause), packs, root, settings or {"seed": 0}, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    assert sketch(root) == 0
    return contents(root)


def test_the_layout_is_the_benchmark_s(whole):
    names = {f"{p:05d}/samples/{k:05d}.png" for p in range(6) for k in range(2)}
    names |= {f"{p:05d}/{file}" for p in range(6) for file in ("metadata.jsonl", "search.json")}
    assert set(whole) == names | {"config.json"}
    for p, line in enumerate(LINES):
        assert whole[f"{p:05d}/metadata.jsonl"].decode() == json.dumps(line) + "\n"
        assert set(json.loads(whole[f"{p:05d}/search.json"])["images"]) == {"00000", "00001"}


def test_shares_together_are_the_whole(whole, tmp_path):
    assert sketch(tmp_path, shard=(2, 2)) == 0
    assert 0 < len(list(tmp_path.glob("*/samples/*.png"))) < 12
    assert sketch(tmp_path, shard=(1, 2)) == 0
    assert contents(tmp_path) == whole


def test_nothing_is_made_twice(tmp_path):
    sketch(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert generate(lambda: pytest.fail("loaded"), packs_of(LINES, 2, 2), tmp_path, {"seed": 0}) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == before


@pytest.mark.parametrize("lost", ["00003/samples/00001.png", "00003/search.json"])
def test_what_is_lost_is_made_again_with_its_companions_and_only_it_is_written(whole, tmp_path, lost):
    sketch(tmp_path)
    (tmp_path / lost).unlink()
    kept = tmp_path / "00003" / "samples" / "00000.png"
    before = kept.stat().st_mtime_ns
    assert sketch(tmp_path) == 0 and contents(tmp_path) == whole
    assert (kept.stat().st_mtime_ns == before) == lost.endswith("png")


def test_time_that_is_up_leaves_images_missing(tmp_path):
    assert sketch(tmp_path, minutes=0) == 12
    assert sketch(tmp_path, shard=(1, 3), minutes=0) == 4


SCRIPT = "import sys, test_geneval_generate as t; t.sketch(t.Path(sys.argv[1]), pause=0.05)"


def test_kill_9_and_again_is_as_if_never_killed(whole, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    end = time.monotonic() + 200
    while len(list(tmp_path.glob("*/samples/*.png"))) < 3 and time.monotonic() < end and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    (tmp_path / "00000" / "samples").mkdir(exist_ok=True)
    (tmp_path / "00000" / "samples" / "00000.part").write_bytes(b"\x89PNG torn")
    assert sketch(tmp_path) == 0
    left = contents(tmp_path)
    assert {name: content for name, content in left.items() if not name.endswith(".part")} == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"seed": 1}}, r"made with \{'seed': 0\}, now it is \{'seed': 1\}"),
        ({"settings": {"seed": 0, "model": "other"}}, "'model': 'other'"),
        ({"packs": packs_of(LINES[1:], 2, 2)}, "is of another prompt"),
    ],
)
def test_images_of_other_settings_or_prompts_are_never_mixed(tmp_path, change, message):
    sketch(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        sketch(tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_folder_that_somebody_else_made_is_left_alone(tmp_path):
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "00000" / "samples" / "0000.png")
    with pytest.raises(ValueError, match="choose another --outdir"):
        sketch(tmp_path)
    assert len(contents(tmp_path)) == 1


def test_more_can_be_asked_for(whole, tmp_path):
    sketch(tmp_path, packs_of(LINES, 1, 2))
    first = {name: content for name, content in contents(tmp_path).items() if name.endswith("00000.png")}
    sketch(tmp_path)
    more = contents(tmp_path)
    assert set(more) == set(whole) and all(more[name] == content for name, content in first.items())


# --- many processes -----------------------------------------------------------------------------------------------


def test_ray_does_the_same_and_survives_the_death_of_a_worker(whole, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    import psutil

    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
    killed = []

    def kill() -> None:
        end = time.monotonic() + 200
        while not any(tmp_path.rglob("*.png")) and time.monotonic() < end:
            time.sleep(0.005)
        for child in psutil.Process().children(recursive=True):
            if child.name().startswith("ray::_run") and not killed:
                child.send_signal(signal.SIGKILL)
                killed.append((child.pid, len(list(tmp_path.rglob("*.png")))))

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert sketch(tmp_path, packs_of(LINES, 2, 1), pause=0.5, ray="local") == 0
    finally:
        killer.join()
        ray.shutdown()
    assert killed and killed[0][1] < 12
    serial = tmp_path.with_name("serial")
    sketch(serial, packs_of(LINES, 2, 1))
    assert contents(tmp_path) == contents(serial)


def test_a_launcher_s_processes_share_the_work(monkeypatch, capsys):
    words = ["geneval", "generate", "report", "--outdir", "out"]
    assert _parser().parse_args(words).shard == (1, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _parser().parse_args(words).shard == (3, 4)
    with pytest.raises(SystemExit):
        _parser().parse_args([*words, "--shard", "1/2"])
    assert "the launcher shares the work" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(None) == "cuda:1"


# accelerate's own --cpu starts one process, whatever it is asked for
LAUNCHER = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


@pytest.mark.slow
def test_launched_processes_make_what_one_makes(tmp_path):
    words = ("visearch", "geneval", "generate", "validation", *EMBEDDED, "--limit", "3", "--together", "1", "--n", "2")
    errors = {}
    for name, launcher in (("serial", ()), ("shared", ("-m", *LAUNCHER))):
        command = [sys.executable, *launcher, "-m", *words, "--outdir", tmp_path / name]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as launchers set it: kernels round by their threads
        run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=one_thread)
        assert run.returncode == 0, run.stderr
        errors[name] = run.stderr
    assert "3/3" in errors["serial"] and "2/2" in errors["shared"] and "1/1" in errors["shared"]
    serial, shared = (made_in(tmp_path / name) for name in ("serial", "shared"))
    assert sum(name.endswith(".png") for name in serial) == 3 and shared == serial


def made_in(root: Path) -> dict[str, Any]:
    """All files of a run, without the seconds that it took."""
    found = contents(root)
    for name in (name for name in found if name.endswith("search.json")):
        found[name] = json.loads(found[name])
        for record in found[name]["images"].values():
            assert record.pop("seconds") > 0
    return found


def test_searches_that_share_over_prompts_run_in_a_pack(pipe):
    drawn = Painter(pipe, CALL, Allocated(n=2, first=1, width=1), PixelReward())(pack_of(0, 1, 2))
    assert sum(one.record["nfe"] for one in drawn) == 3 * 2 * 2 * 2


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_embedded_world_end_to_end(step, tmp_path):
    once, best = tmp_path / "once", tmp_path / "best"
    common = ("--limit", 6, *EMBEDDED, "--seed", 5)
    assert step("generate", "validation", "--outdir", once, "--search", "none", *common)[0] == 0
    status, _, err = step("generate", "validation", "--outdir", best, "--n", 3, "--held-out", "judge-b", *common)
    assert status == 0 and "6/6" in err
    for root in (once, best):
        assert step("score", root, "--detector", "tiny", "--device", "cpu")[0] == 0
    files = (best / "results.jsonl", "--baseline", once / "results.jsonl")
    status, out, _ = step("summary", *files)
    assert status == 0 and "Total images: 6" in out and "BestOfN(n=3, batch=8) guided by emoji-clip" in out
    assert "each sampled once" in out and "12.0 model rows, 3.0 decodes" in out
    assert "| oracle |" in out and "best of 2" in out
    for folder in (path for path in once.iterdir() if path.is_dir()):
        a, b = (
            json.loads((root / folder.name / "search.json").read_text())["images"]["00000"] for root in (once, best)
        )
        assert {c["id"]: c["seed"] for c in b["candidates"]}["0"] == a["candidates"][0]["seed"]


def test_images_that_rewards_of_other_weights_chose_are_never_mixed(step, tmp_path, monkeypatch):
    weights = {"guide": "1", "judge": "1"}

    def named(given, device="cpu"):
        reward = PixelReward()
        reward.name, reward.config_hash = given, weights[given]
        return reward

    monkeypatch.setattr("visearch.rewards.resolve", named)
    words = ("generate", "report", "--outdir", tmp_path, "--reward", "guide", "--held-out", "judge", *EMBEDDED)
    words += ("--limit", 1, "--n", 2)
    assert step(*words)[0] == 0
    monkeypatch.setattr("visearch.geneval.generate.load", lambda *_: pytest.fail("loaded"))
    assert step(*words)[0] == 0
    for changed in weights:
        monkeypatch.setitem(weights, changed, "2")
        status, _, err = step(*words)
        assert status == 2 and "'weights'" in err and "choose another --outdir" in err
        monkeypatch.setitem(weights, changed, "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", 0), "--rows 0 must be at least 1"),
        (("--seed", -1), "--seed -1 must lie in"),
        (("--search", "none", "--n", 2), "leave out --n, --reward"),
        (("--search", "none", "--target", 2), "leave out --n, --reward, --target"),
        (("--patience", 0), "patience=0 must be greater than 0"),
        (("--search", "halvng"), "did you mean 'halving'"),
        (("--together", 0), "--together 0 must be at least 1"),
        (("--images-per-prompt", 0), "--images-per-prompt 0 must be at least 1"),
        (("--limit", 0), "limit=0 must be at least 1"),
        (("--reward", "emoji-clop"), "emoji-clip"),
    ],
)
def test_bad_commands_say_what_to_do(step, tmp_path, words, message):
    status, _, err = step("generate", "validation", "--outdir", tmp_path / "out", *EMBEDDED, *words)
    assert status == 2 and message in err
    assert not list(tmp_path.rglob("*.png"))


def test_images_can_be_given_to_other_benchmarks(step, tmp_path):
    lines = [{"prompt": "two cows"}, {"prompt": "a car"}]
    root = tmp_path / "images"
    sketch(root, packs_of(lines, 2, 2))
    assert step("export", root, "--layout", "geneval2", "--out", tmp_path / "paths.json")[0] == 0
    paths = json.loads((tmp_path / "paths.json").read_text())
    assert paths == {line["prompt"]: str(root / f"{p:05d}/samples/00000.png") for p, line in enumerate(lines)}
    assert step("export", root, "--layout", "t2i-compbench", "--out", tmp_path / "t2i")[0] == 0
    copies = {path.name: path.read_bytes() for path in (tmp_path / "t2i" / "samples").iterdir()}
    names = [f"{line['prompt']}_{2 * p + k:06d}.png" for p, line in enumerate(lines) for k in range(2)]
    assert sorted(copies) == sorted(names)
    assert copies["a car_000003.png"] == (root / "00001/samples/00001.png").read_bytes()
    status, _, err = step("score", root, "--detector", "tiny")
    assert status == 2 and "keys tag, include" in err


@pytest.mark.parametrize(
    ("layout", "lines", "message"),
    [("geneval2", ["a cow", "a cow"], "is there twice"), ("t2i-compbench", ["a_cow"], "cannot hold")],
)
def test_prompts_that_another_layout_cannot_hold_are_refused(step, tmp_path, layout, lines, message):
    sketch(tmp_path / "images", packs_of([{"prompt": line} for line in lines], 1, 1))
    status, _, err = step("export", tmp_path / "images", "--layout", layout, "--out", tmp_path / "out")
    assert status == 2 and message in err and not (tmp_path / "out").exists()


def test_a_broken_prompt_line_is_named(step, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(LINES[0]) + "\n" + '{"tag": "colors"}\n')
    status, _, err = step("generate", file, "--outdir", tmp_path / "out")
    assert status == 2 and "prompts.jsonl, line 2" in err and not (tmp_path / "out").exists()


def test_time_that_is_up_is_told_by_the_exit_status(step, tmp_path):
    words = ("generate", "validation", "--outdir", tmp_path, "--limit", 3, "--minutes", 0, *EMBEDDED)
    status, _, err = step(*words)
    assert status == 3 and "3 images are missing" in err
    assert step(*words, "--allow-missing")[0] == 0
