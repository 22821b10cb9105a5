"""JSON lines: log.txt of MAE, BootMAE, ConMIM and their relatives, mmengine's scalars.json, mmcls' .log.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Finding, Log, choose_score, grouped

__all__ = ["is_json_lines", "read_json_lines"]

#: Lines that the JSON parser takes in one call; one call per line would take three times as long.
_CHUNK = 512

_LOSSES = ("train_loss", "test_loss")

#: A number as JSON writes it or as Python does, and a string without escapes.
_NUMBER = rb"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|NaN|-?Infinity|null"
_STRING = rb'"[^"\\\x00-\x1f]*"|null'


class _Numbers(NamedTuple):
    """Values of one key, NaN where there is none, and whether the line has it (``null`` counts as not)."""

    values: NDArray[np.float64]
    present: NDArray[np.bool_]


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


def _objects(lines: list[bytes]) -> Iterator[dict[str, Any] | None]:
    """The object on each line, None where there is something else."""
    for first in range(0, len(lines), _CHUNK):
        chunk = lines[first : first + _CHUNK]
        whole = _parse(b"[" + b",".join(chunk) + b"]")
        if not (isinstance(whole, list) and len(whole) == len(chunk) and all(type(item) is dict for item in whole)):
            whole = [_parse(line) for line in chunk]
        yield from (item if isinstance(item, dict) else None for item in whole)


def _template(data: bytes, skip: Callable[[str], bool]) -> tuple[list[str], list[str], re.Pattern[bytes] | None]:
    """Keys of the first object, those to read, and a pattern for lines with just these keys, as most of a log has.

    The pattern has a group per key to read and, for any other line, one last group with the line; matching it is
    several times faster than parsing JSON, and what it matches is JSON.
    """
    for line in data[:65536].split(b"\n")[:50]:
        record = _parse(line)
        if not isinstance(record, dict) or all(map(skip, record)):
            continue
        groups = [b"(?:" if skip(key) else b"(" for key in record]
        names = [re.escape(json.dumps(key).encode()) for key in record]
        kinds = [_STRING if isinstance(value, str) else _NUMBER for value in record.values()]
        fields = [name + b": ?" + group + kind + b")" for name, group, kind in zip(names, groups, kinds, strict=True)]
        pattern = re.compile(rb"^(?:\{" + rb", ?".join(fields) + rb"\}\r?|(.*))$", re.MULTILINE)
        return list(record), [key for key in record if not skip(key)], pattern
    return [], [], None


class _Lines:
    """The objects of a file by key; ``lines`` are their numbers, ``foreign`` those of lines that are no objects.

    Keys that ``skip`` names are listed but not read.
    """

    def __init__(self, data: bytes, skip: Callable[[str], bool]) -> None:
        template, self._read, pattern = _template(data, skip)
        self.last = data.count(b"\n") + 1
        if pattern is None:
            self._rows, others = [], list(enumerate(data.split(b"\n"), 1))
        else:
            found = pattern.findall(data)
            others = [(number, row[-1]) for number, row in enumerate(found, 1) if not row[0]]
            self._rows = [row for row in found if row[0]] if others else found
        if others and others[-1][0] == self.last and not others[-1][1].strip():
            others.pop()  # what follows the last line's end is no line; an empty one inside somebody else wrote
        records = list(zip([number for number, _ in others], _objects([line for _, line in others]), strict=True))
        self._records = [record for _, record in records if record is not None]
        self.foreign = [number for number, record in records if record is None]
        apart = np.array([number for number, record in records if record is not None], dtype=np.int64)
        everything = np.arange(1, len(self._rows) + len(others) + 1, dtype=np.int64)
        regular = np.delete(everything, np.array([number for number, _ in others], dtype=np.int64) - 1)
        self._order = np.argsort(np.concatenate([regular, apart]), kind="stable")
        self.lines = np.concatenate([regular, apart])[self._order]
        self.keys = list(dict.fromkeys([*template, *(key for record in self._records for key in record)]))

    def _cells(self, key: str) -> list[bytes]:
        at = self._read.index(key)
        return [row[at] for row in self._rows]

    def numbers(self, key: str) -> _Numbers:
        """One key as numbers."""
        found = [record.get(key) for record in self._records]
        if key not in self._read:
            found = [None] * len(self._rows) + found
        elif self._rows:
            cells = self._cells(key)
            try:
                values = np.array([*map(float, cells), *map(_number, found)], dtype=np.float64)
                present = np.ones(len(values), dtype=np.bool_)
                present[len(cells) :] = [value is not None for value in found]
                return _Numbers(values[self._order], present[self._order])
            except ValueError:  # null and text among the numbers
                found = [*map(_parse, cells), *found]
        values = np.array([*map(_number, found)], dtype=np.float64)
        present = np.array([value is not None for value in found], dtype=np.bool_)
        return _Numbers(values[self._order], present[self._order])

    def texts(self, key: str) -> list[Any]:
        """One key as it stands."""
        regular = map(_parse, self._cells(key)) if key in self._read else [None] * len(self._rows)
        found = [*regular, *(record.get(key) for record in self._records)]
        return [found[at] for at in self._order]


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
    # Losses count only where one is NaN, and most files are without; a training metric only if it is asked for.
    losses = _LOSSES if b"NaN" in data else ()
    asked = {score_key, epoch_key, method_key, seed_key, *keep, *losses}
    found = _Lines(data, lambda key: key not in asked and (key.startswith("train_") or key in _LOSSES))
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
    for loss in losses:
        # Chance accuracy beside a NaN loss is a dead epoch, not a low point of the curve.
        measured = found.numbers(loss)
        values[measured.present & np.isnan(measured.values)] = math.nan
    rows = pd.DataFrame({"epoch": epochs.values, "score": values, "line": found.lines})
    for key, role in {
        method_key or "method": "method",
        seed_key or "seed": "seed",
        **{key: key for key in keep},
    }.items():
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
