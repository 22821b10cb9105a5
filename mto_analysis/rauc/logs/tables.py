"""Tables of text: the tidy table, wide tables, chart exports, what trainers write as CSV; in any spelling of CSV."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.formats import BY_NAME
from mto_analysis.rauc.logs.names import BESIDE_METRIC, MODE_COLUMNS, axis_of, metric_of, split_of_run, words_of
from mto_analysis.rauc.logs.provenance import AxisKind
from mto_analysis.rauc.logs.records import Document, Finding, FrameColumns, nan_is_blank

_EXTREMES = ("__MIN", "__MAX")
_UNITS = "epochs?|ep|steps?|iters?"
_WIDE = re.compile(rf"(?:({_UNITS})[ _@:-]*)?(\d+(?:\.\d+)?)(?:[ _-]?({_UNITS}))?", re.IGNORECASE)
#: Columns that name a run; with another value in each row they make a table of runs.
_RUN_NAMES = ("name", "run", "run_name", "run_id", "runid", "experiment", "trial", "job")
#: Columns that only a table of runs has.
_RUN_FACTS = {"state", "runtime", "created", "user", "tags", "notes", "sweep", "hostname"}
#: Words of columns that are neither scores nor methods.
_BESIDE = {"lr", "learning", "seed", "memory", "mem", "eta", "norm", "wd", "decay", *BESIDE_METRIC}


def _header(name: str, data: bytes) -> tuple[list[str], str, int]:
    """Column names, the delimiter, and the number of the header's line."""
    lines = data[: 1 << 16].split(b"\n") if b"\n" in data[: 1 << 16] else data.split(b"\n", 2)
    at = next((place for place, line in enumerate(lines) if line.strip(b" \t,;") and not line.startswith(b"sep=")), 0)
    if re.search(rb"[,;\t]$", lines[at]) and len(_filled(lines[at])) == 1:  # a title in the first cell of a spreadsheet
        below = (place for place in range(at + 1, min(at + 9, len(lines))) if len(_filled(lines[place])) > 1)
        at = next(below, at)
    while lines[at].startswith(b"#") and at + 1 < len(lines) and not _numeric(lines[at + 1]):
        at += 1  # a comment; a header after # has numbers below it
    first = lines[at].decode(errors="replace")
    second = lines[at + 1].decode(errors="replace") if at + 1 < len(lines) else ""

    def agreement(each: str) -> tuple[bool, bool, int]:
        return first.count(each) > 0, first.count(each) == second.count(each), first.count(each)

    delimiter = max(",;\t|", key=agreement)
    words = first.split()
    printed = len(words) == len(second.split()) > 1 and any(map(axis_of, words)) and _numeric(second.encode())
    if printed and not first.count(delimiter):
        return words, r"\s+", at + 1
    if not first.count(delimiter):
        raise DataError(
            f"{name}:{at + 1}: not a log of a known format (no JSON, no table header, no known text, in UTF-8)"
        )
    try:
        columns = [each.strip() for each in next(csv.reader([first.lstrip("#")], delimiter=delimiter))]
    except csv.Error as error:
        raise DataError(f"{name}:{at + 1}: the header is broken ({error})") from error
    if all(re.fullmatch(r"[-+\d.eE]*", each) for each in columns):
        raise DataError(f"{name}:{at + 1}: there are numbers where the names of the columns should be; add a header")
    while len(columns) > 1 and not columns[-1]:
        columns.pop()  # a delimiter at the end of the line; its cells must be empty, which reading checks
    return columns, delimiter, at + 1


def _filled(line: bytes) -> list[bytes]:
    """Cells of a line that hold something."""
    return [cell for cell in re.split(rb"[,;\t]", line) if cell.strip()]


def _numeric(line: bytes) -> bool:
    """Whether a line begins with a number."""
    return re.match(rb"\s*\"?[-+]?\d", line) is not None


def is_table(head: bytes) -> bool:
    """Whether the first line names an axis among the columns, and the next line has as many fields."""
    first, _, rest = head.lstrip().partition(b"\n")
    names = re.split(r"[,;\t|]", first.decode(errors="replace").replace('"', ""))
    return len(names) > 1 and any(map(axis_of, names)) and first.count(b",") <= rest.partition(b"\n")[0].count(b",")


