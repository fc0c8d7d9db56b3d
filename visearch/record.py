"""``visearch record``: draw prompts x seeds once and keep every reward and verdict, for searches to be tried on.

One file a prompt is written beside the pool, atomically, so that a run which is killed goes on where it was, several
processes can share the work, and what is there can be merged at any time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visearch.journal import changes, replace_text, settings_hash
from visearch.monitor import check_absolute, check_held_out
from visearch.options import REWARD, add_command, device_of, dtype_of, load, model_arguments, reward_arguments
from visearch.pool import Pool, pyarrow
from visearch.previews import Previews
from visearch.prompts import PROMPTS_HELP, check_judgeable, read_prompts, request_of, share_arguments, spread
from visearch.protocols import Request, Reward, Sampler, leaves

__all__ = ["add_parser", "merge", "record", "stages_of"]

EXAMPLES = """
examples:
  visearch record validation --out pool.parquet --held-out judge-a --held-out judge-c
      123 prompts x 32 seeds of the embedded model, its CLIP on the preview after every step, verdicts on the finals
  visearch record prompts.txt --out pool.parquet --model stabilityai/stable-diffusion-xl-base-1.0 --dtype float16 \\
      --reward open-clip:ViT-H-14/laion2b_s32b_b79k --stages every:5 --seeds 16 --rows 4
      any pipeline and reward; the same command again goes on after a crash
  visearch record report --out pool.parquet --shard 1/2 &  visearch record report --out pool.parquet --shard 2/2
      two processes share the prompts; the last one to end merges all
  visearch record report --out pool.parquet --merge
      draws nothing: the pool of what has been recorded so far
"""


def record(
    sampler: Sampler,
    rewards: Sequence[Reward],
    lines: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    seeds: int = 32,
    seed: int = 0,
    held_out: Sequence[Reward] = (),
    stages: Sequence[int] | None = None,
    judge_stages: str = "final",
    config: Mapping[str, Any] | None = None,
    rows: int | None = None,
    limit: int | None = None,
    shard: tuple[int, int] = (1, 1),
    minutes: float | None = None,
    progress: bool = False,
    previews: Previews | None = None,
) -> Pool:
    """Draw what ``folder`` still lacks, and merge all that it holds.

    A prompt's candidates are those of :func:`visearch.compare.compare` with the same ``seed``: all derive from a seed
    of the prompt's own, see :func:`visearch.prompts.request_of`, which is that of candidate 0. The price of a decode
    and score is that of the first reward. Memory does not grow with the number of prompts.

    Args:
        sampler: draws.
        rewards: score the preview at each recorded stage, and the result.
        lines: P mappings with ``prompt``, maybe ``tag``; those with ``include`` are GenEval metadata for the judges.
        folder: one file a prompt, and what they were made with.
        seeds: S, candidates a prompt.
        seed: each prompt's derives from it.
        held_out: judges that no search will see.
        stages: where to score; default all milestones. The last is always among them.
        judge_stages: ``"final"``, or ``"all"`` to judge previews too.
        config: JSON-able; what else decides the outcome (model, call), so that other settings are never mixed in.
        rows: most candidates in one model call; default S.
        limit: most prompts, spread evenly over ``lines``.
        shard: (i, n): only part i of n, from 1.
        minutes: begin no prompt after so long.
        progress: show a bar.
        previews: keeps the images, too.

    Raises:
        ValueError: an argument out of range, a judge that cannot judge a prompt, or a ``folder`` of other settings.
    """
    import torch
    from tqdm.auto import tqdm

    from visearch.budget import MeteredReward

    stages = _stages(sampler, stages)
    _check(rewards, held_out, lines, seeds, judge_stages)
    order = spread(len(lines), limit, shard)
    folder, end = Path(folder), None if minutes is None else time.monotonic() + 60 * minutes
    settings = _settings(sampler, rewards, held_out, stages, seeds, seed, judge_stages, config or {})
    key = _claim(folder, settings)
    ids = Request(tuple(line["prompt"] for line in lines)).prompt_ids
    missing = [p for p in order if _lacks(folder, previews, ids[p])]
    check_judgeable([*rewards, *held_out], [lines[p] for p in missing])
    guides, judges = ([MeteredReward(r, None) for r in kind] for kind in (rewards, held_out))
    with tqdm(total=len(order), initial=len(order) - len(missing), unit="prompt", disable=not progress) as bar:
        for p in missing:
            if end is not None and time.monotonic() > end:
                break
            if _lacks(folder, previews, ids[p]):  # else another process was faster
                alone = request_of(lines[p], ids[p], seed)
                with torch.no_grad():
                    part = _draw(sampler, guides, judges, alone, seeds, stages, judge_stages, rows, previews)
                facts = {"key": key, "index": p, "prompt": lines[p]["prompt"], "tag": lines[p].get("tag", "")}
                replace_text(folder / _name(ids[p]), json.dumps({**facts, **part}))
            bar.update()
    return merge(folder)


def merge(folder: str | Path) -> Pool:
    """The pool of all prompts that were recorded in ``folder`` so far, in the order of the prompt file.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    names = sorted(folder.glob("prompt-*.json"))
    parts = sorted(filter(None, map(_parse, names)), key=lambda part: part["index"])
    if not parts:
        raise ValueError(f"nothing is recorded in {folder}; run visearch record without --merge first")
    seconds = {k: float(np.median([part["seconds"][k] for part in parts])) for k in parts[0]["seconds"]}
    first, a_row = next(iter(parts[0]["scores"])), seconds["row"]
    return Pool(
        prompts=[part["prompt"] for part in parts],
        tags=[part["tag"] for part in parts],
        seeds=np.array([part["seeds"] for part in parts]),
        steps=settings["stages"][-1],
        stages=settings["stages"],
        rows=settings["rows"],
        price=(seconds["decode"] + seconds[first]) / a_row,
        scores={name: np.array([part["scores"][name] for part in parts]) for name in parts[0]["scores"]},
        held_out={name: np.array([part["held_out"][name] for part in parts]) for name in parts[0]["held_out"]},
        seconds_a_row=a_row,
        meta={**settings, "seconds": seconds, "index": [part["index"] for part in parts]},
    )


