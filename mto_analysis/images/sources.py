"""Where images come from: a folder, a list file, a Parquet file, tar shards; with their labels.

An image's name is its path relative to the folder or list, or its row in a file; masks and augmentation hang on it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.images.decoding import decode_image

__all__ = ["SUFFIXES", "Images", "choose_images", "open_images"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# A folder whose sub-folders all have these names holds splits, not classes. Each line: names of one split.
_SPLITS = (("train", "training"), ("val", "valid", "validation"), ("test",))


class Images(Protocol):
    """Named images that can be opened one by one."""

    @property
    def names(self) -> Sequence[str]:
        """One name per image, unique."""

    @property
    def labels(self) -> Sequence[int] | None:
        """One class number per image, or None where the source has no classes."""

    @property
    def class_names(self) -> Sequence[str]:
        """The name of each class number; empty where the source gives none."""

    def read(self, index: int) -> bytes:
        """The encoded image file.

        Raises:
            OSError: If the file is gone or cannot be read.
            ValueError: If the row holds no image.
        """

    def open(self, index: int) -> Image.Image:
        """Decode one image; raises whatever the decoder raises."""


class _FileImages:
    """Files named relative to a folder; a list of a million paths would take a gigabyte, names take a tenth."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self.names, self.labels, self.class_names = names, labels, class_names
        self._folder = folder

    def read(self, index: int) -> bytes:
        return (self._folder / self.names[index]).read_bytes()

    def open(self, index: int) -> Image.Image:
        return decode_image(self.read(index))


class _ChosenImages:
    def __init__(self, images: Images, rows: Sequence[int]) -> None:
        self.names = [images.names[row] for row in rows]
        self.labels = None if images.labels is None else [images.labels[row] for row in rows]
        self.class_names = images.class_names
        self._images, self._rows = images, rows

    def read(self, index: int) -> bytes:
        return self._images.read(self._rows[index])

    def open(self, index: int) -> Image.Image:
        return self._images.open(self._rows[index])


def open_images(source: str | Path, *, split: str | None = None) -> Images:
    """Find the images of a source, with labels where it has classes.

    ============================  ==================================================================================
    source                        labels
    ============================  ==================================================================================
    folder (nested)               the sub-folder, in the order of names; ``DIR/train/CLASS`` and ``DIR/val/CLASS`` too
    list, one path a line         a whole number after a tab or the last space of every line, if every line has one
    Parquet file or folder of     column ``label``; class names from the schema of the ``datasets`` library
    such shards
    dataset saved to disk by      column ``label``
    the ``datasets`` library
    tar file, folder of such      the folder inside the tar, or the tar's name; of WebDataset shards the ``.cls`` files
    ============================  ==================================================================================

    Args:
        source: A folder; a ``.txt`` or ``.lst`` file with paths relative to itself; a ``.parquet`` file with a column
            ``image`` (struct with ``bytes``, or bytes); a ``.tar`` file; or one image.
        split: ``train``, ``val`` or ``test`` of a source that holds several; by default all that is there.

    Raises:
        DataNotFoundError: If there is no such file, folder or split.
        DataError: If it holds no images, or is of no known kind.
    """
    path = Path(source).expanduser()
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
    names, shards, tars = _walk(path)
    if sum(map(bool, (names, shards, tars))) > 1:
        kinds = (("images", names), ("Parquet files", shards), ("tar files", tars))
        held = " and ".join(f"{kind} ({found[0]})" for kind, found in kinds if found)
        raise DataError(f"{path} holds {held}; give the folder or file of one kind")
    if shards:
        from mto_analysis.images.parquet import open_parquet

        return open_parquet(_shards_of_split(path, [path / shard for shard in shards], split), path)
    if split is not None:
        raise DataNotFoundError(f"{path} has no split {split!r}; it needs a sub-folder {split} or files {split}-*")
    if tars:
        from mto_analysis.images.tars import open_tars

        return open_tars(path)
    if not names:
        raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    labels, class_names = _folder_labels(names)
    return _FileImages(path, names, labels, class_names)


def _walk(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Images, Parquet files and (at the top) tar files below a folder, sorted; linked folders are followed once."""
    names: list[str] = []
    shards: list[str] = []
    tars: list[str] = []
    seen = {path.resolve()}
    for folder, folders, files in os.walk(path, followlinks=True):
        inside = Path(folder).relative_to(path).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in [one for one in folders if Path(folder, one).is_symlink()]:
            target = Path(folder, name).resolve()
            if target in seen or path.resolve().is_relative_to(target):
                folders.remove(name)
            seen.add(target)
        for file in files:
            suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 (a Path for each of a million files is slow)
            if suffix in SUFFIXES:
                names.append(prefix + file)
            elif suffix == ".parquet":
                shards.append(prefix + file)
            elif suffix == ".tar" and not prefix:
                tars.append(file)
    return sorted(names), sorted(shards), sorted(tars)


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
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: {error}") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise DataError(f"{path} lists no images")
    labels = None
    pairs = [name.replace("\t", " ").rpartition(" ") for name in names]
    if all(left.strip() and right.isdecimal() for left, _, right in pairs):
        names, labels = [left.strip() for left, _, _ in pairs], [int(right) for _, _, right in pairs]
    if len(set(names)) != len(names):
        raise DataError(f"{path} lists an image twice; masks hang on names")
    return _FileImages(path.parent, names, labels)


def choose_images(images: Images, names: Sequence[str]) -> Images:
    """The named images alone, in the order asked for; their masks are the same, as masks hang on names.

    Raises:
        DataError: If there is no image of a name.
    """
    row_of = {name: row for row, name in enumerate(images.names)}
    missing = [name for name in names if name not in row_of]
    if missing:
        known = ", ".join(list(row_of)[:3])
        raise DataError(f"there is no image {', '.join(missing)}; there are {len(row_of)}: {known}, ...")
    return _ChosenImages(images, [row_of[name] for name in names])