def _cells(name: str, data: bytes, columns: Sequence[str], delimiter: str, header: int) -> pd.DataFrame:
    """The table below its header, columns by place; numbers where a column has nothing else."""
    fields = delimiter.encode() if delimiter.startswith("\\") else re.escape(delimiter.encode())
    sample = data[: 1 << 16]
    decimal_comma = (
        delimiter != ","
        and re.search(rb"(?:%s|\n)\s*\"?[-+]?\d+,\d+\"?\s*(?:%s|\n|$)" % (fields, fields), sample)
        and not re.search(rb"(?:%s|\n)\s*\"?[-+]?\d+\.\d+\"?\s*(?:%s|\n|$)" % (fields, fields), sample)
    )
    names = [str(place) for place in range(len(columns))]
    repeating = {str(at): "category" for at, each in enumerate(columns) if each.lower() in ("method", *MODE_COLUMNS)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # mixed cells are looked at later, one by one
            # Fields beyond the header must not vanish: 57,4 in a comma table must not pass for 57.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                io.BytesIO(data), sep=delimiter, header=None, names=names, skiprows=header, index_col=False,
                keep_default_na=False, na_values=[""], skip_blank_lines=False, dtype=repeating,
                decimal="," if decimal_comma else ".", skipinitialspace=True, encoding_errors="replace",
            )  # fmt: skip
    except pd.errors.ParserWarning:
        raise DataError(
            f"{name}: rows have more fields than the header names; decimal commas, or a name unquoted?"
        ) from None
    except (ValueError, KeyError, OverflowError, csv.Error) as error:  # pandas' ParserError is a ValueError
        line = re.search(r"(?:in line|row) (\d+)", str(error))
        where = f":{line[1]}" if line else ""
        raise DataError(f"{name}{where}: the table is broken ({' '.join(str(error).split())[:200]})") from error


def read_table(name: str, data: bytes, wanted: Collection[str] = ()) -> Document:
    r"""A table with a header, of whichever format its columns tell.

    Args:
        name: The file, for messages.
        data: Its text in UTF-8, lines ending with ``\n``.
        wanted: Methods that are compared; columns of these names hold their scores.

    Raises:
        DataError: If it has no header, broken rows, or a column twice.
    """
    columns, delimiter, header = _header(name, data)
    frame = _cells(name, data, columns, delimiter, header)
    lines = np.arange(header + 1, header + 1 + len(frame))
    plain = [column.lower() for column in columns]
    if any(column.endswith(_EXTREMES) for column in columns) or (
        len(columns) > 1 and all(" - " in column for column in columns[1:])
    ):
        return _chart(name, columns, frame, lines)
    frame, findings = _without_blanks(name, frame)
    repeated = [column for column in columns if column and columns.count(column) > 1]
    if repeated:
        raise DataError(f"{name}:{header}: the column {repeated[0]!r} comes twice; rename one")
    if is_run_table(columns, unique=not frame["0"].duplicated().any()):
        raise DataError(f"{name}:{header}: a table of runs, one row per run, is no curve; export a chart or a history")
    frame = frame.set_axis([column or f"column {place}" for place, column in enumerate(columns, 1)], axis=1)
    known = FrameColumns(name, frame, lines)
    if {"wall time", "step", "value"} <= set(plain):
        return _board_export(name, known)
    if not any(axis_of(column) for column in columns) and sum(bool(_WIDE.fullmatch(each)) for each in columns) > 1:
        return _wide_epochs(name, known)
    kind, roles = _format(plain), roles_of(name, known)
    if kind == "mto-analyze curves":  # ours: each row is one score, whichever weights it is of, and top5 goes with it
        roles |= {"mode": None, "scores": tuple(each for each in columns if each.lower() == "score")}
    document = Document(name, BY_NAME[kind], known, findings=findings, **roles)  # type: ignore[arg-type]
    if document.axes and any(each in columns for each in wanted):
        return _wide_methods(document, wanted)
    return document


def _without_blanks(name: str, frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[Finding, ...]]:
    """Without NaN where it stands for an empty cell, as in a data frame's file."""
    texts = frame.select_dtypes(exclude=["number", "category"])
    written = texts.isin(("NaN", "nan"))
    if not nan_is_blank(written.to_numpy(), (texts.notna() & ~written).to_numpy()):
        return frame, ()
    frame = frame.assign(**texts.mask(written))
    return frame, (Finding(name, None, "NaN stands for an empty cell: each row has one"),)


