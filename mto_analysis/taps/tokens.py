"""Tokens of a stack of blocks, one layer depth at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor


class _LayerTokens(NamedTuple):
    depth: int
    tokens: Tensor
    mask: Tensor


class LayerTokens(_LayerTokens):
    """Patch tokens at one layer depth: a triple of depth, tokens and mask.

    ``in_order`` is whether they are in the order of patches, row by row; that of a live model may be unknown.

    Shapes:
        tokens: batch num_patches dim (no prefix tokens)
        mask: batch num_patches (on this depth's token grid, in the order of tokens)
    """

    in_order: bool

    def __new__(cls, depth: int, tokens: Tensor, mask: Tensor, in_order: bool = True) -> LayerTokens:
        """Keep ``in_order`` beside the triple, which is unpacked as such."""
        self = super().__new__(cls, depth, tokens, mask)
        self.in_order = in_order
        return self


def run_blocks(x: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]]) -> Iterator[Tensor]:
    """The input of the first block, then the output of each, which runs when its output is asked for.

    Example:
        >>> import torch
        >>> [int(x) for x in run_blocks(torch.tensor(1), [torch.neg, torch.neg])]
        [1, -1, 1]
    """
    yield x
    for block in blocks:
        x = block(x)
        yield x


def last_depth(hidden: Iterator[Tensor]) -> Tensor:
    """Run all blocks and keep the last output."""
    x = next(hidden)
    for x in hidden:  # noqa: B007 - only the last depth is wanted
        pass
    return x


def to_layers(hidden: Iterable[Tensor], masks: Iterable[Tensor], prefix_tokens: int) -> Iterator[LayerTokens]:
    """What each layer depth shows of the patches.

    Args:
        hidden: Tokens of each layer depth, prefix tokens first.
        masks: The mask on the grid of each.
        prefix_tokens: Class and register tokens.
    """
    for depth, (x, mask) in enumerate(zip(hidden, masks, strict=False)):  # a mask may be repeated without end
        yield LayerTokens(depth, x[:, prefix_tokens:], mask)
