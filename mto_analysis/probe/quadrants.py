"""Fig. 2: mass, moments and row entropy of each quadrant of the affinity, and the maps themselves, streamed.

All numbers of a layer depth, and its map, come from one product of tokens, in memory that all layers use. The product
is symmetric: the third quadrant is the second one turned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mto_analysis.affinity import TokenSplit, entropy_from_sums
from mto_analysis.affinity.products import multiply
from mto_analysis.models import LayerTokens
from mto_analysis.runtime.memory import Scratch, lasting_memory, write_to

#: What an affinity says of two tokens: share of a row's softmax (the paper's psi), dot product, or cosine.
AffinityKind = Literal["softmax", "dot", "cosine"]

#: Names of the numbers of one quadrant, each prefixed ``q1_`` to ``q4_``.
QUADRANT_STATISTICS = ("mass", "dot_mean", "dot_std", "cosine_mean", "cosine_std")

# As they are computed: of masked rows, of visible rows (whose entropy over visible tokens nobody asks for), then
# moments of the first, second and fourth quadrant.
_COMPUTED = (
    *("heterogeneity", "row_entropy_masked", "q1_mass", "q2_mass"),
    *("", "row_entropy_visible", "q3_mass", "q4_mass"),
    *(f"q{quadrant}_{name}" for name in QUADRANT_STATISTICS[1:] for quadrant in (1, 2, 4)),
)
# Where each number stands there; what the third quadrant does not have of its own is the second one's.
_COLUMNS = {
    name: _COMPUTED.index(name if name in _COMPUTED else name.replace("q3", "q2"))
    for name in (
        *("heterogeneity", "row_entropy_masked", "row_entropy_visible"),
        *(f"q{quadrant}_{name}" for name in QUADRANT_STATISTICS for quadrant in (1, 2, 3, 4)),
    )
}

# Entries of a product that are worked on at once. On a CPU 0.6 MB in float32: fewer would cost more in steps than in
# memory, and a first stage of Swin with thousands of patches goes image by image; elsewhere as many as keep the device
# busy.
_ENTRIES_AT_ONCE = {"cpu": 4 * 196 * 196}
_ENTRIES_AT_ONCE_ELSEWHERE = 128 * 196 * 196

# Subnormal numbers take a processor a hundred times as long: exp, products and sums stay above them. Weights of e^-60
# of the greatest change no sum in float32 and none that matters in float64; shares below 1e-10 are 0 in a map. A GPU
# does not mind them.
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

    Example:
        >>> numbers = quadrant_statistics(torch.ones(1, 4, 2), torch.tensor([[True, False, False, False]]))
        >>> numbers["q2_mass"], numbers["q2_dot_mean"], numbers["q4_dot_std"]
        (tensor([0.7500]), tensor([2.]), tensor([0.]))
    """
    split = mask if isinstance(mask, TokenSplit) else TokenSplit(mask)
    return _named(split.map(tokens.detach(), _Statistics(split.scratch), only_products=True))


def _named(table: Tensor) -> dict[str, Tensor]:
    columns = table.unbind(dim=-1)
    return {name: columns[place] for name, place in _COLUMNS.items()}


