"""Text logs: an accuracy's line carries no epoch, or names it in brackets; and MLflow's files of one metric."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.formats import BY_NAME
from mto_analysis.rauc.logs.provenance import AxisKind
from mto_analysis.rauc.logs.records import Document, RecordColumns, grouped


class _Accuracy(NamedTuple):
    """An accuracy line: ``trained`` counts the epochs before it, ``tested`` says whether a test was seen since."""

    epoch: int
    score: float
    line: int
    trained: int
    ema: bool
    tested: bool


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EPOCH = re.compile(
    r"EPOCH (\d{1,9}) training takes|Epoch:? ?\[(\d{1,9})\] Total time|Epoch:? ?\[(\d{1,9})\]\[ *\d+/\d+\]"
)
_ACCURACY = re.compile(r"(?:\*(?: *[A-Za-z]+)?|\b(?:Test|Val|Eval)\w*:(?: *EMA)?) +(Acc|Prec)@1:? +(\S+)")
_OF_EMA = re.compile(r"\bema\b", re.IGNORECASE)
_OF_TEST = re.compile(r"\b(?:Test|Val|Eval)(?:[a-z]*\b)|\b(?:TEST|VALIDATION)\b")
_OF_TRAINING = re.compile(r"\b(Train(ing)?|TRAIN)\b")
_VALIDATION = re.compile(r"\b(Epoch|Iter)\(val\) *\[ *(\d{1,9})(?:/ *\d+)?\](?:\[ *\d+(?:/ *\d+)?\])?(.*)")
_ITERATION = re.compile(r"\bIter(?:\(train\))? *\[ *(\d{1,9})/\d+\]")
_PAIR = re.compile(r"([A-Za-z][\w/.@-]*): ([-+]?[\d.]+(?:e[-+]?\d+)?|nan|inf)(?=[\s,]|$)")
_BESIDE = ("eta", "time", "data_time", "memory")
_TEXT_LOG = re.compile(rb"EPOCH \d+ training takes|(?:\*(?: *[A-Za-z]+)?|:|: *EMA) +(?:Acc|Prec)@1:? ")
_HEAD = 1 << 14
_METRIC_LINE = re.compile(rb"\d{12,14} \S+(?: \d+)?")


def is_text_log(data: bytes) -> bool:
    """Whether there are accuracy lines, or lines of finished epochs, as PyTorch's examples and SimMIM write them."""
    # Plain searches first: the patterns take a second for a table of a million rows.
    return (b"training takes" in data or b"@1" in data) and _TEXT_LOG.search(data) is not None


def is_open_mmlab_text(data: bytes) -> bool:
    """Whether there are validation lines of OpenMMLab's loggers."""
    return b"(val)" in data and re.search(rb"(?:Epoch|Iter)\(val\) *\[ *\d+", data) is not None


def is_metric_file(data: bytes) -> bool:
    """Whether every line is time in ms, value and step."""
    return all(_METRIC_LINE.fullmatch(line.strip()) for line in data[:_HEAD].strip().split(b"\n")[:50])


def _numbered_lines(data: bytes) -> Iterator[tuple[int, str]]:
    """Lines without the colours of a terminal, counted from 1."""
    for number, line in enumerate(data.decode(errors="replace").split("\n"), 1):
        yield number, _COLOUR.sub("", line) if "\x1b" in line else line


