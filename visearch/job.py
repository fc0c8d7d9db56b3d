"""One call of a diffusers pipeline, taken apart for a search: what belongs to each prompt, and the rest.

Shapes: P = prompts of the call, k = images it asks for a prompt.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from visearch.budget import Budget
from visearch.diversity import Keep
from visearch.pipelines import components
from visearch.protocols import NullMeter, Population, Request, Search
from visearch.run import SearchResult

if TYPE_CHECKING:
    from visearch.pipelines.diffusion import DiffusionSampler
    from visearch.pipelines.previews import PreviewDecoder

__all__ = ["Job", "Samplers"]

_TEXT = re.compile(r"(negative_)?prompt(_\d+)?$")
_EMBEDDING = re.compile(r"(negative_)?(pooled_)?prompt_\w*(embeds|mask)(_\w+)?$")
_MEDIA = re.compile(
    r"(negative_)?(image|mask|control|masked_image|last|last_image|reference|example|depth_map|audio|video|waveform)"
    r"s?(_(image|mask|video|latents|embeds))?$|initial_audio_waveforms$"
)
# their list of images belongs to one prompt: things to compose, or one image per kind of control
_REFERENCES = ("Flux2", "QwenImageEditPlus", "QwenImage21", "BriaFibo2", "GlmImage", "ZImageOmni", "VisualCloze")
_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class Job:
    """One call of a pipeline, as a search sees it.

    Attributes:
        sampler: drives the user's own pipeline.
        search: finishes at least as many candidates a prompt as the call asks for.
        request: prompts, seed and generators.
        winners: k, images or videos a prompt to return.
        overrides: arguments that matter for the final decode only (``output_type``, ``return_dict``).
        generators: the user's generators, as many a prompt as there are; :meth:`settle` moves them as a plain call.
        unsearched: one candidate an image, so there is nothing to choose.
    """

    sampler: DiffusionSampler
    search: Search
    request: Request
    winners: int
    overrides: Mapping[str, Any]
    generators: tuple[torch.Generator | None, ...]
    unsearched: bool = False

    @classmethod
    def of(
        cls,
        pipe: Any,
        search: Search,
        /,
        *args: Any,
        reward_prompt: str | Sequence[str] | None = None,
        budget: Budget | None = None,
        samplers: Samplers | None = None,
        rewrite: Callable[[str, int], str] | None = None,
        previews: PreviewDecoder | None = None,
        **kwargs: Any,
    ) -> Job:
        """Bind a call's arguments as the pipeline itself would.

        Args:
            pipe: the pipeline.
            search: widened if it draws fewer candidates than the call wants images.
            args: positional arguments of the pipeline's call.
            reward_prompt: what the reward reads, one text or one a prompt; default the prompts themselves.
            budget: tells searches that take their size from it how many candidates they have.
            samplers: reused from call to call.
            rewrite: the text for each candidate, as in :class:`visearch.protocols.Request`.
            previews: how the sampler decodes previews; default by the pipeline's own decoder.
            kwargs: keyword arguments of the pipeline's call.

        Raises:
            TypeError: arguments that the pipeline's call does not take.
            ValueError: arguments that cannot be searched over; the message says what to do instead.
        """
        from visearch.pipelines.prompts import COUNTS

        signature = inspect.signature(type(pipe).__call__)
        bound = signature.bind(pipe, *args, **kwargs).arguments
        bound.pop(next(iter(signature.parameters)))
        given = {**bound.pop("kwargs", {}), **bound}
        generator, latents = given.pop("generator", None), given.pop("latents", None)
        counts = {n: given.pop(n) for n in COUNTS if n in given}
        winners = next((n for n in counts.values() if n is not None), 1)
        if not isinstance(winners, int) or winners < 1:
            name = next(iter(counts))
            raise ValueError(f"{name}={winners!r} must be a whole number of at least 1")
        overrides = {k: given.pop(k) for k in ("output_type", "return_dict") if k in given}
        prompts, per_prompt, call = _split(pipe, given, takes_text="prompt" in signature.parameters)
        example = {"prompt": prompts[0], **{name: entries[0] for name, entries in per_prompt.items()}}
        sampler = (samplers or Samplers()).get(pipe, call, example, previews)
        unsearched = getattr(search, "n", None) == 1
        rows = None if budget is None else budget.rows_a_prompt(sampler, len(prompts))
        search, single = _wide(search, sampler, rows, winners)
        texts = _texts(prompts, reward_prompt, optional=single or "prompt" not in signature.parameters)
        if latents is not None:
            per_prompt["latents"] = _chunks("latents", latents, len(prompts))
        generators, seed = _generators(generator, len(prompts), winners, single and winners == 1, pipe)
        if rewrite is not None and not (callable(rewrite) and all(isinstance(p, str) for p in prompts)):
            raise ValueError("rewrite needs prompts that are texts, and is a function (prompt, candidate) -> text")
        request = Request(
            prompts, seed=seed, per_prompt=per_prompt, reward_prompts=texts, generators=generators, rewrite=rewrite
        )
        if unsearched and isinstance(generator, torch.Generator) and len(prompts) * winners > 1:
            starts = _in_turn(generator, len(prompts) * winners, sampler, request)
            request = replace(request, generators=starts)
            generators = (generator,) * len(starts)
        return cls(sampler, search, request, winners, overrides, generators, unsearched)

    def settle(self, result: SearchResult) -> None:
        """Leave each user generator where its own candidate left its clone, as after a plain call."""
        rows, each = result.finished, len(self.generators) // len(self.request.prompts)
        for row in range(0 if rows is None else len(rows)):  # of several that share one, the last counts
            candidate = rows.candidate[row]
            if candidate < each and len(rows.lineage[row]) == 1:
                generator = self.generators[int(rows.prompt[row]) * each + candidate]
                if generator is not None:
                    generator.set_state(rows.rng[row].clone())

    def chosen(
        self, result: SearchResult, diversity: Keep | None = None, features: Callable[[Any], Tensor] | None = None
    ) -> Population:
        """The winners, prompt by prompt, best first; in the order of a plain call where nothing was chosen.

        Args:
            result: of the search.
            diversity: how to choose several that are unlike each other by their ``features``; default the best.
        """
        if not self.unsearched and diversity is not None and self.winners > 1:
            return result.diverse(self.winners, features, diversity)
        rows = result.winners(self.winners)
        if not self.unsearched:
            return rows
        return rows.select(sorted(range(len(rows)), key=lambda r: (int(rows.prompt[r]), rows.candidate[r])))

    def output(self, winners: Population) -> Any:
        """The pipeline's own output for what :meth:`chosen` returned, decoded by the pipeline itself."""
        return self.sampler.output(winners, **self.overrides)


