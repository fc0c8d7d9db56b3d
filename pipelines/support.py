"""Which pipelines can be searched, and how exactly: the table of measured classes, and a probe for a loaded pipeline.

The table, ``support.json``, is written by ``assets/build/probe_pipelines.py``, which runs every pipeline class that
diffusers' own tests can build at toy size. :func:`probe` runs the same measurements on a pipeline of the user's.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visearch.pipelines.diffusion import DiffusionSampler
from visearch.pipelines.prompts import COUNTS
from visearch.protocols import EtaStep, Population, Request, Sde

__all__ = ["STRATEGIES", "TOLERANCE", "Support", "compare", "probe", "support_table"]

STRATEGIES = ("batch", "rows", "whole", "refused")
TOLERANCE = 1e-4
_SEED = 7
_TAKEN = {"generator", "latents", "return_dict", *COUNTS}


@dataclass(frozen=True)
class Support:
    """What a search can do with one pipeline.

    Attributes:
        pipeline: name of the class.
        strategy: ``"batch"``: rows are stopped, dropped, copied and resumed together in one batch; ``"rows"``: the
            same, one row at a time; ``"whole"``: finished candidates only, so just best-of-N; ``"refused"``: nothing.
        reason: why it is not ``"batch"``.
        stages: where a search may stop, the last included.
        nfe: model rows that one candidate costs, guidance branches counted.
        peak_rows: most model rows between two stages for one candidate: times the batch, what memory has to hold.
        levels: whether the noise levels are known, which previews and all moves need.
        preview, renoise, perturb, stochastic: whether each of these worked.
        decodes: whether finished rows become pixels of shape (B, 3, H, W) or (B, F, 3, H, W) in [0, 1].
        differences: measured by name, see :func:`compare`; empty where nothing was run.
        verdict: ``"exact"``, ``"wrong"``, ``"failed"`` (an error on the way), or ``"unmeasured"`` (not run,
            or its candidates do not differ).
        notes: what else is worth knowing, errors among it.
    """

    pipeline: str
    strategy: str
    reason: str = ""
    stages: int = 0
    nfe: int = 0
    peak_rows: int = 0
    levels: bool = False
    preview: bool = False
    renoise: bool = False
    perturb: bool = False
    stochastic: bool = False
    decodes: bool = False
    differences: Mapping[str, float] = field(default_factory=dict)
    verdict: str = "unmeasured"
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def support_table() -> dict[str, Support]:
    """Measured support by class name, sorted; the versions it was measured with are in :func:`measured_with`."""
    rows = _read()["pipelines"]
    return {row["pipeline"]: Support(**{**row, "notes": tuple(row["notes"])}) for row in rows}


def measured_with() -> dict[str, str]:
    """Versions of diffusers, transformers and torch, and the date, of the table's measurement."""
    return dict(_read()["measured_with"])


def _read() -> dict[str, Any]:
    return json.loads((files("visearch.pipelines") / "support.json").read_text(encoding="utf-8"))


def probe(
    pipe: Any, call: Mapping[str, Any] | None = None, *, exact: bool = False, progress: Callable[[str], None] = str
) -> Support:
    """Find out what a search can do with a loaded pipeline and a given call of it.

    Without ``exact`` the pipeline's loop runs with stand-ins for its models, so that only encoders compute. With it,
    about twenty short real runs follow, which compare pruned, copied and resumed rows with uninterrupted ones.

    Args:
        pipe: any diffusers pipeline; left as it was.
        call: keyword arguments of its call, prompt included. The number of images, generator and latents are ignored.
        exact: also run the model and compare. Use few steps, at least 3.
        progress: told what is being run.

    Returns:
        Support; a pipeline that cannot be driven has the strategy ``"refused"`` and the reason.

    Raises:
        TypeError: ``call`` holds an argument that the pipeline does not take.
    """
    given = {k: v for k, v in dict(call or {}).items() if k not in _TAKEN}
    parameters = inspect.signature(type(pipe).__call__).parameters
    unknown = sorted(set(given) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"{type(pipe).__name__} takes no argument {', '.join(unknown)}; see help(pipe.__call__)")
    with torch.random.fork_rng(devices=[]):
        return _probed(pipe, given, exact, progress)


