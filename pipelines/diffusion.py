"""Any stock diffusers pipeline as a sampler, by replay (:mod:`visearch.pipelines.replay`)."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.schedulers import LMSDiscreteScheduler, PNDMScheduler
from torch import Tensor

from visearch.pipelines import flow
from visearch.pipelines.cache import HookCache, StepCache, computed, resolve
from visearch.pipelines.flow import Level
from visearch.pipelines.previews import PreviewDecoder
from visearch.pipelines.prompts import COUNTS
from visearch.pipelines.replay import Layout, NoBatch, Replay, Schedule, batch
from visearch.protocols import (
    Event,
    Meter,
    NullMeter,
    Ode,
    Population,
    Request,
    RowsInPopulation,
    RowState,
    Seed,
    Transition,
    stable_hash,
)

__all__ = ["DiffusionSampler"]

_RESERVED = {"prompt", "generator", "latents", "return_dict", *COUNTS}
_REFUSED_TYPE = re.compile(r"output[_ `]*types?\b", re.IGNORECASE)
_STREAMS = ("rng_start", "ambient")
_WHOLE = "out.0.sample"  # what a whole run gave, in place of what a step gave


class DiffusionSampler(RowsInPopulation):
    """Drives an unmodified diffusers pipeline: stop, drop, copy, re-noise and resume candidates at any stage.

    One stage is one step of the scheduler; schedulers of order 2 (Heun, KDPM2) take two model calls for it. Stage 0
    is the initial noise. Carried to the last stage alone, in any number of steps, a row equals the plain call with
    its generator bit for bit; in a batch of another size, up to what kernels differ between shapes.

    Rows of several prompts share a batch if their encoded prompts have the same shapes; each prompt is encoded alone
    and once a request. Where a self-check finds that the pipeline's rows would not leave each other alone, they run
    one by one; where its loop cannot be resumed, one stage is one whole run (:attr:`strategy`).

    State of a row: at stage 0 its ``noise``; later what ``scheduler.step`` returned (``out.*``), the clean estimate
    (``x0.*``) and the scheduler's history (``scheduler.*``); always ``rng_start``, the stream as the call begins.

    Args:
        pipe: the pipeline; left as it was after every method.
        call: keyword arguments of its call that hold for all requests (size, steps, guidance), without prompt,
            generator, latents and number of images. They win over a request's own ``call``.
        example: keyword arguments that stand for a prompt in the dry run which finds the number of stages and their
            cost; pass embeddings here if the pipeline has no text encoder.
        decode_batch: most rows to decode at once.
        previews: how to decode previews; default by the pipeline's own decoder.

    Raises:
        ValueError: ``call`` holds a reserved argument, or the pipeline has no loop over ``scheduler.step``.
    """

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any] | None = None,
        *,
        example: Mapping[str, Any] | None = None,
        decode_batch: int = 16,
        previews: PreviewDecoder | None = None,
    ) -> None:
        self.call = dict(call or {})
        self.decode_batch = decode_batch
        self._meter: Meter = NullMeter()
        self.transition: Transition = Ode()
        self.cache: StepCache | HookCache | None = None
        _refuse_reserved(self.call)
        self.shared = _Shared(Replay(pipe, self.call, {"prompt": "a photo", **(example or {})}))
        self.num_stages = self.schedule.stages
        self.milestones = tuple(range(self.schedule.preview_from, self.num_stages + 1))
        self.previews = previews or PreviewDecoder(pipe)

    @property
    def strategy(self) -> str:
        """``"batch"``, ``"rows"`` (one by one) or ``"whole"`` (whole runs only, one stage)."""
        return self.replay.strategy

    @property
    def meter(self) -> Meter:
        """Told about every real model call; also, when it is set, about those that the self-check had to make."""
        return self._meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._meter = meter
        while self.replay.spent and not isinstance(meter, NullMeter):
            rows, seconds = self.replay.spent.pop()
            meter.forward(rows, seconds, "probe", 0.0)

    @property
    def learned(self) -> dict[str, Any]:
        """What :attr:`previews` found out in this run, JSON-able; the driver keeps it and sets it anew."""
        return self.previews.learned

    @learned.setter
    def learned(self, saved: Mapping[str, Any] | None) -> None:
        self.previews.learned = saved

    @property
    def pipe(self) -> Any:
        return self.replay.pipe

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        if self.shared.device is None:
            self.shared.device = torch.device(self.pipe._execution_device)  # walks through every module
        return self.shared.device

    @property
    def replay(self) -> Replay:
        return self.shared.replay

    @property
    def schedule(self) -> Schedule:
        return self.shared.replay.schedule

    @property
    def request(self) -> Request | None:
        """The request whose rows are under way; set it before resuming loaded populations."""
        return self.shared.request

    @request.setter
    def request(self, request: Request) -> None:
        if request is not self.shared.request:
            _refuse_reserved(request.call)
            self.shared.request, self.shared.device = request, None
            self.shared.encoded.clear()
            if self.shared.used:  # what the dry runs encoded is fresh
                self.replay.prompts.clear()
                self.replay.memo.clear()
            self.shared.used = True

    # --- levels and costs ---

    def noise_level(self, stage: int) -> float:
        """log-SNR of the samples at ``stage``, nats; infinite at the last.

        Raises:
            ValueError: the scheduler's levels are unknown.
        """
        return math.inf if stage == self.num_stages else self._level(stage).log_snr

    def nfe(self, start: int, stop: int) -> int:
        """Model rows per candidate from stage to stage: batched CFG counts two, as do two separate calls.

        In a view whose cache decides as it goes (``StepCache(tau=...)``, diffusers' own), the most that it can be.
        """
        if self.cache is None or not self.exact_nfe:
            return self.schedule.nfe(start, stop)
        first, last = self.schedule.ends[start], self.schedule.ends[stop]
        real = zip(self.schedule.models, self._computed(), strict=True)
        return sum(call.rows for call, runs in real if runs and first <= call.clock < last)

    def cost(self, start: int, stop: int) -> float:
        """Image-equivalents: share of the model rows of one plain call."""
        return self.nfe(start, stop) / self.schedule.nfe(0, self.num_stages)

    @property
    def exact_nfe(self) -> bool:
        """Whether :meth:`nfe` says what a row costs; else it is the most that a view's cache may leave to run."""
        return self.cache is None or self.cache.fixed

    def _computed(self, start: int = 0) -> list[bool]:
        """Which model calls of a row that begins at a stage the step cache leaves to run."""
        skipped = self.cache.stages(self.num_stages)
        return computed(self.schedule.models, self.schedule.ends, skipped, start)

    def _level(self, stage: int, slot: int = 0) -> Level:
        level = self.schedule.level(self.schedule.ends[stage], slot)
        if level is None:
            raise ValueError(
                f"noise levels of {type(self.replay.schedulers[0]).__name__} are unknown; "
                "use one of the flow-match, DDIM, Euler or DPM-Solver schedulers"
            )
        return level

    def resident(self) -> AbstractContextManager[None]:
        """Within, an offloaded pipeline's models stay on the device between this sampler's calls."""
        return self.replay.resident()

    # --- the life of rows ---

    def init(self, request: Request, seeds: Sequence[Seed]) -> Population:
        """Rows at stage 0: the noise that the pipeline itself draws from each row's generator; encodes the prompts."""
        if not seeds:
            raise ValueError("init needs at least one seed")
        self.request = request
        device = next((str(g.device) for g in request.generators if g is not None), "cpu")
        rng_start = [request.generator(seed, device).get_state() for seed in seeds]
        # what a pipeline draws without its generator comes from the global stream: candidate 0 finds it as it is now
        own = torch.get_rng_state()
        ambient = [
            own
            if seed.candidate == 0
            else torch.Generator().manual_seed(stable_hash("ambient", seed.value)).get_state()
            for seed in seeds
        ]
        prompts = [seed.prompt for seed in seeds]
        texts = [self._text_of(seed.prompt, seed.candidate) for seed in seeds]
        noise: list[Tensor | None] = [None] * len(seeds)
        rng = list(rng_start)
        tensors = {"rng_start": torch.stack(rng_start), "ambient": torch.stack(ambient)}
        fields: dict[str, Any] = {"clock": 0}
        given = [self._given_latents(seed.prompt, seed.candidate) for seed in seeds]
        keys = [(text, own is None) for text, own in zip(texts, given, strict=True)]
        for rows in _groups(keys if self.replay.together else range(len(prompts))):
            if self.strategy == "whole":
                break
            run = self._run(texts, rows, tensors, [given[r] for r in rows], device=device, stop=0)
            for i, row in enumerate(rows):
                rng[row] = run.rng[i]
                noise[row] = None if run.drawn is None else run.drawn[i]
        drawn = next((n for n in noise if n is not None), None)
        if drawn is not None:
            unknown = torch.full_like(drawn, math.nan)  # of rows that begin with latents of another layout
            for row, own in enumerate(given):
                if noise[row] is None:
                    noise[row] = own[0].to(drawn) if own is not None and own.shape[1:] == drawn.shape else unknown
            tensors["noise"] = torch.stack(noise)
            fields["noise_shape"] = list(drawn.shape)
        return Population(
            stage=0,
            prompt=torch.tensor(prompts),
            lineage=tuple((Event("init", 0, seed.value, seed.candidate),) for seed in seeds),
            rng=tuple(rng),
            state=RowState(tensors, dict.fromkeys(tensors, 0), fields),
            rng_device=device,
        )

    def advance(
        self,
        population: Population,
        to: int,
        resample: Mapping[int, Callable[[Population], Sequence[int]]] | None = None,
    ) -> Population:
        """Carry all rows to stage ``to``, in one batch where their prompts have the same encoded shapes.

        Args:
            population: B rows.
            to: a later stage.
            resample: stage on the way -> function of the population there that names the B rows to go on with, repeats
                allowed. Where one batch holds all rows, and a pass of the loop steps once, this happens inside the
                loop, without leaving it; elsewhere by stopping and resuming, with the same result. The function may
                score previews.

        Raises:
            ValueError: ``to`` lies before the rows' stage or beyond the last; ``resample`` names another number of
                rows, or rows of other prompts.
            RuntimeError: out of memory, unchanged; the population is intact, so fewer rows can be tried.
        """
        if to == population.stage:
            return population
        if not population.stage < to <= self.num_stages:
            raise ValueError(f"cannot advance from stage {population.stage} to {to}; stages end at {self.num_stages}")
        if isinstance(self.cache, HookCache) and (population.stage, to) != (0, self.num_stages):
            raise ValueError(
                f"{self.cache} keeps its state in the model: rows run from stage 0 to {self.num_stages} without a "
                f"stop, not from {population.stage} to {to}; use StepCache to stop on the way"
            )
        if self.strategy == "whole":
            return self._run_whole(population)
        if resample:
            return self._resample(population, to, resample)
        try:
            with self.resident():
                return self._advance(population, to)
        except NoBatch as error:
            request, (prompt, candidate) = self._under_way(), self._row_texts(population)[0]
            example = {k: v[prompt] for k, v in request.per_prompt.items() if k != "latents"}
            example["prompt"] = request.text(prompt, candidate)
            self.replay.refuse_batch(error, {**request.call, **self.call}, example)
            return self.advance(population, to)

    def _resample(
        self, population: Population, to: int, resample: Mapping[int, Callable[[Population], Sequence[int]]]
    ) -> Population:
        outside = sorted(s for s in resample if not population.stage < s < to)
        if outside:
            raise ValueError(f"resample names stages {outside}; they must lie between {population.stage} and {to}")

        def chosen(rows: Population, stage: int) -> Population:
            index = [int(i) for i in resample[stage](rows)]
            picked = rows.select(index)
            if not torch.equal(picked.prompt, rows.prompt):
                raise ValueError(f"resample gave rows {index} at stage {stage}; give one row for each, of its prompt")
            return picked

        clocks = {self.schedule.ends[stage]: stage for stage in resample}
        one_step = len(set(self.schedule.slots)) == 1
        texts, given = self._row_texts(population), self._latents(population)
        prompts = {(self.batch_key(*text), own is None) for text, own in zip(texts, given, strict=True)}
        if not (one_step and self._together and len(prompts) == 1):
            for stage in sorted(resample):
                population = chosen(self.advance(population, stage), stage)
            return self.advance(population, to)
        now = population

        def exchange(state: RowState, streams: list[Tensor]) -> tuple[RowState, Sequence[Tensor]]:
            nonlocal now
            extra = {"ambient": now.state.tensors["ambient"]}
            there = replace(now, stage=clocks[state.fields["clock"]], state=_with(state, **extra), rng=tuple(streams))
            now = chosen(there, there.stage)
            return now.state, now.rng

        with self.resident():
            end = self._advance(population, to, events=dict.fromkeys(clocks, exchange))
        return replace(now, stage=end.stage, state=end.state, rng=end.rng)

    def _advance(self, population: Population, to: int, **options: Any) -> Population:
        texts, old = self._row_texts(population), population.state
        states, streams, order = [], list(population.rng), []
        given = self._latents(population)
        keys = [(self.batch_key(*text), own is None) for text, own in zip(texts, given, strict=True)]
        for rows in _groups(keys if self._together else range(len(texts))):
            run = self._run(
                texts,
                rows,
                old.tensors,
                [given[r] for r in rows],
                rng=[population.rng[r] for r in rows],
                device=population.rng_device,
                state=old if len(rows) == len(population) else old.select(torch.tensor(rows)),
                stop=self.schedule.ends[to],
                transition=self.transition,
                cache=self.cache,
                **options,
            )
            state = run.captured
            if "noise_shape" in old.fields:
                state = replace(state, fields={**state.fields, "noise_shape": old.fields["noise_shape"]})
            states.append(_with(state, ambient=old.tensors["ambient"][rows]))
            order += rows
            for row, stream in zip(rows, run.rng, strict=True):
                streams[row] = stream
        state = RowState.concat(states)
        if order != sorted(order):
            state = state.select(torch.tensor(order).argsort())
        return replace(population, stage=to, state=state, rng=tuple(streams))

    def predict_x0(self, population: Population) -> Population:
        """The clean estimates as a population at the last stage; free, since the last model call gave them.

        :meth:`decode` may show them by a cheaper decoder than results, the same for all of these rows.

        Raises:
            ValueError: at stage 0, or where the scheduler's noise levels are unknown.
        """
        if population.stage == self.num_stages:
            return population
        if population.stage == 0:
            raise ValueError("stage 0 is pure noise and has no preview; advance at least one stage")
        if population.stage < self.milestones[0]:
            raise ValueError(
                f"stage {population.stage} comes before the last of this pipeline's loops and has no preview; "
                f"advance to stage {self.milestones[0]} at least"
            )
        old = population.state
        tensors = {k: v for k, v in old.tensors.items() if k in _STREAMS or k.startswith(("out.", "ended."))}
        for slot in old.fields["schedulers"]:
            x0 = old.tensors.get(f"x0.{slot}")
            if x0 is None:
                self._level(population.stage)  # says what to do
                raise ValueError("this pipeline's steps give no clean estimate; score finished rows only")
            names = [n for n in tensors if n.startswith(f"out.{slot}.") and tensors[n].shape == x0.shape]
            tensors |= dict.fromkeys(names, x0)
        fields = {k: v for k, v in old.fields.items() if k != "schedulers"}
        decoder = self.previews.choose()
        fields |= {"clock": self.schedule.calls} | ({} if decoder == "full" else {"decoder": decoder})
        state = _state(old, tensors, fields)
        return replace(population, stage=self.num_stages, state=state)

    def check_moves(self, stage: int) -> None:
        """Raise what re-noising to ``stage``, or perturbing there, would raise whatever the rows.

        Raises:
            ValueError: a pipeline that runs whole or in several loops; a scheduler of unknown levels, or that cannot
                begin in the middle.
        """
        self._refuse_moves()
        if stage > 0:
            self._refuse_history()
            self._level(stage)

    def renoise(self, population: Population, to_stage: int, seeds: Sequence[int]) -> Population:
        """Back to an earlier stage at exactly its noise level; multistep history starts afresh.

        Args:
            population: B rows, not at stage 0.
            to_stage: earlier than theirs.
            seeds: (B,), each begins the row's new random stream.

        Raises:
            ValueError: ``to_stage`` is not earlier; the scheduler cannot begin in the middle (PNDM, LMS); or stage 0
                is asked for of a pipeline that packs its latents and does not begin from pure noise.
        """
        self._refuse_moves()
        if not 0 <= to_stage < population.stage:
            raise ValueError(f"cannot re-noise from stage {population.stage} to {to_stage}; give an earlier stage")
        self._refuse_cold(to_stage)
        streams, old = self._streams(population, seeds), population.state
        clock = self.schedule.ends[to_stage]

        def back(slot: int, x: Tensor) -> Tensor:
            noise = _normal(x.shape, streams, x.device, old.axes[f"out.{slot}.prev_sample"])
            moved = flow.renoise(x.float(), noise, self._level(population.stage, slot), self._level(to_stage, slot))
            return moved.to(x)

        if to_stage == 0:
            shape = old.fields.get("noise_shape")
            x, level = old.tensors["out.0.prev_sample"], self._level(0)
            if shape is None:
                raise ValueError("the initial noise of this pipeline is not known; re-noise to stage 1 or later")
            if level.alpha == 0:
                noise = _normal((len(population), *shape), streams, x.device)
            elif list(x.shape[1:]) == shape:
                noise = back(0, x) / self.shared.noise_scale(x)
            else:
                raise ValueError("latents are packed and stage 0 is not pure noise; re-noise to stage 1 or later")
            tensors = {**{k: old.tensors[k] for k in _STREAMS}, "noise": noise}
            state = RowState(tensors, dict.fromkeys(tensors, 0), {"clock": 0, "noise_shape": shape})
        else:
            self._refuse_history()
            tensors = {k: old.tensors[k] for k in _STREAMS}
            for name, x in old.tensors.items():
                if name.startswith("out."):
                    slot = int(name.split(".")[1])
                    tensors[name] = back(slot, x) if name.endswith(".prev_sample") else x
                    tensors[f"x0.{slot}"] = old.tensors.get(f"x0.{slot}", old.tensors[f"out.{slot}.prev_sample"])
            state = self._restarted(old, tensors, clock)
        return self._moved(population, "renoise", to_stage, state, streams, seeds, to_stage)

    def perturb(self, population: Population, strength: float, seeds: Sequence[int]) -> Population:
        """Stay at the stage and turn each row's noise towards a fresh draw; the clean estimate stays.

        ``eps -> sqrt(1 - b^2) eps + b z``; at stage 0 on the initial noise itself. Multistep history starts afresh,
        and the row's random stream is re-keyed. The preview remains the parent's until the next model call.

        Args:
            population: B rows, not at the last stage.
            strength: b in [0, 1]; 0 returns the population.
            seeds: (B,).

        Raises:
            ValueError: strength outside [0, 1], the last stage, or a scheduler that cannot begin in the middle.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must lie in [0, 1]")
        if strength == 0:
            return population
        self._refuse_moves()
        if population.stage == self.num_stages:
            raise ValueError("rows at the last stage have no noise to perturb; re-noise them to an earlier stage")
        self._refuse_cold(population.stage)
        streams, old = self._streams(population, seeds), population.state
        tensors = {k: v for k, v in old.tensors.items() if not k.startswith(("scheduler.", "cache."))}
        if population.stage == 0:
            if "noise" not in tensors:
                raise ValueError("the initial noise of this pipeline is not known; perturb at stage 1 or later")
            x, pure = tensors["noise"], Level(0.0, 1.0)
            if x.isnan().any():
                raise ValueError("latents= are given in another layout than the noise; perturb at stage 1 or later")
            noise = _normal(x.shape, streams, x.device)
            tensors["noise"] = flow.perturb(x.float(), torch.zeros_like(noise), noise, pure, strength).to(x)
            state = replace(old, tensors=tensors)
        else:
            self._refuse_history()
            for name in [n for n in tensors if n.endswith(".prev_sample")]:
                slot = int(name.split(".")[1])
                x, level = tensors[name], self._level(population.stage, slot)
                x0 = tensors[f"x0.{slot}"].float()
                noise = _normal(x.shape, streams, x.device, old.axes[name])
                tensors[name] = flow.perturb(x.float(), x0, noise, level, strength).to(x)
            state = self._restarted(old, tensors, old.fields["clock"])
        return self._moved(population, "perturb", population.stage, state, streams, seeds, strength)

    def noise(self, population: Population) -> Tensor:
        """(B, ...) float32, as the pipeline draws it before any scaling or packing.

        Raises:
            ValueError: not at stage 0; a pipeline that runs whole, or in several loops; noise that is not known.
        """
        self._refuse_moves()
        if population.stage != 0:
            raise ValueError(f"rows are at stage {population.stage}; their initial noise is known at stage 0 only")
        noise = population.state.tensors.get("noise")
        if noise is None or noise.isnan().any():
            raise ValueError("the initial noise of this pipeline is not known, or latents= are in another layout")
        return noise.float()

    def set_noise(self, population: Population, noise: Tensor, seeds: Sequence[int]) -> Population:
        """The same rows beginning from ``noise``, (B, ...) of the shape that :meth:`noise` gives.

        Raises:
            ValueError: as :meth:`noise`, or another shape.
        """
        now = self.noise(population)
        if noise.shape != now.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the rows' own {tuple(now.shape)}")
        kept = population.state.tensors["noise"]
        return population.begun_from(noise, seeds, population.state.update(noise=noise.to(kept)))

    # --- results ---

    def decode(self, population: Population) -> Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W) of rows at the last stage, float in [0, 1].

        The pipeline's own decoding, by replay of a loop in which nothing runs; of previews, as :attr:`previews` says.
        What is not an image comes as the pipeline gives it: audio (B, channels, samples), embeddings (B, D).
        """
        if self.strategy == "whole" and _WHOLE in population.state.tensors:
            return population.state.tensors[_WHOLE]
        decoder = population.state.fields.get("decoder", "full")
        if self.previews.unproved(decoder):
            first = population.select([0])
            self._in_pixels(lambda kind: self._outputs(first, kind, decoder="compare"))
        decoder = self.previews.settled(decoder)
        outputs = self._in_pixels(lambda kind: self._outputs(population, kind, decoder=decoder))
        return torch.cat([_pixels(_first(o)) for o in outputs])

    def _in_pixels(self, run: Callable[[dict[str, Any]], Any]) -> Any:
        """Run with the first output type that the pipeline takes; some know arrays or images only."""
        if self.shared.pixels is not None:
            return run(self.shared.pixels)
        kinds = [{"output_type": kind} for kind in ("pt", "np", "pil")] if "output_type" in self._parameters else []
        plain = {"return_dict": False} if "return_dict" in self._parameters else {}
        for kind in kinds:
            try:
                made = run({**kind, **plain})
            except Exception as error:
                # only a refusal of the output type is answered by another; the last attempt raises whatever it raises
                if not _REFUSED_TYPE.search(str(error)):
                    raise
                continue
            self.shared.pixels = {**kind, **plain}
            return made
        self.shared.pixels = plain
        return run(plain)

    @property
    def _parameters(self) -> Mapping[str, Any]:
        return self.replay.parameters

    def output(self, population: Population, **overrides: Any) -> Any:
        """What the pipeline's call returns for rows at the last stage, in order, as its own output class.

        Args:
            population: B rows at the last stage.
            overrides: arguments of the call that replace the request's, such as ``output_type`` or ``return_dict``.
        """
        overrides = {k: v for k, v in overrides.items() if k in self._parameters}
        return _merge(self._outputs(population, overrides, callbacks=True))

    def _outputs(
        self, population: Population, overrides: Mapping[str, Any], callbacks: bool = False, decoder: str = "full"
    ) -> list[Any]:
        if population.stage != self.num_stages:
            raise ValueError(
                f"rows are at stage {population.stage}, only stage {self.num_stages} can be decoded; "
                "advance them or take predict_x0"
            )
        prompts = population.prompt.tolist()
        if self.strategy == "whole":
            return [self._whole(population, row, overrides, callbacks).output for row in range(len(prompts))]
        # the loop computes nothing here, so rows may go through under any prompt; images given per prompt do matter
        text_only = all("prompt" in name or name == "latents" for name in self._under_way().per_prompt)
        given = self._latents(population)
        runs = _consecutive([(None if text_only else p, own is None) for p, own in zip(prompts, given, strict=True)])
        most = self.decode_batch if self.replay.together else 1
        with self.resident():
            return self._decoded(population, runs, most, given, overrides, callbacks, decoder)

    def _decoded(
        self,
        population: Population,
        runs: list[list[int]],
        most: int,
        given: list[Tensor | None],
        overrides: Mapping[str, Any],
        callbacks: bool,
        decoder: str,
    ) -> list[Any]:
        texts, old, outputs = self._row_texts(population), population.state, []
        for rows in runs:
            parts = [rows[start : start + most] for start in range(0, len(rows), most)]
            while parts:
                part, seen = parts.pop(0), []
                begin = time.perf_counter()
                try:
                    run = self._run(
                        [texts[part[0]]] * len(texts),
                        part,
                        old.tensors,
                        [given[r] for r in part],
                        rng=[population.rng[r] for r in part],
                        device=population.rng_device,
                        state=old.select(torch.tensor(part)),
                        callbacks=callbacks,
                        overrides=overrides,
                        decode=self.previews.decode(decoder, seen),
                    )
                except RuntimeError as error:
                    # what follows the loop may know one row only; out of memory is for the caller to split
                    if len(part) == 1 or "memory" in str(error).lower():
                        raise
                    parts = [[row] for row in part] + parts
                    continue
                seconds = time.perf_counter() - begin
                if decoder in ("full", "compare"):
                    self.meter.decode(len(part), seconds)
                else:
                    self.meter.preview(len(part), seconds, decoder)
                self.previews.learn(seen)
                outputs.append(run.output)
        return outputs

    def _run_whole(self, population: Population) -> Population:
        """Each row as one plain call, kept as it came out."""
        samples, streams = [], []
        for row in range(len(population)):

            def call(kind: dict[str, Any], row: int = row) -> Any:
                return self._whole(population, row, kind, callbacks=True)

            run = self._in_pixels(call)
            samples.append(_pixels(_first(run.output)))
            streams.append(run.rng[0])
        tensors = {**{k: population.state.tensors[k] for k in _STREAMS}, _WHOLE: torch.cat(samples)}
        state = RowState(tensors, dict.fromkeys(tensors, 0), {"clock": self.schedule.calls})
        return replace(population, stage=self.num_stages, state=state, rng=tuple(streams))

    def _whole(self, population: Population, row: int, overrides: Mapping[str, Any], callbacks: bool) -> Any:
        return self._run(
            self._row_texts(population),
            [row],
            population.state.tensors,
            [self._latents(population)[row]],
            device=population.rng_device,
            callbacks=callbacks,
            overrides=overrides,
            plain=True,
        )

    def view(
        self,
        transition: Transition | None = None,
        cache: Any | None = None,
        guidance: Any | None = None,
        previews: PreviewDecoder | None = None,
    ) -> DiffusionSampler:
        """The same sampler with another transition than ``Ode``, the scheduler's own step, a step cache, or previews.

        Args:
            transition: ``Ode``, ``Sde``, ``EtaStep`` or ``FullRenoise``.
            cache: what :func:`visearch.pipelines.cache.resolve` takes: ``"auto"``, a
                :class:`~visearch.pipelines.cache.StepCache`, its fields, or a cache config of diffusers.
            previews: how to decode previews.

        Raises:
            ValueError: a guidance view; a stochastic step on a scheduler of order 2 or of unknown levels; a cache on a
                pipeline that runs whole or keeps caches of its own, or that its denoiser does not take.
        """
        if guidance is not None:
            raise ValueError("DiffusionSampler has views of transition and cache; leave guidance out")
        made = copy.copy(self)
        if previews is not None:
            made.previews = previews
        if cache is not None:
            made._use(resolve(cache, self.num_stages))
        if transition is not None:
            if not isinstance(transition, Ode):
                if self.schedule.order != 1:
                    raise ValueError(f"{type(transition).__name__} needs a scheduler of order 1, this one has order 2")
                self._level(0)
                if self.strategy == "whole" or any(layout.blocks > 1 for layout in self.replay.layouts.values()):
                    raise ValueError(f"{type(self.pipe).__name__} steps several samples a row; leave transition out")
            made.transition = transition
        return made

    def _use(self, cache: StepCache | HookCache) -> None:
        """Take a step cache, or say why not."""
        if self.strategy == "whole" or self.schedule.live or self.replay.stubs.opaque:
            raise ValueError(
                f"{type(self.pipe).__name__} runs whole only, or its models keep caches of their own between steps; it "
                "has no step cache: leave cache out"
            )
        self.cache = cache
        if isinstance(cache, HookCache):
            cache.check(self.replay.denoisers)
            self.milestones = (self.num_stages,)
            return
        cache.stages(self.num_stages)
        unknown = {call.name for call in self.schedule.models if call.rows > 1} - set(self.replay.rows_first)
        if unknown and self.replay.together:
            raise ValueError(
                f"{type(self.pipe).__name__} gives {', '.join(sorted(unknown))} batches whose rows cannot be told "
                "apart; it has no step cache: leave cache out"
            )

    @property
    def _together(self) -> bool:
        return self.replay.together and (self.cache is None or self.cache.batched)

    def _refuse_cold(self, stage: int) -> None:
        """Rows that move have no outputs left: refuse stages after which the cache would find nothing to repeat."""
        if isinstance(self.cache, StepCache) and self.cache.fixed:
            later = [call.clock >= self.schedule.ends[stage] for call in self.schedule.models]
            pairs = zip(self._computed(), self._computed(stage), later, strict=True)
            if any(planned != runs for planned, runs, counts in pairs if counts):
                raise ValueError(
                    f"rows that move to stage {stage} have no outputs that its step cache could repeat; move them to a "
                    f"stage that is computed (skipped: {sorted(self.cache.stages(self.num_stages))}), or use the view "
                    "without cache"
                )

    # --- one call of the pipeline ---

    def _run(
        self,
        texts: Sequence[tuple[int, int]],
        rows: Sequence[int],
        streams: Mapping[str, Tensor],
        given: Sequence[Tensor | None],
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Call the pipeline with exactly these rows."""
        request = self._under_way()
        call = {**request.call, **self.call, **(overrides or {})}
        own = [texts[r] for r in rows]
        entries = {"prompt": [request.text(*text) for text in own]}
        entries |= {k: [v[p] for p, _ in own] for k, v in request.per_prompt.items() if k != "latents"}
        entries = {k: v for k, v in entries.items() if k in self._parameters and any(e is not None for e in v)}
        if given[0] is not None:
            call["latents"] = torch.cat(list(given))
        number = self.replay.number
        if len(set(own)) == 1 and (number or len(rows) == 1):
            call |= {k: v[0] for k, v in entries.items()} | ({number: len(rows)} if number else {})
        else:
            call |= {k: batch(v) for k, v in entries.items()}
        starts, ambient = [streams["rng_start"][r] for r in rows], streams["ambient"][rows[0]]
        run = self.replay.run(call, starts, ambient=ambient, meter=self.meter, **options)
        if len(set(own)) == 1:
            self.shared.encoded[own[0]] = run.described
        return run

    def _given_latents(self, prompt: int, candidate: int) -> Tensor | None:
        """The user's own latents of a candidate, (1, ...), where it has them."""
        entries = self._under_way().per_prompt.get("latents")
        entry = None if entries is None else entries[prompt]
        return entry[candidate : candidate + 1] if entry is not None and candidate < len(entry) else None

    def _latents(self, population: Population) -> list[Tensor | None]:
        """Per row, the user's own latents, unless the row has moved to other noise since."""
        rows = zip(population.prompt.tolist(), population.candidate, population.lineage, strict=True)
        moved = [
            any((e.op in ("perturb", "noise") and e.stage == 0) or (e.op == "renoise" and e.value == 0) for e in events)
            for _, _, events in rows
        ]
        pairs = zip(population.prompt.tolist(), population.candidate, moved, strict=True)
        return [None if gone else self._given_latents(p, k) for p, k, gone in pairs]

    def _under_way(self) -> Request:
        if self.request is None:
            raise ValueError("no request is under way; call init, or set request before resuming a loaded population")
        return self.request

    def _text_of(self, prompt: int, candidate: int) -> tuple[int, int]:
        """Rows with the same are generated from the same text."""
        return (prompt, 0 if self._under_way().rewrite is None else candidate)

    def _row_texts(self, population: Population) -> list[tuple[int, int]]:
        pairs = zip(population.prompt.tolist(), population.candidate, strict=True)
        return [self._text_of(p, k) for p, k in pairs]

    def batch_key(self, prompt: int, candidate: int = 0) -> Any:
        """Candidates with equal keys can share a batch."""
        request, text = self._under_way(), self._text_of(prompt, candidate)
        texts = all(isinstance(v, (str, type(None))) for values in request.per_prompt.values() for v in values)
        encoded = self.shared.encoded.get(text)
        alone = not texts or not encoded or request.prompts[prompt] is None
        return text if alone else repr(encoded)

    # --- moves ---

    def _streams(self, population: Population, seeds: Sequence[int]) -> list[torch.Generator]:
        if len(seeds) != len(population):
            raise ValueError(f"{len(seeds)} seeds for {len(population)} rows; give one a row")
        return [torch.Generator(population.rng_device).manual_seed(int(s)) for s in seeds]

    def _refuse_moves(self) -> None:
        if self.strategy == "whole":
            raise ValueError(f"{type(self.pipe).__name__} runs whole only ({self.replay.reason}); its rows cannot move")
        slots = self.schedule.slots
        if self.milestones[0] > 1 or any(layout.blocks > 1 for layout in self.replay.layouts.values()):
            raise ValueError(
                f"{type(self.pipe).__name__} steps {len(set(slots))} loops in turn, or several samples a row; its rows "
                "cannot be re-noised or perturbed: use a search that only selects"
            )

    def _refuse_history(self) -> None:
        for scheduler in self.replay.schedulers:
            if isinstance(scheduler, (PNDMScheduler, LMSDiscreteScheduler)):
                raise ValueError(
                    f"{type(scheduler).__name__} cannot begin in the middle of its schedule without history; "
                    "use DDIM, Euler, DPM-Solver or UniPC for searches that move rows"
                )

    def _restarted(self, old: RowState, tensors: dict[str, Tensor], clock: int) -> RowState:
        """State at a clock with schedulers that have no history."""
        schedule, schedulers = self.schedule, {}
        for slot, first in enumerate(schedule.first_index):
            fields = {} if first is None else {"_step_index": first + schedule.slots[:clock].count(slot)}
            schedulers[str(slot)] = {"layout": list(Layout()), "fields": fields}
        return _state(old, tensors, {**old.fields, "clock": clock, "schedulers": schedulers})

    def _moved(
        self,
        population: Population,
        op: str,
        stage: int,
        state: RowState,
        streams: Sequence[torch.Generator],
        seeds: Sequence[int],
        value: float,
    ) -> Population:
        events = [Event(op, population.stage, int(s), float(value)) for s in seeds]
        return replace(
            population,
            stage=stage,
            state=state,
            lineage=tuple((*old, e) for old, e in zip(population.lineage, events, strict=True)),
            rng=tuple(g.get_state() for g in streams),
        )


class _Shared:
    """What a sampler and its views have in common."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.request: Request | None = None
        self.used = False
        self.device: torch.device | None = None
        self.encoded: dict[tuple[int, int], list] = {}  # text -> description of what encode_prompt gave
        self.pixels: dict[str, Any] | None = None  # arguments with which the pipeline gives tensors, once found

    def noise_scale(self, like: Tensor) -> float:
        """What the pipeline multiplies the drawn noise with, to make its first sample."""
        return float(getattr(self.replay.schedulers[0], "init_noise_sigma", 1.0))


def _refuse_reserved(call: Mapping[str, Any]) -> None:
    taken = sorted(_RESERVED & set(call))
    if taken:
        raise ValueError(
            f"call holds {', '.join(taken)}; the prompt and generator belong to the Request, the noise and the number "
            "of images to the search: leave them out"
        )


def _groups(keys: Sequence[Any]) -> list[list[int]]:
    """Positions of equal keys, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _consecutive(keys: Sequence[Any]) -> list[list[int]]:
    """Positions cut wherever the key changes."""
    groups: list[list[int]] = []
    for i, key in enumerate(keys):
        if i and key == keys[i - 1]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _normal(shape: Sequence[int], streams: Sequence[torch.Generator], device: torch.device, axis: int = 0) -> Tensor:
    """Standard normal float32, one stream a row, rows along ``axis``."""
    own = [n for i, n in enumerate(shape) if i != axis]
    return torch.stack([torch.randn(own, generator=g, device=g.device) for g in streams], axis).to(device)


def _state(old: RowState, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> RowState:
    """A state some tensors of which are new; rows lie where they lay in ``old``."""
    return RowState(tensors, {name: old.axes.get(name, 0) for name in tensors}, fields)


def _with(state: RowState, **tensors: Tensor) -> RowState:
    """A state with more tensors, rows along their first axis."""
    return replace(state, tensors={**state.tensors, **tensors}, axes={**state.axes, **dict.fromkeys(tensors, 0)})


def _first(output: Any) -> Any:
    """What a pipeline returns first, whatever it wraps it in."""
    if isinstance(output, (tuple, list)) or not hasattr(output, "keys"):
        return output[0] if isinstance(output, tuple) else output
    return next(v for v in output.values() if v is not None)


def _pixels(samples: Any) -> Tensor:
    """A pipeline's samples as one tensor, whatever form they have; images channels first."""
    if torch.is_tensor(samples):
        return samples
    if isinstance(samples, list) and samples and torch.is_tensor(samples[0]):
        return torch.stack(samples)
    if isinstance(samples, list) and samples and isinstance(samples[0], list):
        return torch.stack([_pixels(s) for s in samples])
    images = isinstance(samples, list) and hasattr(samples[0], "convert")
    array = (
        np.stack([np.asarray(s.convert("RGB")) / np.float32(255) for s in samples]) if images else np.asarray(samples)
    )
    pixels = torch.as_tensor(array)
    # arrays of images come channels last
    return pixels.movedim(-1, -3) if pixels.ndim >= 4 and pixels.shape[-1] in (1, 3) else pixels


def _merge(outputs: Sequence[Any]) -> Any:
    """Outputs of sub-batches as one output of the same class."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, tuple):
        return tuple(_merge_field([o[i] for o in outputs]) for i in range(len(first)))
    return type(first)(**{k: _merge_field([o.get(k) for o in outputs]) for k in vars(first)})


def _merge_field(values: Sequence[Any]) -> Any:
    joins: dict[type, Callable] = {
        Tensor: torch.cat,
        np.ndarray: np.concatenate,
        list: lambda v: [x for y in v for x in y],
    }
    return joins[type(values[0])](list(values)) if type(values[0]) in joins else values[0]
