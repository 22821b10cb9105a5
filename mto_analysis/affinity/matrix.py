"""Eq. (2) and the affinity matrix: how masked tokens resemble visible ones. Pure functions of tokens and mask.

Rows of an affinity are queries, columns are keys; masked tokens come first. Tokens never include prefix tokens.
Half precision is raised to float32; float64 stays float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mto_analysis.affinity.products import dot_products
from mto_analysis.affinity.split import TokenSplit

__all__ = [
    "Quadrants",
    "affinity_matrix",
    "entropy_from_sums",
    "heterogeneity",
    "quadrant_mass",
    "row_entropy",
    "split_quadrants",
]


def row_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of the softmax of each row, from the logits.

    .. math:: H(z) = \log S - \frac{1}{S} \sum_j e^{z_j - m} (z_j - m), \quad S = \sum_j e^{z_j - m}, \; m = \max_j z_j

    Unscaled dot products saturate the softmax: ``-p log p`` then gives NaN, and so do the gradients of ``xlogy``.
    This form has finite values and gradients for any finite logits, and so has :math:`-\sum_j p_j \log p_j` from the
    logarithm of the softmax, which takes half as many kernels on a GPU.

    Shapes:
        logits: ... num_keys
        returns: ... (nats, from 0 to log(num_keys))

    Example:
        >>> row_entropy(torch.tensor([[0.0, 0.0], [0.0, 1000.0]]))
        tensor([0.6931, 0.0000])
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if z.is_cuda:
        log_p = z.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1)
    z = z - z.amax(dim=-1, keepdim=True).detach()
    weight = z.exp()
    total = weight.sum(dim=-1)
    return entropy_from_sums(total, (weight * z).sum(dim=-1))


def entropy_from_sums(total: Tensor, moment: Tensor) -> Tensor:
    r"""Entropy of a softmax from two sums over its columns, :math:`H = \log S - T / S`.

    This is the only place where this formula of :func:`row_entropy` is evaluated. Who makes the sums in another way
    (for two kinds of columns at once, or with an analytic gradient) calls it too.

    Shapes:
        total: ... (:math:`S = \sum_j e^{z_j - m}`)
        moment: ... (:math:`T = \sum_j e^{z_j - m} (z_j - m)`)
        returns: ... (nats)

    Example:
        >>> entropy_from_sums(torch.tensor([2.0]), torch.tensor([0.0]))
        tensor([0.6931])
    """
    return total.log() - moment / total


def heterogeneity(tokens: Tensor, mask: Tensor | TokenSplit) -> Tensor:
    r"""Mean entropy of the affinity of masked tokens over visible tokens, Eq. (2).

    .. math:: H = -\frac{1}{|\delta_M|} \sum_{i,j} A_{ij} \log A_{ij}, \quad A = \psi(X_M X_V^\top)

    High: no visible token stands out. Low: each masked token resembles few visible ones. The softmax runs over visible
    tokens only, so H is not the entropy of a slice of the affinity matrix over all tokens; dot products are not scaled.
    The bound depends on the mask: compare models by H / log(num_visible).

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: batch (nats, from 0 to log(num_visible))

    Args:
        tokens: Embeddings at one layer depth, without prefix tokens.
        mask: True where masked, or its :class:`TokenSplit` when several layer depths share it.

    Raises:
        ValueError: If shapes disagree, or a row of ``mask`` masks no patch or every patch.

    Source:
        "Emerging Property of Masked Token for Effective Pre-training" (ECCV 2024), Eq. (2).

    Example:
        >>> tokens = torch.zeros(1, 4, 8)  # all alike: uniform over 2 visible tokens
        >>> heterogeneity(tokens, torch.tensor([[True, True, False, False]]))
        tensor([0.6931])
    """
    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    return split.map(tokens, _mean_entropy_over_visible, only_products=True)


def _mean_entropy_over_visible(x: Tensor, num_masked: int) -> Tensor:
    return row_entropy(dot_products(x[:, :num_masked], x[:, num_masked:])).mean(dim=1)


def affinity_matrix(
    tokens: Tensor,
    mask: Tensor | TokenSplit | None = None,
    *,
    kind: Literal["softmax", "dot", "cosine"] = "softmax",
) -> Tensor:
    r"""Affinity between all pairs of tokens, :math:`\psi(X X^\top)` (Fig. 2, and Eq. 3).

    Rows are queries, columns keys; with a mask, both are ordered masked first, then visible.

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: batch num_patches num_patches (``softmax``: rows add to 1; ``cosine``: from -1 to 1; ``dot``: any)

    Args:
        tokens: Embeddings at one layer depth, without prefix tokens.
        mask: True where masked; without it tokens keep their order.
        kind: The paper calls the softmax the affinity matrix and its images "correlation values": name the kind
            beside every image.

    Raises:
        ValueError: If shapes disagree or the kind is unknown.

    Example:
        >>> affinity_matrix(torch.zeros(1, 2, 3))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    if kind not in ("softmax", "dot", "cosine"):
        raise ValueError(f"kind must be softmax, dot or cosine, got {kind!r}")

    def affinity(x: Tensor, num_masked: int = 0) -> Tensor:
        x = torch.nn.functional.normalize(x, dim=-1) if kind == "cosine" else x
        products = x @ x.mT
        return products.softmax(dim=-1) if kind == "softmax" else products

    if mask is None:
        return affinity(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    return split.map(tokens, affinity)


class Quadrants(NamedTuple):
    """Quadrants of an affinity in reading order, masked tokens first (paper, sections 3.2 and 4)."""

    first: Tensor  #: masked-masked
    second: Tensor  #: masked-visible, where H is defined
    third: Tensor  #: visible-masked
    fourth: Tensor  #: visible-visible


def split_quadrants(affinity: Tensor, num_masked: int) -> Quadrants:
    """Cut an affinity whose rows and columns are ordered masked first into its four quadrants.

    Shapes:
        affinity: ... num_patches num_patches
        returns: ... num_masked num_masked, ... num_masked num_visible, ... and so on

    Raises:
        ValueError: If ``num_masked`` leaves a quadrant empty.

    Example:
        >>> split_quadrants(torch.arange(9).reshape(3, 3), num_masked=1).second
        tensor([[1, 2]])
    """
    if not 0 < num_masked < affinity.shape[-1]:
        raise ValueError(f"num_masked must lie between 0 and {affinity.shape[-1]}, got {num_masked}")
    top, bottom = affinity[..., :num_masked, :], affinity[..., num_masked:, :]
    return Quadrants(top[..., :num_masked], top[..., num_masked:], bottom[..., :num_masked], bottom[..., num_masked:])


def quadrant_mass(tokens: Tensor, mask: Tensor | TokenSplit) -> Tensor:
    """Probability mass in each quadrant of the affinity matrix, as a mean over the quadrant's rows.

    A row's mass adds to 1: the first and second quadrant share that of masked rows, the third and fourth that of
    visible rows.

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: batch 4 (quadrants 1 to 4, each from 0 to 1)

    Raises:
        ValueError: If shapes disagree, or a row of ``mask`` masks no patch or every patch.

    Example:
        >>> quadrant_mass(torch.zeros(1, 4, 8), torch.tensor([[True, False, False, False]]))
        tensor([[0.2500, 0.7500, 0.2500, 0.7500]])
    """

    def masses(x: Tensor, num_masked: int) -> Tensor:
        quadrants = split_quadrants(dot_products(x, x).softmax(dim=-1), num_masked)
        return torch.stack([quadrant.sum(dim=-1).mean(dim=-1) for quadrant in quadrants], dim=-1)

    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    return split.map(tokens, masses, only_products=True)
