"""The model's own attention at each block and head, watched in passing: where it goes, how far, and how evenly.

The mass between kinds is the weight aggregation that L_spa (Eq. 3) is meant to change; X X^T stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mto_analysis.affinity import TokenSplit, entropy_from_sums
from mto_analysis.models import LayerTokens
from mto_analysis.probe.accumulating import Row, Setup, Sums, TokenMeasure
from mto_analysis.runtime.statistics import reach_of_mean
from mto_analysis.taps.attention import Attended, tap_attention

#: Columns: share of a query's attention on keys of the other kind, and its entropy (nats) among these keys; then of
#: queries of each kind the entropy among all keys, and the mean distance of the patches attended to (in patches).
ATTENTION_STATISTICS = (
    "mass_masked_to_visible",
    "mass_visible_to_masked",
    "entropy_masked_to_visible",
    "entropy_visible_to_masked",
    "entropy_masked",
    "entropy_visible",
    "distance_masked",
    "distance_visible",
)

# Attention maps that are worked on at once, as entries: 4 MB in float32.
_ENTRIES_AT_ONCE = 2**20


def patch_distances(grid: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Distance between the centres of all pairs of patches, in sides of a patch.

    Shapes:
        returns: num_patches num_patches (row-major on the grid)

    Example:
        >>> patch_distances((1, 3))[0].tolist()
        [0.0, 1.0, 2.0]
    """
    axes = torch.meshgrid(*(torch.arange(side, device=device, dtype=torch.float32) for side in grid), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], dim=-1)
    distances: Tensor = torch.linalg.vector_norm(places[:, None] - places[None], dim=-1)
    return distances


