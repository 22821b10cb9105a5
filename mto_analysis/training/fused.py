"""Where kernels of our own take the place of torch's operators in the losses: on CUDA devices, where Triton is there.

They give the values and gradients of the plain path, which does the work wherever they cannot: on other devices, in
float64, and after a kernel failed to compile or to start, which is told once.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from mto_analysis.training.entropies import SortedMask
    from mto_analysis.training.losses import MTOConfig

__all__ = ["attempt", "fused_entropies", "fused_terms", "kernels_for", "plain_path", "term_kernels_for"]

_T = TypeVar("_T")

# Triton's interpreter runs kernels on a CPU, slowly: for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_switch = {"on": os.environ.get("MTO_KERNELS", "1") != "0", "failed": False}


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
    return _load(tensor.device, "kernels") if _usable(tensor) else None


def term_kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels around the entropies, if they can take what lies on the device of a tensor."""
    return _load(tensor.device, "term_kernels") if _usable(tensor) else None


def _usable(tensor: Tensor) -> bool:
    return _switch["on"] and not _switch["failed"] and (tensor.is_cuda or _INTERPRETED)


@functools.cache
def _load(device: torch.device, name: str) -> ModuleType | None:
    if device.type == "cuda" and (torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0)):
        return None
    try:
        return importlib.import_module(f"mto_analysis.training.{name}")
    except Exception:  # not installed, or no version that fits
        return None


def attempt(work: Callable[[], _T]) -> _T | None:
    """Work with kernels, or None where they fail: then they are left alone from now on."""
    if _switch["failed"]:  # after the forward pass, perhaps
        return None
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _switch["failed"] = True
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


class FusedTerms(torch.autograd.Function):
    """Weighted loss, L_spa, L_e and L_r: layers batch, batch -> four scalars. ``plain`` as above."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        spread: Tensor | None,
        split: SortedMask,
        config: MTOConfig,
        factor: float,
        kernels: ModuleType,
        plain: Callable[[Sequence[Tensor], Tensor | None], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rest = split.num_masked, split.num_patches, config, factor
        ctx.kernels, ctx.plain = kernels, plain
        ctx.save_for_backward(h, spread)
        terms: tuple[Tensor, ...] = kernels.forward_terms(h, spread, *ctx.rest)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        h, spread = ctx.saved_tensors
        *rest, factor = ctx.rest

        def work() -> tuple[Tensor, Tensor | None]:
            by_loss, *by_terms = given
            if by_loss is not None and not any(each is not None for each in by_terms):
                found: tuple[Tensor, Tensor | None] = ctx.kernels.backward_terms(by_loss, h, spread, *rest, factor)
                return found
            config = rest[-1]
            weights = (config.sparsity_weight, config.embedding_weight, config.ranking_weight)
            by = [h.new_zeros(()) if each is None else each for each in by_terms]
            if by_loss is not None:
                by = [each + factor * weight * by_loss for each, weight in zip(by, weights, strict=True)]
            found = ctx.kernels.backward_terms(torch.stack(by), h, spread, *rest, None)
            return found

        gradients = attempt(work)
        if gradients is None:
            leaves = [each.detach().requires_grad_() for each in (h, spread) if each is not None]
            with torch.enable_grad():
                terms = ctx.plain(leaves[0].unbind(), leaves[1] if spread is not None else None)
                total = sum(
                    (term * by for term, by in zip(terms, given, strict=True) if by is not None), h.new_zeros(())
                )
            found = torch.autograd.grad(total, leaves, allow_unused=True)
            gradients = found[0], found[1] if spread is not None else None
        return *gradients, None, None, None, None, None


def fused_terms(
    h: Tensor,
    spread: Tensor | None,
    split: SortedMask,
    config: MTOConfig,
    factor: float,
    plain: Callable[[Sequence[Tensor], Tensor | None], tuple[Tensor, ...]],
) -> tuple[Tensor, ...] | None:
    """Weighted loss, L_spa, L_e and L_r by kernels, or None where these cannot be used.

    Shapes:
        h: layers batch
        spread: batch, or none where L_spa has no weight
        returns: four scalars
    """
    kernels = term_kernels_for(h)
    # Layer depths that are not ranked would get gradients, all 0.
    unranked = config.layers is not None or config.ranking_weight == 0
    if kernels is None or h.dtype != torch.float32 or unranked or not h.numel():
        return None

    def work() -> tuple[Tensor, ...]:
        terms: tuple[Tensor, ...] = FusedTerms.apply(h, spread, split, config, factor, kernels, plain)
        return terms

    return attempt(work)
