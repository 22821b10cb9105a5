"""Images in Parquet files with the columns of the ``datasets`` library, read with pyarrow."""

from __future__ import annotations

import bisect
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mto_analysis.errors import DataError
from mto_analysis.images.interface import Images


class _ParquetImages(Images):
    """Image cells, bytes or a struct with ``bytes`` and ``path``, in groups of rows; one group at a time is in memory.

    Args:
        names: One per row.
        groups: File and number of each group of rows, in order.
        starts: First row of each group.
        column: That holds the images.
        labels: One class number per row, or None.
        class_names: Of the class numbers.
    """

    def __init__(
        self,
        names: Sequence[str],
        groups: Sequence[tuple[Path, int]],
        starts: Sequence[int],
        column: str,
        labels: Sequence[int] | None,
        class_names: Sequence[str],
    ) -> None:
        self.names, self.labels, self.class_names = names, labels, class_names
        self._groups, self._starts, self._column = groups, starts, column
        self._files: dict[Path, Any] = {}
        self._group: tuple[int, Any] | None = None
        self._process = os.getpid()

    def _load(self, path: Path, group: int) -> Any:
        import pyarrow.parquet as pq

        # A file stays open, and a group is read on demand, however large the file.
        file = self._files.get(path) or self._files.setdefault(path, pq.ParquetFile(path))
        return file.read_row_group(group, columns=[self._column], use_threads=False).column(0)

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None, "_files": {}}  # worker processes read for themselves


def _class_names(schema: Any) -> list[str]:
    """Names of a ClassLabel column in the description that the ``datasets`` library writes; others' may be anything."""
    try:
        described: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return []
    for name in ("info", "features", "label", "names"):
        described = described.get(name) if isinstance(described, dict) else None
    return [str(name) for name in described] if isinstance(described, list) else []


def _image_column(schema: Any, path: Path) -> str:
    """The column ``image``, or the only one that could hold images."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(each.name in ("bytes", "path") for each in kind)
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))

    columns = [each.name for each in schema if holds_bytes(each.type)]
    if "image" in columns or len(columns) == 1:
        return "image" if "image" in columns else str(columns[0])
    raise DataError(
        f"{path} has {'several columns' if columns else 'no column'} of image bytes, and none is `image`: "
        f"{_columns(schema)}"
    )


def _columns(schema: Any) -> str:
    return ", ".join(f"{each.name} ({each.type})" for each in schema)


def open_parquet(paths: Sequence[Path], source: Path) -> _ParquetImages:
    """Open one Parquet file, or the shards of a folder, as one row of images.

    Names are the row, and with several shards the shard and the row (``train-00000-of-00002:17``).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: list[str] = []
    labels: list[int | str | None] = []
    groups: list[tuple[Path, int]] = []
    starts: list[int] = []
    class_names: list[str] = []
    columns: dict[str, Path] = {}
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                columns.setdefault(_image_column(schema, path), path)
                class_names = class_names or _class_names(schema)
                if "label" in schema.names:
                    labels += file.read(columns=["label"]).column(0).to_pylist()
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
        prefix = "" if len(paths) == 1 else path.relative_to(source).with_suffix("").as_posix() + ":"
        first = len(names)
        for group, size in enumerate(sizes):
            starts.append(first)
            groups.append((path, group))
            first += size
        names += [f"{prefix}{row}" for row in range(sum(sizes))]
    if not names:
        raise DataError(f"{source} holds no rows")
    if len(columns) > 1:
        held = " and ".join(f"`{column}` ({path.name})" for column, path in columns.items())
        raise DataError(f"{source} has images in columns of different names: {held}")
    images = _ParquetImages(names, groups, starts, next(iter(columns)), *_classes(labels, len(names), class_names))
    if images.labels is None:
        kinds = Counter(type(label) for label in labels if not isinstance(label, int) or label >= 0)
        images.unlabelled = (
            f"of {len(names)} rows {kinds[int] + kinds[bool]} have a class number in `label`, {kinds[str]} a word; "
            f"columns are {_columns(schema)}"
        )
    return images


def _classes(
    labels: Sequence[int | str | None], count: int, class_names: Sequence[str]
) -> tuple[list[int] | None, Sequence[str]]:
    """Class numbers and names, if every row has a label: a number (-1 stands for a hidden one), or a word."""
    words = [label for label in labels if isinstance(label, str)]
    if len(words) == count:
        class_names = sorted(set(words))
        number = {name: row for row, name in enumerate(class_names)}
        return [number[word] for word in words], class_names
    known = [label for label in labels if isinstance(label, int) and label >= 0]
    described = class_names if max(known, default=0) < len(class_names) else []
    return (known if len(known) == count else None), described
