"""GenEval in the embedded world: one sample, best-of-8, the default search, the oracle, and what its batches and
stops save.

    python assets/build/evidence_geneval.py draw --work WORK    # the commands; resumes
    python assets/build/evidence_geneval.py speed               # packs against a plain loop; idle machine
    python assets/build/evidence_geneval.py table               # from the committed records

``draw`` runs ``visearch geneval generate`` and ``score`` as a user would: GenEval's own prompts that emoji-64 knows the
words of four times each, generated ones once. Judge A is the detector, and judge B a second opinion on all finished
candidates; the reward that guides, emoji-clip, knows neither.

What ``--search "best-of-n(batch=1)" --target R`` would have stopped at is read off best-of-8's candidates, which are
the same in the same order: R is the highest target that takes at most 0.6 of the candidates on the validation pool.

``speed`` makes the images of the same prompts from the same seeds at n = 4 three times each, in turn: by a loop that
calls the bare pipeline for each candidate, or for the four of a prompt, and by ``generate``'s packs. Same model rows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from visearch.assets import scenes
from visearch.geneval.outcome import Outcome, candidates, read_outcome
from visearch.geneval.summary import differences
from visearch.journal import replace_text
from visearch.pool import Pool
from visearch.report import markdown_table
from visearch.statistics import mean_interval, ratio_interval

RESULTS = Path(__file__).parents[1] / "results"
FOLDER = RESULTS / "geneval-emoji-64"
SEARCHES = {
    "once": ["--search", "none"],
    "best-of-8": ["--n", "8", "--held-out", "judge-a", "--held-out", "judge-b"],
    "halving": ["--search", "halving(n=12)", "--held-out", "judge-b"],
}
PARTS = {"official": 4, "generated": 1}  # images a prompt
SEPARATE = 1000  # between the numbers of one part's prompts and of the next


# --- the stop -----------------------------------------------------------------------------------------------------


def stopped(finals: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """What stopping at a target gives: the best candidate and how many were drawn, of each row.

    Args:
        finals: (P, N) scores of candidates in the order in which they are drawn.
    """
    reached = finals >= target
    drawn = np.where(reached.any(1), reached.argmax(1) + 1, finals.shape[1])
    begun = np.arange(finals.shape[1]) < drawn[:, None]
    return np.where(begun, finals, -np.inf).argmax(1), drawn


def target_of(pool: Pool, most: int = 8, share: float = 0.6) -> float:
    """The highest target, to one digit, by which at most this share of ``most`` candidates is drawn."""
    finals = pool.final("emoji-clip")[:, :most]
    cheap = [t for t in np.unique(np.round(finals, 1)) if stopped(finals, t)[1].mean() <= share * most]
    return float(max(cheap))


# --- draw ---------------------------------------------------------------------------------------------------------


def draw(options: argparse.Namespace) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    prompts = scenes.prompts("report")
    for part, images in PARTS.items():
        lines = [row for row in prompts if row["official"] is (part == "official")]
        file = options.work / f"{part}.jsonl"
        replace_text(file, "".join(json.dumps(line) + "\n" for line in lines))
        for name in options.only or SEARCHES:
            out, words = options.work / name / part, list(SEARCHES[name])
            words += ["--images-per-prompt", str(images), "--dtype", "bfloat16", "--outdir", str(out)]
            _visearch("generate", str(file), *words)
            _visearch("score", str(out), "--detector", "tiny")
    for name in options.only or SEARCHES:
        _keep(name, [options.work / name / part / "results.jsonl" for part in PARTS])


def _visearch(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "visearch", "geneval", *words], check=True)


def _keep(name: str, files: Sequence[Path]) -> None:
    """One compressed file a run: a row an image, with what its search tells; no path of this machine."""
    rows, metas = [], []
    for part, file in enumerate(files):
        outcome = read_outcome([file])
        metas.append(
            {k: v for k, v in outcome.metas[0].items() if k in ("images", "settings", "benchmark", "comparability")}
        )
        for row, record in zip(outcome.rows, outcome.records, strict=True):
            number, _, image = row["filename"].rpartition("/samples/")
            search = {k: v for k, v in record.items() if k not in ("lineage", "warnings", "id", "not_held_out_for")}
            filename = f"{int(Path(number).name) + SEPARATE * part:05d}/samples/{image}"
            rows.append({**row, "filename": filename, "search": search})
    with gzip.GzipFile(Kept.path(name), "wb", mtime=0) as file:
        for line in [{"metas": metas}, *rows]:
            file.write((json.dumps(line) + "\n").encode())


@dataclass(frozen=True)
class Kept(Outcome):
    """An outcome with what its searches told."""

    searches: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return list(self.searches)

    @staticmethod
    def path(name: str) -> Path:
        return FOLDER / f"{name}.jsonl.gz"

    @classmethod
    def read(cls, name: str) -> Kept:
        with gzip.open(cls.path(name), "rt", encoding="utf-8") as file:
            head, *rows = map(json.loads, file)
        return cls(rows, head["metas"], [row.pop("search") for row in rows])

    @property
    def prompts(self) -> list[str]:
        return [row["filename"].partition("/")[0] for row in self.rows]


# --- tables -------------------------------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> None:
    runs = {name: Kept.read(name) for name in SEARCHES if Kept.path(name).is_file()}
    once, best = runs["once"], runs["best-of-8"]
    tags = [*once.summary.tasks, "overall"]
    print(f"{once.summary.num_images} images of {once.summary.num_prompts} prompts, judged by judge A\n")
    print(markdown_table(["run", *tags], [[name, *_row(run, tags)] for name, run in runs.items()]))
    oracle = candidates(best)["judge-a"]["oracle"]
    print("\nof best-of-8's candidates, by judge A itself (oracle): "
          + ", ".join(f"{tag} {oracle[tag]:.3f}" for tag in tags))  # fmt: skip
    print("\ngain over one sample, by judge A (95 %), and what an image cost")
    lines = [[name, *_gains(run, once), *_cost(run, best)] for name, run in runs.items() if run is not once]
    print(markdown_table(["run", "judge A, mean over tasks", "share of the oracle's gain", "model rows", "seconds",
                          "rows / best-of-8's"], lines))  # fmt: skip
    print("\nby judge B, mean over tasks")
    for name, run in runs.items():
        if found := candidates(run).get("judge-b"):
            print(f"- {name}: " + ", ".join(f"{row} {values['overall']:.3f}" for row, values in found.items()))
    print("\n" + early(best))


def _row(run: Kept, tags: Sequence[str]) -> Iterator[str]:
    for tag in tags:
        yield f"{run.summary.overall if tag == 'overall' else run.summary.tasks[tag].accuracy:.3f}"


def _gains(run: Kept, once: Kept) -> tuple[str, str]:
    gain = differences(run.rows, once.rows)["overall"]
    best = Kept.read("best-of-8")
    oracle = candidates(best)["judge-a"]["oracle"]["overall"]
    base = once.summary.overall.mean
    return f"{gain:+.3f}", f"{gain.mean / (oracle - base):.0%}"


def _cost(run: Kept, best: Kept) -> tuple[str, str, str]:
    cost, bar = run.cost(), best.cost()
    return f"{cost['nfe']:.0f}", f"{cost['seconds']:.2f}", f"{cost['nfe'] / bar['nfe']:.2f}"


def early(best: Kept) -> str:
    """Stopping at a target against all eight: reward, verdicts, cost, clustered by prompt."""
    target = target_of(Pool.load(RESULTS / "pool-emoji-64-validation.parquet"))
    drawn_in_turn = [sorted(record["candidates"], key=lambda c: int(c["id"])) for record in best.records]
    finals = np.array([[c["score"] for c in one] for one in drawn_in_turn])
    chosen, drawn = stopped(finals, target)
    each, all_eight = np.arange(len(finals)), finals.argmax(1)
    found = [f"stop at {target:g} within best-of-8, against all eight: candidates x "
             f"{ratio_interval(*_by_prompt(best, drawn, np.full(len(drawn), finals.shape[1]))):.3f}"]  # fmt: skip
    reward = finals[each, chosen] - finals[each, all_eight]
    found.append(f"reward {mean_interval(reward, best.prompts):+.2f}")
    for judge in ("judge-a", "judge-b"):
        right = np.array([[c["held_out"][judge] for c in one] for one in drawn_in_turn], dtype=float)
        gain = mean_interval(right[each, chosen] - right[each, all_eight], best.prompts)
        found.append(f"{judge} {gain:+.3f}, of {right[each, all_eight].mean():.3f}")
    return "; ".join(found)


def _by_prompt(run: Kept, *values: np.ndarray) -> Iterator[np.ndarray]:
    """Sums over the images of a prompt."""
    _, place = np.unique(run.prompts, return_inverse=True)
    return (np.bincount(place, of) for of in values)


# --- speed --------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Images a prompt in sequence by the bare pipeline against packs, n = 4; three turns each."""
    import torch

    from visearch.geneval.generate import Painter, packs_of
    from visearch.pipelines import emoji
    from visearch.rewards import resolve
    from visearch.search.best_of_n import BestOfN

    pipe, reward = emoji.load(), resolve("emoji-clip")
    lines = [scenes.prompts("report")[i] for i in np.linspace(0, 323, options.prompts).round().astype(int)]
    packs = packs_of(lines, 1, 8)
    pipe.set_progress_bar_config(disable=True)
    painter = Painter(pipe, emoji.DEFAULTS, BestOfN(n=4), reward)

    def one_by_one(batch: int) -> list[float]:
        """Best scores by calls of the bare pipeline, ``batch`` candidates of one prompt in each."""
        best = []
        for one in (one for pack in packs for one in pack):
            request = painter._request([one])[2]
            streams = [request.generator(seed) for seed in request.seeds(0, 4)]
            found = []
            for start in range(0, 4, batch):
                call = {"num_images_per_prompt": batch, "generator": streams[start : start + batch]}
                images = pipe(one.line["prompt"], output_type="pt", **call, **emoji.DEFAULTS).images
                found += reward.score(images, [one.line["prompt"]] * batch).values.tolist()
            best.append(max(found))
        return best

    ways = {
        "a call for each candidate": lambda: one_by_one(1),
        "a call for each prompt": lambda: one_by_one(4),
        "packs": lambda: [drawn.record["score"] for pack in packs for drawn in painter(pack)],
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, make in ways.items():
            begin = time.perf_counter()
            scores[name] = make()
            taken[name].append(round(time.perf_counter() - begin, 2))
    faster = {name: [round(a / b, 2) for a, b in zip(taken[name], taken["packs"], strict=True)] for name in ways}
    off = max(abs(a - b) for made in scores.values() for a, b in zip(made, scores["packs"], strict=True))
    record = {
        "prompts": len(lines), "n": 4, "threads": torch.get_num_threads(),
        "seconds": taken, "times the seconds of packs": faster, "largest difference of best scores": round(off, 4),
    }  # fmt: skip
    replace_text(FOLDER / "speed.json", json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in {"draw": draw, "speed": speed, "table": table}.items():
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        if name == "draw":
            command.add_argument("--work", type=Path, required=True, help="scratch folder")
            command.add_argument("--only", nargs="+", choices=SEARCHES)
        if name == "speed":
            command.add_argument("--prompts", type=int, default=16)
            command.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
