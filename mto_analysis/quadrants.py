"""Fig. 2 in numbers: mass, moments and row entropy of each quadrant of the affinity, and mean maps, streamed.

All numbers of a layer depth come from one product of tokens; second moments and masses are thin products with it, so that
measuring everything costs little more than the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit, affinity_matrix, row_entropy

__all__ = ["QUADRANT_STATISTICS", "MeanMaps", "quadrant_statistics"]

#: Names of the numbers of one quadrant, each prefixed ``q1_`` to ``q4_``.
QUADRANT_STATISTICS = ("mass", "dot_mean", "dot_std", "cosine_mean", "cosine_std")


def quadrant_statistics(tokens: Tensor, mask: Tensor | TokenSplit) -> Mapping[str, Tensor]:
    """Everything that is said of an affinity in one pass.

    Keys: ``heterogeneity`` (Eq. 2); for each quadrant ``q1_`` (masked-masked) to ``q4_`` (visible-visible) ``mass`` (share
    of a row's softmax, mean over its rows), ``dot_mean``, ``dot_std``, ``cosine_mean``, ``cosine_std`` over its pairs of
    tokens, a token with itself included; ``row_entropy_masked``, ``row_entropy_visible`` (nats, of the softmax over all
    tokens, mean over rows).

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: name -> batch

    Raises:
        ValueError: If shapes disagree, or a row of ``mask`` masks no patch or every patch.

    Example:
        >>> numbers = quadrant_statistics(torch.ones(1, 4, 2), torch.tensor([[True, False, False, False]]))
        >>> numbers["q2_mass"], numbers["q2_dot_mean"], numbers["q4_cosine_std"]
        (tensor([0.7500]), tensor([2.]), tensor([0.]))
    """
    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    table = split.map(tokens, _statistics)
    return dict(zip(_NAMES, table.unbind(dim=-1), strict=True))


_NAMES = (
    "heterogeneity",
    "row_entropy_masked",
    "row_entropy_visible",
    *(f"q{quadrant}_{name}" for name in QUADRANT_STATISTICS for quadrant in (1, 2, 3, 4)),
)


def _statistics(x: Tensor, num_masked: int) -> Tensor:
    """Numbers in the order of ``_NAMES``: ``some len(_NAMES)``."""
    products = x @ x.mT
    heterogeneity = row_entropy(products[:, :num_masked, num_masked:]).mean(dim=1)
    kinds = torch.zeros(products.shape[-1], 2, dtype=x.dtype, device=x.device)
    kinds[:num_masked, 0] = kinds[num_masked:, 1] = 1
    counts = kinds.sum(dim=0)
    pairs = counts[:, None] * counts

    inverse_norm = products.diagonal(dim1=1, dim2=2).clamp_min(1e-24).rsqrt().unsqueeze(-1)
    weights = torch.cat([kinds.expand(len(x), -1, -1), kinds * inverse_norm.square()], dim=-1)
    squares = products.square() @ weights  # for each row, sums of squares over masked and visible columns, both kinds
    dot_mean = kinds.mT @ products @ kinds / pairs
    dot_second = kinds.mT @ squares[..., :2] / pairs
    unit = x * inverse_norm
    unit_sum = kinds.mT @ unit
    cosine_mean = unit_sum @ unit_sum.mT / pairs
    cosine_second = kinds.mT @ (squares[..., 2:] * inverse_norm.square()) / pairs

    z = products.sub_(products.amax(dim=-1, keepdim=True))
    weight = z.exp()
    by_kind = weight @ kinds
    total = by_kind.sum(dim=-1, keepdim=True)
    entropy = total.squeeze(-1).log() - torch.linalg.vecdot(weight, z) / total.squeeze(-1)
    mass = kinds.mT @ (by_kind / total) / counts[:, None]
    rows = (kinds.mT @ entropy.unsqueeze(-1)).squeeze(-1) / counts
    quadrants = torch.stack(
        [
            mass,
            dot_mean,
            (dot_second - dot_mean.square()).clamp_min(0).sqrt(),
            cosine_mean,
            (cosine_second - cosine_mean.square()).clamp_min(0).sqrt(),
        ],
        dim=1,
    )
    return torch.cat([heterogeneity.unsqueeze(-1), rows, quadrants.flatten(1)], dim=-1)


class MeanMaps:
    """Mean affinity map of every layer depth over images, rows and columns masked first then visible, streamed.

    Call it with the tokens of each depth in turn; ``maps`` gives the means. All masks must have the same number of masked
    patches, or the borders of quadrants would not meet.

    Args:
        kind: ``softmax``, ``dot`` or ``cosine``.
    """

    def __init__(self, kind: Literal["softmax", "dot", "cosine"] = "softmax") -> None:
        self.kind = kind
        self._sums: dict[int, Tensor] = {}
        self._images: dict[int, int] = {}
        self.num_masked: dict[int, int] = {}

    def add(self, depth: int, tokens: Tensor, split: TokenSplit) -> None:
        """Add the maps of a batch at one layer depth.

        Raises:
            ValueError: If the number of masked patches differs between images.
        """
        counts = set(split.num_masked.tolist()) | ({self.num_masked[depth]} if depth in self.num_masked else set())
        if len(counts) > 1:
            raise ValueError(
                f"a mean map needs the same number of masked patches in every image, got {sorted(counts)}; "
                "draw single pictures, or give --mask-ratio"
            )
        total = affinity_matrix(tokens, split, kind=self.kind).sum(dim=0)
        self._sums[depth] = self._sums[depth] + total if depth in self._sums else total
        self._images[depth] = self._images.get(depth, 0) + len(tokens)
        self.num_masked[depth] = counts.pop()

    @property
    def maps(self) -> dict[int, Tensor]:
        """Layer depth -> mean map ``num_patches num_patches`` on the CPU."""
        return {depth: (total / self._images[depth]).cpu() for depth, total in self._sums.items()}
