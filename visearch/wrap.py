"""SearchPipeline: a diffusers pipeline that searches, called exactly as before."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from visearch.budget import Budget, Ledger, MeteredReward
from visearch.protocols import Request, Reward, Search
from visearch.rewards import RewardLike, resolve
from visearch.run import Round, SearchResult, run_search
from visearch.search import SEARCHES

if TYPE_CHECKING:
    from visearch.pipelines.diffusion import DiffusionSampler

__all__ = ["Job", "SearchPipeline", "make_search"]

_TEXT = re.compile(r"(negative_)?prompt(_\d+)?$")
_EMBEDDING = re.compile(r"(negative_)?(pooled_)?prompt_\w*(embeds|mask)(_\d+)?$")
_NUMBERS = ("num_images_per_prompt", "num_videos_per_prompt")


def make_search(search: str | Search | None, **fields: Any) -> Search:
    """A search from its name and hyperparameters; objects are passed through; ``None`` is best-of-n.

    Raises:
        ValueError: unknown name.
        TypeError: a hyperparameter that the search does not have.
    """
    if search is None or isinstance(search, str):
        return SEARCHES.load(search or "best-of-n")(**fields)
    return replace(search, **fields) if fields else search


@dataclass(frozen=True)
class Job:
    """One call of a pipeline, taken apart for the search.

    Attributes:
        sampler: drives the user's own pipeline.
        request: prompts, seed and generators.
        winners: images or videos a prompt to return.
        overrides: arguments that matter for the final decode only (``output_type``, ``return_dict``).
        generators: the user's generators, advanced by :meth:`settle` as a plain call would.
    """

    sampler: DiffusionSampler
    request: Request
    winners: int
    overrides: Mapping[str, Any]
    generators: tuple[torch.Generator | None, ...]

    @classmethod
    def of(cls, pipe: Any, search: Search, *args: Any, reward_prompt: Any = None, **kwargs: Any) -> Job:
        """Bind a call's arguments as the pipeline itself would.

        Raises:
            TypeError: arguments that the pipeline's call does not take.
            ValueError: arguments that cannot be searched over; the message says what to do instead.
        """
        from visearch.pipelines.diffusion import DiffusionSampler

        signature = inspect.signature(type(pipe).__call__)
        bound = signature.bind(pipe, *args, **kwargs).arguments
        bound.pop(next(iter(signature.parameters)))
        given = {**bound.pop("kwargs", {}), **bound}
        if given.get("latents") is not None:
            raise ValueError("latents= fixes the noise that the search explores; leave it out and pass generator=")
        generator = given.pop("generator", None)
        given.pop("latents", None)
        number = [given.pop(n, None) for n in _NUMBERS]
        winners = next((n for n in number if n is not None), 1)
        if winners < 1:
            raise ValueError(f"num_images_per_prompt={winners} must be at least 1")
        overrides = {k: given.pop(k) for k in ("output_type", "return_dict") if k in given}
        prompts, per_prompt, call = _per_prompt(given)
        texts = _reward_prompts(prompts, reward_prompt)
        example = {"prompt": prompts[0], **{name: entries[0] for name, entries in per_prompt.items()}}
        sampler = DiffusionSampler(pipe, call, example=example)
        drawn = search.plan(sampler).decodes
        if drawn < winners:
            raise ValueError(f"{winners} images a prompt are asked for but the search finishes {drawn}; raise its n")
        generators, seed = _generators(generator, len(prompts), winners, single=drawn == 1, pipe=pipe)
        request = Request(prompts, seed=seed, per_prompt=per_prompt, reward_prompts=texts, generators=generators)
        return cls(sampler, request, winners, overrides, generators)

    def settle(self, result: SearchResult) -> None:
        """Leave each user generator where candidate 0 left its clone, as after a plain call."""
        if result.finished is None:
            return
        for row, candidate in enumerate(result.finished.candidate):
            generator = self.generators[int(result.finished.prompt[row])]
            if candidate == 0 and len(result.finished.lineage[row]) == 1 and generator is not None:
                generator.set_state(result.finished.rng[row].clone())

    def output(self, result: SearchResult) -> Any:
        """The pipeline's own output for the winners, decoded by the pipeline itself."""
        return self.sampler.output(result.winners(self.winners), **self.overrides)


