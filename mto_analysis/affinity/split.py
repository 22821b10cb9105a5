"""Where masked and visible tokens of a batch are, sorted once per mask for all layer depths."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mto_analysis.affinity.products import product_dtype
from mto_analysis.masks import check_mask
from mto_analysis.runtime.memory import Scratch
from mto_analysis.runtime.precision import fast_float32

__all__ = ["TokenSplit", "masked_first_order"]

# On a CPU images of a batch are gathered and multiplied a few at a time: the copies then stay in the cache, and memory
# above the model's own forward stays at a few MB for any batch. Elsewhere many small steps would cost more than the
# forward itself.
_IMAGES_AT_ONCE = {"cpu": 4}
_IMAGES_AT_ONCE_ELSEWHERE = 128

_Found = TypeVar("_Found")


class _found_once(Generic[_Found]):
    """``functools.cached_property`` that ``torch.compile`` takes: without Python 3.11's lock; there nothing is kept."""

    def __init__(self, find: Callable[[Any], _Found]) -> None:
        self._find = find

    def __get__(self, split: TokenSplit, owner: object = None) -> _Found:
        found = self._find(split)
        if not torch.compiler.is_compiling():
            split.__dict__[self._find.__name__] = found
        return found


class TokenSplit:
    """Where the masked and visible tokens of a batch are: sorted once per mask, used at every layer depth.

    Images may have different numbers of masked patches. :meth:`map` reduces those of one number together, so that what
    it calls sees no padding. Gradients need all images at once (:meth:`sort`): there ``most_masked`` patches from the
    front hold all masked ones of every image, ``most_visible`` from the back all visible ones, and ``masked_ok``,
    ``visible_ok`` say which of these are meant (``None`` where all are).

    Shapes:
        mask: batch num_patches
        order: batch num_patches (indices, masked first)
        num_masked: batch

    Args:
        mask: True = masked.
        prefix_tokens: Tokens in front of the patches in what :meth:`sort` gets.
        numbers: How many patches of each image are masked, where this is known: to ask the mask for it is to wait for
            the device.
        scratch: Memory to work in, shared with other splits; by default its own.

    Raises:
        ValueError: If the mask is not bool, or a row masks no patch or every patch.
    """

    def __init__(
        self,
        mask: Tensor,
        prefix_tokens: int = 0,
        *,
        numbers: Sequence[int] | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        if mask.ndim != 2 or mask.dtype != torch.bool:
            check_mask(mask)  # has the message
        self.mask, self.prefix_tokens = mask, prefix_tokens
        self.num_patches = mask.shape[1]
        self.num_masked = mask.sum(dim=1)
        self.numbers: Sequence[int] = self.num_masked.tolist() if numbers is None else numbers
        fewest, self.most_masked = min(self.numbers, default=0), max(self.numbers, default=0)
        if fewest < 1 or self.most_masked >= self.num_patches:
            check_mask(mask)
        self.most_visible = self.num_patches - fewest
        self.order = masked_first_order(mask)
        self.scratch = scratch or Scratch()
        # Rows of the tokens' storage in sorted order, by block and by how many rows lie between two images.
        self._storage_rows: dict[tuple[int, int], Tensor] = {}
        self._kept: dict[tuple[str, torch.dtype, int], _Sorted] = {}

    @property
    def counts(self) -> frozenset[int]:
        """Numbers of masked patches that occur."""
        return frozenset(self.numbers)

    # ---- images of one number of masked patches together

    @_found_once
    def _images(self) -> Tensor:
        """Images by number of masked patches."""
        return self.num_masked.argsort(stable=True)

    @_found_once
    def _blocks(self) -> list[tuple[Tensor, int]]:
        """A few images of one number each, with that number; a batch of one number keeps its order."""
        at_once = _IMAGES_AT_ONCE.get(self.mask.device.type, _IMAGES_AT_ONCE_ELSEWHERE)
        counts = sorted(Counter(self.numbers).items())
        groups = torch.split(self._images, [images for _, images in counts])
        return [
            (rows, count)
            for (count, _), group in zip(counts, groups, strict=True)
            for rows in torch.split(group, at_once)
        ]

    @_found_once
    def _back(self) -> Tensor:
        return self._images.argsort()

    def map(
        self, tokens: Tensor, reduce: Callable[..., Tensor], *per_image: Tensor, only_products: bool = False
    ) -> Tensor:
        """Reduce the tokens of a few images at a time, sorted masked first, to one value or row of values per image.

        Args:
            tokens: ``batch num_patches dim``.
            reduce: From sorted tokens ``some num_patches dim`` (at least float32) and their number of masked tokens to
                ``some ...``. The tokens lie in memory that is used again: keep no view of them.
            per_image: Further arguments of ``reduce``, ``batch ...`` each, of which it gets the rows of its images.
            only_products: ``reduce`` takes nothing of the tokens but :func:`dot_products`, and so may get them in half
                precision where these are as exact.
        """
        if tokens.ndim != 3 or tokens.shape[:2] != self.mask.shape:
            raise ValueError(
                f"tokens must be [batch, num_patches, dim] with a mask [batch, num_patches], "
                f"got tokens {list(tokens.shape)} and mask {list(self.mask.shape)}"
            )
        # Under autocast the product would be made in half precision again.
        device = tokens.device.type
        inside = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if inside else contextlib.nullcontext(), fast_float32(device):
            parts = [
                reduce(self._sorted(tokens, block, only_products), num_masked, *(each[rows] for each in per_image))
                for block, (rows, num_masked) in enumerate(self._blocks)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[self._back]

    def _sorted(self, tokens: Tensor, block: int, only_products: bool) -> Tensor:
        rows = self._blocks[block][0]
        between, row, along = tokens.stride()
        if (tokens.requires_grad and torch.is_grad_enabled()) or along != 1 or row < 1 or between % row:
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            return tokens[rows[:, None], self.order[rows]].to(dtype)
        # Tokens behind prefix tokens are a view: taken as rows of its storage, nothing is copied but the rows wanted.
        key = block, between // row
        storage_rows = self._storage_rows.get(key)
        if storage_rows is None:
            storage_rows = (rows[:, None] * key[1] + self.order[rows]).flatten()
            if not torch.compiler.is_compiling():
                self._storage_rows[key] = storage_rows
        batch, count, dim = tokens.shape
        flat = tokens.detach().as_strided(((batch - 1) * key[1] + count, dim), (row, 1))
        x = self.scratch(
            "sorted", tokens, len(rows) * count, dim, dtype=product_dtype(tokens) if only_products else None
        )
        _gather(flat, storage_rows, x)
        return x.view(len(rows), count, dim)

    # ---- all images at once, padded to the largest number

    @_found_once
    def num_visible(self) -> Tensor:
        """Visible patches of each image, ``batch``."""
        return self.num_patches - self.num_masked

    @_found_once
    def rows(self) -> Tensor:
        """Rows of the flattened tokens: ``most_masked`` of each image, then ``most_visible`` of each image."""
        image = torch.arange(len(self.order), device=self.order.device)[:, None]
        rows = image * (self.prefix_tokens + self.num_patches) + self.prefix_tokens + self.order
        return torch.cat([rows[:, : self.most_masked].flatten(), rows[:, -self.most_visible :].flatten()])

    @_found_once
    def places(self) -> Tensor:
        """Place of each token among ``rows``, ``batch * num_tokens``; of a prefix token one past the end."""
        batch, device = len(self.order), self.order.device
        image = torch.arange(batch, device=device)[:, None]
        place = torch.arange(self.num_patches, device=device)
        masked = image * self.most_masked + place
        visible = batch * self.most_masked + image * self.most_visible + place - (self.num_patches - self.most_visible)
        places = torch.full((batch, self.prefix_tokens + self.num_patches), len(self.rows), device=device)
        kind = torch.where(place < self.num_masked[:, None], masked, visible)
        places[:, self.prefix_tokens :].scatter_(1, self.order, kind)
        return places.flatten()

    @_found_once
    def masked_ok(self) -> Tensor | None:
        """Which of the ``most_masked`` from the front are masked, ``batch most_masked``."""
        if self.most_masked + self.most_visible == self.num_patches:
            return None
        place = torch.arange(self.most_masked, device=self.order.device)
        return place < self.num_masked[:, None]

    @_found_once
    def visible_ok(self) -> Tensor | None:
        """Which of the ``most_visible`` from the back are visible, ``batch most_visible``."""
        if self.most_masked + self.most_visible == self.num_patches:
            return None
        place = torch.arange(self.num_patches - self.most_visible, self.num_patches, device=self.order.device)
        return place >= self.num_masked[:, None]

    def sort(self, tokens: Tensor, dtype: torch.dtype) -> _Sorted:
        """The patches of each image in sorted order; in scratch memory, until the next call."""
        x = self.memory("sorted", tokens, dtype)
        _gather(tokens.flatten(0, 1), self.rows, x.patches)
        return x

    def unsort(self, gradient: _Sorted, tokens: Tensor) -> Tensor:
        """The gradient of ``tokens`` from that of :meth:`sort`; prefix tokens have none."""
        if self.prefix_tokens:
            gradient.prefix.zero_()
        return gradient.whole.to(tokens.dtype).index_select(0, self.places).view(tokens.shape)

    def memory(self, use: str, tokens: Tensor, dtype: torch.dtype) -> _Sorted:
        """Scratch memory for patches in sorted order."""
        key = use, dtype, tokens.shape[-1]
        kept = self._kept.get(key)
        if kept is None:
            kept = self._new_memory(use, tokens, dtype)
            # On a CPU to make views anew for each layer takes as long as an entropy.
            if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
                self._kept[key] = kept
        return kept

    def _new_memory(self, use: str, tokens: Tensor, dtype: torch.dtype) -> _Sorted:
        batch, dim = len(self.order), tokens.shape[-1]
        x = self.scratch(use, tokens, len(self.rows) + 1, dim, dtype=dtype)
        masked, visible, prefix = torch.split(x, [batch * self.most_masked, batch * self.most_visible, 1])
        return _Sorted(masked.view(batch, -1, dim), visible.view(batch, -1, dim), prefix, x[:-1], x)


def _gather(flat: Tensor, rows: Tensor, out: Tensor) -> None:
    """Rows of a matrix into memory of its dtype or a higher one."""
    if out.dtype == flat.dtype:
        torch.index_select(flat, 0, rows, out=out)
    else:
        out.copy_(flat.index_select(0, rows))


class _Sorted(NamedTuple):
    """Patches of a batch in sorted order, as views of one memory; each kind lies without gaps, as products like it.

    Shapes:
        masked: batch most_masked dim
        visible: batch most_visible dim
        prefix: 1 dim (one for all prefix tokens)
        patches: batch * (most_masked + most_visible), dim
        whole: the same and 1 more, dim
    """

    masked: Tensor
    visible: Tensor
    prefix: Tensor
    patches: Tensor
    whole: Tensor


def masked_first_order(mask: Tensor) -> Tensor:
    """Order of patches with the masked ones first, each kind in row-major order.

    Shapes:
        mask: batch num_patches
        returns: batch num_patches (indices)

    Example:
        >>> masked_first_order(torch.tensor([[False, True, False, True]]))
        tensor([[1, 3, 0, 2]])
    """
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)
