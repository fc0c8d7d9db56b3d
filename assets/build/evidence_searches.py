"""Which searches are worth their cost? All of them, live, on both models of the embedded world.

    python assets/build/evidence_searches.py pool --model emoji-64        # report prompts x 32 seeds, judges, previews
    python assets/build/evidence_searches.py screen --model emoji-64      # every search at 8 images on 60 prompts
    python assets/build/evidence_searches.py finals --model emoji-64      # three of them at 8 and 16 images on 200
    python assets/build/evidence_searches.py table --model emoji-64       # what came out
    python assets/build/evidence_searches.py short                        # what of it stands in the README
    python assets/build/evidence_searches.py rank --model emoji-64        # Kendall's tau with PSP's published ranking
    python assets/build/evidence_searches.py report                       # all of it: assets/results/README.md

The first three only write out a ``visearch record`` or ``visearch compare`` command, print it, and run it: it resumes
after a crash, and takes the further options that are given here (``--minutes 20``, ``--shard 1/2``). Seconds are
core-seconds of one thread. Schedules and margins that a search was tuned to come from validation prompts (``visearch
calibrate``), never from those reported on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
from pathlib import Path

import evidence_published

from visearch.comparison import BAR, NFE, ONCE, kendall
from visearch.report import markdown_table
from visearch.statistics import Interval

RESULTS = Path(__file__).parents[1] / "results"
JUDGES = ("judge-a", "judge-b", "judge-c")
MODELS = ("emoji-64", "emoji-64-v")
POOLS = {  # with budgets that their seeds allow; those of 8 and 25 steps are of validation prompts, as defaults are
    "emoji-64": ("4", "6", "8"),
    "emoji-64-8-steps": ("2", "4"),
    "emoji-64-25-steps": ("2", "4"),
    "emoji-64-v": ("4", "8"),
}
HEAD = """# The evidence

