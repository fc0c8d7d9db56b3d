"""``visearch geneval generate``: the images of a prompt file, each sampled once or the winner of a search of its own.

Prompts are searched several at a time, in packs that are cut from the whole list before anything else: no share of
the work and no crash changes which images are made together, and with it a bit of any. An image is finished when its
file and its entry in ``search.json`` are there; a pack that lacks one is run again whole, and what it lacks is written.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from visearch.budget import Budget
from visearch.geneval.folder import config_of, image_path, name_of
from visearch.journal import changes, replace_text, settings_hash
from visearch.monitor import check_held_out
from visearch.options import REWARD, STOPS, dtype_of, load
from visearch.parallel import place, work
from visearch.prompts import check_judgeable, metadata_of, read_prompts, seed_of, spread
from visearch.protocols import Request, Reward, Search, identity, stable_hash

__all__ = ["Drawn", "Painter", "Wanted", "generate", "packs_of"]

FORMAT = 1
CANDIDATES = 32  # that a pack begins with, unless a single prompt has more


@dataclass(frozen=True)
class Wanted:
    """An image to be made: number ``image`` of the prompt ``line`` in folder ``prompt``."""

    prompt: int
    image: int
    prompt_id: int
    line: Mapping[str, Any] = field(compare=False)

    @property
    def id(self) -> int:
        """What its random streams derive from; image 0 shares it with everything else that samples the prompt."""
        return stable_hash(self.prompt_id, self.image) if self.image else self.prompt_id


@dataclass(frozen=True)
class Drawn:
    """An image and what ``search.json`` tells of it: seconds are its share of its pack's, by model rows."""

    wanted: Wanted
    picture: Any
    record: dict[str, Any]


