"""Images in tar files: found by timm's reader, read by their place in the file; labels of WebDataset shards."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from mto_analysis.errors import DataError
from mto_analysis.images.interface import Images

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


def open_tars(path: Path) -> _TarImages:
    """Open a tar file, or all tar files of a folder, of images.

    Names are the path inside the tar, after the tar's own name where there are several. Labels are the ``.cls`` files
    of WebDataset shards if there are any; else the class is the image's folder, or the tar's name.
    """
    try:
        # timm's index file is not used: it would be written beside the data.
        reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)  # type: ignore[no-untyped-call]
        shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
        _check_ends(shards)
        numbers = _webdataset_labels(shards)
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: a tar file cannot be read ({str(error).splitlines()[0]})") from error
    except ValueError as error:  # timm unpacks an empty list
        raise DataError(f"{path} holds no images in its tar files") from error
    found: list[tuple[str, _Place, int]] = []
    several = path.is_dir()
    for (member, parent, child), target in zip(reader.samples, reader.targets, strict=True):
        file = path / parent if parent else path
        start = member.offset_data + (child.offset_data if child is not None else 0)
        inside = f"{child.name}/{member.name}" if child is not None else str(member.name)
        name = f"{parent}/{inside}" if several else inside
        found.append((name, _Place(file, start, member.size), int(target)))
    found.sort(key=lambda one: one[0])
    names = [name for name, _, _ in found]
    if len(set(names)) != len(names):
        raise DataError(f"{path} holds an image name twice in one tar; masks hang on names")
    labels: list[int] | None = [target for _, _, target in found]
    class_names = [str(reader.class_idx_to_name[number]) for number in range(len(reader.class_idx_to_name))]
    if numbers:
        stems = [(place.path.name, name.removeprefix(f"{place.path.name}/")) for name, place, _ in found]
        given = [numbers.get((tar, _stem(inside))) for tar, inside in stems]
        known = [number for number in given if number is not None]
        labels, class_names = (known if len(known) == len(names) else None), []
    elif len(class_names) < 2:
        labels, class_names = None, []
    return _TarImages(names, [place for _, place, _ in found], labels, class_names)


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


def _webdataset_labels(shards: Sequence[Path]) -> dict[tuple[str, str], int]:
    """Class numbers in ``.cls`` files, by tar and sample; empty if the first shard has none."""
    numbers: dict[tuple[str, str], int] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(".cls"):
                    continue
                content = tar.extractfile(member)
                text = content.read().decode("ascii", "replace").strip() if content is not None else ""
                if not text.isdecimal():
                    raise DataError(f"{shard}: {member.name} holds {text[:20]!r}, not a class number")
                numbers[shard.name, _stem(member.name)] = int(text)
        if not numbers:
            return {}
    return numbers
