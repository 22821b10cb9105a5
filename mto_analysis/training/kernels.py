"""Row entropies on a CUDA device: one kernel forward and one backward for each layer depth, written in Triton.

Tokens are read where the model keeps them, through the sorted index: no gathered copy, no cast. Products of half
precision are exact in float32, so they run on half-precision tensor cores; those of float32 are made of three in TF32
(errors near 1e-6), or of one where the user allows TF32. Kept for the backward pass are, for each image, the logits and
three numbers per row, from which it makes the slopes again.

Import it only where :mod:`triton` is there; :mod:`mto_analysis.training.fused` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mto_analysis.training.entropies import SortedMask

__all__ = ["backward_entropies", "forward_entropies", "sort_masks"]

#: How products of float32 are made, where it is not to follow torch's setting: ``ieee``, ``tf32x3`` or ``tf32``.
FLOAT32_PRODUCTS: str | None = None

# Kernels that were compiled, by all that a launch depends on but the addresses.
_compiled: dict[tuple[object, ...], Any] = {}


# Arguments that may change between calls, for which it does not pay to compile again.
_VARYING = ["h_rows", "spread_rows", "num_patches", "prefix", "by_h_stride", "by_spread_stride"]


@triton.jit
def _row_entropies(
    x,
    token_stride,
    dim,
    order,
    start,
    end,
    first,
    last,
    kept,
    width,
    INCLUDE_SELF: tl.constexpr,
    PRODUCTS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """Sum of the entropies of rows start..end over columns first..last, places in sorted order.

    Writes ``kept``: a row's logits, and in its last three columns its greatest logit, sum of weights, mean of logits.
    """
    total = tl.zeros((R,), tl.float32)
    for row_begin in range(start, end, R):
        rows = row_begin + tl.arange(0, R)
        row_ok = rows < end
        row_at = tl.load(order + rows, mask=row_ok, other=0).to(tl.int32) * token_stride
        kept_at = (rows - start) * width
        # Finite: the difference of two infinities is no number.
        greatest = tl.full((R,), -1e30, tl.float32)
        weights = tl.zeros((R,), tl.float32)
        moments = tl.zeros((R,), tl.float32)
        for column_begin in range(first, last, C):
            columns = column_begin + tl.arange(0, C)
            column_ok = columns < last
            column_at = tl.load(order + columns, mask=column_ok, other=0).to(tl.int32) * token_stride
            z = tl.zeros((R, C), tl.float32)
            for k in range(0, dim, K):
                channels = k + tl.arange(0, K)
                channel_ok = channels < dim
                a = tl.load(
                    x + (row_at[:, None] + channels[None, :]), mask=row_ok[:, None] & channel_ok[None, :], other=0.0
                )
                b = tl.load(
                    x + (column_at[:, None] + channels[None, :]),
                    mask=column_ok[:, None] & channel_ok[None, :],
                    other=0.0,
                )
                z = tl.dot(a, tl.trans(b), z, input_precision=PRODUCTS)
            ok = row_ok[:, None] & column_ok[None, :]
            tl.store(kept + (kept_at[:, None] + (columns - first)[None, :]), z, mask=ok)
            if not INCLUDE_SELF:
                ok = ok & (rows[:, None] != columns[None, :])
            now = tl.maximum(greatest, tl.max(tl.where(ok, z, -1e30), axis=1))
            below = tl.where(ok, z - now[:, None], 0.0)
            weight = tl.where(ok, tl.exp(below), 0.0)
            factor = tl.exp(greatest - now)
            moments = factor * (moments + weights * (greatest - now)) + tl.sum(weight * below, axis=1)
            weights = factor * weights + tl.sum(weight, axis=1)
            greatest = now
        weights = tl.where(row_ok, weights, 1.0)
        mean = moments / weights
        tl.store(kept + kept_at + (width - 3), greatest, mask=row_ok)
        tl.store(kept + kept_at + (width - 2), weights, mask=row_ok)
        tl.store(kept + kept_at + (width - 1), mean, mask=row_ok)
        total += tl.where(row_ok, tl.log(weights) - mean, 0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=_VARYING[:4])
def _forward_kernel(
    x,
    order,
    num_masked,
    h,
    h_kept,
    h_rows,
    h_width,
    spread,
    spread_kept,
    spread_rows,
    spread_width,
    image_stride,
    token_stride,
    num_patches,
    dim,
    prefix,
    WITH_ROWS: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    PRODUCTS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """One image: H of Eq. (2), and WITH_ROWS also ``spread``, the sum over visible rows of Eq. (3)."""
    image = tl.program_id(0).to(tl.int64)
    x += image * image_stride + prefix * token_stride
    order += image * num_patches
    masked = tl.load(num_masked + image).to(tl.int32)
    total = _row_entropies(
        x,
        token_stride,
        dim,
        order,
        0,
        masked,
        masked,
        num_patches,
        h_kept + image * h_rows * h_width,
        h_width,
        True,
        PRODUCTS,
        R,
        C,
        K,
    )
    tl.store(h + image, total / masked)
    if WITH_ROWS:
        total = _row_entropies(
            x,
            token_stride,
            dim,
            order,
            masked,
            num_patches,
            0,
            num_patches,
            spread_kept + image * spread_rows * spread_width,
            spread_width,
            INCLUDE_SELF,
            PRODUCTS,
            R,
            C,
            K,
        )
        tl.store(spread + image, total)


@triton.jit
def _times_slope(
    sum,
    x,
    token_stride,
    order,
    kept,
    width,
    row,
    row_ok,
    column,
    column_ok,
    ok,
    others,
    others_ok,
    channels,
    channel_ok,
    SPLIT: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Add derivatives by the logits (own tokens by others), times the tokens of others."""
    at = row * width
    z = tl.load(kept + (at + column), mask=row_ok & column_ok, other=0.0)
    greatest = tl.load(kept + (at + (width - 3)), mask=row_ok, other=0.0)
    weights = tl.load(kept + (at + (width - 2)), mask=row_ok, other=1.0)
    mean = tl.load(kept + (at + (width - 1)), mask=row_ok, other=0.0)
    counts = row_ok & column_ok & ok
    below = tl.where(counts, z - greatest, 0.0)
    slope = tl.where(counts, tl.exp(below) * (mean - below) / weights, 0.0)
    y = tl.load(
        x + (tl.load(order + others, mask=others_ok, other=0).to(tl.int32)[:, None] * token_stride + channels[None, :]),
        mask=others_ok[:, None] & channel_ok[None, :],
        other=0.0,
    )
    if SPLIT:  # rows of slopes add up to 0, so rounding them would show
        high = slope.to(y.dtype)
        sum = tl.dot(high, y, sum)
        sum = tl.dot((slope - high.to(tl.float32)).to(y.dtype), y, sum)
    else:
        sum = tl.dot(slope, y, sum, input_precision=PRODUCTS)
    return sum