Written by `python assets/build/evidence_searches.py report` from the raw results in this folder. "Worth" is the N at
which best-of-N reaches the same mean reward, over the N whose cost the search had: model rows, or core-seconds of one
thread, which count previews, scores and stops. ">" is at least: the bar ends there. "Over it" is over best-of-N at
equal model rows, paired by prompt. Recovery is the share of the way from one sample to the candidate that judge C would
pick itself. Intervals are 95 %, over prompts. Losers are listed with the others. Finalists come from the screening;
40 of its 60 prompts are among the 200 of the finals, which therefore flatter them a little."""

SEARCHES = {  # sizes are larger than any budget here where the budget shall decide
    "halving": "halving(n=64)",
    "halving, steep": "halving(n=64, preset='steep')",
    "halving, psp": "halving(n=64, preset='psp')",
    "halving, ttsnap": "halving(n=64, preset='ttsnap')",
    "zero-order": "zero-order(n=64)",
    "paths": "paths(n=4, m=8)",
    "smc": "smc(n=64)",
    "smc, current (BFS)": "smc(n=64, potential='current')",
    "fk": "fk(n=64)",
    "evosearch": "evosearch(n=64)",
    "evosearch, 2 generations": "evosearch(n=64, generations=2)",
    "ses": "ses(n=64, population=4, elites=3)",
    "cached-drafts": "cached-drafts(search=best-of-n(n=64))",
    "cached-drafts of halving": "cached-drafts(search=halving(n=64))",
    "refine": "refine(first=halving(n=64), then=zero-order(n=64))",
    "refine of steep": "refine(first=halving(n=64, preset='steep'), then=zero-order(n=64))",
}
TUNED = {  # by model, from validation prompts alone
    "emoji-64": {"conformal": "conformal(n=8, calls=(7, 9), margins=(7.356, 2.227))"},
    "emoji-64-v": {},
}
SHARED = {  # PSP's names -> our search; its BFS weighs by the current preview, tempered linearly, and copies by SSP
    "none": "",
    "best-of-N": BAR,
    "FK": SEARCHES["fk"],
    "BFS": SEARCHES["smc, current (BFS)"],
    "PSP": SEARCHES["halving, psp"],
}
PSP_MODELS = ("SD1.5", "SDXL", "SD3.5-L")
PSP_REWARD = {  # ImageReward, which guides; four images, 553 GenEval prompts, 3 seeds (arXiv 2607.21591, repository)
    "none": (-0.159, 0.431, 1.045),
    "best-of-N": (0.655, 1.098, 1.336),
    "FK": (0.640, 1.189, 1.294),
    "BFS": (0.820, 1.247, 1.343),
    "PSP": (0.827, 1.224, 1.380),
}
PSP_GENEVAL = {  # the same runs
    "none": (0.434, 0.529, 0.713),
    "best-of-N": (0.542, 0.629, 0.747),
    "FK": (0.531, 0.627, 0.742),
    "BFS": (0.564, 0.636, 0.747),
    "PSP": (0.574, 0.645, 0.747),
}
FINALISTS: dict[str, tuple[str, ...]] = {  # worth most seconds in the screening, of those that differ from best-of-n
    "emoji-64": ("halving, steep", "smc, current (BFS)", "halving, psp"),
    "emoji-64-v": ("smc, current (BFS)", "halving, psp", "halving"),
}


def run(words: list[str]) -> int:
    from visearch.cli import main

    print(shlex.join(["visearch", *words]), flush=True)
    return main(words)


def pool(model: str, rest: list[str]) -> int:
    judges = [word for judge in JUDGES for word in ("--held-out", judge)]
    out = ["--out", str(RESULTS / f"pool-{model}.parquet")]
    size = ["--seeds", "32", "--limit", "300", "--rows", "16"]
    return run(["record", "report", *out, "--model", model, "--dtype", "bfloat16", *size, *judges, *rest])


def compared(
    model: str, name: str, searches: list[str], prompts: int, budgets: tuple[int, ...], rest: list[str]
) -> int:
    chosen = [word for text in searches for word in ("--search", text)]
    out = ["--out", str(RESULTS / f"{name}-{model}"), "--clock", "cpu", "--limit", str(prompts)]
    sizes = [word for n in budgets for word in ("--budget", str(n))]
    judges = ["--held-out", *JUDGES]
    return run(["compare", "report", "--model", model, "--dtype", "bfloat16", *sizes, *chosen, *judges, *out, *rest])


def screen(model: str, rest: list[str]) -> int:
    return compared(model, "screen", [*SEARCHES.values(), *TUNED[model].values()], 60, (8,), rest)


def finals(model: str, rest: list[str]) -> int:
    texts = {**SEARCHES, **TUNED[model]}
    pool = ["--pool-size", "32"]
    return compared(model, "finals", [texts[name] for name in FINALISTS[model]], 200, (8, 16), [*pool, *rest])


def _saved(name: str, model: str) -> dict:
    return json.loads((RESULTS / f"{name}-{model}" / "summary.json").read_text())


def table(model: str, name: str) -> str:
    """Markdown: what each search was worth, losers included."""
    names = {text: label for label, text in {**SEARCHES, **TUNED[model]}.items()}
    heads = ["budget", "search", "core-seconds", "worth x rows", "worth x seconds"]
    judged = [f"judge {judge[-1].upper()} over it" for judge in JUDGES]
    lines = []
    for row in sorted(_saved(name, model)["rows"], key=lambda r: (r["budget"], -r["worth_seconds"]["mean"])):
        more = "> " * bool(row["beyond_reward"])
        worth = [f"{more}{Interval(**row[key]):.2f}" for key in ("worth_nfe", "worth_seconds")]
        over = [of["over"].get(NFE) for of in (*(row["judges"][judge] for judge in JUDGES), row["diversity"])]
        found = [f"{row['budget']:g}", names.get(row["search"], row["search"]), f"{row['seconds']:.2f}"]
        recovered = row["judges"][JUDGES[-1]]["recovery"]
        shown = [f"{Interval(**of):+.3f}" if of else "" for of in over]
        lines.append([*found, *worth, *shown, f"{Interval(**recovered):.0%}" if recovered else ""])
    return markdown_table([*heads, *judged, "diversity over it", "recovery on C"], lines)


def short() -> str:
    """Markdown: what every search was worth in the screening, on both models side by side."""
    rows = {model: {row["search"]: row for row in _saved("screen", model)["rows"]} for model in MODELS}
    lines = []
    for label, text in {"best-of-n": BAR, **SEARCHES}.items():
        cells = []
        for model in MODELS:
            row = rows[model][text]
            more = "> " * bool(row["beyond_reward"])
            cells += [f"{more}{Interval(**row[key]):.2f}" for key in ("worth_nfe", "worth_seconds")]
        lines.append((rows[MODELS[0]][text]["worth_seconds"]["mean"], [label, *cells]))
    heads = [f"{model}: {unit}" for model in MODELS for unit in ("rows", "seconds")]
    return markdown_table(["search", *heads], [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


def finalists() -> str:
    """Markdown: the finals of both models."""
    lines = []
    for model in (m for m in MODELS if (RESULTS / f"finals-{m}" / "summary.json").exists()):
        names = {text: label for label, text in {**SEARCHES, **TUNED[model]}.items()}
        rows = [row for row in _saved("finals", model)["rows"] if row["search"] != BAR]
        for row in sorted(rows, key=lambda r: (r["budget"], -r["worth_seconds"]["mean"])):
            more = "> " * bool(row["beyond_reward"])
            worth = [f"{more}{Interval(**row[key]):.2f}" for key in ("worth_nfe", "worth_seconds")]
            over = [f"{Interval(**row['judges'][judge]['over'][NFE]):+.3f}" for judge in JUDGES]
            lines.append([model, row["prompts"], f"{row['budget']:g}", names[row["search"]], *worth, *over])
    judged = [f"judge {judge[-1].upper()} over it" for judge in JUDGES]
    return markdown_table(["model", "prompts", "images", "search", "worth x rows", "worth x seconds", *judged], lines)


def _printed(words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(words)
    return out.getvalue().split("\n", 1)[1].replace("\n## ", "\n### ")  # without the command


def report() -> str:
    """Everything, as Markdown."""
    parts = [HEAD]
    for name, budgets in POOLS.items():
        path = f"assets/results/pool-{name}.parquet"
        words = ["calibrate", path, "--budget", *budgets, "--risk", "0.1"]
        parts.append(f"## {path}\n\n`{shlex.join(['visearch', *words])}`\n\n{_printed(words)}")
    rows = json.loads(evidence_published.OUT.read_text())["rows"]
    for budget in evidence_published.BUDGETS:
        head = f"## Published rewards of FLUX and SDXL, N = {budget}\n\n`python assets/build/evidence_published.py`"
        both = evidence_published.table(rows, budget), evidence_published.means(rows, budget)
        parts.append("\n\n".join([head, *both]))
    for model in MODELS:
        for name in (n for n in ("screen", "finals") if (RESULTS / f"{n}-{model}" / "summary.json").exists()):
            command = f"`python assets/build/evidence_searches.py {name} --model {model}`"
            picture = f"![reward and judges against cost]({name}-{model}/comparison.png)"
            found = _saved(name, model)
            asked = f"{found['rows'][0]['prompts']} report prompts; more in [{name}-{model}]({name}-{model}/summary.md)"
            parts.append(f"## Live on {model}: {name}\n\n{command}: {asked}\n\n{table(model, name)}\n\n{picture}")
        if (RESULTS / f"screen-{model}" / "summary.json").exists():
            command = f"`python assets/build/evidence_searches.py rank --model {model}`"
            parts.append(f"## Our ranking on {model} beside PSP's\n\n{command}\n\n{rank(model)}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def rank(model: str) -> str:
    """How our ranking of the methods that PSP's tables hold too agrees with theirs (Kendall's tau)."""
    rows = {row["search"]: row for row in _saved("screen", model)["rows"]}
    ours: dict[str, dict[str, float]] = {"guided reward": {}, "mean of the judges": {}}
    for method, text in SHARED.items():
        row = rows[text or BAR]
        measures = {"guided reward": [row["guided"]], "mean of the judges": list(row["judges"].values())}
        for name, of in measures.items():
            once = 0.0 if text else sum(m["over"][ONCE]["mean"] for m in of)
            ours[name][method] = (sum(m["mean"]["mean"] for m in of) - once) / len(of)
    lines = []
    for (name, table), published in zip(ours.items(), (PSP_REWARD, PSP_GENEVAL), strict=True):
        for theirs, column in zip(PSP_MODELS, zip(*published.values(), strict=True), strict=True):
            found = kendall(table, dict(zip(published, column, strict=True)))
            reversed_pairs = ", ".join(f"{a} above {b}" for a, b in found.reversals)
            lines.append([name, theirs, f"{found.tau:+.2f}", reversed_pairs or "none"])
    scores = [[method, *(f"{ours[name][method]:.3f}" for name in ours)] for method in SHARED]
    return "\n\n".join(
        [
            markdown_table(["method", *ours], scores),
            markdown_table(["ours", "theirs, on", "tau", "here, against their order"], lines),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pool", "screen", "finals", "table", "short", "rank", "report"))
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--name", choices=("screen", "finals"), default="screen", help="which table")
    options, rest = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.what == "report":
        (RESULTS / "README.md").write_text(report())
        return 0
    if options.what == "short":
        print(f"{short()}\n\n{finalists()}")
        return 0
    if options.what in ("table", "rank"):
        print(rank(options.model) if options.what == "rank" else table(options.model, options.name))
        return 0
    return {"pool": pool, "screen": screen, "finals": finals}[options.what](options.model, rest)


if __name__ == "__main__":
    raise SystemExit(main())
