"""Families whose stacks are blocks that run one after the other: each says only what its stacks are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from torch import Tensor, nn

from mto_analysis.models.interface import MaskedImageModel
from mto_analysis.taps.tokens import LayerTokens, to_layers


class StackedModel(MaskedImageModel):
    """A family implements :meth:`stack_blocks` and :meth:`_hidden`; depths and tokens of patches follow."""

    #: Tokens that a stack with masked tokens puts before those of patches.
    stack_prefix_tokens: int = 1

    @abstractmethod
    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The blocks of a stack in order."""

    @abstractmethod
    def _hidden(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[Tensor]:
        """Prefix and patch tokens at every layer depth: ``batch num_tokens dim``."""

    def _masks(self, mask: Tensor) -> Iterable[Tensor]:
        """The mask on the token grid of each layer depth; called at once, so that it can refuse a mask."""
        return repeat(mask)

    def depth(self, stack: str) -> int:
        """The last layer depth of a stack, its number of blocks."""
        return len(self.stack_blocks(stack))

    def _layer_tokens(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[LayerTokens]:
        return self._run(images, mask, self._masks(mask), stack)

    def _run(self, images: Tensor, mask: Tensor, masks: Iterable[Tensor], stack: str) -> Iterator[LayerTokens]:
        # A generator of its own: nothing is computed before the first depth is asked for.
        yield from to_layers(self._hidden(images, mask, stack), masks, self.stack_prefix_tokens)
