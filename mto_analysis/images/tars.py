"""Images in tar files, read by their place in the file; labels of WebDataset shards."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mto_analysis.errors import DataError
from mto_analysis.images.interface import SUFFIXES, Images, is_hidden, printable, skipped_as

_END = bytes(1024)  # the two blocks of zeros that end an archive


class _Place(NamedTuple):
    path: Path
    start: int
    length: int


class _TarImages(Images):
    def __init__(
        self,
        names: Sequence[str],
        places: Sequence[_Place],
        labels: Sequence[int] | None,
        class_names: Sequence[str],
    ) -> None:
        self.names, self.labels, self.class_names = names, labels, class_names
        self._places = places
        self._files: dict[Path, int] = {}

    def read(self, index: int) -> bytes:
        path, start, length = self._places[index]
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = os.open(path, os.O_RDONLY)
        content = os.pread(file, length, start)  # needs no file position, so threads may share the file
        if len(content) != length:
            raise OSError(f"{path} ends before the image does")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # worker processes open for themselves

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class _Found(NamedTuple):
    """An image in a tar file."""

    name: str
    folder: str  #: or the tar's name
    place: _Place


def open_tars(path: Path) -> _TarImages:
    """Open a tar file, or all tar files of a folder, of images.

    Names are the path inside the tar, after the tar's own name where there are several. Labels are the ``.cls`` files
    of WebDataset shards if there are any; else the class is the image's folder, or the tar's name.
    """
    several = path.is_dir()
    shards = sorted(path.glob("*.tar")) if several else [path]
    contents = _Contents()
    try:
        for shard in shards:
            with tarfile.open(shard, "r:") as tar:
                contents.add(tar, shard, *((f"{shard.name}/", shard.stem) if several else ("", "")))
        _check_ends(shards)
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: a tar file cannot be read ({str(error).splitlines()[0]})") from error
    found = sorted(contents.found)
    names = [each.name for each in found]
    if not found:
        raise DataError(f"{path} holds no images in its tar files")
    if len(set(names)) != len(names):
        raise DataError(f"{path} holds an image name twice in one tar; masks depend on names")
    class_names = sorted({each.folder for each in found})
    labels: list[int] | None = None
    if contents.numbers:
        given = [contents.numbers.get(_stem(name)) for name in names]
        known = [number for number in given if number is not None]
        labels, class_names = (known if len(known) == len(names) else None), []
    elif len(class_names) > 1:
        number = {name: row for row, name in enumerate(class_names)}
        labels = [number[each.folder] for each in found]
    else:
        class_names = []
    images = _TarImages(names, [each.place for each in found], labels, class_names)
    images.skipped = contents.skipped
    return images


class _Contents:
    """What tar files hold: images, class numbers of WebDataset samples, and how much of what is neither."""

    def __init__(self) -> None:
        self.found: list[_Found] = []
        self.numbers: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()

    def add(self, tar: tarfile.TarFile, shard: Path, prefix: str, folder: str, start: int = 0) -> None:
        """The members of a tar that begins at a place of its file, and of the tars in it."""
        for member in tar:
            inside = Path(os.path.normpath(member.name))
            name, suffix = prefix + printable(inside.as_posix()), inside.suffix.lower()
            if member.isdir():
                continue
            if any(is_hidden(part) for part in inside.parts):
                self.skipped["hidden or system files"] += 1
            elif not member.isfile():
                self.skipped["links in tar files"] += 1
            elif suffix == ".tar":
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    self.add(inner, shard, f"{name}/", inside.stem, start + member.offset_data)
            elif suffix == ".cls":
                self.numbers[_stem(name)] = _class_number(tar, member, shard)
            elif suffix in SUFFIXES and suffix != ".npy":  # an array of a WebDataset sample need not be its image
                place = _Place(shard, start + member.offset_data, member.size)
                self.found.append(_Found(name, printable(inside.parent.name) or folder, place))
            else:
                self.skipped[skipped_as(suffix)] += 1


def _class_number(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    content = tar.extractfile(member)
    text = content.read().decode("ascii", "replace").strip() if content is not None else ""
    if not text.isdecimal():
        raise DataError(f"{shard}: {member.name} holds {text[:20]!r}, not a class number")
    return int(text)


def _check_ends(shards: Sequence[Path]) -> None:
    """Refuse archives that were cut: between two members nothing but the missing end mark shows it."""
    for shard in shards:
        with shard.open("rb") as file:
            file.seek(-min(len(_END), shard.stat().st_size), os.SEEK_END)
            if file.read() != _END:
                raise DataError(f"{shard} has no end mark, so it was cut short; copy or download it again")


def _stem(name: str) -> str:
    """What the files of one WebDataset sample share: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".")[0]
