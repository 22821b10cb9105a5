"""What readers return: a file's columns with the line of each row; and what is made of them: one series of scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.formats import Format
from mto_analysis.rauc.logs.names import Metric
from mto_analysis.rauc.logs.provenance import AxisKind

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Findings of one kind that are said one by one.
_MOST_ALIKE = 3
_WRITTEN_NAN = ("nan", "-nan", "+nan")
#: What programs and spreadsheets write where there is no value.
_NO_VALUE = ("", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "--")


@dataclass(frozen=True)
class Finding:
    """Something in a file that a reader of the result should know; prints as ``file:line: text``."""

    file: str
    line: int | None
    text: str

    def __str__(self) -> str:
        """Where and what, in one line."""
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.text}"


def grouped(file: str, lines: Iterable[int], text: str) -> list[Finding]:
    """One finding per line for the first few, then one for the rest, so that a bad file doesn't flood the screen."""
    where = sorted(lines)
    found = [Finding(file, int(line), text) for line in where[:_MOST_ALIKE]]
    if more := where[_MOST_ALIKE:]:
        found.append(Finding(file, int(more[0]), f"{text} (and {len(more) - 1} more such lines)"))
    return found


def number_of(value: Any) -> float:
    """A number, or a number in quotes; NaN for anything else, true and false included."""
    if isinstance(value, bool) or value is None or (isinstance(value, str) and "_" in value):
        return math.nan  # Python takes 1_0 for 10, of which no log is known
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def nan_is_blank(nan: Flags, filled: Flags) -> bool:
    """Whether NaN is how a program wrote empty cells: every row has one, and not all in the same columns.

    Shape (rows, columns): where a cell is a written NaN, and where it has a value. A column of NaN alone shows nothing.
    """
    nan = nan[:, nan.any(axis=0) & filled.any(axis=0)]
    return bool(nan.size) and bool(nan.any(axis=1).all() and (nan != nan[0]).any())


class Columns(ABC):
    """A file as columns by name, each converted once; ``lines`` are the rows' places in it."""

    def __init__(self, names: list[str], lines: NDArray[np.int64]) -> None:
        self.names, self.lines = names, lines
        self._numbers: dict[str, tuple[Floats, Flags]] = {}
        self._labels: dict[str, pd.Categorical] = {}

    def numbers(self, name: str) -> tuple[Floats, Flags]:
        """Values, NaN where there is no number; and where there is a value at all (a written NaN is one)."""
        if name not in self._numbers:
            self._numbers[name] = self._read_numbers(name)
        return self._numbers[name]

    def labels(self, name: str) -> pd.Categorical:
        """Values as text, empty where there is none."""
        if name not in self._labels:
            self._labels[name] = _stripped(self._read_labels(name))
        return self._labels[name]

    @abstractmethod
    def _read_numbers(self, name: str) -> tuple[Floats, Flags]: ...

    @abstractmethod
    def _read_labels(self, name: str) -> pd.Series: ...


class RecordColumns(Columns):
    """Columns of objects, as JSON has them: keys may differ from row to row, and ``null`` counts as no value."""

    def __init__(self, records: Sequence[Mapping[str, Any]], lines: NDArray[np.int64]) -> None:
        forms = dict.fromkeys(map(tuple, records))  # most rows have the same keys
        super().__init__(list(dict.fromkeys(key for form in forms for key in form)), lines)
        self.records = records

    def _read_numbers(self, name: str) -> tuple[Floats, Flags]:
        found = [record.get(name) for record in self.records]
        kinds = set(map(type, found))
        if kinds == {float}:
            return np.array(found, dtype=np.float64), np.ones(len(found), dtype=np.bool_)
        present = np.array([value is not None for value in found], dtype=np.bool_)
        if kinds <= {int, float, type(None)}:
            try:
                return np.array(found, dtype=np.float64), present
            except OverflowError:
                pass
        return np.array([number_of(value) for value in found], dtype=np.float64), present

    def _read_labels(self, name: str) -> pd.Series:
        return pd.Series([record.get(name) for record in self.records], dtype=object).map(_hashable)


