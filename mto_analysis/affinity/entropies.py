"""Row entropies of affinities in two differentiable steps, with the analytic gradient and little to remember.

With z the logits of a row, p their softmax and ``z_bar = sum p (z - max z)``, the entropy's gradient is
``dH/dz_j = -p_j (z_j - max z - z_bar)``. The first step, at each layer depth, makes the logits, products of tokens;
saved are the tokens themselves (which the model keeps anyway). The second makes the entropies of all layer depths at
once, as so small matrices cost little more than the start of each operator; saved is one matrix per image and layer
depth.

All is float32 or better inside autocast too: autocast leaves products alone that are written to given memory
(``out=``, ``baddbmm_``), and to switch it off and on for each would take longer than a small product.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mto_analysis.affinity.matrix import entropy_from_sums
from mto_analysis.affinity.products import multiply, multiply_sum, product_dtype, summands
from mto_analysis.affinity.split import TokenSplit
from mto_analysis.runtime.memory import Scratch
from mto_analysis.runtime.precision import fast_float32

# Subnormal numbers take a processor a hundred times as long: weights, slopes and their products stay above them.
# Weights of e^-60 of the greatest change no sum in float32 and none that matters in float64.
_LEAST_LOGIT = -60.0


def _multiply(columns: Tensor, rows: Tensor) -> Tensor:
    """Dot products as ``num_columns batch num_rows``: sums over columns are then sums of long vectors."""
    shape, dtype = (columns.shape[1], len(columns), rows.shape[1]), torch.promote_types(columns.dtype, torch.float32)
    products = columns.new_empty(shape, dtype=dtype)
    multiply(columns, rows.mT, out=products.transpose(0, 1))
    return products


class _Products(torch.autograd.Function):
    """Dot products of masked with visible tokens, and if wanted of visible ones with each other."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, split: TokenSplit, with_visible: bool) -> tuple[Tensor, ...]:
        dtype = product_dtype(tokens)
        # float16 has not the range of the gradients that it is multiplied by.
        ctx.split, ctx.dtype = split, torch.float32 if dtype == torch.float16 else dtype
        ctx.save_for_backward(tokens)
        with fast_float32(tokens.device.type):
            x_m, x_v, *_ = split.sort(tokens, dtype)
            masked = _multiply(x_v, x_m)
            return (masked, _multiply(x_v, x_v)) if with_visible else (masked,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_masked: Tensor, grad_visible: Tensor | None = None) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        split: TokenSplit = ctx.split
        dtype: torch.dtype = ctx.dtype
        with fast_float32(tokens.device.type):
            x_m, x_v, *_ = split.sort(tokens, dtype)
            gradient = split.memory("gradient", tokens, dtype)
            parts = summands(grad_masked, dtype)
            multiply_sum([part.permute(1, 2, 0) for part in parts], x_v, out=gradient.masked)
            multiply_sum([part.transpose(0, 1) for part in parts], x_m, out=gradient.visible)
            if grad_visible is not None:
                once = grad_visible.transpose(0, 1)
                multiply_sum(summands(once + once.mT, dtype), x_v, out=gradient.visible, add=True)
        return split.unsort(gradient, tokens), None, None


