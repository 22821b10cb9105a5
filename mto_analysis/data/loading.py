"""Decoded pictures for training: all held in one tensor, or cropped batch by batch in worker processes.

Broken pictures are replaced by others that depend on (seed, epoch, name) alone; a picture whose file is gone is an
error, as the data are then not those the run began with.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mto_analysis.data.augmentation import Augmentation, fit_to_square
from mto_analysis.data.decoding import decode_pixels
from mto_analysis.data.keyed import Keys, keyed_uniform
from mto_analysis.data.sources import Pictures
from mto_analysis.errors import DataError
from mto_analysis.masking import MaskRule, mask_keys

__all__ = [
    "BatchPlan",
    "CroppedBatch",
    "CroppedBatches",
    "PlanSampler",
    "decode_all",
    "fits_memory",
    "replacement_rows",
]

LARGEST_IN_MEMORY = 2 * 1024**3  # bytes

Rows = npt.NDArray[np.int64]
_REPLACEMENTS = 64  # tries to find a good picture in place of a broken one


def reason_of(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def read_content(pictures: Pictures, row: int) -> bytes:
    """The encoded file of a picture.

    Raises:
        DataError: If it is gone or cannot be read; a row without a picture raises ``ValueError`` like a broken one.
    """
    try:
        return pictures.read(row)
    except OSError as error:
        raise DataError(
            f"picture {pictures.names[row]} was there at the start and cannot be read now ({reason_of(error)}); "
            f"restore it and go on with --resume"
        ) from error


def replacement_rows(keys: Keys, row: int, *, seed: int, epoch: int) -> Iterator[int]:
    """Rows to try in place of a broken one, the same on every process."""
    numbers = keyed_uniform(keys[row : row + 1], _REPLACEMENTS, seed=seed, epoch=epoch, purpose="replacement")
    yield from np.floor(numbers[0] * len(keys)).astype(np.int64).tolist()


def fits_memory(pictures: Pictures, image_size: int) -> bool:
    """Whether the first readable picture is no larger than ``image_size`` and all of its size would fit 2 GiB."""
    for row in range(min(len(pictures.names), _REPLACEMENTS)):
        try:
            with Image.open(io.BytesIO(read_content(pictures, row))) as picture:
                width, height = picture.size
        except (DataError, OSError, ValueError):
            continue
        return max(width, height) <= image_size and len(pictures.names) * 3 * width * height <= LARGEST_IN_MEMORY
    return False


def decode_all(
    pictures: Pictures,
    augmentation: Augmentation,
    on_broken: Callable[[int, str], None],
    on_progress: Callable[[int, int], None] | None,
) -> Tensor | str:
    """Decode every picture once; a broken one leaves its row black.

    Shapes:
        returns: pictures height channels width (uint8), or the name of the first picture of another size
    """
    total = len(pictures.names)
    pixels: Tensor | None = None
    broken = []
    for row in range(total):
        content: bytes | None = None
        try:
            content = read_content(pictures, row)
            one = decode_pixels(content)
        except DataError:
            raise
        except Exception as error:  # decoders fail in many ways
            broken.append((row, reason_of(error)))
            continue
        if augmentation.padding is not None:
            one = fit_to_square(one, augmentation.image_size)
        if pixels is None:
            pixels = torch.zeros(total, one.shape[1], 3, one.shape[2], dtype=torch.uint8)
        if one.shape[1:] != (pixels.shape[1], pixels.shape[3]):
            return pictures.names[row]
        pixels[row] = one.transpose(0, 1)
        if on_progress is not None and (row % 1000 == 999 or row == total - 1):
            on_progress(row + 1, total)
    for row, reason in broken:
        on_broken(row, reason)
    if pixels is None:
        raise DataError(f"none of the {total} pictures can be decoded; the first: {broken[0][1]}")
    return pixels


class BatchPlan(NamedTuple):
    """One micro-batch before anything is read."""

    epoch: int
    rows: Rows


class CroppedBatch(NamedTuple):
    """One micro-batch out of a worker process; ``failure`` says in its place why there is none.

    Shapes:
        pixels: batch channels image_size image_size (uint8)
        mask: batch num_patches
    """

    rows: Tensor
    pixels: Tensor
    mask: Tensor
    broken: list[tuple[int, str]]
    failure: str | None


class PlanSampler(Sampler[BatchPlan]):
    """Hands out the plans it was last given, so that one set of worker processes serves every epoch."""

    def __init__(self) -> None:
        self.plans: list[BatchPlan] = []

    def __iter__(self) -> Iterator[BatchPlan]:
        """Go through the plans."""
        return iter(self.plans)

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.plans)


class CroppedBatches(Dataset[CroppedBatch]):
    """Reads, decodes, crops and masks whole micro-batches; picklable, so that worker processes can do it.

    Args:
        pictures: Where from.
        keys: Of their names.
        augmentation: Only its geometry is applied here, on eight-bit pixels; the rest is done on the device.
        mask_rule: Of the masks.
        patch_size: Of the model.
        seed: Of the run.
    """

    def __init__(
        self,
        pictures: Pictures,
        keys: Keys,
        augmentation: Augmentation,
        mask_rule: MaskRule,
        patch_size: int,
        seed: int,
    ) -> None:
        self._pictures, self._keys, self._augmentation = pictures, keys, augmentation
        self._rule, self._patch_size, self._seed = mask_rule, patch_size, seed

    def __getitem__(self, plan: BatchPlan) -> CroppedBatch:
        """Carry out a plan."""
        size = self._augmentation.image_size
        pixels = torch.empty(len(plan.rows), 3, size, size, dtype=torch.uint8)
        rows = plan.rows.copy()
        broken: list[tuple[int, str]] = []
        failure = None
        try:
            for place, row in enumerate(plan.rows.tolist()):
                rows[place] = self._fill(pixels[place], row, plan.epoch, broken)
        except DataError as error:  # would come out of a worker with its whole traceback
            failure = str(error)
        names = [self._pictures.names[row] for row in rows.tolist()]
        grid = (size // self._patch_size, size // self._patch_size)
        mask = self._rule.draw(mask_keys(names, seed=self._seed, epoch=plan.epoch), grid, self._patch_size)
        return CroppedBatch(torch.from_numpy(rows), pixels, mask, broken, failure)

    def _fill(self, target: Tensor, row: int, epoch: int, broken: list[tuple[int, str]]) -> int:
        """Put a picture's crop, or that of its replacement, into ``target``; returns the row that it is of."""
        known = set()
        for candidate in itertools.chain((row,), replacement_rows(self._keys, row, seed=self._seed, epoch=epoch)):
            if candidate in known:
                continue
            content = None
            try:
                content = read_content(self._pictures, candidate)
                one = decode_pixels(content)
            except DataError:
                raise
            except Exception as error:  # decoders fail in many ways, and one bad file must not end a run
                broken.append((candidate, reason_of(error)))
                known.add(candidate)
                continue
            height, width = (np.array([side], dtype=np.int64) for side in one.shape[1:])
            key = self._keys[candidate : candidate + 1]
            geometry = self._augmentation.draw(key, height, width, seed=self._seed, epoch=epoch)
            target.copy_(self._augmentation.apply_to_picture(one, geometry))
            return candidate
        raise DataError(
            f"picture {self._pictures.names[row]} and {_REPLACEMENTS} others drawn in its place cannot be decoded; "
            f"the last: {broken[-1][1]}"
        )