def read_text_log(name: str, data: bytes) -> Document:
    """Accuracy lines, each with the epoch that finished last before it.

    A resumed run evaluates the loaded weights before it trains on; that line repeats an epoch and is left out. An
    accuracy without training since the one before it is of the EMA weights, if the lines say so, or a repetition.
    """
    epoch: int | None = None
    loaded = ema = tested = False
    trained = 0
    rows: list[_Accuracy] = []
    homeless: list[int] = []
    spelt = "Acc@1"
    for number, line in _numbered_lines(data):
        if "Resuming from" in line:
            loaded = True
        elif "Start training" in line:
            loaded = False
        elif accuracy := _ACCURACY.search(line):
            if _OF_TRAINING.search(line[: accuracy.start(1)]):
                continue
            tested = tested or bool(_OF_TEST.search(line[: accuracy.start(1)]))
            if epoch is None or loaded:
                homeless.append(number)
                continue
            try:
                spelt = f"{accuracy[1]}@1"
                score, of_ema = float(accuracy[2].rstrip(",;%")), ema or bool(_OF_EMA.search(line))
                rows.append(_Accuracy(epoch, score, number, trained, of_ema, tested))
            except ValueError:
                raise DataError(f"{name}:{number}: {accuracy[2][:60]!r} is not an accuracy") from None
        elif finished := _EPOCH.search(line):
            if not re.search(r"\b(Test|Val|Eval)\w*:", line[: finished.start()]):
                epoch, loaded, ema, tested = int(finished[1] or finished[2] or finished[3]), False, False, False
                trained += 1
        elif rows and "EMA" in line and re.search("accuracy", line, re.IGNORECASE) and rows[-1].epoch == epoch:
            rows[-1] = rows[-1]._replace(ema=True)
        elif _OF_EMA.search(line) and re.search(r"\b(test|val|eval)", line, re.IGNORECASE):
            ema = True
        else:
            tested = tested or bool(_OF_TEST.search(line))
    if not rows:
        raise DataError(f"{name}: no accuracy line (* Acc@1 ...) follows a finished epoch")
    # Records, where a written NaN is a value: in a frame it would be none.
    records = [{"epoch": row.epoch, name: row.score} for row, name in zip(rows, _names(rows, spelt), strict=True)]
    columns = RecordColumns(records, np.array([row.line for row in rows]))
    progress = np.array([row.trained for row in rows])
    return Document(
        name, BY_NAME["text"], columns, axes=(("epoch", "epochs"),), progress=progress,
        findings=tuple(grouped(name, homeless, "skipped: an accuracy before training started or went on")),
    )  # fmt: skip


def _names(rows: Sequence[_Accuracy], spelt: str) -> list[str]:
    """What each line's accuracy is called.

    Two different accuracies after most epochs are two series: of training where the lines before say so, else ``#1``
    and ``#2``, between which the reader must choose.
    """
    after: dict[int, list[_Accuracy]] = {}
    for row in rows:
        if not row.ema:
            after.setdefault(row.trained, []).append(row)
    several = [each for each in after.values() if len({row.score for row in each}) > 1]
    names = {True: f"EMA {spelt}", False: spelt}
    if len(several) < 2 or 2 * len(several) <= len(after):
        return [names[row.ema] for row in rows]
    if all(each[-1].tested and not each[0].tested for each in several):
        return [names[row.ema] if row.ema or row.tested else f"training {spelt}" for row in rows]
    place = {row.line: at for each in after.values() for at, row in enumerate(each, 1)}
    return [names[True] if row.ema else f"{spelt} #{place[row.line]}" for row in rows]


def read_open_mmlab_text(name: str, data: bytes) -> Document:
    """Validation lines with their metrics; the first bracket is the epoch, or the iteration of ``Iter(val)``."""
    rows, lines = [], []
    words = set()
    iteration = 0
    for number, line in _numbered_lines(data):
        if training := _ITERATION.search(line):
            iteration = int(training[1])
        found = _VALIDATION.search(line)
        if found is None:
            continue
        try:
            values = {key: float(value) for key, value in _PAIR.findall(found[3]) if key not in _BESIDE}
        except ValueError as error:
            raise DataError(f"{name}:{number}: a metric is not a number ({str(error)[:80]})") from None
        if values:
            words.add(found[1])
            # The bracket of Iter(val) is a validation batch: the iteration is in the training line before it.
            place = iteration if found[1] == "Iter" and iteration else int(found[2])
            rows.append((place, values))
            lines.append(number)
    if not rows:
        raise DataError(f"{name}: no validation line has a metric")
    if len(words) > 1:
        raise DataError(f"{name}: validation lines count epochs and iterations; give the JSON log of the run")
    kind: AxisKind = "epochs" if words == {"Epoch"} else "steps"
    records = [{**values, kind[:-1]: place} for place, values in rows]
    columns = RecordColumns(records, np.array(lines))
    return Document(name, BY_NAME["OpenMMLab text"], columns, axes=((kind[:-1], kind),))


def read_metric_file(name: str, data: bytes) -> Document:
    """One metric of an MLflow run, called like its file."""
    score = name.replace("\\", "/").rpartition("/")[2]
    records = []
    for number, line in enumerate(data.decode(errors="replace").strip().split("\n"), 1):
        parts = line.split()
        try:
            records.append({score: float(parts[1])} | ({"step": float(parts[2])} if len(parts) > 2 else {}))
        except (ValueError, IndexError):
            raise DataError(f"{name}:{number}: a line must be time, value and step, got {line[:60]!r}") from None
    columns = RecordColumns(records, np.arange(1, len(records) + 1))
    if "step" not in columns.names:
        raise DataError(f"{name}: its lines have no step")
    return Document(name, BY_NAME["MLflow metric"], columns, axes=(("step", "steps"),), scores=(score,))
