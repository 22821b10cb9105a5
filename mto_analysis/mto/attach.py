"""Masked token optimisation in a foreign training loop: the losses, collected during the model's own forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mto_analysis.affinity.entropies import SortedMask
from mto_analysis.mto.losses import LayerProducts, MTOConfig, MTOTerms, combine_terms, layer_products
from mto_analysis.runtime.memory import Scratch
from mto_analysis.taps.hooks import COLLAPSED, Attached, StackForward, warn_of
from mto_analysis.taps.structures import StackSpec, find_stacks, unwrap

__all__ = ["MTO", "attach_mto"]

# In nats, mean or sum over rows: below this every visible token resembles only itself.
_DEAD = 1e-4


class _Losses(StackForward):
    """Products of one stack's tokens, made in the hook, so that no list of tokens is kept.

    Inside reentrant activation checkpointing gradients are off in the hook; there the block's output object itself is
    kept, which gets its gradient when the checkpoint returns, and its products are made when the loss is asked for.
    """

    def __init__(self, spec: StackSpec, config: MTOConfig) -> None:
        self.config = config
        self.scratch = Scratch()
        super().__init__(spec, may_assume=True)

    def clear(self) -> None:
        """Forget the last forward."""
        super().clear()
        self.splits: dict[int, SortedMask] = {}
        self.products: dict[int, LayerProducts] = {}
        self.waiting: dict[int, Tensor] = {}
        self.taken: dict[int, Tensor] = {}  # measured with counts that are assumed; autograd keeps them anyway

    def take(self, depth: int, tokens: Tensor) -> None:
        """Measure, or keep for later where gradients are off."""
        if tokens.requires_grad and torch.is_grad_enabled():
            if self.assuming:
                self.taken[depth] = tokens
            self.measure(depth, tokens)
        else:
            self.waiting[depth] = tokens

    def measure(self, depth: int, tokens: Tensor) -> None:
        """Products of one layer depth."""
        prefix = self.spec.prefix_tokens
        count = tokens.shape[1] - prefix
        if count not in self.splits:
            mask, counts = self.mask_for(count)
            self.splits[count] = SortedMask.of(mask, prefix, counts, self.scratch)
        self.products[depth] = layer_products(self.images(tokens), self.splits[count], depth, self.config)

    def settle(self) -> bool:
        """Look at the mask itself where counts were assumed; if they are wrong, all is to be measured again."""
        right = super().settle()
        if not right:
            self.splits.clear()
            self.products.clear()
            self.waiting |= self.taken
        self.taken.clear()
        return right

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
        missing = [depth for depth in depths if depth not in self.products]
        if missing:
            raise RuntimeError(f"blocks {missing} of {self.spec.name} did not run; give stacks=... with those that do")
        return combine_terms([self.products[depth] for depth in depths], self.config, step=step)


class MTO(Attached):
    """What :func:`attach_mto` gives: the loss of the last forward, its terms for logging, and the way to detach."""

    def __init__(self, model: nn.Module, specs: Sequence[StackSpec], config: MTOConfig, check_every: int) -> None:
        for spec in specs:
            if config.layers and config.layers[-1] > len(spec.blocks):
                raise ValueError(f"layers must be 0 to {len(spec.blocks)} for {spec.name}, got {config.layers}")
        self.config = config
        self._check_every = check_every
        self._losses = [_Losses(spec, config) for spec in specs]
        self._last: dict[str, MTOTerms] = {}
        super().__init__(model, self._losses)

    def loss(self) -> Tensor:
        """The weighted loss of the last forward, a float32 scalar; the mean over stacks where there are several.

        Add it to the model's own loss before the one backward pass. Call it once per forward.

        Raises:
            RuntimeError: If no forward with masked tokens was seen since the last call, or the mask token is not finite
                and so cannot be found.
        """
        for losses in self._losses:
            losses.settle()
        seen = [losses for losses in self._losses if losses.mask is not None]
        if not seen:
            for losses in self._losses:
                token = losses.spec.mask_token
                if token is not None and not bool(torch.isfinite(token).all()):
                    raise RuntimeError(f"{losses.spec.name}, step {self.step}: the mask token is not finite")
            raise RuntimeError(
                "no forward with masked tokens since the last loss(): the model was in eval mode or without gradients, "
                "no patch was masked, dropout changed the mask token, torch.compile had run before attach_mto, "
                "or detach() was called"
            )
        terms = {losses.spec.name: losses.finish(self.step) for losses in seen}
        self._last = {name: MTOTerms(*(value.detach() for value in each)) for name, each in terms.items()}
        for losses in self._losses:
            losses.clear()
        if self._check_every and self.step % self._check_every == 0:
            for name, last in self._last.items():
                _warn_of_collapse(f"{name}, step {self.step}", last, self.config)
        self.step += 1
        weighted = [each.loss for each in terms.values()]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).mean()

    @property
    def terms(self) -> dict[str, float]:
        """Terms of the last loss, for logging; reading them waits for the device.

        Keys are ``loss``, ``sparsity``, ``embedding``, ``ranking`` (before weights), ``heterogeneity_0`` ... and, after
        the backward pass, ``mask_token_grad_norm``; with several stacks each key starts with the stack's name.
        """
        values: dict[str, float] = {}
        for losses in self._losses:
            name = losses.spec.name
            if name not in self._last:
                continue
            last = self._last[name]
            start = f"{name}/" if len(self._losses) > 1 else ""
            for term in ("loss", "sparsity", "embedding", "ranking"):
                values[start + term] = getattr(last, term).item()
            for depth, h in enumerate(last.heterogeneity.mean(dim=1).tolist()):
                values[f"{start}heterogeneity_{depth}"] = h
            token = losses.spec.mask_token
            if token is not None and token.grad is not None:
                values[f"{start}mask_token_grad_norm"] = token.grad.norm().item()
        return values


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


def _warn_of_collapse(where: str, last: MTOTerms, config: MTOConfig) -> None:
    for term in ("sparsity", "embedding", "ranking", "heterogeneity"):
        if not bool(torch.isfinite(getattr(last, term)).all()):
            warn_of(f"{where}: {term} is not finite")
    if float(last.heterogeneity.max()) < COLLAPSED:
        warn_of(f"{where}: heterogeneity of all layers has collapsed to 0")
    if config.sparsity_weight > 0 and float(last.sparsity) < _DEAD:
        warn_of(f"{where}: L_spa is dead, each visible token resembles only itself")
