"""TensorBoard event files, read without TensorBoard: records of a length, a checksum and a small protobuf message.

Only scalars are wanted, so three message types and four fields of the public protobuf definitions are enough; a
reader that needs nothing installed is also the one that starts fast.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Finding, Log, choose_score, plain_name

__all__ = ["is_events", "read_events"]

_FRAME = struct.Struct("<QI")  # length of the record, checksum of the length; another checksum follows the record
_LONGEST = 1 << 30


def is_events(head: bytes) -> bool:
    """Whether the first record is the version that every writer puts there."""
    return b"brain.Event:" in head[:64]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes | int]]:
    """Field number, wire type and content of every field in a protobuf message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, kind, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise IndexError("field beyond its message")
        yield key >> 3, kind, message[at : at + size]
        at += size


def _tensor(message: bytes) -> float | None:
    """A scalar tensor's value: packed float_val, double_val, or raw content of either type."""
    dtype = 1
    for field, kind, value in _fields(message):
        if field == 1 and isinstance(value, int):
            dtype = value
        elif isinstance(value, bytes) and (field in (5, 6) or (field == 4 and dtype in (1, 2))) and kind in (1, 2, 5):
            if len(value) == 4:
                return float(struct.unpack("<f", value)[0])
            if len(value) == 8:
                return float(struct.unpack("<d", value)[0])
    return None


def _scalars(message: bytes) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of every scalar in one event."""
    step = 0
    summaries = []
    for field, _, value in _fields(message):
        if field == 2 and isinstance(value, int):
            step = value
        elif field == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for field, _, entry in _fields(summary):
            if field != 1 or not isinstance(entry, bytes):
                continue
            tag, scalar = "", None
            for part, kind, value in _fields(entry):
                if part == 1 and isinstance(value, bytes):
                    tag = value.decode(errors="replace")
                elif part == 2 and kind == 5 and isinstance(value, bytes):
                    scalar = float(struct.unpack("<f", value)[0])
                elif part == 8 and isinstance(value, bytes):
                    scalar = _tensor(value)
            if scalar is not None:
                yield step, tag, scalar


def _records(data: bytes) -> Iterator[bytes | None]:
    """Whole records in order; None at the end if the last one is cut."""
    at = 0
    while at + _FRAME.size <= len(data):
        length, _ = _FRAME.unpack_from(data, at)
        begin = at + _FRAME.size
        at = begin + length + 4
        if length > _LONGEST or at > len(data):
            yield None
            return
        yield data[begin : begin + length]
    if at != len(data):
        yield None


def read_events(path: Path, tag: str | None) -> Log:
    """Scalars of the accuracy tag over ``step``, from one event file or all of a folder in order of their names.

    Values are 32-bit, so 82.314 comes back as 82.31400299; they are rounded to the seven digits that they hold.

    Raises:
        DataError: If there is no event file, no accuracy tag, or a record is damaged.
    """
    files = sorted(path.glob("*tfevents*")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: the folder holds no TensorBoard event file; name the log itself")
    found: list[tuple[int, str, float, int]] = []
    findings = []
    place = 0
    for file in files:
        try:
            for record in _records(file.read_bytes()):
                place += 1
                if record is None:
                    findings.append(Finding(str(file), place, "the last record is cut"))
                    break
                found.extend((*scalar, place) for scalar in _scalars(record))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        except (ValueError, IndexError, struct.error) as error:
            raise DataError(f"{file}:{place}: record {place} is damaged ({error})") from error
    name = str(path)
    chosen = choose_score(list(dict.fromkeys(tag for _, tag, _, _ in found)), tag, name)
    rows = [(float(step), float(f"{value:.7g}"), place) for step, tag, value, place in found if tag == chosen]
    known = chosen.startswith("perf/") and plain_name(chosen) == "test_acc1"
    return Log(
        name,
        "TensorBoard events",
        pd.DataFrame(rows, columns=["epoch", "score", "line"]),
        epochs_completed=False if known else None,
        percent=True if known else None,
        findings=tuple(findings),
        column=chosen,
        axis="epochs" if known else "steps",
        axis_column="step",
    )
