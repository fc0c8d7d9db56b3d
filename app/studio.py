"""What the page may ask for, and how it becomes frames: settings are checked, planned and run here.

Names stand for models, searches and rewards; a model runs one search at a time. How a run becomes frames, from the
rounds of :func:`visearch.run.run_search` alone, is in :mod:`visearch.app.running`.
"""

from __future__ import annotations

import argparse
import logging
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from visearch.app.frames import Cost, Frame, Limits, Settings
from visearch.app.running import Run
from visearch.app.turns import Turns
from visearch.budget import Budget, Ledger
from visearch.monitor import check_absolute, check_held_out
from visearch.options import device_of, load, model_arguments, one_line
from visearch.prompts import check_judgeable
from visearch.protocols import Budgeted, Reward, Search
from visearch.search import parse
from visearch.search.best_of_n import BestOfN
from visearch.wrap import Job, Samplers, resolve

__all__ = ["GUIDES", "JUDGES", "MODELS", "SEARCHES", "Loader", "Model", "Source", "Studio"]

log = logging.getLogger(__name__)

Loader = Callable[[], tuple[Any, dict[str, Any]]]
"""Gives a pipeline on its device, and the arguments of its call."""


@dataclass(frozen=True)
class Source:
    """A model as ``visearch run --model`` names it; called, it loads it.

    Args:
        text: an embedded model's name, a folder, or the hub id of a diffusers pipeline.

    Raises:
        ValueError: when called, it cannot be loaded.
    """

    text: str

    def __call__(self) -> tuple[Any, dict[str, Any]]:
        parser = argparse.ArgumentParser()
        model_arguments(parser)
        options = parser.parse_args([f"--model={self.text}"])
        return load(options, device_of(options.device))


MODELS: Mapping[str, Loader] = {name: Source(name) for name in ("emoji-64", "emoji-64-v")}

SEARCHES: Mapping[str, tuple[str, str]] = {  # text, with {n} for the budget's images, and what it does
    "best-of-n": (
        "best-of-n(n={n}, batch=4)",
        "Draws as many images as the budget pays for and keeps the best: the bar for everything else.",
    ),
    "halving": (
        "halving(n={twice}, check_cost=0)",
        "Begins with more candidates, looks at them early and drops the worse half; the others go on untouched.",
    ),
    "halving-steep": (
        "halving(n={twice}, preset='steep', check_cost=0)",
        "Halving that drops more, and more often: best where previews tell early, as with the embedded models.",
    ),
    "conformal": (
        "conformal(n={n}, calls=(0.45, 0.6), margins=(6.607, 1.931))",
        "Drops whoever lies too far behind to win; margins measured for emoji-64 with emoji-clip. It saves.",
    ),
    "smc": (
        "smc(n={n})",
        "Particles with random steps: promising ones are copied over the others, and the copies drift apart.",
    ),
    "evosearch": (
        "evosearch(n={n})",
        "Generations of mutated children of the best so far, each restarting later in the drawing.",
    ),
    "zero-order": (
        "zero-order(n={n})",
        "Climbs: tries neighbours of the best starting noise so far, and begins anew where none is better.",
    ),
    "refine": (
        "refine(first=halving(n={twice}, check_cost=0), then=zero-order(n={quarter}, k=2))",
        "Halving with three quarters of the budget, then neighbours of its winner with the rest.",
    ),
    "cached-drafts": (
        "cached-drafts(search=best-of-n(n={twice}, batch=4), m=1)",
        "Quick drafts that reuse the model's outputs between steps; the best draft is drawn again in full.",
    ),
}

GUIDES: Mapping[str, str] = {
    "emoji-clip": "A small CLIP trained on the embedded world: how well the picture fits the prompt.",
    "emoji-clip-noise-aware": "The same CLIP, taught what early previews of emoji-64 become.",
    "jpeg-size": "Detail and noise, whatever the prompt: a reward that is easily hacked.",
    "jpeg-compressibility": "Plain pictures, whatever the prompt: a reward that is easily hacked.",
}
JUDGES: Mapping[str, str] = {
    "judge-a": "A detector that counts, names and colours objects: right (1) or wrong (0). Needs GenEval's wording.",
    "judge-b": "A second detector of another kind, trained apart.",
    "judge-c": "The second one's boxes, named by a network that never saw this world.",
    "emoji-clip": "A small CLIP; judges where something else guides.",
}


