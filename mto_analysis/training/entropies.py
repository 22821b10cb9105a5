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
    """A batch of masks, sorted once for all layers: the patches of each image masked first, then visible.

    Images may have different counts. Then ``most_masked`` patches from the front hold all masked ones of every image,
    ``most_visible`` from the back all visible ones, and ``masked_ok``, ``visible_ok`` say which of these are meant
    (``None`` where all are).

    Shapes:
        rows: batch * num_patches (rows of the flattened tokens)
        masked_ok: batch most_masked
        visible_ok: batch most_visible
        num_masked: batch
        num_visible: batch
    """

    rows: Tensor
    most_masked: int
    most_visible: int
    masked_ok: Tensor | None
    visible_ok: Tensor | None
    num_masked: Tensor
    num_visible: Tensor
    prefix_tokens: int

    @classmethod
    def of(cls, mask: Tensor, prefix_tokens: int = 0) -> SortedMask:
        """Sort a mask.

        Shapes:
            mask: batch num_patches

        Args:
            mask: True where masked.
            prefix_tokens: Tokens in front of the patches in what is to be measured.

        Raises:
            ValueError: If a row masks no patch or every patch.
        """
        batch, num_patches = mask.shape if mask.ndim == 2 else (0, 0)
        num_masked = mask.sum(dim=-1)
        # One wait for the device; the full check has the message.
        fewest, most = torch.stack(num_masked.aminmax()).tolist() if batch else (0, 0)
        if mask.dtype != torch.bool or fewest < 1 or most >= num_patches:
            check_mask(mask)
        start = torch.arange(batch, device=mask.device)[:, None] * (prefix_tokens + num_patches) + prefix_tokens
        masked_ok = visible_ok = None
        if fewest != most:
            place = torch.arange(num_patches, device=mask.device)
            masked_ok, visible_ok = place[:most] < num_masked[:, None], place[fewest:] >= num_masked[:, None]
        rows = (start + masked_first_order(mask)).flatten()
        num_visible = num_patches - num_masked
        return cls(rows, most, num_patches - fewest, masked_ok, visible_ok, num_masked, num_visible, prefix_tokens)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return len(self.rows) // len(self.num_masked)

    def sort(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches in sorted order, in at least float32; views of the masked and of the visible ones."""
        x = tokens.flatten(0, 1).index_select(0, self.rows)
        x = x.to(torch.promote_types(x.dtype, torch.float32)).view(len(tokens), -1, tokens.shape[-1])
        return x, x[:, : self.most_masked], x[:, -self.most_visible :]

    def unsort(self, gradient: Tensor, tokens: Tensor) -> Tensor:
        """The gradient of sorted patches as that of ``tokens``; prefix tokens have none."""
        back = torch.empty_like(tokens, memory_format=torch.contiguous_format)
        back[:, : self.prefix_tokens] = 0
        back.flatten(0, 1).index_copy_(0, self.rows, gradient.flatten(0, 1).to(tokens.dtype))
        return back


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


def _mean_over_masked(rows: Tensor, slope: Tensor, split: SortedMask) -> Tensor:
    """Mean over an image's masked rows; ``slope`` is turned into that of the mean, 0 in rows that are not meant."""
    share = split.num_masked.to(rows.dtype).reciprocal()[:, None].expand_as(rows)
    if split.masked_ok is not None:
        share = share * split.masked_ok
    slope.mul_(share.unsqueeze(-1))
    return (rows * share).sum(dim=1)


class _MaskedVisibleEntropy(torch.autograd.Function):
    """Mean over masked rows of the entropy over visible columns, Eq. (2): tokens -> batch."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: SortedMask) -> Tensor:
        _, x_m, x_v = split.sort(tokens)
        ok = None if split.visible_ok is None else split.visible_ok[:, None, :]
        rows, slope = _entropy_and_slope(x_m @ x_v.mT, ok)
        h = _mean_over_masked(rows, slope, split)
        ctx.split = split
        ctx.save_for_backward(tokens, slope)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tokens, slope = ctx.saved_tensors
        split: SortedMask = ctx.split
        with torch.autocast(tokens.device.type, enabled=False):
            gradient, x_m, x_v = split.sort(tokens)
            slope = slope * grad[:, None, None]
            if split.masked_ok is None:  # in the place of the tokens: fresh memory costs as much time as products
                by_visible = slope.mT @ x_m
                torch.bmm(slope, x_v, out=x_m)
                x_v.copy_(by_visible)
            else:  # front and back overlap; slopes are 0 where they are not meant
                gradient = slope.new_zeros(len(tokens), split.num_patches, tokens.shape[-1])
                gradient[:, : split.most_masked] += slope @ x_v
                gradient[:, -split.most_visible :] += slope.mT @ x_m
        return split.unsort(gradient, tokens), None


class _InitialEntropies(torch.autograd.Function):
    """At layer 0, from one product: H_0 of Eq. (2), and the sum over visible rows of Eq. (3), each per image."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: SortedMask, include_self: bool) -> tuple[Tensor, Tensor]:
        x, _, x_v = split.sort(tokens)
        product = x_v @ x.mT  # visible rows, all columns
        # H_0 has masked rows: the masked columns of the product, turned over.
        turned = product[:, :, : split.most_masked].mT.contiguous()
        ok = None if split.visible_ok is None else split.visible_ok[:, None, :]
        h_rows, slope_h = _entropy_and_slope(turned, ok)
        h = _mean_over_masked(h_rows, slope_h, split)
        others = None
        if not include_self:
            others = torch.ones(product.shape[1:], dtype=torch.bool, device=product.device)
            others.diagonal(product.shape[2] - product.shape[1]).fill_(False)
        rows, slope_s = _entropy_and_slope(product, others)
        if split.visible_ok is not None:
            rows = rows * split.visible_ok
            slope_s.mul_(split.visible_ok.unsqueeze(-1))
        ctx.split = split
        ctx.save_for_backward(tokens, slope_h, slope_s)
        return h, rows.sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_s: Tensor) -> tuple[Tensor, None, None]:
        tokens, slope_h, slope_s = ctx.saved_tensors
        split: SortedMask = ctx.split
        with torch.autocast(tokens.device.type, enabled=False):
            x, _, x_v = split.sort(tokens)
            slope = slope_s * grad_s[:, None, None]
            slope[:, :, : split.most_masked] += (slope_h * grad_h[:, None, None]).mT
            gradient = slope.mT @ x_v
            gradient[:, -split.most_visible :] += slope @ x
        return split.unsort(gradient, tokens), None, None


