"""Row entropies of affinities as one differentiable step each, with the analytic gradient and little to remember.

With z the logits of a row, p their softmax and ``z_bar = sum p (z - max z)``, the entropy's gradient is
``dH/dz_j = -p_j (z_j - max z - z_bar)``. Saved for the backward pass are the tokens themselves (which the model keeps
anyway), an index, and one small matrix per image; no gathered copy of the tokens, no softmax.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mto_analysis.affinity import masked_first_order
from mto_analysis.masking import check_mask

__all__ = ["SortedMask", "masked_visible_entropy", "visible_rows_entropy"]


class SortedMask(NamedTuple):
    """A batch of masks, sorted once for all layers: patches in the order masked, then visible, of each image.

    Images of different counts are padded: ``masked`` and ``visible`` are as long as the largest count, and
    ``masked_ok``, ``visible_ok`` say which entries are real (``None`` where all are).

    Shapes:
        masked: batch most_masked (patch indices)
        visible: batch most_visible (patch indices)
        masked_ok: batch most_masked
        visible_ok: batch most_visible
        num_masked: batch
        num_visible: batch
    """

    masked: Tensor
    visible: Tensor
    masked_ok: Tensor | None
    visible_ok: Tensor | None
    num_masked: Tensor
    num_visible: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> SortedMask:
        """Sort a mask.

        Shapes:
            mask: batch num_patches

        Raises:
            ValueError: If a row masks no patch or every patch.
        """
        check_mask(mask)
        num_masked = mask.sum(dim=1)
        num_visible = mask.shape[1] - num_masked
        fewest, most = (int(count) for count in torch.stack([num_masked.min(), num_masked.max()]).tolist())
        order = masked_first_order(mask)
        masked, visible = order[:, :most], order.flip(1)[:, : mask.shape[1] - fewest]
        if fewest == most:
            return cls(masked, visible, None, None, num_masked, num_visible)
        return cls(
            masked,
            visible,
            torch.arange(masked.shape[1], device=mask.device) < num_masked[:, None],
            torch.arange(visible.shape[1], device=mask.device) < num_visible[:, None],
            num_masked,
            num_visible,
        )


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens at the given patches, in at least float32: ``batch some dim``."""
    batch = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[batch, index].to(torch.promote_types(tokens.dtype, torch.float32))


def _entropy_and_slope(logits: Tensor, ok: Tensor | None) -> tuple[Tensor, Tensor]:
    """Entropy of each row and its derivative by the logits; columns that are not ``ok`` have no weight.

    Overwrites ``logits``.
    """
    if ok is not None:
        logits.masked_fill_(~ok, float("-inf"))
    z = logits.sub_(logits.amax(dim=-1, keepdim=True))
    weight = z.exp()
    total = weight.sum(dim=-1, keepdim=True)
    if ok is not None:
        z.masked_fill_(~ok, 0.0)  # or -inf times a weight of 0 is NaN
    weight.div_(total)
    mean = (weight * z).sum(dim=-1, keepdim=True)
    entropy = (total.log() - mean).squeeze(-1)
    return entropy, weight.mul_(z.sub_(mean)).neg_()


def _share_of_masked_rows(split: SortedMask, like: Tensor) -> Tensor:
    """Weights that make a sum over masked rows their mean: ``batch most_masked``."""
    share = split.num_masked.to(like.dtype).reciprocal()[:, None]
    return share.expand_as(like) if split.masked_ok is None else share * split.masked_ok