@triton.jit(do_not_specialize=_VARYING)
def _backward_kernel(
    x,
    order,
    num_masked,
    gradient,
    by_h,
    by_h_stride,
    h_kept,
    h_rows,
    h_width,
    by_spread,
    by_spread_stride,
    spread_kept,
    spread_rows,
    spread_width,
    image_stride,
    token_stride,
    num_patches,
    dim,
    prefix,
    WITH_ROWS: tl.constexpr,
    INCLUDE_SELF: tl.constexpr,
    SPLIT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    """Gradient of R tokens of one image, K channels of it."""
    tile = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channels = tl.program_id(1) * K + tl.arange(0, K)
    channel_ok = channels < dim
    x += image * image_stride + prefix * token_stride
    order += image * num_patches
    gradient += image * (prefix + num_patches) * dim
    h_kept += image * h_rows * h_width
    masked = tl.load(num_masked + image).to(tl.int32)
    own = tile * R + tl.arange(0, R)
    own_ok = own < num_patches
    by_rows = tl.zeros((R, K), tl.float32)
    if tile * R < masked:  # own tokens are rows of H
        for begin in range(masked, num_patches, C):
            others = begin + tl.arange(0, C)
            ok = others < num_patches
            by_rows = _times_slope(
                by_rows,
                x,
                token_stride,
                order,
                h_kept,
                h_width,
                own[:, None],
                (own < masked)[:, None],
                (others - masked)[None, :],
                ok[None, :],
                True,
                others,
                ok,
                channels,
                channel_ok,
                SPLIT,
                PRODUCTS,
            )
    if (tile + 1) * R > masked:  # or columns
        for begin in range(0, masked, C):
            others = begin + tl.arange(0, C)
            ok = others < masked
            by_rows = _times_slope(
                by_rows,
                x,
                token_stride,
                order,
                h_kept,
                h_width,
                others[None, :],
                ok[None, :],
                (own - masked)[:, None],
                (own_ok & (own >= masked))[:, None],
                True,
                others,
                ok,
                channels,
                channel_ok,
                SPLIT,
                PRODUCTS,
            )
    total = by_rows * (tl.load(by_h + image * by_h_stride) / masked)
    if WITH_ROWS:
        spread_kept += image * spread_rows * spread_width
        by_rows = tl.zeros((R, K), tl.float32)
        if (tile + 1) * R > masked:
            for begin in range(0, num_patches, C):
                others = begin + tl.arange(0, C)
                ok = others < num_patches
                counts = (others[None, :] != own[:, None]) | INCLUDE_SELF
                by_rows = _times_slope(
                    by_rows,
                    x,
                    token_stride,
                    order,
                    spread_kept,
                    spread_width,
                    (own - masked)[:, None],
                    (own_ok & (own >= masked))[:, None],
                    others[None, :],
                    ok[None, :],
                    counts,
                    others,
                    ok,
                    channels,
                    channel_ok,
                    SPLIT,
                    PRODUCTS,
                )
        for begin in range(masked, num_patches, C):
            others = begin + tl.arange(0, C)
            ok = others < num_patches
            counts = (others[None, :] != own[:, None]) | INCLUDE_SELF
            by_rows = _times_slope(
                by_rows,
                x,
                token_stride,
                order,
                spread_kept,
                spread_width,
                (others - masked)[None, :],
                ok[None, :],
                own[:, None],
                own_ok[:, None],
                counts,
                others,
                ok,
                channels,
                channel_ok,
                SPLIT,
                PRODUCTS,
            )
        total += by_rows * tl.load(by_spread + image * by_spread_stride)
    at = (prefix + tl.load(order + own, mask=own_ok, other=0).to(tl.int32)) * dim
    tl.store(
        gradient + (at[:, None] + channels[None, :]),
        total.to(gradient.dtype.element_ty),
        mask=own_ok[:, None] & channel_ok[None, :],
    )
    if tile == 0:
        for token in range(prefix):
            nothing = tl.zeros((K,), tl.float32).to(gradient.dtype.element_ty)
            tl.store(gradient + token * dim + channels, nothing, mask=channel_ok)


@triton.jit
def _sort_kernel(mask, order, num_masked, num_patches, P: tl.constexpr):
    """One image: its masked patches, then its visible ones, and the number of masked ones."""
    image = tl.program_id(0).to(tl.int64)
    patches = tl.arange(0, P)
    ok = patches < num_patches
    masked = tl.load(mask + image * num_patches + patches, mask=ok, other=0).to(tl.int32)
    before = tl.cumsum(masked, axis=0) - masked
    count = tl.sum(masked, axis=0)
    place = tl.where(masked > 0, before, count + patches - before)
    tl.store(order + image * num_patches + place, patches, mask=ok)
    tl.store(num_masked + image, count)


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: int
) -> None:
    """Start a kernel; Triton's own way looks at each argument again each time, which takes longer than the rest."""
    where = arguments[0].device
    facts = [(each.dtype, each.data_ptr() % 16 == 0) if isinstance(each, Tensor) else each for each in arguments]
    key = (kernel, where, *facts, *constants)
    compiled = _compiled.get(key)
    if compiled is not None:
        try:
            compiled[grid](*arguments, *constants)
            return
        except (TypeError, AttributeError):  # another version of Triton
            _compiled.clear()
    compiled = kernel[grid](*arguments, *constants, **options)
    if len(_compiled) < 256 and hasattr(compiled, "packed_metadata"):
        _compiled[key] = compiled


