"""Scores per epoch from what trainers write; the form is told by the content, since five of them are called log.txt."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs import csvlog, events, jsonlines, textlog, trainer_state
from mto_analysis.rauc.logs.records import Finding, Log

__all__ = ["Finding", "Log", "read_log"]

_HEAD = 65536


def read_log(path: str | Path, **options: Any) -> Log:
    """Read any log whose form is known; see :func:`_read_log` for the options."""
    log = _read_log(path, **options)
    files = sorted(Path(path).glob("*tfevents*")) if Path(path).is_dir() else [Path(path)]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return replace(log, sha256=digest.hexdigest())


def _read_log(
    path: str | Path,
    *,
    score_column: str | None = None,
    epoch_column: str | None = None,
    method_column: str | None = None,
    seed_column: str | None = None,
    keep: tuple[str, ...] = (),
) -> Log:
    """Read any log whose form is known: JSON lines, SimMIM text, CSV, a trainer state, TensorBoard events.

    Args:
        path: The file; for TensorBoard also the folder of event files.
        score_column: Name of the score, if it is not one of the usual ones.
        epoch_column: Name of the epoch.
        method_column: Name of a table's method column.
        seed_column: Name of a table's seed column.
        keep: Further columns of a table to keep, for grouping or as another axis.

    Raises:
        DataError: If it cannot be read, has no known form, or has no scores.
    """
    path = Path(path)
    name = str(path)
    if path.is_dir():
        return events.read_events(path, score_column)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such log") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error
    if not data or data.isspace():
        raise DataError(f"{name}: the file is empty")
    head = data[:_HEAD]
    if events.is_events(head):
        return events.read_events(path, score_column)
    if b"\0" in head:
        raise DataError(f"{name}: this is neither text nor a TensorBoard event file")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if trainer_state.is_trainer_state(head):
        return trainer_state.read_trainer_state(name, data, score_column)
    if jsonlines.is_json_lines(head):
        return jsonlines.read_json_lines(name, data, score_column, epoch_column, method_column, seed_column, keep)
    if re.search(rb"EPOCH \d+ training takes|\* Acc@1 ", data):
        return textlog.read_text_log(name, data)
    return csvlog.read_csv_log(name, data, score_column, epoch_column, method_column, seed_column, keep)
