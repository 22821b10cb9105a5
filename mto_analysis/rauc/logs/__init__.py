"""Scores per epoch from what trainers write: each file is decoded, its score chosen by evidence, and reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mto_analysis.rauc.logs.choosing import Request, choose
from mto_analysis.rauc.logs.extracting import extract
from mto_analysis.rauc.logs.formats import FORMATS, Format
from mto_analysis.rauc.logs.provenance import Provenance
from mto_analysis.rauc.logs.reading import open_log
from mto_analysis.rauc.logs.records import Document, Finding, Log, LogFormat, RecordColumns

__all__ = [
    "FORMATS",
    "Document",
    "Finding",
    "Format",
    "Log",
    "LogFormat",
    "Provenance",
    "RecordColumns",
    "Request",
    "choose",
    "extract",
    "open_log",
    "read_log",
]


def read_log(
    path: str | Path,
    *,
    score_column: str | None = None,
    epoch_column: str | None = None,
    method_column: str | None = None,
    seed_column: str | None = None,
) -> Log:
    """Read one log of any known format.

    Args:
        path: The file, or the folder of a run.
        score_column: Name of the score, if its name does not tell.
        epoch_column: Name of the epoch.
        method_column: Name of a table's method column.
        seed_column: Name of a table's seed column.
    """
    document = open_log(path)
    (series,), findings = choose([document], [Request(score_column)])
    log = extract(document, series, epoch_column=epoch_column, method_column=method_column, seed_column=seed_column)
    return replace(log, findings=(*findings, *log.findings))
