"""Hooks that follow a stack of blocks through a training forward of somebody else's model, and only there."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mto_analysis.taps.structures import StackSpec

__all__ = ["COLLAPSED", "Attached", "CollapseWarning", "StackForward", "recomputing", "warn_of"]

#: In nats: below this H of every layer, its gradients are gone.
COLLAPSED = 1e-4


class CollapseWarning(UserWarning):
    """A term is not finite, L_spa is dead, or heterogeneity has collapsed; the message names term and step."""


def _is_far(mask: Tensor) -> bool:
    """Whether to ask for a value is to wait for a device."""
    return mask.is_cuda


class _Coming:
    """A mask on its way from a CUDA device to the CPU."""

    def __init__(self, mask: Tensor) -> None:
        self._copy = mask.to("cpu", non_blocking=True)
        self._here = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._here.record(torch.cuda.current_stream(mask.device))

    def wait(self) -> Tensor:
        """The mask, as soon as it is here."""
        self._here.synchronize()
        return self._copy


class StackForward:
    """What one stack shows in the running forward: its mask, and tokens one layer depth at a time.

    How many patches of an image are masked decides on the shapes of what is computed, and to ask a CUDA device for it
    is to wait for all that it still has to do. Where every image of a forward had the same number, the next one may be
    assumed to have it too; :meth:`settle` looks at the end, when the device has gone past it.
    """

    def __init__(self, spec: StackSpec, *, may_assume: bool = False) -> None:
        self.spec = spec
        self._may_assume = may_assume
        self._usual: tuple[int, int] | None = None  # patches, and masked ones, of every image of the last forward
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.mask: Tensor | None = None
        self._counts = (0, 0)  # the least and the greatest number of masked patches of an image
        self._images: Tensor | None = None  # those with a masked and a visible patch, where not all have both
        self._on_cpu: Tensor | None = None  # the mask
        self._coming: _Coming | None = None  # the same, where counts are assumed
        self._merged: set[int] = set()  # greater numbers of patches in a cell

    @property
    def assuming(self) -> bool:
        """Whether counts are assumed, and not yet settled."""
        return self._coming is not None

    def start(self, tokens: Tensor) -> None:
        """The first block's input: find the mask, and take layer depth 0."""
        mask = self.spec.find_mask(tokens[:, self.spec.prefix_tokens :])
        usual = self._usual if self._may_assume and _is_far(mask) else None
        if usual is not None and usual[0] == mask.shape[1]:
            self.mask, self._counts, self._coming = mask, (usual[1], usual[1]), _Coming(mask)
        else:
            self._look(mask, mask.cpu())
        if self.mask is not None:
            self.take(0, tokens)

    def settle(self) -> bool:
        """Look at the mask itself where counts were assumed, and say whether they are right."""
        if self.mask is None or self._coming is None:
            return True
        assumed, on_cpu, self._coming = self._counts, self._coming.wait(), None
        self._look(self.mask, on_cpu)
        right = self.mask is not None and self._images is None and self._counts == assumed
        if right:
            for cell in self._merged:
                self._check_cells(cell)
        else:
            self._may_assume = False
        return right

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
        self._merged.add(cell)
        if not self.assuming:
            self._check_cells(cell)
        fewest, most = self._counts
        return _cells(self.mask, cell).all(-1).flatten(1), (fewest // cell**2, most // cell**2)

    def _look(self, mask: Tensor, on_cpu: Tensor) -> None:
        """Which images of a mask can be measured, and how many patches of each are masked."""
        self.mask, self._usual = None, None
        num_masked = on_cpu.sum(dim=1).tolist()
        mixed = [image for image, count in enumerate(num_masked) if 0 < count < mask.shape[1]]
        if not mixed:  # evaluation code, a teacher or fine-tuning
            return
        self._counts = min(num_masked[image] for image in mixed), max(num_masked[image] for image in mixed)
        if len(mixed) < len(num_masked):
            self._images = torch.tensor(mixed, device=mask.device)
            mask, on_cpu = mask.index_select(0, self._images), on_cpu[mixed]
        elif self._counts[0] == self._counts[1]:
            self._usual = mask.shape[1], self._counts[0]
        self.mask, self._on_cpu = mask, on_cpu

    def _check_cells(self, cell: int) -> None:
        """Whether merged tokens are masked or visible together."""
        if self._on_cpu is not None:
            cells = _cells(self._on_cpu, cell)
            if not torch.equal(cells.all(-1), cells.any(-1)):
                raise RuntimeError(f"the mask cuts through merged tokens; use mask units of at least {cell} tokens")


def _cells(mask: Tensor, cell: int) -> Tensor:
    """A square mask in cells of ``cell`` x ``cell`` patches: ``batch side side cell * cell``."""
    coarse = math.isqrt(mask.shape[1]) // cell
    return mask.reshape(-1, coarse, cell, coarse, cell).transpose(2, 3).flatten(3)


class Attached:
    """Hooks on a model that tell what its stacks do in a training forward, and only there."""

    def __init__(self, model: nn.Module, forwards: Sequence[StackForward]) -> None:
        self.step = 0
        self._forwards = list(forwards)
        # What the model-level hook saw; None outside the model's own call (Lightning calls training_step instead).
        self._recording: bool | None = None
        self._handles = [
            model.register_forward_pre_hook(
                _Hook(self, model, lambda handle, *seen: handle._model_starts(*seen)), with_kwargs=True, prepend=True
            ),
            model.register_forward_hook(
                _Hook(self, model, lambda handle, *seen: handle._model_ends(*seen)), with_kwargs=True, always_call=True
            ),
        ]
        for stack, forward in enumerate(self._forwards):
            first = forward.spec.blocks[0]
            starts = _Hook(self, first, lambda handle, *seen, at=stack: handle._block_starts(at, *seen))
            self._handles.append(first.register_forward_pre_hook(starts, with_kwargs=True))
            for depth, block in enumerate(forward.spec.blocks, start=1):
                ends = _Hook(self, block, lambda handle, *seen, at=(stack, depth): handle._block_ends(*at, *seen))
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

    def __init__(self, attached: Attached, module: nn.Module, tell: Callable[..., None]) -> None:
        self._handle, self._owner = weakref.ref(attached), weakref.ref(module)
        self._tell = tell  # gets the handle at each call, as it must not keep it

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, called: nn.Module, *arguments: Any) -> None:
        """Tell the handle, unless a copy of the module was called."""
        target = self._handle()
        if target is not None and self._owner() is called:
            self._tell(target, called, *arguments)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """In a copy of the model the hook is empty."""
        return _empty_hook, ()


def _empty_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*arguments: Any) -> None:
    pass
