"""One series of a document as rows: each score with its epoch (or step), its run, and its line."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.choosing import rows_of, series_of
from mto_analysis.rauc.logs.names import axis_of, words_of
from mto_analysis.rauc.logs.provenance import AxisKind
from mto_analysis.rauc.logs.records import Document, Finding, FrameColumns, Log, Series, grouped


def extract(
    document: Document,
    series: Series,
    *,
    epoch_column: str | None = None,
    method_column: str | None = None,
    seed_column: str | None = None,
    groups: tuple[str, ...] = (),
    axis_column: str | None = None,
) -> Log:
    """Rows of a series.

    Args:
        document: The log.
        series: Which of it.
        epoch_column: What to place scores on, if it is not the usual column; likewise the other two.
        method_column: Column of the method.
        seed_column: Column of the seed.
        groups: Columns to keep as text, if they are there.
        axis_column: Column to keep as numbers, if it is there.
    """
    columns, file = document.columns, document.file
    asked = {each: _present(document, each) for each in (epoch_column, method_column, seed_column) if each is not None}
    values, there = rows_of(document, series)
    if not there.any():
        raise DataError(f"{file}: no row has a value for {series.column!r}")
    axis, kind = _axis(document, series, there, asked.get(epoch_column or ""))
    if axis == series.column:
        raise DataError(f"{file}: {axis!r} cannot be both the epoch and the score")
    places, placed = columns.numbers(axis)
    findings = [*document.findings]
    findings += _repeated_headers(document, series.column)
    findings += grouped(file, columns.lines[there & ~placed], f"skipped: a score without {axis!r}")
    finer = _finer_axis(document, there & placed, places) if kind == "epochs" and epoch_column is None else None
    if finer is not None:
        findings.append(Finding(file, None, f"several evaluations in an epoch, so {finer!r} is the axis"))
        axis, kind = finer, "steps"
        places, placed = columns.numbers(axis)
    rows = there & placed
    if not rows.any():
        line = columns.lines[there][0]
        raise DataError(f"{file}:{line}: a score without {axis!r}; name another column with --epoch-column")
    if document.format.ask and document.method is not None and series.method is None:
        labels = columns.labels(document.method)
        unread = set(labels.categories) - set(labels[rows])
        findings += [
            Finding(file, None, f"the run {name!r} has no {series.column!r}") for name in sorted(unread - {""})
        ]
    for loss in document.losses:
        # Chance accuracy beside a NaN loss is a dead epoch, not a low point of the curve.
        measured, present = columns.numbers(loss)
        values = np.where(present & np.isnan(measured), math.nan, values)
    taken = slice(None) if rows.all() else rows  # a million rows need not be copied
    frame = pd.DataFrame(
        {"epoch": places[taken], "score": values[taken], "line": columns.lines[taken], "row": np.flatnonzero(rows)},
        copy=False,
    )
    roles = {
        "method": asked.get(method_column or "", document.method),
        "seed": asked.get(seed_column or "", document.seed),
        **{group: group for group in groups},
    }
    for role, name in roles.items():
        if name is not None and name in columns.names:
            labels = columns.labels(name)[taken]
            # A description line may have the key of a column (mmcls writes "seed" there) that no score has.
            counts = np.bincount(labels.codes, minlength=len(labels.categories))
            if any(count and each for count, each in zip(counts, labels.categories, strict=True)):
                frame[role] = labels
    if axis_column is not None and axis_column in columns.names:
        frame[axis_column] = columns.numbers(axis_column)[0][taken]
    if "n_parameters" in columns.names:
        # It changes when another model writes into the same file; DeepSpeed leaves it out on some lines.
        frame["run"] = pd.Series(columns.numbers("n_parameters")[0]).ffill().bfill().to_numpy()[taken]
    return Log(document, series, frame, kind, axis, tuple(findings))


def _present(document: Document, column: str) -> str:
    """A column that an option names."""
    for spelling in (str, str.lower):
        for name in document.columns.names:
            if spelling(name) == spelling(column.strip()):
                return name
    raise DataError(f"{document.file}: there is no column {column!r}; it has {', '.join(document.columns.names)}")


def _axis(document: Document, series: Series, there: NDArray[np.bool_], asked: str | None) -> tuple[str, AxisKind]:
    """What the scores are placed on: the named column, or the first axis that most of them have."""
    if asked is not None:
        return asked, dict(document.axes).get(asked) or axis_of(asked) or _counted(asked)
    shares = []
    for column, kind in document.axes:
        if column != series.column:
            share = (document.columns.numbers(column)[1] & there).sum() / there.sum()
            if share > 0.5:
                return column, kind
            shares.append((share, column, kind))
    if shares:
        _, column, kind = max(shares, key=lambda each: each[0])
        return column, kind
    raise DataError(
        f"{document.file}: a score without 'epoch' (or 'step'); name its column with --epoch-column,"
        f" it has {', '.join(document.columns.names)}"
    )


def _counted(column: str) -> AxisKind:
    """What a column counts whose name is no usual one of an axis, from the words in it."""
    words = set(words_of(column))
    kinds: dict[AxisKind, set[str]] = {
        "epochs": {"epoch", "epochs"},
        "steps": {"step", "steps", "iter", "iters", "iteration", "iterations", "update", "updates"},
    }
    return next((kind for kind, told in kinds.items() if told & words), "other")


def _finer_axis(document: Document, rows: NDArray[np.bool_], epochs: NDArray[np.float64]) -> str | None:
    """The column of steps that tells apart several evaluations in an epoch, if there are such."""
    there = epochs[rows]
    same = there[1:] == there[:-1]
    if not same.any() or document.method is not None:
        return None
    for column, kind in document.axes:
        if kind == "steps":
            steps, present = document.columns.numbers(column)
            before, after = steps[rows][:-1], steps[rows][1:]
            if present[rows].all() and (after >= before).all() and (after > before)[same].any():
                return column
    return None


def _repeated_headers(document: Document, column: str) -> list[Finding]:
    """Lines of a table that are its header again."""
    columns = document.columns
    if not isinstance(columns, FrameColumns) or columns.frame[column].dtype.kind in "if":
        return []
    again = np.asarray(columns.labels(column) == column)
    return grouped(document.file, columns.lines[again], "skipped: the header again (a resumed run)")


def progress_of(document: Document) -> NDArray[np.int64] | None:
    """A number per row that grows with training, from steps or else from rows with values of training.

    Steps that fall are a resumed run, or the best model loaded again, which has no values of training.

    None if nothing in the log tells.
    """
    if document.progress is not None:
        return document.progress
    trained, steps = trained_rows(document), steps_of(document)
    if steps is None:
        return np.cumsum(trained) if trained.any() else None
    begins = np.flatnonzero(np.r_[True, steps[1:] != steps[:-1]])
    fell = np.diff(steps[begins], prepend=-np.inf) < 0
    loaded = fell & ~np.logical_or.reduceat(trained, begins) & trained.any()
    return np.repeat(np.cumsum(~loaded), np.diff(np.r_[begins, len(steps)]))


def trained_rows(document: Document) -> NDArray[np.bool_]:
    """Rows with values of training."""
    trained = np.zeros(len(document.columns.lines), dtype=np.bool_)
    found = [each for each in series_of(document) if each.metric.split == "train" and each.metric.kind != "other"]
    for each in found:
        try:
            trained |= rows_of(document, each)[1]
        except DataError:  # a broken cell of a column that is not read
            continue
    return trained


def steps_of(document: Document) -> NDArray[np.float64] | None:
    """The steps of all rows, filled up where a row has none; None if the log has no steps."""
    for column, kind in document.axes:
        if kind == "steps":
            return np.asarray(pd.Series(document.columns.numbers(column)[0]).ffill().bfill().to_numpy())
    return None