def _products(dtype: torch.dtype) -> str:
    """How to make products of a dtype."""
    if dtype != torch.float32:
        return "ieee"
    if FLOAT32_PRODUCTS is not None:
        return FLOAT32_PRODUCTS
    try:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # torch has two ways to set it, and refuses to say it where both were used
        return "tf32x3"


def _tile(count: int, most: int) -> int:
    """Rows or columns at once."""
    return int(min(most, max(16, triton.next_power_of_2(count))))


def _kept(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for logits and three numbers per row."""
    return torch.empty(len(tokens), rows, -(-(columns + 3) // 16) * 16, dtype=torch.float32, device=tokens.device)


def forward_entropies(
    tokens: Tensor, split: SortedMask, include_self: bool | None
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """H of Eq. (2), the sum of Eq. (3) unless ``include_self`` is None, and what the backward pass needs.

    Shapes:
        tokens: batch num_tokens dim (channels of a token one after the other)
        returns: batch, batch, and a list of two
    """
    batch, _, dim = tokens.shape
    with_rows, half = include_self is not None, tokens.dtype != torch.float32
    h = torch.empty(batch, dtype=torch.float32, device=tokens.device)
    kept = [_kept(tokens, split.most_masked, split.most_visible)]
    if with_rows:
        kept.append(_kept(tokens, split.most_visible, split.num_patches))
    spread = torch.empty_like(h) if with_rows else None
    rows, columns = _tile(split.most_masked, 128), _tile(split.most_visible, 64)
    with torch.cuda.device_of(tokens):
        arguments = (
            tokens,
            split.order,
            split.num_masked,
            h,
            kept[0],
            *kept[0].shape[1:],
            h if spread is None else spread,
            kept[-1],
            *kept[-1].shape[1:],
            tokens.stride(0),
            tokens.stride(1),
            split.num_patches,
            dim,
            split.prefix_tokens,
        )
        constants = (with_rows, bool(include_self), _products(tokens.dtype), rows, columns, 64 if half else 32)
        warps = 8 if rows * columns > 4096 else 4
        _launch(_forward_kernel, (batch, 1, 1), arguments, constants, num_warps=warps, num_stages=3)
    return h, spread, kept


def backward_entropies(
    tokens: Tensor,
    split: SortedMask,
    include_self: bool | None,
    kept: list[Tensor],
    by_h: Tensor,
    by_spread: Tensor | None,
) -> Tensor:
    """Gradient of the tokens, in their dtype, 0 for prefix tokens; from the derivatives by what the forward returned.

    Shapes:
        tokens: batch num_tokens dim (channels of a token one after the other)
        by_h, by_spread: batch
        returns: batch num_tokens dim
    """
    batch, _, dim = tokens.shape
    half = tokens.dtype != torch.float32
    gradient = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    rows = _tile(split.num_patches, 64)
    channels = _tile(dim, 64)
    by_rows = by_h if by_spread is None else by_spread
    with torch.cuda.device_of(tokens):
        grid = (-(-split.num_patches // rows), -(-dim // channels), batch)
        arguments = (
            tokens,
            split.order,
            split.num_masked,
            gradient,
            by_h,
            by_h.stride(0),
            kept[0],
            *kept[0].shape[1:],
            by_rows,
            by_rows.stride(0),
            kept[-1],
            *kept[-1].shape[1:],
            tokens.stride(0),
            tokens.stride(1),
            split.num_patches,
            dim,
            split.prefix_tokens,
        )
        others = rows if half else min(rows, 32)
        products = _products(tokens.dtype)
        constants = (include_self is not None, bool(include_self), half, products, rows, others, channels)
        _launch(_backward_kernel, grid, arguments, constants, num_warps=4, num_stages=2)
    return gradient


def sort_masks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of each image with the masked ones first, each kind in row-major order, and how many are masked.

    Shapes:
        mask: batch num_patches
        returns: batch num_patches, batch
    """
    batch, num_patches = mask.shape
    mask = mask.contiguous()
    order = torch.empty(batch, num_patches, dtype=torch.int64, device=mask.device)
    num_masked = torch.empty(batch, dtype=torch.int64, device=mask.device)
    with torch.cuda.device_of(mask):
        _sort_kernel[(batch,)](mask, order, num_masked, num_patches, P=triton.next_power_of_2(num_patches))
    return order, num_masked
