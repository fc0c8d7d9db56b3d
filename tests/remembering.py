"""What the tests of remembered scores do in processes of their own.

Those start afresh, since a fork of a process whose torch has run on several threads hangs in its first parallel loop.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from visearch.protocols import Scores
from visearch.rewards.cache import Cached
from visearch.rewards.images import to_pil


class Red:
    """Mean of the red channel, counted; the first pixel as a component; black images fail."""

    name, higher_is_better, range, licence, source = "red", True, (0.0, 255.0), "MIT", "tests"
    needs = frozenset({"pixels"})
    config_hash = "v1"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def score(self, samples, prompts, *, noise_level=None, metadata=None) -> Scores:
        pixels = [torch.from_numpy(np.array(image)).float().flatten(0, 1) for image in to_pil(samples)]
        self.seen.append(len(pixels))
        values = torch.stack([p[:, 0].mean() for p in pixels])
        black = [i for i, p in enumerate(pixels) if not p.any()]
        values[black] = math.nan
        return Scores(values, {"corner": torch.stack([p[0, 0] for p in pixels])}, dict.fromkeys(black, "it is black"))


def pictures(count: int, seed: int = 0, side: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1


def scored(cached: Cached, samples, prompt: str = "a cow", **context) -> tuple[list[float], int]:
    """Values, and how many of them the reward had to give."""
    before = cached.evaluations
    made = cached.score(samples, [prompt] * len(samples), **context)
    return made.values.tolist(), cached.evaluations - before


def in_processes(run, *calls) -> list:
    """What ``run`` returns of each of ``calls``, each in a process."""
    with ProcessPoolExecutor(len(calls), multiprocessing.get_context("spawn")) as pool:
        return [made.result(120) for made in [pool.submit(run, *call) for call in calls]]


def in_a_fork(run, *arguments):
    """What ``run`` returns in a child that inherits the arguments as they are: a pool would pickle them."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(run(*arguments)))
    child.start()
    sender.close()  # so that a child that fails ends the wait
    found = receiver.recv()
    child.join()
    return found


def work(path: Path, seed: int) -> list[float]:
    """Score what others score too, then what nobody else does."""
    cached = Cached(Red(), path)
    for i in range(5):
        scored(cached, pictures(8, seed=i))
    return scored(cached, pictures(40, seed=100 + seed))[0]


def ask(cached: Cached, *seeds: int) -> list[int]:
    """How many pictures of each seed had to be scored."""
    return [scored(cached, pictures(2, seed=seed))[1] for seed in seeds]


def fork(path: Path) -> list[int]:
    """What a child finds of what its parent scored, and the parent of what the child scored."""
    cached = Cached(Red(), path)
    ask(cached, 0)
    return [*in_a_fork(ask, cached, 0, 1), *ask(cached, 1)]


def fork_without_the_file(path: Path) -> tuple[list[list[float]], list[str]]:
    """Scores of a child that finds something else where its parent had the file, and what it is warned of."""
    cached = Cached(Red(), path)
    path.unlink()
    path.mkdir()
    return in_a_fork(heard, cached)


def score_on_a_full_disk(cached: Cached) -> tuple[list[list[float]], list[str], tuple[list[float], int]]:
    """Scores while no file may grow, what was warned of, and what of before is found."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return *heard(cached), scored(cached, pictures(4))


def heard(cached: Cached) -> tuple[list[list[float]], list[str]]:
    """Scores of two batches, and what was warned of."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        values = [scored(cached, pictures(64, seed=seed))[0] for seed in (1, 2)]
    return values, [str(w.message) for w in told]
