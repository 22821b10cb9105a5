"""The three losses of masked token optimization, Eqs. (3)-(5), their sum, and its settings.

Weights are not printed in the paper, and as printed L_spa is a sum that can reach hundreds beside a reconstruction
loss below 1. So weights and reduction are settings: :meth:`MTOConfig.paper` is the literal reading, ``MTOConfig()`` a
bounded one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.affinity.entropies import masked_rows_entropy, token_products, visible_rows_entropy
from mto_analysis.runtime.settings import Natural, NonNegative, Positive, Rising, Settings

Similarity = Literal["dot", "scaled_dot", "cosine"]

# The values of settings that are one of a few words.
_CHOICES = {
    "reduction": ("sum", "mean"),
    "direction": ("descending", "as_printed"),
    "similarity": ("dot", "scaled_dot", "cosine"),
}


def _check_choice(name: str, value: str) -> None:
    choices = _CHOICES[name.rpartition("_")[2]]
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")


def _similar(tokens: Tensor, similarity: Similarity) -> Tensor:
    """Tokens whose dot products are the wanted similarity, in at least float32."""
    if similarity == "dot":
        return tokens
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if similarity == "cosine":
        return torch.nn.functional.normalize(x, dim=-1)
    return x / math.sqrt(math.sqrt(x.shape[-1]))


def sparsity_loss(
    tokens: Tensor,
    mask: Tensor | TokenSplit,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    include_self: bool = True,
    similarity: Similarity = "dot",
) -> Tensor:
    r"""Entropy of visible tokens' affinity over all tokens at layer depth 0, Eq. (3).

    .. math:: L_{spa} = -\sum_{i \notin \delta_M} \sum_j p_{ij} \log p_{ij}, \quad p = \psi(X_0 X_0^\top)

    Minimizing it sharpens what visible tokens attend to. The supplement shows that with two or more equal masked tokens
    the minimum prefers visible ones. It assumes equal masked tokens (not so where positions were added), and a row
    includes the token itself: growing visible norms drive the loss to 0 without touching a masked token.

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: scalar (nats; mean over the batch)

    Args:
        tokens: Initial embedding, without prefix tokens.
        mask: True where masked, or its :class:`~mto_analysis.affinity.TokenSplit`.
        reduction: Over visible rows: ``sum`` as printed, or ``mean``.
        include_self: Whether a row's own token is among its columns, as printed.
        similarity: ``dot`` as printed, ``scaled_dot`` (divided by the root of the width) or ``cosine``.

    Raises:
        ValueError: If a row of ``mask`` masks no patch or every patch, tokens do not fit it, or a word is unknown.

    Source:
        "Emerging Property of Masked Token for Effective Pre-training" (ECCV 2024), Eq. (3).

    Example:
        >>> mask = torch.tensor([[True, True, False, False]])
        >>> sparsity_loss(torch.zeros(1, 4, 8), mask)  # two visible rows, uniform over four tokens
        tensor(2.7726)
    """
    _check_choice("reduction", reduction)
    _check_choice("similarity", similarity)
    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    masked, visible = token_products(_similar(tokens, similarity), split, with_visible=True)
    rows = visible_rows_entropy(masked, visible, split, include_self=include_self)
    return _reduce_rows(rows, split, reduction).mean()


def _reduce_rows(rows: Tensor, split: TokenSplit, reduction: Literal["sum", "mean"]) -> Tensor:
    return rows if reduction == "sum" else rows / split.num_visible


def embedding_loss(heterogeneity: Tensor, *, eps: float = 1e-6) -> Tensor:
    r"""Reciprocal of the heterogeneity at layer depth 0, Eq. (4); minimizing it raises H_0.

    .. math:: L_e = 1 / (H_0 + \epsilon)

    Shapes:
        heterogeneity: batch
        returns: scalar (per nat, up to 1 / eps; mean over the batch)

    Args:
        heterogeneity: H_0 of each image.
        eps: Bounds the loss, and its gradient by ``1 / eps ** 2``.

    Example:
        >>> embedding_loss(torch.tensor([2.0, 2.0]))
        tensor(0.5000)
    """
    return (1 / (heterogeneity.to(torch.promote_types(heterogeneity.dtype, torch.float32)) + eps)).mean()


def ranking_loss(heterogeneities: Tensor, *, direction: Literal["descending", "as_printed"] = "descending") -> Tensor:
    r"""Pairwise ranking of heterogeneity along the depth, Eq. (5).

    .. math:: L_r = \sum_{l=1}^{L} \log(1 + e^{H_l - H_{l-1}})

    This is the direction of the paper's text: minimizing it makes H fall with layer depth. The printed exponent has the
    opposite sign (``as_printed``), and minimizing that makes H rise. Either way the loss does not change when all H
    shift together: its derivatives sum to 0.

    Shapes:
        heterogeneities: layers batch (layer depths 0 to L)
        returns: scalar (L * log 2 where all H are equal; mean over the batch)

    Args:
        heterogeneities: H of each layer depth and image.
        direction: ``descending`` (text) or ``as_printed``.

    Raises:
        ValueError: If the direction is unknown.

    Example:
        >>> ranking_loss(torch.tensor([[1.0], [1.0]]))
        tensor(0.6931)
    """
    _check_choice("direction", direction)
    h = heterogeneities.to(torch.promote_types(heterogeneities.dtype, torch.float32))
    rise = h[1:] - h[:-1]
    return torch.nn.functional.softplus(rise if direction == "descending" else -rise).sum(dim=0).mean()


@dataclass(frozen=True)
class MTOConfig(Settings):
    """Settings of masked token optimization.

    The defaults keep every term of the order of 1: L_spa as a mean over rows, a larger epsilon, small weights. Of six
    candidates they had the best linear probe in the mean over small MAE and SimMIM models after three epochs of
    CIFAR-10, two seeds each: first of six for SimMIM, last for MAE (``docs/results.md``).

    Args:
        sparsity_weight: Of L_spa.
        embedding_weight: Of L_e.
        ranking_weight: Of L_r.
        sparsity_reduction: ``sum`` over visible rows as printed, or ``mean``.
        include_self: Whether a row of Eq. (3) includes the token itself, as printed.
        ranking_direction: ``descending`` (the text) or ``as_printed``.
        eps: Of Eq. (4).
        similarity: ``dot`` as printed, ``scaled_dot`` or ``cosine``.
        layers: Layer depths that Eq. (5) ranks, ascending; all by default.
        warmup_steps: Weights rise linearly from 0 over so many steps.

    Raises:
        ValueError: If a value is out of range.
    """

    sparsity_weight: NonNegative = 0.01
    embedding_weight: NonNegative = 0.01
    ranking_weight: NonNegative = 0.01
    sparsity_reduction: Literal["sum", "mean"] = "mean"
    include_self: bool = True
    ranking_direction: Literal["descending", "as_printed"] = "descending"
    eps: Positive = 0.1
    similarity: Similarity = "dot"
    layers: Annotated[tuple[Natural, ...], Rising()] | None = None
    warmup_steps: Natural = 0

    def __post_init__(self) -> None:
        """Check what belongs together, too."""
        super().__post_init__()
        self._refuse(("layers must be at least two ascending layer depths", len(self.layers or (0, 1)) < 2))

    @classmethod
    def paper(cls) -> MTOConfig:
        """The literal Algorithm 1: unweighted sum, L_spa summed over rows, epsilon 1e-6, direction of the text."""
        return cls(sparsity_weight=1, embedding_weight=1, ranking_weight=1, sparsity_reduction="sum", eps=1e-6)

    def warmup(self, step: int) -> float:
        """Factor on all weights at a step, counted from 0.

        Example:
            >>> [MTOConfig(warmup_steps=2).warmup(step) for step in range(3)]
            [0.5, 1.0, 1.0]
        """
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0


_DEFAULTS = MTOConfig()


class MTOTerms(NamedTuple):
    """The loss and what it is made of; terms are before their weights.

    Shapes:
        loss, sparsity, embedding, ranking: scalar
        heterogeneity: layers batch
    """

    loss: Tensor
    sparsity: Tensor
    embedding: Tensor
    ranking: Tensor
    heterogeneity: Tensor


class LayerProducts(NamedTuple):
    """What the losses need of one layer depth.

    Shapes:
        masked: products of visible with masked tokens
        visible: of visible tokens with each other; only at layer depth 0, and only for L_spa
    """

    split: TokenSplit
    masked: Tensor
    visible: Tensor | None = None


def layer_products(tokens: Tensor, split: TokenSplit, depth: int, config: MTOConfig) -> LayerProducts:
    """What the losses need of one layer depth.

    Shapes:
        tokens: batch num_tokens dim (the split's prefix tokens, then patches)
    """
    with_visible = depth == 0 and config.sparsity_weight > 0
    return LayerProducts(split, *token_products(_similar(tokens, config.similarity), split, with_visible=with_visible))


def combine_terms(layers: Sequence[LayerProducts], config: MTOConfig, *, step: int = 0) -> MTOTerms:
    """Algorithm 1 from the products of all layer depths: each term, weighted and added."""
    ranked = list(range(len(layers)) if config.layers is None else config.layers)
    wanted = {0} if config.embedding_weight > 0 else set()
    wanted.update(ranked if config.ranking_weight > 0 else ())
    # Layer depths that no term asks for stay out of the graph.
    products = [layer.masked if depth in wanted else layer.masked.detach() for depth, layer in enumerate(layers)]
    groups = itertools.groupby(zip(layers, products, strict=True), key=lambda pair: id(pair[0].split))
    h = torch.cat([_group_heterogeneity(list(group)) for _, group in groups])
    zero = h.new_zeros(())
    sparsity = zero
    split, masked, visible = layers[0]
    if visible is not None:
        rows = visible_rows_entropy(masked, visible, split, include_self=config.include_self)
        sparsity = _reduce_rows(rows, split, config.sparsity_reduction).mean()
    embedding = embedding_loss(h[0], eps=config.eps) if config.embedding_weight > 0 else zero
    ranking = zero
    if config.ranking_weight > 0:
        ranking = ranking_loss(h if config.layers is None else h[ranked], direction=config.ranking_direction)
    weighted = config.sparsity_weight * sparsity + config.embedding_weight * embedding + config.ranking_weight * ranking
    return MTOTerms(config.warmup(step) * weighted, sparsity, embedding, ranking, h)


def _group_heterogeneity(group: Sequence[tuple[LayerProducts, Tensor]]) -> Tensor:
    return masked_rows_entropy([products for _, products in group], group[0][0].split)


def mto_loss(
    layers: Sequence[Tensor],
    mask: Tensor | TokenSplit | Sequence[Tensor | TokenSplit],
    config: MTOConfig | None = None,
    *,
    step: int = 0,
) -> MTOTerms:
    """Masked token optimization from the tokens of all layer depths (Algorithm 1).

    For a model's own training step :func:`attach_mto` does the same without keeping the tokens of all layers.

    Shapes:
        layers: one ``batch num_patches dim`` per layer depth 0 to L (widths may differ)
        mask: batch num_patches, or one such per layer depth (Swin)

    Args:
        layers: Patch tokens, without prefix tokens.
        mask: True where masked, or its :class:`~mto_analysis.affinity.TokenSplit`, which ``torch.compile`` needs; where
            the number of patches changes with the depth, one for each layer depth.
        config: Settings.
        step: For the warm-up of weights.

    Raises:
        ValueError: If a row of ``mask`` masks no patch or every patch, tokens do not fit it, or there are fewer layers
            than two or than ``config.layers`` asks for.

    Example:
        >>> mask = torch.tensor([[True, True, False, False]])
        >>> terms = mto_loss([torch.zeros(1, 4, 8)] * 3, mask, MTOConfig.paper())
        >>> [round(term.item(), 3) for term in terms[1:4]]
        [2.773, 1.443, 1.386]
    """
    if len(layers) < 2:
        raise ValueError(f"layers must hold layer depth 0 and at least one more, got {len(layers)}")
    config = config or _DEFAULTS
    if config.layers and config.layers[-1] >= len(layers):
        raise ValueError(f"config.layers must be 0 to {len(layers) - 1}, got {config.layers}")
    mask = TokenSplit(mask) if isinstance(mask, Tensor) else mask
    masks = [mask] * len(layers) if isinstance(mask, TokenSplit) else mask
    splits = [each if isinstance(each, TokenSplit) else TokenSplit(each) for each in masks]
    products = [
        layer_products(tokens, split, depth, config)
        for depth, (tokens, split) in enumerate(zip(layers, splits, strict=True))
    ]
    return combine_terms(products, config, step=step)
