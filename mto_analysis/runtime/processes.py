"""The processes of a launcher (``torchrun``, ``accelerate launch``): which one this is, and work that fails together.

All processes of a run take the same steps. Values pass between them only in :meth:`Processes.exchange`, in which an
error takes the place of a value: so no process waits for one that has failed, and one line says what happened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from mto_analysis.errors import MTOAnalysisError

__all__ = ["OtherProcessError", "Processes", "in_step", "is_lost_connection", "this_process"]

Value = TypeVar("Value")

# The names of torchrun (and accelerate on GPUs), then those of the MPI launchers that accelerate uses on CPUs.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")

# A process may have much more to do than another (a checkpoint to fetch); one that died is noticed at once.
_PATIENCE = timedelta(days=7)


class OtherProcessError(MTOAnalysisError):
    """Another process of the run failed; the message names it, and the exit code is that of its error."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class _Failure:
    """What takes the place of a value; pickled, so it holds words only."""

    words: str
    exit_code: int


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; without a launcher it is the only one.

    Args:
        rank: Its number.
        count: How many there are.
        local_rank: Its number on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank must be from 0 to {self.count - 1}, got {self.rank}")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Value], unit: int = 1) -> Sequence[Value]:
        """This process's part of a sequence: whole units in a row, so that parts in order of rank are the sequence.

        Example:
            >>> [list(Processes(rank, 2).share(range(7), unit=2)) for rank in range(2)]
            [[0, 1, 2, 3], [4, 5, 6]]
        """
        units = -(-len(items) // unit)
        start, end = (unit * (units * rank // self.count) for rank in (self.rank, self.rank + 1))
        return items[start:end]

    def exchange(self, value: Value) -> list[Value]:
        """The values of all processes, by rank; every process must call it.

        Raises:
            OtherProcessError: If another process failed instead, or ended without a word.
        """
        if self.count == 1:
            return [value]
        found = _all_gather(value)
        for rank, each in enumerate(found):
            if isinstance(each, _Failure):
                raise OtherProcessError(f"process {rank} of {self.count}: {each.words}", each.exit_code)
        return found

    def on_main(self, call: Callable[[], object]) -> None:
        """Do something in the main process alone; the others wait, and fail where it fails."""
        if self.main:
            call()
        self.exchange(None)


def this_process() -> Processes:
    """Which process this is, from what the launcher says in the environment."""

    def number(names: tuple[str, ...], default: int) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), default)

    rank, count = number(_RANK, 0), number(_COUNT, 1)
    return Processes(rank, count, number(_LOCAL_RANK, rank)) if count > 1 else Processes()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process is gone, as gloo and NCCL say it."""
    words = str(error).lower()
    return any(each in words for each in ("connection closed", "connection reset", "broken pipe", "gloo", "nccl"))


def _all_gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, value)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise OtherProcessError("another process ended without a word (killed, or out of memory?)") from error
    return found


def _explain(error: BaseException) -> tuple[str, int]:
    return f"{type(error).__name__}: {error}", 1


@contextmanager
def in_step(explain: Callable[[BaseException], tuple[str, int] | None] = lambda error: None) -> Iterator[Processes]:
    """Run the same steps in every process of the launcher; the first failure of any ends all of them.

    Inside, processes meet only in :meth:`Processes.exchange`. A process that fails goes to the meeting that the others
    are at or will come to, and hands over its error instead of a value.

    Args:
        explain: An error as one line and an exit code, or ``None`` for one that is a mistake in the program.
    """
    here = this_process()
    if here.count == 1:
        yield here
        return
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    # Objects travel between CPUs, also where models are on GPUs.
    dist.init_process_group("gloo", rank=here.rank, world_size=here.count, timeout=_PATIENCE)
    try:
        yield here
    except OtherProcessError:  # all have met, so all know
        raise
    except Exception as error:
        with suppress(OtherProcessError):
            _all_gather(_Failure(*(explain(error) or _explain(error))))
        raise
    else:
        here.exchange(None)
    finally:
        # After Ctrl-C there is no last meeting: closed connections tell the others.
        dist.destroy_process_group()