class Samplers:
    """Keeps the sampler of the latest call: its dry runs need not be repeated while nothing that shapes them changed.

    That is: the pipeline's components, their configurations, precision and devices; and the call's arguments, of which
    numbers and texts count by value, images, tensors and callbacks only by their kind and shape.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._sampler: DiffusionSampler | None = None

    def get(
        self, pipe: Any, call: dict[str, Any], example: dict[str, Any], previews: PreviewDecoder | None = None
    ) -> DiffusionSampler:
        """A sampler for such a call, a new one if need be."""
        from visearch.pipelines.diffusion import DiffusionSampler
        from visearch.pipelines.previews import PreviewDecoder

        shaped = {k: isinstance(v, str) if _TEXT.match(k) else _shape(v) for k, v in example.items()}
        key = _pipeline_key(pipe), _shape(call), tuple(sorted(shaped.items()))
        if self._sampler is None or self._key != key:
            self._key = self._sampler = None  # frees the old one before the dry runs of the new one
            self._sampler = DiffusionSampler(pipe, call, example=example)
            self._key = key
        self._sampler.call, self._sampler.previews = dict(call), previews or PreviewDecoder(pipe)
        return self._sampler


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal only for the very same object, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _pipeline_key(pipe: Any) -> tuple[Any, ...]:
    return (
        _Same(vars(pipe)),
        repr(sorted(pipe.config.items(), key=lambda item: item[0])),
        *((name, _Same(part), *_traits(part)) for name, part in sorted(components(pipe).items())),
    )


def _traits(part: Any) -> Iterator[Any]:
    """What may change in a component that stays the same object."""
    if isinstance(part, nn.Module):
        first = next(part.parameters(), None)
        yield from () if first is None else (first.dtype, first.device)
        yield getattr(part, "is_cache_enabled", False)
    if hasattr(part, "save_config"):  # diffusers' own; those of transformers are slow to print and change no shapes
        yield repr(getattr(part, "config", None))
    if hasattr(part, "set_timesteps"):
        yield getattr(part, "shift", None)


def _shape(value: Any) -> Any:
    """Equal for arguments that lead to the same loop."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), tuple(value.shape), str(value.dtype)
    if isinstance(value, Image):
        return Image, value.size, value.mode
    if isinstance(value, Mapping):
        return type(value), [(k, _shape(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [_shape(v) for v in value]
    return type(value) if callable(value) else _Same(value)


# --- arguments ------------------------------------------------------------------------------------------------


def _split(
    pipe: Any, given: dict[str, Any], takes_text: bool
) -> tuple[tuple[Any, ...], dict[str, tuple[Any, ...]], dict[str, Any]]:
    """Prompts, the arguments that hold one entry a prompt, and the rest."""
    prompt = given.pop("prompt", None)
    listed = isinstance(prompt, (list, tuple))
    if listed and not prompt:
        raise ValueError("prompt is an empty list; give at least one text")
    references = type(pipe).__name__.startswith(_REFERENCES) or any(
        type(part).__name__.startswith("Multi") or "Union" in type(part).__name__ for part in components(pipe).values()
    )
    counts = (_count(name, value, references) for name, value in given.items())
    count = len(prompt) if listed else 1 if prompt is not None else next((c for c in counts if c is not None), None)
    if count is None:
        if takes_text and all(isinstance(v, (*_PLAIN, list, tuple)) or callable(v) for v in given.values()):
            raise ValueError("prompt is missing; give a text, a list of texts, or prompt_embeds")
        count = 1
    prompts = tuple(prompt) if listed else (prompt,) * count
    per_prompt, call = {}, {}
    for name, value in given.items():
        entries = _entries(name, value, count, references)
        (call if entries is None else per_prompt)[name] = value if entries is None else entries
    return prompts, per_prompt, call


def _count(name: str, value: Any, references: bool) -> int | None:
    """Prompts that an argument stands for where no prompt is given."""
    if _TEXT.match(name) or name == "class_labels":
        return len(value) if isinstance(value, (list, tuple)) else None if value is None else 1
    if torch.is_tensor(value) and (_EMBEDDING.match(name) or _MEDIA.match(name)):
        return 1 if _row_axis(name) else len(value)
    if isinstance(value, (list, tuple)) and value:
        if _EMBEDDING.match(name) or (_is_media_list(name, value) and not references):
            return len(value)
        return 1 if _MEDIA.match(name) else None
    return 1 if isinstance(value, (Image, np.ndarray)) else None


def _entries(name: str, value: Any, prompts: int, references: bool) -> tuple[Any, ...] | None:
    """An argument's part for each prompt, or ``None`` where all prompts share it."""
    if value is None:
        return None
    listed = isinstance(value, (list, tuple))
    if _TEXT.match(name):
        return _checked(name, tuple(value) if listed else (value,) * prompts, prompts)
    if _EMBEDDING.match(name):
        if torch.is_tensor(value):
            axis = _row_axis(name)
            _checked(name, range(value.shape[axis]), prompts)
            return tuple(value.split(1, axis))
        return _checked(name, tuple([v] for v in value), prompts) if listed else None
    if prompts == 1:
        return None
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        whole = value.ndim > 1 and len(value) == prompts and _MEDIA.match(name)
        return tuple(value[i : i + 1] for i in range(prompts)) if whole else None
    if not listed or len(value) != prompts:
        return None
    if all(isinstance(v, str) for v in value):
        return None if name.startswith("callback") else tuple(value)
    if name == "class_labels":
        return tuple([v] for v in value)
    if references:  # a list of them for each prompt
        return tuple(value) if _MEDIA.match(name) and all(isinstance(v, (list, tuple)) for v in value) else None
    return tuple(value) if _is_media_list(name, value) else None


def _row_axis(name: str) -> int:
    """Axis of the prompts in embeddings; those of all layers of a language model are stacked in front of it."""
    return 1 if name.endswith("llama3") else 0


def _is_media_list(name: str, value: Sequence[Any]) -> bool:
    """Whether a list holds whole images or videos; a flat list of frames is one video."""
    parts = (list, tuple, torch.Tensor, np.ndarray) if "video" in name else (Image, torch.Tensor, np.ndarray)
    least = 4 if "video" in name else 2
    return bool(_MEDIA.match(name)) and all(isinstance(v, parts) and getattr(v, "ndim", 9) >= least for v in value)


def _checked(name: str, entries: Sequence[Any], prompts: int) -> tuple[Any, ...]:
    if len(entries) != prompts:
        raise ValueError(f"{name} has {len(entries)} entries for {prompts} prompts; give one, or one a prompt")
    return tuple(entries)


def _chunks(name: str, value: Any, prompts: int) -> tuple[Any, ...]:
    """As many rows for each prompt, prompt by prompt."""
    if not torch.is_tensor(value) or not value.ndim or not len(value) or len(value) % prompts:
        shape = f"shape {tuple(value.shape)}" if torch.is_tensor(value) else f"type {type(value).__name__}"
        raise ValueError(f"{name} is of {shape}; give a tensor with as many rows for each of the {prompts} prompts")
    return tuple(value.split(len(value) // prompts))


def _texts(prompts: Sequence[Any], given: str | Sequence[str] | None, optional: bool) -> tuple[str, ...]:
    """What the reward reads."""
    if given is not None:
        texts = (given,) * len(prompts) if isinstance(given, str) else tuple(given)
        return _checked("reward_prompt", texts, len(prompts))
    for text in () if optional else prompts:
        if text is None:
            raise ValueError("prompt_embeds without prompt: the reward needs a text; pass reward_prompt= as well")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt={text!r} is empty; say what the image should show, or pass reward_prompt=")
    return tuple(text if isinstance(text, str) else "" for text in prompts)


def _wide(search: Search, sampler: DiffusionSampler, rows: int | None, winners: int) -> tuple[Search, bool]:
    """The search with room for all winners, and whether it chooses nothing."""
    finals = search.plan(sampler, rows if getattr(search, "n", 1) is None else None).finals
    if finals < winners:
        if getattr(search, "n", None) != finals:
            raise ValueError(
                f"{winners} images a prompt are asked for but the search finishes {finals}; raise its n, or keep more"
            )
        search = replace(search, n=winners)
    return search, getattr(search, "n", None) == winners


def _generators(
    generator: Any, prompts: int, winners: int, single: bool, pipe: Any
) -> tuple[tuple[torch.Generator | None, ...], int]:
    """As many generators a prompt as were given, and the seed from which the other candidates derive."""
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
            f"generator has {len(given)} entries for {prompts} prompts x {winners} images; give one a prompt or image"
        )
    return tuple(given), _seed_of(given[0])


def _in_turn(
    generator: torch.Generator, rows: int, sampler: DiffusionSampler, request: Request
) -> tuple[torch.Generator, ...]:
    """Where each row's noise begins in the batch that a plain call draws from one generator, row after row."""
    sampler.meter = NullMeter()
    drawn = sampler.init(request, request.seeds(0, 1, [0])).state.tensors.get("noise")
    shape, dtype = ((16,), torch.float32) if drawn is None else (drawn.shape[1:], drawn.dtype)
    walking = torch.Generator(generator.device)
    walking.set_state(generator.get_state())
    starts = []
    for _ in range(rows):
        starts.append(torch.Generator(generator.device))
        starts[-1].set_state(walking.get_state())
        torch.randn(shape, generator=walking, device=generator.device, dtype=dtype)
    return tuple(starts)


def _seed_of(generator: torch.Generator) -> int:
    """Two calls with one generator must explore different candidates, so its position counts, not its first seed."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    if torch.equal(fresh.get_state(), generator.get_state()):
        return generator.initial_seed()
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return int(torch.randint(2**62, (), generator=clone, device=generator.device))