# --- drawing --------------------------------------------------------------------------------------------------


def _draw(
    sampler: Sampler,
    guides: Sequence[Any],
    judges: Sequence[Any],
    request: Request,
    seeds: int,
    stages: Sequence[int],
    judge_stages: str,
    rows: int | None,
    previews: Previews | None,
) -> dict[str, Any]:
    """All candidates of one prompt, at all stages."""
    from visearch.budget import Ledger, MeteredSampler

    metered = MeteredSampler(sampler, ledger := Ledger(), rows=rows)
    for scorer in (*guides, *judges):
        scorer.count_in(Ledger())
    texts, lines = list(request.reward_prompts) * seeds, list(request.metadata) * seeds
    columns: dict[str, list[Any]] = {scorer.name: [] for scorer in (*guides, *judges)}
    live = metered.init(request, request.seeds(0, seeds))
    drawn, kept = list(live.seed), {}
    for stage in stages:
        live = metered.advance(live, stage)
        final = stage == metered.num_stages
        images = metered.decode(live if final else metered.predict_x0(live))
        if previews:
            kept |= previews.encode(stage, images)
        judging = judges if final or judge_stages == "all" else ()
        for scorer in (*guides, *judging):
            columns[scorer.name].append(scorer(images, texts, metered.noise_level(stage), lines).tolist())
    if previews:
        previews.save(request.prompt_ids[0], kept)
    tables = {name: np.array(found, dtype=np.float32).T for name, found in columns.items()}
    seconds = {"row": ledger.seconds["denoiser"] / ledger.nfe, "decode": ledger.seconds["decode"] / ledger.decodes}
    for scorer in (*guides, *judges):
        samples = sum(scorer.ledger.rewards.values()) / len(leaves(scorer.inner))
        seconds[scorer.name] = scorer.ledger.seconds["reward"] / samples
    return {
        "seeds": drawn,
        "scores": {scorer.name: tables[scorer.name].tolist() for scorer in guides},
        "held_out": {
            scorer.name: (tables[scorer.name] if judge_stages == "all" else tables[scorer.name][:, -1]).tolist()
            for scorer in judges
        },
        "nfe": ledger.nfe,
        "decodes": ledger.decodes,
        "seconds": seconds,
    }