class _RowEntropy(torch.autograd.Function):
    """Sum over rows of entropy times ``share``: logits of some layers -> layers batch.

    Columns that are not ``ok`` have no weight.

    Shapes:
        share: batch num_rows, each or 1
        ok: num_columns, batch or 1, num_rows or 1
        logits: num_columns batch num_rows, of each layer
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, ok: Tensor | None, scratch: Scratch, *logits: Tensor) -> Tensor:
        z = torch.stack(logits)
        weights = scratch("weights", z, *z.shape)
        if ok is not None:
            z.masked_fill_(~ok, float("-inf"))
        z.sub_(z.amax(dim=1, keepdim=True)).clamp_min_(_LEAST_LOGIT)
        torch.exp(z, out=weights)
        if ok is not None:
            weights.masked_fill_(~ok, 0.0)
        total = weights.sum(dim=1)
        slope = z.mul_(weights)
        moment = slope.sum(dim=1)
        mean = moment / total
        # The derivative is -p (z - mean) times the share, with p = weights / total: slope times factor.
        slope.addcmul_(weights, mean.unsqueeze(1), value=-1)
        factor = share / -total
        ctx.save_for_backward(slope, factor)
        return entropy_from_sums(total, moment).mul_(share).sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, factor = ctx.saved_tensors
        by_layer = slope * (factor * grad.unsqueeze(-1)).unsqueeze(1)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(each if want else None for each, want in zip(by_layer, wanted, strict=True))


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def token_products(tokens: Tensor, split: TokenSplit, *, with_visible: bool = False) -> tuple[Tensor, ...]:
    """Dot products of one layer depth, from which the entropies are made.

    Shapes:
        tokens: batch num_tokens dim (the split's prefix tokens, then patches)
        returns: of visible with masked tokens ``most_visible batch most_masked``; if wanted, of visible tokens with
            each other ``most_visible batch most_visible``
    """
    num_tokens = split.prefix_tokens + split.num_patches
    if tokens.ndim != 3 or tokens.shape[:2] != (len(split.num_masked), num_tokens):
        raise ValueError(
            f"tokens must be [batch, num_patches, dim] with a mask [batch, num_patches], got tokens "
            f"{list(tokens.shape)} and a mask of {[len(split.num_masked), split.num_patches]}"
        )
    # Non-reentrant checkpointing drops every tensor that is saved inside it and makes it again in the backward pass,
    # where the products are not made again. Tokens are kept by the model anyway. Compiled code takes no such hooks.
    compiling = torch.compiler.is_compiling()
    with nullcontext() if compiling else torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        products: tuple[Tensor, ...] = _Products.apply(tokens, split, with_visible)
    return products


def masked_rows_entropy(products: Sequence[Tensor], split: TokenSplit) -> Tensor:
    """Heterogeneity, Eq. (2), of some layer depths at once, with an analytic first derivative.

    The same values as :func:`affinity.heterogeneity`.

    Shapes:
        products: of visible with masked tokens of each layer depth (:func:`token_products`)
        returns: layers batch (nats)

    Example:
        >>> split = TokenSplit(torch.tensor([[True, True, False, False]]))
        >>> products, = token_products(torch.zeros(1, 4, 8), split)
        >>> masked_rows_entropy([products], split)
        tensor([[0.6931]])
    """
    ok, share = None, split.num_masked.to(products[0].dtype).reciprocal()[:, None]
    if split.masked_ok is not None and split.visible_ok is not None:
        ok, share = split.visible_ok.mT.unsqueeze(-1), share * split.masked_ok
    h: Tensor = _RowEntropy.apply(share, ok, split.scratch, *products)
    return h


def visible_rows_entropy(masked: Tensor, visible: Tensor, split: TokenSplit, *, include_self: bool = True) -> Tensor:
    """Sum over visible rows of the entropy over all tokens, Eq. (3), with an analytic first derivative.

    Shapes:
        masked, visible: products of visible with masked tokens and with each other (:func:`token_products`)
        returns: batch (nats, from 0 to num_visible * log(num_patches))

    Args:
        masked: Of layer depth 0.
        visible: Of layer depth 0.
        split: The sorted mask.
        include_self: Whether a row's own token is among its columns, as printed.

    Example:
        >>> split = TokenSplit(torch.tensor([[True, True, False, False]]))
        >>> visible_rows_entropy(*token_products(torch.zeros(1, 4, 8), split, with_visible=True), split)
        tensor([2.7726])
    """
    logits = torch.cat([masked.permute(2, 1, 0), visible])  # all columns, visible rows
    ok, share = None, logits.new_ones(1, 1)
    if split.masked_ok is not None and split.visible_ok is not None:
        ok = torch.cat([split.masked_ok, split.visible_ok], dim=1).mT.unsqueeze(-1)
        share = split.visible_ok.to(logits.dtype)
    if not include_self:
        others = torch.ones(len(logits), 1, len(visible), dtype=torch.bool, device=logits.device)
        others[len(logits) - len(visible) :, 0].fill_diagonal_(False)
        ok = others if ok is None else ok & others
    rows: Tensor = _RowEntropy.apply(share, ok, split.scratch, logits)
    return rows.squeeze(0)