class SearchPipeline:
    """Wrap a diffusers pipeline; the result is called as the pipeline itself and returns its output class.

    The returned object is an instance of a subclass of the pipeline's own class, with the same name, and shares its
    attributes: ``.to()``, LoRA, offload and saving work as before, on the same modules. Its output has one more
    attribute, ``.search`` (:class:`visearch.run.SearchResult`), and the object one more property, ``search_result``.

    With one candidate the output equals the plain pipeline's bit for bit. k images from one generator are drawn as k
    candidates, each with its own random stream, not as the plain pipeline's batch. One generator with several prompts
    serves each prompt's candidate 0 from the same state.

    Args:
        pipe: any diffusers pipeline whose call loops over ``scheduler.step``.
        reward: a name, a reward object, or a function ``(images, prompts) -> floats``.
        search: a name or a search; default best-of-8.
        budget: limits of one call; default none.
        held_out: rewards that only score the winners, beside the one that guides.
        rows, decode_rows: most rows for the model and the decoder at once; default as many as fit.

    Raises:
        ValueError: unknown reward or search.

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
    ) -> Any:
        pipe = getattr(type(pipe), "_visearch_pipe", pipe)
        kind, device = type(pipe), getattr(pipe, "_execution_device", "cpu")
        rewards = [resolve(r, device) for r in (reward, *held_out)]
        settings = _Settings(pipe, rewards[0], make_search(search), budget, rewards[1:], rows, decode_rows)

        @functools.wraps(kind.__call__)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            return settings.call(*args, **kwargs)

        members = {
            "__call__": __call__,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "_visearch_pipe": pipe,
            "search_result": property(lambda self: settings.result, doc="SearchResult of the latest call, or None."),
        }
        wrapped = object.__new__(type(kind.__name__, (kind,), members))
        object.__setattr__(wrapped, "__dict__", vars(pipe))
        return wrapped


@dataclass
class _Settings:
    """What a wrapped pipeline knows beyond the pipeline; kept out of its ``__dict__``, which the pipe shares."""

    pipe: Any
    reward: Reward
    search: Search
    budget: Budget | None
    held_out: list[Reward]
    rows: int | None
    decode_rows: int | None
    result: SearchResult | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        job = Job.of(self.pipe, self.search, *args, **kwargs)
        self.result = None
        for step in self._rounds(job):
            self.result = step.result
        result = self.result
        if result.error is not None and (result.finished is None or isinstance(result.error, KeyboardInterrupt)):
            raise result.error
        job.settle(result)
        if result.error is not None:
            result.error.add_note("the candidates finished before it are in .search_result of the pipeline")
            raise result.error
        output = job.output(result)
        self.result = result = replace(result, held_out=self._held_out(job, result))
        if not isinstance(output, tuple):
            output.search = result
        return output

    def _rounds(self, job: Job) -> Iterator[Round]:
        prompts = len(job.request.prompts)
        total = prompts * self.search.plan(job.sampler).nfe
        options = dict(getattr(self.pipe, "_progress_bar_config", {}))
        with tqdm(total=total, desc=type(self.search).__name__, unit="row", **options) as bar:
            yield from run_search(
                job.sampler,
                self.reward,
                self.search,
                job.request,
                self.budget,
                rows=self.rows,
                decode_rows=self.decode_rows,
                ledger=BarLedger(bar=bar),
            )

    def _held_out(self, job: Job, result: SearchResult) -> dict[str, list[float]]:
        winners = result.winners(job.winners)
        keys = list(zip(winners.prompt.tolist(), winners.id, strict=True))
        texts = [job.request.reward_prompts[p] for p, _ in keys]
        samples = torch.stack([result.samples[key] for key in keys]) if self.held_out else None
        return {r.name: MeteredReward(r, result.ledger)(samples, texts).tolist() for r in self.held_out}


@dataclass
class BarLedger(Ledger):
    """A ledger that moves a progress bar with every model call."""

    bar: Any = None

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        super().forward(rows, seconds, kind, images)
        self.bar.update(rows)


def _per_prompt(given: dict[str, Any]) -> tuple[tuple[str | None, ...], dict[str, tuple[Any, ...]], dict[str, Any]]:
    """Prompts, the arguments that hold one entry a prompt, and the rest."""
    prompt = given.pop("prompt", None)
    embeds = given.get("prompt_embeds")
    if prompt is None and embeds is None:
        raise ValueError("prompt is missing; give a text, a list of texts, or prompt_embeds")
    prompts = (None,) * len(embeds) if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt)
    for text in prompts:
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise ValueError(f"prompt={text!r} is empty; say what the image should show")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one text")
    per_prompt, call = {}, {}
    for name, value in given.items():
        if value is None:
            call[name] = value
        elif _TEXT.match(name):
            entries = (value,) * len(prompts) if isinstance(value, str) else tuple(value)
            per_prompt[name] = _entries(name, entries, len(prompts))
        elif _EMBEDDING.match(name) and torch.is_tensor(value):
            per_prompt[name] = _entries(name, tuple(value.split(1)), len(prompts))
        else:
            call[name] = value
    return prompts, per_prompt, call


def _entries(name: str, entries: tuple[Any, ...], prompts: int) -> tuple[Any, ...]:
    if len(entries) != prompts:
        raise ValueError(f"{name} has {len(entries)} entries for {prompts} prompts; give one, or one a prompt")
    return entries


def _reward_prompts(prompts: tuple[str | None, ...], given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is not None:
        texts = (given,) * len(prompts) if isinstance(given, str) else tuple(given)
        return _entries("reward_prompt", texts, len(prompts))
    if None in prompts:
        raise ValueError("prompt_embeds without prompt: the reward needs a text; pass reward_prompt= as well")
    return prompts


def _generators(
    generator: Any, prompts: int, winners: int, single: bool, pipe: Any
) -> tuple[tuple[torch.Generator | None, ...], int]:
    """One generator a prompt, and the seed from which the other candidates derive."""
    if generator is None:
        if single and prompts == 1:  # one plain sample: continue the global stream, as the plain call would
            device = torch.device(getattr(pipe, "_execution_device", "cpu"))
            own = torch.default_generator
            if device.type == "cuda":
                own = torch.cuda.default_generators[device.index or torch.cuda.current_device()]
            return (own,), own.initial_seed()
        return (None,) * prompts, int(torch.randint(2**62, ()))
    if isinstance(generator, torch.Generator):
        return (generator,) * prompts, _seed_of(generator)
    given = list(generator)
    if len(given) not in (prompts, prompts * winners):
        raise ValueError(
            f"generator has {len(given)} entries for {prompts} prompts x {winners} images; give one a prompt"
        )
    return tuple(given[:: len(given) // prompts]), _seed_of(given[0])


def _seed_of(generator: torch.Generator) -> int:
    """Two calls with one generator must explore different candidates, so its position counts, not its first seed."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    if torch.equal(fresh.get_state(), generator.get_state()):
        return generator.initial_seed()
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return int(torch.randint(2**62, (), generator=clone, device=generator.device))
