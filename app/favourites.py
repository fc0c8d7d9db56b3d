"""A search that a person guides: each generation waits for favourites, and the next one is bred from them.

``run_search`` drives EvoSearch (arXiv 2505.17618) on a thread of its own. Its reward asks the person: questions and
answers are two queues between that thread and the page. The thread holds the model while it computes and lends it to
others while the person thinks.
"""

from __future__ import annotations

import io
import logging
import math
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch

from visearch.app.board import ancestor, media_of
from visearch.app.frames import Media
from visearch.app.studio import Model
from visearch.budget import Ledger
from visearch.job import Job
from visearch.options import one_line
from visearch.protocols import Event, Population, RewardError, Scores
from visearch.run import SearchResult, run_search
from visearch.search.evosearch import EvolutionarySearch

__all__ = ["Answer", "Breeding", "Family", "Left", "Picture", "Wish"]

WAIT = 600.0  # seconds for an answer
LATEST = 0.6  # share of the steps after which the last generation still begins: later ones hardly change
EVERYONE = 1 << 20  # entrants of a tournament: of equal scores a random one wins, so all favourites are parents
MUTATION = 0.5  # of the initial noise in the second generation: cosine of parent and child 0.87

CANCELLED = "cancelled"

log = logging.getLogger(__name__)


class Left(RewardError):
    """The person cancelled, closed the page, or gave no answer in time."""


@dataclass(frozen=True)
class Wish:
    """What is to be bred.

    Args:
        prompt: what the pictures should show.
        seed: of picture 1.
        pictures: of a generation, at least 2.
        generations: at least 2.

    Raises:
        ValueError: fewer pictures or generations.
    """

    prompt: str
    seed: int = 0
    pictures: int = 8
    generations: int = 4

    def __post_init__(self) -> None:
        for name in ("pictures", "generations"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}={getattr(self, name)} leaves nothing to choose; give at least 2")

    @property
    def search(self) -> EvolutionarySearch:
        """Generations of equal size that begin later and later: first the composition is settled, then the details."""
        later = self.generations - 1
        return EvolutionarySearch(
            restarts=tuple(LATEST * g / max(1, later - 1) for g in range(later)),
            sizes=(self.pictures,) * self.generations,
            elites=0,
            tournament=EVERYONE,
            beta=MUTATION,
        )


@dataclass(frozen=True)
class Picture:
    """One candidate that was shown.

    Attributes:
        number: from 1, through all generations.
        id, seed, lineage: as in ``SearchResult.ranking``.
        parent: number of the picture that it was bred from; ``None`` in the first generation.
        media: what it looks like.
        place: among the favourites of its generation, 1 for the one chosen first; ``None`` of others.
    """

    number: int
    id: str
    seed: int
    lineage: tuple[Event, ...]
    parent: int | None
    media: Media
    place: int | None = None


@dataclass(frozen=True)
class Answer:
    """Numbers of the favourites, the first chosen first; ``last`` ends the search with them."""

    favourites: tuple[int, ...] = ()
    last: bool = False