def _apply(function: type[torch.autograd.Function], tokens: Tensor, split: SortedMask, *arguments: object) -> Any:
    """Run in full precision, and keep what the backward pass needs out of the hands of activation checkpointing.

    Non-reentrant checkpointing drops every tensor that is saved inside it and makes it again in the backward pass,
    where the entropies are not made again. Tokens are kept by the model anyway.
    """
    num_tokens = split.prefix_tokens + split.num_patches
    if tokens.ndim != 3 or tokens.shape[:2] != (len(split.num_masked), num_tokens):
        raise ValueError(
            f"tokens must be [batch, num_patches, dim] with a mask [batch, num_patches], got tokens "
            f"{list(tokens.shape)} and a mask of {[len(split.num_masked), split.num_patches]}"
        )
    with (
        torch.autocast(tokens.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    ):
        return function.apply(tokens, split, *arguments)


def masked_visible_entropy(tokens: Tensor, split: SortedMask) -> Tensor:
    """Heterogeneity, Eq. (2), with an analytic first derivative; the same values as :func:`affinity.heterogeneity`.

    Shapes:
        tokens: batch num_tokens dim (the split's prefix tokens, then patches)
        returns: batch (nats)

    Raises:
        ValueError: If tokens do not fit the mask.

    Example:
        >>> split = SortedMask.of(torch.tensor([[True, True, False, False]]))
        >>> masked_visible_entropy(torch.zeros(1, 4, 8), split)
        tensor([0.6931])
    """
    h: Tensor = _apply(_MaskedVisibleEntropy, tokens, split)
    return h


def visible_rows_entropy(tokens: Tensor, split: SortedMask, *, include_self: bool = True) -> tuple[Tensor, Tensor]:
    """H_0 of Eq. (2), and the sum over visible rows of the entropy over all tokens, Eq. (3), from one product.

    Shapes:
        tokens: batch num_tokens dim (the split's prefix tokens, then patches)
        returns: batch, batch (nats; the second from 0 to num_visible * log(num_patches))

    Args:
        tokens: Embeddings at layer depth 0.
        split: The sorted mask.
        include_self: Whether a row's own token is among its columns, as printed.

    Raises:
        ValueError: If tokens do not fit the mask.

    Example:
        >>> split = SortedMask.of(torch.tensor([[True, True, False, False]]))
        >>> visible_rows_entropy(torch.zeros(1, 4, 8), split)
        (tensor([0.6931]), tensor([2.7726]))
    """
    h, rows = _apply(_InitialEntropies, tokens, split, include_self)
    return h, rows
