"""Pools: candidates drawn once, with their rewards and verdicts at every recorded stage.

A search that only selects needs no generator: what it would pick is a function of rewards that can be recorded, and
then every such search, schedule and stop rule is evaluated exactly and at once. :func:`visearch.record.record` draws a
pool; arrays from elsewhere become one by :meth:`Pool.from_arrays`.

Shapes: P = prompts, S = seeds a prompt, J = recorded stages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from visearch.protocols import Request, Search, stable_hash

__all__ = ["Evaluation", "Pool", "evaluate_on_pool", "pyarrow"]

SCHEMA = b"visearch.pool"
VERSION = 1
GROUP = 16  # prompts in one run
PREFIX = {"scores": "reward_", "held_out": "held_out_"}  # columns


@dataclass(frozen=True, eq=False)
class Pool:
    """S candidates of each of P prompts, seen at J stages.

    Args:
        prompts: P texts.
        tags: P names of tasks, such as GenEval's, or ``""``; empty is no tags.
        seeds: (P, S) int64, of each candidate's random stream; in a prompt no two are equal.
        steps: T, the stages of one whole candidate.
        stages: J stages, ascending, the last is T.
        rows: model rows that one candidate costs to reach each of them, ascending.
        price: model rows that one decode and score cost.
        scores: name -> (P, S, J) float32 of rewards that may guide a search: higher is better, NaN was not recorded,
            -inf failed.
        held_out: name -> (P, S, J), or (P, S) for finals alone, of judges that never guide.
        seconds_a_row: seconds of the generator a model row; 1 where nothing was measured.
        meta: JSON-able; what made it.

    Raises:
        ValueError: shapes that do not fit each other, stages or rows that do not ascend, or no reward at all.
    """

    prompts: tuple[str, ...]
    tags: tuple[str, ...]
    seeds: np.ndarray
    steps: int
    stages: tuple[int, ...]
    rows: tuple[int, ...]
    price: float
    scores: Mapping[str, np.ndarray]
    held_out: Mapping[str, np.ndarray] = field(default_factory=dict)
    seconds_a_row: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("prompts", str), ("stages", int), ("rows", int)):
            object.__setattr__(self, name, tuple(kind(v) for v in getattr(self, name)))
        for name, kind in (("steps", int), ("price", float), ("seconds_a_row", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))  # numpy's own are no JSON
        object.__setattr__(self, "tags", tuple(self.tags) or ("",) * len(self.prompts))
        object.__setattr__(self, "seeds", np.asarray(self.seeds, dtype=np.int64))
        for name in PREFIX:
            tables = {key: _array(value) for key, value in getattr(self, name).items()}
            object.__setattr__(self, name, tables)
        self._check()

    def _check(self) -> None:
        prompts, stages = len(self.prompts), self.stages
        if not self.scores:
            raise ValueError("scores is empty; a pool needs at least one reward")
        if both := self.scores.keys() & self.held_out.keys():
            raise ValueError(f"{', '.join(sorted(both))} is in scores and in held_out; what may guide is not held out")
        if self.seeds.ndim != 2 or 0 in self.seeds.shape:
            raise ValueError(f"seeds has shape {self.seeds.shape}; give (prompts, seeds), at least one of each")
        whole = (*self.seeds.shape, len(stages))
        for name, count in (("prompts", prompts), ("tags", len(self.tags))):
            if count != whole[0]:
                raise ValueError(f"{name} has {count} entries for {whole[0]} rows of seeds; give one a prompt")
        if not stages or list(stages) != sorted(set(stages)) or stages[0] < 1 or stages[-1] != self.steps:
            raise ValueError(f"stages={stages} must ascend from at least 1 to the last, steps={self.steps}")
        if len(self.rows) != len(stages) or list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError(
                f"rows={self.rows} must give one ascending count of model rows for each of {len(stages)} stages"
            )
        if not (self.price >= 0 and self.seconds_a_row > 0):
            raise ValueError(
                f"price={self.price} must be at least 0 model rows and seconds_a_row={self.seconds_a_row} above 0"
            )
        for kind in PREFIX:
            for name, table in getattr(self, kind).items():
                if table.shape != whole and (kind == "scores" or table.shape != whole[:2]):
                    finals = "" if kind == "scores" else f", or {whole[:2]} for finals alone"
                    raise ValueError(
                        f"{kind}[{name!r}] has shape {table.shape}; give (prompts, seeds, stages) = {whole}{finals}"
                    )
        repeated = [self.prompts[p] for p, own in enumerate(self.seeds) if len(set(own.tolist())) < whole[1]]
        if repeated:
            raise ValueError(f"seeds of prompt {repeated[0]!r} repeat; two candidates with one seed are one candidate")

    @property
    def size(self) -> int:
        """S, candidates a prompt."""
        return self.seeds.shape[1]

    def final(self, name: str) -> np.ndarray:
        """(P, S) float32, a reward's or judge's values of the finished candidates.

        Raises:
            ValueError: nothing of that name was recorded.
        """
        table = self.table(name)
        return table if table.ndim == 2 else table[..., -1]

    def table(self, name: str) -> np.ndarray:
        """A reward's or judge's values, as in ``scores`` or ``held_out``.

        Raises:
            ValueError: nothing of that name was recorded.
        """
        known = {**self.held_out, **self.scores}
        if name not in known:
            raise ValueError(f"{name!r} was not recorded; this pool has {', '.join(known)}")
        return known[name]

    # --- parts ---

    def take(self, prompts: Iterable[int] | None = None, seeds: Iterable[int] | None = None) -> Pool:
        """The pool of some prompts and candidates, by index, in the order given.

        Raises:
            ValueError: none is left, or one is named twice.
            IndexError: an index that the pool does not have.
        """
        p = list(range(len(self.prompts)) if prompts is None else prompts)
        s = list(range(self.size) if seeds is None else seeds)
        for name, index in (("prompts", p), ("seeds", s)):
            if not index or len(set(index)) < len(index):
                raise ValueError(f"{name}={index} must name at least one, and none twice")
        cut = np.ix_(p, s)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in p),
            tags=tuple(self.tags[i] for i in p),
            seeds=self.seeds[cut],
            scores={name: table[cut] for name, table in self.scores.items()},
            held_out={name: table[cut] for name, table in self.held_out.items()},
        )

    def split(self) -> tuple[Pool, Pool]:
        """Even and odd prompts, e.g. one half to tune on and the other to report on.

        Raises:
            ValueError: there is one prompt only.
        """
        count = len(self.prompts)
        if count < 2:
            raise ValueError("a pool of one prompt cannot be split; record more prompts")
        return self.take(range(0, count, 2)), self.take(range(1, count, 2))

    # --- files ---

    @classmethod
    def from_arrays(
        cls,
        rewards: Any,
        *,
        stages: Sequence[int] | None = None,
        steps: int | None = None,
        prompts: Sequence[str] | None = None,
        tags: Sequence[str] = (),
        seeds: Any | None = None,
        held_out: Mapping[str, Any] | None = None,
        rows: Sequence[int] | None = None,
        price: float = 0.0,
        seconds_a_row: float = 1.0,
        meta: Mapping[str, Any] | None = None,
    ) -> Pool:
        """A pool of rewards that were recorded elsewhere.

        For example 20 steps with guidance, so two model rows each, scored after every one of them::

            rewards = torch.load("rewards.pt", weights_only=True)  # (prompts, seeds, 20)
            pool = Pool.from_arrays(rewards, rows=range(2, 41, 2), price=1.5)
            evaluate_on_pool(pool, SuccessiveHalving(preset="ttsnap"), max_nfe=8 * 40)

        Args:
            rewards: (P, S, J), or name -> (P, S, J); arrays or tensors. A single one is called ``"reward"``.
            stages: J stages, ascending; default 1 to J.
            steps: T; default the last stage.
            prompts: default ``"prompt 0"`` and so on.
            tags, held_out, price, seconds_a_row, meta: as in :class:`Pool`.
            seeds: (P, S) or (S,); default 0 to S - 1 for each prompt.
            rows: as in :class:`Pool`; default one model row a stage.

        Raises:
            ValueError: as :class:`Pool`.
        """
        tables = {k: _array(v) for k, v in (rewards if isinstance(rewards, Mapping) else {"reward": rewards}).items()}
        shape = next((t.shape for t in tables.values()), ())
        if len(shape) != 3:
            raise ValueError(f"rewards have shape {shape}; give (prompts, seeds, stages), also for a single stage")
        stages = tuple(range(1, shape[2] + 1)) if stages is None else tuple(stages)
        own = np.arange(shape[1]) if seeds is None else np.asarray(seeds)
        return cls(
            prompts=[f"prompt {p}" for p in range(shape[0])] if prompts is None else prompts,
            tags=tags,
            seeds=np.broadcast_to(own, shape[:2]) if own.ndim == 1 and len(own) == shape[1] else own,
            steps=stages[-1] if steps is None and stages else steps,
            stages=stages,
            rows=stages if rows is None else rows,
            price=price,
            scores=tables,
            held_out=held_out or {},
            seconds_a_row=seconds_a_row,
            meta=meta or {},
        )

    def save(self, path: str | Path) -> None:
        """Write Parquet, one row a prompt and seed, atomically; needs ``pyarrow`` (the extra ``data``).

        Columns: prompt, tag, candidate, seed, ``reward_<name>`` (J numbers) and ``held_out_<name>`` (J, or one).

        Raises:
            OSError: it cannot be written.
            ImportError: pyarrow is not installed.
        """
        arrow, parquet = pyarrow()
        prompts, size = len(self.prompts), self.size
        columns: dict[str, Any] = {
            "prompt": arrow.array(np.repeat(np.array(self.prompts, dtype=object), size), arrow.string()),
            "tag": arrow.array(np.repeat(np.array(self.tags, dtype=object), size), arrow.string()),
            "candidate": arrow.array(np.tile(np.arange(size, dtype=np.int32), prompts)),
            "seed": arrow.array(self.seeds.ravel()),
        }
        for kind, prefix in PREFIX.items():
            for name, table in getattr(self, kind).items():
                flat = arrow.array(table.ravel())
                whole = table.ndim == 3
                columns[prefix + name] = arrow.FixedSizeListArray.from_arrays(flat, len(self.stages)) if whole else flat
        plain = ("steps", "stages", "rows", "price", "seconds_a_row", "meta")
        facts = {"version": VERSION, "shape": self.seeds.shape, **{name: getattr(self, name) for name in plain}}
        table = arrow.table(columns).replace_schema_metadata({SCHEMA: json.dumps(facts)})
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        text = ["prompt", "tag"]
        parquet.write_table(table, part, compression="zstd", use_dictionary=text, use_byte_stream_split=True)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Pool:
        """Read what :meth:`save` wrote, or arrays from elsewhere (``.npy``, ``.npz``, ``.pt``).

        Array files hold what :meth:`from_arrays` takes: one array (P, S, J), or several by name. Of these ``stages``,
        ``steps``, ``seeds``, ``rows``, ``price``, ``seconds_a_row``, ``prompts`` and ``tags`` mean what they mean
        there, ``held_out_<name>`` is a judge and any other a reward.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is torn, or no pool; the message says which.
            ImportError: pyarrow is not installed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; visearch record makes a pool")
        if path.suffix in (".npy", ".npz", ".pt"):
            return _from_named(_read_arrays(path))
        arrow, parquet = pyarrow()
        try:
            table = parquet.read_table(path)
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is torn or no Parquet file ({error}); record or copy it again") from error
        facts = json.loads((table.schema.metadata or {}).get(SCHEMA, b"{}"))
        if facts.get("version") != VERSION:
            raise ValueError(
                f"{path} is Parquet but no pool of version {VERSION} (it says {facts.get('version')}); make one with "
                "visearch record, or give arrays to Pool.from_arrays"
            )
        prompts, size = facts.pop("shape")
        del facts["version"]
        if table.num_rows != prompts * size:
            raise ValueError(f"{path} has {table.num_rows} rows for {prompts} prompts x {size} seeds; record it again")

        def numbers(name: str) -> np.ndarray:
            column = table[name].combine_chunks()
            listed = arrow.types.is_fixed_size_list(column.type)
            shape = (prompts, size, -1) if listed else (prompts, size)
            return (column.flatten() if listed else column).to_numpy(zero_copy_only=False).reshape(shape)

        tables = {
            kind: {n.removeprefix(prefix): numbers(n) for n in table.column_names if n.startswith(prefix)}
            for kind, prefix in PREFIX.items()
        }
        texts = {f"{name}s": table[name].to_pylist()[::size] for name in ("prompt", "tag")}
        return cls(seeds=numbers("seed"), **texts, **tables, **facts)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a search picks from a pool. D = draws, P = prompts.

    Attributes:
        picks: (D, P) the candidate picked, as its number in the pool.
        values: reward or judge -> (P,) float64, the finished pick's value, mean over draws; all that the pool has.
        nfe, decodes: a prompt, mean over prompts and draws; a decode stands for one score, too.
        cost: model rows a prompt with each decode and score at the pool's price.
        seconds: the same in seconds, as they were measured when the pool was drawn.
    """

    picks: np.ndarray
    values: dict[str, np.ndarray]
    nfe: float
    decodes: float
    cost: float
    seconds: float


def evaluate_on_pool(
    pool: Pool,
    search: Search,
    reward: str | None = None,
    *,
    draws: int | None = None,
    seed: int = 0,
    max_nfe: int | None = None,
    **limits: Any,
) -> Evaluation:
    """Run a search that only selects on a pool: the driver, the search and its ledger are those of a live run.

    Args:
        pool: what was recorded.
        search: any that neither moves rows nor needs a view.
        reward: guides; default the pool's first.
        draws: random orders of each prompt's candidates to average over; ``None`` takes the pool's own order once, as a
            live search for each prompt with the seed of its candidate 0 would.
        seed: of the orders.
        max_nfe: most model rows a prompt.
        limits: others of :class:`visearch.budget.Budget`, such as ``target``.

    Raises:
        ValueError: the search wants more than the pool has: candidates, stages, or to move rows.
    """
    from visearch.budget import Budget
    from visearch.pipelines.recorded import RecordedReward, RecordedSampler
    from visearch.run import run_search

    if draws is not None and draws < 1:
        raise ValueError(f"draws={draws} must be at least 1, or None for the pool's own order")
    count, guide = len(pool.prompts), RecordedReward(pool, reward)
    # of a search that keeps prompts apart, small groups are faster than all at once
    size = count if getattr(search, "across_prompts", False) else GROUP
    picks, nfe, decodes = np.zeros((draws or 1, count), dtype=np.int64), 0, 0
    for draw, picked in enumerate(picks):
        sampler = RecordedSampler(pool, None if draws is None else stable_hash("order", seed, draw))
        whole = sampler.request()
        for start in range(0, count, size):
            mine = slice(start, start + size)
            request = Request(whole.prompts[mine], prompt_ids=whole.prompt_ids[mine])
            most = None if max_nfe is None else max_nfe * len(request.prompts)
            *_, last = run_search(sampler, guide, search, request, Budget(max_nfe=most, **limits))
            if last.result.error is not None:
                raise last.result.error
            winners = last.result.winners()
            picked[start + winners.prompt.numpy()] = winners.state.tensors["shown"][:, 2].numpy()
            nfe, decodes = nfe + last.ledger.nfe, decodes + last.ledger.decodes
    names = (*pool.scores, *pool.held_out)
    values = {name: np.take_along_axis(pool.final(name).T, picks, 0).mean(0, dtype=np.float64) for name in names}
    nfe, decodes = nfe / picks.size, decodes / picks.size
    cost = nfe + pool.price * decodes
    return Evaluation(picks, values, nfe, decodes, cost, cost * pool.seconds_a_row)


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().float()
    return np.asarray(values, dtype=np.float32)


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet module.

    Raises:
        ImportError: they are not installed; the message says how to.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("pools are kept as Parquet, which needs pyarrow: pip install 'visearch[data]'") from error
    return arrow, parquet


def _read_arrays(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".pt":
            import torch

            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = np.load(path, allow_pickle=False)
            content = dict(content) if path.suffix == ".npz" else content
    except Exception as error:  # zip, pickle, header: every reader has its own
        raise ValueError(f"{path} is torn or holds other things than arrays ({error})") from error
    return content if isinstance(content, Mapping) else {"reward": content}


def _from_named(content: Mapping[str, Any]) -> Pool:
    arrays, settings, held_out = dict(content), {}, {}
    for name in ("stages", "steps", "seeds", "rows", "price", "seconds_a_row", "prompts", "tags"):
        if name in arrays:
            value = np.asarray(arrays.pop(name))
            settings[name] = value if name == "seeds" else value.tolist()
    prefix = PREFIX["held_out"]
    for name in [n for n in arrays if n.startswith(prefix)]:
        held_out[name.removeprefix(prefix)] = arrays.pop(name)
    return Pool.from_arrays(arrays, held_out=held_out, **settings)
