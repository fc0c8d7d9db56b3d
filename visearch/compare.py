"""``visearch compare``: searches side by side on the same prompts and seeds, at equal budget.

Each search runs live, one prompt at a time, beside best-of-N's pool for that prompt. What was measured is appended to a
file as it comes, one line a prompt, search, budget and reward; :class:`visearch.comparison.Comparison` reads it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visearch.bench import Bench, Entry, World, fields_of
from visearch.comparison import BAR, CLOCKS, POOL, Comparison
from visearch.monitor import check_absolute, check_held_out
from visearch.options import REWARD, add_command, device_of, load, model_arguments, reward_arguments
from visearch.prompts import PROMPTS_HELP, check_judgeable, read_prompts, share_arguments, spread
from visearch.protocols import Reward, Search
from visearch.rewards import RewardLike, check_names, resolve
from visearch.rewards.features import FeaturesLike
from visearch.runs import Runs
from visearch.search import SEARCHES, describe, parse
from visearch.search.best_of_n import BestOfN

__all__ = ["add_parser", "compare"]

HEADROOM = 1.5  # of best-of-N's pool: searches mostly take longer than best-of-N of as many model rows

Prompt = str | Mapping[str, Any]


def compare(
    generator: Any,
    prompts: Sequence[Prompt],
    searches: Sequence[str | Search] | Mapping[str, Search],
    budgets: Sequence[float] = (8,),
    rewards: Sequence[RewardLike] = ("emoji-clip",),
    held_out: Sequence[RewardLike] = (),
    *,
    seconds: Sequence[float] = (),
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    features: FeaturesLike | None = None,
    returned: int = 4,
    pool_size: int | None = None,
    batch: int = 8,
    rows: int | None = None,
    model: str | None = None,
    device: Any = "cpu",
    margin: float = 0.02,
    clock: str = "wall",
    out: str | Path | None = None,
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
) -> Comparison:
    """Run every search at every budget with every reward on every prompt, and best-of-N beside them.

    All searches of a prompt share its seed, and with it their first candidates. That seed is the prompt's own, see
    :func:`visearch.prompts.request_of`: candidate 0 is that of ``visearch record``, not of ``visearch run``, with the
    same ``seed``.

    Searches run one after the other, in an order that rotates from prompt to prompt, after a run that only warms up, so
    that their seconds can be compared. Best-of-N at all N is read from one pool a prompt, whose candidates are drawn
    once, ``batch`` at a time.

    Args:
        generator: a diffusers pipeline, or a :class:`visearch.Sampler`.
        prompts: texts, or lines of a GenEval prompt file, which judges get as metadata.
        searches: ``"halving(n=16)"``, a search, or ``"all"`` of the registry; or a mapping of labels to searches.
        budgets: image-equivalents a prompt, each at least 1.
        rewards: each guides every search in turn.
        held_out: judges; no search sees them.
        seconds: further budgets, in seconds a prompt: the searches run at their own size up to the deadline.
        call: arguments of the pipeline's call, all but prompt and generator.
        seed: each prompt's derives from it; a recorded pool has its candidates already.
        features: what diversity is measured by, see :func:`visearch.rewards.features.resolve_features`.
        returned: candidates in the set whose diversity and ancestors are told: the best of those that were finished.
        pool_size: candidates of best-of-N's pool; default what the folder has, if that is enough, else 1.5 times the
            largest budget.
        batch: candidates that best-of-N carries at once.
        rows: most candidates in one model call, for all.
        model: what tables call the generator.
        device: of rewards and judges that are given by name.
        margin, clock: see :class:`visearch.comparison.Comparison`.
        out: folder where what was measured is kept; the same call goes on from there.
        shard: (i, n): only part i of n, from 1; all parts may write to one folder.
        limit: only so many prompts, evenly spread.
        minutes: begin nothing more after so long; 0 only reads what is there.
        progress: show a bar.

    Raises:
        ValueError: before anything runs: an unknown search or reward, a budget below one image, no prompt, a judge that
            also guides or cannot judge a prompt, a search that this generator cannot serve, or a folder with results of
            other settings.
        RuntimeError: best-of-N itself failed.
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock!r} is unknown; use one of {', '.join(CLOCKS)}")
    _check(budgets, seconds, minutes, returned=returned, batch=batch, limit=limit, pool_size=pool_size)
    named, strict = _named(searches), "all" not in _listed(searches)
    guides, judges = _rewards(rewards, held_out, device)
    world = World(generator, _lines(prompts), dict(call or {}), seed, model)
    bench = Bench(world, guides, judges, features, returned, batch, rows)
    limits = [*((float(b), "images") for b in budgets), *((float(s), "seconds") for s in seconds)]
    entries, refused = bench.entries(named, limits, strict)
    everyone, mine = spread(len(world.lines), limit), spread(len(world.lines), limit, shard)
    if not world.recorded:
        check_judgeable([*guides, *judges], [world.lines[i] for i in everyone])
    runs = Runs(out, bench.config(), shard)
    if out is not None:
        runs.claim(bench.weights())
    size = _pool_size(bench, pool_size, runs.settings.get("pool_size", 0), budgets, seconds, parts=shard[1])
    runs.settings["pool_size"] = size
    units = [Entry(BAR, BestOfN(n=size, batch=batch), float(size), POOL), *entries]
    plan = [
        (index, guide, units[(turn + place) % len(units)])
        for turn, index in enumerate(mine)
        for guide in range(len(guides))
        for place in range(len(units))
    ]
    _carry_out(bench, runs, plan, minutes, progress)
    keys = [bench.key(i, guide, unit) for i in everyone for guide in range(len(guides)) for unit in units]
    shown = tuple((entry.label, entry.budget, entry.unit) for entry in entries)
    told = {**bench.config(), "prompts": len(everyone), "notes": bench.notes(), "exams": bench.exams()}
    return Comparison(told, runs.of(keys), shown, margin, refused, clock)


