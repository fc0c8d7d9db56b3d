"""What a person takes home: the code and the command that draw the very image on screen, a link, files and a report."""

from __future__ import annotations

import io
import json
import shlex
import string
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from PIL import Image

from visearch.app import report
from visearch.app.frames import Candidate, Frame, Settings
from visearch.options import MODELS, device_of, dtype_of
from visearch.report import contact_sheet, versions

if TYPE_CHECKING:
    from visearch.app.studio import Studio

__all__ = ["bred", "command", "files", "from_query", "python", "query", "report_html", "restore"]

quoted = partial(json.dumps, ensure_ascii=False)  # a Python literal in double quotes, too
SUFFIXES = {"image/png": "png", "image/webp": "webp", "video/mp4": "mp4"}


# --- code and command -----------------------------------------------------------------------------------------

PYTHON = string.Template(
    '''"""$says"""

import torch
$imports

pipe = SearchPipeline(
    $arguments,
)
generator = torch.Generator().manual_seed($seed)
found = pipe($prompt, generator=generator$call)
found.images[0].save("winner.png")
print(f"score {found.search.ranking[0]['score']:.4g}, {found.search.ledger.images:.2f} images spent")$report
'''
)
EMBEDDED = """
from visearch import {names}
from visearch.pipelines import MODELS, emoji"""
DIFFUSERS = """from diffusers import DiffusionPipeline

from visearch import {names}"""
EXACT = "Draws the best image that the search found; machines may differ in the last bits."
TIMED = "Searches again as long as before: the clock ends it, so that another run may end elsewhere."


def python(settings: Settings, studio: Studio | None = None) -> str:
    """A whole script that writes the winner to ``winner.png``.

    Args:
        settings: of the run.
        studio: gives names their meaning; default one of the embedded models.

    Raises:
        ValueError: settings that are refused, or a model that was made in code.
    """
    studio = studio or _studio()
    _check(settings, studio)
    source, judges, seconds = studio.source(settings), studio.judging(settings), settings.seconds
    embedded = source in MODELS
    arguments = [
        _embedded(source) if embedded else _loaded(source),
        f"reward={quoted(settings.reward)}",
        f"search={quoted(studio.text(settings))}",
        f"budget=Budget(max_images={settings.images}{'' if seconds is None else f', max_seconds={seconds!r}'})",
    ]
    if judges:
        arguments.append(f"held_out=[{', '.join(map(quoted, judges))}]")
    return PYTHON.substitute(
        says=EXACT if seconds is None else TIMED,
        imports=(EMBEDDED if embedded else DIFFUSERS).format(names="Budget, SearchPipeline"),
        arguments=",\n    ".join(arguments),
        seed=settings.seed,
        prompt=quoted(settings.prompt),
        call=f", **emoji.CALLS[{quoted(source)}]" if embedded else "",
        report="\nprint(found.search.report)" if judges else "",
    )


BRED = string.Template(
    '''"""Draws the winner again from its seed and operations; winner.zip is unpacked beside this file."""

import torch
$imports
from visearch.wrap import Job, to_pil

pipe = $pipe
start = torch.Generator().manual_seed($seed)
job = Job.of(pipe, EvolutionarySearch(), $prompt, generator=start$call)
again = regenerate(job.sampler, job.request, Population.load(".", name="winner"))
to_pil(job.sampler.decode(again.row))[0].save("again.png")
print(f"largest difference of the latents: {again.drift:.2g}")
'''
)


def bred(settings: Settings, studio: Studio) -> str:
    """A whole script that draws the winner of a breeding again.

    Args:
        settings: prompt, model and seed count.
        studio: gives names their meaning.

    Raises:
        ValueError: a model that was made in code.
    """
    source = studio.source(settings)
    embedded = source in MODELS
    return BRED.substitute(
        imports=(EMBEDDED if embedded else DIFFUSERS).format(names="EvolutionarySearch, Population, regenerate"),
        pipe=_embedded(source) if embedded else _loaded(source),
        seed=settings.seed,
        prompt=quoted(settings.prompt),
        call=f", **emoji.CALLS[{quoted(source)}]" if embedded else "",
    )


def _embedded(name: str) -> str:
    device = device_of(None)
    options = "" if device == "cpu" else f"{quoted(device)}, torch.{dtype_of(None, device)}"
    return f"MODELS.load({quoted(name)})({options})"


def _loaded(source: str) -> str:
    device = device_of(None)
    options = f"dtype=torch.{dtype_of(None, device)}, use_safetensors=True"
    return f"DiffusionPipeline.from_pretrained({quoted(source)}, {options}).to({quoted(device)})"


def command(settings: Settings, studio: Studio | None = None) -> str:
    """The command that writes the winner, the baseline and all candidates to a folder; arguments as for :func:`python`.

    Quoted for a POSIX shell.

    Raises:
        ValueError: as :func:`python`.
    """
    studio = studio or _studio()
    _check(settings, studio)
    words = ["visearch", "run", "--model", studio.source(settings), "--search", studio.text(settings)]
    words += ["--reward", settings.reward]
    for name in studio.judging(settings):
        words += ["--held-out", name]
    words += ["--max-images", str(settings.images)]
    words += [] if settings.seconds is None else ["--max-seconds", repr(settings.seconds)]
    return shlex.join([*words, "--seed", str(settings.seed), "--", settings.prompt])


