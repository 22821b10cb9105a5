"""The processes of a launcher (``torchrun``, ``accelerate launch``): which one this is, and what they do together.

All processes of a run take the same steps and meet in the collective calls of :class:`Processes`. One that fails leaves
its reason in the launcher's store before its connections close, so the others, whichever call they are waiting in, end
with that reason instead of their own lost connection, and one line says what happened.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from mto_analysis.errors import MTOAnalysisError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Value = TypeVar("Value")

# The names of torchrun (and accelerate on GPUs), then those of the MPI launchers that accelerate uses on CPUs.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")

# A process may have much more to do than another (a checkpoint to fetch, an evaluation); one that died is noticed at
# once, by its closed connections.
_TIMEOUT = timedelta(days=1)
# For the store, which answers in milliseconds unless its host is gone.
_STORE_TIMEOUT = timedelta(seconds=10)


class OtherProcessError(MTOAnalysisError):
    """Another process of the run failed; the message names it, and the exit code is that of its error."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; without a launcher it is the only one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    device_name: str = "cpu"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.rank < self.count:
            raise ValueError(f"rank must be from 0 to {self.count - 1}, got {self.rank}")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where its models are."""
        import torch

        return torch.device(self.device_name)

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
        """The values of all processes, by rank; a collective call."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self._meeting() as dist:
            dist.all_gather_object(found, value)
        return found

    def shared(self, value: Value) -> Value:
        """What the main process has; a collective call."""
        return self.exchange(value if self.main else None)[0]  # type: ignore[return-value]

    def on_main(self, call: Callable[[], object]) -> None:
        """Do something in the main process alone, while the others wait; a collective call."""
        if self.main:
            call()
        self.wait()

    def wait(self) -> None:
        """Until all processes are here; a collective call."""
        self.exchange(None)

    def spread(self, tensor: Tensor) -> None:
        """Give a tensor the values of the main process, in place; a collective call."""
        if self.count > 1:
            with self._meeting() as dist:
                dist.broadcast(tensor, src=0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place, on the device; a collective call."""
        if self.count > 1:
            with self._meeting() as dist:
                dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, on the CPU in float64; a collective call."""
        import torch

        values = values.to(self.device, torch.float64 if self.device.type != "mps" else torch.float32)
        return (self.sum(values) / self.count).cpu().double()

    def parallel(self, module: nn.Module, *, unused: bool) -> nn.Module:
        """The module with gradients averaged over the processes.

        Args:
            module: On this process's device.
            unused: Whether some of its parameters take no part in its forward.
        """
        from torch.nn.parallel import DistributedDataParallel

        options: dict[str, Any] = {"find_unused_parameters": unused}
        known = inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        own = [self.device.index] if self.device.type == "cuda" else None
        with self._meeting():
            return DistributedDataParallel(module, device_ids=own, **options)

    @contextmanager
    def _meeting(self) -> Iterator[Any]:
        """Where processes meet: connected, and with the reason of another one that is gone."""
        import torch.distributed as dist

        self.connect()
        try:
            yield dist
        except RuntimeError as error:
            if not _is_lost_connection(error):
                raise
            raise _reason_of_other() from error

    def connect(self) -> None:
        """Meet the other processes, once; a collective call."""
        if self.count == 1:
            return
        from accelerate.state import PartialState  # it reads what the launcher left in the environment

        # What torchrun says already, and MPI by other names.
        names = {"RANK": self.rank, "WORLD_SIZE": self.count, "LOCAL_RANK": self.local_rank}
        for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
            os.environ.setdefault(name, str(value))
        cpu = self.device.type != "cuda"
        # Objects travel between CPUs, also where models are on GPUs.
        backend = {} if cpu else {"backend": "cuda:nccl,cpu:gloo"}
        PartialState(cpu=cpu, timeout=_TIMEOUT, **backend)


def this_process(device: str | None = None) -> Processes:
    """Which process this is, from what the launcher says in the environment.

    Args:
        device: Where its models are to be, ``auto`` for CUDA where there is one; each process gets its own GPU.
    """

    def number(names: tuple[str, ...], default: int) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), default)

    rank, count = number(_RANK, 0), number(_COUNT, 1)
    here = Processes(rank, count, number(_LOCAL_RANK, rank)) if count > 1 else Processes()
    return here if device is None else replace(here, device_name=_device_name(here, device))


