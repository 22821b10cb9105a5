"""One file's rows as curves: one run, one score per epoch, one unit; every change is named by file and line.

The rules are those of a careful reader: the last score of an epoch counts where it was trained again (a resumed run),
the first where it was only evaluated again, a file that starts over holds two runs and is refused until one is chosen,
a missing epoch stays missing, and 0-1 or 0-100 is decided per file, alike for one column of one format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.areas import LARGEST_NUMBER
from mto_analysis.rauc.logs.extracting import progress_of, steps_of, trained_rows
from mto_analysis.rauc.logs.records import Finding, Log, grouped

Places = NDArray[np.integer[Any]]

# What stands for bytes that are no UTF-8.
_NO_CHARACTER = "\ufffd"

Unit = Literal["auto", "percent", "fraction", "raw"]


def tidy(
    log: Log,
    rows: pd.DataFrame,
    *,
    groups: Sequence[str] = (),
    unit: Unit = "auto",
    run: int | None = None,
    must: bool = False,
) -> tuple[pd.DataFrame, list[Finding], bool]:
    """One file's rows as sorted curves without repeats, gaps left as gaps; what was changed; whether it was 0 to 1.

    Args:
        log: The file.
        rows: Its rows with a method and a seed each.
        groups: Columns that separate curves of one method.
        unit: What scores are.
        run: Which run to take of a file that holds several.
        must: Whether a file that holds one run must have this one.
    """
    findings: list[Finding] = []
    missing = [column for column in groups if column not in rows]
    if missing:
        raise DataError(f"{log.file}: there is no column {missing[0]!r} to group by")
    unknown = ~np.isfinite(rows["epoch"].to_numpy())
    findings += grouped(log.file, rows.loc[unknown, "line"], "skipped: the epoch is not a number")
    rows = rows[~unknown] if unknown.any() else rows
    negative = rows["epoch"].to_numpy() < 0
    if negative.any():
        line = rows["line"].iloc[int(np.argmax(negative))]
        raise DataError(f"{log.file}:{line}: epoch {rows['epoch'][negative].iloc[0]:g} is negative")
    if rows.empty:
        raise DataError(f"{log.file}: no row has an epoch and a score")
    for column in ("epoch", "score"):
        huge = np.isfinite(rows[column].to_numpy()) & (np.abs(rows[column].to_numpy()) > LARGEST_NUMBER)
        if huge.any():
            at = int(np.argmax(huge))
            raise DataError(f"{log.file}:{rows['line'].iloc[at]}: {column} {rows[column].iloc[at]:g} is no measurement")
    rows, found = _without_final_test(log, rows)
    findings += found
    keys = ["method", "seed", *groups]
    names = [pd.Categorical(rows[key]).remove_unused_categories() for key in keys]
    written = {str(name) for each in names for name in each.categories} - {log.file}  # of a run without a seed
    if odd := [name for name in written if _NO_CHARACTER in name]:
        raise DataError(f"{log.file}: the name {odd[0]!r} is not UTF-8 text, others may differ in it; save it as UTF-8")
    code = _curve_codes(names)
    if run is not None or "run" in rows or not _in_order(code, rows["epoch"].to_numpy()):
        rows, code, found = _without_later_evaluations(log, rows, code)
        findings += found
        rows, code = _chosen_run(log.file, rows, code, run, must)
        rows, code, found = _last_of_each_epoch(log.file, rows, code)
        findings += found
    lost = ~np.isfinite(rows["score"].to_numpy())
    findings += grouped(log.file, rows.loc[lost, "line"], "left out: this epoch's score or loss is not finite")
    why = ""
    if lost.any():
        why = f"; the score or loss of line {rows.loc[lost, 'line'].min()} is not finite"
        rows, code = rows[~lost], code[~lost]
    if rows.empty:
        raise DataError(f"{log.file}: no score is finite{why}")
    if (np.diff(code) != 0).all():
        raise DataError(f"{log.file}: one evaluation, no curve; a curve needs two epochs{why}")
    rows, found, fraction = _in_percent(log, rows, code, unit)
    findings += found + _gaps(log.file, rows, code)
    extra = [column for column in rows if column not in (*keys, "epoch", "score", "line", "row", "run")]
    frame = rows[["method", "epoch", "score", "seed", *groups, *extra]]
    return frame.reset_index(drop=True), findings, fraction


def curve_starts(frame: pd.DataFrame) -> Places:
    """Where the curves of a tidy frame begin: where a name changes."""
    begins = np.zeros(len(frame), dtype=np.bool_)
    begins[:1] = True
    for column in frame:
        if isinstance(frame[column].dtype, pd.CategoricalDtype):
            codes = frame[column].cat.codes.to_numpy()
            begins[1:] |= codes[1:] != codes[:-1]
    return np.flatnonzero(begins)


def _curve_codes(names: Sequence[pd.Categorical]) -> Places:
    """Which curve each row is of, numbered as they come."""
    code = np.zeros(len(names[0]), dtype=np.int64)
    for each in names:
        code = code * len(each.categories) + each.codes
    return pd.factorize(code)[0]


def _in_order(code: Places, epoch: NDArray[np.float64]) -> bool:
    """Whether the curves follow each other, each with rising epochs: then there is nothing to repair."""
    step = np.diff(code)
    return bool(((step == 1) | ((step == 0) & (np.diff(epoch) > 0))).all())


def _without_final_test(log: Log, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[Finding]]:
    """Without a last score under a number of its own before which the log shows no training, as it does elsewhere.

    ``Trainer.validate()`` after ``fit()`` writes such a row: one epoch and one step after the last of training.
    """
    document = log.document
    if document.method is not None or document.progress is not None or len(rows) < 3:
        return rows, []
    places, epoch = rows["row"].to_numpy(), rows["epoch"].to_numpy()
    if epoch[-1] <= epoch[:-1].max():
        return rows, []
    training = trained_rows(document)
    trained = np.diff(np.cumsum(training)[places])
    # Lightning writes an epoch's training values below its validation: then their own epoch tells.
    of_training = np.isin(epoch, document.columns.numbers(log.axis_column)[0][training])
    below = not of_training[-1] and of_training[:-1].all()
    if not below and (trained[-1] != 0 or not (trained[:-1] > 0).all()):
        return rows, []
    steps = steps_of(document)
    if steps is not None:
        ahead = np.diff(steps[places])
        if 2 * ahead[-1] >= ahead[:-1].min():
            return rows, []
    text = "evaluated after training, without training since the score before: left out"
    return rows.iloc[:-1], [Finding(log.file, int(rows["line"].iloc[-1]), text)]


def _without_later_evaluations(
    log: Log, rows: pd.DataFrame, code: Places
) -> tuple[pd.DataFrame, Places, list[Finding]]:
    """Without scores of an epoch that was evaluated again without training in between: the first counts.

    Whether there was training is told by the log's steps, or by its values of training. Where it has neither, a repeat
    counts as trained if the curve goes on beyond its last epoch (a resumed run), else as an evaluation at the end.
    """
    order = np.argsort(code, kind="stable")
    curve, epoch, score = code[order], rows["epoch"].to_numpy()[order], rows["score"].to_numpy()[order]
    if not ((np.diff(epoch) <= 0) & (np.diff(curve) == 0)).any():
        return rows, code, []
    again = _earlier_place(curve, epoch)
    repeats = np.flatnonzero(again >= 0)
    progress = progress_of(log.document)
    if progress is not None:
        done = progress[rows["row"].to_numpy()][order]
        later = repeats[done[repeats] == done[repeats - 1]]  # a repeat is never the first point of its curve
    else:
        later = repeats[~_goes_on(curve, epoch)[repeats] | _mostly_twice(curve, epoch)[repeats]]
    if log.document.progress is None:
        # A curve that goes back to its first epoch with another score holds another run, which is looked at next.
        first, length = pd.Series(epoch).groupby(curve).transform("min").to_numpy(), np.bincount(curve)[curve]
        again_first = (epoch == first) & (length > 2) & _rewritten(curve, again, score)
        restarted = curve[later[again_first[later]]]
        later = later[~np.isin(curve[later], restarted)]
        _refuse_second_run(log.file, rows.iloc[order], curve, epoch, later, later[score[later] != score[again[later]]])
    if not later.size:
        return rows, code, []
    lines = rows["line"].to_numpy()[order]
    changed = later[score[later] != score[again[later]]]
    text = "evaluated again without training in between: the first score of the epoch counts"
    count = later.size - changed.size
    copies = f"{count} rows are copies of rows before them: skipped" if count > 1 else "a copy of a row before: skipped"
    found = [Finding(log.file, int(lines[later].min()), copies)] if changed.size < later.size else []
    keep = np.sort(np.delete(order, later))
    return rows.iloc[keep], code[keep], [*grouped(log.file, lines[changed], text), *found]


def _refuse_second_run(
    file: str,
    rows: pd.DataFrame,
    curve: Places,
    epoch: NDArray[np.float64],
    later: Places,
    changed: Places,
) -> None:
    """Most epochs with a second score are no later evaluations, but another run or a column that is not read."""
    for one in np.unique(curve[changed]):
        repeated, total = np.unique(epoch[later[curve[later] == one]]), np.unique(epoch[curve == one])
        if repeated.size > 1 and 2 * repeated.size > total.size:
            at = changed[curve[changed] == one][0]
            raise DataError(
                f"{file}:{rows['line'].iloc[at]}: {rows['method'].iloc[at]!r} has a second score for epoch"
                f" {rows['epoch'].iloc[at]:g} and others;"
                " a column that tells its curves apart is missing (--method-column, --seed-column, --group)"
            )


def _earlier_place(curve: Places, epoch: NDArray[np.float64]) -> Places:
    """For each point of sorted curves the place of the last one before it with the same epoch, or -1."""
    order = np.lexsort((epoch, curve))  # stable: points of one epoch stay in the order of the file
    same = (np.diff(curve[order]) == 0) & (np.diff(epoch[order]) == 0)
    earlier = np.full(len(epoch), -1, dtype=np.intp)
    earlier[order[1:][same]] = order[:-1][same]
    return earlier


def _rewritten(curve: Places, earlier: Places, score: NDArray[np.float64]) -> NDArray[np.bool_]:
    """For each point whether it, or the next one of its curve, repeats an epoch with another score.

    A repeat with the same score is a copied line, unless it goes on otherwise: runs may begin with equal scores.

    Args:
        curve: Of each point, sorted.
        earlier: As :func:`_earlier_place` gives it.
        score: Of each point.
    """
    other = (earlier >= 0) & (score != score[earlier])
    following = np.r_[other[1:] & (curve[1:] == curve[:-1]), False]
    return np.asarray((earlier >= 0) & (other | following))


def _mostly_twice(curve: Places, epoch: NDArray[np.float64]) -> NDArray[np.bool_]:
    """For each point whether it repeats the epoch right before it, on a curve where most epochs come so.

    A resumed run goes back by some epochs and comes through them again; it does not write each one twice in a row.
    """
    same = np.r_[False, (curve[1:] == curve[:-1]) & (epoch[1:] == epoch[:-1])]
    doubled = pd.Series(epoch).where(same).groupby(curve).transform("nunique").to_numpy()
    total = pd.Series(epoch).groupby(curve).transform("nunique").to_numpy()
    return np.asarray(same & (doubled > 1) & (2 * doubled > total))


def _goes_on(curve: Places, epoch: NDArray[np.float64]) -> NDArray[np.bool_]:
    """For each point whether a later one of its curve is beyond all epochs before it."""
    epochs = pd.Series(epoch)
    before = epochs.groupby(curve).cummax().groupby(curve).shift(fill_value=-np.inf).to_numpy()
    after = epochs[::-1].groupby(curve[::-1]).cummax()[::-1].to_numpy()
    return np.asarray(after > before)


def _chosen_run(
    file: str, rows: pd.DataFrame, code: np.ndarray, run: int | None, must: bool
) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of one run per curve. A file that falls back to its first epoch, or changes its model, holds several."""
    order = np.argsort(code, kind="stable")
    curve, epoch, score = code[order], rows["epoch"].to_numpy()[order], rows["score"].to_numpy()[order]
    begins = np.r_[True, curve[1:] != curve[:-1]]
    size = np.diff(np.r_[np.flatnonzero(begins), curve.size])
    first = np.repeat(np.minimum.reduceat(epoch, np.flatnonzero(begins)), size)
    at_first = np.flatnonzero(epoch == first)
    again = np.zeros(curve.size, dtype=bool)
    again[at_first] = _rewritten(curve, _earlier_place(curve, epoch), score)[at_first]
    if "run" in rows:
        model = rows["run"].to_numpy()[order]
        again[1:] |= (curve[1:] == curve[:-1]) & (model[1:] != model[:-1])
    if run == 0 or (must and not again.any() and run not in (None, 1, -1)):
        raise DataError(
            f"{file}: there is no run {run}; runs are counted from 1 (-1 is the last), and it has {1 + again.sum()}"
        )
    if not again.any():
        return rows, code
    at = int(np.flatnonzero(again)[0])
    line, method = rows["line"].to_numpy()[order][at], rows["method"].iloc[order[at]]
    twice = (np.diff(epoch) == 0) & (np.diff(curve) == 0) & (curve[1:] == curve[at])
    if (epoch[curve == curve[at]] == epoch[at]).all():
        raise DataError(f"{file}:{line}: every score of {method!r} is at {epoch[at]:g}, and nothing tells their order")
    if twice.sum() > 1:  # once is a run of one epoch, such as of a frozen backbone, before the next
        raise DataError(
            f"{file}:{line}: {method!r} has a second score for epoch {epoch[at]:g};"
            " a column that tells its curves apart is missing (--method-column, --seed-column, --group)"
        )
    if run is None:
        raise DataError(
            f"{file}:{line}: {method!r} starts over at epoch {epoch[at]:g}, so the file holds more than one run;"
            " choose with --run 1, 2, ... or -1 for the last, or name the column that tells its curves apart with"
            " --method-column, --seed-column or --group"
        )
    total = np.cumsum(again)
    segment = total - np.repeat(total[begins], size)
    last = np.repeat(np.maximum.reduceat(segment, np.flatnonzero(begins)), size)
    chosen = segment == (last + 1 + run if run < 0 else run - 1)
    if len(np.unique(curve[chosen])) < len(np.unique(curve)):
        raise DataError(f"{file}: there is no run {run}; {method!r} has {int(last[at]) + 1}")
    keep = np.sort(order[chosen])
    return rows.iloc[keep], code[keep]


