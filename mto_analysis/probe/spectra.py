"""How many directions tokens and embeddings take up: effective rank, RankMe and LiDAR, and how alike tokens are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens
from mto_analysis.probe.accumulating import KINDS, EmbeddingRows, Row, Setup, TokenMeasure, groups_of
from mto_analysis.runtime.statistics import jackknife_interval

#: Added to each share of a spectrum by RankMe and LiDAR.
_SHARE_EPSILON = 1e-7

#: Added by LiDAR to the within-image covariance.
_WITHIN_EPSILON = 1e-4


def effective_rank(tokens: Tensor) -> Tensor:
    r"""Effective rank: the exponential of the entropy of the singular values' shares.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \sigma_k / \sum_j \sigma_j

    Tokens are not centred. k equal singular values give k; all tokens alike give 1, as do tokens that are all zero.

    Shapes:
        tokens: ... num_tokens dim
        returns: ... (from 1 to min(num_tokens, dim))

    Source:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).

    Example:
        >>> effective_rank(torch.eye(3)), effective_rank(torch.ones(4, 2)).round(decimals=4)
        (tensor(3.), tensor(1.))
    """
    return _entropy_of_shares(_singular_values(tokens)).exp().to(torch.promote_types(tokens.dtype, torch.float32))


def rankme(embeddings: Tensor) -> Tensor:
    r"""RankMe: the effective rank of the embeddings of a data set, one row per image.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \sigma_k / \sum_j \sigma_j + \epsilon, \;
        \epsilon = 10^{-7}

    It is bounded by the number of images: compare only values of equally many.

    Shapes:
        embeddings: num_images dim
        returns: scalar (from 1 to min(num_images, dim), to rounding)

    Source:
        Garrido et al., "RankMe" (ICML 2023, arXiv:2210.02885), Eq. (1).

    Example:
        >>> round(rankme(torch.eye(5)).item(), 3)
        5.0
    """
    return _entropy_of_shares(_singular_values(embeddings), _SHARE_EPSILON).exp()


def lidar(means: Tensor, deviations: Tensor) -> Tensor:
    r"""LiDAR: the effective rank of what tells images apart, beside what differs between views of one image.

    .. math:: \exp\Bigl(-\sum_k p_k \log p_k\Bigr), \quad p_k = \lambda_k / \sum_j \lambda_j + \epsilon, \;
        \lambda = \mathrm{eig}\bigl(\Sigma_w^{-1/2} \Sigma_b \Sigma_w^{-1/2}\bigr)

    :math:`\Sigma_b` is the covariance of the images' mean embeddings, :math:`\Sigma_w` that of views around the mean of
    their image, plus :math:`10^{-4}` on the diagonal; :math:`\epsilon = 10^{-7}`. As with RankMe, compare equally many
    images. NaN where images have no differences.

    Shapes:
        means: num_images dim (mean over the views of each image)
        deviations: num_views dim (of each view from the mean of its image)
        returns: scalar (from 1 to min(num_images - 1, dim), to rounding)

    Source:
        Thilak et al., "LiDAR" (ICLR 2024, arXiv:2312.04000).

    Example:
        >>> round(lidar(torch.eye(5), torch.zeros(10, 5)).item(), 3)
        4.0
    """
    return _lidar(means.double(), means.new_ones(len(means)).double(), deviations.double(), len(deviations))


def _lidar(means: Tensor, ones: Tensor, deviations: Tensor, num_views: float) -> Tensor:
    """From rows, or from fewer with the same second moments: then ``ones`` is what became of a column of ones."""
    within = deviations.mT @ deviations / num_views
    within.diagonal().add_(_WITHIN_EPSILON)
    centred = means - torch.outer(ones, ones @ means / ones.square().sum())
    if torch.linalg.vector_norm(centred) <= 1e-6 * torch.linalg.vector_norm(means):
        return means.new_tensor(torch.nan)
    # The eigenvalues are those of the product in another order, L^-1 S_b L^-T with S_w = L L^T.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), centred.mT, upper=False).mT
    return _entropy_of_shares(_singular_values(whitened).square(), _SHARE_EPSILON).exp()


def mean_cosine(tokens: Tensor) -> Tensor:
    r"""Mean cosine between different tokens: near 1 where a layer has smoothed their differences away.

    .. math:: \frac{1}{n (n - 1)} \sum_{i \ne j} \cos(x_i, x_j)

    Shapes:
        tokens: ... num_tokens dim
        returns: ... (from -1 / (num_tokens - 1) to 1; 1 of a single token)

    Source:
        Park et al., "What Do Self-Supervised Vision Transformers Learn?" (ICLR 2023), section 2, of tokens.

    Example:
        >>> mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]]))
        tensor(0.3333)
    """
    number = tokens.shape[-2]
    if number == 1:
        return tokens.new_ones(tokens.shape[:-2])
    # The sum over all pairs is the squared length of the sum; each token with itself is taken off.
    directions = normalize(tokens, dim=-1)
    own = directions.square().sum(dim=(-2, -1))
    mean: Tensor = (directions.sum(dim=-2).square().sum(dim=-1) - own) / (number * (number - 1))
    return mean


def _singular_values(rows: Tensor) -> Tensor:
    """By way of the smaller product of the rows, in float64: no value is off by more than 1e-8 of the largest."""
    wide = rows.double()
    small = wide @ wide.mT if rows.shape[-2] <= rows.shape[-1] else wide.mT @ wide
    values: Tensor = torch.linalg.eigvalsh(small)
    return values.clamp_min(0).sqrt()


def _entropy_of_shares(values: Tensor, epsilon: float = 0.0) -> Tensor:
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(1e-300) + epsilon
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum(dim=-1)
    return entropy


class _OfKinds(TokenMeasure):
    """A number of the masked tokens of each image, and the same of its visible tokens."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Of each image."""

        def both(x: Tensor, num_masked: int) -> Tensor:
            return torch.stack([self.function(x[:, :num_masked]), self.function(x[:, num_masked:])], dim=-1)

        return dict(zip(self.columns, split.map(layer.tokens, both).unbind(dim=-1), strict=True))