def is_run_table(columns: Sequence[str], *, unique: bool) -> bool:
    """Whether the columns are those of a table with a row per run; a history may have a runtime in each row."""
    metadata = _RUN_FACTS & {column.lower() for column in columns}
    return columns[0].lower() in _RUN_NAMES and bool(metadata if unique else metadata - {"runtime"})


def _format(plain: Sequence[str]) -> str:
    """Which program's table has these columns (in lower case)."""
    there = set(plain)
    if {"method", "epoch", "score", "protocol"} <= there:
        return "mto-analyze curves"
    if {"eval_top1", "train_loss", "epoch"} <= there:
        return "timm summary"
    if "_step" in there and {"_runtime", "_timestamp"} & there:
        return "W&B history"
    if {"epoch", "step"} <= there and "method" not in there:
        return "Lightning metrics"
    if any(each.startswith("metrics/") for each in plain) and any(each.startswith("train/") for each in plain):
        return "ultralytics results"
    if any(each.startswith("metrics/accuracy_top1") for each in plain):
        return "ultralytics results"
    if {"epoch", "train_loss", "valid_loss", "time"} <= there:
        return "fastai history"
    if "epoch" in there and any(f"val_{each}" in there and metric_of(each).split is None for each in plain):
        return "Keras CSV"
    return "table"


def axes_of(names: Sequence[str]) -> tuple[tuple[str, AxisKind], ...]:
    """Columns that rows may be placed on: epochs before steps before images before hours."""
    kinds = {name: axis_of(name) for name in names}
    return tuple(
        (name, kind) for kind in ("epochs", "steps", "images", "hours") for name in names if kinds[name] == kind
    )


def roles_of(name: str, columns: FrameColumns) -> dict[str, object]:
    """Which columns of a table are axes, method, seed and mode."""
    plain = {column.lower(): column for column in reversed(columns.names)}
    method = plain.get("method")
    if method is None:
        for run in filter(None, map(plain.get, _RUN_NAMES)):
            count = len(set(columns.labels(run).categories) - {""})
            if count > 1 and count == len(columns.lines):
                raise DataError(f"{name}: each row has another {run!r}: a table of runs is no curve")
            method = run if count > 1 else method
    mode = next((plain[each] for each in plain if each in MODE_COLUMNS), None)
    return {"axes": axes_of(columns.names), "method": method, "seed": plain.get("seed"), "mode": mode}


def _chart(name: str, columns: Sequence[str], frame: pd.DataFrame, lines: np.ndarray) -> Document:
    """A chart's export: one column per run and metric, called ``RUN - METRIC``, over the chart's x axis."""
    axis = columns[0]
    runs: dict[tuple[str, int], dict[str, int]] = {}
    times: dict[str, int] = {}
    aliases: dict[str, tuple[str, str]] = {}
    findings = []
    for place, column in enumerate(columns):
        if place == 0 or column.endswith((*_EXTREMES, " - _step")):
            continue
        run, dash, metric = column.rpartition(" - ")
        if not dash:
            raise DataError(f"{name}:1: a chart's export names its columns '<run> - <metric>', and {column!r} is not")
        times[column] = times.get(column, 0) + 1
        runs.setdefault((run, times[column]), {})[metric] = place
        aliases[column] = (metric, run)
        beside = range(place + 1, min(place + 3, len(columns)))
        extremes = [at for at in beside if columns[at] in [column + each for each in _EXTREMES]]
        if any(not frame[str(at)].equals(frame[str(place)]) for at in extremes):
            findings.append(Finding(name, None, f"{column!r} is a mean of several runs (its __MIN or __MAX differs)"))
    if not runs:
        raise DataError(f"{name}:1: no column is called '<run> - <metric>'")
    several = any(count > 1 for count in times.values())
    if several:
        named = ", ".join(sorted({column for column, count in times.items() if count > 1}))
        findings.append(Finding(name, 1, f"runs of one name are taken as its seeds: {named}"))
    parts = []
    for (run, seed), metrics in runs.items():
        part = (
            frame[["0", *map(str, metrics.values())]].set_axis([axis, *metrics], axis=1).assign(line=lines, method=run)
        )
        parts.append(part.assign(seed=str(seed)) if several else part)
    long = pd.concat(
        [part.dropna(subset=[*metrics], how="all") for part, metrics in zip(parts, runs.values(), strict=True)]
    )
    long = long.reset_index(drop=True)
    names = tuple(dict.fromkeys(metric for each in runs.values() for metric in each))
    kind = axis_of(axis) or "other"
    return Document(
        name, BY_NAME["W&B chart"], FrameColumns.with_lines(name, long), axes=((axis, kind),),
        method="method", seed="seed" if several else None, aliases=aliases, scores=names, findings=tuple(findings),
    )  # fmt: skip


