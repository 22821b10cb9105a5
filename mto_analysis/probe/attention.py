"""The model's own attention between masked and visible tokens: mass and entropy per block and head, watched in passing.

This is the weight aggregation that L_spa (Eq. 3) is meant to change; X X^T stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mto_analysis.affinity import TokenSplit, entropy_from_sums
from mto_analysis.models import LayerTokens, MaskedImageModel
from mto_analysis.taps.attention import tap_attention

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ATTENTION_STATISTICS", "AttentionWatch", "attention_statistics"]

#: Columns: share of a query's attention on keys of the other kind, and its entropy (nats) among these keys.
ATTENTION_STATISTICS = (
    "mass_masked_to_visible",
    "mass_visible_to_masked",
    "entropy_masked_to_visible",
    "entropy_visible_to_masked",
)

# Attention maps that are worked on at once, as entries: 4 MB in float32.
_ENTRIES_AT_ONCE = 2**20


def attention_statistics(queries: Tensor, keys: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mass and entropy of attention from masked to visible tokens and back.

    Prefix tokens come first and take part in the softmax, but are of neither kind: shares on masked, visible and prefix
    tokens add to 1. Entropies are of the softmax over keys of the one kind alone; where less than about 1e-35 of the
    attention falls on them, they count as 0.

    Shapes:
        queries: batch num_heads num_tokens head_dim, times the model's scale
        keys: batch num_heads num_tokens head_dim
        mask: batch num_patches (num_patches <= num_tokens)
        bias: batch or 1, num_heads or 1, num_tokens or 1, num_tokens (added to the logits; bool: True = may attend)
        returns: batch num_heads 4 (in the order of ``ATTENTION_STATISTICS``, means over queries)

    Example:
        >>> zeros = torch.zeros(1, 1, 4, 2)
        >>> attention_statistics(zeros, zeros, torch.tensor([[True, False, False, False]])).flatten()
        tensor([0.7500, 0.2500, 1.0986, 0.0000])
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
        parts.append(_reduce(z, kinds[rows, None]))
    return torch.cat(parts)


def _reduce(z: Tensor, kinds: Tensor) -> Tensor:
    z -= z.amax(dim=-1, keepdim=True)
    weights = z.exp()
    total = weights.sum(dim=-1, keepdim=True)
    by_kind = weights @ kinds
    # A key that may not be attended to has the logit -inf and the weight 0.
    moments = z.clamp_min_(-1e4).mul_(weights) @ kinds
    entropy = torch.where(by_kind > 1e-35, entropy_from_sums(by_kind.clamp_min(1e-37), moments), 0)
    shares = torch.stack([by_kind / total, entropy], dim=-2)  # batch num_heads num_tokens (mass, entropy) kind of key
    counts = kinds.sum(dim=2)
    means = (
        torch.einsum("bhtsk,bhtq->bhsqk", shares, kinds.expand(-1, z.shape[1], -1, -1)) / counts[:, :, None, :, None]
    )
    # From queries of one kind to keys of the other: masked to visible, visible to masked.
    return torch.stack([means[..., 0, 0, 1], means[..., 0, 1, 0], means[..., 1, 0, 1], means[..., 1, 1, 0]], dim=-1)


class AttentionWatch:
    """Means of :func:`attention_statistics` over images, for every block and head of a model.

    It is a layer measure (that adds no column) and watches, inside ``with watch.watching(model)``, the queries and keys
    that the forward makes anyway, so that nothing is computed twice. Blocks without timm's ``attn.qkv`` are left out.
    """

    def __init__(self) -> None:
        self._split: TokenSplit | None = None
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._images: dict[tuple[str, int], int] = {}

    def __call__(self, stack: str, layer: LayerTokens, split: TokenSplit, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Take note of where masked tokens are in the next block."""
        self._split = split
        return {}

    @contextmanager
    def watching(self, model: MaskedImageModel) -> Iterator[AttentionWatch]:
        """Watch the model's blocks; no hook is left behind, also after an error."""
        try:
            with ExitStack() as taps:
                for stack in model.stacks:
                    taps.enter_context(tap_attention(model.stack_blocks(stack), partial(self._add, stack)))
                yield self
        finally:
            self._split = None

    def _add(self, stack: str, block: int, queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
        if self._split is None or queries.shape[2] < self._split.mask.shape[1]:
            return
        key = stack, block
        found = attention_statistics(queries, keys, self._split.mask, bias)
        total = found.double().sum(dim=0) if found.device.type != "mps" else found.sum(dim=0)
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._images[key] = self._images.get(key, 0) + len(queries)

    def kept(self) -> Any:
        """Sums over this process's images."""
        return {key: (total.cpu(), self._images[key]) for key, total in self._sums.items()}

    def put_together(self, parts: Sequence[Any]) -> None:
        """Keep the sums over all images."""
        self._sums, self._images = {}, {}
        for part in parts:
            for key, (total, images) in part.items():
                self._sums[key] = total + self._sums[key] if key in self._sums else total
                self._images[key] = images + self._images.get(key, 0)

    def to_frame(self) -> pd.DataFrame:
        """One row per stack, block and head, blocks and heads counted from 1.

        Block l takes the tokens of layer depth l - 1 and gives those of layer depth l.
        Columns: ``stack block head``, then ``ATTENTION_STATISTICS``.
        """
        import pandas as pd

        rows = [
            (stack, block, head, *values)
            for (stack, block), total in self._sums.items()
            for head, values in enumerate((total / self._images[stack, block]).tolist(), start=1)
        ]
        return pd.DataFrame(rows, columns=["stack", "block", "head", *ATTENTION_STATISTICS])