class _MaskedVisibleEntropy(torch.autograd.Function):
    """Mean over masked rows of the entropy over visible columns, Eq. (2): tokens -> batch."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: SortedMask) -> Tensor:
        x_m, x_v = _rows(tokens, split.masked), _rows(tokens, split.visible)
        ok = None if split.visible_ok is None else split.visible_ok[:, None, :]
        entropy, slope = _entropy_and_slope(x_m @ x_v.mT, ok)
        share = _share_of_masked_rows(split, entropy)
        ctx.split = split
        ctx.save_for_backward(tokens, slope.mul_(share.unsqueeze(-1)))
        return (entropy * share).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tokens, slope = ctx.saved_tensors
        split = ctx.split
        slope = slope * grad[:, None, None]
        gradient = torch.zeros(tokens.shape, dtype=slope.dtype, device=tokens.device)
        _add_rows(gradient, split.masked, slope @ _rows(tokens, split.visible), split.masked_ok)
        _add_rows(gradient, split.visible, slope.mT @ _rows(tokens, split.masked), split.visible_ok)
        return gradient.to(tokens.dtype), None


class _InitialEntropies(torch.autograd.Function):
    """At layer 0, from one product: H_0 of Eq. (2), and the sum over visible rows of Eq. (3), each per image."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: SortedMask, include_self: bool) -> tuple[Tensor, Tensor]:
        x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        x_v = _rows(tokens, split.visible)
        product = x_v @ x.mT  # visible rows, all columns
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        # H_0 has masked rows: the masked columns of the product, turned over.
        turned = product.mT[batch, split.masked]
        ok = None if split.visible_ok is None else split.visible_ok[:, None, :]
        h, slope_h = _entropy_and_slope(turned, ok)
        share = _share_of_masked_rows(split, h)
        slope_h.mul_(share.unsqueeze(-1))
        others = None
        if not include_self:
            others = torch.ones_like(product, dtype=torch.bool).scatter_(2, split.visible.unsqueeze(-1), False)
        rows, slope_s = _entropy_and_slope(product, others)
        if split.visible_ok is not None:
            rows = rows * split.visible_ok
            slope_s.mul_(split.visible_ok.unsqueeze(-1))
        ctx.split = split
        ctx.save_for_backward(tokens, slope_h, slope_s)
        return (h * share).sum(dim=1), rows.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_s: Tensor) -> tuple[Tensor, None, None]:
        tokens, slope_h, slope_s = ctx.saved_tensors
        split = ctx.split
        slope = slope_s * grad_s[:, None, None]
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        by_column = slope.mT  # a view: what is added to it is added to the slope
        if split.masked_ok is None:
            by_column[batch, split.masked] += slope_h * grad_h[:, None, None]
        else:
            keep = split.masked_ok
            image = batch.expand_as(split.masked)[keep]
            by_column[image, split.masked[keep]] += (slope_h * grad_h[:, None, None])[keep]
        x = tokens.to(slope.dtype)
        gradient = slope.mT @ _rows(tokens, split.visible)
        _add_rows(gradient, split.visible, slope @ x, split.visible_ok)
        return gradient.to(tokens.dtype), None, None


def _add_rows(gradient: Tensor, index: Tensor, rows: Tensor, ok: Tensor | None) -> None:
    batch = torch.arange(len(gradient), device=gradient.device)[:, None]
    if ok is None:  # indices of an image are all different, so nothing is lost by plain indexing
        gradient[batch, index] += rows
    else:
        gradient[batch.expand_as(index)[ok], index[ok]] += rows[ok]


def masked_visible_entropy(tokens: Tensor, split: SortedMask) -> Tensor:
    """Heterogeneity, Eq. (2), with an analytic first derivative; the same values as :func:`affinity.heterogeneity`.

    Shapes:
        tokens: batch num_patches dim
        returns: batch (nats)

    Example:
        >>> split = SortedMask.of(torch.tensor([[True, True, False, False]]))
        >>> masked_visible_entropy(torch.zeros(1, 4, 8), split)
        tensor([0.6931])
    """
    with torch.autocast(tokens.device.type, enabled=False):
        value: Tensor = _MaskedVisibleEntropy.apply(tokens, split)
    return value


def visible_rows_entropy(tokens: Tensor, split: SortedMask, *, include_self: bool = True) -> tuple[Tensor, Tensor]:
    """H_0 of Eq. (2), and the sum over visible rows of the entropy over all tokens, Eq. (3), from one product.

    Shapes:
        tokens: batch num_patches dim
        returns: batch, batch (nats; the second from 0 to num_visible * log(num_patches))

    Args:
        tokens: Embeddings at layer depth 0.
        split: The sorted mask.
        include_self: Whether a row's own token is among its columns, as printed.

    Example:
        >>> split = SortedMask.of(torch.tensor([[True, True, False, False]]))
        >>> visible_rows_entropy(torch.zeros(1, 4, 8), split)
        (tensor([0.6931]), tensor([2.7726]))
    """
    with torch.autocast(tokens.device.type, enabled=False):
        h, rows = _InitialEntropies.apply(tokens, split, include_self)
    return h, rows
