"""Images in Parquet files with the columns of the ``datasets`` library, read with pyarrow."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mto_analysis.errors import DataError
from mto_analysis.images.decoding import decode_image

__all__ = ["open_parquet"]


class _ParquetImages:
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
        import pyarrow.parquet as pq

        # A file stays open, and a group is read on demand, however large the file.
        file = self._files.get(path) or self._files.setdefault(path, pq.ParquetFile(path))
        return file.read_row_group(group, columns=["image"], use_threads=False).column(0)

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


def _class_names(features: Any) -> list[str]:
    """Names of a ClassLabel column in the description that the ``datasets`` library writes."""
    label = features.get("label") if isinstance(features, dict) else None
    names = label.get("names") if isinstance(label, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def open_parquet(paths: Sequence[Path], source: Path) -> _ParquetImages:
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
