"""Pictures to batches: a folder, a list file or a Parquet file, preprocessed as the model expects.

A picture's name is its path relative to the folder or list, or its row in a Parquet file; masks hang on it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.models import ModelInfo

__all__ = [
    "BrokenPicture",
    "PictureBatch",
    "Pictures",
    "choose_pictures",
    "open_pictures",
    "picture_batches",
    "preprocessing",
]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class PictureBatch(NamedTuple):
    """Preprocessed pictures with their names.

    Shapes:
        images: batch channels height width
    """

    names: tuple[str, ...]
    images: Tensor


class BrokenPicture(NamedTuple):
    """A picture that could not be decoded, and why."""

    name: str
    reason: str


class Pictures(Protocol):
    """Named pictures that can be opened one by one."""

    @property
    def names(self) -> Sequence[str]:
        """One name per picture, unique."""

    def open(self, index: int) -> Image.Image:
        """Decode one picture; raises whatever the decoder raises."""


def _rgb(picture: Image.Image) -> Image.Image:
    """Eight bits per colour. PIL alone would clip the upper 255/256 of a 16-bit picture's tones to white."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        tones = np.asarray(picture, dtype=np.float64) / 257
        picture = Image.fromarray(tones.round().clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


class _FilePictures:
    def __init__(self, names: Sequence[str], paths: Sequence[Path]) -> None:
        self.names = names
        self._paths = paths

    def open(self, index: int) -> Image.Image:
        with Image.open(self._paths[index]) as picture:
            return _rgb(picture)


class _ParquetPictures:
    """Rows of a Parquet file with an image column, in the form of the ``datasets`` library."""

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow.parquet as pq

        self._path, self._column = path, column
        metadata = pq.ParquetFile(path).metadata
        self.names = [str(row) for row in range(metadata.num_rows)]
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [sum(sizes[:group]) for group in range(len(sizes))]
        self._group: tuple[int, list[Any]] | None = None

    def open(self, index: int) -> Image.Image:
        group = max(group for group, start in enumerate(self._starts) if start <= index)
        if self._group is None or self._group[0] != group:
            import pyarrow.parquet as pq

            # One row group at a time is in memory, however large the file.
            column = pq.ParquetFile(self._path).read_row_group(group, columns=[self._column]).column(0)
            self._group = (group, column.to_pylist())
        cell = self._group[1][index - self._starts[group]]
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise ValueError("the row holds no image bytes")
        with Image.open(io.BytesIO(content)) as picture:
            return _rgb(picture)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}  # worker processes read for themselves