class _Statistics:
    """Numbers of sorted tokens, ``some len(_COMPUTED)``; the sum of their maps goes to ``sink``.

    Beside a product of a few images a step costs little more than its call: what can be one step for dot products and
    cosines, or for weights and their logarithms, is one, on both in one matrix.
    """

    def __init__(self, scratch: Scratch, kind: AffinityKind = "softmax", sink: _MapSink | None = None) -> None:
        self.scratch = scratch
        self.kind = kind
        self.sink = sink

    def __call__(self, x: Tensor, num_masked: int) -> Tensor:
        """Some images at a time."""
        entries = _ENTRIES_AT_ONCE.get(x.device.type, _ENTRIES_AT_ONCE_ELSEWHERE)
        at_once = max(1, entries // x.shape[1] ** 2)
        if len(x) <= at_once:
            return self._at_once(x, num_masked)
        return torch.cat([self._at_once(part, num_masked) for part in torch.split(x, at_once)])

    def _at_once(self, x: Tensor, num_masked: int) -> Tensor:
        batch, count, _ = x.shape
        both = self.scratch("both", x, batch, 2, count, count)
        products, other = both.unbind(dim=1)
        multiply(x, x.mT, out=products)
        shrink = products.diagonal(dim1=1, dim2=2).clamp_min(1e-24).rsqrt_().unsqueeze(-1)
        write_to(other, torch.mul, products, shrink).mul_(shrink.mT)
        self._to_sink("dot", products)
        self._to_sink("cosine", other)
        moments = self._moments(both, num_masked)

        numbers, scale = _softmax(both, num_masked)
        if self.sink is not None and self.kind == "softmax":
            if not both.is_cuda:
                scale.masked_fill_(scale < _LEAST_FACTOR, 0)
            for columns, factor in zip(_kinds(num_masked), torch.split(scale, 1, dim=-1), strict=True):
                other[..., columns].mul_(factor)
            self._to_sink("softmax", other)
        return torch.cat([*numbers, *moments], dim=1)

    def _to_sink(self, kind: AffinityKind, maps: Tensor) -> None:
        if self.sink is not None and self.kind == kind:
            self.sink(maps.sum(dim=0))

    def _moments(self, both: Tensor, num_masked: int) -> tuple[Tensor, ...]:
        """Means and deviations of the first, second and fourth quadrant, of each of both matrices: ``batch 6``.

        Centred first, as the spread may be tiny beside the mean; on a GPU in one kernel.
        """
        masked, visible = _kinds(num_masked)
        means, deviations = [], []
        for rows, columns in ((masked, masked), (masked, visible), (visible, visible)):
            values = both[:, :, rows, columns]
            if both.is_cuda:
                deviation, mean = torch.std_mean(values, dim=(2, 3), correction=0, keepdim=True)
                means.append(mean)
                deviations.append(deviation)
                continue
            mean = values.mean(dim=(2, 3), keepdim=True)
            centred = torch.sub(values, mean, out=self.scratch("part", values, *values.shape))
            norm = torch.linalg.vector_norm(centred, dim=(2, 3), keepdim=True)
            means.append(mean)
            deviations.append(norm.div_(math.sqrt(centred[0, 0].numel())))
        return torch.cat(means + deviations, dim=-1).squeeze(2).unbind(dim=1)


def _kinds(num_masked: int) -> tuple[slice, slice]:
    """Rows or columns of masked tokens, and of visible ones."""
    return slice(num_masked), slice(num_masked, None)


def _softmax(both: Tensor, num_masked: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Entropies and masses from the softmax of rows of the first matrix; the second becomes its weights.

    Masked and visible columns have their own maximum, so that neither kind underflows as a whole.

    Shapes:
        both: batch 2 num_patches num_patches (logits, anything)
        returns: entropy over visible columns, entropy, masses, means over masked rows and over visible rows (batch 4
            each); batch num_patches 2 (what turns weights of masked and visible columns into shares of their rows)
    """
    kinds = _kinds(num_masked)

    def by_kind(reduce: Callable[..., Tensor], values: Tensor) -> Tensor:
        return torch.cat([reduce(values[..., columns], dim=-1, keepdim=True) for columns in kinds], dim=-1)

    logits, weights = both.unbind(dim=1)
    top = by_kind(torch.amax, logits)
    for columns, greatest in zip(kinds, torch.split(top, 1, dim=-1), strict=True):
        logits[..., columns].sub_(greatest)
    if not both.is_cuda:
        logits.clamp_min_(_LEAST_LOGIT)
    write_to(weights, torch.exp, logits)
    logits.mul_(weights)
    moment, total = by_kind(torch.sum, both).unbind(dim=1)

    # Entropy by the chain rule: that of a row's masses, and those within each kind of columns, weighed by its mass.
    log_total = total.log()
    over_kind = entropy_from_sums(total, moment)
    log_mass = torch.log_softmax(top + log_total, dim=-1)
    mass = log_mass.exp()
    entropy = (mass * (over_kind - log_mass)).sum(dim=-1, keepdim=True)
    rows = torch.cat([over_kind[..., 1:], entropy, mass], dim=-1)
    return (rows[:, :num_masked].mean(dim=1), rows[:, num_masked:].mean(dim=1)), mass / total


class AffinityMap(NamedTuple):
    """An affinity map of one layer depth, rows and columns masked first then visible.

    ``image`` is ``None`` for a mean over ``num_images`` images; ``in_order`` is whether masked and visible tokens are
    each in the order of patches.

    Shapes:
        values: num_patches num_patches
    """

    stack: str
    layer_depth: int
    image: str | None
    num_images: int
    num_masked: int
    kind: AffinityKind
    values: Tensor
    in_order: bool = True


class AffinityMaps:
    """The statistics of :func:`quadrant_statistics` for a probe, and beside them the maps, from the same products.

    Give it to :func:`~mto_analysis.probe.probe` as a layer measure. By default it keeps the mean map of every layer
    depth, for which all masks must have the same number of masked patches (else quadrants would not meet); with
    ``each_image`` it keeps one map per image instead.

    Args:
        kind: ``softmax``, ``dot`` or ``cosine``.
        each_image: Keep the map of every image it sees; choose few.
    """

    def __init__(self, kind: AffinityKind = "softmax", *, each_image: bool = False) -> None:
        if kind not in get_args(AffinityKind):
            raise ValueError(f"kind must be {', '.join(get_args(AffinityKind))}, got {kind!r}")
        self.kind = kind
        self.each_image = each_image
        self._sums: dict[tuple[str, int, str | None], tuple[Tensor, int, int]] = {}
        self._unordered: set[str] = set()  # stacks

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Statistics of a batch at one layer depth; its maps are added to those kept."""
        if not layer.in_order:
            self._unordered.add(stack)
        if self.each_image:
            parts = [
                self._add(
                    (stack, layer.depth, name),
                    layer.tokens[row : row + 1],
                    TokenSplit(layer.mask[row : row + 1], scratch=split.scratch),
                )
                for row, name in enumerate(names)
            ]
            table = torch.cat(parts)
        else:
            table = self._add((stack, layer.depth, None), layer.tokens, split)
        return _named(table)

    def _add(self, key: tuple[str, int, str | None], tokens: Tensor, split: TokenSplit) -> Tensor:
        kept = self._sums.get(key)
        counts = split.counts | ({kept[2]} if kept else set())
        self._check_counts(counts)
        sums: list[Tensor] = [kept[0]] if kept else []

        def sink(total: Tensor) -> None:
            if sums:
                sums[0] += total
            else:
                sums.append(lasting_memory(*total.shape, dtype=total.dtype, device=total.device).copy_(total))

        table = split.map(tokens.detach(), _Statistics(split.scratch, self.kind, sink), only_products=True)
        self._sums[key] = (sums[0], (kept[1] if kept else 0) + len(tokens), max(counts))
        return table

    def kept(self) -> Any:
        """Sums of maps over this process's images, and stacks whose tokens are in unknown order."""
        return {key: (total.cpu(), *counts) for key, (total, *counts) in self._sums.items()}, self._unordered

    def put_together(self, parts: Sequence[Any]) -> None:
        """Keep the sums over all images."""
        self._sums = {}
        for part, unordered in parts:
            self._unordered |= unordered
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
                f"a mean map needs the same number of masked patches in every image, got {min(counts)} to "
                f"{max(counts)}; choose single images (--image), or another mask (--mask-unit)"
            )

    @property
    def maps(self) -> list[AffinityMap]:
        """The maps on the CPU, by image, stack and layer depth; of several masks of an image their mean."""
        found = [
            AffinityMap(
                stack,
                depth,
                image,
                1 if self.each_image else count,
                num_masked,
                self.kind,
                (total / count).cpu(),
                stack not in self._unordered,
            )
            for (stack, depth, image), (total, count, num_masked) in self._sums.items()
        ]
        images = list(dict.fromkeys(each.image for each in found))
        return sorted(found, key=lambda each: images.index(each.image))
