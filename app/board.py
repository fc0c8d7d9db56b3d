"""All candidates of a run, kept up round by round: what the board and the lineage tree show."""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from visearch.app.frames import Candidate, Media
from visearch.protocols import Population
from visearch.run import Round
from visearch.selection import rank
from visearch.wrap import to_pil

__all__ = ["Board", "ancestor", "media_of"]

FRAME_MS = 125  # of a video's frames


def media_of(sample: Any, alt: str) -> Media:
    """A decoded sample as a file: PNG of an image, an animated WebP of a video, both without loss.

    Args:
        sample: (3, H, W) or (F, 3, H, W), float in [0, 1], or a PIL image, or a list of PIL frames.
        alt: text for who does not see it.
    """
    (shown,) = to_pil([sample])
    file = io.BytesIO()
    if not isinstance(shown, list):
        shown.save(file, "PNG")
        return Media("image", "image/png", file.getvalue(), alt)
    first, *others = shown
    first.save(file, "WEBP", save_all=True, append_images=others, duration=FRAME_MS, loop=0, lossless=True)
    return Media("image", "image/webp", file.getvalue(), alt)


class Board:
    """The candidates of one prompt.

    Args:
        prompt: what the pictures' texts say.
    """

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self._known: dict[str, Candidate] = {}

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """In the order in which they came."""
        return tuple(self._known.values())

    @property
    def best(self) -> str | None:
        """The best finished candidate, else the best preview of those under way; ``None`` before the first score."""
        scored = [c for c in self._known.values() if c.score is not None]
        shown = [c for c in scored if c.rank == 1] or [c for c in scored if c.state == "live"] or scored
        return max(shown, key=lambda c: c.score).id if shown else None

    def update(self, step: Round) -> None:
        """Take in what a round scored, and who is still there."""
        for rows in step.scored:
            for row, id in enumerate(rows.id):
                self._see(rows, row, media_of(step.previews[0, id], self._alt(rows, row)))
        for rows in (step.state.live, step.state.finished):
            for row, id in enumerate(() if rows is None else rows.id):
                if id not in self._known:  # copies, and rows that wait for their first score
                    self._see(rows, row)
        self._settle(step)

    def show(self, id: str, sample: Any) -> None:
        """Another picture of a candidate, of the same as it was."""
        known = self._known[id]
        self._known[id] = replace(known, media=media_of(sample, known.media.alt))

    def _alt(self, rows: Population, row: int) -> str:
        return f"{self.prompt}: candidate {rows.id[row]} after stage {rows.stage}"

    def _see(self, rows: Population, row: int, media: Media | None = None) -> None:
        id, score = rows.id[row], float(rows.score[row])
        parent = ancestor(id, self._known)
        if media is None and parent is not None and rows.history[row] == self._known[parent].history:
            media = self._known[parent].media  # a copy looks like what it was copied from until it is scored itself
        self._known[id] = Candidate(
            id,
            number=rows.candidate[row],
            seed=rows.seed[row],
            state="live",
            stage=rows.stage,
            score=None if math.isnan(score) else score,
            history=rows.history[row],
            lineage=rows.lineage[row],
            parent=parent,
            media=media,
        )

    def _settle(self, step: Round) -> None:
        """Give everyone the state, and the finished ones the rank, that they have after the round."""
        live, finished = step.state.live, step.state.finished
        going = set() if live is None or step.last else set(live.id)
        ranks = {} if finished is None else {finished.id[row]: place for place, row in enumerate(rank(finished), 1)}
        pruned = {record["id"] for record in step.state.pruned}
        parents = {ancestor(id, self._known) for id in self._known}
        for id, known in self._known.items():
            if id in ranks:
                state = "finished"
            elif id in going:
                state = "live"
            elif id in pruned:
                state = "pruned"
            elif id in parents:
                state = "replaced"
            else:
                state = "pruned" if step.last else known.state
            self._known[id] = replace(known, state=state, rank=ranks.get(id))


def ancestor(id: str, known: Collection[str]) -> str | None:
    """The known candidate that an id descends from: ids name the operations that made a row, one after the other."""
    while "/" in id:
        id = id.rpartition("/")[0]
        if id in known:
            return id
    return None