@dataclass(frozen=True)
class Family:
    """What is on screen.

    Attributes:
        wish: as asked for.
        generations: all so far; the last one waits for favourites unless the search ended.
        winner: number of the best picture, once the search ended.
        ended: one line that says how; ``None`` while it goes on.
        failed: whether that was an error.
        archive: once it ended, a zip file with the winner: picture, final latents, lineage.
    """

    wish: Wish
    generations: tuple[tuple[Picture, ...], ...] = ()
    winner: int | None = None
    ended: str | None = None
    failed: bool = False
    archive: bytes | None = field(default=None, repr=False)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return sum(self.generations, ())

    @property
    def final(self) -> bool:
        """Whether nothing will be bred from the generation that is shown."""
        return len(self.generations) == self.wish.generations

    def find(self, number: int | None) -> Picture | None:
        return next((p for p in self.pictures if p.number == number), None)

    def grown(self, rows: Population, media: Sequence[Media]) -> Family:
        """With one more generation."""
        known = {p.id: p.number for p in self.pictures}
        new = tuple(
            Picture(number, id, seed, lineage, known.get(ancestor(id, known)), picture)
            for number, (id, seed, lineage, picture) in enumerate(
                zip(rows.id, rows.seed, rows.lineage, media, strict=True), len(known) + 1
            )
        )
        return replace(self, generations=(*self.generations, new))

    def chosen(self, answer: Answer) -> Family:
        """With the favourites of the last generation.

        Raises:
            ValueError: a number that is not among its pictures, or twice.
        """
        *earlier, shown = self.generations
        numbers = [p.number for p in shown]
        if not set(answer.favourites) <= set(numbers) or len(set(answer.favourites)) != len(answer.favourites):
            raise ValueError(f"favourites={list(answer.favourites)} are not all among the pictures shown; choose again")
        place = {number: i for i, number in enumerate(answer.favourites, 1)}
        marked = tuple(replace(p, place=place.get(p.number)) for p in shown)
        return replace(self, generations=(*earlier, marked))

    def scores(self, final: bool) -> list[float]:
        """Of the last generation; where nothing will be bred from it, the first choice counts most."""
        g, shown = len(self.generations), self.generations[-1]
        return [0.0 if p.place is None else g + (1 / p.place if final else 0.0) for p in shown]


# --- the reward -------------------------------------------------------------------------------------------------


@dataclass
class _Watch(Ledger):
    """A ledger that tells which rows are about to be scored, and may end the search before any model call."""

    scoring: Callable[[Population], None] = lambda rows: None
    check: Callable[[], None] = lambda: None

    def share(self, population: Population, what: str, each: int = 1) -> None:
        super().share(population, what, each)
        if what == "decodes":
            self.scoring(population)

    def forward(self, rows: int, seconds: float, kind: str = "denoiser", images: float = 0.0) -> None:
        super().forward(rows, seconds, kind, images)
        self.check()


