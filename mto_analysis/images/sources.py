"""Where images come from: a folder, a list file, a Parquet file, tar shards; with their labels.

An image's name is its path relative to the folder or list, or its row in a file; masks and augmentation depend on it.
What lies beside the images is skipped and counted, never taken for data.
"""

from __future__ import annotations

import codecs
import errno
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.images.decoding import ValueRange
from mto_analysis.images.interface import SUFFIXES, Images, is_hidden, printable, skipped_as

# A folder whose sub-folders all have these names holds splits, not classes. Each line: names of one split.
_SPLITS = (("train", "training"), ("val", "valid", "validation"), ("test",))


class _FileImages(Images):
    """Files named relative to a folder; a list of a million paths would take a gigabyte, names take a tenth."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] = (),
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        self._folder = folder
        self.names = [printable(name) for name in names]
        self._odd = {row: name for row, name in enumerate(names) if name != self.names[row]}
        self.labels, self.class_names, self.skipped = labels, class_names, skipped or {}

    def read(self, index: int) -> bytes:
        path = self._folder / self._odd.get(index, self.names[index])
        if path.is_fifo():  # would be waited for
            raise OSError(errno.EINVAL, "is a pipe, no file", str(path))
        return path.read_bytes()


def open_images(source: str | Path, *, split: str | None = None, value_range: ValueRange | None = None) -> Images:
    """Find the images of a source, with labels where it has classes.

    ============================  ==================================================================================
    source                        labels
    ============================  ==================================================================================
    folder (nested)               the sub-folder, in the order of names; ``DIR/train/CLASS`` and ``DIR/val/CLASS`` too
    list, one path a line         a whole number after a tab or the last space of every line, if every line has one
    Parquet file or folder of     column ``label``: numbers, or words; class names from the schema of the ``datasets``
    such shards                   library, or the words
    tar file, folder of such      the folder inside the tar, or the tar's name; of WebDataset shards the ``.cls`` files
    ============================  ==================================================================================

    Args:
        source: A folder; a ``.txt`` or ``.lst`` file with paths relative to itself; a ``.parquet`` file with a column
            of images (struct with ``bytes``, or bytes); a ``.tar`` file; or one image. Hidden and system folders, and
            files that are no images, are counted in ``skipped``.
        split: ``train``, ``val`` or ``test`` of a source that holds several; by default all that is there.
        value_range: Values of black and white; needed for images that are not of eight bits and do not state them
            (TIFF, NumPy).

    Raises:
        DataNotFoundError: If there is no such file, folder or split.
        DataError: If it holds no images, or is of no known kind.
    """
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must rise from black to white, got {value_range[0]:g} and {value_range[1]:g}")
    images = _open(Path(source).expanduser(), split)
    images.value_range = value_range
    return images


def _open(path: Path, split: str | None) -> Images:
    if path.is_dir():
        return _open_folder(path, split)
    if not path.is_file():
        raise DataNotFoundError(f"no images at {path}")
    if split is not None:
        raise DataError(f"{path} is one file and has no split {split!r}; give the file of the split itself")
    if path.suffix.lower() == ".parquet":
        from mto_analysis.images.parquet import open_parquet

        return open_parquet([path], path)
    if path.suffix.lower() in SUFFIXES:
        return _FileImages(path.parent, [path.name])
    if path.suffix.lower() in (".txt", ".lst"):
        return _open_list(path)
    if path.suffix.lower() == ".tar":
        from mto_analysis.images.tars import open_tars

        return open_tars(path)
    raise DataError(f"{path} is neither a folder, a list (.txt, .lst), a Parquet file, a tar file nor an image")


def _names_of_split(split: str) -> tuple[str, ...]:
    return next((names for names in _SPLITS if split in names), (split,))


def _open_folder(path: Path, split: str | None) -> Images:
    if split is not None:
        inside = [path / name for name in _names_of_split(split) if (path / name).is_dir()]
        if inside:
            return _open_folder(inside[0], None)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        raise DataError(f"{path} is a dataset that `save_to_disk` wrote; export it with `to_parquet` and give the file")
    found, skipped = _walk(path)
    if len(found) > 1:
        held = " and ".join(f"{kind} ({files[0]})" for kind, files in found.items())
        raise DataError(f"{path} holds {held}; give the folder or file of one kind")
    shards, tars = found.get("Parquet files"), found.get("tar files")
    if shards:
        from mto_analysis.images.parquet import open_parquet

        images: Images = open_parquet(_shards_of_split(path, [path / shard for shard in shards], split), path)
        images.skipped = skipped
        return images
    if split is not None:
        raise DataNotFoundError(f"{path} has no split {split!r}; it needs a sub-folder {split} or files {split}-*")
    if tars:
        from mto_analysis.images.tars import open_tars

        images = open_tars(path)
        images.skipped = dict(Counter(skipped) + Counter(images.skipped))
        return images
    names = next(iter(found.values()), [])
    if not names:
        beside = f", only {', '.join(skipped)}" if skipped else ""
        raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)}){beside}")
    labels, class_names = _folder_labels(names)
    return _FileImages(path, names, labels, class_names, skipped)


def _walk(path: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Files below a folder by kind, sorted, and what was skipped.

    Linked folders are followed once, after all folders that lie there themselves, and only where they lead to others.
    """
    found: dict[str, list[str]] = {kind: [] for kind in ("images", "NumPy arrays", "Parquet files", "tar files")}
    skipped: Counter[str] = Counter()
    seen: set[Path] = set()
    links = [path]
    while links:
        start = links.pop(0)
        parent = start != path and path.resolve().is_relative_to(start.resolve())
        for folder, folders, files in os.walk(start, onerror=_unreadable):
            here = Path(folder)
            if parent or here.resolve() in seen:
                skipped["linked folders that are read already"] += 1
                folders.clear()
                continue
            seen.add(here.resolve())
            hidden = [name for name in folders if is_hidden(name)]
            skipped["hidden or system folders"] += len(hidden)
            linked = [name for name in folders if name not in hidden and (here / name).is_symlink()]
            links += [here / name for name in sorted(linked)]
            folders[:] = [name for name in folders if name not in hidden and name not in linked]
            inside = here.relative_to(path).as_posix()
            _sort_files("" if inside == "." else f"{inside}/", files, found, skipped)
    sorted_names = {kind: sorted(names) for kind, names in found.items() if names}
    return sorted_names, {kind: count for kind, count in skipped.items() if count}


