"""Masked token optimisation in a foreign training loop: hooks that collect the terms during the model's own forward."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mto_analysis.training.entropies import SortedMask
from mto_analysis.training.losses import MTOConfig, MTOTerms, combine_terms, layer_entropies
from mto_analysis.training.structures import StackSpec, find_stacks, unwrap

__all__ = ["MTO", "CollapseWarning", "attach_mto"]


class CollapseWarning(UserWarning):
    """A term is not finite, L_spa is dead, or heterogeneity has collapsed; the message names term and step."""


class _Recorder:
    """Entropies of one stack in the running forward.

    Entropies are made in the hook, so that no list of tokens is kept. Inside reentrant activation checkpointing
    gradients are off in the hook; there the block's output object itself is kept, which gets its gradient when the
    checkpoint returns, and its entropy is made when the loss is asked for.
    """

    def __init__(self, spec: StackSpec, config: MTOConfig) -> None:
        self.spec = spec
        self.config = config
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.mask: Tensor | None = None
        self.splits: dict[int, SortedMask] = {}
        self.heterogeneity: dict[int, Tensor] = {}
        self.rows: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def start(self, tokens: Tensor) -> None:
        """The first block's input: find the mask, and take layer depth 0."""
        self.clear()
        patches = tokens[:, self.spec.prefix_tokens :]
        mask = self.spec.find_mask(patches)
        if not bool(mask.any()):
            return  # a forward without masked tokens: evaluation code, a teacher, fine-tuning
        self.mask = mask
        self.take(0, tokens)

    def take(self, depth: int, tokens: Tensor) -> None:
        """A block's output, or at depth 0 the first block's input."""
        if self.mask is None:
            return
        if tokens.requires_grad and torch.is_grad_enabled():
            self.measure(depth, tokens)
        else:
            self.waiting[depth] = tokens

    def measure(self, depth: int, tokens: Tensor) -> None:
        """Entropies of one layer depth."""
        patches = tokens[:, self.spec.prefix_tokens :]
        count = patches.shape[1]
        if count not in self.splits:
            self.splits[count] = SortedMask.of(self._mask_on_grid(count))
        self.heterogeneity[depth], rows = layer_entropies(patches, self.splits[count], depth, self.config)
        if depth == 0:
            self.rows = rows

    def finish(self, step: int) -> MTOTerms:
        """The terms of this stack."""
        for depth, tokens in sorted(self.waiting.items()):
            if not tokens.requires_grad:
                raise RuntimeError(
                    f"tokens of {self.spec.name} at layer depth {depth} have no gradient: the model is frozen there, "
                    "or it checkpoints whole stages with use_reentrant=True; pass use_reentrant=False"
                )
            self.measure(depth, tokens)
        self.waiting.clear()
        depths = range(len(self.spec.blocks) + 1)
        missing = [depth for depth in depths if depth not in self.heterogeneity]
        if missing or self.mask is None:
            raise RuntimeError(f"blocks {missing} of {self.spec.name} did not run; give stacks=... with those that do")
        split = self.splits[self.mask.shape[1]]
        return combine_terms([self.heterogeneity[depth] for depth in depths], self.rows, split, self.config, step=step)

    def _mask_on_grid(self, count: int) -> Tensor:
        """The mask on a coarser token grid: Swin joins 2 x 2 tokens, which must be masked or visible together."""
        if self.mask is None:
            raise RuntimeError("the forward has no mask")
        if count == self.mask.shape[1]:
            return self.mask
        side, coarse = math.isqrt(self.mask.shape[1]), math.isqrt(count)
        if side * side != self.mask.shape[1] or coarse * coarse != count or side % coarse:
            raise RuntimeError(
                f"{self.spec.name} goes from {self.mask.shape[1]} to {count} tokens, which is no merging"
            )
        cell = side // coarse
        cells = self.mask.reshape(-1, coarse, cell, coarse, cell).transpose(2, 3).flatten(3)
        if not bool((cells.all(-1) == cells.any(-1)).all()):
            raise RuntimeError(f"the mask cuts through merged tokens; use mask units of at least {cell} tokens")
        return cells.all(-1).flatten(1)


