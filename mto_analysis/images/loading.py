"""torch's DataLoader, of whose worker processes none can hang a command or end it with a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_all_start_methods
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mto_analysis.errors import DataError, explained

# Seconds to wait for a batch: decoding takes seconds at most, and a stuck file system or decoder for ever.
_TIMEOUT = 300
# Seconds for the signal of a process's end, which may come after its connection is lost.
_SIGNAL_SECONDS = 0.5

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
            own = {"timeout": _TIMEOUT, "worker_init_fn": _without_tracebacks}
            collate, options = _Sharing(collate), {**own, **options}
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=num_workers,
            collate_fn=collate,
            generator=torch.Generator(),  # or it would take its seed from the global generator
            **options,
        )

    def __iter__(self) -> Iterator[Any]:
        """Iterate over batches."""
        try:
            for batch in self._loader:
                yield _mapped(batch, _Piped, lambda piped: torch.from_numpy(piped.values))
        except (RuntimeError, EOFError, OSError, DataError) as error:
            words = _words(error)
            if not self._loader.num_workers or words is None:
                raise
            if not str(error).startswith("Caught"):
                with suppress(RuntimeError):  # torch's signal handler says it too, wherever the program then is
                    time.sleep(_SIGNAL_SECONDS)
            raise DataError(words) from error


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