def _sort_files(prefix: str, files: Iterable[str], found: dict[str, list[str]], skipped: Counter[str]) -> None:
    """Put the files of a folder where they belong."""
    for file in files:
        suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 (a Path for each of a million files is slow)
        if is_hidden(file):
            skipped["hidden or system files"] += 1
        elif suffix == ".npy":
            found["NumPy arrays"].append(prefix + file)
        elif suffix in SUFFIXES:
            found["images"].append(prefix + file)
        elif suffix == ".parquet":
            found["Parquet files"].append(prefix + file)
        elif suffix == ".tar" and not prefix:
            found["tar files"].append(file)
        else:
            skipped[skipped_as(suffix)] += 1


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}); make it readable or move it away") from error


def _shards_of_split(path: Path, shards: Sequence[Path], split: str | None) -> list[Path]:
    """The shards named ``train-00000-of-00002.parquet`` or ``train.parquet``, as dataset repositories name them."""
    if split is None:
        return list(shards)
    names = _names_of_split(split)
    chosen = [shard for shard in shards if shard.stem.split("-")[0] in names or shard.parent.name in names]
    if not chosen:
        raise DataNotFoundError(f"{path} has no split {split!r}; its files are {', '.join(s.name for s in shards[:3])}")
    return chosen


def _folder_labels(names: Sequence[str]) -> tuple[list[int] | None, list[str]]:
    """Classes are the first folder of each name, or the second where the first ones are splits."""
    parts = [name.split("/") for name in names]
    known = {name for split in _SPLITS for name in split}
    level = int(all(part[0] in known for part in parts))
    if any(len(part) < level + 2 for part in parts):
        return None, []
    class_names = sorted({part[level] for part in parts})
    number = {name: row for row, name in enumerate(class_names)}
    return [number[part[level]] for part in parts], class_names


def _open_list(path: Path) -> Images:
    try:
        text = os.fsdecode(path.read_bytes().removeprefix(codecs.BOM_UTF8))  # names of files need not be UTF-8
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: {error}") from error
    if "\0" in text:
        raise DataError(f"{path} is not a text file (UTF-8)")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    names = [line for line in lines if not line.startswith("#") or (path.parent / line).is_file()]
    if not names:
        raise DataError(f"{path} lists no images")
    labels = None
    pairs = [name.replace("\t", " ").rpartition(" ") for name in names]
    if all(left.strip() and right.isdecimal() for left, _, right in pairs):
        names, labels = [left.strip() for left, _, _ in pairs], [int(right) for _, _, right in pairs]
    twice = Counter(os.path.abspath(path.parent / name) for name in names).most_common(1)[0]  # noqa: PTH100
    if twice[1] > 1:
        raise DataError(f"{path} lists an image twice ({twice[0]}); masks depend on names")
    return _FileImages(path.parent, names, labels)
