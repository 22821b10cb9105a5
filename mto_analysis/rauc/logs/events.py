"""TensorBoard event files, through tensorboard's own loader."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.formats import BY_NAME
from mto_analysis.rauc.logs.names import split_of_run
from mto_analysis.rauc.logs.provenance import AxisKind
from mto_analysis.rauc.logs.records import Document, Finding, RecordColumns

_FRAME = struct.Struct("<QI")  # length of the record, checksum of the length; another checksum follows the record


def is_events(head: bytes) -> bool:
    """Whether the first record is the version that every writer puts there."""
    return b"brain.Event:" in head[:64]


def _whole_records(data: bytes) -> tuple[int, bool]:
    """How many whole records there are, and whether a part of another one follows."""
    at = count = 0
    while at + _FRAME.size <= len(data):
        length, _ = _FRAME.unpack_from(data, at)
        at += _FRAME.size + length + 4
        if at > len(data):
            return count, True
        count += 1
    return count, at != len(data)


def read_events(name: str, files: Sequence[Path]) -> Document:
    """Scalars of all tags over ``step``, from the event files of one run in order of their names.

    Values are 32-bit, so 82.314 comes back as 82.31400299; they are rounded to the seven digits that they hold.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise DataError(
            f"{name}: TensorBoard event files need the package tensorboard (pip install 'mto-analysis[tensorboard]')"
        ) from None
    records: list[dict[str, float]] = []
    lines: list[int] = []
    findings = []
    place = 0
    for file in files:
        whole, cut = _whole_records(file.read_bytes())
        begun = place
        try:
            for event in EventFileLoader(str(file)).Load():
                place += 1
                for value in event.summary.value:
                    scalar = _scalar(value, make_ndarray)
                    if scalar is not None:
                        records.append({"step": event.step, value.tag: scalar})
                        lines.append(place)
        except Exception as error:  # protobuf's errors have no common class that is importable without it
            raise DataError(f"{file}:{place + 1}: record {place + 1} is damaged ({error})") from error
        # The loader takes a damaged record for the end of the file and says nothing.
        if place - begun < whole:
            raise DataError(f"{file}:{place + 1}: record {place - begun + 1} is damaged (its checksum is wrong)")
        if cut:
            findings.append(Finding(str(file), place + 1, "the last record is cut"))
    axes: tuple[tuple[str, AxisKind], ...] = (("step", "steps"),)
    if any("perf/test_acc1" in record for record in records):
        # MAE and its relatives write perf/* over epochs and all other tags over something else.
        records = [
            {"epoch": record["step"], **record} if any(tag.startswith("perf/") for tag in record) else record
            for record in records
        ]
        axes = (("epoch", "epochs"), *axes)
    columns = RecordColumns(records, np.array(lines, dtype=np.int64))
    split = split_of_run(files[0].absolute().parent.name)
    return Document(name, BY_NAME["TensorBoard events"], columns, axes, unmarked=split, findings=tuple(findings))


def _scalar(value: Any, array_of: Any) -> float | None:
    """The scalar of a summary, which the loader has turned into a tensor; None if it is something else."""
    if not value.HasField("tensor"):
        return None
    try:
        array = array_of(value.tensor)
    except (TypeError, ValueError):
        return None
    if array.size != 1 or array.dtype.kind not in "fiu":
        return None
    return float(f"{float(array.reshape(-1)[0]):.7g}")
