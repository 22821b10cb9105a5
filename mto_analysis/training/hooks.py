"""Hooks that follow a stack of blocks through a training forward of somebody else's model, and only there."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mto_analysis.training.structures import StackSpec

__all__ = ["COLLAPSED", "Attached", "CollapseWarning", "StackForward", "recomputing", "warn_of"]

#: In nats: below this H of every layer, its gradients are gone.
COLLAPSED = 1e-4


class CollapseWarning(UserWarning):
    """A term is not finite, L_spa is dead, or heterogeneity has collapsed; the message names term and step."""


class StackForward:
    """What one stack shows in the running forward: its mask, and tokens one layer depth at a time."""

    def __init__(self, spec: StackSpec) -> None:
        self.spec = spec
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.mask: Tensor | None = None
        self._counts = (0, 0)  # the least and the greatest number of masked patches of an image
        self._images: Tensor | None = None  # those with a masked and a visible patch, where not all have both

    def start(self, tokens: Tensor) -> None:
        """The first block's input: find the mask, and take layer depth 0."""
        mask = self.spec.find_mask(tokens[:, self.spec.prefix_tokens :])
        num_masked = mask.sum(dim=1).tolist()  # the one wait for the device of a forward
        mixed = [image for image, count in enumerate(num_masked) if 0 < count < mask.shape[1]]
        if mixed:  # else it is evaluation code, a teacher or fine-tuning
            self._counts = min(num_masked[image] for image in mixed), max(num_masked[image] for image in mixed)
            self._images = None
            if len(mixed) < len(num_masked):
                self._images = torch.tensor(mixed, device=mask.device)
                mask = mask.index_select(0, self._images)
            self.mask = mask
            self.take(0, tokens)

    def take(self, depth: int, tokens: Tensor) -> None:
        """A block's output, or at depth 0 the first block's input."""
        raise NotImplementedError

    def images(self, tokens: Tensor) -> Tensor:
        """The tokens of those images that have a masked and a visible patch; of the others nothing can be measured."""
        return tokens if self._images is None else tokens.index_select(0, self._images)

    def mask_for(self, count: int) -> tuple[Tensor, tuple[int, int]]:
        """The mask on a grid of ``count`` patches, and the least and greatest number of masked patches of an image.

        Swin joins 2 x 2 tokens, masked or visible together.
        """
        if self.mask is None:
            raise RuntimeError("the forward has no mask")
        fine = self.mask.shape[1]
        if count == fine:
            return self.mask, self._counts
        side, coarse = math.isqrt(fine), math.isqrt(count)
        if side * side != fine or coarse * coarse != count or side % coarse:
            raise RuntimeError(f"{self.spec.name} goes from {fine} to {count} tokens, which is no merging of cells")
        cell = side // coarse
        cells = self.mask.reshape(-1, coarse, cell, coarse, cell).transpose(2, 3).flatten(3)
        if not bool((cells.all(-1) == cells.any(-1)).all()):
            raise RuntimeError(f"the mask cuts through merged tokens; use mask units of at least {cell} tokens")
        fewest, most = self._counts
        return cells.all(-1).flatten(1), (fewest // cell**2, most // cell**2)


class Attached:
    """Hooks on a model that tell what its stacks do in a training forward, and only there."""

    def __init__(self, model: nn.Module, forwards: Sequence[StackForward]) -> None:
        self.step = 0
        self._forwards = list(forwards)
        # What the model-level hook saw; None outside the model's own call (Lightning calls training_step instead).
        self._recording: bool | None = None
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, model, "_model_starts"), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Hook(self, model, "_model_ends"), with_kwargs=True, always_call=True),
        ]
        for stack, forward in enumerate(self._forwards):
            first = forward.spec.blocks[0]
            starts = _Hook(self, first, "_block_starts", stack)
            self._handles.append(first.register_forward_pre_hook(starts, with_kwargs=True))
            for depth, block in enumerate(forward.spec.blocks, start=1):
                ends = _Hook(self, block, "_block_ends", stack, depth)
                self._handles.append(block.register_forward_hook(ends, with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the model (an EMA) has nothing attached."""
        return self

    def detach(self) -> None:
        """Remove every hook; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for forward in self._forwards:
            forward.clear()

    def _due(self) -> bool:
        return True

    def _model_starts(self, module: nn.Module, *_: Any) -> None:
        self._recording = module.training and torch.is_grad_enabled()
        for forward in self._forwards:
            forward.clear()

    def _model_ends(self, *_: Any) -> None:
        self._recording = None

    def _block_starts(self, stack: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if recomputing():
            return
        self._forwards[stack].clear()
        if self._records(module) and self._due():
            self._forwards[stack].start(args[0] if args else kwargs["hidden_states"])

    def _records(self, module: nn.Module) -> bool:
        # Gradients are off inside a block that is checkpointed (reentrant), so the model's own call is asked first.
        return module.training and torch.is_grad_enabled() if self._recording is None else self._recording

    def _block_ends(
        self, stack: int, depth: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if self._forwards[stack].mask is not None and not recomputing():
            self._forwards[stack].take(depth, output[0] if isinstance(output, tuple) else output)


def recomputing() -> bool:
    """Whether activation checkpointing is running a block again inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def warn_of(message: str) -> None:
    """Warn the user whose line asked for the loss."""
    warnings.warn(message, CollapseWarning, stacklevel=4)


class _Hook:
    """A hook that keeps neither the handle nor the model alive, and that copies and pickles of a model do not have."""

    def __init__(self, attached: Attached, module: nn.Module, method: str, *bound: int) -> None:
        self._handle, self._owner = weakref.ref(attached), weakref.ref(module)
        self._method, self._bound = method, bound

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, called: nn.Module, *arguments: Any) -> None:
        """Tell the handle, unless a copy of the module was called."""
        target = self._handle()
        if target is not None and self._owner() is called:
            getattr(target, self._method)(*self._bound, called, *arguments)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """In a copy of the model the hook is empty."""
        return _empty_hook, ()


def _empty_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    pass
