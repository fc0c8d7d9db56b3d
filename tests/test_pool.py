"""Pools: what they refuse, what files keep, and rewards from elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from visearch.pool import Pool

P, S, J = 3, 4, 5


def rewards(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(P, S, J)).astype(np.float32)


def make_pool(**changes) -> Pool:
    settings = {
        "prompts": ("a cow", "a cat", "a cow"),
        "tags": ("single", "single", "other"),
        "seeds": np.array([[0, 2**62, 5, 7], [1, 2, 3, 4], [9, 8, 7, 6]]),
        "steps": 10,
        "stages": (1, 2, 4, 8, 10),
        "rows": (2, 4, 8, 16, 20),
        "price": 1.25,
        "scores": {"clip": rewards(), "other": -rewards(1)},
        "held_out": {"judge-a": (rewards(2) > 0).astype(float), "judge-b": rewards(3)[..., -1] > 0},
        "seconds_a_row": 0.125,
        "meta": {"model": "toy", "call": {"steps": 10}},
    }
    return Pool(**{**settings, **changes})


def same(a: Pool, b: Pool) -> None:
    for name in ("prompts", "tags", "steps", "stages", "rows", "price", "seconds_a_row", "meta"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.seeds.dtype == b.seeds.dtype == np.int64
    np.testing.assert_array_equal(a.seeds, b.seeds)
    for kind in ("scores", "held_out"):
        x, y = getattr(a, kind), getattr(b, kind)
        assert list(x) == list(y)
        for name in x:
            assert x[name].dtype == y[name].dtype == np.float32
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": {}}, "at least one reward"),
        ({"held_out": {"clip": rewards()}}, "clip is in scores and in held_out"),
        ({"scores": {"clip": rewards()[:, :, :4]}}, r"scores\['clip'\] has shape \(3, 4, 4\).*\(3, 4, 5\)$"),
        ({"scores": {"clip": rewards()[..., -1]}}, r"scores\['clip'\] has shape \(3, 4\)"),
        ({"held_out": {"j": np.zeros((3, 5))}}, r"held_out\['j'\].*or \(3, 4\) for finals alone"),
        ({"prompts": ("a", "b")}, "prompts has 2 entries for 3"),
        ({"tags": ("a",)}, "tags has 1 entries for 3"),
        ({"seeds": np.arange(4)}, "seeds has shape"),
        ({"seeds": np.zeros((3, 4))}, "'a cow' repeat"),
        ({"stages": (1, 2, 4, 8, 9)}, "steps=10"),
        ({"stages": (0, 2, 4, 8, 10)}, "ascend from at least 1"),
        ({"stages": (1, 4, 2, 8, 10)}, "ascend"),
        ({"rows": (2, 4, 8, 16)}, "for each of 5 stages"),
        ({"rows": (2, 4, 8, 8, 20)}, "ascending"),
        ({"price": -1.0}, "price=-1.0"),
        ({"price": float("nan")}, "price=nan"),
        ({"seconds_a_row": 0.0}, "seconds_a_row=0.0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_pool(**changes)


def test_parts_keep_what_belongs_together():
    pool = make_pool()
    even, odd = pool.split()
    assert even.prompts == ("a cow", "a cow") and even.tags == ("single", "other") and odd.prompts == ("a cat",)
    part = pool.take(prompts=[2, 0], seeds=[3, 1])
    np.testing.assert_array_equal(part.seeds, [[6, 8], [7, 2**62]])
    np.testing.assert_array_equal(part.scores["other"], pool.scores["other"][[2, 0]][:, [3, 1]])
    np.testing.assert_array_equal(part.held_out["judge-b"], pool.held_out["judge-b"][[2, 0]][:, [3, 1]])
    np.testing.assert_array_equal(pool.final("clip"), pool.scores["clip"][..., -1])
    np.testing.assert_array_equal(pool.final("judge-b"), pool.held_out["judge-b"])
    with pytest.raises(ValueError, match="'clap' was not recorded; this pool has judge-a, judge-b, clip, other"):
        pool.final("clap")
    with pytest.raises(ValueError, match="one prompt"):
        odd.split()
    with pytest.raises(ValueError, match="none twice"):
        pool.take(seeds=[1, 1])


def test_parquet_keeps_everything_bit_for_bit(tmp_path):
    pytest.importorskip("pyarrow")
    table = rewards()
    table[0, 0, 0], table[1, 2, 3] = np.nan, -np.inf
    pool = make_pool(scores={"clip": table, "open-clip:ViT-B-32/laion": rewards(4)})
    pool.save(tmp_path / "deep" / "pool.parquet")
    same(pool, Pool.load(tmp_path / "deep" / "pool.parquet"))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["pool.parquet"]


def test_parquet_is_one_row_a_candidate_for_anyone_to_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pool = make_pool()
    pool.save(tmp_path / "pool.parquet")
    rows = parquet.read_table(tmp_path / "pool.parquet").to_pylist()
    assert len(rows) == P * S
    row = rows[1 * S + 2]
    assert (row["prompt"], row["tag"], row["candidate"], row["seed"]) == ("a cat", "single", 2, 3)
    assert row["reward_clip"] == pool.scores["clip"][1, 2].tolist()
    assert row["held_out_judge-a"] == pool.held_out["judge-a"][1, 2].tolist()
    assert row["held_out_judge-b"] == pool.held_out["judge-b"][1, 2]


def test_files_that_are_no_pool_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = tmp_path / "pool.parquet"
    make_pool().save(whole)
    torn = tmp_path / "torn.parquet"
    for share in (0, 0.3, 0.99):
        torn.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
        with pytest.raises(ValueError, match=r"torn\.parquet is torn"):
            Pool.load(torn)
    parquet.write_table(pa.table({"a": [1]}), torn)
    with pytest.raises(ValueError, match="no pool of version 1"):
        Pool.load(torn)
    table = parquet.read_table(whole)
    parquet.write_table(table.slice(0, 5), torn)
    with pytest.raises(ValueError, match="5 rows for 3 prompts x 4 seeds"):
        Pool.load(torn)
    with pytest.raises(FileNotFoundError, match="visearch record"):
        Pool.load(tmp_path / "none.parquet")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="torn"):
        Pool.load(tmp_path / "torn.npz")


def test_rewards_from_elsewhere():
    pool = Pool.from_arrays(torch.tensor(rewards(), dtype=torch.float64), rows=range(2, 12, 2), price=1.5)
    assert pool.stages == (1, 2, 3, 4, 5) and pool.steps == 5 and pool.rows == (2, 4, 6, 8, 10)
    assert pool.prompts == ("prompt 0", "prompt 1", "prompt 2") and pool.seeds.tolist() == [[0, 1, 2, 3]] * 3
    np.testing.assert_array_equal(pool.scores["reward"], rewards())
    sparse = Pool.from_arrays({"a": rewards(), "b": rewards(1)}, stages=(2, 4, 6, 8, 20), seeds=[9, 8, 7, 6])
    assert sparse.rows == sparse.stages and sparse.steps == 20 and sparse.seeds[2].tolist() == [9, 8, 7, 6]
    with pytest.raises(ValueError, match=r"\(prompts, seeds, stages\), also for a single stage"):
        Pool.from_arrays(rewards()[..., -1])
    with pytest.raises(ValueError, match="steps=20"):
        Pool.from_arrays(rewards(), steps=20)


def test_array_files_of_every_kind_give_the_same_pool(tmp_path):
    content = {
        "clip": rewards(),
        "held_out_judge": (rewards()[..., -1] > 0).astype(np.float32),
        "stages": np.array([1, 2, 4, 8, 10]),
        "price": np.array(1.5),
        "prompts": np.array(["a", "b", "c"]),
    }
    np.savez(tmp_path / "pool.npz", **content)
    tensors = {k: torch.as_tensor(v) for k, v in content.items() if k != "prompts"}
    torch.save({**tensors, "prompts": ["a", "b", "c"]}, tmp_path / "pool.pt")
    expected = Pool.from_arrays(
        {"clip": content["clip"]},
        stages=(1, 2, 4, 8, 10),
        price=1.5,
        prompts=("a", "b", "c"),
        held_out={"judge": content["held_out_judge"]},
    )
    same(Pool.load(tmp_path / "pool.npz"), expected)
    same(Pool.load(tmp_path / "pool.pt"), expected)
    np.save(tmp_path / "pool.npy", rewards())
    same(Pool.load(tmp_path / "pool.npy"), Pool.from_arrays(rewards()))


def test_code_in_a_file_of_tensors_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"reward": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="other things than arrays"):
        Pool.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_meta_is_json(tmp_path):
    pytest.importorskip("pyarrow")
    pool = replace(
        make_pool(), price=np.float32(1.25), steps=np.int64(10), meta={"config": "ab", "nested": {"x": [1, 2.5, None]}}
    )
    pool.save(tmp_path / "pool.parquet")
    assert json.dumps(Pool.load(tmp_path / "pool.parquet").meta) == json.dumps(pool.meta)
