"""Reading a training image's file, and what to say when it cannot be read."""

from __future__ import annotations

import re

from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.images.decoding import decode_pixels
from mto_analysis.images.interface import Images, naming

__all__ = ["read_content", "read_pixels", "reason_of"]


def reason_of(error: Exception) -> str:
    """An error in one line; what PIL reads from memory has an address instead of a name, which says nothing."""
    return re.sub(r" ?<_io\.BytesIO object at \w+>", "", f"{type(error).__name__}: {error}".splitlines()[0])


def read_content(images: Images, row: int) -> bytes:
    """The encoded file of an image.

    A file that is gone is an error and no broken image: the data are not those the run began with, and to go on
    without would make another run of it.

    Raises:
        DataError: If it is gone or cannot be read.
        ValueError: If the source holds no image there; to be treated as a broken one.
    """
    try:
        return images.read(row)
    except OSError as error:
        words = f"image {images.names[row]} cannot be read any more ({reason_of(error)})"
        raise DataError(words, advice="restore it, then resume") from error


def read_pixels(images: Images, row: int, channels: int) -> Tensor:
    """One image for training, see :func:`~mto_analysis.images.decoding.decode_pixels`.

    Raises:
        DataError: If it is gone, cannot be read, or has values whose range nobody states.
    """
    with naming(images, row):
        return decode_pixels(read_content(images, row), channels, images.value_range)