class MTO:
    """What :func:`attach_mto` gives: the loss of the last forward, its terms for logging, and the way to detach."""

    def __init__(self, model: nn.Module, specs: Sequence[StackSpec], config: MTOConfig, check_every: int) -> None:
        self.config = config
        self.step = 0
        self._check_every = check_every
        self._recorders = [_Recorder(spec, config) for spec in specs]
        self._last: dict[str, MTOTerms] = {}
        # What the model-level hook saw; None outside the model's own call (Lightning calls training_step instead).
        self._recording: bool | None = None
        self._handles = [
            model.register_forward_pre_hook(_weakly(self, model, MTO._model_starts), with_kwargs=True, prepend=True),
            model.register_forward_hook(_weakly(self, model, MTO._model_ends), with_kwargs=True, always_call=True),
        ]
        for recorder in self._recorders:
            first = recorder.spec.blocks[0]
            starts = _weakly(self, first, MTO._block_starts, recorder)
            self._handles.append(first.register_forward_pre_hook(starts, with_kwargs=True))
            for depth, block in enumerate(recorder.spec.blocks, start=1):
                ends = _weakly(self, block, MTO._block_ends, recorder, depth)
                self._handles.append(block.register_forward_hook(ends, with_kwargs=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> MTO:
        """A copy of the model (an EMA) has no losses of its own."""
        return self

    def loss(self) -> Tensor:
        """The weighted loss of the last forward, a float32 scalar; the mean over stacks where there are several.

        Add it to the model's own loss before the one backward pass. Call it once per forward.

        Raises:
            RuntimeError: If no forward with masked tokens was seen since the last call.
        """
        seen = [recorder for recorder in self._recorders if recorder.mask is not None]
        if not seen:
            raise RuntimeError(
                "no forward with masked tokens since the last loss(): the model was in eval mode or without gradients, "
                "no patch was masked, dropout changed the mask token, or torch.compile had run before attach_mto"
            )
        terms = {recorder.spec.name: recorder.finish(self.step) for recorder in seen}
        self._last = {name: MTOTerms(*(value.detach() for value in each)) for name, each in terms.items()}
        for recorder in self._recorders:
            recorder.clear()
        if self._check_every and self.step % self._check_every == 0:
            self._check()
        self.step += 1
        return torch.stack([each.loss for each in terms.values()]).mean()

    @property
    def terms(self) -> dict[str, float]:
        """Terms of the last loss, for logging; reading them waits for the device.

        Keys are ``loss``, ``sparsity``, ``embedding``, ``ranking`` (before weights), ``heterogeneity_0`` ... and, after
        the backward pass, ``mask_token_grad_norm``; with several stacks each key starts with the stack's name.
        """
        values: dict[str, float] = {}
        for recorder in self._recorders:
            name = recorder.spec.name
            if name not in self._last:
                continue
            last = self._last[name]
            start = f"{name}/" if len(self._recorders) > 1 else ""
            for term in ("loss", "sparsity", "embedding", "ranking"):
                values[start + term] = getattr(last, term).item()
            for depth, h in enumerate(last.heterogeneity.mean(dim=1).tolist()):
                values[f"{start}heterogeneity_{depth}"] = h
            token = recorder.spec.mask_token
            if token is not None and token.grad is not None:
                values[f"{start}mask_token_grad_norm"] = token.grad.norm().item()
        return values

    def detach(self) -> None:
        """Remove every hook; the model is as it was before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for recorder in self._recorders:
            recorder.clear()

    def _check(self) -> None:
        for name, last in self._last.items():
            found = [
                f"{term} is not finite"
                for term in ("sparsity", "embedding", "ranking", "heterogeneity")
                if not bool(torch.isfinite(getattr(last, term)).all())
            ]
            if float(last.heterogeneity.max()) < _COLLAPSED:
                found.append("heterogeneity of all layers has collapsed to 0")
            if self.config.sparsity_weight > 0 and float(last.sparsity) < _DEAD:
                found.append("L_spa is dead, each visible token resembles only itself")
            for what in found:
                warnings.warn(f"{name}, step {self.step}: {what}", CollapseWarning, stacklevel=3)

    def _model_starts(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._recording = module.training and torch.is_grad_enabled()
        for recorder in self._recorders:
            recorder.clear()

    def _model_ends(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        self._recording = None

    def _block_starts(self, recorder: _Recorder, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        recording = module.training and torch.is_grad_enabled() if self._recording is None else self._recording
        if recording and not _recomputing():
            recorder.start(args[0] if args else kwargs["hidden_states"])

    def _block_ends(
        self, recorder: _Recorder, depth: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if recorder.mask is not None and not _recomputing():
            recorder.take(depth, output[0] if isinstance(output, tuple) else output)


# In nats: below this H, and below this mean or sum over rows, gradients are gone.
_COLLAPSED = 1e-4
_DEAD = 1e-4


def _recomputing() -> bool:
    """Whether activation checkpointing is running a block again inside the backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def _weakly(mto: MTO, module: nn.Module, method: Callable[..., None], *bound: Any) -> Callable[..., None]:
    """A hook that keeps neither the handle nor the model alive, and does nothing on a copy of the module."""
    handle, owner = weakref.ref(mto), weakref.ref(module)
    kept = tuple(weakref.ref(value) if isinstance(value, _Recorder) else value for value in bound)

    def hook(called: nn.Module, *arguments: Any) -> None:
        target = handle()
        if target is None or owner() is not called:
            return
        method(target, *(value() if isinstance(value, weakref.ref) else value for value in kept), called, *arguments)

    return hook


def attach_mto(
    model: nn.Module,
    config: MTOConfig | None = None,
    *,
    stacks: Sequence[StackSpec] | None = None,
    check_every: int = 100,
) -> MTO:
    """Attach masked token optimisation to an unmodified model; its masked tokens are found by structure.

    Known are the models of facebookresearch/mae, microsoft/SimMIM (ViT and Swin), LightDXY/BootMAE (both decoders),
    TencentARC/ConMIM and BEiT, Hugging Face ViTMAE, BEiT, ViT and Swin for masked image modelling, lightly's MAE and
    SimMIM parts, and our own. Everything else needs ``stacks``.

    Keep the handle; the model does not. Attach after copies of the model (EMA) were made and before ``torch.compile``
    runs for the first time. In evaluation mode and without gradients the hooks do nothing.

    Args:
        model: An instance, wrapped in DistributedDataParallel or torch.compile or not.
        config: Settings; ``MTOConfig()`` by default.
        stacks: Where masked tokens live, for models of another structure.
        check_every: Look for collapse and terms that are not finite every so many steps; 0 for never.

    Raises:
        ValueError: If no structure fits, or the model is wrapped in nn.DataParallel.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
        >>> from mto_analysis import load_checkpoint, mask_keys, reconstruction_loss
        >>> model = load_checkpoint(DEMO_CHECKPOINTS["SimMIM"]).train()
        >>> mto = attach_mto(model)
        >>> batch = next(demo_batches(model.info, limit=4))
        >>> mask = model.info.mask_rule.draw(mask_keys(batch.names), model.info.grid, model.info.patch_size)
        >>> loss = reconstruction_loss(model(batch.images, mask), batch.images, mask, model.info.patch_size).mean()
        >>> loss = loss + mto.loss()
        >>> loss.backward()
        >>> sorted(mto.terms)[:3]
        ['embedding', 'heterogeneity_0', 'heterogeneity_1']
        >>> mto.detach()
    """
    inner = unwrap(model)
    return MTO(inner, stacks or find_stacks(inner), config or MTOConfig(), check_every)
