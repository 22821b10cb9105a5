"""The device that work is done on, by the name a user gives."""

from __future__ import annotations

import torch

from mto_analysis.runtime.processes import this_process

__all__ = ["pick_device"]


def pick_device(name: str) -> str:
    """``auto`` is CUDA if there is one, else the CPU; MPS is taken only when asked for, as it can be silently wrong.

    Under a launcher, ``auto`` and ``cuda`` are this process's own GPU.

    Raises:
        ValueError: If the device is unknown or not there.
    """
    if name == "auto":
        return _own_gpu() if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(_own_gpu() if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return str(device)


def _own_gpu() -> str:
    here = this_process()
    return f"cuda:{here.local_rank % torch.cuda.device_count()}" if here.count > 1 else "cuda"
