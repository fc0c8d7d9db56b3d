"""``visearch train-reward``: teach a reward to judge previews by what they become, and measure what that is worth."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from visearch.options import add_command, device_of, dtype_of, load, model_arguments, reward_arguments
from visearch.prompts import PROMPTS_HELP, read_prompts
from visearch.protocols import stable_hash
from visearch.record import record, stages_of

__all__ = ["add_parser", "split"]

UNSEEN = 10  # one prompt in so many is kept for the evaluation

EXAMPLES = """
examples:
  visearch train-reward --prompts prompts.txt --out outputs/noise-aware
      the embedded model and its CLIP: draws 8 trajectories a prompt, trains, and evaluates on a tenth of the prompts
  visearch train-reward --prompts prompts.txt --out outputs/sdxl --model stabilityai/stable-diffusion-xl-base-1.0 \\
      --reward image-reward --rows 4 --stages every:2 --unseen validation.txt --unseen-seeds 32
      any pipeline and any reward with a model; the same command again goes on after a crash
  visearch run "a photo of two cows" --reward noise-aware:outputs/noise-aware/reward --search "halving(n=16)"
      what it is for
"""


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = add_command(
        commands,
        "train-reward",
        _train_reward,
        help="teach a reward to judge previews by what they become, from your own generator's trajectories",
        description="Draws trajectories and keeps every preview, trains small differences to the reward's weights by "
        "self-distillation, chooses at each level how strongly they act by an eighth of the prompts, and measures on "
        "unseen ones what that is worth. The same command goes on after a crash. "
        "OUT/reward is what --reward noise-aware:OUT/reward takes.",
        examples=EXAMPLES,
    )
    parser.add_argument("--prompts", required=True, metavar="PROMPTS", help=f"to train on: {PROMPTS_HELP}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for draws, checkpoint, reward, evaluation")
    model_arguments(parser)
    reward_arguments(parser)
    draws = parser.add_argument_group("draws")
    draws.add_argument("--seeds", type=int, default=8, metavar="S", help="trajectories a prompt (default %(default)s)")
    draws.add_argument(
        "--stages", default="all", metavar="all|every:K|A,B,...", help="levels to keep (default %(default)s)"
    )
    draws.add_argument("--limit", type=int, metavar="N", help="most training prompts, spread evenly over the file")
    draws.add_argument("--minutes", type=float, metavar="M", help="draw no more to train on after M minutes")
    draws.add_argument("--unseen", metavar="PROMPTS", help="to evaluate on (default: a tenth of --prompts, kept out)")
    draws.add_argument(
        "--unseen-seeds", type=int, default=16, metavar="S", help="candidates of those (default %(default)s)"
    )
    how = parser.add_argument_group("training")
    how.add_argument("--rank", type=int, default=16, help="of the differences (default %(default)s)")
    how.add_argument("--passes", type=int, default=4, help="over the prompts, for each level (default %(default)s)")
    how.add_argument("--group", type=int, default=16, metavar="G", help="prompts a step (default %(default)s)")
    how.add_argument("--rate", type=float, default=1e-4, help="learning rate (default %(default)s)")
    how.add_argument("--pairs", type=float, default=0.0, help="weight of the loss on pairs (default %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of draws and training (default %(default)s)")


def _train_reward(options: argparse.Namespace) -> int:
    from visearch.distill import Settings, Trajectories, choose_strengths, rescored, train
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.preview_report import evaluate
    from visearch.previews import Previews
    from visearch.report import check_folder, write_json
    from visearch.rewards import resolve
    from visearch.rewards.noise_aware import NoiseAware

    settings = Settings(options.passes, options.group, options.rate, options.pairs, options.seed)
    seen, unseen = _lines(options)
    out, device = check_folder(options.out), device_of(options.device)
    reward, held_out = resolve(options.reward, device), [resolve(name, device) for name in options.held_out]
    aware = NoiseAware(reward, rank=options.rank)
    pipe, call = load(options, device)
    sampler = DiffusionSampler(pipe, call, example={"prompt": seen[0]["prompt"]})
    dtype = dtype_of(options.dtype, device)
    config = {"model": options.model, "call": call, "dtype": dtype, "device": device.split(":")[0]}

    def draw(name: str, lines: Sequence[Any], seeds: int, **more: Any) -> Any:
        previews = Previews(out / name)
        kept = {"config": {**config, "previews": previews.side}, "stages": stages_of(options.stages, sampler)}
        common = {"seeds": seeds, "seed": options.seed, "rows": options.rows, "progress": True, "previews": previews}
        return Trajectories.of(record(sampler, [reward], lines, out / name, **kept, **common, **more), lines, previews)

    tested = draw("unseen", unseen, options.unseen_seeds, held_out=held_out)
    drawn = draw("draws", seen, options.seeds, limit=options.limit, minutes=options.minutes)
    taught, choosing = drawn.split()
    train(aware, taught, out, settings, progress=True)
    chosen = choose_strengths(aware, choosing)
    aware.save(out / "reward")
    report = evaluate(rescored(aware, tested))
    write_json(out / "evaluation.json", {**asdict(report), "tau_by_strength": chosen})
    print(f"{report.markdown()}\n\n{out / 'reward'}: give --reward noise-aware:{out / 'reward'}")
    return 0


def _lines(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Prompts to train on and to evaluate with, no text in both."""
    from visearch.distill import CHOOSE, chooses

    lines = read_prompts(options.prompts)
    seen, unseen = split(lines) if options.unseen is None else (lines, read_prompts(options.unseen))
    if shared := {line["prompt"] for line in seen} & {line["prompt"] for line in unseen}:
        raise ValueError(
            f"--unseen {options.unseen} shares {len(shared)} prompts with --prompts, {min(shared)!r} for one; leave "
            "them out of either"
        )
    if len({chooses(line["prompt"]) for line in seen}) < 2:
        raise ValueError(
            f"--prompts {options.prompts} has too few prompts: one in {CHOOSE} is kept to choose strengths by; give "
            "some hundreds"
        )
    return seen, unseen


def split(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Prompts to train on, and a tenth that stays unseen; equal texts stay together.

    Raises:
        ValueError: too few prompts for either part.
    """
    seen, unseen = [], []
    for line in lines:
        (seen if stable_hash("unseen", line["prompt"]) % UNSEEN else unseen).append(line)
    if not seen or not unseen:
        raise ValueError(f"of {len(lines)} prompts none is left to train on or to evaluate; give more, or --unseen")
    return seen, unseen
