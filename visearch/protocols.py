"""The contracts between generators, rewards and searches.

A :class:`Sampler` carries a :class:`Population` of candidates from stage 0 to its last stage; a :class:`Reward`
scores what they look like; a :class:`Search` decides who advances. Each knows the others only through this module.

Shapes: B = rows of a population, P = prompts of a request, N = samples given to a reward.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Batch",
    "Budgeted",
    "Ensemble",
    "EtaStep",
    "Event",
    "FullRenoise",
    "Meter",
    "Ode",
    "Population",
    "Registry",
    "Request",
    "Reward",
    "RewardError",
    "RowState",
    "RowsInPopulation",
    "Sampler",
    "Scores",
    "Sde",
    "Search",
    "SearchState",
    "Seed",
    "Transition",
    "leaves",
    "stable_hash",
    "transition",
]


def stable_hash(*parts: object) -> int:
    """63-bit hash of its parts, the same in every process and version: the source of all derived seeds.

    torch's generator on a CPU begins from the low 32 bits of a seed, so there any two seeds that agree in them give one
    stream, a user's own seeds included. Of n derived seeds two do with probability n^2 / 2^33: 1e-7 for the 32
    candidates of a prompt, 1e-4 for 1000, one half for 77000. Such rows keep ids of their own; one is a wasted sample.
    """
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --- requests and seeds ---------------------------------------------------------------------------------------


class Seed(NamedTuple):
    """Which candidate of which prompt, and the seed of its random stream."""

    prompt: int
    candidate: int
    value: int


@dataclass(frozen=True)
class Request:
    """What the user asked for: P prompts and the arguments of one call of the generator.

    Args:
        prompts: what the generator reads, one entry a prompt; ``None`` where the call passes embeddings.
        seed: seed of candidate 0; candidate k > 0 of a prompt uses ``stable_hash(seed, prompt id, k)``.
        call: remaining keyword arguments of the generator's call, the same for all prompts.
        per_prompt: keyword arguments that hold one entry a prompt (negative prompts, embeddings), length P each.
        reward_prompts: what the reward reads; default ``prompts``.
        metadata: one mapping a prompt for rewards that need it (GenEval's lines), or ``None``.
        generators: the user's own generators, j a prompt, prompt by prompt (mostly j = 1), kept as clones: candidates
            0..j-1 start where they stand now, whatever they draw later.
        prompt_ids: fixed before any sharding; default ``stable_hash(text, occurrence)`` within this request.
        prompt_seeds: one a prompt, instead of ``seed``; see :func:`visearch.prompts.seed_of`.
        rewrite: called with a prompt and k, gives the text that candidate k > 0 is generated from; the reward still
            reads the original, and candidate 0 always follows the prompt as it is. Asked once for each candidate.
        rewritten: what it gave so far, by prompt and candidate.

    Raises:
        ValueError: no prompt, a per-prompt sequence whose length is not P, or generators that are not j a prompt.
    """

    prompts: tuple[str | None, ...]
    seed: int = 0
    call: Mapping[str, Any] = field(default_factory=dict)
    per_prompt: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    reward_prompts: tuple[str, ...] = ()
    metadata: tuple[Mapping[str, Any] | None, ...] = ()
    generators: tuple[torch.Generator | None, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    prompt_seeds: tuple[int, ...] = ()
    rewrite: Callable[[str, int], str] | None = None
    rewritten: dict[tuple[int, int], str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        count = len(self.prompts)
        if count == 0:
            raise ValueError("prompts is empty; give at least one prompt")
        texts = self.reward_prompts or tuple(p or "" for p in self.prompts)
        seen: dict[str, int] = {}
        ids = []
        for text in texts:
            seen[text] = seen.get(text, -1) + 1
            ids.append(stable_hash(text, seen[text]))
        object.__setattr__(self, "reward_prompts", texts)
        object.__setattr__(self, "metadata", self.metadata or (None,) * count)
        clones = tuple(g if g is None else _clone(g) for g in self.generators)
        object.__setattr__(self, "generators", clones or (None,) * count)
        object.__setattr__(self, "prompt_ids", self.prompt_ids or tuple(ids))
        if len(self.generators) % count:
            raise ValueError(f"generators has {len(self.generators)} entries for {count} prompts; give j a prompt")
        own = ("reward_prompts", "metadata", "prompt_ids")
        sized = [(name, getattr(self, name)) for name in own] + list(self.per_prompt.items())
        if self.prompt_seeds:
            sized.append(("prompt_seeds", self.prompt_seeds))
        for name, values in sized:
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give one a prompt")

    def seeds(self, start: int, stop: int, prompts: Iterable[int] | None = None) -> list[Seed]:
        """Candidates start..stop-1 of each prompt, prompt by prompt."""
        chosen = range(len(self.prompts)) if prompts is None else prompts
        return [Seed(p, k, self.seed_of(p, k)) for p in chosen for k in range(start, stop)]

    def seed_of(self, prompt: int, candidate: int) -> int:
        own = self._given(prompt, candidate)
        if own is not None:
            return own.initial_seed()
        return self.derive(prompt, candidate) if candidate > 0 else self._seed(prompt)

    def derive(self, prompt: int, *what: object) -> int:
        """Seed of a draw that belongs to the search, not to a candidate: a stream of its own for each ``what``."""
        return stable_hash(self._seed(prompt), self.prompt_ids[prompt], *what)

    def _seed(self, prompt: int) -> int:
        return self.prompt_seeds[prompt] if self.prompt_seeds else self.seed

    def text(self, prompt: int, candidate: int) -> str | None:
        """What the generator reads for a candidate.

        Raises:
            ValueError: ``rewrite`` gave something else than a text, or an empty one.
        """
        own = self.prompts[prompt]
        if self.rewrite is None or candidate == 0 or own is None:
            return own
        if (prompt, candidate) not in self.rewritten:
            text = self.rewrite(own, candidate)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"rewrite gave {text!r} for candidate {candidate} of {own!r}; return a non-empty text")
            self.rewritten[prompt, candidate] = text
        return self.rewritten[prompt, candidate]

    def generator(self, seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
        """The candidate's own random stream, at its beginning.

        Candidate 0 continues the user's generator where it stands (and on its device), without advancing it; so do
        further ones that were given generators.
        """
        own = self._given(seed.prompt, seed.candidate)
        return torch.Generator(device).manual_seed(seed.value) if own is None else _clone(own)

    def _given(self, prompt: int, candidate: int) -> torch.Generator | None:
        each = len(self.generators) // len(self.prompts)
        return self.generators[prompt * each + candidate] if candidate < each else None


def _clone(generator: torch.Generator) -> torch.Generator:
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone


# --- populations ----------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One operation in the life of a row; the chain of them regenerates it.

    ``op`` is ``"init"``, ``"fork"``, ``"perturb"``, ``"renoise"`` or ``"noise"``; ``seed`` began a random stream here,
    but for ``"noise"``, which keeps the stream and whose seed only tells rows apart; ``value`` is the candidate number,
    the copy number, the strength, the stage re-noised to, or 0.
    """

    op: str
    stage: int
    seed: int
    value: float = 0.0


class Batch(NamedTuple):
    """One model run that carried a row: from stage to stage, at ``position`` among ``rows`` rows.

    Kernels may depend on the size of a batch, so this is what a row needs, beside its lineage, to be repeated exactly.
    ``prompts`` holds the prompts of all its rows in order, as (prompt, how many rows in a row).
    """

    start: int
    stop: int
    rows: int
    position: int
    prompts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RowState:
    """A sampler's own tensors: each names the axis along which its rows lie, or ``None`` where all rows share it.

    Args:
        tensors: flat name -> tensor.
        axes: name -> row axis, or ``None`` for shared.
        fields: JSON-able values that all rows share (step counters, flags).
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    axes: Mapping[str, int | None] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def select(self, index: Tensor) -> RowState:
        rows = next((t.shape[self.axes[n]] for n, t in self.tensors.items() if self.axes[n] is not None), None)
        if index.tolist() == list(range(rows or 0)):
            return self  # gathering would lose memory formats, and with them the last bit of convolutions
        picked = {
            name: t if self.axes[name] is None else t.index_select(self.axes[name], index.to(t.device))
            for name, t in self.tensors.items()
        }
        return replace(self, tensors=picked)

    @staticmethod
    def concat(states: Sequence[RowState]) -> RowState:
        first = states[0]
        for other in states[1:]:
            if other.axes != first.axes or other.fields != first.fields:
                raise ValueError("rows with different sampler states cannot share a population; advance them apart")
        joined = {
            name: t if first.axes[name] is None else torch.cat([s.tensors[name] for s in states], first.axes[name])
            for name, t in first.tensors.items()
        }
        return replace(first, tensors=joined)

    def update(self, **tensors: Tensor) -> RowState:
        """The same state with some tensors replaced; their row axes stay."""
        return replace(self, tensors={**self.tensors, **tensors})

    def snapshot(self) -> RowState:
        return replace(self, tensors={name: t.clone() for name, t in self.tensors.items()})


@dataclass(frozen=True)
class Population:
    """B candidates at one stage. Searches treat it as immutable; only samplers look into ``state``.

    Args:
        stage: completed stages, the same for all rows.
        prompt: (B,) int64, index into the request's prompts.
        lineage: per row, the operations that made it; the first is its ``init``.
        rng: per row, the state of its random stream, (S,) uint8.
        state: the sampler's tensors.
        parent: (B,) int64, row of the population this one was gathered from; -1 for new rows.
        score: (B,) float32, the latest score; NaN while unscored.
        log_weight: (B,) float32.
        history: per row, the (stage, score) pairs seen so far along its lineage.
        rng_device: device of the random streams.
        components: what the members of an ensemble of rewards gave in the latest score, higher is better: name -> (B,)
            float32, NaN for a row that was not scored by it.
        batches: per row, the batches that it was carried in along its lineage.
        noise: per row, the initial noise that :meth:`Sampler.set_noise` gave it, or ``None``.
    """

    stage: int
    prompt: Tensor
    lineage: tuple[tuple[Event, ...], ...]
    rng: tuple[Tensor, ...]
    state: RowState
    parent: Tensor = None  # type: ignore[assignment]
    score: Tensor = None  # type: ignore[assignment]
    log_weight: Tensor = None  # type: ignore[assignment]
    history: tuple[tuple[tuple[int, float], ...], ...] = ()
    rng_device: str = "cpu"
    batches: tuple[tuple[Batch, ...], ...] = ()
    noise: tuple[Tensor | None, ...] = ()
    components: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.lineage)
        defaults = {
            "parent": lambda: torch.full((rows,), -1, dtype=torch.int64),
            "score": lambda: torch.full((rows,), math.nan),
            "log_weight": lambda: torch.zeros(rows),
        }
        for name, make in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, make())
        for name in ("history", "batches"):
            if not getattr(self, name):
                object.__setattr__(self, name, ((),) * rows)
        if not self.noise:
            object.__setattr__(self, "noise", (None,) * rows)

    def __len__(self) -> int:
        return len(self.lineage)

    @property
    def candidate(self) -> tuple[int, ...]:
        """Per row, the number k of the candidate it descends from."""
        return tuple(int(events[0].value) for events in self.lineage)

    @property
    def seed(self) -> tuple[int, ...]:
        """Per row, the seed of the stream it consumes now."""
        return tuple(next(e.seed for e in reversed(events) if e.op != "noise") for events in self.lineage)

    @property
    def id(self) -> tuple[str, ...]:
        """Per row, a name that is unique in its prompt: ``"3"``, a copy ``"3/fork@12.1"``."""
        return tuple(lineage_id(events) for events in self.lineage)

    def order_key(self, row: int) -> tuple:
        """Ties between scores are broken by this key, never by position."""
        events = self.lineage[row]
        return (int(self.prompt[row]), *((e.value, e.stage, e.seed, e.op) for e in events))

    def scored(self, score: Tensor, components: Mapping[str, Tensor] | None = None) -> Population:
        """The same rows with a new score, (B,), appended to their history, and what it was made of."""
        values = score.detach().to("cpu", torch.float32)
        pairs = zip(self.history, values.tolist(), strict=True)
        history = tuple((*h, (self.stage, v)) for h, v in pairs)
        return replace(self, score=values, history=history, components=components or {})

    def rescored(self, score: Tensor) -> Population:
        """The same rows with another score, (B,), in the place of the latest one."""
        return replace(self, history=tuple(h[:-1] for h in self.history)).scored(score, self.components)

    def carried(self, start: int) -> Population:
        """The same rows with a note in ``batches``: all of them came here from stage ``start`` in one model run."""
        prompts = tuple((p, len(list(same))) for p, same in groupby(self.prompt.tolist()))
        notes = (Batch(start, self.stage, len(self), row, prompts) for row in range(len(self)))
        return replace(self, batches=tuple((*old, new) for old, new in zip(self.batches, notes, strict=True)))

    def select(self, index: Sequence[int] | Tensor) -> Population:
        """Gather rows, with repeats allowed: the one place where copies get a random stream of their own.

        The first copy of a row keeps its stream; copy c > 0 is re-keyed by a hash of its seed, lineage, stage and c.
        """
        rows = [int(i) for i in index]
        if not rows:
            raise ValueError("select needs at least one row")
        if rows == list(range(len(self))):
            return self
        picked = torch.tensor(rows, dtype=torch.int64)
        copies: dict[int, int] = {}
        lineage, rng = [], []
        for row in rows:
            copy = copies[row] = copies.get(row, -1) + 1
            events, stream = self.lineage[row], self.rng[row]
            if copy:
                seed = stable_hash("fork", *events, self.stage, copy)
                events = (*events, Event("fork", self.stage, seed, copy))
                stream = torch.Generator(self.rng_device).manual_seed(seed).get_state()
            lineage.append(events)
            rng.append(stream)
        return replace(
            self,
            prompt=self.prompt[picked],
            lineage=tuple(lineage),
            rng=tuple(rng),
            state=self.state.select(picked),
            parent=picked,
            score=self.score[picked],
            log_weight=self.log_weight[picked],
            history=tuple(self.history[r] for r in rows),
            batches=tuple(self.batches[r] for r in rows),
            noise=tuple(self.noise[r] for r in rows),
            components={name: values[picked] for name, values in self.components.items()},
        )

    @staticmethod
    def concat(populations: Sequence[Population]) -> Population:
        """Join populations of one stage, rows in order."""
        parts = [p for p in populations if len(p)]
        if len(parts) == 1:
            return parts[0]
        stages = {p.stage for p in parts}
        if len(stages) != 1:
            raise ValueError(f"rows at stages {sorted(stages)} cannot share a population; advance them to one stage")
        names = dict.fromkeys(name for p in parts for name in p.components)
        unknown = [torch.full((len(p),), math.nan) for p in parts]
        return replace(
            parts[0],
            prompt=torch.cat([p.prompt for p in parts]),
            lineage=sum((p.lineage for p in parts), ()),
            rng=sum((p.rng for p in parts), ()),
            state=RowState.concat([p.state for p in parts]),
            parent=torch.cat([p.parent for p in parts]),
            score=torch.cat([p.score for p in parts]),
            log_weight=torch.cat([p.log_weight for p in parts]),
            history=sum((p.history for p in parts), ()),
            batches=sum((p.batches for p in parts), ()),
            noise=sum((p.noise for p in parts), ()),
            components={
                name: torch.cat([p.components.get(name, u) for p, u in zip(parts, unknown, strict=True)])
                for name in names
            },
        )

    def generators(self) -> list[torch.Generator]:
        """One generator a row, standing where the row's stream stands."""
        made = []
        for state in self.rng:
            generator = torch.Generator(self.rng_device)
            generator.set_state(state.clone())  # torch crashes on a view that does not begin its storage
            made.append(generator)
        return made

    def begun_from(self, noise: Tensor, seeds: Sequence[int], state: RowState) -> Population:
        """Rows at stage 0 that begin from ``noise``, (B, ...), with the state that a sampler made of it.

        Raises:
            ValueError: not at stage 0, or not one noise and one seed a row.
        """
        if self.stage != 0:
            raise ValueError(f"rows are at stage {self.stage}; initial noise can be set at stage 0 only")
        if len(noise) != len(self) or len(seeds) != len(self):
            raise ValueError(f"{len(noise)} noises and {len(seeds)} seeds for {len(self)} rows; give one a row")
        earlier = [tuple(e for e in events if e.op != "noise") for events in self.lineage]
        lineage = tuple((*old, Event("noise", 0, int(s))) for old, s in zip(earlier, seeds, strict=True))
        return replace(self, state=state, lineage=lineage, noise=tuple(noise.clone().unbind()))

    def snapshot(self) -> Population:
        """A copy that survives ``advance``, which may reuse its input's memory."""
        return replace(self, state=self.state.snapshot())

    def to(self, device: torch.device | str) -> Population:
        """The same rows with the sampler's tensors on a device, but for states of random streams (bytes).

        Tensors without content, with which a rehearsal counts memory, stay where they are.
        """
        tensors = self.state.tensors.items()
        moved = {k: t if t.is_meta or t.dtype == torch.uint8 else t.to(device) for k, t in tensors}
        return replace(self, state=self.state.update(**moved))

    def save(self, folder: str | Path, name: str = "population") -> None:
        """Write ``<name>.safetensors`` and ``<name>.json``, each atomically.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"state.{k}": t for k, t in self.state.tensors.items()}
        tensors |= {k: getattr(self, k) for k in ("prompt", "parent", "score", "log_weight")}
        tensors |= {f"component.{name}": values for name, values in self.components.items()}
        tensors |= {f"rng.{i}": s for i, s in enumerate(self.rng)}
        tensors |= {f"noise.{i}": n for i, n in enumerate(self.noise) if n is not None}
        meta = {
            "stage": self.stage,
            "axes": dict(self.state.axes),
            "fields": dict(self.state.fields),
            "lineage": [[list(e) for e in events] for events in self.lineage],
            "history": self.history,
            "rng_device": self.rng_device,
            "batches": self.batches,
        }
        tensors = {k: t.detach().contiguous().clone() for k, t in tensors.items()}
        try:
            save_file(tensors, folder / f"{name}.part.safetensors")
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"could not write {folder / name}.safetensors: {error}") from error
        (folder / f"{name}.part.json").write_text(json.dumps(meta))
        for kind in ("safetensors", "json"):
            (folder / f"{name}.part.{kind}").replace(folder / f"{name}.{kind}")

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", name: str = "population") -> Population:
        """Read what :meth:`save` wrote; the sampler's tensors go to ``device``."""
        from safetensors.torch import load_file

        folder = Path(folder)
        meta = json.loads((folder / f"{name}.json").read_text())
        tensors = load_file(folder / f"{name}.safetensors")
        state = {k.removeprefix("state."): t.to(device) for k, t in tensors.items() if k.startswith("state.")}
        return cls(
            stage=meta["stage"],
            prompt=tensors["prompt"],
            lineage=tuple(tuple(Event(*e) for e in events) for events in meta["lineage"]),
            rng=tuple(tensors[f"rng.{i}"] for i in range(len(meta["lineage"]))),
            state=RowState(state, meta["axes"], meta["fields"]),
            parent=tensors["parent"],
            score=tensors["score"],
            log_weight=tensors["log_weight"],
            history=tuple(tuple((int(s), float(v)) for s, v in h) for h in meta["history"]),
            rng_device=meta["rng_device"],
            batches=tuple(tuple(_batch(b) for b in made) for made in meta["batches"]),
            noise=tuple(tensors.get(f"noise.{i}") for i in range(len(meta["lineage"]))),
            components={k.removeprefix("component."): t for k, t in tensors.items() if k.startswith("component.")},
        )


def _batch(saved: Sequence[Any]) -> Batch:
    *numbers, prompts = saved
    return Batch(*numbers, tuple((p, count) for p, count in prompts))


def lineage_id(events: Sequence[Event]) -> str:
    parts = [str(int(events[0].value))]
    for e in events[1:]:
        parts.append(f"{e.op}@{e.stage}." + (str(int(e.value)) if e.op == "fork" else f"{e.seed:x}"))
    return "/".join(parts)


# --- transitions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ode:
    """The sampler's own step, as its scheduler takes it."""


@dataclass(frozen=True)
class Sde:
    """Marginal-preserving stochastic step of Flow-GRPO (2505.05470), ``g = a sqrt(t / (1 - t))``; a >= 0, 0 is the ODE.

    Raises:
        ValueError: ``a`` is negative or not finite.
    """

    a: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise ValueError(f"a={self.a} of an Sde step must be a number of at least 0; 0 is the ODE, 0.7 the default")


@dataclass(frozen=True)
class EtaStep:
    """``x_s = alpha_s x0 + sqrt(sigma_s^2 - k^2) eps + k z``, ``k = eta sigma_s sqrt(1 - r^2)`` (DDIM, 2010.02502).

    Args:
        eta: in [0, 1]: 0 is the ODE, 1 the DDPM posterior.
        first: eta of the first call. From pure noise r is 0, and any eta near 1 would discard the initial noise, and
            with it what tells candidates apart: so 0 unless said otherwise.

    Raises:
        ValueError: either lies outside [0, 1].
    """

    eta: float = 1.0
    first: float = 0.0

    def __post_init__(self) -> None:
        for name in ("eta", "first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} of an EtaStep must lie in [0, 1]; 0 is the ODE, 1 DDPM")

    def at(self, stage: int) -> float:
        """eta of the call that begins at ``stage``."""
        return self.eta if stage else self.first


@dataclass(frozen=True)
class FullRenoise:
    """``x_s = alpha_s x0 + sigma_s z``: all noise is drawn anew, as diffusers' ``stochastic_sampling`` does.

    For consistency models. With other models it loses variance, since their x0 estimate is a mean: a third of the
    standard deviation of a known target at 28 steps.
    """


Transition = Ode | Sde | EtaStep | FullRenoise

TRANSITIONS: dict[str, Callable[..., Transition]] = {
    "ode": Ode,
    "sde": Sde,
    "eta": EtaStep,
    "ddpm": lambda: EtaStep(1.0, first=1.0),
    "renoise": FullRenoise,
}


def transition(given: str | Transition) -> Transition:
    """A transition by name: ``"ode"``, ``"sde:0.7"``, ``"eta:0.5"``, ``"ddpm"``, ``"renoise"``; others pass.

    ``"ddpm"`` is eta 1 from the first call on, as DDIM schedulers take it; ``"eta:1"`` keeps the initial noise.

    Raises:
        ValueError: an unknown name, or a number that the transition does not take.
    """
    if isinstance(given, Transition):
        return given
    name, colon, value = str(given).partition(":")
    if name not in TRANSITIONS or (colon and name not in ("sde", "eta")):
        raise ValueError(f"transition {given!r} is unknown; use ode, sde[:a], eta[:eta], ddpm or renoise")
    try:
        number = [float(value)] if colon else []
    except ValueError:
        raise ValueError(f"transition {given!r}: {value!r} is no number; write it as {name}:0.5") from None
    return TRANSITIONS[name](*number)


# --- samplers -------------------------------------------------------------------------------------------------


class Meter(Protocol):
    """Told by the sampler itself about every piece of real work, where it happens."""

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        """A real model call on ``rows`` rows, both CFG branches counted; never a stubbed or cached one.

        ``images`` is the share of one whole plain generation that this call did, summed over its rows.
        """

    def decode(self, rows: int, seconds: float) -> None: ...

    def preview(self, rows: int, seconds: float, decoder: str) -> None:
        """Rows whose preview a cheaper decoder made, by its name; they are no decodes."""

    def encode(self, rows: int, seconds: float) -> None: ...

    def skipped(self, rows: int) -> None:
        """Model calls that a step cache saved."""


class NullMeter:
    """Counts nothing: what a sampler holds until a driver gives it a ledger."""

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None: ...

    def decode(self, rows: int, seconds: float) -> None: ...

    def preview(self, rows: int, seconds: float, decoder: str) -> None: ...

    def encode(self, rows: int, seconds: float) -> None: ...

    def skipped(self, rows: int) -> None: ...


@runtime_checkable
class Sampler(Protocol):
    """A generator that can stop, resume, drop, copy and re-noise candidates.

    The docstring of each implementation says what one stage is: a scheduler step, a scale, a commit of masked
    tokens, or an inner step of a video chunk, counted flat. A row's result depends on its prompt and lineage alone,
    never on its companions: bitwise for equal batch shapes, within 1e-4 in fp32 on CPU across batch shapes.

    A model that also answers questions about its images has one more method, ``ask(population, questions)`` ->
    (B, Q) logits of "yes"; a search that needs it refuses samplers without it. One whose every step draws from the
    row's stream anyway (tokens) says so by an attribute ``stochastic = True``: its copies diverge without a view. One
    that learns in a run (how to decode previews) keeps that, JSON-able, in an attribute ``learned``, which the driver
    saves with each round, and sets when a run begins: to ``None``, or to what an interrupted one had learned.

    Attributes:
        num_stages: T; stage 0 is noise, stage T the result.
        milestones: stages at which a search may stop, ascending, the last is T.
        meter: told about every real model call, decode and encode.
    """

    num_stages: int
    milestones: tuple[int, ...]
    meter: Meter

    def noise_level(self, stage: int) -> float:
        """log-SNR of the state at ``stage`` (tokens: log-odds of the fraction revealed); +inf when clean."""

    def nfe(self, start: int, stop: int) -> int:
        """Model rows that one candidate costs from stage ``start`` to ``stop``, both CFG branches counted."""

    def cost(self, start: int, stop: int) -> float:
        """The same in image-equivalents: 1 is one whole plain generation, weighted by FLOPs where forwards differ."""

    def init(self, request: Request, seeds: Sequence[Seed]) -> Population:
        """Rows at stage 0, one a seed, in order."""

    def advance(self, population: Population, to: int) -> Population:
        """Carry all rows to stage ``to``; may reuse the memory of ``population``."""

    def predict_x0(self, population: Population) -> Population:
        """The rows as they would be if finished now: a population at stage T to be decoded. Stage 0 has none."""

    def check_moves(self, stage: int) -> None:
        """Raise what moving rows to ``stage``, or at it, would raise whatever they are; before any compute.

        Raises:
            ValueError: the sampler cannot do it.
        """

    def renoise(self, population: Population, to_stage: int, seeds: Sequence[int]) -> Population:
        """Back to an earlier stage at exactly its noise level, with fresh noise from ``seeds`` (B,)."""

    def perturb(self, population: Population, strength: float, seeds: Sequence[int]) -> Population:
        """Stay at the stage and move: x -> sqrt(1 - b^2) x + b eps, or its like for tokens; 0 is a no-op."""

    def noise(self, population: Population) -> Tensor:
        """(B, ...) the Gaussian noise that rows at stage 0 begin from; of tokens, what stands behind all their draws.

        Raises:
            ValueError: not at stage 0, or noise that is not known.
        """

    def set_noise(self, population: Population, noise: Tensor, seeds: Sequence[int]) -> Population:
        """The same rows beginning from other noise of that shape; each keeps its random stream.

        ``seeds`` (B,) name the draws, so that rows which differ in their noise alone have ids of their own.
        """

    def select(self, population: Population, index: Sequence[int]) -> Population:
        """Gather rows, repeats allowed; see :meth:`Population.select` for the streams of copies."""

    def concat(self, populations: Sequence[Population]) -> Population:
        """Join populations of one stage."""

    def decode(self, population: Population) -> Any:
        """Samples of rows at stage T, in order: images (B, 3, H, W) or videos (B, F, 3, H, W), float in [0, 1]."""

    def view(
        self, transition: Transition | None = None, cache: Any | None = None, guidance: Any | None = None
    ) -> Sampler:
        """The same sampler with stochastic steps, a step cache, or other guidance.

        Raises:
            ValueError: the sampler has no such view; the message names those it has.
        """


class RowsInPopulation:
    """``select`` and ``concat`` of a sampler that keeps nothing of its rows outside of their population."""

    def select(self, population: Population, index: Sequence[int]) -> Population:
        """Gather rows, repeats allowed; see :meth:`Population.select`."""
        return population.select(index)

    def concat(self, populations: Sequence[Population]) -> Population:
        """Join populations of one stage."""
        return Population.concat(populations)


# --- rewards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What a reward returns: ``values`` (N,) float32 on CPU, in input order; a failed sample is NaN, with a reason.

    ``components`` are parts of the values by name, (N,) each; ``cached`` of the N samples were found in a cache.
    """

    values: Tensor
    components: Mapping[str, Tensor] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    cached: int = 0


@runtime_checkable
class Reward(Protocol):
    """Scores samples against prompts on its raw published scale, batched, order kept, independent of companions.

    Attributes:
        name: how tables call it.
        higher_is_better: direction; the driver flips the sign of rewards where lower is better.
        range: (low, high) of the published scale.
        licence: of code and weights.
        source: hub id, folder or paper.
        needs: subset of {"pixels", "tokens", "noise_level", "metadata", "stage_text"}.

    Read where a reward has them: ``family`` (a judge of the guide's is refused), ``not_held_out_for`` (benchmarks that
    it was made for), ``checker = True`` (its verdicts are right or wrong: reports tell the oracle), ``note``,
    ``image_features``, ``config_hash`` (of weights and options), ``uncached`` (the reward behind a cache),
    ``scored_by`` (the reward of what a sample is made of, as of the frames of a video), and ``resident()``, a block
    within which its model stays on its device.
    """

    name: str
    higher_is_better: bool
    range: tuple[float, float]
    licence: str
    source: str
    needs: frozenset[str]

    def score(
        self,
        samples: Any,
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        """Score N samples: images (N, 3, H, W) or videos (N, F, 3, H, W) in [0, 1], or N PIL images."""


class RewardError(RuntimeError):
    """The reward broke its contract; what was finished before is kept."""


@runtime_checkable
class Ensemble(Reward, Protocol):
    """A reward made of others, which the driver asks one by one.

    Attributes:
        members: none of them relative.
        relative: whether a score depends on the other candidates of its prompt.
    """

    members: Sequence[Reward]
    relative: bool

    def combine(self, components: Mapping[str, Tensor], groups: Sequence[Hashable]) -> Tensor:
        """(N,) scores of N samples, -inf where one failed.

        Args:
            components: member -> (N,) its scores, higher is better, -inf where it failed.
            groups: N labels; equal ones are candidates of one prompt.
        """


def leaves(reward: Reward) -> tuple[Reward, ...]:
    """The reward itself, or of an ensemble its members, and theirs."""
    if not isinstance(reward, Ensemble):
        return (reward,)
    return tuple(leaf for member in reward.members for leaf in leaves(member))


def identity(reward: Reward) -> str:
    """What tells rewards of other weights or options apart: ``config_hash``, or the name where a reward has none."""
    found = getattr(reward, "config_hash", None)
    if found is None and isinstance(reward, Ensemble):
        return f"{reward.name}: {', '.join(map(identity, reward.members))}"
    return found or reward.name


# --- searches -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchState:
    """What a search carries between rounds: populations, tensors, scalars and containers of them, nothing else.

    Args:
        request: what is being generated.
        finished: scored rows at stage T, or ``None`` before the first.
        live: rows under way, or ``None``.
        open_prompts: prompts that still want candidates; the driver closes those that reached the target.
        round: completed rounds.
        room: whole candidates a prompt that the driver can still pay for, fractions counted; ``None`` is no limit.
            Below 1, a search with rows under way and nothing finished finishes the best of them.
        cut: whether a search with rows under way dropped some, or began with fewer, because of ``room``.
        price: model rows that one decode and score cost, as the driver measured it once; ``None`` before.
        pruned: rows that were dropped before the end: prompt, id, candidate, seed, stage where it was left, and
            the score of its preview there (``None`` if it had none).
        notes: what the user should know about this run before it begins; the driver warns.
    """

    request: Request
    finished: Population | None = None
    live: Population | None = None
    open_prompts: tuple[int, ...] = ()
    round: int = 0
    room: float | None = None
    cut: bool = False
    price: float | None = None
    pruned: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


class Budgeted(NamedTuple):
    """A search cut to fit a budget, and what it will cost for one prompt: exact, or (low, high) for seconds.

    ``finals`` is how many candidates reach the last stage. Where what is dropped depends on the scores, ``exact`` is
    False and all numbers are upper bounds, but ``finals`` a lower one.
    """

    search: Search
    nfe: int
    images: float
    decodes: int
    rewards: int
    finals: int
    exact: bool = True


class Evaluate(Protocol):
    """How a search sees its rows."""

    def __call__(self, population: Population) -> Population:
        """The same rows with scores: of previews before the last stage."""

    def features(self, population: Population) -> Tensor:
        """(B, D) what the same decoded samples look like, to compare them by.

        Raises:
            ValueError: the run was given no features.
        """


class Search(Protocol):
    """A frozen dataclass of the paper's hyperparameters with pure ``init``, ``step`` and ``done``.

    One step is the method's own round. Searches never count, print, or loop over a budget; they hold metered
    proxies, so they could not cheat if they wanted to. One that shares its candidates over prompts has a class
    attribute ``across_prompts = True``: its plan is the mean of a prompt, and what a prompt gets hangs on the others.
    """

    def plan(self, sampler: Sampler, max_nfe: int | None = None) -> Budgeted:
        """The search that fits ``max_nfe`` model rows a prompt, and its exact cost.

        Raises:
            ValueError: not even one candidate fits.
        """

    def init(self, sampler: Sampler, request: Request) -> SearchState: ...

    def step(self, state: SearchState, sampler: Sampler, evaluate: Evaluate) -> SearchState:
        """One round. ``evaluate`` returns its rows with scores: of previews before stage T, of finals at T."""

    def done(self, state: SearchState) -> bool: ...


# --- registries -----------------------------------------------------------------------------------------------


class Registry(Mapping[str, str]):
    """Names to ``"module:attribute"``, imported when first asked for.

    Args:
        kind: what the entries are, for messages (``"search"``).
        entries: name -> ``"module:attribute"``.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, target: str) -> None:
        """Register one more; a name that is taken by something else is an error."""
        if self._entries.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is already {self._entries[name]}; choose another name")
        self._entries[name] = target

    def load(self, name: str) -> Any:
        """The registered object.

        Raises:
            ValueError: unknown name; near ones are suggested.
        """
        if name not in self._entries:
            near = get_close_matches(name, self._entries, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "known: " + ", ".join(self._entries)
            raise ValueError(f"unknown {self.kind} {name!r}; {hint}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
