"""Measure which of diffusers' pipeline classes can be searched, and write pipelines/support.json.

Takes the tiny random models and inputs of the pipeline tests in a source checkout of diffusers (clone the tag of the
installed version; nothing of it is kept here), replaces what those tests download by stand-ins, and probes every
pipeline class in a child process. One JSON line a class is appended to --out, so a run can be interrupted, resumed
(--resume skips the classes that have a line) and repeated for single classes (--only; the last line of a class counts).

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    python assets/build/probe_pipelines.py --diffusers diffusers --resume --write
    python assets/build/probe_pipelines.py --diffusers diffusers --only FluxPipeline WanPipeline

Some tests need packages that visearch does not: parameterized, requests-mock, torchsde, opencv-python-headless.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import unittest
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import probe_parts
import torch

ROOT = Path(__file__).parents[2]
MEMORY_GB = 8
STEPS = 4
SEED = 7


@dataclass(frozen=True)
class Case:
    """A pipeline class and the test classes that can build it, best first."""

    name: str
    pipeline: type
    tests: tuple[type, ...]


def cases(checkout: Path, only: list[str]) -> Iterator[Case]:
    """The pipeline classes of the checkout's tests, by name."""
    from diffusers import DiffusionPipeline

    found: dict[str, list[type]] = {}
    pipelines: dict[str, type] = {}
    for path in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        text = path.read_text()
        if "get_dummy_inputs" not in text or "onnx" in path.name or (only and not any(name in text for name in only)):
            continue
        module = ".".join(path.relative_to(checkout).with_suffix("").parts)
        try:
            loaded = importlib.import_module(module)
        except Exception as error:
            print(f"cannot import {module}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        for test in vars(loaded).values():
            if not (inspect.isclass(test) and test.__module__ == module and hasattr(test, "get_dummy_inputs")):
                continue
            kind = inspect.getattr_static(test, "pipeline_class", None)
            if inspect.isclass(kind) and issubclass(kind, DiffusionPipeline) and hasattr(test, "get_dummy_components"):
                # some tests add a safety checker in a subclass
                known = next(c for c in kind.__mro__ if c.__module__.startswith("diffusers."))
                pipelines.setdefault(known.__name__, kind)
                found.setdefault(known.__name__, []).append(test)
    for name in sorted(found):
        if not only or name in only:
            yield Case(name, pipelines[name], tuple(found[name]))


def build(test: type, pipeline: type) -> tuple[Any, dict[str, Any]]:
    """The tiny pipeline of a test class, and the arguments of its call."""
    case = test("__init__") if issubclass(test, unittest.TestCase) else test.__new__(test)
    device = {"device": "cpu"}
    torch.manual_seed(0)
    components = case.get_dummy_components()
    inputs = case.get_dummy_inputs(
        **(device if "device" in inspect.signature(case.get_dummy_inputs).parameters else {})
    )
    pipe = pipeline(**components).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    probe_parts.fit(pipe)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    if hasattr(case, "get_dummy_inversion_inputs"):
        pipe.invert(**case.get_dummy_inversion_inputs(**device))
    return pipe, one_prompt(inputs)


def one_prompt(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for one prompt: lists as long as a list of prompts become their first entry."""
    dropped = ("generator", "return_dict", "latents", "num_images_per_prompt", "num_videos_per_prompt")
    given = {k: v for k, v in inputs.items() if k not in dropped}
    prompt = given.get("prompt")
    if isinstance(prompt, (list, tuple)) and prompt:
        count = len(prompt)
        for name in [k for k, v in given.items() if "prompt" in k and isinstance(v, (list, tuple)) and len(v) == count]:
            given[name] = given[name][0]
    return given


def with_steps(pipe: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arguments with enough steps to prune early, in the middle and late, where the pipeline takes them."""
    tries = [given]
    for name in ("num_inference_steps", "prior_num_inference_steps"):
        steps = given.get(name)
        if isinstance(steps, int) and steps < STEPS:
            tries.insert(0, {**tries[0], name: STEPS})
    failure: Exception | None = None
    for call in tries:
        try:
            return call, bare(pipe, call)
        except Exception as error:
            failure = error
    assert failure is not None
    raise failure


def bare(pipe: Any, call: dict[str, Any]) -> Any:
    torch.manual_seed(SEED)  # some pipelines draw without their generator
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        call = {**call, "generator": torch.Generator().manual_seed(SEED)}
    return pipe(**call)


def wrapped(pipe: Any, call: dict[str, Any], expected: Any) -> str:
    """How ``SearchPipeline(pipe, ...)(**call)`` compares with the plain call: "exact", or what went wrong."""
    from visearch.pipelines import support
    from visearch.search.best_of_n import BestOfN
    from visearch.wrap import SearchPipeline

    def reward(images: Any, prompts: Any) -> list[float]:
        return [0.0] * len(images)

    try:
        output = bare(SearchPipeline(pipe, reward=reward, search=BestOfN(n=1)), call)
        difference = support._difference(output, expected)
        return "exact" if difference == 0 else f"differs by {difference:.3g}"
    except Exception as error:
        return support._where(error)


def child(case: Case, send: Any, limit: int) -> None:
    """Probe one class; tells what it is doing, then the result."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_GB * 2**30,) * 2)
    signal.signal(signal.SIGXCPU, lambda *_: os._exit(24))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    line: dict[str, Any] = {}

    def tell(what: str, **more: Any) -> None:
        line.update(more)
        send.send((what, dict(line)))

    tell("building")
    try:
        failures = []
        for test in case.tests:
            try:
                pipe, given = build(test, case.pipeline)
                tell("a plain call")
                call, expected = with_steps(pipe, given)
                break
            except Exception as error:
                failures.append(error)
        else:
            raise failures[0]
    except BaseException as error:
        tell("done", cannot_run=where(error))
        return
    from visearch.pipelines.support import probe

    tell("probing")
    try:
        made = probe(pipe, call, exact=True, progress=tell)
        tell("SearchPipeline", **{**made.as_dict(), "pipeline": case.name})
        tell("in float64", wrapped=wrapped(pipe, call, expected))
        if made.verdict == "wrong":
            try:
                tell("in float64", **rounding(test, case.pipeline, made))
            except Exception as error:  # some models run in float32 only: the verdict stays
                tell("in float64", notes=[*made.notes, f"in float64: {where(error)}"])
        tell("done")
    except BaseException as error:
        tell("done", verdict="failed", notes=[where(error)], traceback=traceback.format_exc()[-3000:])


def rounding(test: type, pipeline: type, made: Any) -> dict[str, Any]:
    """Whether differences are rounding: then, in float64, they shrink with it."""
    from visearch.pipelines.support import probe

    pipe, given = build(test, pipeline)
    pipe.to(torch.float64)
    torch.set_default_dtype(torch.float64)
    call = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    call, _ = with_steps(pipe, call)
    again = probe(pipe, call, exact=True)
    worst = {n: max(v for k, v in m.differences.items() if k not in ("apart", "kernels")) for n, m in
             (("float32", made), ("float64", again)) if m.differences}  # fmt: skip
    bitwise = made.differences["one"] == made.differences["unchanged"] == 0
    if bitwise and again.verdict == "exact" and worst["float64"] < 1e-8:
        note = f"rounding: float32 differs by up to {worst['float32']:.1g}, float64 by {worst['float64']:.1g}"
        return {"verdict": "exact", "notes": [*made.notes, note]}
    return {"notes": [*made.notes, f"in float64: {again.verdict}, {worst.get('float64', float('nan')):.1g}"]}


def where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    steps = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in reversed(frames))
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {(text[0] if text else '')[:300]} ({steps})"


def run(todo: list[Case], out: Path, jobs: int, limit: int) -> None:
    """Probe the cases, at most ``jobs`` at once, appending a line for each."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(todo)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(case, send, limit))
            process.start()
            send.close()
            running[receive] = [case, process, time.time(), ("starting", {})]
        for receive in wait(list(running), timeout=1):
            try:
                running[receive][3] = receive.recv()
            except EOFError:
                finish(out, *running.pop(receive))
        for _, process, begin, _ in running.values():
            if time.time() - begin > 4 * limit:  # waiting for other processes must not count
                process.kill()


def finish(out: Path, case: Case, process: Any, begin: float, last: tuple[str, dict[str, Any]]) -> None:
    process.join()
    what, line = last
    if what != "done":
        ended = {24: "CPU time limit", -9: "killed: time or memory limit"}.get(
            process.exitcode, f"exit {process.exitcode}"
        )
        line = {**line, "unfinished": f"{ended} during: {what}"}
    line = {"pipeline": case.name, **line, "seconds": round(time.time() - begin, 1)}
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    state = line.get("verdict") or line.get("unfinished") or line.get("cannot_run", "")
    print(f"{case.name}: {line.get('strategy', '-')} {state[:150]}", flush=True)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of each class."""
    lines = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    return {line["pipeline"]: line for line in lines}


def write(out: Path, target: Path) -> None:
    """Make the table that the package ships."""
    import diffusers
    import transformers

    from visearch.pipelines.support import Support

    fields = set(Support.__dataclass_fields__)
    rows, absent = [], {}
    for name, line in sorted(read(out).items()):
        if "cannot_run" in line:
            absent[name] = line["cannot_run"]
        elif "strategy" not in line:
            absent[name] = line.get("unfinished") or line["notes"][0]
        else:
            row = {k: v for k, v in line.items() if k in fields}
            row["differences"] = {k: float(f"{v:.2g}") for k, v in row.get("differences", {}).items()}
            rows.append(row)
    versions = {m.__name__: m.__version__ for m in (diffusers, torch, transformers)}
    table = {
        "measured_with": {**versions, "date": datetime.date.today().isoformat()},
        "pipelines": rows,
        "not_run": absent,
    }
    target.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{target}: {len(rows)} classes, {len(absent)} could not be run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, metavar="CHECKOUT", help="source tree with tests/")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="pipeline classes")
    parser.add_argument("--resume", action="store_true", help="skip classes that have a line already")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "probe.jsonl")
    parser.add_argument("--jobs", type=int, default=2, help="child processes at once (default %(default)s)")
    parser.add_argument("--limit", type=int, default=120, help="CPU seconds a class (default %(default)s)")
    parser.add_argument("--write", action="store_true", help="write pipelines/support.json afterwards")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    sys.path.insert(0, str(options.diffusers))
    probe_parts.install()
    found = list(cases(options.diffusers, options.only))
    missing = sorted(set(options.only) - {case.name for case in found})
    if missing:
        parser.error(f"no test in {options.diffusers} builds {', '.join(missing)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(options.out) if options.resume else {}
    run([case for case in found if case.name not in done], options.out, options.jobs, options.limit)
    if options.write:
        write(options.out, ROOT / "pipelines" / "support.json")


if __name__ == "__main__":
    main()
