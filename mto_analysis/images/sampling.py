"""Everything random about a training image, by its row: order, geometry, colours, mask, replacement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.images.augmentation import Augmentation, Geometry
from mto_analysis.masks import MaskRule, mask_keys
from mto_analysis.runtime.randomness import Keys, keyed_permutation, keyed_uniform, name_keys

Rows = npt.NDArray[np.int64]
_REPLACEMENTS = 64  # tries to find a good image in place of a broken one


@dataclass(frozen=True)
class ImageSampler:
    """What is sampled for the images of a source, each by (seed, epoch, name)."""

    names: Sequence[str]
    augmentation: Augmentation
    mask_rule: MaskRule
    patch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Check that they fit together."""
        if self.patch_size < 1 or self.augmentation.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size {self.augmentation.image_size}, got {self.patch_size}")
        self._mask(["a rule that does not fit the patches fails here"], epoch=0)

    @cached_property
    def keys(self) -> Keys:
        """One key per image."""
        return name_keys(self.names)

    def names_of(self, rows: Rows) -> tuple[str, ...]:
        """The names of rows."""
        return tuple(self.names[row] for row in rows.tolist())

    def order(self, epoch: int) -> Rows:
        """All rows in the order of an epoch."""
        return keyed_permutation(self.keys, seed=self.seed, epoch=epoch)

    def numbers(self, rows: Rows, epoch: int) -> npt.NDArray[np.float64]:
        """The random numbers behind crops and flips, see :meth:`Augmentation.numbers`."""
        return self.augmentation.numbers(self.keys[rows], seed=self.seed, epoch=epoch)

    def geometry(self, numbers: npt.NDArray[np.float64], size: tuple[int, int]) -> Geometry:
        """Crops and flips of images of one size (height, width)."""
        heights, widths = (np.full(len(numbers), side, dtype=np.int64) for side in size)
        return self.augmentation.place(numbers, heights, widths)

    def finish(self, images: Tensor, rows: Rows, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Colours and normalization, see :meth:`Augmentation.finish`."""
        return self.augmentation.finish(images, self.keys[rows], seed=self.seed, epoch=epoch)

    def masks(self, rows: Rows, epoch: int) -> Tensor:
        """One mask per image.

        Shapes:
            returns: batch num_patches
        """
        return self._mask(self.names_of(rows), epoch)

    def _mask(self, names: Sequence[str], epoch: int) -> Tensor:
        side = self.augmentation.image_size // self.patch_size
        return self.mask_rule.sample(mask_keys(names, seed=self.seed, epoch=epoch), (side, side), self.patch_size)

    def candidates(self, row: int, epoch: int) -> Iterator[int]:
        """The row itself, then those to try in its place if it is broken: the same on every process."""
        yield row
        key = self.keys[row : row + 1]
        numbers = keyed_uniform(key, _REPLACEMENTS, seed=self.seed, epoch=epoch, purpose="replacement")
        yield from np.floor(numbers[0] * len(self.keys)).astype(np.int64).tolist()
        raise DataError(
            f"image {self.names[row]} and {_REPLACEMENTS} others drawn in its place cannot be decoded; "
            f"are these images?"
        )