def _last_of_each_epoch(
    file: str, rows: pd.DataFrame, code: np.ndarray
) -> tuple[pd.DataFrame, np.ndarray, list[Finding]]:
    """Rows sorted by curve and epoch, the last written one of each epoch only."""
    findings = []
    epoch = rows["epoch"].to_numpy()
    order = np.lexsort((epoch, code))  # stable: rows of one epoch stay in the order of the file
    same = (code[order][1:] == code[order][:-1]) & (epoch[order][1:] == epoch[order][:-1])
    lines = rows["line"].to_numpy()
    if same.any():
        overwritten = order[:-1][same]
        later = order[1:][same]
        names = sorted({float(x) for x in epoch[overwritten]})
        which = f"{names[0]:g}" if len(names) == 1 else f"{names[0]:g} to {names[-1]:g}"
        text = f"{len(names)} epoch{'s' * (len(names) > 1)} written again ({which}): the last score of each counts"
        findings.append(Finding(file, int(lines[later].min()), text))
    kept = np.delete(order, np.flatnonzero(same))
    in_file = np.sort(kept)
    falls = (code[in_file][1:] == code[in_file][:-1]) & (epoch[in_file][1:] < epoch[in_file][:-1])
    if falls.any():
        text = f"{int(falls.sum())} epochs out of order: sorted"
        findings.append(Finding(file, int(lines[in_file][1:][falls][0]), text))
    return rows.iloc[kept], code[kept], findings


