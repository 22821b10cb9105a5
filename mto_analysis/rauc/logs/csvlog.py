"""CSV: the tidy table, timm's summary.csv, Lightning's metrics.csv, chart exports of Weights & Biases, any columns."""

from __future__ import annotations

import csv
import io
import re
import warnings

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Finding, Log, choose_score, grouped, plain_name

__all__ = ["read_csv_log"]

_WRITTEN_NAN = ("nan", "-nan", "+nan", "null", "none", "na", "n/a")


def _header(name: str, data: bytes) -> tuple[list[str], str]:
    """Column names and the delimiter: whichever of comma, semicolon and tab splits the first line most."""
    try:
        first = data.split(b"\n", 1)[0].decode().rstrip("\r")
    except UnicodeDecodeError:
        raise DataError(f"{name}:1: the first line is not UTF-8 text") from None
    delimiter = max(",;\t", key=first.count)
    if not first.count(delimiter):
        raise DataError(f"{name}:1: not a log of a known form (no JSON, no table header, no SimMIM text)")
    columns = next(csv.reader([first], delimiter=delimiter))
    repeated = [column for column in columns if columns.count(column) > 1]
    if repeated:
        raise DataError(f"{name}:1: the column {repeated[0]!r} comes twice; rename one")
    return columns, delimiter


def _table(name: str, data: bytes, columns: list[str], delimiter: str, numeric: list[str]) -> pd.DataFrame:
    """The wanted columns with their line numbers; a numeric column stays text where one of its cells is no number."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # mixed cells are looked at below, one by one
            # Reading all columns makes pandas count the fields: 57,4 in a comma table must not pass for 57.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                io.BytesIO(data),
                sep=delimiter,
                dtype={column: str for column in columns if column not in numeric},
                keep_default_na=False,
                na_values={column: [""] for column in numeric},
                skip_blank_lines=False,
                index_col=False,
            )[columns]
    except pd.errors.ParserWarning:
        raise DataError(
            f"{name}: rows have more fields than the header names; decimal commas, or a name unquoted?"
        ) from None
    except (ValueError, KeyError) as error:  # pandas' ParserError is a ValueError
        line = re.search(r"in line (\d+)", str(error))
        raise DataError(f"{name}{f':{line[1]}' if line else ''}: the table is broken ({str(error).strip()})") from error
    table["line"] = np.arange(2, len(table) + 2)
    return table


def _numbers(name: str, table: pd.DataFrame, column: str, findings: list[Finding]) -> pd.DataFrame:
    """The table with ``column`` as numbers, without the rows where it is blank; a written NaN stays, to be named."""
    if table[column].dtype.kind in "if":
        return table[table[column].notna()].astype({column: float})
    values = pd.to_numeric(table[column], errors="coerce").astype(float)
    lost = values.isna()  # the few cells that are no numbers: blank, a header, a written NaN, or a mistake
    text = table.loc[lost, column].fillna("").astype(str).str.strip()
    again = text[text == column].index
    findings += grouped(name, table.loc[again, "line"], "skipped: the header again (a resumed run)")
    bad = text[(text != "") & (text != column) & ~text.str.lower().isin(_WRITTEN_NAN)]
    if not bad.empty:
        line = table.loc[bad.index[0], "line"]
        raise DataError(f"{name}:{line}: {bad.iloc[0]!r} in column {column!r} is not a number")
    return table.assign(**{column: values}).drop(index=again.union(text[text == ""].index))


def _require(name: str, columns: list[str], *wanted: str | None) -> None:
    """Columns that an option names must be there."""
    for column in wanted:
        if column is not None and column not in columns:
            raise DataError(f"{name}:1: there is no column {column!r}; it has {', '.join(columns[:12])}")


def read_csv_log(
    name: str,
    data: bytes,
    score_column: str | None,
    epoch_column: str | None,
    method_column: str | None,
    seed_column: str | None,
    keep: tuple[str, ...],
) -> Log:
    """Scores of a table: blank cells are gaps, NaN is kept to be named, text that is no number is refused.

    Raises:
        DataError: If a column is missing, a row is broken, or a score is not a number.
    """
    columns, delimiter = _header(name, data)
    _require(name, columns, score_column, epoch_column, method_column, seed_column)
    if columns[0] == "Step" or any(column.endswith("__MIN") for column in columns):
        return _read_export(name, data, columns, delimiter, epoch_column or columns[0])
    plain = {plain_name(column): column for column in reversed(columns)}
    epoch = epoch_column or plain.get("epoch") or plain.get("epochs")
    if epoch is None:
        raise DataError(f"{name}:1: no column 'epoch'; name it with --epoch-column, it has {', '.join(columns[:12])}")
    score = choose_score(columns, score_column, f"{name}:1")
    if score == epoch:
        raise DataError(f"{name}:1: {score!r} cannot be both the epoch and the score")
    roles = {epoch: "epoch", score: "score"}
    for column, role in (
        (method_column or plain.get("method"), "method"),
        (seed_column or plain.get("seed"), "seed"),
        *((column, column) for column in keep if column in columns),
    ):
        if column is not None:
            roles.setdefault(column, role)
    findings: list[Finding] = []
    table = _numbers(name, _table(name, data, list(roles), delimiter, [epoch, score]), score, findings)
    scored = table["line"]
    table = _numbers(name, table, epoch, findings)
    findings += (
        grouped(name, set(scored) - set(table["line"]), "skipped: a score without an epoch")
        if len(scored) > len(table)
        else []
    )
    if table.empty:
        raise DataError(f"{name}: the table has no row with an epoch and a score")
    timm, lightning = score == "eval_top1", "step" in columns and "method" not in roles.values()
    return Log(
        name,
        "timm summary" if timm else ("Lightning metrics" if lightning else "table"),
        table.rename(columns=roles).reset_index(drop=True),
        epochs_completed=False if timm or lightning else None,
        percent=True if timm else None,
        findings=tuple(findings),
        column=score,
        axis_column=epoch,
    )


def _read_export(name: str, data: bytes, columns: list[str], delimiter: str, axis: str) -> Log:
    """A chart's export: one column per run, called ``<run> - <metric>``, over the chart's x axis."""
    runs = [c for c in columns if " - " in c and not c.endswith(("__MIN", "__MAX", " - _step"))]
    if not runs:
        raise DataError(f"{name}:1: no column is called '<run> - <metric>'")
    findings: list[Finding] = []
    table = _numbers(name, _table(name, data, [axis, *runs], delimiter, [axis, *runs]), axis, findings)
    parts = [
        _numbers(name, table[[axis, column, "line"]], column, findings)
        .rename(columns={axis: "epoch", column: "score"})
        .assign(method=column.rsplit(" - ", 1)[0])
        for column in runs
    ]
    if axis == "Step":
        findings.append(Finding(name, 1, "the axis counts logged steps, not epochs (see --steps-per-epoch)"))
    return Log(
        name,
        "W&B export",
        pd.concat(parts, ignore_index=True),
        findings=tuple(findings),
        column=runs[0].rsplit(" - ", 1)[1],
        axis="steps" if axis == "Step" else "epochs",
        axis_column=axis,
    )
