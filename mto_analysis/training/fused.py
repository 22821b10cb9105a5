"""Where kernels of our own take the place of torch's operators in the losses: on CUDA devices, where Triton is there.

They give the values and gradients of the plain path, which does the work wherever they cannot: on other devices, in
float64, and after a kernel failed to compile or to start, which is told once.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from mto_analysis.training.entropies import SortedMask

__all__ = ["attempt", "fused_entropies", "kernels_for", "plain_path"]

_T = TypeVar("_T")

# Triton's interpreter runs kernels on a CPU, slowly: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_switch = {"on": os.environ.get("MTO_KERNELS", "1") != "0"}


@contextmanager
def plain_path() -> Iterator[None]:
    """Without kernels; the environment variable ``MTO_KERNELS=0`` does it for a whole process."""
    before, _switch["on"] = _switch["on"], False
    try:
        yield
    finally:
        _switch["on"] = before


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels, if they can take what lies on the device of a tensor."""
    if not _switch["on"] or not (tensor.is_cuda or _INTERPRETED):
        return None
    return _load(tensor.device)


@functools.cache
def _load(device: torch.device) -> ModuleType | None:
    if device.type == "cuda" and (torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    try:
        from mto_analysis.training import kernels
    except Exception:  # not installed, or no version that fits
        return None
    return kernels


def attempt(work: Callable[[], _T]) -> _T | None:
    """Work with kernels, or None where they fail: then they are left alone from now on."""
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _switch["on"] = False
        reason = next(iter(str(error).strip().splitlines()), "")
        warnings.warn(
            f"CUDA kernels of the MTO losses do not run here, torch's operators do ({type(error).__name__}: {reason})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class FusedEntropies(torch.autograd.Function):
    """H of Eq. (2), and the sum over visible rows of Eq. (3) unless ``include_self`` is None: tokens -> batch, batch.

    ``plain`` makes the same of tokens, for the gradient, should the kernel of the backward pass fail.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        split: SortedMask,
        include_self: bool | None,
        kernels: ModuleType,
        plain: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> Tensor | tuple[Tensor, ...]:
        h, spread, kept = kernels.forward_entropies(tokens, split, include_self)
        ctx.split, ctx.include_self, ctx.kernels, ctx.plain = split, include_self, kernels, plain
        ctx.save_for_backward(tokens, *kept)
        return h if spread is None else (h, spread)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_h: Tensor, by_spread: Tensor | None = None
    ) -> tuple[Tensor | None, None, None, None, None]:
        tokens, *kept = ctx.saved_tensors
        if ctx.include_self is None:
            by_spread = None
        gradient = attempt(
            lambda: ctx.kernels.backward_entropies(tokens, ctx.split, ctx.include_self, kept, by_h, by_spread)
        )
        if gradient is None:
            with torch.enable_grad():
                leaf = tokens.detach().requires_grad_()
                values = ctx.plain(leaf)
            given = (by_h,) if by_spread is None else (by_h, by_spread)
            (gradient,) = torch.autograd.grad(values, leaf, given)
        return gradient, None, None, None, None


def fused_entropies(
    tokens: Tensor, split: SortedMask, include_self: bool | None, plain: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...] | None:
    """The entropies by kernels, or None where these cannot be used.

    Shapes:
        tokens: batch num_tokens dim
        returns: batch, and batch unless ``include_self`` is None
    """
    kernels = kernels_for(tokens)
    if kernels is None or tokens.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not tokens.numel():
        return None
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()

    def work() -> tuple[Tensor, ...]:
        found = FusedEntropies.apply(tokens, split, include_self, kernels, plain)
        return (found,) if isinstance(found, Tensor) else found

    return attempt(work)
