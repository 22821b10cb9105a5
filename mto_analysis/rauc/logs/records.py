"""What a log reader returns: rows as written, each with its line, and what was noticed on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.provenance import AxisKind

__all__ = ["SCORE_NAMES", "Finding", "Log", "choose_score", "grouped", "plain_name"]

#: Names of a top-1 accuracy (or another score per epoch), the most telling first, in the spelling of `plain_name`.
SCORE_NAMES = (
    "score",
    "test_acc1",
    "eval_top1",
    "val_top1",
    "val_acc1",
    "test_top1",
    "eval_accuracy",
    "val_accuracy",
    "test_accuracy",
    "eval_acc",
    "val_acc",
    "test_acc",
    "accuracy_top1",
    "accuracy_top_1",
    "linear_top1",
    "top1",
    "acc1",
    "top1_acc",
    "accuracy",
    "acc",
    "miou",
)


@dataclass(frozen=True)
class Finding:
    """Something in a file that a reader of the result should know; prints as ``file:line: text``."""

    file: str
    line: int | None
    text: str

    def __str__(self) -> str:
        """Where and what, in one line."""
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.text}"


@dataclass(frozen=True)
class Log:
    """One file's scores as written.

    Attributes:
        file: Its name for messages.
        form: Which trainer's form it has.
        rows: ``epoch score line`` in file order (blank scores left out), and ``method``, ``seed``, ``run`` and
            grouping columns where the file has them. ``run`` tells apart runs that one file holds.
        epochs_completed: True if epoch 1 is the state after one epoch, False if that is called 0, None if unknown.
        percent: True if this writer always writes 0 to 100; None if the values must tell.
        findings: What was skipped or looked odd.
        column: The score's column, key or tag.
        axis: What the rows are placed on, and
        axis_column: its column.
        sha256: Hash of the file.
    """

    file: str
    form: str
    rows: pd.DataFrame
    epochs_completed: bool | None = None
    percent: bool | None = None
    findings: tuple[Finding, ...] = ()
    column: str = "score"
    axis: AxisKind = "epochs"
    axis_column: str = "epoch"
    sha256: str = ""


def plain_name(name: str) -> str:
    """A metric's name without the writer's spelling: ``perf/test_acc1`` and ``val-acc1_epoch`` lose what varies.

    Example:
        >>> plain_name("perf/test_acc1"), plain_name("Val/Acc")
        ('test_acc1', 'val_acc')
    """
    return re.sub(r"[/\-. ]", "_", name.strip().lower()).removeprefix("perf_").removesuffix("_epoch")


def choose_score(names: Sequence[str], wanted: str | None, file: str) -> str:
    """The name under which a file keeps its score.

    Raises:
        DataError: If ``wanted`` is not there, or nothing looks like an accuracy.
    """
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{file}: there is no column {wanted!r}; it has {_listed(names)}")
        return wanted
    plain = {plain_name(name): name for name in reversed(names)}
    for candidate in SCORE_NAMES:
        if candidate in plain:
            return plain[candidate]
    raise DataError(
        f"{file}: no accuracy found (a pre-training log?); name its column with --score-column, it has {_listed(names)}"
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def grouped(file: str, lines: Iterable[int], text: str, *, most: int = 3) -> list[Finding]:
    """One finding per line for the first few, then one for the rest, so that a bad file doesn't flood the screen."""
    where = sorted(lines)
    found = [Finding(file, line, text) for line in where[:most]]
    if len(where) > most:
        found.append(Finding(file, where[most], f"{text} (and {len(where) - most - 1} more such lines)"))
    return found
