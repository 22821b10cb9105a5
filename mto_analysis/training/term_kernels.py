"""The rest of the losses on a CUDA device in few kernels: where masked tokens are, and the terms of Eqs. (3)-(5).

Import it only where :mod:`triton` is there; :mod:`mto_analysis.training.fused` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from mto_analysis.training.losses import MTOConfig

__all__ = ["MOST_ROWS", "backward_terms", "equal_rows", "forward_terms"]

#: Candidates that :func:`equal_rows` can compare at once.
MOST_ROWS = 3


@triton.jit
def _different(tile, row, stride, patches, channels, ok):
    """How many channels differ from a row, of each patch."""
    other = tl.load(row + patches[:, None] * stride + channels[None, :], mask=ok, other=0.0).to(tile.dtype)
    return tl.sum(((tile != other) & ok).to(tl.int32), axis=1)


@triton.jit
def _equal_kernel(
    x,
    first,
    second,
    third,
    found,
    first_stride,
    second_stride,
    third_stride,
    image_stride,
    token_stride,
    batch,
    num_patches,
    dim,
    COUNT: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
):
    """Which of P patches of one image equal each of COUNT rows."""
    image = tl.program_id(1).to(tl.int64)
    patches = tl.program_id(0) * P + tl.arange(0, P)
    patch_ok = patches < num_patches
    x += image * image_stride
    by_first = tl.zeros((P,), tl.int32)
    by_second = tl.zeros((P,), tl.int32)
    by_third = tl.zeros((P,), tl.int32)
    for k in range(0, dim, K):
        channels = k + tl.arange(0, K)
        ok = patch_ok[:, None] & (channels < dim)[None, :]
        tile = tl.load(x + patches[:, None] * token_stride + channels[None, :], mask=ok, other=0.0)
        by_first += _different(tile, first, first_stride, patches, channels, ok)
        if COUNT > 1:
            by_second += _different(tile, second, second_stride, patches, channels, ok)
        if COUNT > 2:
            by_third += _different(tile, third, third_stride, patches, channels, ok)
    found += image * num_patches + patches
    tl.store(found, by_first == 0, mask=patch_ok)
    if COUNT > 1:
        tl.store(found + batch * num_patches, by_second == 0, mask=patch_ok)
    if COUNT > 2:
        tl.store(found + 2 * batch * num_patches, by_third == 0, mask=patch_ok)


def equal_rows(tokens: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Which tokens equal a row bit for bit, once the row has their dtype.

    Shapes:
        tokens: batch num_patches dim (channels of a token one after the other)
        rows: each num_patches dim, or what broadcasts to it
        returns: len(rows) batch num_patches
    """
    batch, num_patches, dim = tokens.shape
    candidates = [row.detach() for row in rows]
    candidates = [(row[0] if row.ndim == 3 else row).expand(num_patches, dim) for row in candidates]
    candidates = [row if row.stride(-1) == 1 else row.contiguous() for row in candidates]
    padded = (candidates * MOST_ROWS)[:MOST_ROWS]
    found = torch.empty(len(rows), batch, num_patches, dtype=torch.bool, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _equal_kernel[(triton.cdiv(num_patches, 16), batch)](
            tokens,
            *padded,
            found,
            *(row.stride(0) for row in padded),
            tokens.stride(0),
            tokens.stride(1),
            batch,
            num_patches,
            dim,
            COUNT=len(rows),
            P=16,
            K=128,
        )
    return found


@triton.jit
def _forward_kernel(
    h,
    spread,
    num_masked,
    loss,
    sparsity,
    embedding,
    ranking,
    layers,
    batch,
    num_patches,
    sparsity_weight,
    embedding_weight,
    ranking_weight,
    eps,
    sign,
    SPARSITY: tl.constexpr,
    MEAN: tl.constexpr,
    EMBEDDING: tl.constexpr,
    RANKING: tl.constexpr,
    B: tl.constexpr,
):
    """Means over the batch of the terms that are switched on (the others are 0), and their weighted sum."""
    spreads = tl.zeros((B,), tl.float32)
    inverses = tl.zeros((B,), tl.float32)
    rises = tl.zeros((B,), tl.float32)
    for begin in range(0, batch, B):
        images = begin + tl.arange(0, B)
        ok = images < batch
        before = tl.load(h + images, mask=ok, other=1.0)
        if SPARSITY:
            value = tl.load(spread + images, mask=ok, other=0.0)
            if MEAN:
                value /= num_patches - tl.load(num_masked + images, mask=ok, other=0).to(tl.float32)
            spreads += value
        if EMBEDDING:
            inverses += tl.where(ok, 1.0 / (before + eps), 0.0)
        if RANKING:
            for layer in range(1, layers):
                now = tl.load(h + layer * batch + images, mask=ok, other=1.0)
                rise = sign * (now - before)
                softplus = tl.maximum(rise, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(rise)))
                # A maximum forgets what is no number.
                rises += tl.where(ok, tl.where(rise == rise, softplus, rise), 0.0)
                before = now
    by_sparsity = tl.sum(spreads, axis=0) / batch
    by_embedding = tl.sum(inverses, axis=0) / batch
    by_ranking = tl.sum(rises, axis=0) / batch
    weighted = sparsity_weight * by_sparsity + embedding_weight * by_embedding + ranking_weight * by_ranking
    tl.store(loss, weighted)
    tl.store(sparsity, by_sparsity)
    tl.store(embedding, by_embedding)
    tl.store(ranking, by_ranking)


