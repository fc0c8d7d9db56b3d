"""SearchPipeline: a diffusers pipeline that searches, called exactly as before."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import nn
from tqdm.auto import tqdm

from visearch.budget import Budget, Ledger
from visearch.diversity import Keep
from visearch.job import Job, Samplers
from visearch.memory import Plan, plan
from visearch.monitor import baselines, check_held_out, judged
from visearch.pipelines import components
from visearch.pipelines.previews import PreviewDecoder
from visearch.protocols import Budgeted, Population, Reward, Search
from visearch.rewards import RewardLike, resolve
from visearch.rewards.features import Features, FeaturesLike, resolve_features
from visearch.rewards.images import to_pil
from visearch.run import Round, SearchResult, run_search
from visearch.search import describe, parse

__all__ = ["BarLedger", "Job", "Samplers", "SearchPipeline", "make_search", "resolve", "to_pil"]


def make_search(search: str | Search | None, **fields: Any) -> Search:
    """A search from its text, as :func:`visearch.search.parse` reads it, or a search; ``None`` is best-of-n.

    Args:
        fields: hyperparameters that win over those of the text.

    Raises:
        ValueError: what is given names no search; a hyperparameter that the search does not have, or out of range.
    """
    made = parse(search or "best-of-n") if search is None or isinstance(search, str) else search
    known = [f.name for f in dataclasses.fields(made)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{describe(made)} has no hyperparameter {name!r}; it has {', '.join(known)}")
    return replace(made, **fields) if fields else made


class SearchPipeline:
    """Wrap a diffusers pipeline; the result is called as the pipeline itself and returns its output class.

    The returned object is an instance of a subclass of the pipeline's own class, with the same name, and shares its
    attributes: ``.to()``, LoRA, offload and saving work as before, on the same modules. Its output has one more
    attribute, ``.search`` (:class:`visearch.run.SearchResult`), and the object one more property, ``search_result``.
    Its call takes one more argument, ``reward_prompt=``: what the reward reads where there is no text, or another one.

    With one candidate (n = 1) the output equals the plain pipeline's bit for bit. Then k images a prompt, or several
    prompts, are the plain call's batch in its order: equal on the CPU up to how kernels round for other batch sizes,
    with schedulers that draw nothing and pipelines that draw each row's noise alone. A search returns the k best, best
    first, and draws each candidate from a random stream of its own, not as the plain pipeline's batch: one generator
    serves candidate 0 of every prompt from the same state, a list of generators candidate j from the prompt's j-th. A
    best-of-n with n < k draws k. With ``diversity=`` the k are not the best but a set of good ones that are unlike each
    other. ``latents=`` are the noise of candidate 0 (of as many candidates as there are latents a prompt); the others
    draw theirs.

    ``callback_on_step_end`` hears of live steps, of all candidates, in the order in which they run, and may write
    there; what it writes after the very last step shows in the images returned, not in their scores.

    The samplers' dry runs are kept from call to call while components and arguments keep their kind. A pipeline runs
    one search at a time, also where several wrappers or pipelines share its components.

    Args:
        pipe: any diffusers pipeline whose call loops over ``scheduler.step``.
        reward: a name, a reward object, or a function ``(images, prompts) -> floats``; a sum of them as in
            ``a + 0.5 * b`` or ``"pick-score + 0.5 * hps-v2.1"``, or a list, joined by average rank.
        search: a search, or its text: ``"halving"``, ``"halving(n=16, preset='psp')"``; default best-of-8.
        budget: limits of one call; default none.
        held_out: judges, of other families than the reward that guides: they only score the winners and candidate 0 of
            each prompt, which is drawn for them where the search dropped it. The result's ``report`` shows all side by
            side, and warns where the reward rises and a judge falls. A judge with ``checker = True`` (GenEval's
            verdicts) also scores all finished candidates and tells what an oracle would have picked.
        rows, decode_rows: most rows for the model and the decoder at once; default as many as fit.
        batch_buckets: the only batch sizes that the model may see, such as (1, 2, 4, 8), for compiled models.
        diversity: how several images a prompt are chosen: a method of :func:`visearch.diversity.diverse_subset`, such
            as ``"greedy"``, or a :class:`visearch.Keep` with its weight; default the best by the reward.
        features: what images are compared by, there and in searches that prune by it: ``"thumbnails"``, a reward with
            an image encoder by name, or a function of N samples that returns (N, D); default the image encoder of
            ``reward``, or thumbnails.
        rewrite: called with a prompt and k, gives the text that candidate k >= 1 is generated from, e.g. by a language
            model. Candidate 0 follows the prompt as it is, and rewards always read that; ``prompt_2`` and negative
            prompts stay.
        preview: what decodes previews of unfinished candidates: ``"full"``, the pipeline's own VAE, ``"tiny"``,
            ``"linear"`` or ``"auto"`` (:class:`visearch.pipelines.previews.PreviewDecoder`). Results are always full.
        preview_decoder: for ``"tiny"`` and ``"auto"``: an ``AutoencoderTiny`` such as TAESD, its folder or hub id, or
            a file in TAEHV's layout for latents with frames.

    ``.plan(...)``, called as the pipeline, tells the work and the memory of a call before it (:class:`visearch.Plan`).

    Raises:
        TypeError: ``pipe`` is no diffusers pipeline.
        ValueError: unknown reward or search; a pipeline without a scheduler; a preview decoder of other latents.
        RuntimeError: on a call: a search is under way with a component of the pipeline, or a component was replaced
            while the search ran.

    Example:
        >>> pipe = SearchPipeline(DiffusionPipeline.from_pretrained(...), reward="emoji-clip", search=BestOfN(n=8))
        >>> image = pipe("a photo of two cows").images[0]
    """

    def __new__(
        cls,
        pipe: Any,
        reward: RewardLike,
        search: str | Search | None = None,
        budget: Budget | None = None,
        *,
        held_out: Sequence[RewardLike] = (),
        rows: int | None = None,
        decode_rows: int | None = None,
        batch_buckets: Sequence[int] | None = None,
        diversity: Keep | str | None = None,
        features: FeaturesLike | None = None,
        rewrite: Callable[[str, int], str] | None = None,
        preview: str = "full",
        preview_decoder: Any = None,
    ) -> Any:
        _check_pipeline(pipe)
        device = getattr(pipe, "_execution_device", "cpu")
        rewards = [resolve(r, device) for r in (reward, *held_out)]
        check_held_out(rewards[:1], rewards[1:])
        sizes = {"rows": rows, "decode_rows": decode_rows, "batch_buckets": batch_buckets}
        settings = _Settings(
            rewards[0],
            make_search(search),
            budget,
            rewards[1:],
            sizes,
            rewrite,
            Keep.of(diversity),
            resolve_features(features, rewards[0], device),
            preview,
            PreviewDecoder(pipe, preview, preview_decoder).decoder,
        )
        pipe = _plain(pipe)
        wrapped = object.__new__(_subclass(type(pipe), settings))
        object.__setattr__(wrapped, "__dict__", vars(pipe))
        _sessions[wrapped] = _Session(settings, pipe)
        return wrapped


def _check_pipeline(pipe: Any) -> None:
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe is a {type(pipe).__name__}; give a diffusers pipeline object")
    # one with text encoders alone can still encode prompts
    if any(isinstance(c, nn.Module) and "text" not in name for name, c in components(pipe).items()):
        _check_scheduler(pipe)


def _check_scheduler(pipe: Any) -> None:
    if not any(hasattr(c, "step") and hasattr(c, "set_timesteps") for c in components(pipe).values()):
        raise ValueError(
            f"{type(pipe).__name__} has no scheduler, so there is no loop to search in; set pipe.scheduler first, or "
            "wrap the pipeline that makes the images"
        )


def _plain(pipe: Any) -> Any:
    """The pipeline under a wrapper, if it is one: an object of the wrapped class on the same attributes."""
    kind = getattr(type(pipe), "_visearch_kind", None)
    if kind is None:
        return pipe
    plain = object.__new__(kind)
    object.__setattr__(plain, "__dict__", vars(pipe))
    return plain


_sessions: WeakKeyDictionary[Any, _Session] = WeakKeyDictionary()  # beside the __dict__ that wrapper and pipeline share


def _session(wrapped: Any) -> _Session:
    """What a wrapped object remembers; objects made by loading, ``from_pipe`` or copying begin with nothing."""
    if wrapped not in _sessions:
        _sessions[wrapped] = _Session(type(wrapped)._visearch_settings, _plain(wrapped))
    return _sessions[wrapped]


def _subclass(kind: type, settings: _Settings) -> type:
    """A subclass by the same name whose objects search when called, however they are made."""

    @functools.wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _session(self).call(*args, **kwargs)

    def plan(self: Any, *args: Any, **kwargs: Any) -> Plan:
        """Work and memory of a call with these arguments, before it."""
        return _session(self).plan(*args, **kwargs)

    def __getattr__(self: Any, name: str) -> Any:
        left = _session(self).left
        return left[name] if name in left else super(made, self).__getattr__(name)

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__call__": __call__,
        "__getattr__": __getattr__,
        "plan": plan,
        "_visearch_kind": kind,
        "_visearch_settings": settings,
        "search_result": property(lambda self: _session(self).result, doc="SearchResult of the latest call, or None."),
    }
    made = type(kind.__name__, (kind,), members)
    return made


@dataclass(frozen=True)
class _Settings:
    """How a wrapped pipeline searches."""

    reward: Reward
    search: Search
    budget: Budget | None
    held_out: list[Reward]
    sizes: dict[str, Any]
    rewrite: Callable[[str, int], str] | None = None
    diversity: Keep | None = None
    features: Features | None = None
    preview: str = "full"
    preview_decoder: nn.Module | None = None


class _Session:
    """What one wrapped object remembers between calls.

    Attributes:
        result: of the latest call.
        left: attributes that a plain call would have left on the pipeline, such as ``_guidance_scale``.
    """

    def __init__(self, settings: _Settings, pipe: Any) -> None:
        self.settings, self.pipe = settings, pipe
        self.samplers = Samplers()
        self.result: SearchResult | None = None
        self.left: dict[str, Any] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        settings, pipe = self.settings, self.pipe
        _check_scheduler(pipe)
        with _alone(pipe) as check:
            job = self._job(*args, **kwargs)
            _watch(job.sampler.call, check)
            self.result = None
            planned = self._planned(job)
            for step in self._rounds(job, planned):
                self.result = step.result
                check()
            result = self.result
            if result.error is not None and (result.finished is None or isinstance(result.error, KeyboardInterrupt)):
                raise result.error
            job.settle(result)
            if result.error is not None:
                result.error.add_note("the candidates finished before it are in .search_result of the pipeline")
                raise result.error
            winners = job.chosen(result, settings.diversity, settings.features)
            output = job.output(winners)
            check()
            self._leave(job.sampler.replay.left)
            self.result = result = self._judged(job, planned.search, result, winners)
        if isinstance(output, BaseOutput):
            output.search = result
        return output

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        settings = self.settings
        _check_scheduler(self.pipe)
        with _alone(self.pipe), torch.random.fork_rng(devices=[]):  # a seed may be drawn, as in the call
            job = self._job(*args, **kwargs)
            return plan(job.sampler, settings.reward, job.search, job.request, settings.budget, **settings.sizes)

    def _job(self, *args: Any, **kwargs: Any) -> Job:
        settings = self.settings
        return Job.of(
            self.pipe,
            settings.search,
            *args,
            budget=settings.budget,
            samplers=self.samplers,
            rewrite=settings.rewrite,
            previews=PreviewDecoder(self.pipe, settings.preview, settings.preview_decoder),
            **kwargs,
        )

    def _leave(self, attributes: dict[str, Any]) -> None:
        """Properties such as ``guidance_scale`` read as after a plain call; the pipeline gets no new attributes."""
        own = vars(self.pipe)
        own.update({k: v for k, v in attributes.items() if k in own})
        self.left = {k: v for k, v in attributes.items() if k not in own}

    def _planned(self, job: Job) -> Budgeted:
        """The search as the run will cut it to the budget."""
        budget = self.settings.budget
        rows = None if budget is None else budget.rows_a_prompt(job.sampler, len(job.request.prompts))
        return job.search.plan(job.sampler, rows)

    def _rounds(self, job: Job, planned: Budgeted) -> Iterator[Round]:
        settings, total = self.settings, len(job.request.prompts) * planned.nfe
        options = dict(getattr(self.pipe, "_progress_bar_config", {}))
        with tqdm(total=total, desc=type(job.search).__name__, unit="row", **options) as bar:
            yield from run_search(
                job.sampler,
                settings.reward,
                job.search,
                job.request,
                settings.budget,
                **settings.sizes,
                ledger=BarLedger(bar=bar),
                features=settings.features,
            )

    def _judged(self, job: Job, search: Search, result: SearchResult, winners: Population) -> SearchResult:
        judges = self.settings.held_out
        if not judges:
            return result
        reward = self.settings.reward
        first = baselines(job.sampler, search, reward, result, winners, **self.settings.sizes)
        report, scores = judged(reward, judges, result, *first, winners)
        for warning in report.warnings:
            warnings.warn(warning, stacklevel=4)
        return replace(result, held_out=scores, report=report, warnings=result.warnings + report.warnings)


def _watch(call: dict[str, Any], check: Callable[[], None]) -> None:
    """Check after each of the user's callbacks, since what it replaces lasts until the end of the step's run only."""
    for name in ("callback_on_step_end", "callback"):
        if callable(function := call.get(name)) and not isinstance(
            function, (PipelineCallback, MultiPipelineCallbacks)
        ):

            def checked(*args: Any, _function: Callable = function, **kwargs: Any) -> Any:
                made = _function(*args, **kwargs)
                check()
                return made

            call[name] = checked


_busy: dict[int, str] = {}  # id of a component -> class of the pipeline that searches with it
_guard = threading.Lock()


@contextmanager
def _alone(pipe: Any) -> Iterator[Callable[[], None]]:
    """Refuse a second search with any of a pipeline's components; yields a check that they are still the same.

    Raises:
        RuntimeError: a component is in use, or, from the check, was replaced.
    """
    parts = {
        name: part
        for name, part in components(pipe).items()
        if isinstance(part, nn.Module) or hasattr(part, "set_timesteps")
    }
    with _guard:
        for name, part in parts.items():
            if id(part) in _busy:
                raise RuntimeError(
                    f"the {name} of this {type(pipe).__name__} is in use by a search of a {_busy[id(part)]}; a search "
                    "changes a pipeline while it runs, so run one at a time, or give each thread its own copy"
                )
        _busy.update(dict.fromkeys(map(id, parts.values()), type(pipe).__name__))

    def check() -> None:
        for name, part in parts.items():
            if getattr(pipe, name, None) is not part:
                raise RuntimeError(
                    f"pipe.{name} was replaced by a {type(getattr(pipe, name, None)).__name__} while a search ran; "
                    "replace components between calls"
                )

    try:
        yield check
    finally:
        with _guard:
            for part in parts.values():
                _busy.pop(id(part), None)


@dataclass
class BarLedger(Ledger):
    """A ledger that moves a progress bar with every model call."""

    bar: Any = None

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        super().forward(rows, seconds, kind, images)
        self.bar.update(0 if kind == "probe" else rows)
