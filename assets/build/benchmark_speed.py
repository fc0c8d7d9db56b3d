"""Speed of searching on emoji-64: what it adds to the models' own time, and what it saves. Prints the table.

    python assets/build/benchmark_speed.py [--rounds 5] [--n 8] [--threads 2] [--out speed.json]

Everything is timed in one process, the variants in turn within each round; figures are medians over rounds, with the
lowest and highest round. Model time is taken by clocks set on the transformer, on ``vae.decode`` and on the reward
before the pipeline is wrapped, so that the library's own ledger is checked, not believed. Run it on an idle machine.

- *overhead*: (wall - transformer - decoder - reward) / wall of a search, text encoding included in the overhead.
- *against a loop*: wall of a Python loop over plain calls of the bare pipeline, one image each, scored one by one, over
  the wall of best-of-N: the same model rows, images and scores.
- *halving*: share of best-of-N's wall that successive halving saves, beside what the two ledgers say.
- *items*: cost of re-entering the loop and of each skipped step (a line through ``advance`` by one stage from every
  stage), of a preview beyond its decoding, and of a score.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visearch import BestOfN, SearchPipeline, SuccessiveHalving
from visearch.pipelines import emoji
from visearch.pipelines.diffusion import DiffusionSampler
from visearch.protocols import Request
from visearch.rewards import resolve

PROMPT = "a photo of two cows"


class Clocks:
    """Seconds inside functions that are replaced by timed ones."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - begin

        setattr(owner, name, timed)

    def run(self, function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
        """Wall and watched seconds of a call, and what it returned."""
        self.seconds.clear()
        begin = time.perf_counter()
        result = function()
        return {"wall": time.perf_counter() - begin, **self.seconds}, result


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def plain_loop(pipe: Any, reward: Any, n: int) -> Any:
    """What a user writes without a library: n plain calls, n scores, the best image."""
    best, best_score = None, float("-inf")
    for i in range(n):
        image = pipe(PROMPT, generator=seed(i), output_type="pt", **emoji.DEFAULTS).images
        score = float(reward.score(image, [PROMPT], noise_level=None, metadata=[None]).values[0])
        if score > best_score:
            best, best_score = image, score
    return best


def overhead(times: dict[str, float]) -> float:
    return 1 - sum(times.get(k, 0.0) for k in ("transformer", "decoder", "reward")) / times["wall"]


def items(pipe: Any, clocks: Clocks, reward: Any, rows: int) -> dict[str, float]:
    """Milliseconds of the parts of a round that are not the models' own."""
    sampler = DiffusionSampler(pipe, emoji.DEFAULTS)
    request = Request((PROMPT,), seed=0)
    population = sampler.init(request, request.seeds(0, rows))
    entries, previews, scores = [], [], []
    for stage in range(1, sampler.num_stages + 1):
        times, population = clocks.run(lambda p=population, s=stage: sampler.advance(p, s))
        entries.append(times["wall"] - times["transformer"])
        if stage < sampler.num_stages:
            times, images = clocks.run(lambda p=population: sampler.decode(sampler.predict_x0(p)))
            previews.append(times["wall"] - times["decoder"])
            times, _ = clocks.run(
                lambda x=images: reward.score(x, [PROMPT] * rows, noise_level=None, metadata=[None] * rows)
            )
            scores.append(times["wall"])
    slope, intercept = np.polyfit(np.arange(len(entries)), entries, 1)
    return {
        "re-entry, ms": 1e3 * float(intercept),
        "skipped step, ms": 1e3 * float(slope),
        "preview beyond its decoding, ms": 1e3 * statistics.median(previews),
        "score of a batch, ms": 1e3 * statistics.median(scores),
    }


def measure(n: int, rounds: int) -> dict[str, list[float]]:
    pipe, reward, clocks = emoji.load(), resolve("emoji-clip"), Clocks()
    pipe.set_progress_bar_config(disable=True)
    clocks.watch(pipe.transformer, "forward", "transformer")
    clocks.watch(pipe.vae, "decode", "decoder")
    clocks.watch(reward, "score", "reward")
    searches = {
        "best-of-n": SearchPipeline(pipe, reward=reward, search=BestOfN(n=n, batch=n)),
        "halving": SearchPipeline(pipe, reward=reward, search=SuccessiveHalving(n=n)),
    }
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    for index in range(-1, rounds):  # the first round warms up
        walls, spent = {}, {}
        for name, search in searches.items():
            times, output = clocks.run(lambda s=search, i=index: s(PROMPT, generator=seed(i + 1), **emoji.DEFAULTS))
            ledger = output.search.ledger
            walls[name] = times["wall"]
            spent[name] = sum(v for k, v in ledger.seconds.items() if k != "total")
            if index >= 0:
                note(**{f"{name}: wall, s": times["wall"], f"{name}: overhead, %": 100 * overhead(times)})
                note(**{f"{name}: model rows": ledger.nfe, f"{name}: decodes": ledger.decodes})
                note(**{f"{name}: ledger beside wall, %": 100 * spent[name] / times["wall"]})
        times, _ = clocks.run(lambda: plain_loop(pipe, reward, n))
        if index < 0:
            continue
        note(**{"plain loop: wall, s": times["wall"], "loop / best-of-n": times["wall"] / walls["best-of-n"]})
        saved = 1 - walls["halving"] / walls["best-of-n"]
        said = 1 - spent["halving"] / spent["best-of-n"]
        note(**{"halving saves, % of wall": 100 * saved, "halving saves by ledger, %": 100 * said})
        note(**{"difference of the two, points": 100 * abs(saved - said)})
        note(**items(pipe, clocks, reward, n))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--n", type=int, default=8, help="candidates (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every round as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.n, options.rounds)
    print(f"emoji-64, n={options.n}, {options.rounds} rounds, {options.threads} threads, torch {torch.__version__}\n")
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.3g} | {min(values):.3g} | {max(values):.3g} |")
    if options.out:
        options.out.write_text(json.dumps({"options": {**vars(options), "out": None}, "rounds": found}, indent=1))


if __name__ == "__main__":
    main()