class _You:
    """The person as a reward: g for a favourite of generation g, so that the latest ones breed, and 0 for all others.

    Where nothing will be bred, the first choice counts most. What was judged is remembered: the driver scores some
    samples twice to see whether a reward mixes them up.

    Args:
        ask: shows rows and their samples, and gives a score for each.
    """

    name = "you"
    higher_is_better = True
    range = (0.0, math.inf)
    licence, source = "yours", "the person in front of the page"
    needs = frozenset({"pixels"})

    def __init__(self, ask: Callable[[Population, list[Media]], Sequence[float]]) -> None:
        self.ask = ask
        self.rows: Population | None = None
        self.known: dict[bytes, float] = {}

    def expect(self, rows: Population) -> None:
        """The next samples belong to these rows."""
        self.rows = rows

    def score(
        self,
        samples: Any,
        prompts: Sequence[str],
        *,
        noise_level: float | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Scores:
        shown = [media_of(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        if self.rows is not None:
            rows, self.rows = self.rows, None
            for picture, value in zip(shown, self.ask(rows, shown), strict=True):
                self.known[picture.content] = max(value, self.known.get(picture.content, 0.0))
        return Scores(torch.tensor([self.known.get(picture.content, 0.0) for picture in shown]))


# --- the thread -------------------------------------------------------------------------------------------------


class _Turn:
    """The model by turns: held to compute, lent to others while the person thinks.

    Raises:
        Left: the person went while others held it.
    """

    def __init__(self, model: Model, gone: Callable[[], bool]) -> None:
        self.model, self.gone, self.held = model, gone, ExitStack()

    def __enter__(self) -> None:
        if not self.held.enter_context(self.model.turns.held(self.gone)):
            raise Left(CANCELLED)

    def __exit__(self, *error: Any) -> None:
        self.held.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lent within; whoever leaves with an exception does not wait to have it back."""
        self.held.close()
        yield
        self.__enter__()


class Breeding:
    """One person's search. Whatever happens to the page, its thread ends: by :meth:`close`, or after ``wait``.

    Args:
        wish: what to breed.
        model: is computed with while it is nobody else's turn.
        wait: seconds for an answer.
        images: most image-equivalents.

    Attributes:
        family: the generations so far.

    Raises:
        ValueError: the wish costs more.
    """

    def __init__(self, wish: Wish, model: Model, wait: float = WAIT, images: float = math.inf) -> None:
        planned = wish.search.plan(model.sampler).images
        if planned > images:
            raise ValueError(
                f"{wish.generations} generations of {wish.pictures} pictures cost {planned:.3g} images, more than "
                f"{images:g}; ask for fewer"
            )
        self.wish, self.model, self.wait = wish, model, wait
        self._shown: Queue[Family] = Queue()
        self._answers: Queue[Answer | None] = Queue()
        self._open = threading.Semaphore(0)  # questions without an answer: none or one
        self._closed, self._last = threading.Event(), False
        self.family = Family(wish)
        self._turn = _Turn(model, self._closed.is_set)
        self._you = _You(self._ask)
        self._thread = threading.Thread(target=self._run, name="visearch-favourites", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def shown(self, timeout: float | None = None) -> Family | None:
        """The next thing to show; ``None`` where there is none for so many seconds."""
        try:
            return self._shown.get(timeout=timeout)
        except Empty:
            return None

    def answer(self, answer: Answer) -> None:
        """The favourites of the generation that was shown last.

        Raises:
            ValueError: a picture that is not among them, or no generation waits for an answer.
        """
        if not self._open.acquire(blocking=False):
            raise ValueError("no generation waits for favourites; wait for the next one")
        try:
            self.family.chosen(answer)
        except ValueError:
            self._open.release()
            raise
        self._answers.put(answer)

    def close(self) -> None:
        """End the search with the best so far, before its next model call."""
        self._closed.set()
        self._answers.put(None)

    # --- on the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._turn:
                result = self._search()
            self._shown.put(self._ended(result))
        except Exception as error:  # a thread's last: whoever waits for pictures hears of it
            log.log(logging.INFO if isinstance(error, Left) else logging.ERROR, "breeding failed", exc_info=error)
            self._shown.put(replace(self.family, ended=one_line(error), failed=not isinstance(error, Left)))

    def _search(self) -> SearchResult:
        wish, model = self.wish, self.model
        generator = torch.Generator().manual_seed(wish.seed)
        # a sampler of its own: that of the model serves others between two generations
        job = Job.of(model.pipe, wish.search, wish.prompt, generator=generator, **model.call)
        watch = _Watch(scoring=self._you.expect, check=self._check)
        rounds = run_search(job.sampler, self._you, job.search, job.request, ledger=watch, cancelled=lambda: self._last)
        *_, last = rounds
        return last.result

    def _check(self) -> None:
        if self._closed.is_set():
            raise Left(CANCELLED)

    def _ask(self, rows: Population, media: list[Media]) -> list[float]:
        """Show a generation and wait for its favourites; their scores."""
        self.family = self.family.grown(rows, media)
        with self._turn.paused():
            self._open.release()
            self._shown.put(self.family)
            try:
                answer = self._answers.get(timeout=self.wait)
            except Empty:
                raise Left(f"no answer for {self.wait / 60:.3g} minutes") from None
            self._check()
            self.family = self.family.chosen(answer)
        self._last = answer.last
        return self.family.scores(final=answer.last or self.family.final)

    def _ended(self, result: SearchResult) -> Family:
        family, error = self.family, result.error
        if error is not None and not isinstance(error, Left):
            raise error
        ended = "Done" if error is None else one_line(error)
        best = result.ranking[0] if result.finished is not None else {"score": 0.0}
        if not best["score"]:
            return replace(family, ended=f"{ended}: no favourite was chosen, so there is no winner")
        winner = next(p for p in family.pictures if p.id == best["id"])
        ended = f"{ended}: picture {winner.number} won"
        return replace(family, winner=winner.number, ended=ended, archive=_archive(result, winner))


def _archive(result: SearchResult, winner: Picture) -> bytes:
    """The winner's picture beside what :meth:`SearchResult.save` keeps of it."""
    file = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        result.save(folder)
        for path in sorted(Path(folder).iterdir()):
            archive.write(path, path.name)
        suffix = winner.media.mime.rpartition("/")[2]
        archive.writestr(f"winner.{suffix}", winner.media.content)
    return file.getvalue()
