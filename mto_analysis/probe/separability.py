"""How well a linear function tells masked from visible tokens, on images that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens
from mto_analysis.probe.accumulating import Row, Setup, Sums, TokenMeasure, groups_of, wide
from mto_analysis.runtime.statistics import reach_of_mean

#: Tokens of each kind and image that are taken: more of one image tell little that is new, and take time.
MOST_TOKENS = 32

#: Of the mean second moment of a channel, added to each channel's: below it a difference counts as rounding.
RIDGE = 1e-6


def label_moments(tokens: Tensor, mask: Tensor) -> Tensor:
    r"""Second moments of tokens beside a constant and their label, 1 for masked and -1 for visible, summed over images.

    Each kind of tokens has half of the weight of an image, whatever the mask ratio. Of each kind at most
    ``MOST_TOKENS`` of an image are taken, spread evenly.

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: dim + 2, dim + 2 (channels, constant, label; float64)

    Example:
        >>> label_moments(torch.zeros(1, 3, 1), torch.tensor([[True, False, False]])).diagonal().tolist()
        [0.0, 1.0, 1.0]
    """
    share = torch.zeros_like(mask, dtype=torch.float32)
    for kind in (mask, ~mask):
        taken = _spread_evenly(kind)
        share += taken * (0.5 / taken.sum(dim=1, keepdim=True))
    chosen = share > 0
    label = wide(torch.where(mask[chosen], 1.0, -1.0))
    rows = torch.cat([wide(tokens[chosen]), torch.stack([torch.ones_like(label), label], dim=-1)], dim=-1)
    rows *= wide(share[chosen]).sqrt()[:, None]
    return rows.mT @ rows


def _spread_evenly(kind: Tensor) -> Tensor:
    """At most ``MOST_TOKENS`` of the tokens of a kind in each image, every so many: ``batch num_patches``."""
    number = kind.sum(dim=1, keepdim=True)
    place = kind.cumsum(dim=1) - 1
    most = number.clamp_max(MOST_TOKENS)
    return kind & ((place * most) // number != ((place - 1) * most) // number)


def explained_labels(fitted: Tensor, tested: Tensor) -> Tensor:
    r"""Share of the variance of labels that a least-squares fit explains on other tokens.

    .. math:: R^2 = 1 - \overline{(y - w^\top x - b)^2}, \quad
        (w, b) = \arg\min \overline{(y - w^\top x - b)^2} + \lambda |w|^2

    1: a hyperplane separates the two kinds perfectly and they are flat beside it; 0: no better than a constant;
    negative: worse. Of two normal distributions with a common covariance it tends to :math:`D^2 / (D^2 + 4)`, with
    :math:`D` their Mahalanobis distance, and a linear classifier is right in a share :math:`\Phi(D / 2)`.
    :math:`\lambda` is ``RIDGE`` times the mean second moment of a channel.

    Shapes:
        fitted, tested: dim + 2, dim + 2 (:func:`label_moments`)
        returns: scalar (at most 1)

    Source:
        Least-squares discrimination (Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning",
        section 4.3), cross-validated from second moments.
    """
    left = fitted[:-1, :-1].clone()
    scale = left.diagonal()[:-1].mean()
    left.diagonal()[:-1].add_(RIDGE * scale + torch.finfo(left.dtype).tiny)
    weights = torch.cholesky_solve(fitted[:-1, -1:], torch.linalg.cholesky(left)).squeeze(1)
    residual = torch.cat([weights, weights.new_tensor([-1.0])])
    return 1 - residual @ tested @ residual / tested[-1, -1]


class Separability(TokenMeasure):
    """:func:`explained_labels` with cross-validation over five groups of images; the interval is over groups.

    Memory: ``40 * dim**2`` bytes per layer depth (24 MB for ViT-B, 310 MB for all depths), for any number of images.
    """

    columns = ()

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._moments = Sums()  # by stack, layer depth and group of images
        self._counts = Sums()  # images by stack and group

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Add a batch to the moments of its groups."""
        groups = groups_of(names)
        for group in set(groups.tolist()):
            rows = (groups == group).nonzero().squeeze(1).to(layer.mask.device)
            self._moments.add((stack, layer.depth, group), label_moments(layer.tokens[rows], layer.mask[rows]))
            if layer.depth == 0:
                self._counts.add((stack, group), len(rows))
        return {}

    def rows(self) -> list[Row]:
        """By stack and layer depth."""
        found = []
        for stack, depth in dict.fromkeys((stack, depth) for stack, depth, _ in self._moments):
            groups = {group: each for (*key, group), each in self._moments.items() if key == [stack, depth]}
            if len(groups) < 2:
                self.refuse("it takes images of at least two groups, fit and test; measure more images", stack)
                continue
            total = torch.stack(list(groups.values())).sum(dim=0)
            shares = np.array([explained_labels(total - each, each).item() for each in groups.values()])
            weights = np.array([self._counts[stack, group] for group in groups])
            value = float((weights * shares).sum() / weights.sum())
            half = float(shares.std(ddof=1) * reach_of_mean(len(shares)))
            num_images = int(weights.sum()) // self.setup.masks_per_image
            found.append(Row(stack, depth, "separability", value, value - half, value + half, num_images))
        return found

    def kept(self) -> Any:
        """Moments and counts."""
        return self._moments.kept(), self._counts.kept()

    def put_together(self, parts: Sequence[Any]) -> None:
        """Of all processes."""
        for sums, kept in zip((self._moments, self._counts), zip(*parts, strict=True), strict=True):
            sums.take(kept)