@triton.jit
def _backward_kernel(
    by,
    by_step,
    h,
    num_masked,
    gradient_h,
    gradient_spread,
    layers,
    batch,
    num_patches,
    sparsity_weight,
    embedding_weight,
    ranking_weight,
    eps,
    sign,
    SPARSITY: tl.constexpr,
    MEAN: tl.constexpr,
    EMBEDDING: tl.constexpr,
    RANKING: tl.constexpr,
    B: tl.constexpr,
):
    """Derivatives by the entropies of B images; ``by`` holds one number for all terms, or one for each."""
    images = tl.program_id(0) * B + tl.arange(0, B)
    ok = images < batch
    if SPARSITY:
        value = tl.zeros((B,), tl.float32) + tl.load(by) * sparsity_weight / batch
        if MEAN:
            value /= num_patches - tl.load(num_masked + images, mask=ok, other=0).to(tl.float32)
        tl.store(gradient_spread + images, value, mask=ok)
    before = tl.load(h + images, mask=ok, other=1.0)
    slope = tl.zeros((B,), tl.float32)
    if EMBEDDING:
        slope -= tl.load(by + by_step) * embedding_weight / batch / ((before + eps) * (before + eps))
    factor = tl.load(by + 2 * by_step) * ranking_weight * sign / batch
    for layer in range(1, layers):
        now = tl.load(h + layer * batch + images, mask=ok, other=1.0)
        rising = tl.zeros((B,), tl.float32)
        if RANKING:
            rising += factor / (1.0 + tl.exp(-sign * (now - before)))
        tl.store(gradient_h + (layer - 1) * batch + images, slope - rising, mask=ok)
        slope = rising
        before = now
    tl.store(gradient_h + (layers - 1) * batch + images, slope, mask=ok)


def _switches(config: MTOConfig, spread: Tensor | None) -> dict[str, bool]:
    return {
        "SPARSITY": spread is not None,
        "MEAN": config.sparsity_reduction == "mean",
        "EMBEDDING": config.embedding_weight > 0,
        "RANKING": config.ranking_weight > 0,
    }


def _weights(config: MTOConfig, factor: float) -> tuple[float, float, float]:
    return factor * config.sparsity_weight, factor * config.embedding_weight, factor * config.ranking_weight


def _sign(config: MTOConfig) -> float:
    return 1.0 if config.ranking_direction == "descending" else -1.0


def forward_terms(
    h: Tensor, spread: Tensor | None, num_masked: Tensor, num_patches: int, config: MTOConfig, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss, L_spa, L_e and L_r from the entropies; weights are multiplied by ``factor``.

    Shapes:
        h: layers batch
        spread, num_masked: batch
        returns: four scalars
    """
    layers, batch = h.shape
    loss, sparsity, embedding, ranking = (torch.empty((), dtype=torch.float32, device=h.device) for _ in range(4))
    with torch.cuda.device_of(h):
        _forward_kernel[(1,)](
            h,
            h if spread is None else spread,
            num_masked,
            loss,
            sparsity,
            embedding,
            ranking,
            layers,
            batch,
            num_patches,
            *_weights(config, factor),
            config.eps,
            _sign(config),
            **_switches(config, spread),
            B=128,
        )
    return loss, sparsity, embedding, ranking


def backward_terms(
    by: Tensor,
    h: Tensor,
    spread: Tensor | None,
    num_masked: Tensor,
    num_patches: int,
    config: MTOConfig,
    factor: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Derivatives by ``h`` and ``spread``, from that by the loss, or from those by L_spa, L_e and L_r (no factor).

    Shapes:
        by: scalar, or 3 where ``factor`` is None
        h: layers batch
        spread, num_masked: batch
    """
    layers, batch = h.shape
    gradient_h = torch.empty_like(h)
    gradient_spread = None if spread is None else torch.empty_like(spread)
    with torch.cuda.device_of(h):
        _backward_kernel[(triton.cdiv(batch, 128),)](
            by,
            0 if factor is not None else 1,
            h,
            num_masked,
            gradient_h,
            gradient_h if gradient_spread is None else gradient_spread,
            layers,
            batch,
            num_patches,
            *((1.0, 1.0, 1.0) if factor is None else _weights(config, factor)),
            config.eps,
            _sign(config),
            **_switches(config, spread),
            B=128,
        )
    return gradient_h, gradient_spread
