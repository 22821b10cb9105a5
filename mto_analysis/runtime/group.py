"""The processes of a run, as ``torchrun`` or ``accelerate launch`` started them: who this is, and what all agree on."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mto_analysis.runtime.devices import pick_device
from mto_analysis.runtime.processes import this_process

__all__ = ["Group"]

# A linear evaluation on the main process may take long, and the others wait for it.
_PATIENCE = timedelta(hours=6)


class Group:
    """This process among those of the run, and what they compute together; alone where nothing launched several.

    Args:
        device: As in :class:`RunSettings`; each process gets its own GPU.
    """

    def __init__(self, device: str) -> None:
        launched = this_process()
        self.count, self.index = launched.count, launched.rank
        self.device = torch.device(pick_device(device))
        if self.count > 1:
            from accelerate.state import PartialState  # it reads what the launcher left in the environment

            state = PartialState(cpu=self.device.type == "cpu", timeout=_PATIENCE)
            self.count, self.index = state.num_processes, state.process_index
            if self.device.type != "cpu":
                self.device = state.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, on the CPU in float64; a collective call."""
        values = values.to(self.device, torch.float64 if self.device.type != "mps" else torch.float32)
        if self.count > 1:
            torch.distributed.all_reduce(values)
            values = values / self.count
        return values.cpu().double()

    def shared(self, value: Any) -> Any:
        """What the main process has; a collective call."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def spread(self, tensor: Tensor) -> None:
        """Give a tensor the values of the main process, in place; a collective call."""
        if self.count > 1:
            torch.distributed.broadcast(tensor, src=0)

    def parallel(self, module: nn.Module, *, unused: bool) -> nn.Module:
        """The module with gradients averaged over the processes.

        Args:
            module: On this process's device.
            unused: Whether some of its parameters take no part in its forward.
        """
        options: dict[str, Any] = {"find_unused_parameters": unused}
        known = inspect.signature(DistributedDataParallel).parameters
        options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        own = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=own, **options)
