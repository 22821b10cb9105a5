"""Fig. 2: mass, moments and row entropy of each quadrant of the affinity, and the maps themselves, streamed.

All numbers of a layer depth, and its map, come from one product of tokens. The product is symmetric, so the third
quadrant is the second one turned: only three of the four are multiplied. All four lie in one matrix, in memory that all
layers use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mto_analysis.affinity import Scratch, TokenSplit
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

# Entries of a product that are worked on at once. On a CPU 1.2 MB in float32: fewer would cost more in steps than in
# memory, and a first stage of Swin with thousands of patches goes image by image; elsewhere as many as keep the device
# busy.
_ENTRIES_AT_ONCE = {"cpu": 8 * 196 * 196}
_ENTRIES_AT_ONCE_ELSEWHERE = 128 * 196 * 196

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
    table = split.map(tokens, _Statistics())
    return dict(zip(_NAMES, table.unbind(dim=-1), strict=True))


class _Statistics:
    """Numbers in the order of ``_NAMES``, ``some len(_NAMES)``, of sorted tokens; the sum of maps goes to ``sink``."""

    def __init__(self, kind: AffinityKind = "softmax", scratch: Scratch | None = None) -> None:
        self.kind = kind
        self.scratch = scratch or Scratch()
        self.sink: _MapSink | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, num_masked: int) -> Tensor:
        """Some images at a time."""
        entries = _ENTRIES_AT_ONCE.get(x.device.type, _ENTRIES_AT_ONCE_ELSEWHERE)
        at_once = max(1, entries // x.shape[1] ** 2)
        return torch.cat([self._at_once(part, num_masked) for part in torch.split(x, at_once)])

    def _at_once(self, x: Tensor, num_masked: int) -> Tensor:
        batch, count, _ = x.shape
        products = self.scratch("products", x, batch, count, count)
        buffer = self.scratch("buffer", x, batch, count, count)
        masked, visible = slice(num_masked), slice(num_masked, count)
        # One wide product is faster than two narrow ones.
        torch.bmm(x[:, masked], x.mT, out=products[:, masked])
        torch.bmm(x[:, visible], x[:, visible].mT, out=products[:, visible, visible])
        products[:, visible, masked].copy_(products[:, masked, visible].mT)

        shrink = products.diagonal(dim1=1, dim2=2).clamp_min(1e-24).rsqrt_().unsqueeze(-1)
        first, second, fourth = (
            _moments(products[:, rows, columns], shrink[:, rows], shrink[:, columns], buffer)
            for rows, columns in ((masked, masked), (masked, visible), (visible, visible))
        )
        if self.sink is not None and self.kind == "dot":
            self.sink(products.sum(dim=0))
        if self.sink is not None and self.kind == "cosine":
            self.sink(torch.mul(products, shrink, out=buffer).mul_(shrink.mT).sum(dim=0))

        found, weights, scale = _softmax(products, (masked, visible), buffer)
        if self.sink is not None and self.kind == "softmax":
            scale = torch.where(scale < _LEAST_FACTOR, 0, scale)
            for number, kind in enumerate((masked, visible)):
                weights[..., kind].mul_(scale[..., number : number + 1])
            self.sink(weights.sum(dim=0))
        moments = torch.stack([first, second, second, fourth], dim=-1)  # batch statistic quadrant
        return torch.cat([found, moments.flatten(1)], dim=1)


def _moments(products: Tensor, rows: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    """Mean and deviation of dot products, then of cosines: ``batch 4``.

    Centred first, as the spread may be tiny beside the mean.
    """
    values = buffer.flatten()[: products.numel()].view(products.shape)
    root = math.sqrt(products[0].numel())
    found = [products.mean(dim=(1, 2))]
    torch.sub(products, found[0][:, None, None], out=values)
    found.append(torch.linalg.vector_norm(values, dim=(1, 2)) / root)
    torch.mul(products, rows, out=values).mul_(columns.mT)
    found.append(values.mean(dim=(1, 2)))
    found.append(torch.linalg.vector_norm(values.sub_(found[2][:, None, None]), dim=(1, 2)) / root)
    return torch.stack(found, dim=1)


def _softmax(products: Tensor, kinds: tuple[slice, slice], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies and masses from the softmax of rows; overwrites the products.

    Masked and visible columns have their own maximum, so that neither kind underflows as a whole.

    Shapes:
        products, weights: batch num_patches num_patches
        returns: batch 7 (H, row entropies, masses of the quadrants), the weights, batch num_patches 2 (what turns
            weights of masked and visible columns into shares of their rows)
    """

    def by_kind(values: Tensor) -> Tensor:
        return torch.stack([values[..., kind].sum(dim=-1) for kind in kinds], dim=-1)

    masked, visible = kinds
    top = torch.stack([products[..., kind].amax(dim=-1) for kind in kinds], dim=-1)
    for number, kind in enumerate(kinds):
        products[..., kind].sub_(top[..., number : number + 1])
    torch.exp(products.clamp_min_(_LEAST_LOGIT), out=weights)
    total = by_kind(weights)
    moment = by_kind(products.mul_(weights))
    h = total[:, masked, 1].log() - moment[:, masked, 1] / total[:, masked, 1]

    # A row's softmax, put together from both kinds of columns.
    down = top - top.amax(dim=-1, keepdim=True)
    factor = down.exp()
    whole = (total * factor).sum(dim=-1, keepdim=True)
    entropy = whole.log().squeeze(-1) - (factor * (moment + total * down)).sum(dim=-1) / whole.squeeze(-1)
    scale = factor / whole
    masses = total * scale
    numbers = [values.mean(dim=1) for values in (h, entropy[:, masked], entropy[:, visible])]
    numbers += [values.mean(dim=1) for kind in kinds for values in masses[:, kind].unbind(dim=-1)]
    return torch.stack(numbers, dim=1), weights, scale


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
        self._statistics = _Statistics(kind)

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

        self._statistics.sink = sink
        table = split.map(tokens, self._statistics)
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