def packs_of(
    lines: Sequence[Mapping[str, Any]], images: int, together: int, limit: int | None = None
) -> list[list[Wanted]]:
    """What is run at once: all images of ``together`` prompts, in an order whose beginning covers all kinds.

    Raises:
        ValueError: a number below 1.
    """
    for name, value in (("images-per-prompt", images), ("together", together)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    ids = Request(tuple(line["prompt"] for line in lines)).prompt_ids
    order = spread(len(lines), limit)
    wanted = {p: [Wanted(p, image, ids[p], lines[p]) for image in range(images)] for p in order}
    parts = (order[i : i + together] for i in range(0, len(order), together))
    return [[one for p in part for one in wanted[p]] for part in parts]


# --- a pack ---------------------------------------------------------------------------------------------------


class Painter:
    """Makes the images of a pack in one go.

    Args:
        pipe, call: the pipeline, and arguments of its call.
        search: ``None`` samples each image once, and nothing scores it.
        reward: guides the search.
        held_out: judge all finished candidates; the search does not see them.
        seed: all random streams derive from it, those of image 0 as in ``visearch compare`` and ``visearch record``.
        rows: most candidates in one model call.
        budget: when an image gets no more candidates.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        search: Search | None,
        reward: Reward | None,
        held_out: Sequence[Reward] = (),
        seed: int = 0,
        rows: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        from visearch.job import Samplers

        self.pipe, self.call, self.search, self.reward = pipe, dict(call), search, reward
        self.held_out, self.seed, self.rows, self.budget = list(held_out), seed, rows, budget
        self.samplers = Samplers()

    def __call__(self, pack: Sequence[Wanted]) -> list[Drawn]:
        """The images in the order of ``pack``; each is what it would be alone, up to how kernels round in batches.

        Raises:
            ValueError: the pipeline makes videos.
        """
        import torch
        from PIL import Image

        from visearch.budget import Ledger
        from visearch.rewards.images import to_pil

        begin, ledger = time.perf_counter(), Ledger()
        rows, samples, notes = self._run(pack, ledger)
        verdicts = self._judge(pack, samples)
        whole = {"rows": rows, "verdicts": verdicts, "notes": notes, "seconds": time.perf_counter() - begin}
        records = [self._record(p, wanted, ledger, **whole) for p, wanted in enumerate(pack)]
        pictures = to_pil(torch.stack([samples[p, record["winner"]] for p, record in enumerate(records)]))
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise ValueError(f"{type(self.pipe).__name__} makes videos; GenEval judges images")
        return [Drawn(*each) for each in zip(pack, pictures, records, strict=True)]

    def _request(self, pack: Sequence[Wanted]) -> tuple[Any, Search, Request]:
        """Sampler, search and request, whose streams hang on the images alone, not on which of them are together."""
        import torch

        from visearch.job import Job
        from visearch.search.best_of_n import BestOfN

        texts = [wanted.line["prompt"] for wanted in pack]
        ids = tuple(wanted.id for wanted in pack)
        seeds = tuple(seed_of(own, self.seed) for own in ids)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        search = self.search or BestOfN(n=1)
        job = Job.of(self.pipe, search, texts, generator=generators, samplers=self.samplers, **self.call)
        lines = tuple(metadata_of(wanted.line) for wanted in pack)
        return job.sampler, job.search, replace(job.request, prompt_ids=ids, prompt_seeds=seeds, metadata=lines)

    def _run(self, pack: Sequence[Wanted], ledger: Any) -> tuple[Any, dict[tuple[int, str], Any], tuple[str, ...]]:
        """Finished candidates, what they look like, and warnings."""
        import torch

        from visearch.budget import MeteredSampler
        from visearch.run import run_search

        sampler, search, request = self._request(pack)
        if self.search is not None:
            *_, last = run_search(sampler, self.reward, search, request, self.budget, rows=self.rows, ledger=ledger)
            if last.result.error is not None:
                raise last.result.error
            return last.result.finished, last.result.samples, last.result.warnings
        metered = MeteredSampler(sampler, ledger, rows=self.rows)
        with torch.no_grad():
            rows = metered.advance(metered.init(request, request.seeds(0, 1)), metered.num_stages)
            images = metered.decode(rows)
        ledger.share(rows, "decodes")
        return rows, {(p, "0"): images[p] for p in range(len(pack))}, ()

    def _judge(
        self, pack: Sequence[Wanted], samples: Mapping[tuple[int, str], Any]
    ) -> dict[tuple[int, str], dict[str, float | None]]:
        import torch

        from visearch.budget import Ledger, MeteredReward

        if not self.held_out:
            return {key: {} for key in samples}
        lines = [pack[p].line for p, _ in samples]
        seen = torch.stack(list(samples.values())), [line["prompt"] for line in lines]
        scores = {j.name: MeteredReward(j, Ledger())(*seen, metadata=lines).tolist() for j in self.held_out}
        return {key: {name: _finite(values[i]) for name, values in scores.items()} for i, key in enumerate(samples)}

    def _record(
        self, p: int, wanted: Wanted, ledger: Any, rows: Any, verdicts: Any, notes: Sequence[str], seconds: float
    ) -> dict[str, Any]:
        from visearch.selection import rank

        mine = [r for r in rank(rows) if int(rows.prompt[r]) == p]
        best, took = mine[0], ledger.prompts[p]
        return {
            "id": f"{wanted.id:016x}",
            "winner": rows.id[best],
            "score": _finite(float(rows.score[best])),
            "lineage": [event._asdict() for event in rows.lineage[best]],
            "candidates": [
                {
                    "id": rows.id[r],
                    "seed": rows.seed[r],
                    "score": _finite(float(rows.score[r])),
                    "held_out": verdicts[p, rows.id[r]],
                }
                for r in mine
            ],
            "nfe": took["nfe"],
            "decodes": took["decodes"],
            "rewards": took["rewards"],
            "seconds": round(seconds * took["nfe"] / ledger.nfe, 4),
            "not_held_out_for": sorted(getattr(self.reward, "not_held_out_for", ())),
            "warnings": list(notes),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- the folder -----------------------------------------------------------------------------------------------


def generate(
    make: Callable[[], Callable[[Sequence[Wanted]], list[Drawn]]],
    packs: Sequence[Sequence[Wanted]],
    root: Path,
    settings: Mapping[str, Any],
    *,
    about: Mapping[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    minutes: float | None = None,
    ray: str | None = None,
    gpus: int = 0,
    progress: bool = False,
) -> int:
    """Make what ``root`` lacks of this process's share; returns how many images of it are still missing.

    Args:
        make: gives what makes a pack's images, such as a :class:`Painter`; see :func:`visearch.parallel.work`.
        packs: of the whole job.
        root: GenEval's folder of images.
        settings: JSON-able; all that decides what the images look like. Others are never mixed in.
        about: JSON-able; kept beside the settings.
        shard: (i, n): only packs i, i + n, ... of all, from 1.
        minutes: begin no pack after so long.
        ray, gpus: see :func:`visearch.parallel.work`.
        progress: show a bar.

    Raises:
        ValueError: a folder of other settings, of other prompts, or that this command did not make.
    """
    from tqdm.auto import tqdm

    key = _claim(root, settings, packs, about or {})
    mine = packs[shard[0] - 1 :: shard[1]]
    left = {one for pack in mine for one in _missing(root, pack, key)}
    todo = [pack for pack in mine if not left.isdisjoint(pack)]
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    total = sum(map(len, mine))
    with tqdm(total=total, initial=total - len(left), unit="image", disable=not progress) as bar:
        for _, drawn in work(make, takewhile(lambda _: time.monotonic() < end, todo), ray, gpus):
            new = [one for one in drawn if one.wanted in left]
            _write(root, new, key)
            left.difference_update(one.wanted for one in new)
            bar.update(len(new))
    return len(left)


def _claim(root: Path, settings: Mapping[str, Any], packs: Sequence[Sequence[Wanted]], about: Mapping[str, Any]) -> str:
    """Make the folders of all prompts; the name of the settings."""
    from visearch.report import check_folder

    settings = json.loads(json.dumps(settings))
    begun = any(root.glob("[0-9]*/samples/*.png"))
    kept = config_of(root)
    if begun and not kept:
        raise ValueError(f"{root} has images that visearch geneval generate did not make; choose another --outdir")
    was, now = changes(kept.get("settings", {}), settings)
    if begun and now:
        raise ValueError(f"{root} was made with {was}, now it is {now}; choose another --outdir, or delete it")
    lines = {one.prompt: json.dumps(one.line) + "\n" for pack in packs for one in pack}
    paths = {p: root / name_of(p) / "metadata.jsonl" for p in lines}
    for p, path in paths.items():
        if path.is_file() and path.read_text(encoding="utf-8") != lines[p]:
            raise ValueError(f"{path} is of another prompt than {lines[p].strip()}; choose another --outdir")
    check_folder(root)
    replace_text(root / "config.json", json.dumps({"settings": settings, **about}, indent=2))
    for p, path in paths.items():
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            replace_text(path, lines[p])
    return settings_hash(settings)


def _missing(root: Path, pack: Sequence[Wanted], key: str) -> list[Wanted]:
    """What of a pack is not finished."""
    kept = {p: _kept(root / name_of(p) / "search.json", key) for p in {one.prompt for one in pack}}
    return [
        one
        for one in pack
        if kept[one.prompt].get(name_of(one.image), {}).get("id") != f"{one.id:016x}"
        or not image_path(root, one.prompt, one.image).is_file()
    ]


def _kept(path: Path, key: str) -> dict[str, Any]:
    """Image -> record, of these settings."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content["images"] if content.get("config") == key else {}


def _write(root: Path, drawn: Sequence[Drawn], key: str) -> None:
    """The images first: an entry in ``search.json`` says that its image is there."""
    from visearch.report import write_image

    for p, group in groupby(drawn, key=lambda one: one.wanted.prompt):
        path = root / name_of(p) / "search.json"
        images = _kept(path, key)
        for one in group:
            file = image_path(root, p, one.wanted.image)
            file.parent.mkdir(exist_ok=True)
            write_image(file, one.picture)
            images[name_of(one.wanted.image)] = one.record
        replace_text(path, json.dumps({"config": key, "images": dict(sorted(images.items()))}, allow_nan=False))


# --- the command ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Images still missing of this process's share."""
    if options.rows is not None and options.rows < 1:
        raise ValueError(f"--rows {options.rows} must be at least 1")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed} must lie in [0, 2^63)")
    search, _ = _search(options), _budget(options)
    lines = read_prompts(options.prompts)
    size = 1 if search is None else getattr(search, "n", None) or 8
    together = options.together
    if together is None:
        together = max(1, CANDIDATES // (size * max(1, options.images_per_prompt)))
    packs = packs_of(lines, options.images_per_prompt, together, options.limit)
    device, gpus = place(options.device, options.ray)
    rewards = load_rewards(options, search, "cpu" if gpus else device)
    check_judgeable(rewards, [one.line for pack in packs for one in pack])
    settings = _settings(options, search, device, packs, rewards)
    return generate(
        partial(load_painter, options, search, device, rewards if options.ray is None else None),
        packs,
        Path(options.outdir),
        settings,
        about={"prompts": options.prompts, "images_per_prompt": options.images_per_prompt},
        shard=options.shard,
        minutes=options.minutes,
        ray=options.ray,
        gpus=gpus,
        progress=True,
    )


def load_rewards(options: argparse.Namespace, search: Search | None, device: str) -> list[Reward]:
    """The reward that guides, if anything is searched, and then the judges.

    Raises:
        ValueError: an unknown one, or a judge that is not held out, see :func:`visearch.monitor.check_held_out`.
    """
    from visearch.rewards import resolve

    guides = [] if search is None else [resolve(options.reward, device)]
    judges = [resolve(name, device) for name in options.held_out]
    check_held_out(guides, judges)
    return guides + judges


def load_painter(
    options: argparse.Namespace, search: Search | None, device: str, rewards: list[Reward] | None = None
) -> Painter:
    """What the options ask for, loaded.

    Args:
        rewards: what :func:`load_rewards` gave, in this process; loaded where they are not given.

    Raises:
        ValueError: unknown model, and as :func:`load_rewards`.
    """
    rewards = load_rewards(options, search, device) if rewards is None else rewards
    guide, judges = (None, rewards) if search is None else (rewards[0], rewards[1:])
    pipe, call = load(options, device)
    return Painter(pipe, call, search, guide, judges, options.seed, options.rows, _budget(options))


def _search(options: argparse.Namespace) -> Search | None:
    from visearch.wrap import make_search

    given = {} if options.n is None else {"n": options.n}
    if options.search != "none":
        return make_search(options.search, **given)
    if given or options.reward != REWARD or any(getattr(options, name) is not None for name in STOPS):
        raise ValueError(
            "--search none samples each image once; leave out --n, --reward, --target, --patience, --min-gain"
        )
    return None


def _budget(options: argparse.Namespace) -> Budget:
    """When an image gets no more candidates."""
    return Budget(**{name: getattr(options, name) for name in STOPS})


def _settings(
    options: argparse.Namespace,
    search: Search | None,
    device: str,
    packs: Sequence[Sequence[Wanted]],
    rewards: Sequence[Reward],
) -> dict[str, Any]:
    """All that decides what the images look like."""
    from visearch.report import versions
    from visearch.search import describe

    call = ("steps", "guidance", "negative_prompt", "height", "width")
    found = {
        "format": FORMAT,
        "model": options.model,
        "call": {name: getattr(options, name) for name in call},
        "dtype": dtype_of(options.dtype, device),
        "device": device.split(":")[0],
        "search": "none" if search is None else describe(search),
        "hyperparameters": None if search is None else repr(search),  # defaults may change
        "reward": None if search is None else options.reward,
        "held_out": sorted(options.held_out),
        "weights": {reward.name: identity(reward) for reward in rewards},
        "seed": options.seed,
        **{name: value for name in STOPS if (value := getattr(options, name)) is not None},
        "versions": {k: v for k, v in versions().items() if k in ("torch", "diffusers", "transformers")},
    }
    if getattr(search, "across_prompts", False):  # then an image hangs on the others of its pack
        found["packs"] = settings_hash({"packs": [[one.id for one in pack] for pack in packs]})
    return found