def _stages(sampler: Sampler, stages: Sequence[int] | None) -> tuple[int, ...]:
    wanted = set(sampler.milestones if stages is None else stages)
    if strange := wanted - set(sampler.milestones):
        raise ValueError(f"stages {sorted(strange)} are none of the sampler's: {sampler.milestones}")
    return tuple(sorted({*wanted, sampler.num_stages}))


def _check(
    rewards: Sequence[Reward],
    held_out: Sequence[Reward],
    lines: Sequence[Mapping[str, Any]],
    seeds: int,
    judge_stages: str,
) -> None:
    if not rewards:
        raise ValueError("rewards is empty; give at least one")
    check_held_out(rewards, held_out)
    check_absolute(rewards)
    for name, value in (("seeds", seeds), ("prompts", len(lines))):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if judge_stages not in ("final", "all"):
        raise ValueError(f"judge_stages={judge_stages!r} is unknown; use 'final' or 'all'")


# --- files ----------------------------------------------------------------------------------------------------


def _settings(
    sampler: Sampler,
    rewards: Sequence[Reward],
    held_out: Sequence[Reward],
    stages: Sequence[int],
    seeds: int,
    seed: int,
    judge_stages: str,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides the numbers, JSON-able."""
    from visearch.report import versions

    libraries = {k: v for k, v in versions().items() if k in ("torch", "diffusers", "transformers")}
    settings = {
        "sampler": type(sampler).__name__,
        "stages": list(stages),
        "rows": [sampler.nfe(0, stage) for stage in stages],
        "noise_levels": [sampler.noise_level(stage) for stage in stages[:-1]],
        "seeds": seeds,
        "seed": seed,
        "rewards": {r.name: str(r.source) for r in rewards},
        "held_out": {r.name: str(r.source) for r in held_out},
        "judge_stages": judge_stages,
        "versions": libraries,
        **config,
    }
    return json.loads(json.dumps(settings, default=str))


def _claim(folder: Path, settings: Mapping[str, Any]) -> str:
    """Name of these settings; the first record in a folder decides which they are.

    Raises:
        ValueError: the folder holds records of others.
    """
    path = folder / "config.json"
    if path.is_file() and any(folder.glob("prompt-*.json")):
        known = json.loads(path.read_text())
        was, now = changes(known, settings)
        if was:
            raise ValueError(f"{folder} was recorded with {was}, now it is {now}; choose another --out, or delete it")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(settings))
    return settings_hash(settings)


def _name(prompt_id: int) -> str:
    return f"prompt-{prompt_id:016x}.json"


def _read(folder: Path, prompt_id: int) -> dict[str, Any] | None:
    path = folder / _name(prompt_id)
    return _parse(path) if path.is_file() else None


def _lacks(folder: Path, previews: Previews | None, prompt_id: int) -> bool:
    return _read(folder, prompt_id) is None or (previews is not None and prompt_id not in previews)


def _parse(path: Path) -> dict[str, Any] | None:
    """A prompt's record; ``None`` if it is torn, to be drawn again.

    Raises:
        ValueError: it was made with other settings than its folder.
    """
    try:
        part = json.loads(path.read_text())
    except ValueError:
        return None
    settings = json.loads((path.parent / "config.json").read_text())
    if part["key"] != settings_hash(settings):
        raise ValueError(f"{path} was recorded with other settings than {path.parent}/config.json; delete it")
    return part


# --- the command ----------------------------------------------------------------------------------------------


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = add_command(
        commands,
        "record",
        _record,
        help="draw prompts x seeds once and keep all rewards, to try searches on at no cost",
        description="Draws every prompt with every seed once, scores the preview after each step, and writes a pool "
        "(Parquet). Searches that only select, their schedules and their stop rules are then evaluated on it exactly. "
        "Records lie beside it in OUT.parts, so that the same command goes on after a crash.",
        examples=EXAMPLES,
    )
    parser.add_argument("prompts", metavar="PROMPTS", help=PROMPTS_HELP)
    parser.add_argument("--out", required=True, metavar="FILE", help="the pool, FILE.parquet")
    model_arguments(parser)
    what = parser.add_argument_group("what is recorded")
    reward_arguments(what, several=True)
    what.add_argument("--seeds", type=int, default=32, metavar="S", help="candidates a prompt (default %(default)s)")
    what.add_argument(
        "--seed",
        type=int,
        default=0,
        help="each prompt derives its own from it, as in visearch compare (default %(default)s)",
    )
    what.add_argument(
        "--stages", default="all", metavar="all|every:K|A,B,...", help="where to score previews (default %(default)s)"
    )
    what.add_argument(
        "--judge-stages", default="final", choices=["final", "all"], help="what judges see (default %(default)s)"
    )
    run = parser.add_argument_group("the run")
    share_arguments(run)
    run.add_argument("--merge", action="store_true", help="draw nothing, write the pool of what there is")


def _record(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if out.suffix != ".parquet":
        raise ValueError(f"--out {out} must end in .parquet")
    try:
        pyarrow()
    except ImportError as error:  # before hours of work
        raise ValueError(str(error)) from error
    parts, interrupted = out.with_name(out.name + ".parts"), False
    if not options.merge:
        try:
            pool = _record_all(options, parts)
        except KeyboardInterrupt:
            interrupted = True
    if options.merge or interrupted:
        pool = merge(parts)
    pool.save(out)
    prompts, size = pool.seeds.shape
    print(
        f"{out}: {prompts} prompts x {size} seeds at {len(pool.stages)} of {pool.steps} stages; one candidate costs "
        f"{pool.rows[-1]} model rows of {1000 * pool.seconds_a_row:.2f} ms, one decode and score {pool.price:.2f} rows"
    )
    if interrupted:
        print("interrupted; the same command goes on")
    return 130 if interrupted else 0


def _record_all(options: argparse.Namespace, parts: Path) -> Pool:
    lines = read_prompts(options.prompts)
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.rewards import resolve

    device = device_of(options.device)
    rewards, held_out = (
        [resolve(n, device) for n in names] for names in (options.reward or [REWARD], options.held_out)
    )
    pipe, call = load(options, device)
    sampler = DiffusionSampler(pipe, call, example={"prompt": lines[0]["prompt"]})
    return record(
        sampler,
        rewards,
        lines,
        parts,
        seeds=options.seeds,
        seed=options.seed,
        held_out=held_out,
        stages=stages_of(options.stages, sampler),
        judge_stages=options.judge_stages,
        config={
            "model": options.model,
            "call": call,
            "dtype": dtype_of(options.dtype, device),
            "device": device.split(":")[0],
        },
        rows=options.rows,
        limit=options.limit,
        shard=options.shard,
        minutes=options.minutes,
        progress=True,
    )


def stages_of(text: str, sampler: Sampler) -> list[int] | None:
    """What ``--stages`` says; ``None`` is all milestones."""
    if text == "all":
        return None
    name, _, value = text.partition(":")
    numbers = [value] if name == "every" else text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in numbers):
        raise ValueError(f"--stages {text} is none of: all, every:K, or stages such as 4,8,12")
    if name == "every":
        return [m for m in sampler.milestones if m % int(value) == 0]
    return [int(part) for part in numbers]
