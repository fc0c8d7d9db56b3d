"""The pieces of a batch job, one after the other in this process or side by side as Ray tasks.

The job's process alone reads and writes its files: what runs elsewhere gets a piece and gives back its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from visearch.options import device_of

__all__ = ["add_ray_argument", "place", "work"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")

AHEAD = 2  # pieces handed out for each place to work: one is under way, one waits there


def add_ray_argument(parser: Any) -> None:
    """``--ray``; ``parser`` may be a group of one."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run as tasks of a Ray cluster: auto, ray://HOST:PORT, or on this machine where no address is given",
    )


def work(
    make: Callable[[], Callable[[Piece], Result]], pieces: Iterable[Piece], ray: str | None = None, gpus: int = 0
) -> Iterator[tuple[int, Result]]:
    """Yield the number of each piece, from 0, and its result, as it is ready.

    Args:
        make: gives what works on a piece; called once a process, and only if there is a piece.
        pieces: read no faster than they are worked on.
        ray: address of a cluster; ``None`` works here, piece after piece. ``make``, pieces and results are pickled,
            and a task whose process dies is run again, by Ray itself.
        gpus: that a Ray task needs; else it needs one CPU.

    Raises:
        RuntimeError: a task was lost as often as Ray tries.
    """
    if ray is not None:
        yield from _ray_work(make, enumerate(pieces), ray, gpus)
        return
    worker = None
    for number, piece in enumerate(pieces):
        worker = worker or make()
        yield number, worker(piece)


def place(device: str | None, ray: str | None) -> tuple[str, int]:
    """Where the pieces are worked on: a device, and how many GPUs a Ray task needs.

    Args:
        device: ``None`` is the best there is, here or in the cluster.
        ray: as in :func:`work`.

    Raises:
        ValueError: there is no such device.
    """
    if ray is None:
        return device_of(device), 0
    device = device or ("cuda" if _connected(ray).cluster_resources().get("GPU") else "cpu")
    return device, int(device.startswith("cuda"))


def _ray_work(
    make: Callable[[], Any], pieces: Iterator[tuple[int, Any]], address: str, gpus: int
) -> Iterator[tuple[int, Any]]:
    ray = _connected(address)
    places = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1) // max(gpus, 1))
    task = ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus)(_run)
    key, made = ray.get_runtime_context().get_job_id(), ray.put(make)
    under_way = {task.remote(key, made, piece): number for number, piece in islice(pieces, AHEAD * max(places, 1))}
    try:
        while under_way:
            (ready,), _ = ray.wait(list(under_way), num_returns=1)
            under_way |= {task.remote(key, made, piece): number for number, piece in islice(pieces, 1)}
            yield under_way.pop(ready), ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray lost a task as often as it tries ({type(error).__name__}: {error})") from error
    finally:
        for left in under_way:
            ray.cancel(left)


def _connected(address: str) -> Any:
    """Ray, connected to the cluster at ``address`` or to the one that this process is connected to already."""
    try:
        import ray
    except ImportError as error:
        raise ValueError('--ray needs Ray: pip install "visearch[ray]"') from error
    if not ray.is_initialized():
        ray.init(address, include_dashboard=False if address == "local" else None)
    return ray


_workers: dict[str, Any] = {}  # in a process of a cluster: job -> what works on its pieces


def _run(key: str, make: Callable[[], Callable[[Any], Any]], piece: Any) -> Any:
    if key not in _workers:
        _workers.clear()
        _workers[key] = make()
    return _workers[key](piece)
