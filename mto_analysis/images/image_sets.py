"""Sets of images that everybody can name: which images, by name and hash, so that measurements are of the same ones."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.images.interface import Images, choose_rows, spread_rows, unreadable

_BUNDLED = Path(__file__).parents[1] / "assets" / "image_sets"
_COLUMNS = ["image", "sha256"]
_SHA256 = re.compile("[0-9a-f]{64}")
# Names in a message that refuses a set.
_NAMED = 3


@dataclass(frozen=True)
class ImageSet:
    """Images by name, each with the SHA-256 of its encoded file.

    Masks depend on names and values on contents, so both are fixed. The order of the images means nothing.
    """

    name: str
    digests: Mapping[str, str]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over names and hashes, sorted by name: ``name``, a zero byte, ``hash`` and a line feed for each.

        Example:
            >>> ImageSet("two", {"b": "0" * 64, "a": "1" * 64}).sha256[:8]
            '8f34b147'
        """
        digest = hashlib.sha256()
        for name in sorted(self.digests):
            digest.update(os.fsencode(name) + b"\0" + self.digests[name].encode() + b"\n")
        return digest.hexdigest()

    def limited(self, limit: int | None) -> ImageSet:
        """So many images, spread evenly over the sorted names; all without a limit."""
        names = sorted(self.digests)
        return ImageSet(self.name, {names[row]: self.digests[names[row]] for row in spread_rows(len(names), limit)})

    def find(self, images: Images) -> Images:
        """The images of this set in a source, under the names of the set; others of the source are left out.

        An image is looked up by name, then by content, so folders may be laid out in any way.
        """
        rows = {name: row for row, name in enumerate(images.names)}
        found: dict[str, int] = {}
        for name, sha256 in self.digests.items():
            if name in rows and _content_sha256(images, rows[name]) == sha256:
                found[name] = rows[name]
        if len(found) < len(self.digests):
            free = set(rows.values()) - set(found.values())
            by_content = {_content_sha256(images, row): row for row in sorted(free, reverse=True)}
            found |= {name: by_content[digest] for name, digest in self.digests.items() if digest in by_content}
        if lacking := [name for name in self.digests if name not in found]:
            named = ", ".join(
                f"{name} ({'other contents' if name in rows else 'missing'})" for name in lacking[:_NAMED]
            )
            more = ", ..." if len(lacking) > _NAMED else ""
            raise DataError(
                f"{len(lacking)} of the {len(self.digests)} images of the set {self.name} are not there: {named}{more}"
            )
        chosen = choose_rows(images, [found[name] for name in self.digests])
        chosen.names, chosen.skipped = list(self.digests), {}
        return chosen

    def to_csv(self) -> bytes:
        """As a set file: a row per image, sorted by name."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([_COLUMNS, *([name, self.digests[name]] for name in sorted(self.digests))])
        return buffer.getvalue().encode("utf-8", "surrogateescape")


def summarize_images(images: Images, name: str, *, limit: int | None = None) -> ImageSet:
    """The set that some images are: reads and hashes each."""
    rows = {each: row for row, each in enumerate(images.names)}
    chosen = ImageSet(name, dict.fromkeys(rows, "")).limited(limit).digests
    return ImageSet(name, {each: _content_sha256(images, rows[each]) for each in chosen})


def bundled_sets() -> dict[str, Path]:
    """Files of the sets that come with the package, by name."""
    return {path.stem: path for path in sorted(_BUNDLED.glob("*.csv"))}


def load_image_set(source: str | Path) -> ImageSet:
    """Read a set file, or one that comes with the package.

    Args:
        source: Name of a bundled set, or a ``.csv`` file with the columns ``image`` and ``sha256``.

    Example:
        >>> len(load_image_set("cifar10_test_256").digests)
        256
    """
    path = bundled_sets().get(str(source), Path(source).expanduser())
    if not path.is_file():
        raise DataNotFoundError(f"no image set {source}: give a file, or one of {', '.join(bundled_sets())}")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(csv.reader(file))
    except csv.Error as error:
        raise DataError(f"{path} is not a set file: {error}") from error
    if not rows or rows[0] != _COLUMNS:
        raise DataError(f"{path} is not a set file: its first line must be {','.join(_COLUMNS)}")
    digests: dict[str, str] = {}
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(_COLUMNS) or not row[0] or not _SHA256.fullmatch(row[1]):
            raise DataError(f"{path}: line {line} is not a name and a SHA-256 in 64 lower-case hexadecimal digits")
        if row[0] in digests:
            raise DataError(f"{path}: line {line} names {row[0]} again")
        digests[row[0]] = row[1]
    if not digests:
        raise DataError(f"{path} lists no images")
    return ImageSet(path.stem, digests)


def _content_sha256(images: Images, row: int) -> str:
    try:
        return hashlib.sha256(images.read(row)).hexdigest()
    except (OSError, ValueError) as error:
        raise unreadable(images.names[row], error) from error