def _in_percent(log: Log, rows: pd.DataFrame, code: np.ndarray, unit: Unit) -> tuple[pd.DataFrame, list[Finding], bool]:
    """Scores in percent. Decided per file, never per value; a file whose curves disagree is refused."""
    if unit == "raw":
        return rows, [], False
    score = rows["score"].to_numpy()
    findings = []
    fraction = unit == "fraction"
    highest = pd.Series(score).groupby(code).max()
    small = highest <= 1
    written = log.document.format.percent
    told = log.series.metric.percent or bool(written and re.fullmatch(written, log.series.column))
    if unit == "auto" and told:
        if small.all() and score.size > 1:
            findings.append(
                Finding(log.file, None, "no score exceeds 1; read as percent, as the format or the name tells")
            )
    elif unit == "auto":
        if small.any() and not small.all():
            at = int(np.argmax(code == small.index[small][0]))
            raise DataError(
                f"{log.file}:{rows['line'].iloc[at]}: {rows['method'].iloc[at]!r} never exceeds 1 and other curves do:"
                " two units in one file? say --unit percent, or fix the file"
            )
        fraction = bool(small.all())
    outside = (score < 0) | (score > (1 if fraction else 100))
    if outside.any():
        at = int(np.argmax(outside))
        limit = "0 to 1" if fraction else "0 to 100"
        raise DataError(
            f"{log.file}:{rows['line'].iloc[at]}: score {score[at]:g} is outside {limit};"
            " --unit raw takes scores that are no accuracy"
        )
    if fraction:
        findings.append(Finding(log.file, None, "scores from 0 to 1, shown in percent"))
        return rows.assign(score=score * 100), findings, True
    if not (score <= 1).any():
        return rows, findings, False
    middle = pd.Series(score).groupby(code).transform("median").to_numpy()
    odd = (score <= 1) & (middle > 5) & np.r_[False, code[1:] == code[:-1]]
    findings += grouped(
        log.file, rows["line"][odd], "a score of at most 1 in a 0-100 curve: another unit, or collapse?"
    )
    return rows, findings, False


def _gaps(file: str, rows: pd.DataFrame, code: np.ndarray) -> list[Finding]:
    """Holes in curves that are otherwise evaluated at a regular step; they are bridged by a straight line."""
    epoch, lines = rows["epoch"].to_numpy(), rows["line"].to_numpy()
    found = []
    for part in np.split(np.arange(code.size), np.flatnonzero(np.diff(code)) + 1):
        steps = np.diff(epoch[part])
        if steps.size < 3 or steps.max() == steps.min():
            continue
        values, counts = np.unique(steps, return_counts=True)
        usual = values[np.argmax(counts)]
        holes = np.flatnonzero(steps > 1.5 * usual)
        if counts.max() >= 0.6 * steps.size and holes.size:
            first = part[holes[0]]
            text = f"no score between epochs {epoch[first]:g} and {epoch[first + 1]:g} (usual step {usual:g})"
            more = f" and {holes.size - 1} gaps after it" if holes.size > 1 else ""
            found.append(Finding(file, int(lines[first + 1]), text + more))
    return found[:3] + ([Finding(file, None, f"gaps in {len(found) - 3} more curves")] if len(found) > 3 else [])