def pick_device(name: str) -> str:
    """``auto`` is CUDA if there is one, else the CPU; MPS is taken only when asked for, as it can be silently wrong.

    Under a launcher, CUDA is this process's own GPU.
    """
    return this_process(name).device_name


def _device_name(here: Processes, name: str) -> str:
    import torch

    auto = name == "auto"
    if auto:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and here.count > 1 and torch.cuda.is_available():
        name = f"cuda:{here.local_rank % torch.cuda.device_count()}"
    if auto:
        return name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = re.fullmatch(r"[a-z]+(:\d+)?", name) and name.partition(":")[0] in ("cpu", "cuda", "mps")
        reason = re.split(r"(?<=\w)\. |\n", str(error))[0] if known else "give auto, cpu, cuda, cuda:N or mps"
        raise ValueError(f"device {name} cannot be used: {reason}") from error
    return str(device)


@contextmanager
def failing_together(
    explain: Callable[[BaseException], tuple[str, int] | None] = lambda error: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[None]:
    """Run the same steps in every process of the launcher; the first failure of any ends all of them.

    Args:
        explain: An error as one line and an exit code, or ``None`` for one that is a mistake in the program.
        say: Takes the line of the first failure, in the process where it happened.
    """
    here = this_process()
    if here.count == 1:
        yield
        return
    try:
        yield
        if is_connected():
            here.wait()  # nobody has succeeded before all have
    except (Exception, KeyboardInterrupt) as error:
        lost = isinstance(error, RuntimeError) and _is_lost_connection(error)
        reason = _reason_of_other() if lost else error
        first = _hand_over(here, reason, explain(reason), say)
        if first is not None:
            raise first from error
        if reason is not error:
            raise reason from error
        raise


def _hand_over(
    here: Processes, error: BaseException, found: tuple[str, int] | None, say: Callable[[str], None]
) -> OtherProcessError | None:
    """Leave the reason of a failure for the others, and say it; or what another process failed with before."""
    words, code = found or (f"{type(error).__name__}: {error}", 1)
    named = here.main or isinstance(error, OtherProcessError)
    line = words if named else f"process {here.rank} of {here.count}: {words}"
    # A RuntimeError if the store's host, a process of the run with some launchers, is gone: then this one speaks too.
    with suppress(RuntimeError):
        store = _store()
        if store is not None and store.add("failures", 1) > 1:
            store.wait(["said"], _STORE_TIMEOUT)  # or the launcher might end the other process before it has spoken
            return _reason_of_other()
        if store is not None:
            store.set("reason", json.dumps([here.rank, here.count, words, code]))
            say(line)
            store.set("said", "")
            return None
    say(line)
    return None


def _reason_of_other() -> OtherProcessError:
    """Why the process that failed first did."""
    with suppress(RuntimeError):
        store = _store()
        if store is not None and store.check(["reason"]):
            rank, count, words, code = json.loads(store.get("reason"))
            return OtherProcessError(f"process {rank} of {count}: {words}", code)
    return OtherProcessError("another process ended without a word (killed, or out of memory?)")


def _store() -> Any:
    """Key-value pairs of this start of the run, in the launcher (torchrun) or in the main process; ``None`` without."""
    if not os.environ.get("MASTER_PORT", "").isdecimal():
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ["MASTER_PORT"])
    start = [os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT")]
    return PrefixStore("/".join(["mto-analyze", *start]), TCPStore(host, port, timeout=_STORE_TIMEOUT))


def is_connected() -> bool:
    """Whether this process has met the others of its run."""
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    return dist is not None and dist.is_available() and dist.is_initialized()


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process is gone, as gloo and NCCL say it."""
    words = str(error).lower()
    return any(each in words for each in ("connection closed", "connection reset", "broken pipe", "gloo", "nccl"))
