"""A studio that makes its frames up: what the page does with them is tested without a model."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from PIL import Image

from visearch.app.frames import Candidate, Cost, Frame, Media, Settings, Share
from visearch.app.studio import Studio
from visearch.app.turns import Turns
from visearch.protocols import Event

STAGES = 15


def picture(hue: int, sharp: float = 1.0) -> Media:
    """A square of one colour, paler where it is not ``sharp``."""
    image = Image.new("HSV", (64, 64), (hue % 256, int(200 * sharp), 220)).convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return Media("image", "image/png", file.getvalue(), f"a square of hue {hue % 256}")


def candidate(number: int, stage: int, state: str = "live", hue: int = 0, **more: object) -> Candidate:
    stages = [s for s in (4, 8, 15) if s <= stage]
    facts = {
        "history": tuple((s, 50.0 + number + s / 10) for s in stages),
        "score": 50.0 + number + stage / 10 if stages else None,
        "lineage": (Event("init", 0, 7 + number, number),),
        "media": picture(hue + 20 * number, stage / STAGES) if stages else None,
    }
    return Candidate(str(number), number, 7 + number, state, stage, **{**facts, **more})


class MadeUpStudio(Studio):
    """Eight begin, half of them leave at each of two checks; the prompt says what goes wrong. Nothing is loaded.

    Prompts with "break" fail in the second round, those with "hack" warn; with "hold" the search waits for ``go``, with
    "compare slowly" the best-of-n after it.
    """

    def __init__(self) -> None:
        super().__init__(judges=["judge-a"])
        self.turns, self.go = Turns(), threading.Event()

    def check(self, settings: Settings) -> None:
        for what, value in vars(settings).items():
            self.check_value(what, value)

    def plan(self, settings: Settings) -> Cost:
        return Cost(settings.images, 8, 2, 12, None)

    def judging(self, settings: Settings) -> tuple[str, ...]:
        return settings.held_out

    def run(self, settings: Settings, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Frame]:
        with self.turns.place() as before:
            while ahead := before():
                if cancelled():
                    yield Frame(settings, "cancelled")
                    return
                yield Frame(settings, "waiting", ahead)
            yield from self._rounds(settings, cancelled)

    def _rounds(self, settings: Settings, cancelled: Callable[[], bool]) -> Iterator[Frame]:
        hue = sum(settings.prompt.encode()) % 256
        frame = Frame(settings, "baseline", stages=STAGES, cost=self.plan(settings))
        yield frame
        for index, stage in enumerate((0, 4, 8, 15)):
            while index == 3 and "hold" in settings.prompt and not self.go.is_set() and not cancelled():
                time.sleep(0.02)
            if index == 2 and "break" in settings.prompt:
                yield replace(frame, phase="failed", error="the model ran out of memory; ask for fewer images")
                return
            if cancelled():
                yield replace(frame, phase="cancelled")
                return
            frame = self._frame(frame, index, stage, hue)
            yield frame
        warnings = ("the guide rises while judge-a falls",) * ("hack" in settings.prompt)
        judged = {"held_out": {"judge-a": (0.2, 0.9)}, "held_out_curve": {"judge-a": ((8.0, 0.9),)}}
        frame = replace(frame, phase="done", warnings=warnings, **judged)
        yield frame
        if settings.best_of_n:
            for n in (2, 4):
                bar = tuple(enumerate((51.0, 52.0, 52.5, 53.0)[:n], 1))
                yield replace(frame, comparing=True, best_of_n=bar)
                while "compare slowly" in settings.prompt and not self.go.is_set() and not cancelled():
                    time.sleep(0.02)
                if cancelled():
                    break
            yield replace(frame, best_of_n=bar, held_out_best_of_n={"judge-a": ((1, 0.2), (n, 0.5))})

    def _frame(self, frame: Frame, index: int, stage: int, hue: int) -> Frame:
        living = [range(8), range(8), range(4, 8), range(6, 8)][index]
        seen = {c.id: c for c in frame.candidates}
        rows = [candidate(k, stage, "finished" if stage == STAGES else "live", hue) for k in living]
        left = [replace(c, state="pruned") for k, c in seen.items() if int(k) not in living]
        everyone = tuple(sorted((*left, *rows), key=lambda c: c.number))
        best = max(rows, key=lambda c: c.score or 0.0)
        spent = frame.settings.images * (index + 1) / 4
        return replace(
            frame,
            phase="searching",
            index=index + 1,
            baseline=picture(hue),
            baseline_score=51.5,
            winner=best.id if best.media else None,
            candidates=everyone,
            images=spent,
            seconds=0.5 * (index + 1),
            eta=0.5 * (3 - index),
            ledger=(Share("denoiser", 8 * (index + 1), 0.1 * index, spent), Share("reward", 8, 0.02)),
            curve=((spent, best.score),) if stage == STAGES else (),
        )

    def files(self, frame: Frame, folder: object) -> dict[str, bytes]:
        return {"winner.png": frame.find(frame.winner).media.content}