def attention_statistics(
    queries: Tensor, keys: Tensor, mask: Tensor, bias: Tensor | None = None, distances: Tensor | None = None
) -> Tensor:
    r"""Mass and entropy of attention between masked and visible tokens, entropy over all keys, and mean distance.

    .. math:: d_i = \sum_j a_{ij} \|r_i - r_j\| / \sum_j a_{ij}, \quad H_i = -\sum_j a_{ij} \log a_{ij}

    Prefix tokens come first and take part in the softmax, but are of neither kind: shares on masked, visible and prefix
    tokens add to 1. Entropies between kinds are of the softmax over keys of the one kind alone; where less than about
    1e-35 of the attention falls on them, they count as 0. The entropy of a kind is over all keys, prefix tokens too;
    distances, over patches.

    Shapes:
        queries: batch num_heads num_tokens head_dim, times the model's scale
        keys: batch num_heads num_tokens head_dim
        mask: batch num_patches (num_patches <= num_tokens)
        bias: batch or 1, num_heads or 1, num_tokens or 1, num_tokens (added to the logits; bool: True = may attend)
        distances: num_patches num_patches (:func:`patch_distances`; without, those of attention are NaN)
        returns: batch num_heads 8 (in the order of ``ATTENTION_STATISTICS``, means over queries)

    Source:
        Distance: Dosovitskiy et al. (ICLR 2021), appendix D.7; entropy and distance of pre-trained models: Park et al.,
        "What Do Self-Supervised Vision Transformers Learn?" (ICLR 2023).

    Example:
        >>> zeros = torch.zeros(1, 1, 4, 2)
        >>> mask = torch.tensor([[True, False, False, False]])
        >>> attention_statistics(zeros, zeros, mask, distances=patch_distances((1, 4))).flatten().round(decimals=2)
        tensor([0.7500, 0.2500, 1.1000, 0.0000, 1.3900, 1.3900, 1.5000, 1.1700])
    """
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill_(~bias, float("-inf"))
    prefix = queries.shape[2] - mask.shape[1]
    kinds = nn.functional.pad(torch.stack([mask, ~mask], dim=-1).to(torch.float32), (0, 0, prefix, 0))
    at_once = max(1, _ENTRIES_AT_ONCE // (queries.shape[1] * queries.shape[2] ** 2))
    parts = []
    for start in range(0, len(queries), at_once):
        rows = slice(start, start + at_once)
        z = queries[rows].float() @ keys[rows].float().mT
        if bias is not None:
            z += bias if len(bias) == 1 else bias[rows]
        parts.append(_reduce(z, kinds[rows, None], distances))
    return torch.cat(parts)


def _reduce(z: Tensor, kinds: Tensor, distances: Tensor | None) -> Tensor:
    z -= z.amax(dim=-1, keepdim=True)
    weights = z.exp()
    total = weights.sum(dim=-1, keepdim=True)
    prefix = z.shape[-1] - (len(distances) if distances is not None else z.shape[-1])
    keys = torch.cat([kinds, torch.ones_like(kinds[..., :1])], dim=-1)  # masked, visible, all
    by_kind = weights @ keys
    reach = None if distances is None else torch.einsum("bhij,ij->bhi", weights[..., prefix:, prefix:], distances)
    # A key that may not be attended to has the logit -inf and the weight 0.
    moments = z.clamp_min_(-1e4).mul_(weights) @ keys
    entropy = torch.where(by_kind > 1e-35, entropy_from_sums(by_kind.clamp_min(1e-37), moments), 0)
    distance = torch.full_like(total, torch.nan)
    if reach is not None:
        distance[..., prefix:, 0] = reach / by_kind[..., prefix:, :2].sum(dim=-1).clamp_min(1e-37)
        distance[..., :prefix, 0] = 0  # of no kind
    # batch num_heads num_tokens 6: mass and entropy by kind of key, entropy over all keys, distance
    numbers = torch.cat([by_kind[..., :2] / total, entropy, distance], dim=-1)
    counts = kinds.sum(dim=2)
    means = torch.einsum("bhts,bhtq->bhqs", numbers, kinds.expand(-1, z.shape[1], -1, -1)) / counts[..., None]
    masked, visible = means.unbind(dim=2)
    # From queries of one kind to keys of the other, then of each kind to all.
    pairs = ((masked, 1), (visible, 0), (masked, 3), (visible, 2), (masked, 4), (visible, 4), (masked, 5), (visible, 5))
    return torch.stack([queries[..., place] for queries, place in pairs], dim=-1)


class Attention(TokenMeasure):
    """:func:`attention_statistics` of every block and head, means over images with intervals.

    Watched are the queries and keys that the forward makes anyway, so that nothing is computed twice; those of a block
    are reduced when the tokens of its output are measured. Blocks whose attention is not one softmax over all tokens
    are left out. Of a live model the attention of all blocks is held until the tokens of a batch are measured.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._seen: dict[tuple[str, int], Sequence[Attended]] = {}
        self._unmet: dict[str, tuple[int, int]] = {}  # by stack: a block, and how often attention was met in it
        self._splits: dict[str, TokenSplit] = {}
        self._masks: dict[tuple[str, int], list[Tensor]] = {}
        # Sums of the numbers and of their squares, 2 (num_heads + 1) statistics; the last head is the mean of all.
        self._sums, self._images = Sums(), Sums()
        self._blocks = {stack: list(setup.model.stack_blocks(stack)) for stack in setup.model.stacks}
        for stack, blocks in self._blocks.items():
            if not blocks:
                self.refuse("its blocks are not known, so their attention cannot be watched", stack)

    @contextmanager
    def watching(self) -> Iterator[Attention]:
        """Watch the model's blocks; no hook is left behind, also after an error."""
        try:
            with ExitStack() as taps:
                for stack, blocks in self._blocks.items():
                    taps.enter_context(tap_attention(blocks, partial(self._see, stack)))
                yield self
        finally:
            self._blocks.clear()
            self._seen.clear()
            self._splits.clear()

    def _see(self, stack: str, block: int, met: Sequence[Attended]) -> None:
        self._seen[stack, block] = met

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Reduce the attention of the block before; masked are the tokens that it took, those of the depth before."""
        before, self._splits[stack] = self._splits.get(stack), split
        met = self._seen.pop((stack, layer.depth), ())
        if layer.depth == 0 or before is None:
            return {}
        num_patches = before.mask.shape[1]
        over_all = [each for each in met if len(each.queries) == len(names) and each.queries.shape[2] >= num_patches]
        if len(over_all) == 1:
            self._add(stack, layer.depth, before.mask, over_all[0])
        else:
            self._unmet.setdefault(stack, (layer.depth, len(over_all)))
        if layer.depth == self.setup.model.depth(stack) and stack in self._unmet:
            block, number = self._unmet[stack]
            reason = (
                f"attention over all tokens of each image was met {number} times in block {block}, not once (within "
                "windows, to other tokens, or in a kernel of its own)"
            )
            if not any(of == stack for of, _ in self._masks):
                return self.refuse(reason, stack)
            self.left_out[stack] = reason
        return {}

    def _add(self, stack: str, block: int, mask: Tensor, seen: Attended) -> None:
        num_patches = mask.shape[1]
        grid = self.setup.grid_of(stack, num_patches)
        if isinstance(grid, str):
            self.left_out.setdefault(f"{stack}, distances", grid)
        distances = None if isinstance(grid, str) else patch_distances(grid, mask.device)
        key = stack, block
        masks = self._masks.setdefault(key, [])
        queries, keys, bias = seen
        if behind := self.setup.model.suffix_tokens(stack):  # in front, where prefix tokens are
            queries, keys = queries.roll(behind, dims=2), keys.roll(behind, dims=2)
            bias = None if bias is None else bias.roll((behind, behind), dims=(2, 3))
        masks.append(attention_statistics(queries, keys, mask, bias, distances))
        if len(masks) == self.setup.masks_per_image:
            found = torch.stack(masks).mean(dim=0)
            found = torch.cat([found, found.mean(dim=1, keepdim=True)], dim=1)
            found = found.double() if found.device.type != "mps" else found
            self._sums.add(key, torch.stack([found.sum(dim=0), found.square().sum(dim=0)]))
            self._images.add(key, len(found))
            masks.clear()

    def rows(self) -> list[Row]:
        """Each statistic by stack, block and head, and of all heads; the layer depth is that of the block's output."""
        found = []
        for (stack, block), sums in self._sums.items():
            number = self._images[stack, block]
            means = (sums[0] / number).cpu()
            spread = ((sums[1].cpu() / number - means.square()).clamp_min(0) * (number / max(number - 1, 1))).sqrt()
            half = spread * float(reach_of_mean(number))
            for at, name in enumerate(ATTENTION_STATISTICS):
                measure = f"attention_{name}"
                heads = [*range(1, len(means)), None]
                found += [
                    Row(stack, block, measure, mean, mean - reach, mean + reach, number, head)
                    for head, mean, reach in zip(heads, means[:, at].tolist(), half[:, at].tolist(), strict=True)
                    if not math.isnan(mean)
                ]
        return found

    def kept(self) -> Any:
        """Sums over this process's images."""
        return self._sums.kept(), self._images.kept()

    def put_together(self, parts: Sequence[Any]) -> None:
        """Keep the sums over all images."""
        for sums, kept in zip((self._sums, self._images), zip(*parts, strict=True), strict=True):
            sums.take(kept)

    def to_frame(self) -> pd.DataFrame:
        """One row per stack, block and head, blocks and heads counted from 1.

        Block l takes the tokens of layer depth l - 1 and gives those of layer depth l.
        Columns: ``stack block head``, then ``ATTENTION_STATISTICS``.
        """
        rows = [
            (stack, block, head, *values)
            for (stack, block), sums in self._sums.items()
            for head, values in enumerate((sums[0, :-1] / self._images[stack, block]).tolist(), start=1)
        ]
        return pd.DataFrame(rows, columns=["stack", "block", "head", *ATTENTION_STATISTICS])
