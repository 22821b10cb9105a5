"""Images in the columns of the ``datasets`` library: Parquet files and datasets saved to disk, read with pyarrow."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.images.decoding import decode_image

__all__ = ["open_parquet", "open_saved_dataset"]


class _CellImages:
    """Image cells, bytes or a struct with ``bytes`` and ``path``, in groups of rows; one group at a time is in memory.

    Args:
        names: One per row.
        groups: File and number of each group of rows, in order.
        starts: First row of each group.
        labels: One class number per row, or None.
        class_names: Of the class numbers.
    """

    def __init__(
        self,
        names: Sequence[str],
        groups: Sequence[tuple[Path, int]],
        starts: Sequence[int],
        labels: Sequence[int] | None,
        class_names: Sequence[str],
    ) -> None:
        self.names, self.labels, self.class_names = names, labels, class_names
        self._groups, self._starts = groups, starts
        self._files: dict[Path, Any] = {}
        self._group: tuple[int, Any] | None = None
        self._process = os.getpid()

    def _load(self, path: Path, group: int) -> Any:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        if self._process != os.getpid():  # a forked worker process must not share its parent's open files
            self._files, self._group, self._process = {}, None, os.getpid()
        group = bisect.bisect_right(self._starts, index) - 1
        if self._group is None or self._group[0] != group:
            self._group = (group, self._load(*self._groups[group]))
        cell: object = self._group[1][index - self._starts[group]].as_py()
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                image: Path = self._groups[group][0].parent / cell["path"]
                return image.read_bytes()
            cell = cell.get("bytes")
        if not isinstance(cell, bytes):
            raise ValueError("the row holds no image bytes")
        return cell

    def open(self, index: int) -> Image.Image:
        return decode_image(self.read(index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None, "_files": {}}  # worker processes read for themselves


class _ParquetImages(_CellImages):
    def _load(self, path: Path, group: int) -> Any:
        import pyarrow.parquet as pq

        # A file stays open, and a group is read on demand, however large the file.
        file = self._files.get(path) or self._files.setdefault(path, pq.ParquetFile(path))
        return file.read_row_group(group, columns=["image"], use_threads=False).column(0)


class _ArrowImages(_CellImages):
    def _load(self, path: Path, group: int) -> Any:
        import pyarrow as pa

        # Memory-mapped: a group costs nothing until its bytes are read, so random access is cheap.
        batches = self._files.get(path)
        if batches is None:
            with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
                batches = self._files[path] = list(stream)
        return batches[group].column("image")


def _class_names(features: Any) -> list[str]:
    """Names of a ClassLabel column in the description that the ``datasets`` library writes."""
    label = features.get("label") if isinstance(features, dict) else None
    names = label.get("names") if isinstance(label, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def open_parquet(paths: Sequence[Path], source: Path) -> _CellImages:
    """Open one Parquet file, or the shards of a folder, as one row of images.

    Names are the row, and with several shards the shard and the row (``train-00000-of-00002:17``).

    Raises:
        DataError: If a file cannot be read or has no column ``image``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: list[str] = []
    labels: list[int | None] = []
    groups: list[tuple[Path, int]] = []
    starts: list[int] = []
    class_names: list[str] = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            if "image" not in file.schema_arrow.names:
                raise DataError(f"{path} has no column `image`, only {', '.join(file.schema_arrow.names)}")
            described = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            class_names = class_names or _class_names(described.get("info", {}).get("features"))
            rows = file.metadata.num_rows
            if "label" in file.schema_arrow.names and pa.types.is_integer(file.schema_arrow.field("label").type):
                labels += file.read(columns=["label"]).column(0).to_pylist()
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            file.close()
        except (pa.ArrowException, OSError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
        prefix = "" if len(paths) == 1 else path.relative_to(source).with_suffix("").as_posix() + ":"
        first = len(names)
        for group, size in enumerate(sizes):
            starts.append(first)
            groups.append((path, group))
            first += size
        names += [f"{prefix}{row}" for row in range(rows)]
    if not names:
        raise DataError(f"{source} holds no rows")
    return _ParquetImages(names, groups, starts, _complete(labels, len(names)), class_names)


def _complete(labels: Sequence[int | None], count: int) -> list[int] | None:
    """Labels if every row has one (the ``datasets`` library writes -1 for a hidden test label)."""
    known = [label for label in labels if label is not None and label >= 0]
    return known if len(known) == count else None


def open_saved_dataset(path: Path, splits: Sequence[str] | None) -> _CellImages:
    """Open what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote; names are rows.

    Args:
        path: The folder.
        splits: Names of the wanted split, of a ``DatasetDict``.

    Raises:
        DataError: If a file cannot be read, or a split must be chosen.
        DataNotFoundError: If there is no such split.
    """
    import pyarrow as pa

    try:
        if (path / "dataset_dict.json").is_file():
            there = json.loads((path / "dataset_dict.json").read_text())["splits"]
            chosen = [name for name in there if name in (splits or there)]
            if not chosen:
                raise DataNotFoundError(f"{path} has no split {(splits or ['?'])[0]!r}, only {', '.join(there)}")
            if len(chosen) > 1:
                raise DataError(f"{path} holds the splits {', '.join(there)}; name one, as in {path / there[0]}")
            path = path / chosen[0]
        state = json.loads((path / "state.json").read_text())
        features = json.loads((path / "dataset_info.json").read_text())["features"]
        files = [path / file["filename"] for file in state["_data_files"]]
        groups: list[tuple[Path, int]] = []
        starts: list[int] = []
        labels: list[int | None] = []
        rows = 0
        for file in files:
            with pa.ipc.open_stream(pa.memory_map(str(file))) as stream:
                if "image" not in stream.schema.names:
                    raise DataError(f"{path} has no column `image`, only {', '.join(stream.schema.names)}")
                with_label = "label" in stream.schema.names and pa.types.is_integer(stream.schema.field("label").type)
                for group, batch in enumerate(stream):
                    groups.append((file, group))
                    starts.append(rows)
                    labels += batch.column("label").to_pylist() if with_label else []
                    rows += batch.num_rows
    except (pa.ArrowException, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        if isinstance(error, DataError):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is not a dataset saved by the `datasets` library ({reason})") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    names = [str(row) for row in range(rows)]
    return _ArrowImages(names, groups, starts, _complete(labels, rows), _class_names(features))
