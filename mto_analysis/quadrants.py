"""Fig. 2: mass, moments and row entropy of each quadrant of the affinity, and the maps themselves, streamed.

All numbers of a layer depth, and its map, come from one product of tokens. The product is symmetric, so the third
quadrant is the second one turned: only three of the four are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit
from mto_analysis.models import LayerTokens

__all__ = ["QUADRANT_STATISTICS", "AffinityKind", "AffinityMap", "AffinityMaps", "quadrant_statistics"]

#: What an affinity says of two tokens: share of a row's softmax (the paper's psi), dot product, or cosine.
AffinityKind = Literal["softmax", "dot", "cosine"]

#: Names of the numbers of one quadrant, each prefixed ``q1_`` to ``q4_``.
QUADRANT_STATISTICS = ("mass", "dot_mean", "dot_std", "cosine_mean", "cosine_std")

_NAMES = (
    "heterogeneity",
    "row_entropy_masked",
    "row_entropy_visible",
    *(f"q{quadrant}_{name}" for name in QUADRANT_STATISTICS for quadrant in (1, 2, 3, 4)),
)

# Entries of a product that are worked on at once: 0.6 MB in float32, which stays in the cache, also for the first
# stages of a Swin with thousands of patches.
_ENTRIES_AT_ONCE = 4 * 196 * 196

# Subnormal numbers take a processor a hundred times as long: exp, products and sums stay above them. Weights of e^-60
# of the greatest change no sum in float32 and none that matters in float64; shares below 1e-10 are 0 in a map.
_LEAST_LOGIT = -60.0
_LEAST_FACTOR = 1e-10

# Takes the sum of the maps of a few images.
_MapSink = Callable[[Tensor], None]


def quadrant_statistics(tokens: Tensor, mask: Tensor | TokenSplit) -> Mapping[str, Tensor]:
    """Everything that is said of an affinity, from one product.

    Keys: ``heterogeneity`` (Eq. 2); for each quadrant ``q1_`` (masked-masked) to ``q4_`` (visible-visible) ``mass``
    (share of a row's softmax, mean over its rows), ``dot_mean``, ``dot_std``, ``cosine_mean``, ``cosine_std`` over its
    pairs of tokens, a token with itself included; ``row_entropy_masked``, ``row_entropy_visible`` (nats, of the softmax
    over all tokens, mean over rows).

    Shapes:
        tokens: batch num_patches dim
        mask: batch num_patches
        returns: name -> batch

    Raises:
        ValueError: If shapes disagree, or a row of ``mask`` masks no patch or every patch.

    Example:
        >>> numbers = quadrant_statistics(torch.ones(1, 4, 2), torch.tensor([[True, False, False, False]]))
        >>> numbers["q2_mass"], numbers["q2_dot_mean"], numbers["q4_dot_std"]
        (tensor([0.7500]), tensor([2.]), tensor([0.]))
    """
    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    table = split.map(tokens, _statistics)
    return dict(zip(_NAMES, table.unbind(dim=-1), strict=True))


def _statistics(x: Tensor, num_masked: int, kind: AffinityKind = "softmax", sink: _MapSink | None = None) -> Tensor:
    """Numbers in the order of ``_NAMES``, ``some len(_NAMES)``; the sum of maps goes to ``sink``."""
    at_once = max(1, _ENTRIES_AT_ONCE // x.shape[1] ** 2)
    return torch.cat([_statistics_at_once(part, num_masked, kind, sink) for part in torch.split(x, at_once)])


def _statistics_at_once(x: Tensor, num_masked: int, kind: AffinityKind, sink: _MapSink | None) -> Tensor:
    masked, visible = x[:, :num_masked], x[:, num_masked:]
    # One wide product is faster than two narrow ones.
    first, second = (masked @ x.mT).split([num_masked, x.shape[1] - num_masked], dim=-1)  # type: ignore[no-untyped-call]
    fourth = visible @ visible.mT
    of_masked, of_visible = (
        each.diagonal(dim1=1, dim2=2).clamp_min(1e-24).rsqrt().unsqueeze(-1) for each in (first, fourth)
    )
    moments = [
        _moments(products, rows, columns)
        for products, rows, columns in (
            (first, of_masked, of_masked),
            (second, of_masked, of_visible),
            (fourth, of_visible, of_visible),
        )
    ]
    moments.insert(2, moments[1])
    # A copy even where one row or column makes the turned view contiguous: quadrants are worked on in place.
    third = second.mT.clone(memory_format=torch.contiguous_format)
    if sink is not None and kind != "softmax":
        quadrants = [first, second, third, fourth]
        if kind == "cosine":
            quadrants = _cosines(quadrants, (of_masked, of_visible))
        sink(_joined([each.sum(dim=0) for each in quadrants]))

    masked_rows, visible_rows = _Rows(_Part(first), _Part(second)), _Rows(_Part(third), _Part(fourth))
    if sink is not None and kind == "softmax":
        sink(_joined([*masked_rows.maps(), *visible_rows.maps()]))
    masses = (*masked_rows.masses, *visible_rows.masses)
    quadrant_major = [torch.stack([mass, *rest]) for mass, rest in zip(masses, moments, strict=True)]
    rows = torch.stack([masked_rows.right.entropy, masked_rows.entropy, visible_rows.entropy])
    return torch.cat([rows, torch.stack(quadrant_major, dim=1).flatten(0, 1)]).mT


def _moments(products: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and deviation of dot products, then of cosines; centred first, as the spread may be tiny beside it."""

    def mean_and_deviation(values: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean(dim=(1, 2), keepdim=True)
        return mean.flatten(), torch.sub(values, mean, out=buffer).square_().mean(dim=(1, 2)).sqrt()

    cosines = products * rows
    cosines *= columns.mT
    buffer = torch.empty_like(products)
    return *mean_and_deviation(products, buffer), *mean_and_deviation(cosines, buffer)


class _Part:
    """Softmax of one quadrant with its own maximum, so that it never underflows as a whole. Overwrites the products."""

    def __init__(self, products: Tensor) -> None:
        self.top = products.amax(dim=-1, keepdim=True)
        shifted = products.sub_(self.top).clamp_min_(_LEAST_LOGIT)
        self.weights = shifted.exp()
        self.total = self.weights.sum(dim=-1, keepdim=True)
        self.moment = shifted.mul_(self.weights).sum(dim=-1, keepdim=True)

    @property
    def entropy(self) -> Tensor:
        """Mean over rows of the entropy of the softmax over this quadrant alone: H (Eq. 2) for the second."""
        return (self.total.log() - self.moment / self.total).mean(dim=(1, 2))


class _Rows:
    """Softmax over a whole row, put together from its two quadrants."""

    def __init__(self, left: _Part, right: _Part) -> None:
        self.left, self.right = left, right
        top = torch.maximum(left.top, right.top)
        down = (left.top - top, right.top - top)
        factors = (down[0].exp(), down[1].exp())
        total = left.total * factors[0] + right.total * factors[1]
        moment = sum(
            factor * (part.moment + part.total * shift)
            for part, factor, shift in zip((left, right), factors, down, strict=True)
        )
        self._factors = [factor / total for factor in factors]
        self.masses = [
            (part.total * factor).mean(dim=(1, 2)) for part, factor in zip((left, right), self._factors, strict=True)
        ]
        self.entropy = (total.log() - moment / total).mean(dim=(1, 2))

    def maps(self) -> Iterator[Tensor]:
        """Sum over images of the two quadrants of the softmax map."""
        for part, factor in zip((self.left, self.right), self._factors, strict=True):
            yield part.weights.mul_(torch.where(factor < _LEAST_FACTOR, 0, factor)).sum(dim=0)


def _cosines(quadrants: Sequence[Tensor], kinds: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [products * kinds[index // 2] * kinds[index % 2].mT for index, products in enumerate(quadrants)]


def _joined(quadrants: Sequence[Tensor]) -> Tensor:
    first, second, third, fourth = quadrants
    return torch.cat([torch.cat([first, second], dim=1), torch.cat([third, fourth], dim=1)])


class AffinityMap(NamedTuple):
    """An affinity map of one layer depth, rows and columns masked first then visible.

    ``picture`` is ``None`` for a mean over ``num_images`` pictures.

    Shapes:
        values: num_patches num_patches
    """

    stack: str
    layer_depth: int
    picture: str | None
    num_images: int
    num_masked: int
    kind: AffinityKind
    values: Tensor


class AffinityMaps:
    """The statistics of :func:`quadrant_statistics` for a probe, and beside them the maps, from the same products.

    Give it to :func:`~mto_analysis.probe.probe` as a layer measure. By default it keeps the mean map of every layer
    depth, for which all masks must have the same number of masked patches (else quadrants would not meet); with
    ``each_picture`` it keeps one map per picture instead.

    Args:
        kind: ``softmax``, ``dot`` or ``cosine``.
        each_picture: Keep the map of every picture it sees; choose few.

    Raises:
        ValueError: If the kind is unknown.
    """

    def __init__(self, kind: AffinityKind = "softmax", *, each_picture: bool = False) -> None:
        if kind not in get_args(AffinityKind):
            raise ValueError(f"kind must be {', '.join(get_args(AffinityKind))}, got {kind!r}")
        self.kind = kind
        self.each_picture = each_picture
        self._sums: dict[tuple[str, int, str | None], tuple[Tensor, int, int]] = {}

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Statistics of a batch at one layer depth; its maps are added to those kept.

        Raises:
            ValueError: If a mean is wanted and the number of masked patches differs between images.
        """
        if self.each_picture:
            parts = [
                self._add(
                    (stack, layer.depth, name), layer.tokens[row : row + 1], TokenSplit(layer.mask[row : row + 1])
                )
                for row, name in enumerate(names)
            ]
            table = torch.cat(parts)
        else:
            table = self._add((stack, layer.depth, None), layer.tokens, split)
        return dict(zip(_NAMES, table.unbind(dim=-1), strict=True))

    def _add(self, key: tuple[str, int, str | None], tokens: Tensor, split: TokenSplit) -> Tensor:
        kept = self._sums.get(key)
        counts = split.counts | ({kept[2]} if kept else set())
        self._check_counts(counts)
        sums: list[Tensor] = [kept[0]] if kept else []

        def sink(total: Tensor) -> None:
            if sums:
                sums[0] += total
            else:
                sums.append(total)

        table = split.map(tokens, lambda x, num_masked: _statistics(x, num_masked, self.kind, sink))
        self._sums[key] = (sums[0], (kept[1] if kept else 0) + len(tokens), max(counts))
        return table

    def kept(self) -> Any:
        """Sums of maps over this process's pictures."""
        return {key: (total.cpu(), count, num_masked) for key, (total, count, num_masked) in self._sums.items()}

    def put_together(self, parts: Sequence[Any]) -> None:
        """Keep the sums over all pictures.

        Raises:
            ValueError: If a mean is wanted and the number of masked patches differs between parts.
        """
        self._sums = {}
        for part in parts:
            for key, (total, count, num_masked) in part.items():
                if key in self._sums:
                    before, images, like = self._sums[key]
                    self._check_counts({like, num_masked})
                    total, count = before + total, images + count
                self._sums[key] = (total, count, num_masked)

    @staticmethod
    def _check_counts(counts: AbstractSet[int]) -> None:
        if len(counts) > 1:
            raise ValueError(
                f"a mean map needs the same number of masked patches in every picture, got {min(counts)} to "
                f"{max(counts)}; choose single pictures (--pictures), or another mask (--mask-unit)"
            )

    @property
    def maps(self) -> list[AffinityMap]:
        """The maps on the CPU, by picture, stack and layer depth; of several masks of a picture their mean."""
        found = [
            AffinityMap(
                stack, depth, picture, 1 if self.each_picture else count, num_masked, self.kind, (total / count).cpu()
            )
            for (stack, depth, picture), (total, count, num_masked) in self._sums.items()
        ]
        pictures = list(dict.fromkeys(each.picture for each in found))
        return sorted(found, key=lambda each: pictures.index(each.picture))
