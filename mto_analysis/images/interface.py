"""What every source of images gives: names, labels, encoded files, and their decoding."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from PIL import Image
from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.images.decoding import ValueRange, decode_image, decode_samples, range_in_words

SUFFIXES = tuple(
    f".{each}"
    for each in (
        *("avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "npy", "pbm", "pgm", "png", "pnm", "ppm"),
        *("tif", "tiff", "webp"),
    )
)
# What file managers, archivers and file systems leave beside data; so are all files whose names start with a dot.
_SYSTEM_NAMES = frozenset(
    (
        *("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
        *("Thumbs.db", "desktop.ini"),
    )
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data."""
    return name.startswith(".") or name in _SYSTEM_NAMES


def skipped_as(suffix: str) -> str:
    """What a file of a suffix that is not read is counted as."""
    return f"{suffix} files" if suffix else "files without a suffix"


def printable(name: str) -> str:
    r"""A file name as text that can be written: bytes that are not UTF-8 are escaped.

    Example:
        >>> print(printable(os.fsdecode(b"caf\xe9.png")))
        caf\xe9.png
    """
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


class Images(ABC):
    """Named images that can be opened one by one."""

    #: One name per image, unique.
    names: Sequence[str]
    #: One class number per image, or None where the source has no classes.
    labels: Sequence[int] | None = None
    #: The name of each class number; empty where the source gives none.
    class_names: Sequence[str] = ()
    #: Why there are no labels, where the source could have some.
    unlabelled: str = ""
    #: Values of black and white as the user states them, for images that are not of eight bits.
    value_range: ValueRange | None = None
    #: What was skipped while looking for images: how many of which kind.
    skipped: Mapping[str, int] = {}

    @property
    def skipped_in_words(self) -> str:
        """What was skipped, for the user; empty where nothing was."""
        return ", ".join(f"{count} {kind}" for kind, count in self.skipped.items())

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image file."""

    def open(self, index: int) -> Image.Image:
        """One image in eight-bit RGB; raises whatever the decoder raises."""
        with naming(self, index):
            return decode_image(self.read(index), self.value_range)

    def samples(self, index: int, channels: int) -> Image.Image | Tensor:
        """One image for a model, see :func:`~mto_analysis.images.decoding.decode_samples`."""
        with naming(self, index):
            return decode_samples(self.read(index), channels, self.value_range)

    def range_in_words(self, index: int) -> str:
        """Which values of an image are black and white, where it is not of eight bits; else nothing."""
        return range_in_words(self.read(index), self.value_range)


def spread_rows(total: int, limit: int | None) -> list[int]:
    """So many rows, spread evenly over all; all where there is no limit, or fewer.

    Example:
        >>> spread_rows(10, 4), spread_rows(3, 4)
        ([0, 2, 5, 7], [0, 1, 2])
    """
    count = min(limit or total, total)
    return [index * total // count for index in range(count)]


def contents_digest(images: Images, sample: int | None = None) -> str:
    """Hash of the encoded files of all images, or of a sample spread evenly over them, in order.

    One that cannot be read counts as empty, so that it may be found broken later, where that is said.
    """
    digest = hashlib.blake2b(digest_size=8)
    for row in spread_rows(len(images.names), sample):
        content = b""
        with suppress(OSError, ValueError):
            content = images.read(row)
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


@contextmanager
def naming(images: Images, index: int) -> Iterator[None]:
    """An error that is no broken image names the image."""
    try:
        yield
    except DataError as error:
        raise DataError(f"image {images.names[index]} {error}") from error


def reason_of(error: Exception) -> str:
    """An error in one line; what PIL reads from memory has an address instead of a name, which says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r" ?<_io\.BytesIO object at \w+>", "", f"{type(error).__name__}: {error}".splitlines()[0])


def unreadable(name: str, reason: Exception | str, *, advice: str = "") -> DataError:
    """The error of an image that cannot be read or decoded; one that names its image already stays as it is."""
    if isinstance(reason, DataError):
        return reason
    words = reason if isinstance(reason, str) else reason_of(reason)
    return DataError(f"image {name} cannot be read ({words})", advice=advice)


class _ChosenImages(Images):
    def __init__(self, images: Images, rows: Sequence[int]) -> None:
        self.names = [images.names[row] for row in rows]
        self.labels = None if images.labels is None else [images.labels[row] for row in rows]
        self.class_names, self.value_range, self.skipped = images.class_names, images.value_range, images.skipped
        self._images, self._rows = images, rows

    def read(self, index: int) -> bytes:
        return self._images.read(self._rows[index])


def choose_images(images: Images, names: Sequence[str]) -> Images:
    """The named images alone, in the order asked for; their masks are the same, as masks depend on names.

    Raises:
        DataError: If there is no image of a name.
    """
    row_of = {name: row for row, name in enumerate(images.names)}
    missing = [name for name in names if name not in row_of]
    if missing:
        known = ", ".join(list(row_of)[:3])
        raise DataError(f"there is no image {', '.join(missing)}; there are {len(row_of)}: {known}, ...")
    return choose_rows(images, [row_of[name] for name in names])


def choose_rows(images: Images, rows: Sequence[int]) -> Images:
    """Some images alone, by row, in the order asked for."""
    return _ChosenImages(images, rows)