def _probed(pipe: Any, given: dict[str, Any], exact: bool, progress: Callable[[str], None]) -> Support:
    name = type(pipe).__name__
    prompt = given.pop("prompt", None)
    example = {} if prompt is None else {"prompt": prompt}
    if exact:
        progress("one plain call")
        bare = _plain(pipe, {**given, **example}, torch.Generator().manual_seed(_SEED))
    progress("self-check with stand-in models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            sampler = DiffusionSampler(pipe, given, example=example)
        except (ValueError, TypeError) as error:
            return Support(name, "refused", _line(error))
    request = Request((prompt,), seed=_SEED, reward_prompts=("",))
    schedule, strategy = sampler.schedule, sampler.strategy
    found: dict[str, Any] = {
        "strategy": strategy,
        "reason": sampler.replay.reason,
        "stages": sampler.num_stages,
        "nfe": sampler.nfe(0, sampler.num_stages),
        "peak_rows": max(sampler.nfe(k, k + 1) for k in range(sampler.num_stages)),
        "levels": schedule.level(0) is not None,
    }
    if not exact:
        return Support(name, **found)
    notes: list[str] = []
    try:
        differences = compare(sampler, request, bare, progress)
        # a batch that a model or the decoder refuses is known once it was tried
        found |= {"strategy": sampler.strategy, "reason": sampler.replay.reason}
        progress("previews and moves")
        found |= _moves(sampler, request, notes)
        progress("the plain call again")
        again = _plain(pipe, {**given, **example}, torch.Generator().manual_seed(_SEED))
        differences["unchanged"] = _difference(again, bare)
        wrong = any(not value <= _limit(key, differences["apart"]) for key, value in differences.items())
        verdict = "wrong" if wrong else "exact"
        if verdict == "exact" and differences["apart"] == 0:
            verdict = "unmeasured"
            notes.append("its candidates do not differ, so there is nothing to compare, and nothing to search")
        found |= {"differences": differences, "verdict": verdict}
    except Exception as error:  # whatever a pipeline raises belongs in its line
        notes.append(_where(error))
        found |= {"verdict": "failed"}
    return Support(name, **found, notes=tuple(notes))


def compare(
    sampler: DiffusionSampler, request: Request, bare: Any, progress: Callable[[str], None] = str
) -> dict[str, float]:
    """Largest absolute differences of the pipeline's outputs, images on [0, 1], others in units of their deviation.

    Keys:
        ``one``: one candidate, stopped at stages 1 and 2, against the plain call with its generator; 0 expected.
        ``row``: the third of three candidates against the plain call with its generator. Where rounding alone makes
        the plain pipeline's own batch of three differ from that by more than 1e-4, which is then given as
        ``kernels``, against that batch.
        ``shrink@k``, ``grow@k``: rows [2, 0] of three, and rows [2, 0, 0, 1], carried on from stage k alone, against
        the uninterrupted three. The copied row counts only if nothing random is drawn after stage k, for copies have
        a stream of their own.
        ``apart``: what two of the three candidates differ by, which is what a mix-up of rows would show.

    Args:
        bare: the plain call's output with the generator of the request's candidate 0.
    """
    last = sampler.num_stages
    progress("one candidate, stopped and resumed")
    torch.manual_seed(_SEED)
    one = sampler.init(request, request.seeds(0, 1))
    for stage in (min(1, last), min(2, last), last):
        one = sampler.advance(one, stage) if stage > one.stage else one
    found = {"one": _difference(sampler.output(one), bare)}
    progress("three candidates, uninterrupted")
    start = sampler.init(request, request.seeds(0, 3))
    done = sampler.advance(start.snapshot(), last)
    full = _finished(sampler, done)
    found["apart"] = min(_worst(full[:1], full[1:2]), _worst(full[1:2], full[2:]), _worst(full[:1], full[2:]))
    found |= _third(sampler, request, full[2], start.state.tensors["ambient"][2])
    population = start
    stages = sorted({1, last // 2, last - 1} & set(range(1, last)))
    for stage in [0] if sampler.strategy == "whole" or not stages else stages:
        progress(f"pruned and copied at stage {stage} of {last}")
        population = sampler.advance(population.snapshot(), stage) if stage else start
        draws = any(not torch.equal(a, b) for a, b in zip(population.rng, done.rng, strict=True))
        for name, index in (("shrink", [2, 0]), ("grow", [2, 0, 0, 1])):
            rows = _carried(sampler, population, index)
            counted = [i for i in range(len(index)) if not (draws and index[i] in index[:i])]
            found[f"{name}@{stage}"] = _worst([rows[i] for i in counted], [full[index[i]] for i in counted])
    return found


def _third(sampler: DiffusionSampler, request: Request, row: list[Tensor], ambient: Tensor) -> dict[str, float]:
    call = {**sampler.call, **({} if request.prompts[0] is None else {"prompt": request.prompts[0]})}
    streams = [request.generator(seed) for seed in request.seeds(0, 3)]
    alone = _by_row(_plain(sampler.pipe, call, streams[2], ambient), 1)[0]
    row = row[: len(alone)]  # latents follow
    found = {"row": _worst([row], [alone])}
    if found["row"] > TOLERANCE and sampler.replay.number:
        streams = [request.generator(seed) for seed in request.seeds(0, 3)]
        plain = _by_row(_plain(sampler.pipe, {**call, sampler.replay.number: 3}, streams), 3)[2]
        found = {"row": _worst([row], [plain]), "kernels": _worst([plain], [alone])}
    return found


def _carried(sampler: DiffusionSampler, population: Population, index: list[int]) -> list[list[Tensor]]:
    picked = sampler.select(population.snapshot(), index)
    return _finished(sampler, sampler.advance(picked, sampler.num_stages))


def _finished(sampler: DiffusionSampler, population: Population) -> list[list[Tensor]]:
    """Per row, all that comes out for it, and its latents: some tiny random decoders give the same for all latents."""
    rows = _by_row(sampler.output(population), len(population))
    states = [population.state.select(torch.tensor([i])).tensors for i in range(len(population))]
    latents = [[t.to("cpu", torch.float64) for n, t in s.items() if n.endswith(".prev_sample")] for s in states]
    return [[*row, *more] for row, more in zip(rows, latents, strict=True)]


def _moves(sampler: DiffusionSampler, request: Request, notes: list[str]) -> dict[str, bool]:
    last = sampler.num_stages
    middle = sampler.advance(sampler.init(request, request.seeds(0, 1)), max(1, last // 2))
    seeds = request.seeds(0, 1)

    def pixels() -> None:
        made = sampler.decode(sampler.advance(middle.snapshot(), last))
        if made.ndim not in (4, 5) or made.shape[-3] != 3 or len(made) != 1:
            raise ValueError(f"decode gave shape {tuple(made.shape)}, not images or videos")
        low, high = float(made.min()), float(made.max())
        if not -1e-3 <= low <= high <= 1 + 1e-3:
            raise ValueError(f"decoded values lie in [{low:.2g}, {high:.2g}], not [0, 1]")

    def finite(population: Population) -> None:
        for name, tensor in sampler.advance(population, last).state.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is not finite afterwards")

    tries: dict[str, Callable[[], Any]] = {
        "decodes": pixels,
        "preview": lambda: sampler.decode(sampler.predict_x0(middle)),
        "renoise": lambda: finite(
            sampler.renoise(middle.snapshot(), max(0, middle.stage - 1), [s.value for s in seeds])
        ),
        "perturb": lambda: finite(sampler.perturb(middle.snapshot(), 0.5, [s.value for s in seeds])),
        "stochastic": lambda: [finite(sampler.view(t).init(request, seeds)) for t in (Sde(), EtaStep())],
    }
    worked = {}
    for name, attempt in tries.items():
        try:
            attempt()
            worked[name] = True
        except Exception as error:
            worked[name] = False
            notes.append(f"{name}: {_line(error)}")
    return worked


# --- comparing outputs ------------------------------------------------------------------------------------------


def _limit(name: str, apart: float) -> float:
    """One row alone and an unchanged pipeline are promised bit for bit, batches up to what kernels differ."""
    if name in ("one", "unchanged"):
        return 0.0
    return float("inf") if name in ("apart", "kernels") else min(TOLERANCE, apart / 10)


def _plain(
    pipe: Any,
    call: Mapping[str, Any],
    generator: torch.Generator | list[torch.Generator],
    ambient: Tensor | None = None,
) -> Any:
    """The pipeline's own call; what it draws without its generator comes from torch's global stream, set here."""
    if ambient is None:
        torch.manual_seed(_SEED)
    else:
        torch.set_rng_state(ambient.clone())
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        call = {**call, "generator": generator}
    return pipe(**call)


def _tensors(output: Any) -> list[Tensor]:
    """The fields of a pipeline's output that hold numbers, as tensors with rows first."""
    values = list(output) if isinstance(output, tuple) else [output[k] for k in output]
    made = []
    for value in values:
        array = _array(value)
        if array is not None:
            made.append(array)
    if not made:
        raise TypeError(f"{type(output).__name__} holds no images, arrays or tensors to compare")
    return made


def _array(value: Any) -> Tensor | None:
    if torch.is_tensor(value):
        return value.detach().to("cpu", torch.float64)
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.astype(np.float64))
    if hasattr(value, "convert"):
        return torch.from_numpy(np.asarray(value).astype(np.float64) / 255)
    if isinstance(value, (list, tuple)) and value:
        parts = [_array(v) for v in value]
        if all(p is not None and p.shape == parts[0].shape for p in parts):
            return torch.stack(parts)
    return None


def _by_row(output: Any, rows: int) -> list[list[Tensor]]:
    """Per candidate, its part of every field; some pipelines lay a candidate's several images out in a row."""
    fields = [t for t in _tensors(output) if t.ndim and t.shape[0] % rows == 0]
    return [[t[i * (len(t) // rows) : (i + 1) * (len(t) // rows)] for t in fields] for i in range(rows)]


def _difference(a: Any, b: Any) -> float:
    return _worst([_tensors(a)], [_tensors(b)], rounding=0.0)


def _worst(
    rows: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], rounding: float = 1 / 255 + 1e-6
) -> float:
    """Infinite where shapes differ or something is not a number on one side alone.

    Pixels of 8 bits may differ by one step: that far rounding carries a difference of any size.
    """
    worst = 0.0
    for row, other in zip(rows, expected, strict=True):
        if len(row) != len(other) or any(a.shape != b.shape for a, b in zip(row, other, strict=True)):
            return float("inf")
        for a, b in zip(row, other, strict=True):
            if torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
                continue
            image = bool(((b >= 0) & (b <= 1)).all())
            scale = 1.0 if image or b.numel() < 2 else max(float(b.std()), 1e-12)
            difference = float((a - b).abs().max()) / scale
            if image and _eight_bits(a) and _eight_bits(b):
                difference = max(0.0, difference - rounding)
            worst = max(worst, float("inf") if np.isnan(difference) else difference)
    return worst


def _eight_bits(values: Tensor) -> bool:
    return bool((values * 255 - (values * 255).round()).abs().max() < 1e-3)  # they may have been float32


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _where(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)[-3:]
    steps = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {_line(error)[:200]} ({steps})"