@dataclass
class Model:
    """A pipeline that was loaded, with what searches of it share.

    Attributes:
        sampler: tells what searches cost; to be run by who holds the turn alone.
        turns: held by whoever runs the pipeline.
        rate: seconds an image-equivalent, a mean in which later runs count more; ``None`` before the first.
    """

    pipe: Any
    call: dict[str, Any]
    samplers: Samplers = field(default_factory=Samplers)
    sampler: Any = field(init=False)
    turns: Turns = field(default_factory=Turns)
    rate: float | None = None

    def __post_init__(self) -> None:
        self.sampler = self.job(BestOfN(n=1), "a photo", 0).sampler

    def job(self, search: Search, prompt: str, seed: int, budget: Budget | None = None) -> Job:
        generator = torch.Generator().manual_seed(seed)
        return Job.of(
            self.pipe, search, prompt, generator=generator, budget=budget, samplers=self.samplers, **self.call
        )

    def learn(self, ledger: Ledger) -> None:
        if ledger.images:
            rate = ledger.seconds["total"] / ledger.images
            self.rate = rate if self.rate is None else self.rate + NEWS * (rate - self.rate)


NEWS = 0.3  # what the latest run counts in a mean rate


class Studio:
    """The engine of the page; one for all its users.

    What the page sends is looked up in the names given here and never opened. Models and rewards are loaded once, when
    they are first asked for. A model runs one search at a time; whoever comes second waits.

    Args:
        models: name -> what loads it; default the embedded ones.
        searches: name -> text for :func:`visearch.search.parse`, in which ``{n}``, ``{twice}`` and ``{quarter}`` stand
            for the budget's images, twice and a quarter as many. ``check_cost=0`` in a halving keeps the clock out of
            its decisions, so that it ends the same on every machine.
        rewards: those that may guide, as ``visearch run --reward`` takes them.
        judges: those that may be held out.
        limits: what one user may ask for; default :class:`visearch.app.frames.Limits`.

    Attributes:
        models, searches, rewards, judges: names offered -> a line about each.
    """

    def __init__(
        self,
        models: Mapping[str, Loader] | None = None,
        searches: Mapping[str, str] | None = None,
        rewards: Sequence[str] | None = None,
        judges: Sequence[str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._loaders = dict(MODELS if models is None else models)
        texts = {name: text for name, (text, _) in SEARCHES.items()}
        self._texts = dict(texts if searches is None else searches)
        self.models = {name: getattr(loader, "text", name) for name, loader in self._loaders.items()}
        self.searches = {name: SEARCHES.get(name, (text, text))[1] for name, text in self._texts.items()}
        self.rewards = {name: GUIDES.get(name, name) for name in (GUIDES if rewards is None else rewards)}
        self.judges = {name: JUDGES.get(name, name) for name in (JUDGES if judges is None else judges)}
        self.limits = limits or Limits()
        self._loading = threading.RLock()
        self._models: dict[str, Model] = {}
        self._rewards: dict[str, Reward] = {}

    # --- what is loaded ---------------------------------------------------------------------------------------

    def model(self, name: str) -> Model:
        """The model by a name offered, loaded if need be.

        Raises:
            ValueError: it cannot be loaded.
        """
        with self._loading:
            if name not in self._models:
                self._models[name] = Model(*self._loaders[name]())
            return self._models[name]

    def reward(self, name: str) -> Reward:
        """The reward by a name offered, loaded if need be.

        Raises:
            ValueError: it is relative to a prompt's other candidates.
            ImportError, FileNotFoundError: what it needs is not installed.
        """
        with self._loading:
            if name not in self._rewards:
                reward = resolve(name, device_of(None))
                check_absolute([reward])
                self._rewards[name] = reward
            return self._rewards[name]

    # --- settings ---------------------------------------------------------------------------------------------

    def defaults(self, prompt: str = "") -> Settings:
        """Settings of names that are offered here."""
        named = Settings(prompt, images=min(Settings.images, self.limits.images))
        offers = {"model": self.models, "search": self.searches, "reward": self.rewards}
        firsts = {what: next(iter(names)) for what, names in offers.items() if getattr(named, what) not in names}
        return replace(named, **firsts)

    def check_value(self, what: str, value: Any) -> None:
        """Check one field of the settings by itself.

        Raises:
            ValueError: one line with the field, its value and what to do.
        """
        limits = self.limits
        if what == "prompt":
            _check_prompt(value, limits.prompt)
        elif what in ("model", "search", "reward"):
            _check_name(what, value, getattr(self, f"{what}s" if what != "search" else "searches"))
        elif what == "held_out":
            for name in value:
                _check_name("held_out", name, self.judges)
        elif what == "images" and not (_whole(value) and 1 <= value <= limits.images):
            raise ValueError(f"images={value!r} must be a whole number from 1 to {limits.images}")
        elif what == "seconds" and not (value is None or (_real(value) and 0 < value <= limits.seconds)):
            raise ValueError(f"seconds={value!r} must lie in (0, {limits.seconds:g}]; leave it out for no limit")
        elif what == "best_of_n" and not isinstance(value, bool):
            raise ValueError(f"best_of_n={value!r} must be True or False")
        elif what == "seed" and not (_whole(value) and 0 <= value < 2**63):
            raise ValueError(f"seed={value!r} must be a whole number in [0, 2^63)")

    def check(self, settings: Settings) -> None:
        """Refuse what cannot be run, before anything is computed; loads the model and the rewards.

        Raises:
            ValueError: one line with the field, its value and what to do.
        """
        for what, value in vars(settings).items():
            self.check_value(what, value)
        guide, (judges, _) = self.reward(settings.reward), self._judges(settings)
        check_judgeable([guide], [{"prompt": settings.prompt}])
        check_held_out([guide], judges)
        self._planned(settings)

    def search(self, settings: Settings) -> Search:
        """The search, sized for the budget; :func:`text` of it is what the take-home code says."""
        return parse(self.text(settings))

    def text(self, settings: Settings) -> str:
        """The search as text for :func:`visearch.search.parse`."""
        n = settings.images
        sizes = {"n": n, "twice": 2 * n, "quarter": max(1, n // 4)}
        return self._texts[settings.search].format(**sizes)

    def named(self, settings: Settings) -> bool:
        """Whether a command can name the model."""
        return isinstance(self._loaders[settings.model], Source)

    def source(self, settings: Settings) -> str:
        """The model as ``visearch run --model`` names it.

        Raises:
            ValueError: it was made in code.
        """
        if not self.named(settings):
            raise ValueError(f"model={settings.model!r} was made in code, so no command names it; serve it by --model")
        return self._loaders[settings.model].text

    def judging(self, settings: Settings) -> tuple[str, ...]:
        """Those of ``held_out`` that are installed and can judge the prompt."""
        return tuple(name for name in settings.held_out if self._reason(name, settings.prompt) is None)

    def plan(self, settings: Settings) -> Cost:
        """What a search would take, before it runs; the loaded model is not run for that.

        Raises:
            ValueError: not even one candidate fits.
        """
        plan, rate = self._planned(settings), self.model(settings.model).rate
        begun = max(plan.finals, _begun(plan.search))
        seconds = None if rate is None else rate * plan.images
        beside = 0.0 if self._bar(settings) is None else float(settings.images)
        return Cost(plan.images, begun, plan.finals, max(0, plan.decodes - plan.finals), seconds, beside)

    def max_nfe(self, settings: Settings) -> int:
        """The budget in model rows."""
        return self.budget(settings).rows_a_prompt(self.model(settings.model).sampler, 1)

    @staticmethod
    def budget(settings: Settings) -> Budget:
        return Budget(max_images=settings.images, max_seconds=settings.seconds)

    def _planned(self, settings: Settings) -> Budgeted:
        return self.search(settings).plan(self.model(settings.model).sampler, self.max_nfe(settings))

    def _judges(self, settings: Settings) -> tuple[list[Reward], tuple[str, ...]]:
        """The judges that can judge the prompt, and why the others cannot."""
        reasons = {name: self._reason(name, settings.prompt) for name in settings.held_out}
        judges = [self.reward(name) for name, reason in reasons.items() if reason is None]
        out: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            if reason is not None:
                out.setdefault(reason, []).append(name)
        return judges, tuple(f"left out: {', '.join(names)}, as {reason}" for reason, names in out.items())

    def _reason(self, name: str, prompt: str) -> str | None:
        """Why a judge cannot judge a prompt."""
        try:
            check_judgeable([self.reward(name)], [{"prompt": prompt}])
        except (ImportError, FileNotFoundError, ValueError) as error:
            return one_line(error)
        return None

    # --- runs -------------------------------------------------------------------------------------------------

    def run(self, settings: Settings, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Frame]:
        """Frames while it waits, one when its turn comes, the plain sample, a frame a round, then those of best-of-n.

        The search's last frame is :attr:`Frame.over`, and so are all after it.

        Whatever goes wrong ends in a frame of phase ``"failed"`` with one line, and all that was on screen before it;
        the trace goes to the log. A generator that is closed early frees the model.

        Args:
            cancelled: asked between rounds, and while another search holds the model.
        """
        frame = Frame(settings, "waiting")
        try:
            self.check(settings)
            model = self.model(settings.model)
            with model.turns.place() as before:
                while ahead := before():
                    if cancelled():
                        yield replace(frame, phase="cancelled")
                        return
                    if ahead != frame.ahead:
                        frame = replace(frame, ahead=ahead)
                        yield frame
                run = self._run(settings, model)
                frame = Frame(settings, "baseline", cost=run.cost)
                yield frame
                with closing(run.frames(cancelled)) as frames:
                    for frame in frames:
                        yield frame
                model.learn(run.ledger)
        except Exception as error:  # of whatever kind: a person waits for one line
            log.exception("a search failed")
            yield replace(frame, phase="failed", error=one_line(error), eta=None)

    def files(self, frame: Frame, folder: Path) -> dict[str, bytes]:
        """Write everything that can be taken home to a folder, and return it by name; see :func:`takehome.files`."""
        from visearch.app import takehome

        found = takehome.files(self, frame)
        for name, content in found.items():
            (folder / name).write_bytes(content)
        return found

    def _run(self, settings: Settings, model: Model) -> Run:
        judges, notes = self._judges(settings)
        job = model.job(self.search(settings), settings.prompt, settings.seed, self.budget(settings))
        guide, budget, cost = self.reward(settings.reward), self.budget(settings), self.plan(settings)
        return Run(settings, job, guide, judges, budget, cost, notes, self._bar(settings))

    def _bar(self, settings: Settings) -> Search | None:
        """Best-of-n, where it was asked for and is not what runs anyway."""
        wanted = settings.best_of_n and not isinstance(self.search(settings), BestOfN)
        return BestOfN(n=settings.images, batch=4) if wanted else None


def _begun(search: Any) -> int:
    """Candidates that a search begins with, and those within it."""
    parts = [getattr(search, name, None) for name in ("first", "then", "search")]
    return (getattr(search, "n", 0) or 0) + sum(_begun(part) for part in parts if part is not None)


# --- one field ------------------------------------------------------------------------------------------------


def _check_prompt(prompt: Any, most: int) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is empty; say what the image should show")
    if len(prompt) > most:
        raise ValueError(f"prompt has {len(prompt)} characters; at most {most} are allowed, shorten it")
    if bad := next((c for c in prompt if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None):
        raise ValueError(f"prompt holds a line break or control character ({bad!r}); write it in one line")


def _check_name(what: str, name: Any, known: Mapping[str, str]) -> None:
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{what}={name!r} is not offered here; choose {', '.join(known)}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
