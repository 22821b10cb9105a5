"""JSON: an object in each line, or one document with a list of objects (a history) or an object of lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.formats import BY_NAME
from mto_analysis.rauc.logs.names import MODE_COLUMNS, metric_of, mode_of
from mto_analysis.rauc.logs.provenance import AxisKind
from mto_analysis.rauc.logs.records import Document, Finding, RecordColumns, grouped, nan_is_blank
from mto_analysis.rauc.logs.tables import axes_of
from mto_analysis.runtime.collection import without_collection

_LOSSES = ("train_loss", "test_loss")


def is_json(head: bytes) -> bool:
    """Whether a line near the top begins a JSON object or list (a scheduler's message may come first)."""
    first = head.lstrip()[:1]
    if first == b"[":  # also how lines of text logs begin: [2022-05-01 10:00:00] ...
        return head.lstrip()[1:].lstrip()[:1] == b"{" or _parse(head.lstrip().split(b"\n", 1)[0]) is not None
    if first == b"{":
        return True
    return any(isinstance(_parse(line), dict) for line in head.split(b"\n")[:50] if line.lstrip()[:1] == b"{")


def _parse(text: bytes | str) -> Any:
    """The value, or None where it is not JSON. Python's parser takes the bare NaN that trainers write."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_json(name: str, data: bytes) -> Document:
    """Objects of JSON lines or of one document."""
    document = _read(name, data)
    return _without_blanks(document) if b"NaN" in data else document


def _without_blanks(document: Document) -> Document:
    """Without NaN where it stands for no value, as in the rows of a data frame."""
    columns = document.columns
    assert isinstance(columns, RecordColumns)
    if not all(any(cell != cell for cell in record.values()) for record in columns.records):
        return document
    cells = [[record.get(name) for name in columns.names] for record in columns.records]
    nan = np.array([[isinstance(cell, float) and cell != cell for cell in row] for row in cells])
    filled = np.array([[cell is not None for cell in row] for row in cells]) & ~nan
    if not nan_is_blank(nan, filled):
        return document
    records = [{key: each for key, each in record.items() if each == each} for record in columns.records]
    told = Finding(document.file, None, "NaN stands for no value: each row has one")
    findings = (*document.findings, told)
    return replace(document, columns=RecordColumns(records, columns.lines), findings=findings, losses=())


def _read(name: str, data: bytes) -> Document:
    """The rows of JSON lines or of one document."""
    lines = _objects(data)
    if len(lines) > 1 or data.lstrip()[:1] not in (b"{", b"["):
        return _lines(name, data, lines)
    try:
        document = json.loads(data)
    except json.JSONDecodeError as error:
        if lines:
            return _lines(name, data, lines)
        raise DataError(f"{name}:{error.lineno}: the JSON document is broken ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: the JSON document is broken ({str(error)[:100]})") from error
    return _document(name, document)


def _objects(data: bytes) -> list[Any]:
    """The value of each line, None where a line is no JSON object; nothing for a document over several lines."""
    body = data.rstrip(b"\n ")
    count = body.count(b"\n") + 1
    text = body.decode(errors="replace")
    if count > 1 and body.count(b"}\n{") == count - 1:
        # One call for the whole file takes two thirds of the time; it reads the same lines, or is not used.
        joined = text.replace("}\n{", "},\n{")
        with without_collection():
            found = _parse(f"[{joined}]")
        if isinstance(found, list) and len(found) == count and set(map(type, found)) == {dict}:
            return found
    found = [_parse(line) if line.lstrip()[:1] == "{" else None for line in text.split("\n")]
    found = [each if isinstance(each, dict) else None for each in found]
    return found if any(each is not None for each in found) else []


def _lines(name: str, data: bytes, found: Sequence[Any]) -> Document:
    """JSON lines: what is no object is named; the last line of a killed run is cut."""
    foreign = [number for number, record in enumerate(found, 1) if record is None]
    records = [record for record in found if record is not None] if foreign else found
    lines = np.delete(np.arange(1, len(found) + 1), np.array(foreign, dtype=np.int64) - 1)
    cut = bool(foreign) and foreign[-1] == len(found) and not data.endswith(b"\n")
    findings = grouped(name, foreign[:-1] if cut else foreign, "skipped: not a JSON object")
    if cut:
        findings.append(Finding(name, len(found), "skipped: the last line is cut"))
    if data.count(b"{") > len(found):
        records = [_flat(record) for record in records]
    columns = RecordColumns(records, lines)
    if len(records) == 1:
        _refuse_one_evaluation(name, records[0])
    names = set(columns.names)
    mode = _mode(columns)
    axes = axes_of(columns.names)
    form = "JSON lines"
    if "accuracy/top1" in names or "accuracy_top-1" in names or ("env_info" in names and mode):
        form = "OpenMMLab JSON lines"
        columns, axes = _open_mmlab_places(columns, axes)
    elif {"test_acc1", "train_loss"} <= names:
        form = "MAE JSON lines"
    return Document(
        name,
        BY_NAME[form],
        columns,
        axes,
        *_named(columns),
        mode=mode,
        findings=tuple(findings),
        losses=tuple(key for key in _LOSSES if key in names) if b"NaN" in data else (),
    )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Objects within objects as keys with slashes."""
    flat: dict[str, Any] = {}
    stack = [("", record)]
    while stack:
        above, inner = stack.pop()
        for key, value in inner.items():
            if isinstance(value, dict):
                stack.append((f"{above}{key}/", value))
            else:
                flat[f"{above}{key}"] = value
    return flat


def _named(columns: RecordColumns) -> tuple[str | None, str | None]:
    """Keys of method and seed; an object that only describes the run may have the key of a column."""
    return tuple(key if key in columns.names else None for key in ("method", "seed"))  # type: ignore[return-value]


def _mode(columns: RecordColumns) -> str | None:
    """The key that says of which split or weights a row is."""
    return next((key for key in columns.names if key.lower() in MODE_COLUMNS), None)


def _open_mmlab_places(
    columns: RecordColumns, axes: Sequence[tuple[str, AxisKind]]
) -> tuple[RecordColumns, tuple[tuple[str, AxisKind], ...]]:
    """What a validation line counts: finished epochs or iterations, as the training line before it shows.

    In mmengine ``step`` of a validation line is one or the other; in mmcls 0.x ``iter`` of a validation line is the
    number of validation batches: where training goes by iterations, it becomes that of the training line before.
    """
    score = next((key for key in columns.names if metric_of(key).is_top1), None)
    if score is None:
        return columns, tuple(axes)
    _, scored = columns.numbers(score)
    if "step" in columns.names:
        step, _ = columns.numbers("step")
        for key in ("iter", "step"):
            if key in columns.names:
                before, there = columns.numbers(key)
                training = np.flatnonzero(there & ~scored)
                at = np.flatnonzero(scored)
                previous = np.searchsorted(training, at) - 1
                if len(at) and (previous >= 0).all() and (before[training[previous]] == step[at]).all():
                    return columns, (("step", "steps"), *axes)
        return columns, (("step", "epochs" if "epoch" in columns.names else "steps"), *axes)
    if {"iter", "epoch"} <= set(columns.names):
        (counts, there), (epochs, _) = (columns.numbers(key) for key in ("iter", "epoch"))
        training = np.flatnonzero(there & ~scored)
        shown = training if training.size else np.flatnonzero(scored)
        falls, changes = (np.diff(counts[shown]) <= 0).sum(), (np.diff(epochs[shown]) != 0).sum()
        if shown.size > 1 and (falls == 0 or 2 * falls < changes):  # by epochs it falls in each; a resumed run, once
            records = [*columns.records]
            for place in np.flatnonzero(scored) if training.size else ():
                trained = training[: np.searchsorted(training, place)]
                records[place] = {**records[place], "iter": counts[trained[-1]] if trained.size else 0}
            return RecordColumns(records, columns.lines), (("iter", "steps"), *axes)
    return columns, tuple(axes)


def _refuse_one_evaluation(name: str, record: Mapping[str, Any]) -> None:
    scalars = [key for key, value in record.items() if isinstance(value, (int, float))]
    if scalars and not any(isinstance(value, (list, dict)) for value in record.values()):
        raise DataError(f"{name}: one evaluation, no curve; give the log of the whole run (such as trainer_state.json)")


def _document(name: str, document: Any) -> Document:
    """One JSON value as rows."""
    if isinstance(document, dict):
        if "log_history" in document:
            history = document["log_history"]
            if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
                raise DataError(f"{name}: log_history is not a list of entries")
            return _rows(name, history, "transformers trainer state")
        _refuse_one_evaluation(name, document)
        if document and all(isinstance(value, dict) and _is_place(key) for key, value in document.items()):
            return _rows(name, [{"epoch": int(key), **value} for key, value in document.items()], "JSON array")
        if document and all(isinstance(value, dict) for value in document.values()):
            rows = [list(value) for value in document.values()]
            if all(row == rows[0] and all(map(_is_place, row)) for row in rows):
                # pandas' to_json: an object from row to value for each column
                return _lists(name, {key: list(value.values()) for key, value in document.items()})
        tables = {key: value for key, value in document.items() if _is_table(value)}
        if len(tables) == 1:
            return _rows(name, next(iter(tables.values())), "JSON array")
        if tables and all(mode_of("mode", key)[0] for key in tables):
            entries = [{**row, "mode": key} for key, rows in tables.items() for row in rows]
            return _rows(name, entries, "JSON array")
        if tables:
            held = ", ".join(tables)
            raise DataError(f"{name}: the document holds several lists ({held}); save the one that is meant")
        return _lists(name, _flat(document))
    if _is_table(document):
        return _rows(name, document, "JSON array")
    raise DataError(f"{name}: the JSON document holds no list of objects and no object of lists")


def _is_place(key: str) -> bool:
    """Whether a key is a whole number, as of an epoch or a row."""
    return key.isascii() and key.isdecimal() and len(key) < 10


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _rows(name: str, records: Sequence[Mapping[str, Any]], form: str) -> Document:
    """A list of objects; a row's line is its place in the list, counted from 1."""
    records = [_flat(record) for record in records]
    columns = RecordColumns(records, np.arange(1, len(records) + 1))
    return Document(name, BY_NAME[form], columns, axes_of(columns.names), *_named(columns), mode=_mode(columns))


def _lists(name: str, document: Mapping[str, Any]) -> Document:
    """An object of lists: the place in a list is the epoch, unless one of them is."""
    lists = {key.removeprefix("history/"): value for key, value in document.items() if isinstance(value, list)}
    if not lists:
        raise DataError(f"{name}: the JSON document holds no list of objects and no object of lists")
    lengths = {key: len(value) for key, value in lists.items()}
    longest = max(lengths.values())
    short = [key for key, length in lengths.items() if length != longest]
    if short:
        raise DataError(
            f"{name}: its lists have different lengths ({short[0]}: {lengths[short[0]]}, others {longest}),"
            " so places in them are no epochs"
        )
    axes = axes_of(list(lists))
    if not axes:
        lists, axes = {**lists, "epoch": list(range(1, longest + 1))}, (("epoch", "epochs"),)
    records = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    columns = RecordColumns(records, np.arange(1, longest + 1))
    form = "Keras history" if not axes_of(list(document)) and "epoch" not in document else "JSON array"
    return Document(name, BY_NAME[form], columns, axes, *_named(columns))
