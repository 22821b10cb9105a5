"""torch's DataLoader, of whose worker processes none can hang a command or end it with a traceback."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_all_start_methods
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mto_analysis.errors import DataError, explained

# Seconds to wait for a batch, in so many ticks: decoding takes seconds at most, and a stuck file system for ever.
_TIMEOUT, _TICKS = 300, 20
# Seconds for the signal of a process's end, which may come after its connection is lost, and for a killed process.
_SIGNAL_SECONDS = 0.5
_KILL_SECONDS = 5.0

# To start a process takes as long as to decode some of the images: longer where it imports everything anew. More than
# some processes gain nothing.
_IMAGES_PER_WORKER = 128 if get_all_start_methods()[0] == "fork" else 2048
_MOST_WORKERS = 12


def usual_workers(num_images: int, processes: int = 1) -> int:
    """How many worker processes to decode images in, unless the user says so: for few images none.

    Example:
        >>> usual_workers(8)
        0
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // processes, _MOST_WORKERS, num_images // _IMAGES_PER_WORKER)


class Loader:
    """Batches of a dataset, made in worker processes; iterated again, it begins again.

    Tensors come through shared memory while there is room, and through pipes when it is full: a container with 64 MB of
    it is slower, and gives the same batches.

    Args:
        dataset: Picklable.
        num_workers: Processes; 0 works in this one.
        collate: Makes a batch of a list of items; by default their tensors are stacked.
        options: Of :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        num_workers: int,
        collate: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        collate = collate or _stacked
        if num_workers:
            collate, options = _Sharing(collate), {"worker_init_fn": _without_tracebacks, **options}
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=num_workers,
            collate_fn=collate,
            generator=torch.Generator(),  # or it would take its seed from the global generator
            **options,
        )

    @property
    def keeps_workers(self) -> bool:
        """Whether workers serve one iteration after the other."""
        return self._loader.persistent_workers

    def __iter__(self) -> Iterator[Any]:
        """Iterate over batches."""
        watched = _Watched(self._loader)
        kept = self.keeps_workers  # also where this iteration is left early
        try:
            for batch in watched:
                yield _mapped(batch, _Piped, lambda piped: torch.from_numpy(piped.values))
        except (RuntimeError, EOFError, OSError, DataError) as error:
            kept = False
            words = _words(watched.hang or error)
            if not self._loader.num_workers or words is None:
                raise
            if not str(error).startswith("Caught"):
                with suppress(RuntimeError):  # torch's signal handler says it too, wherever the program then is
                    time.sleep(_SIGNAL_SECONDS)
            raise DataError(words) from error
        finally:
            watched.stop(end_workers=not kept)


class _Watched:
    """Batches of a loader, whose workers are killed when they give none in time.

    torch's own timeout does not end the workers, one that is stopped (SIGSTOP) or waits for a disk is then joined for
    ever at the end of the program, and once a worker has begun to hand over a tensor nothing times out.
    """

    hang: RuntimeError | None = None

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._iterator: Any = loader._iterator  # torch's, of the iteration before where workers are kept
        self._waits = 0  # an odd number while one goes on
        self._stopped = threading.Event()
        if loader.num_workers:
            threading.Thread(target=self._watch, args=(_TIMEOUT,), daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        with self._waiting():  # for workers that were kept, until they have answered
            batches = iter(self._loader)
        if self._loader.num_workers:
            self._iterator = batches
            _iterators.add(batches)
        while True:
            with self._waiting():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits += 1
        try:
            yield
        finally:
            self._waits += 1

    def _watch(self, seconds: float) -> None:
        # Ticks are counted and not time, which goes on while the whole program is stopped.
        seen, ticks = 0, 0
        while not self._stopped.wait(seconds / _TICKS):
            ticks = ticks + 1 if self._waits == seen and seen % 2 else 0
            seen = self._waits
            if ticks >= _TICKS:
                self.hang = RuntimeError(f"DataLoader timed out after {seconds} seconds")
                # The loader notices, by a signal or a lost connection. A signal handler runs in the main thread only,
                # so it cannot interrupt this one.
                for worker in self._iterator._workers if self._iterator else ():
                    worker.kill()
                return

    def stop(self, *, end_workers: bool) -> None:
        """End watching, and the workers."""
        self._stopped.set()
        if end_workers and self._iterator is not None:
            _end_workers(self._iterator)
            self._loader._iterator = None


# Iterators whose workers may run.
_iterators: WeakSet[Any] = WeakSet()
_END = object()


def _end_workers(batches: Any) -> None:
    """End the worker processes of an iterator, also those that hear no SIGTERM."""
    if (thread := getattr(batches, "_pin_memory_thread", None)) is not None:
        # It waits for ever for the rest of a message whose worker was killed, and torch for it.
        thread.join = partial(type(thread).join, thread, _KILL_SECONDS)
    batches._shutdown_workers()  # asks them to end, and torch's signal handler to accept that they do
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()
            worker.join(_KILL_SECONDS)


@atexit.register  # runs before multiprocessing waits for its processes, as it is registered later
def _end_all_workers() -> None:
    for batches in list(_iterators):
        _end_workers(batches)


def _without_tracebacks(_: int) -> None:
    """In a worker process: errors of decoding go to the command, which has one line for them.

    What else raises here is the thread that hands over shared memory, when the command has ended meanwhile.
    """
    sys.excepthook = lambda *_: None


def _stacked(items: Sequence[Any]) -> Any:
    """Tensors and numbers, also in tuples, as batches; torch's own needs shared memory already for this."""
    first = items[0]
    if isinstance(first, Tensor):
        return torch.stack(list(items))
    if isinstance(first, tuple):
        columns = [_stacked(column) for column in zip(*items, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else tuple(columns)
    return torch.tensor(items) if isinstance(first, (int, float)) else list(items)


class _Piped(NamedTuple):
    """A tensor for which shared memory had no room."""

    values: npt.NDArray[Any]


class _Sharing:
    """Collates, and moves tensors into shared memory at once.

    torch would do it later, in a thread that loses the batch when there is no room, and the command waits for ever.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, items: Any) -> Any:
        return _mapped(self._collate(items), Tensor, _shared)


def _shared(tensor: Tensor) -> Tensor | _Piped:
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError:  # "unable to allocate shared memory"
        return _Piped(np.asarray(tensor))
    return tensor


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A nested value with all parts of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(each, kind, change) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, kind, change) for each in value)
    return value


def _words(error: Exception) -> str | None:
    """What happened in a worker process, or to it; ``None`` where the error is of no worker."""
    lines = str(error).strip().splitlines() or [""]
    if lines[0].startswith("Caught"):  # with the worker's whole traceback, whose last line is the error
        known = isinstance(error, (DataError, OSError))
        return lines[-1].partition(": ")[2] if known else None
    if isinstance(error, RuntimeError):
        found = explained(error)
        return None if found is None else found[0]
    if isinstance(error, DataError):
        return None
    # A batch of a process that ended cannot be fetched any more, which shows before the loader notices the end.
    ended = explained(RuntimeError(f"DataLoader worker: {type(error).__name__}: {lines[0]}"))
    return None if ended is None else ended[0]
