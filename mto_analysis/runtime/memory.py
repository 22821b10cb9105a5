"""Memory that results pass through: used again and again, and taken from the system where it is kept."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lasting_memory(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Memory for what is kept while a model runs.

    On a CPU it is taken from the system itself: an allocator would put it into a gap between the model's own tensors,
    which would then find no room there the next time.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(size, 1) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return torch.frombuffer(memory, dtype=dtype)[:size].view(shape)


def write_to(out: Tensor, function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    """``function(*inputs, out=out)``, also where ``torch.compile`` takes no ``out`` whose entries have gaps."""
    if torch.compiler.is_compiling():
        return out.copy_(function(*inputs, **options))
    return function(*inputs, out=out, **options)


class Scratch:
    """Memory for passing results, used again and again: on a CPU fresh memory costs as much time as a product."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, use: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory on the device of a tensor, by default in its dtype, but at least float32.

        It is overwritten by the next result of the same use.
        """
        dtype = dtype or torch.promote_types(like.dtype, torch.float32)
        # Elsewhere allocators keep memory themselves, and so does the code that torch.compile makes.
        if like.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=like.device)
        size = math.prod(shape)
        kept = self._kept.get((use, dtype))
        if kept is None or len(kept) < size:
            kept = self._kept[use, dtype] = lasting_memory(size, dtype=dtype)
        return kept[:size].view(shape)
