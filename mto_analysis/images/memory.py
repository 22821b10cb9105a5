"""Small images for training: decoded once, held as one tensor on the device and augmented there by batch."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.images.augmentation import Augmentation, Geometry, fit_to_square
from mto_analysis.images.interface import Images, reason_of
from mto_analysis.images.reading import read_content, read_pixels
from mto_analysis.images.sampling import ImageSampler, Rows

LARGEST = 2 * 1024**3  # bytes of all images together
_LOOKED_AT = 64


def fits_memory(images: Images, image_size: int, channels: int) -> bool:
    """Whether the first readable image is no larger than ``image_size`` and all of its size would fit 2 GiB."""
    for row in range(min(len(images.names), _LOOKED_AT)):
        try:
            with Image.open(io.BytesIO(read_content(images, row))) as image:
                width, height = image.size
                depth = 4 if image.mode.startswith(("I", "F")) else 1  # bytes of a value
        except (OSError, ValueError):  # broken ones are dealt with when they are decoded
            continue
        return max(width, height) <= image_size and len(images.names) * channels * depth * width * height <= LARGEST
    return False


def decode_all(
    images: Images,
    augmentation: Augmentation,
    *,
    on_broken: Callable[[int, str], None],
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor | str:
    """Decode every image once; a broken one leaves its row black.

    Shapes:
        returns: images height channels width (uint8, or float32), or the name of the first image of another size
    """
    total = len(images.names)
    pixels: Tensor | None = None
    broken: list[tuple[int, str]] = []
    for row in range(total):
        try:
            one = read_pixels(images, row, augmentation.channels)
        except DataError:
            raise
        except Exception as error:  # decoders fail in many ways
            broken.append((row, reason_of(error)))
            continue
        if augmentation.padding is not None:
            one = fit_to_square(one, augmentation.image_size)
        if pixels is None:
            pixels = torch.zeros(total, one.shape[1], one.shape[0], one.shape[2], dtype=one.dtype)
        if one.shape[1:] != (pixels.shape[1], pixels.shape[3]):
            return images.names[row]
        if one.is_floating_point() and not pixels.is_floating_point():
            pixels = pixels.float()
        pixels[row] = one.transpose(0, 1)
        if on_progress is not None and (row % 1000 == 999 or row == total - 1):
            on_progress(row + 1, total)
    if pixels is None:
        raise DataError(f"none of the {total} images can be decoded; {images.names[0]}: {broken[0][1]}")
    for row, reason in broken:
        on_broken(row, reason)
    return pixels


class HeldImages:
    """Decoded images on the device.

    Args:
        pixels: All of them, ``images height channels width`` (0..255).
        sampler: Samples what is random about each image.
        broken: Rows that hold no image.
        device: Where to hold them.
    """

    def __init__(self, pixels: Tensor, sampler: ImageSampler, broken: Collection[int], device: torch.device) -> None:
        self._pixels = pixels.to(device)
        self._sampler, self._broken = sampler, frozenset(broken)

    def sample(self, rows: Rows, epoch: int) -> tuple[Rows, Geometry, Tensor]:
        """On the CPU: broken rows replaced, geometry and masks; can run while the device works."""
        if not self._broken.isdisjoint(rows.tolist()):
            rows = np.array([self._good(row, epoch) for row in rows.tolist()], dtype=np.int64)
        size = (self._pixels.shape[1], self._pixels.shape[3])
        geometry = self._sampler.geometry(self._sampler.numbers(rows, epoch), size)
        return rows, geometry, self._sampler.masks(rows, epoch)

    def _good(self, row: int, epoch: int) -> int:
        return next(candidate for candidate in self._sampler.candidates(row, epoch) if candidate not in self._broken)

    def augmented(self, rows: Rows, geometry: Geometry, epoch: int) -> tuple[Tensor, Tensor | None]:
        """On the device: cut, resized, mirrored, coloured and normalized.

        Shapes:
            returns: batch channels image_size image_size (float32), and the same or None
        """
        pixels = self._pixels[torch.from_numpy(rows).to(self._pixels.device)]
        cut = self._sampler.augmentation.apply_to_batch(pixels, geometry)
        return self._sampler.finish(cut, rows, epoch)