def _pool_size(
    bench: Bench, asked: int | None, known: int, budgets: Sequence[float], seconds: Sequence[float], parts: int
) -> int:
    """Candidates of best-of-n's pool: as asked for, or as many as the folder has, if they are enough."""
    least = max(budgets, default=1)
    size = asked or known
    if not asked and known < least:
        if seconds and parts > 1:
            raise ValueError("parts would size best-of-n's pool by their own seconds; give pool_size (--pool-size)")
        size = math.ceil(HEADROOM * bench.largest(budgets, seconds))
    size = min(size, bench.world.generator.pool.size) if bench.world.recorded else size
    if size < least:
        raise ValueError(f"best-of-n's pool of {size} is below the largest budget, {least:g}; enlarge pool_size")
    return size


def _carry_out(bench: Bench, runs: Runs, plan: Sequence[Any], minutes: float | None, progress: bool) -> None:
    from tqdm.auto import tqdm

    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    left = [unit for unit in plan if not runs.has(bench.key(*unit))]
    if left and minutes != 0:
        bench.warm_up(left[0][0])
    with tqdm(total=len(plan), initial=len(plan) - len(left), unit="run", disable=not progress) as bar:
        for index, guide, entry in left:
            if time.monotonic() >= end:
                break
            bar.set_postfix_str(f"{entry.label} {entry.budget:g} {entry.unit}")
            runs.append(bench.key(index, guide, entry), bench.measure(index, guide, entry))
            bar.update()


# --- what is asked for ----------------------------------------------------------------------------------------


def _check(budgets: Sequence[float], seconds: Sequence[float], minutes: float | None, **counts: Any) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes={minutes} must be at least 0")
    if not (budgets or seconds):
        raise ValueError("budgets and seconds are both empty; give one of them, such as budgets=(8,)")
    for value in budgets:
        if not 1 <= value < math.inf:
            raise ValueError(f"budget={value:g} must be at least one image-equivalent a prompt, such as 8")
    for value in seconds:
        if not 0 < value < math.inf:
            raise ValueError(f"seconds={value:g} must be greater than 0")


