"""Row entropies of affinities as one differentiable step each, with the analytic gradient and little to remember.

With z the logits of a row, p their softmax and ``z_bar = sum p (z - max z)``, the entropy's gradient is
``dH/dz_j = -p_j (z_j - max z - z_bar)``. Saved for the backward pass are the tokens themselves (which the model keeps
anyway), an index, and one small matrix per image; no gathered copy of the tokens, no softmax.

All is float32 or better inside autocast too: autocast leaves products alone that are written to given memory
(``out=``, ``baddbmm_``), and to switch it off and on for each would take longer than a small product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mto_analysis.affinity import Scratch, masked_first_order
from mto_analysis.masking import check_mask

__all__ = ["SortedMask", "masked_visible_entropy", "visible_rows_entropy"]

# Subnormal numbers take a processor a hundred times as long: weights, slopes and their products stay above them.
# Weights of e^-60 of the greatest change no sum in float32 and none that matters in float64.
_LEAST_LOGIT = -60.0


@dataclass(frozen=True, eq=False)
class SortedMask:
    """A batch of masks, sorted once for all layers: the patches of each image masked first, then visible.

    Images may have different counts. Then ``most_masked`` patches from the front hold all masked ones of every image,
    ``most_visible`` from the back all visible ones, and ``masked_ok``, ``visible_ok`` say which of these are meant
    (``None`` where all are). All layers share ``scratch`` memory.

    Shapes:
        order: batch num_patches
        num_masked: batch
    """

    order: Tensor
    num_masked: Tensor
    most_masked: int
    most_visible: int
    prefix_tokens: int
    scratch: Scratch

    @classmethod
    def of(
        cls,
        mask: Tensor,
        prefix_tokens: int = 0,
        counts: tuple[int, int] | None = None,
        scratch: Scratch | None = None,
    ) -> SortedMask:
        """Sort a mask.

        Shapes:
            mask: batch num_patches

        Args:
            mask: True where masked.
            prefix_tokens: Tokens in front of the patches in what is to be measured.
            counts: The least and the greatest number of masked patches of an image, where they are known: to ask the
                mask for them is to wait for the device.
            scratch: Memory to work in, of one forward after the other; by default its own.

        Raises:
            ValueError: If a row masks no patch or every patch.
        """
        batch, num_patches = mask.shape if mask.ndim == 2 else (0, 0)
        num_masked = mask.sum(dim=-1)
        if counts is None:
            counts = (0, 0)
            if batch:
                counts = tuple(torch.stack(num_masked.aminmax()).tolist())
        fewest, most = counts
        if mask.dtype != torch.bool or fewest < 1 or most >= num_patches:
            check_mask(mask)  # has the message
        order = masked_first_order(mask)
        return cls(order, num_masked, most, num_patches - fewest, prefix_tokens, scratch or Scratch())

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return self.order.shape[1]

    @cached_property
    def num_visible(self) -> Tensor:
        """Visible patches of each image, ``batch``."""
        return self.num_patches - self.num_masked

    @cached_property
    def rows(self) -> Tensor:
        """Rows of the flattened tokens in sorted order, ``batch * num_patches``."""
        image = torch.arange(len(self.order), device=self.order.device)[:, None]
        first = image * (self.prefix_tokens + self.num_patches) + self.prefix_tokens
        return (first + self.order).flatten()

    @cached_property
    def places(self) -> Tensor:
        """Place of each token in sorted order, ``batch * num_tokens``; of a prefix token one past the end."""
        size, prefix = self.order.numel(), self.prefix_tokens
        places = torch.full((len(self.order), prefix + self.num_patches), size, device=self.order.device)
        places[:, prefix:].scatter_(1, self.order, torch.arange(size, device=self.order.device).view_as(self.order))
        return places.flatten()

    @cached_property
    def masked_ok(self) -> Tensor | None:
        """Which of the ``most_masked`` from the front are masked, ``batch most_masked``."""
        if self.most_masked + self.most_visible == self.num_patches:
            return None
        place = torch.arange(self.most_masked, device=self.order.device)
        return place < self.num_masked[:, None]

    @cached_property
    def visible_ok(self) -> Tensor | None:
        """Which of the ``most_visible`` from the back are visible, ``batch most_visible``."""
        if self.most_masked + self.most_visible == self.num_patches:
            return None
        place = torch.arange(self.num_patches - self.most_visible, self.num_patches, device=self.order.device)
        return place >= self.num_masked[:, None]

    def sort(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches in sorted order, in at least float32; views of the masked and of the visible ones.

        They lie in scratch memory, until the next call.
        """
        x = self.scratch("sorted", tokens, len(self.rows), tokens.shape[-1])
        flat = tokens.flatten(0, 1)
        if x.dtype == tokens.dtype:
            torch.index_select(flat, 0, self.rows, out=x)
        else:
            x.copy_(flat.index_select(0, self.rows))
        x = x.view(len(tokens), -1, tokens.shape[-1])
        return x, x[:, : self.most_masked], x[:, -self.most_visible :]

    def gradient_of_sorted(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the gradient of sorted patches, for :meth:`unsort`, and it as ``batch num_patches dim``."""
        gradient = self.scratch("gradient", tokens, len(self.rows) + 1, tokens.shape[-1])
        return gradient, gradient[:-1].view(len(tokens), -1, tokens.shape[-1])

    def unsort(self, gradient: Tensor, tokens: Tensor) -> Tensor:
        """What lies in :meth:`gradient_of_sorted` as gradient of ``tokens``; prefix tokens have none."""
        gradient[-1] = 0
        return gradient.to(tokens.dtype).index_select(0, self.places).view(tokens.shape)


def _products(columns: Tensor, rows: Tensor) -> Tensor:
    """Dot products ``num_columns batch num_rows``: sums over columns are then sums of long vectors."""
    logits = columns.new_empty(columns.shape[1], len(columns), rows.shape[1])
    torch.bmm(columns, rows.mT, out=logits.transpose(0, 1))
    return logits


def _entropy_and_slope(logits: Tensor, weights: Tensor, ok: Tensor | None, share: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of entropy times ``share``, and its derivative; columns that are not ``ok`` have no weight.

    Overwrites ``logits`` with the derivative, and ``weights``.

    Shapes:
        logits, weights: num_columns batch num_rows
        ok: num_columns, batch or 1, num_rows or 1
        share: batch num_rows
        returns: batch, num_columns batch num_rows
    """
    if ok is not None:
        logits.masked_fill_(~ok, float("-inf"))
    z = logits.sub_(logits.amax(dim=0)).clamp_min_(_LEAST_LOGIT)
    torch.exp(z, out=weights)
    if ok is not None:
        weights.masked_fill_(~ok, 0.0)
    total = weights.sum(dim=0)
    slope = z.mul_(weights)
    mean = slope.sum(dim=0).div_(total)
    # -p (z - mean) times the share, with p = weights / total.
    slope.addcmul_(weights, mean, value=-1).mul_(share / -total)
    return total.log_().sub_(mean).mul_(share).sum(dim=1), slope


def _heterogeneity_and_slope(logits: Tensor, split: SortedMask) -> tuple[Tensor, Tensor]:
    """Mean over an image's masked rows of the entropy, and its derivative by the logits, which it overwrites."""
    ok = None if split.visible_ok is None else split.visible_ok.mT.unsqueeze(-1)
    share = split.num_masked.to(logits.dtype).reciprocal()[:, None]
    if split.masked_ok is not None:
        share = share * split.masked_ok
    return _entropy_and_slope(logits, split.scratch("weights", logits, *logits.shape), ok, share)


class _MaskedVisibleEntropy(torch.autograd.Function):
    """Mean over masked rows of the entropy over visible columns, Eq. (2): tokens -> batch."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: SortedMask) -> Tensor:
        _, x_m, x_v = split.sort(tokens)
        h, slope = _heterogeneity_and_slope(_products(x_v, x_m), split)
        ctx.split = split
        ctx.save_for_backward(tokens, slope)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        tokens, slope = ctx.saved_tensors
        split: SortedMask = ctx.split
        _, x_m, x_v = split.sort(tokens)
        slope = torch.mul(slope, grad[:, None], out=split.scratch("weights", slope, *slope.shape))
        by_masked, by_visible = slope.permute(1, 2, 0), slope.transpose(0, 1)
        gradient, patches = split.gradient_of_sorted(tokens)
        if split.masked_ok is None:
            torch.bmm(by_masked, x_v, out=patches[:, : split.most_masked])
            torch.bmm(by_visible, x_m, out=patches[:, split.most_masked :])
        else:  # front and back overlap; slopes are 0 where they are not meant
            patches.zero_()
            patches[:, : split.most_masked].baddbmm_(by_masked, x_v)
            patches[:, -split.most_visible :].baddbmm_(by_visible, x_m)
        return split.unsort(gradient, tokens), None


class _InitialEntropies(torch.autograd.Function):
    """At layer 0, from one product: H_0 of Eq. (2), and the sum over visible rows of Eq. (3), each per image."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: SortedMask, include_self: bool) -> tuple[Tensor, Tensor]:
        x, _, x_v = split.sort(tokens)
        product = _products(x, x_v)  # all columns, visible rows
        # H_0 has masked rows: the masked columns of the product, turned over.
        turned = product[: split.most_masked].permute(2, 1, 0).contiguous()
        h, slope_h = _heterogeneity_and_slope(turned, split)
        others = None
        if not include_self:
            others = torch.ones(len(product), product.shape[2], dtype=torch.bool, device=product.device)
            others.diagonal(product.shape[2] - len(product)).fill_(False)
            others = others.unsqueeze(1)
        share = product.new_ones(1, 1) if split.visible_ok is None else split.visible_ok.to(product.dtype)
        rows, slope_s = _entropy_and_slope(product, torch.empty_like(product), others, share)
        ctx.split = split
        ctx.save_for_backward(tokens, slope_h, slope_s)
        return h, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_s: Tensor) -> tuple[Tensor, None, None]:
        tokens, slope_h, slope_s = ctx.saved_tensors
        split: SortedMask = ctx.split
        x, _, x_v = split.sort(tokens)
        slope = slope_s * grad_s[:, None]
        slope[: split.most_masked] += (slope_h * grad_h[:, None]).permute(2, 1, 0)
        gradient, patches = split.gradient_of_sorted(tokens)
        torch.bmm(slope.transpose(0, 1), x_v, out=patches)
        patches[:, -split.most_visible :].baddbmm_(slope.permute(1, 2, 0), x)
        return split.unsort(gradient, tokens), None, None


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _apply(function: type[torch.autograd.Function], tokens: Tensor, split: SortedMask, *arguments: object) -> Any:
    """Run, and keep what the backward pass needs out of the hands of activation checkpointing.

    Non-reentrant checkpointing drops every tensor that is saved inside it and makes it again in the backward pass,
    where the entropies are not made again. Tokens are kept by the model anyway.
    """
    num_tokens = split.prefix_tokens + split.num_patches
    if tokens.ndim != 3 or tokens.shape[:2] != (len(split.num_masked), num_tokens):
        raise ValueError(
            f"tokens must be [batch, num_patches, dim] with a mask [batch, num_patches], got tokens "
            f"{list(tokens.shape)} and a mask of {[len(split.num_masked), split.num_patches]}"
        )
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
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
