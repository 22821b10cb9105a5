"""From a path to a decoded document: encodings, compression, spreadsheets, folders of runs; the format by content."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs import events, jsonlog, tables, textlog
from mto_analysis.rauc.logs.choosing import has_curve
from mto_analysis.rauc.logs.records import Document
from mto_analysis.runtime.plugins import plugins

_HEAD = 65536
#: A compressed log of more than this is no log.
_LARGEST = 1 << 31
#: Names under which trainers leave the log of a run.
_LOG_NAMES = (
    *("*tfevents*", "log.txt", "log_rank0.txt", "*.log", "*.jsonl", "*.log.json", "scalars.json", "trainer_state.json"),
    *("history.json", "*.csv", "metrics/*", "*/metrics/*"),
)
#: What trainers print that also leave a log: a plain search, which is fast, then the line, and what to give instead.
_PRINTED = {
    "the Trainer of Hugging Face": (
        b"'epoch': ",
        re.compile(rb"^\{'(?:eval_)?loss': [^\n]*'epoch': ", re.MULTILINE),
        "trainer_state.json, which it saves with every checkpoint",
    ),
    "Keras": (
        b" - loss: ",
        re.compile(rb"^ *\d+/\d+ [^\n]*\d+m?s[^\n]* - (?:[\w ]+: [\d.e+-]+ - )*loss: ", re.MULTILINE),
        "the CSV file of keras.callbacks.CSVLogger",
    ),
}
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def open_log(path: str | Path, wanted: Collection[str] = ()) -> Document:
    """Decode any log whose format is known.

    Args:
        path: A file, or the folder of a run.
        wanted: Methods that are compared: a table may have columns called like them.
    """
    path = Path(path)
    try:
        raw = None if path.is_dir() else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such log") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in a path of a list of logs
        raise DataError(f"{str(path)!r}: cannot be read ({error})") from error
    if raw is None:
        return _open_folder(path, wanted)
    return replace(_decode(path, raw, wanted), sha256=hashlib.sha256(raw).hexdigest())


def _decode(path: Path, raw: bytes, wanted: Collection[str]) -> Document:
    """The document in a file's bytes."""
    name = str(path)
    if raw[:2] == b"\x1f\x8b":
        raw = _unzipped(name, raw)
    if not raw or raw.isspace():
        raise DataError(f"{name}: the file is empty")
    for trainer, (mark, line, instead) in _PRINTED.items():
        if mark in raw and line.search(raw):
            raise DataError(f"{name}: this is what {trainer} prints, which is not read; give {instead}")
    if events.is_events(raw[:_HEAD]):
        return events.read_events(name, [path])
    if raw[:4] == b"PK\x03\x04":
        return tables.read_table(name, _sheet(name, raw), wanted)
    data = _text(name, raw)
    if not data.strip():
        raise DataError(f"{name}: the file is empty")
    head = data[:_HEAD]
    if jsonlog.is_json(head):
        return jsonlog.read_json(name, data)
    if tables.is_table(head):
        return tables.read_table(name, data, wanted)
    if textlog.is_text_log(data):
        return textlog.read_text_log(name, data)
    if textlog.is_open_mmlab_text(data):
        return textlog.read_open_mmlab_text(name, data)
    if textlog.is_metric_file(data):
        return textlog.read_metric_file(name, data)
    return _by_plugin(name, data) or tables.read_table(name, data, wanted)


def _by_plugin(name: str, data: bytes) -> Document | None:
    """What the first format of another distribution that fits makes of a text; ours come before."""
    for plugin in plugins("log_formats"):
        if plugin.call(lambda: plugin.value.matches(data)):  # noqa: B023 - called at once
            document = plugin.call(lambda: plugin.value.read(name, data))  # noqa: B023 - called at once
            if isinstance(document, Document):
                return document
    return None


