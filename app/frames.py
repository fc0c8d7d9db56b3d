"""What the page shows, as plain data: settings that come from it and frames that go to it.

Nothing here knows Gradio, nor how a search runs. ``studio`` turns settings into frames, ``views`` frames into HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from visearch.protocols import Event

__all__ = ["Candidate", "Cost", "Frame", "Limits", "Media", "Settings", "Share"]


@dataclass(frozen=True)
class Limits:
    """What one user may ask for.

    Args:
        prompt: most characters.
        images: most image-equivalents of one search.
        seconds: most seconds of one search.
        request: most bytes of one request.
        waiting: most users who search or wait.
    """

    prompt: int = 400
    images: int = 64
    seconds: float = 300.0
    request: int = 64 * 1024
    waiting: int = 32


@dataclass(frozen=True)
class Settings:
    """One search as the page asks for it; every value is checked by ``Studio.check`` before anything runs.

    Args:
        prompt: what the image should show.
        model: a name of the studio's models; the page never names a path or hub id.
        search: a name of the studio's searches, such as ``"halving"``.
        reward: guides; a name of the studio's rewards.
        held_out: judges without guiding, names of the studio's rewards.
        images: budget in image-equivalents (model rows of one image drawn to its end, guidance branches counted).
        seconds: budget in seconds, or ``None``.
        seed: of candidate 0, which is the baseline, too.
        best_of_n: whether best-of-n of the same budget is drawn after the search, for comparison.
    """

    prompt: str
    model: str = "emoji-64"
    search: str = "halving"
    reward: str = "emoji-clip"
    held_out: tuple[str, ...] = ()
    images: int = 8
    seconds: float | None = None
    seed: int = 0
    best_of_n: bool = True


@dataclass(frozen=True)
class Cost:
    """What a search is planned to take, before it runs.

    Args:
        images: image-equivalents.
        candidates: candidates begun.
        finals: candidates finished.
        previews: previews decoded and scored.
        seconds: of this model on this machine by what it took before; ``None`` while unknown.
        beside: image-equivalents of best-of-n that follow for comparison.
    """

    images: float
    candidates: int
    finals: int
    previews: int
    seconds: float | None
    beside: float = 0.0


@dataclass(frozen=True)
class Media:
    """A preview or a result: a still, or a video.

    Args:
        kind: which element shows it; an animated image is an image.
        mime: such as ``"image/png"``, ``"image/webp"`` (animated) or ``"video/mp4"``.
        content: the file.
        alt: text for who does not see it.
    """

    kind: Literal["image", "video"]
    mime: str
    content: bytes = field(repr=False)
    alt: str


@dataclass(frozen=True)
class Candidate:
    """One row of the board, and one node of the lineage tree with its way there.

    Args:
        id: unique in the run, as in ``SearchResult.ranking``: ``"3"``, a copy ``"3/fork@12.1"``.
        number: k, the candidate that it descends from.
        seed: of the random stream that it consumes.
        state: ``"pruned"`` left early, ``"replaced"`` has descendants in its place (resampled, bred, moved).
        stage: the last stage that it reached.
        score: the latest one by the guiding reward, of its preview or its result; ``None`` while unscored.
        history: (stage, score) pairs.
        lineage: operations that made it.
        parent: id of the candidate that it came from, ``None`` of first ones.
        media: its latest preview, or its result.
        rank: among finished ones, from 1.
    """

    id: str
    number: int
    seed: int
    state: Literal["live", "pruned", "replaced", "finished"]
    stage: int
    score: float | None
    history: tuple[tuple[int, float], ...]
    lineage: tuple[Event, ...]
    parent: str | None = None
    media: Media | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Share:
    """One line of the ledger: ``what`` took so many ``calls`` and ``seconds``; ``images`` in image-equivalents."""

    what: str
    calls: int
    seconds: float
    images: float = 0.0


@dataclass(frozen=True)
class Frame:
    """Everything that is on screen after one round.

    Args:
        settings: of this run.
        phase: ``"waiting"`` for its turn, ``"baseline"`` until the single sample is there, ``"searching"``, then how it
            ended: ``"done"``, ``"budget"``, ``"cancelled"`` or ``"failed"``.
        ahead: how many come before it while it waits.
        index: completed rounds.
        stages: T, of the model's loop.
        cost: as planned.
        baseline: candidate 0 drawn alone, the plain pipeline's image of this seed.
        baseline_score: by the guiding reward.
        winner: id of the best finished candidate, or else of the best preview; ``None`` before the first.
        candidates: all, also those that left, in the order in which they came.
        images: image-equivalents spent by the search. What the baseline took beside it is not among them.
        seconds: since the search began.
        eta: seconds to its end, ``None`` while unknown.
        ledger: what the search spent on what.
        beside: what the baseline and the judges took beside it, outside of the budget.
        curve: (images spent, best guided score so far) after each round that finished a candidate.
        best_of_n: (n, expected best score of n candidates), as best-of-n of the same budget drew them, or the run
            itself where nothing in it was selected; ``()`` while neither has two.
        comparing: the search is over, and best-of-n is being drawn.
        held_out: judge -> (baseline's score, winner's score).
        held_out_curve: judge -> (images spent, score of the best by the guiding reward so far), at the points of
            ``curve``; the judges see them after the end.
        held_out_best_of_n: judge -> (n, its expected score of the one that the guiding reward prefers of n).
        warnings: such as a reward that rises while a judge falls, or a judge that cannot read the prompt.
        error: one line where it failed.
    """

    settings: Settings
    phase: Literal["waiting", "baseline", "searching", "done", "budget", "cancelled", "failed"]
    ahead: int = 0
    index: int = 0
    stages: int = 0
    cost: Cost | None = None
    baseline: Media | None = None
    baseline_score: float | None = None
    winner: str | None = None
    candidates: Sequence[Candidate] = ()
    images: float = 0.0
    seconds: float = 0.0
    eta: float | None = None
    ledger: Sequence[Share] = ()
    beside: Sequence[Share] = ()
    curve: Sequence[tuple[float, float]] = ()
    best_of_n: Sequence[tuple[int, float]] = ()
    comparing: bool = False
    held_out: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    held_out_curve: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    held_out_best_of_n: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.phase not in ("waiting", "baseline", "searching")

    def find(self, id: str | None) -> Candidate | None:
        return next((c for c in self.candidates if c.id == id), None)