def open_pictures(source: str | Path) -> Pictures:
    """Find the pictures of a folder (nested), a list file (one path a line) or a Parquet file.

    Args:
        source: A folder; a ``.txt`` or ``.lst`` file with paths relative to itself; a ``.parquet`` file with a column
            ``image`` (struct with ``bytes``, or bytes).

    Raises:
        DataNotFoundError: If there is no such file or folder.
        DataError: If it holds no pictures, or is of no known kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(
            (file.relative_to(path).as_posix(), file)
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES and file.is_file()
        )
        if not files:
            raise DataError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
        return _FilePictures([name for name, _ in files], [file for _, file in files])
    if not path.is_file():
        raise DataNotFoundError(f"no pictures at {path}")
    if path.suffix.lower() == ".parquet":
        return _open_parquet(path)
    if path.suffix.lower() in SUFFIXES:
        return _FilePictures([path.name], [path])
    if path.suffix.lower() in (".txt", ".lst"):
        return _open_list(path)
    raise DataError(f"{path} is neither a folder, a list (.txt, .lst), a Parquet file nor a picture")


def _open_list(path: Path) -> Pictures:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: {error}") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not names:
        raise DataError(f"{path} lists no pictures")
    if len(set(names)) != len(names):
        raise DataError(f"{path} lists a picture twice; masks hang on names")
    return _FilePictures(names, [path.parent / name for name in names])


def _open_parquet(path: Path) -> Pictures:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.ParquetFile(path).schema_arrow
        pictures = _ParquetPictures(path, "image")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    if "image" not in schema.names:
        raise DataError(f"{path} has no column `image`, only {', '.join(schema.names)}")
    if not pictures.names:
        raise DataError(f"{path} holds no rows")
    return pictures


def preprocessing(info: ModelInfo) -> Callable[[Image.Image], Tensor]:
    """What a model expects: shorter side resized (bicubic), centre crop, channels normalised.

    Shapes:
        returns: picture -> channels image_size image_size
    """
    from timm.data import create_transform  # type: ignore[attr-defined]

    transform: Callable[[Image.Image], Tensor] = create_transform(
        info.image_size, is_training=False, interpolation="bicubic", mean=info.mean, std=info.std, crop_pct=1.0
    )
    return transform


class _Prepared(Dataset[tuple[str, Tensor | str]]):
    """Pictures after preprocessing; a broken one gives its reason instead of a tensor."""

    def __init__(self, pictures: Pictures, rows: Sequence[int], transform: Callable[[Image.Image], Tensor]) -> None:
        self._pictures, self._rows, self._transform = pictures, rows, transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> tuple[str, Tensor | str]:
        row = self._rows[item]
        name = self._pictures.names[row]
        try:
            return name, self._transform(self._pictures.open(row))
        except Exception as error:  # decoders fail in many ways, and one bad file must not end a run
            return name, f"{type(error).__name__}: {error}".splitlines()[0]


def picture_batches(
    pictures: Pictures,
    info: ModelInfo,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    num_workers: int = 0,
    on_broken: Callable[[BrokenPicture], None] | None = None,
) -> Iterator[PictureBatch]:
    """Preprocessed batches, in the order of names; broken pictures are reported and left out.

    Args:
        pictures: From :func:`open_pictures`.
        info: Of the model that will see them.
        batch_size: Pictures in a batch.
        limit: Use so many pictures, spread evenly over the names, so that a folder sorted by class is not cut off.
        num_workers: Processes that decode; results do not depend on it.
        on_broken: Called for each picture that cannot be decoded; by default that is an error.

    Raises:
        ValueError: If a number is not positive.
        DataError: If a picture is broken and ``on_broken`` is not given.
    """
    if batch_size < 1 or (limit is not None and limit < 1) or num_workers < 0:
        raise ValueError(
            f"batch_size and limit must be at least 1, num_workers at least 0, got {batch_size=}, {limit=}"
        )
    total = len(pictures.names)
    count = min(limit or total, total)
    rows = [index * total // count for index in range(count)]
    loader: DataLoader[tuple[str, Tensor | str]] = DataLoader(
        _Prepared(pictures, rows, preprocessing(info)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # or it would draw its seed from the global generator
    )
    for items in loader:
        good: list[tuple[str, Tensor]] = []
        for name, content in items:
            if isinstance(content, Tensor):
                good.append((name, content))
            elif on_broken is None:
                raise DataError(f"picture {name} cannot be read ({content})")
            else:
                on_broken(BrokenPicture(name, content))
        if good:
            yield PictureBatch(tuple(name for name, _ in good), torch.stack([image for _, image in good]))


class _ChosenPictures:
    def __init__(self, pictures: Pictures, rows: Sequence[int]) -> None:
        self.names = [pictures.names[row] for row in rows]
        self._pictures, self._rows = pictures, rows

    def open(self, index: int) -> Image.Image:
        return self._pictures.open(self._rows[index])


def choose_pictures(pictures: Pictures, names: Sequence[str]) -> Pictures:
    """The named pictures alone, in the order asked for; their masks are the same, as masks hang on names.

    Raises:
        DataError: If there is no picture of a name.
    """
    row_of = {name: row for row, name in enumerate(pictures.names)}
    missing = [name for name in names if name not in row_of]
    if missing:
        known = ", ".join(list(row_of)[:3])
        raise DataError(f"there is no picture {', '.join(missing)}; there are {len(row_of)}: {known}, ...")
    return _ChosenPictures(pictures, [row_of[name] for name in names])