def _lines(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    lines = [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
    if not lines:
        raise ValueError("prompts is empty; give at least one")
    for line in lines:
        if not (isinstance(line.get("prompt"), str) and line["prompt"].strip()):
            raise ValueError(f"prompt {line!r} is empty; give a text, or a mapping that holds one as 'prompt'")
    return lines


def _rewards(
    rewards: Sequence[RewardLike], held_out: Sequence[RewardLike], device: Any
) -> tuple[list[Reward], list[Reward]]:
    check_names([*rewards, *held_out])
    guides, judges = ([resolve(r, device) for r in given] for given in (rewards, held_out))
    if not guides:
        raise ValueError("rewards is empty; a search needs one to guide it")
    check_held_out(guides, judges)
    check_absolute(guides)
    return guides, judges


def _listed(searches: Any) -> Any:
    return [searches] if isinstance(searches, str) else searches


def _named(searches: Sequence[str | Search] | Mapping[str, Search]) -> dict[str, Search]:
    """Label -> search."""
    if isinstance(searches, Mapping):
        return dict(searches)
    found: dict[str, Search] = {}
    for given in _listed(searches):
        if given == "all":
            found |= {name: SEARCHES.load(name)() for name in SEARCHES if name != BAR}
        elif isinstance(given, str):
            found[given] = parse(given)
        else:
            found[_text(given)] = given
    if not found:
        raise ValueError(f"searches is empty; name some of {', '.join(SEARCHES)}")
    if BAR in found:
        raise ValueError(
            f"{BAR} is what all are compared with, at every budget; leave it out, or write {BAR}(n=8) to run it as well"
        )
    return found


def _text(search: Search) -> str:
    """Short where the search has a text, the same in every process."""
    try:
        return describe(search)
    except ValueError:  # made of something that is not registered
        return fields_of(search)


# --- the command ----------------------------------------------------------------------------------------------

EXAMPLES = """
examples:
  visearch compare validation --limit 12 --search "halving(n=16)" --budget 8 --held-out judge-a judge-b
      is halving worth it at the cost of eight images? guided by the embedded CLIP, before two judges
  visearch compare prompts.txt --search all --budget 8 --budget 16 --model stabilityai/stable-diffusion-xl-base-1.0 \\
      --dtype float16 --reward open-clip:ViT-H-14/laion2b_s32b_b79k --out outputs/sdxl
      every search on your model; the same command again goes on after a crash
  visearch compare report --search halving --shard 1/2 &  visearch compare report --search halving --shard 2/2
      two processes share the prompts
  visearch compare report --search halving --minutes 0
      runs nothing: tables and picture of what is there
  visearch compare --pool pool.parquet --search halving --budget 4 --budget 8
      on what visearch record wrote, in seconds instead of hours, for searches that only select

writes to OUT:
  summary.md, summary.json   costs, gains, judges, warnings, with 95 % intervals
  comparison.png             reward and judges against model rows and against seconds
  per-prompt.csv             every winner
  runs*.jsonl, config.json   what was measured
"""


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = add_command(
        commands,
        "compare",
        _compare,
        help="searches side by side at equal budget, beside best-of-n, before judges that they never saw",
        description="Runs searches on the same prompts and seeds and says whether each is worth more than best-of-n at "
        "as many model rows, and at as many seconds. Warns where the reward rises and a judge falls.",
        examples=EXAMPLES,
    )
    parser.add_argument("prompts", nargs="?", metavar="PROMPTS", help=PROMPTS_HELP)
    parser.add_argument(
        "--pool",
        metavar="FILE",
        help="instead of prompts and a model: what visearch record wrote, all of whose rewards and judges are taken "
        "unless some are named; for searches that only select",
    )
    model_arguments(parser)
    _compared_arguments(parser.add_argument_group("what is compared"))
    run = parser.add_argument_group("the run")
    run.add_argument("--out", default="outputs/compare", metavar="DIR", help="folder (default %(default)s)")
    share_arguments(run)


def _compared_arguments(what: Any) -> None:
    what.add_argument(
        "--search",
        action="append",
        required=True,
        metavar="SEARCH",
        help=f"a name, with hyperparameters as in 'halving(n=16)', or all; may be repeated: {', '.join(_comparable())}",
    )
    what.add_argument(
        "--budget",
        action="append",
        type=float,
        metavar="N",
        help="image-equivalents a prompt; may be repeated (default 8)",
    )
    what.add_argument(
        "--seconds", action="append", type=float, default=[], metavar="S", help="a budget in seconds a prompt"
    )
    reward_arguments(what, several=True)
    what.add_argument("--features", metavar="NAME", help="what diversity is measured by (default: the reward's own)")
    what.add_argument("--margin", type=float, default=0.02, help="what a judge may lose (default %(default)s)")
    what.add_argument("--pool-size", type=int, metavar="N", help="of best-of-n (default 1.5 x the largest budget)")
    what.add_argument(
        "--seed",
        type=int,
        default=0,
        help="each prompt derives its own from it, as in visearch record (default %(default)s)",
    )
    what.add_argument(
        "--clock",
        choices=CLOCKS,
        help="wall; cpu: core-seconds, for a busy machine; model: in models and rewards alone (default wall; with "
        "--pool model)",
    )


def _comparable() -> list[str]:
    """Searches by name, but those that cannot run one prompt at a time."""
    return [name for name in SEARCHES if not getattr(SEARCHES.load(name), "across_prompts", False)]


def _live(options: argparse.Namespace) -> tuple[Any, ...]:
    """Generator, prompts, arguments of its call, rewards and judges."""
    lines, device = read_prompts(options.prompts), device_of(options.device)
    guides, judges = _rewards(options.reward or [REWARD], options.held_out, device)
    pipe, call = load(options, device)
    return pipe, lines, call, guides, judges


def _recorded(options: argparse.Namespace) -> tuple[Any, ...]:
    """The same of a pool; all that it holds is shown where nothing is named."""
    from visearch.pipelines.recorded import RecordedReward, RecordedSampler
    from visearch.pool import Pool

    pool = Pool.load(options.pool)
    lines = [{"prompt": p, "tag": t} for p, t in zip(pool.prompts, pool.tags, strict=True)]
    guides = [RecordedReward(pool, name) for name in options.reward or pool.scores]
    judges = [RecordedReward(pool, name) for name in options.held_out or pool.held_out]
    return RecordedSampler(pool), lines, {}, guides, judges


def _compare(options: argparse.Namespace) -> int:
    if (options.prompts is None) == (options.pool is None):
        raise ValueError("give either PROMPTS or --pool FILE")
    budgets = options.budget or ([] if options.seconds else [8.0])
    checked = {"limit": options.limit, "pool_size": options.pool_size}
    _check(budgets, options.seconds, options.minutes, **checked)
    _named(options.search)
    generator, lines, call, guides, judges = (_recorded if options.pool else _live)(options)
    run = partial(
        compare,
        generator,
        lines,
        options.search,
        budgets,
        guides,
        judges,
        seconds=options.seconds,
        call=call,
        seed=options.seed,
        features=options.features,
        pool_size=options.pool_size,
        rows=options.rows,
        model=options.pool or options.model,
        margin=options.margin,
        clock=options.clock or ("model" if options.pool else "wall"),
        out=options.out,
        shard=options.shard,
        limit=options.limit,
    )
    try:
        found, status = run(minutes=options.minutes), 0
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        found, status = run(minutes=0), 130
    found.save(options.out)
    print(found.markdown())
    for warning in found.warnings:
        if not warning.startswith("possible"):
            print(f"warning: {warning}", file=sys.stderr)
    print(f"{options.out}/summary.md, comparison.png, per-prompt.csv")
    return status or int(bool(found.failures))