def _unzipped(name: str, raw: bytes) -> bytes:
    """The content of a .gz file, of one part or several."""
    parts, size = [], 0
    while raw:
        stream = zlib.decompressobj(wbits=31)
        try:
            parts.append(stream.decompress(raw, _LARGEST - size))
        except zlib.error as error:
            raise DataError(f"{name}: the compressed file is damaged ({error})") from error
        size += len(parts[-1])
        if stream.unconsumed_tail or size >= _LARGEST:
            raise DataError(f"{name}: it holds more than {_LARGEST >> 30} GiB")
        if not stream.eof:
            raise DataError(f"{name}: the compressed file is cut")
        raw = stream.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _text(name: str, raw: bytes) -> bytes:
    r"""Text as UTF-8 without a byte order mark, lines ending with ``\n``."""
    mark = next((each for each in _BOMS if raw.startswith(each[0])), None)
    if mark is None and raw[:1] != raw[1:2] and b"\0" in raw[:2] and raw[:8].count(b"\0") == 4:
        mark = (b"", "utf-16-be" if raw[:1] == b"\0" else "utf-16-le")
    if mark is not None and mark[1] != "utf-8":
        try:
            raw = raw.decode(mark[1]).encode()
        except UnicodeDecodeError:
            raise DataError(f"{name}: this is neither UTF-8 nor UTF-16 text") from None
    elif mark is not None:
        raw = raw[len(mark[0]) :]
    if b"\0" in raw[:_HEAD]:
        raise DataError(f"{name}: this is neither text nor a TensorBoard event file")
    # A lone CR ends lines of old spreadsheets, and redraws a progress bar.
    return raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw


def _sheet(name: str, raw: bytes) -> bytes:
    """The one filled sheet of an .xlsx file as CSV."""
    try:
        inside = zipfile.ZipFile(io.BytesIO(raw)).namelist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise DataError(f"{name}: the zip file is damaged ({error})") from error
    if not any(each.startswith("xl/") for each in inside):
        raise DataError(f"{name}: a zip file that is no spreadsheet; unpack it and name the log")
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f"{name}: reading .xlsx needs the package openpyxl (pip install 'mto-analysis[spreadsheets]');"
            " or save the sheet as CSV"
        ) from None
    try:
        book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
        sheets = {sheet.title: list(sheet.values) for sheet in book.worksheets}
    except Exception as error:  # openpyxl lets the errors of zip, XML and of itself through
        raise DataError(f"{name}: the spreadsheet cannot be read ({' '.join(str(error).split())[:100]})") from error
    filled = {title: rows for title, rows in sheets.items() if any(cell is not None for row in rows for cell in row)}
    if len(filled) != 1:
        raise DataError(
            f"{name}: {len(filled)} sheets hold something ({', '.join(filled)}); save the one that is meant as CSV"
            if filled
            else f"{name}: the file is empty"
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(next(iter(filled.values())))
    return text.getvalue().encode()


def _open_folder(path: Path, wanted: Collection[str]) -> Document:
    """The log of a run's folder: the only one in it, or the only one of which a curve can be read."""
    patterns = [depth + name for name in _LOG_NAMES for depth in ("", "*/", "*/*/")]
    found = dict.fromkeys(file for pattern in patterns for file in sorted(path.glob(pattern)))
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    folders = sorted({file.parent for file in files if "tfevents" in file.name})
    candidates: dict[str, Document] = {}
    reasons = []
    for run in folders:
        parts = sorted(run.glob("*tfevents*"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in parts)).hexdigest()
        name = str(run if run != path or len(parts) > 1 else path)
        try:
            document = replace(events.read_events(name, parts), sha256=digest)
        except DataError as error:
            if len(folders) == len(files):
                raise
            reasons.append(str(error))
            continue
        candidates.setdefault(digest, document)
    states = [file for file in files if file.name == "trainer_state.json"]
    if states:  # the state of the highest step holds all earlier history
        newest = max(states, key=lambda file: int((re.findall(r"checkpoint-(\d+)", str(file.parent)) or [1 << 60])[-1]))
        files = [file for file in files if file not in states or file == newest]
    for file in files:
        if "tfevents" in file.name:
            continue
        try:
            document = open_log(file, wanted)
        except DataError as error:
            reasons.append(str(error))
            continue
        # The same lines again count once, unless the file's name tells what they are.
        candidates.setdefault(f"{document.sha256} {document.scores}", document)
    useful = [each for each in candidates.values() if has_curve(each)] or list(candidates.values())
    if len(useful) > 1:
        held = ", ".join(each.file for each in useful)
        raise DataError(f"{path}: the folder holds {len(useful)} logs; name one: {held}")
    if not useful:
        if len(reasons) == 1:
            raise DataError(reasons[0])
        raise DataError(
            f"{path}: the folder holds no TensorBoard event file and no other log that can be read; name the log itself"
        )
    return useful[0]