class Rank(_OfKinds):
    """:func:`effective_rank` of the tokens of each image."""

    columns = ("effective_rank_masked", "effective_rank_visible")
    function = staticmethod(effective_rank)


class Cosine(_OfKinds):
    """:func:`mean_cosine` among the tokens of each image."""

    columns = ("cosine_masked", "cosine_visible")
    function = staticmethod(mean_cosine)


class _OfEmbeddings(TokenMeasure):
    """A number of all images, from their embeddings, with an interval by leaving out one group of images at a time."""

    name: str

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rows: dict[tuple[str, int, str], dict[str, EmbeddingRows]] = {}
        self._counts: dict[str, Counter[int]] = {}

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Take the embeddings of a batch, once all its masks were seen."""
        views = self.setup.views(stack, layer, split)
        if views is None:
            return {}
        groups = groups_of(names)
        for kind, of_kind in zip(KINDS, views.unbind(dim=2), strict=True):
            held = self._rows.setdefault((stack, layer.depth, kind), {})
            for what, rows in self._taken(of_kind).items():
                held.setdefault(what, EmbeddingRows()).add(rows, groups.repeat_interleave(len(rows) // len(groups)))
        if layer.depth == 0:
            self._counts.setdefault(stack, Counter()).update(groups.tolist())
        return {}

    def _taken(self, views: Tensor) -> dict[str, Tensor]:
        """Rows to keep of the views ``batch num_views dim`` of images, the same number for each image."""
        raise NotImplementedError

    def _value(self, held: Mapping[str, EmbeddingRows], group: int | None) -> float:
        """The number, of all groups but one."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        """By stack, layer depth and kind of tokens."""
        found = []
        for (stack, depth, kind), held in self._rows.items():
            counts = self._counts[stack]
            value = self._value(held, None)
            without = {group: self._value(held, group) for group in counts} if len(counts) > 1 else {}
            interval = jackknife_interval(value, without, counts)
            found.append(Row(stack, depth, f"{self.name}_{kind}", value, *interval, num_images=counts.total()))
        return found

    def kept(self) -> Any:
        """Embeddings and counts."""
        rows = {key: {what: each.kept() for what, each in held.items()} for key, held in self._rows.items()}
        return rows, self._counts

    def put_together(self, parts: Sequence[Any]) -> None:
        """Of all processes."""
        self._rows, self._counts = {}, {}
        for rows, counts in parts:
            for stack, counted in counts.items():
                self._counts.setdefault(stack, Counter()).update(counted)
            for key, held in rows.items():
                for what, kept in held.items():
                    self._rows.setdefault(key, {}).setdefault(what, EmbeddingRows()).take(kept)


class RankMe(_OfEmbeddings):
    """:func:`rankme` of the images' mean masked and mean visible tokens; an image's masks are averaged.

    Memory: 8 bytes per image, layer depth and channel (80 kB per image for ViT-B), up to ``10 * dim`` images, and no
    more from there on.
    """

    name = "rankme"

    def _taken(self, views: Tensor) -> dict[str, Tensor]:
        return {"means": views.mean(dim=1)}

    def _value(self, held: Mapping[str, EmbeddingRows], group: int | None) -> float:
        return rankme(held["means"].without(group)).item()


class Lidar(_OfEmbeddings):
    """:func:`lidar` of mean masked and mean visible tokens, with the masks of an image as its views.

    Memory: as :class:`RankMe`, times one more than the number of masks per image.
    """

    name = "lidar"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if setup.masks_per_image < 2:
            self.refuse("it needs at least 2 masks per image, as of `heterogeneity --masks-per-image 2`")

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Take the embeddings of a batch."""
        return {} if self.left_out else super().__call__(stack, layer, split, names)

    def _taken(self, views: Tensor) -> dict[str, Tensor]:
        means = views.mean(dim=1, keepdim=True)
        # A column of ones: when rows are replaced by a triangle, their number and their sum stay known.
        ones = means.new_ones(len(means), 1)
        return {"means": torch.cat([means.squeeze(1), ones], dim=1), "deviations": (views - means).flatten(0, 1)}

    def _value(self, held: Mapping[str, EmbeddingRows], group: int | None) -> float:
        rows = held["means"].without(group)
        means, ones = rows[:, :-1], rows[:, -1]
        num_views = ones.square().sum().item() * self.setup.masks_per_image
        return _lidar(means, ones, held["deviations"].without(group), num_views).item()
