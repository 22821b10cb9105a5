"""JSON lines: log.txt of MAE, BootMAE, ConMIM and their relatives, mmengine's scalars.json, mmcls' .log.json."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Finding, Log, choose_score, grouped

__all__ = ["is_json_lines", "read_json_lines"]

_LOSSES = ("train_loss", "test_loss")


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


class _Lines:
    """The objects of a file by key; ``lines`` are their numbers, ``foreign`` those of lines that are no objects."""

    def __init__(self, data: bytes) -> None:
        texts = data.split(b"\n")
        if not texts[-1].strip():
            texts.pop()  # what follows the last line's end is no line; an empty one inside somebody else wrote
        self.last = data.count(b"\n") + 1
        found = [_parse(text) for text in texts]
        self._records = [record for record in found if isinstance(record, dict)]
        self.foreign = [number for number, record in enumerate(found, 1) if not isinstance(record, dict)]
        self.lines = np.delete(np.arange(1, len(found) + 1), np.array(self.foreign, dtype=np.int64) - 1)
        forms = dict.fromkeys(map(tuple, self._records))  # most lines have the same keys
        self.keys = list(dict.fromkeys(key for form in forms for key in form))

    def numbers(self, key: str) -> _Numbers:
        """One key as numbers."""
        found = self.texts(key)
        present = np.array([value is not None for value in found], dtype=np.bool_)
        if not {type(value) for value in found} <= {int, float, type(None)}:
            found = [_number(value) for value in found]
        try:
            return _Numbers(np.array(found, dtype=np.float64), present)
        except OverflowError:  # a whole number beyond float64
            return _Numbers(np.array([_number(value) for value in found], dtype=np.float64), present)

    def texts(self, key: str) -> list[Any]:
        """One key as it stands, None on lines without it."""
        return [record.get(key) for record in self._records]


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
    # Losses count only where one is NaN, and most files are without.
    losses = _LOSSES if b"NaN" in data else ()
    found = _Lines(data)
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
        column=score,
        axis_column=epoch,
    )


def _foreign(name: str, found: _Lines) -> list[Finding]:
    """Lines that are no objects: the last one of a killed run is cut, further up somebody else wrote."""
    cut = bool(found.foreign) and found.foreign[-1] == found.last
    findings = grouped(name, found.foreign[:-1] if cut else found.foreign, "skipped: not a JSON object")
    return [*findings, Finding(name, found.last, "skipped: the last line is cut")] if cut else findings
