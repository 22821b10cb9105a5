"""Reading a training image's file, and what to say when it cannot be read."""

from __future__ import annotations

from torch import Tensor

from mto_analysis.images.decoding import decode_pixels
from mto_analysis.images.interface import Images, naming, unreadable


def read_content(images: Images, row: int) -> bytes:
    """The encoded file of an image.

    A file that is gone is an error and no broken image: the data are not those the run began with, and to go on
    without would make another run of it.
    """
    try:
        return images.read(row)
    except OSError as error:
        raise unreadable(images.names[row], error, advice="restore it, then resume") from error


def read_pixels(images: Images, row: int, channels: int) -> Tensor:
    """One image for training, see :func:`~mto_analysis.images.decoding.decode_pixels`."""
    content = read_content(images, row)
    with naming(images, row):
        return decode_pixels(content, channels, images.value_range)
