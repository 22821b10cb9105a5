"""JSON lines: log.txt of MAE, BootMAE, ConMIM and their relatives, mmengine's scalars.json, mmcls' .log.json."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.logs.records import Finding, Log, choose_score, grouped

__all__ = ["is_json_lines", "read_json_lines"]

#: From this size on pyarrow reads a clean file, ten times as fast; it cannot say which line of another is broken.
_LARGE = 1 << 20

#: Lines that Python's parser takes in one call; one call per line would take three times as long.
_CHUNK = 512

#: A line that no JSON object fills from end to end.
_NO_OBJECT = re.compile(rb"^(?!\{[^\n]*\}\r?$)[^\n]*$", re.MULTILINE)


class _Numbers(NamedTuple):
    """Values of one key, NaN where there is none, and whether the line has it (``null`` counts as not)."""

    values: NDArray[np.float64]
    present: NDArray[np.bool_]


class _Lines(Protocol):
    """Objects of a file by key; ``lines`` are their numbers, ``foreign`` those of lines that are no objects."""

    keys: list[str]
    lines: NDArray[np.int64]
    foreign: list[int]
    last: int

    def numbers(self, key: str) -> _Numbers: ...
    def texts(self, key: str) -> list[Any]: ...


def is_json_lines(head: bytes) -> bool:
    """Whether a line near the top is a JSON object by itself (a scheduler's message may come first)."""
    return any(isinstance(_parse(line), dict) for line in head.split(b"\n")[:50] if line.lstrip()[:1] == b"{")


def _parse(line: bytes) -> Any:
    """The line's value, or None where it is not JSON. Python's parser takes the bare NaN that trainers write."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    """A JSON number (or a number in quotes); NaN for anything else, true and false included."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


class _ParsedLines:
    """Any file, line by line."""

    def __init__(self, data: bytes) -> None:
        lines = data.split(b"\n")
        self.last = len(lines)
        records: list[dict[str, Any]] = []
        numbers: list[int] = []
        self.foreign = []
        for number, record in self._records(lines):
            if record is None:
                self.foreign.append(number)
            else:
                records.append(record)
                numbers.append(number)
        self._records_found = records
        self.lines = np.array(numbers, dtype=np.int64)
        self.keys = list(dict.fromkeys(key for record in records for key in record))

    @staticmethod
    def _records(lines: list[bytes]) -> Iterator[tuple[int, dict[str, Any] | None]]:
        for first in range(0, len(lines), _CHUNK):
            chunk = lines[first : first + _CHUNK]
            whole = _parse(b"[" + b",".join(chunk) + b"]")
            if isinstance(whole, list) and len(whole) == len(chunk) and all(type(item) is dict for item in whole):
                yield from enumerate(whole, first + 1)
                continue
            for number, line in enumerate(chunk, first + 1):
                record = _parse(line)
                # An empty end of the file is no line; an empty line inside is one that somebody else wrote.
                if line.strip() or number < len(lines):
                    yield number, record if isinstance(record, dict) else None

    def numbers(self, key: str) -> _Numbers:
        found = [record.get(key) for record in self._records_found]
        return _Numbers(
            np.array([_number(value) for value in found], dtype=np.float64),
            np.array([value is not None for value in found], dtype=np.bool_),
        )

    def texts(self, key: str) -> list[Any]:
        return [record.get(key) for record in self._records_found]


class _ArrowLines:
    """A large file at once, without the lines that are no objects at first sight; ``ValueError`` if others are not."""

    def __init__(self, data: bytes) -> None:
        from pyarrow import json as arrow_json

        self.foreign, pieces, at, number = [], [], 0, 1
        for odd in _NO_OBJECT.finditer(data):
            if odd.start() == len(data):
                break
            number += data.count(b"\n", at, odd.start())
            self.foreign.append(number)
            pieces.append(data[at : odd.start()])
            at, number = odd.end() + 1, number + 1
        self.last = number + data.count(b"\n", at)
        clean = b"".join([*pieces, data[at:]]) if self.foreign else data
        self._table = arrow_json.read_json(io.BytesIO(clean))
        self.keys = self._table.column_names
        end = self.last - data.endswith(b"\n")
        self.lines = np.delete(np.arange(1, end + 1, dtype=np.int64), np.array(self.foreign, dtype=np.int64) - 1)
        if len(self.lines) != self._table.num_rows:
            raise ValueError(f"{self._table.num_rows} objects on {len(self.lines)} lines")

    def numbers(self, key: str) -> _Numbers:
        if key not in self.keys:
            return _Numbers(np.full(self.lines.shape, math.nan), np.zeros(self.lines.shape, dtype=np.bool_))
        column = self._table[key].combine_chunks()
        if not str(column.type).startswith(("double", "int", "null")):
            raise ValueError(f"{key} holds {column.type}")
        values = column.cast("double").to_numpy(zero_copy_only=False)
        return _Numbers(values, column.is_valid().to_numpy(zero_copy_only=False))

    def texts(self, key: str) -> list[Any]:
        return list(self._table[key].to_pylist())


def read_json_lines(
    name: str,
    data: bytes,
    score_key: str | None,
    epoch_key: str | None,
    method_key: str | None,
    seed_key: str | None,
    keep: tuple[str, ...],
) -> Log:
    """Scores of every line that has one; lines without are gaps, lines that are not objects are named.

    Raises:
        DataError: If no line has a score, or scores have no epoch.
    """
    roles = (score_key, epoch_key, method_key or "method", seed_key or "seed")
    if len(data) >= _LARGE:
        try:
            return _scores(name, _ArrowLines(data), *roles, keep)
        except (ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError, and so is our DataError
            if isinstance(error, DataError):
                raise
    return _scores(name, _ParsedLines(data), *roles, keep)


def _scores(
    name: str,
    found: _Lines,
    score_key: str | None,
    epoch_key: str | None,
    method_key: str,
    seed_key: str,
    keep: tuple[str, ...],
) -> Log:
    """The log in parsed lines."""
    score = choose_score([key for key in found.keys if not key.startswith("train_")], score_key, name)
    open_mmlab = score in ("accuracy/top1", "accuracy_top-1")
    mae_family = score == "test_acc1" and "train_loss" in found.keys
    # A validation line of mmengine counts finished epochs in "step" and has no "epoch".
    epoch = epoch_key or ("step" if score == "accuracy/top1" else "epoch")
    scores, epochs = found.numbers(score), found.numbers(epoch)
    has_both = scores.present & epochs.present
    if not scores.present.any():
        raise DataError(f"{name}: no line has a value for {score!r}")
    without = found.lines[scores.present & ~epochs.present].tolist()
    if not has_both.any():
        raise DataError(f"{name}:{without[0]}: a score without {epoch!r}; name its key with --epoch-column")

    values = scores.values.copy()
    for loss in ("train_loss", "test_loss"):
        if loss in found.keys:
            # Chance accuracy beside a NaN loss is a dead epoch, not a low point of the curve.
            losses = found.numbers(loss)
            values[losses.present & np.isnan(losses.values)] = math.nan
    rows = pd.DataFrame({"epoch": epochs.values, "score": values, "line": found.lines})
    for key, role in {method_key: "method", seed_key: "seed", **{key: key for key in keep}}.items():
        if key in found.keys:
            rows[role] = found.texts(key)
    if "n_parameters" in found.keys:
        # It changes when another model writes into the same file; DeepSpeed leaves it out on some lines.
        rows["run"] = pd.Series(found.numbers("n_parameters").values).ffill().bfill()
    rows = rows[has_both]
    # A description line may have the key of a column (mmcls writes "seed" there) that no score has.
    rows = rows.drop(columns=[column for column in rows if column != "score" and rows[column].isna().all()])
    return Log(
        name,
        "OpenMMLab JSON lines" if open_mmlab else ("MAE JSON lines" if mae_family else "JSON lines"),
        rows.reset_index(drop=True),
        epochs_completed=True if open_mmlab else (False if mae_family else None),
        percent=True if open_mmlab or mae_family else None,
        findings=(
            *_foreign(name, found),
            *grouped(name, without, f"skipped: a score without {epoch!r}"),
        ),
    )


def _foreign(name: str, found: _Lines) -> list[Finding]:
    """Lines that are no objects: the last one of a killed run is cut, further up somebody else wrote."""
    cut = bool(found.foreign) and found.foreign[-1] == found.last
    findings = grouped(name, found.foreign[:-1] if cut else found.foreign, "skipped: not a JSON object")
    return [*findings, Finding(name, found.last, "skipped: the last line is cut")] if cut else findings