def _check(settings: Settings, studio: Studio) -> None:
    for what, value in vars(settings).items():
        studio.check_value(what, value)


def _studio() -> Studio:
    from visearch.app.studio import Studio

    return Studio()


# --- the link -------------------------------------------------------------------------------------------------

READ: Mapping[str, Callable[[list[str]], Any]] = {  # from all values that a query gives to a name
    "images": lambda values: int(values[-1]),
    "seed": lambda values: int(values[-1]),
    "seconds": lambda values: float(values[-1]),
    "held_out": lambda values: tuple(dict.fromkeys(values)),
    "best_of_n": lambda values: {"True": True, "False": False}.get(values[-1], values[-1]),
}
FIELDS = 64  # most of a query


def query(settings: Settings) -> str:
    """Settings as the query of an address, what is as by default left out."""
    given = {f.name: value for f in fields(Settings) if (value := getattr(settings, f.name)) != f.default}
    return urlencode(given, doseq=True)


def from_query(text: str, studio: Studio | None = None) -> Settings:
    """The settings of a query; what is unknown or broken in it is as by default. See :func:`restore`."""
    return restore(text, studio)[0]


def restore(text: str, studio: Studio | None = None) -> tuple[Settings, tuple[str, ...]]:
    """The settings of a query, and a line about each thing in it that is unknown or broken; never raises for those.

    Args:
        text: as :func:`query` gives it, with or without ``?``.
        studio: whose names are known; default one of the embedded models.
    """
    studio = studio or _studio()
    settings = studio.defaults()
    known = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    try:
        given = parse_qs(text.removeprefix("?"), keep_blank_values=True, errors="replace", max_num_fields=FIELDS)
    except ValueError as error:
        return settings, (f"the address is not understood ({error}); everything is as by default",)
    notes = [f"{name} in the address is unknown and left out" for name in given if name not in known]
    for name in (n for n in given if n in known):
        try:
            value = READ.get(name, lambda values: values[-1])(given[name])
            studio.check_value(name, value)
            known[name] = value
        except ValueError as error:
            notes.append(f"{name} in the address is left out: {error}")
    return Settings(**known), tuple(notes)


# --- files ----------------------------------------------------------------------------------------------------


def files(studio: Studio, frame: Frame) -> dict[str, bytes]:
    """Everything about a run, by the names of files: images, numbers, the report, the code, and a zip of them all.

    Args:
        studio: that ran it.
        frame: the last one.
    """
    found: dict[str, bytes] = {}
    again = _again(frame.settings, studio)
    best = frame.find(frame.winner)
    for name, media in (("winner", best and best.media), ("baseline", frame.baseline)):
        if media is not None:
            found[f"{name}.{SUFFIXES[media.mime]}"] = media.content
    if any(c.media for c in frame.candidates):
        found["contact-sheet.png"] = _sheet(frame)
    found["result.json"] = json.dumps({**_result(studio, frame), **again}, indent=2, ensure_ascii=False).encode()
    found["report.html"] = report.page(frame, **again).encode()
    if again:
        found["again.py"] = again["python"].encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in found.items():
            archive.writestr(name, content)
    return {**found, "visearch.zip": packed.getvalue()}


def report_html(frame: Frame, studio: Studio | None = None) -> str:
    """A run as one HTML file that opens anywhere, offline; arguments as for :func:`files`."""
    return report.page(frame, **_again(frame.settings, studio or _studio()))


def _again(settings: Settings, studio: Studio) -> dict[str, str]:
    """What repeats a run; nothing where the model was made in code."""
    if not studio.named(settings):
        return {}
    return {"python": python(settings, studio), "command": command(settings, studio)}


def _ordered(frame: Frame) -> list[Candidate]:
    """Finished candidates from best to worst, then the others in the order in which they came."""
    return sorted(frame.candidates, key=lambda c: (c.rank is None, c.rank or 0))


def _sheet(frame: Frame) -> bytes:
    shown = [c for c in _ordered(frame) if c.media is not None]
    pictures = [Image.open(io.BytesIO(c.media.content)) for c in shown]
    captions = [f"{_score(c.score)}  #{c.id}\n{c.state}, step {c.stage}, seed {c.seed}" for c in shown]
    settings = frame.settings
    title = f"{settings.prompt}   |   {settings.search}, {len(shown)} candidates, {settings.reward}"
    marked = next((place for place, c in enumerate(shown) if c.id == frame.winner), -1)
    file = io.BytesIO()
    contact_sheet(pictures, captions, title, marked=marked).save(file, "PNG")
    return file.getvalue()


def _result(studio: Studio, frame: Frame) -> dict[str, Any]:
    """JSON-able; without the images."""
    plain = {f.name: getattr(frame, f.name) for f in fields(Frame) if f.name not in ("baseline", "candidates")}
    candidates = [{f.name: getattr(c, f.name) for f in fields(Candidate) if f.name != "media"} for c in _ordered(frame)]
    for candidate in candidates:
        candidate["lineage"] = [event._asdict() for event in candidate["lineage"]]
    return {
        **{k: asdict(v) if hasattr(v, "__dataclass_fields__") else v for k, v in plain.items()},
        "ledger": [asdict(share) for share in frame.ledger],
        "beside": [asdict(share) for share in frame.beside],
        "candidates": candidates,
        "search": studio.text(frame.settings),
        "versions": versions(),
    }


def _score(score: float | None) -> str:
    return "no score" if score is None else f"{score:.3f}"