def _board_export(name: str, columns: FrameColumns) -> Document:
    """One tag's scalars as TensorBoard's page exports them; the tag is in the file's name."""
    value = next(each for each in columns.names if each.lower() == "value")
    step = next(each for each in columns.names if each.lower() == "step")
    tag = re.search(r"(?:run-(.+)-)?tag-(.+?)(?: ?\(\d+\))?\.csv", name.replace("\\", "/").rpartition("/")[2])
    called = tag[2] if tag else value
    known = FrameColumns(name, columns.frame.rename(columns={value: called}), columns.lines)
    split = split_of_run(tag[1]) if tag and tag[1] else None
    return Document(
        name, BY_NAME["TensorBoard CSV"], known, axes=((step, "steps"),), scores=(called,), unmarked=split
    )  # fmt: skip


def _wide_epochs(name: str, columns: FrameColumns) -> Document:
    """A row per curve and a column per epoch, as long rows."""
    places = {each: match for each in columns.names if (match := _WIDE.fullmatch(each))}
    beside = [each for each in columns.names if each not in places]
    words = {(match[1] or match[3] or "epoch").lower() for match in places.values()}
    kind = "steps" if words & {"step", "steps", "iter", "iters"} else "epochs"
    _refuse_names(name, columns.names, ("score", "line", kind[:-1]))
    frame = columns.frame.assign(line=columns.lines)
    long = frame.melt(id_vars=[*beside, "line"], value_vars=list(places), var_name=kind[:-1], value_name="score")
    long[kind[:-1]] = long[kind[:-1]].map({each: float(match[2]) for each, match in places.items()})
    long = long[long["score"].notna()].reset_index(drop=True)
    known = FrameColumns.with_lines(name, long)
    plain = {each.lower(): each for each in reversed(beside)}
    texts = [each for each in beside if each.lower() != "seed" and columns.frame[each].dtype.kind not in "if"]
    method = plain.get("method") or (texts[0] if len(texts) == 1 else None)
    if method is None and texts:
        raise DataError(f"{name}: a wide table needs one column that names its rows; it has {', '.join(texts)}")
    return Document(
        name, BY_NAME["wide table"], known, axes=((kind[:-1], kind),), method=method, seed=plain.get("seed"),  # type: ignore[arg-type]
        scores=("score",),
    )  # fmt: skip


def _refuse_names(file: str, names: Sequence[str], taken: Sequence[str]) -> None:
    """Names that the long table gives to what it makes of a wide one."""
    clash = [name for name in names if name in taken]
    if clash:
        raise DataError(f"{file}: a wide table cannot have a column {clash[0]!r} too; rename it")


def _wide_methods(document: Document, wanted: Collection[str]) -> Document:
    """A column per method, as long rows: the compared ones, and those whose names tell the same metric."""
    columns = document.columns
    assert isinstance(columns, FrameColumns)
    axis = document.axes[0][0]
    roles = {axis, document.method, document.seed, document.mode, *(each for each, _ in document.axes)}
    free = [each for each in columns.names if each not in roles]
    metrics = {each: replace(metric_of(each), rest=()) for each in free}
    compared = {metrics[each] for each in free if each in wanted}
    methods = [
        each for each in free if each in wanted or (metrics[each] in compared and not _BESIDE & set(words_of(each)))
    ]
    told = sorted({each.kind for each in compared} - {"other", "score"})
    if len(told) > 1:
        raise DataError(f"{document.file}: the columns of the methods are of different metrics: {', '.join(told)}")
    score = told[0] if told else "score"
    _refuse_names(document.file, columns.names, (score, "line", "method of column"))
    frame = columns.frame.assign(line=columns.lines)
    kept = [each for each in columns.names if each in roles]
    long = frame.melt(id_vars=[*kept, "line"], value_vars=methods, var_name="method of column", value_name=score)
    long = long[long[score].notna()].reset_index(drop=True)
    known = FrameColumns.with_lines(document.file, long)
    unread = [each for each in free if each not in methods]
    findings = (Finding(document.file, 1, f"not read as methods: {', '.join(unread)}"),) if unread else ()
    return replace(
        document, format=BY_NAME["wide table"], columns=known, method="method of column", scores=(score,),
        findings=(*document.findings, *findings),
    )  # fmt: skip