class FrameColumns(Columns):
    """Columns of a table; in a column of numbers every other text is an error, with its line.

    A repeated header has no value, and labels that are whole numbers are written without a decimal point.
    """

    def __init__(self, file: str, frame: pd.DataFrame, lines: NDArray[np.int64]) -> None:
        super().__init__([str(name) for name in frame], lines)
        self.file, self.frame = file, frame

    @classmethod
    def with_lines(cls, file: str, frame: pd.DataFrame) -> FrameColumns:
        """From a frame with the line of each row in its column ``line``."""
        return cls(file, frame.drop(columns="line"), frame["line"].to_numpy())

    def _read_numbers(self, name: str) -> tuple[Floats, Flags]:
        column = self.frame[name]
        if column.dtype.kind in "if":
            values = column.to_numpy(dtype=np.float64)
            return values, ~np.isnan(values)
        text = column.astype(object).where(column.notna(), "").astype(str).str.strip()
        values = np.array(pd.to_numeric(text.where(text != "", None), errors="coerce"), dtype=np.float64)
        lost = np.flatnonzero(np.isnan(values))
        present = np.ones(len(values), dtype=np.bool_)
        for at in lost:
            cell = text.iloc[at]
            if cell == name or cell.lower() in _NO_VALUE:
                present[at] = False
            elif cell.lower() not in _WRITTEN_NAN:
                values[at] = number_of(cell)
                if math.isnan(values[at]):
                    shown = cell if len(cell) <= 60 else f"{cell[:57]}..."
                    raise DataError(f"{self.file}:{self.lines[at]}: {shown!r} in column {name!r} is not a number")
        return values, present

    def _read_labels(self, name: str) -> pd.Series:
        column = self.frame[name]
        if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
            return column.astype("Int64")
        return column


def _stripped(column: pd.Series) -> pd.Categorical:
    """Stripped texts; a million rows have few of them, so each is made once."""
    codes, values = pd.factorize(column, use_na_sentinel=True)
    texts = ["", *(str(value).strip() for value in values)]
    numbers, distinct = pd.factorize(np.array(texts, dtype=object))
    return pd.Categorical.from_codes(numbers[codes + 1], categories=pd.Index(distinct))


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, (list, dict)) else value


@dataclass(frozen=True)
class Document:
    """One file, decoded: columns, and what its format says about them.

    Attributes:
        file: Its name for messages.
        format: Which format it has.
        columns: Its content.
        axes: Columns that rows may be placed on, the preferred one first.
        method: Column of the method, if there is one.
        seed: Column of the seed, if there is one.
        mode: Column that says of which split or weights a row is.
        aliases: Further names of one run's values of a column: name to column and method.
        scores: If given, the only columns that may be scores.
        losses: Columns where NaN tells of a dead epoch, whatever the accuracy beside it.
        progress: A number per row that grows whenever there was training since the row before.
        unmarked: The split of a metric whose name has none, if the name of the run tells.
        findings: What was skipped or looked odd.
        sha256: Hash of the file.
    """

    file: str
    format: Format
    columns: Columns
    axes: tuple[tuple[str, AxisKind], ...] = ()
    method: str | None = None
    seed: str | None = None
    mode: str | None = None
    aliases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    scores: tuple[str, ...] | None = None
    losses: tuple[str, ...] = ()
    progress: NDArray[np.int64] | None = None
    unmarked: str | None = None
    findings: tuple[Finding, ...] = ()
    sha256: str = ""


class LogFormat(NamedTuple):
    """A format of text logs that another distribution adds, by an entry point of ``mto_analysis.log_formats``.

    Attributes:
        matches: Whether a file is of it, from its content: UTF-8, lines that end with a line feed.
        read: A document from a file's name and its content.
    """

    matches: Callable[[bytes], bool]
    read: Callable[[str, bytes], Document]


@dataclass(frozen=True)
class Series:
    """A candidate for the score: a column, or its rows of one mode or one run.

    Attributes:
        name: What it is called in messages, and what options may call it.
        column: Its column.
        metric: What the name says about it.
        mode: Value of the document's mode column, if the rows of one value are meant.
        method: The run that is meant, if the file names it in the column.
    """

    name: str
    column: str
    metric: Metric
    mode: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Log:
    """One series of a document.

    Attributes:
        document: Where it is from.
        series: Which it is.
        rows: ``epoch score line row`` in file order, and ``method``, ``seed``, ``run`` and grouping columns where
            the file has them. ``run`` tells apart runs that one file holds, ``row`` is the document's row.
        axis: What ``epoch`` counts, and
        axis_column: its column.
        findings: What was skipped or looked odd.
    """

    document: Document
    series: Series
    rows: pd.DataFrame
    axis: AxisKind
    axis_column: str
    findings: tuple[Finding, ...] = ()

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.document.file

    @property
    def form(self) -> str:
        """Name of the format."""
        return self.document.format.name
