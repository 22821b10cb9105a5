"""Which series of a log is the score: by the evidence of names, and only if it leaves no other; else it is asked for.

The rules, in this order:

1. A name that is asked for is taken, however unusual; what it is must then be stated, if its name does not tell.
2. Accuracies (with ``lower_is_better`` errors, then losses) of validation or test images come before those whose name
   has no split; accuracies of training images are never taken unasked. ``score`` counts where no accuracy is.
3. Top-1 only; no best values so far, no values of single batches; the model before its moving average.
4. What is left must be one series; several logs must have the same one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.names import Metric, metric_of, mode_of
from mto_analysis.rauc.logs.records import Document, Finding, Series

#: Words of columns that measure no model: val_time is no sign of a validation metric.
_BESIDE = {"time", "lr", "runtime", "seconds", "second", "speed", "samples", "steps", "mem", "memory", "eta"}


@dataclass(frozen=True)
class Request:
    """What is asked of one log.

    Attributes:
        score: Name of the series.
        lower_is_better: Whether errors or losses are wanted.
        own: Whether the name was given for this log alone.
    """

    score: str | None = None
    lower_is_better: bool = False
    own: bool = False


def series_of(document: Document) -> list[Series]:
    """All series of a document: its columns without axes, methods and seeds, by mode where rows have one."""
    aside = {document.method, document.seed, document.mode, *(axis for axis, _ in document.axes)}
    names = [name for name in document.columns.names if name not in aside]
    if document.scores is not None:
        names = [name for name in names if name in document.scores]
    metrics = {name: metric_of(name) for name in names}
    if any(each.rank == 0 for each in metrics.values()):  # val_acc_0, val_acc_1: places in a list, no top-1
        metrics = {
            name: each if each.rank is None else replace(each, rank=None, rest=(*each.rest, str(each.rank)))
            for name, each in metrics.items()
        }
    unmarked = document.unmarked or document.format.unmarked or _unmarked_split(metrics.values())
    known = set(metrics.values())
    metrics = {
        name: each if each.split or each.kind == "score" else each.of(_split_beside(each, known) or unmarked)
        for name, each in metrics.items()
    }
    plain = [Series(name, name, metrics[name]) for name in names]
    if document.mode is None:
        return plain + [
            Series(name, column, metrics[column], method=method) for name, (column, method) in document.aliases.items()
        ]
    modes = [str(each) for each in document.columns.labels(document.mode).categories if each]
    meanings = {mode: mode_of(document.mode.lower(), mode) for mode in modes}
    if not any(any(meaning) for meaning in meanings.values()):
        return plain
    return [
        Series(f"{mode}/{name}", name, metric_of(name).of(*meanings[mode]), mode=mode)
        for name in names
        for mode in modes
    ]


def _split_beside(metric: Metric, others: Set[Metric]) -> str | None:
    """What comes with and without ``val_`` is of training images where it comes without; unless these come too."""
    splits = {split for split in ("train", "val", "test") if metric.of(split) in others}
    return "train" if splits and "train" not in splits else None


def _unmarked_split(metrics: Iterable[Metric]) -> str | None:
    """The split of names without one: beside ``val_loss`` alone it is training, beside ``train_loss`` it is not."""
    splits = {metric.split for metric in metrics if not _BESIDE & set(metric.rest)}
    if "train" in splits:
        return "val"
    return "train" if {"val", "test"} & splits else None


def rows_of(document: Document, series: Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values of the series' column, and which rows of the document are the series'."""
    values, there = document.columns.numbers(series.column)
    for column, value in ((document.mode, series.mode), (document.method, series.method)):
        if column is not None and value is not None:
            there = there & np.asarray(document.columns.labels(column) == value)
    return values, there


def _points(document: Document, series: Series) -> int:
    """How many rows have a value."""
    return int(rows_of(document, series)[1].sum())


def _usable(document: Document, series: Series) -> bool:
    try:
        return _points(document, series) > 1
    except DataError:
        return False


def _preferred(series: list[Series], better: Callable[[Series], bool]) -> list[Series]:
    """The better ones, if there are any and a choice is left."""
    return (len(series) > 1 and [each for each in series if better(each)]) or series


def _eligible(document: Document, lower: bool) -> list[Series]:
    """Series that may be taken unasked, the equally good ones only."""
    found = [
        each for each in series_of(document)
        if each.method is None and not each.metric.best and not each.metric.batch and each.metric.split != "train"
    ]  # fmt: skip
    for kind in ("error", "loss") if lower else ("accuracy", "score"):
        kept = [each for each in found if each.metric.kind == kind and each.metric.rank in (None, 1)]
        kept = _preferred(kept, lambda each: _usable(document, each))
        kept = _preferred(kept, lambda each: each.metric.split is not None)
        kept = _preferred(kept, lambda each: each.metric.weights == "model")
        kept = _preferred(kept, lambda each: not each.metric.rest)
        if len(set(map(_identity, kept))) == 1:  # perf/test_acc1 of MAE's board beside somebody's test/acc1
            kept = _preferred(kept, lambda each: _is_own(document, each))
        if kept:
            return kept
    return []


def _is_own(document: Document, series: Series) -> bool:
    """Whether the column is one that all writers of the format have."""
    return bool(document.format.percent and re.fullmatch(document.format.percent, series.column))


def has_curve(document: Document) -> bool:
    """Whether an accuracy can be taken from it unasked."""
    return any(_usable(document, each) for each in _eligible(document, False))


def _named(document: Document, request: Request) -> Series:
    """The series that an option names: by its full name, its column, or either in another case."""
    every = series_of(document)
    wanted = (request.score or "").strip()
    for spelling in (str, str.lower):
        found = [each for each in every if spelling(each.name) == spelling(wanted)] or [
            each for each in every if spelling(each.column) == spelling(wanted) and each.method is None
        ]
        held = [each for each in found if each.metric.split != "train"]
        if len(found) > 1 and len(held) == 1:
            return held[0]
        if len(found) == 1 and found[0].method is not None and not request.own:
            raise DataError(
                f"{document.file}: {wanted!r} is of one run; --score-column {found[0].column!r} takes it of all runs,"
                f" and --log 'NAME=FILE[score={wanted}]' of this one"
            )
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(each.name for each in found)
            raise DataError(f"{document.file}: {wanted!r} is of several kinds of rows; name one: {names}")
    if wanted in document.columns.names:  # an axis as a score, which somebody may want
        return Series(wanted, wanted, metric_of(wanted))
    more = "" if request.own else "; a name for one log alone is given by --log 'NAME=FILE[score=...]'"
    raise DataError(f"{document.file}: there is no column {wanted!r}; it has {_all_names(document)}{more}")


def _all_names(document: Document) -> str:
    return ", ".join(dict.fromkeys(document.columns.names)) or "none"


def choose(documents: Sequence[Document], requests: Sequence[Request]) -> tuple[list[Series], list[Finding]]:
    """One series of each document, all of the same metric, and what to know about the choice."""
    options: list[list[Series]] = []
    for document, request in zip(documents, requests, strict=True):
        if request.score is not None:
            options.append([_named(document, request)])
        else:
            options.append(_eligible(document, request.lower_is_better) or _refuse_none(document, request))
            _refuse_score_beside_training(document, options[-1])
    common = set.intersection(*({_identity(each) for each in series} for series in options)) if options else set()
    if len(common) == 1:
        options = [
            [each for each in series if _identity(each) in common] if len(series) > 1 else series for series in options
        ]
    findings: list[Finding] = []
    for document, series, request in zip(documents, options, requests, strict=True):
        asked = document.format.ask and request.score is None
        several = _accuracies(document) if asked and len(series) == 1 else series
        if len(several) > 1:
            names = ", ".join(repr(each.name) for each in several)
            raise DataError(
                f"{document.file}: it has {names}, and nothing tells which is meant; name one with --score-column"
                " (or for this log alone with --log 'NAME=FILE[score=...]')"
            )
        findings += _unread(document, series[0])
        if request.score is None:
            findings += _maybe_of_training(document, series[0])
    chosen = [series[0] for series in options]
    findings += _refuse_different(documents, chosen, requests)
    return chosen, findings


def _accuracies(document: Document) -> list[Series]:
    return [each for each in series_of(document) if each.metric.is_top1 and each.method is None]


def _identity(series: Series) -> tuple[object, ...]:
    metric = series.metric
    return metric.kind, 1 if metric.rank is None else metric.rank, metric.split, metric.weights, metric.rest


def _refuse_none(document: Document, request: Request) -> list[Series]:
    """Say why no series can be taken."""
    every = [each for each in series_of(document) if each.method is None]
    training = [each.name for each in every if each.metric.split == "train" and each.metric.is_top1]
    below = [
        each.name
        for kind in ("error", "loss")
        for each in every
        if each.metric.kind == kind and each.metric.split != "train"
    ]
    passed = {each.name: _passed_over(each.metric) for each in every if each.metric.kind == "accuracy"}
    if request.lower_is_better:
        told = "no error and no loss found; name its column with --score-column"
    elif training:
        unread = [
            each.name for each in every if each.metric.split in ("val", "test") and not _BESIDE & set(each.metric.rest)
        ]
        beside = f", while {', '.join(unread)} is of other images" if unread else ""
        told = (
            f"the only accuracy, {', '.join(training)}, looks like that of training images{beside};"
            " take it, if it is meant, with --score-column"
        )
    elif below:
        told = (
            f"no accuracy found; {below[0]} is an error or a loss: take it with --score-column {below[0]!r}"
            " --lower-is-better"
        )
    elif passed:
        which = ", ".join(f"{name} is {why}" for name, why in passed.items())
        told = f"no accuracy found that is of epochs and top-1: {which}; take one, if it is meant, with --score-column"
    else:
        told = "no accuracy found (a pre-training log?); name its column with --score-column"
    raise DataError(f"{document.file}: {told}; it has {_all_names(document)}")


def _passed_over(metric: Metric) -> str:
    """Why an accuracy that is not of training images is never taken unasked."""
    if metric.best:
        return "the best one so far"
    return "of single batches" if metric.batch else f"top-{metric.rank if (metric.rank or 0) > 0 else 'k'}"


def _refuse_score_beside_training(document: Document, series: Sequence[Series]) -> None:
    """A column called score is the score of a tidy table; beside accuracies and other scores it may be anything."""
    if series[0].metric.kind == "score":
        others = [
            each.name for each in series_of(document) if each.metric.kind == "accuracy" or "score" in each.metric.rest
        ]
        if others:
            raise DataError(
                f"{document.file}: it has 'score' and {', '.join(map(repr, others))}, and nothing tells which is meant;"
                " name one with --score-column"
            )


def _unread(document: Document, series: Series) -> list[Finding]:
    """What else there is that a reader may have meant."""
    metric = series.metric
    every = [each for each in series_of(document) if each.method is None and each.column != series.column]
    if metric.split == "train" and metric.kind != "score":
        others = [
            each.name for each in every if each.metric.split in ("val", "test") and each.metric.kind == metric.kind
        ]
        if others:
            told = f"{series.name!r} is of training images; {', '.join(others)} is not read"
            return [Finding(document.file, None, told)]
    scores = [each.name for each in every if each.metric.kind == "score"]
    if scores and metric.is_top1:
        return [Finding(document.file, None, f"{scores[0]!r} is not read, as {series.name!r} says what it is")]
    if metric.weights == "model" and metric.is_top1:
        others = [
            each.name for each in every if each.metric.weights == "EMA" and _identity(each)[:3] == _identity(series)[:3]
        ]
        if others:
            return [Finding(document.file, None, f"{', '.join(others)} (EMA weights) is not read")]
    return []


def _maybe_of_training(document: Document, series: Series) -> list[Finding]:
    """An accuracy and a loss without a split are what Keras calls those of training images."""
    losses = [each.name for each in series_of(document) if each.metric.kind == "loss" and each.metric.split is None]
    if series.metric.kind != "accuracy" or series.metric.split is not None or not losses:
        return []
    told = (
        f"nothing tells of which images {series.name!r} is; beside {losses[0]!r} alone it may be of the training ones"
    )
    return [Finding(document.file, None, told)]


def _refuse_different(
    documents: Sequence[Document], chosen: Sequence[Series], requests: Sequence[Request]
) -> list[Finding]:
    """The logs' metrics must be the same, unless each was named for its log."""
    findings: list[Finding] = []
    for other in range(1, len(chosen)):
        first = next((at for at in range(other) if not _comparable(documents, chosen, (at, other))), None)
        if first is None:
            continue
        one, two = (f"{documents[at].file} has {chosen[at].name!r}" for at in (first, other))
        if requests[first].own or requests[other].own:
            findings.append(Finding(documents[other].file, None, f"{two}, {one}: different metrics, as asked"))
            continue
        raise DataError(
            f"{one}, {two}: these are different metrics, or nothing tells that they are the same;"
            " name each with --log 'NAME=FILE[score=...]'"
        )
    return findings


def _comparable(documents: Sequence[Document], chosen: Sequence[Series], pair: tuple[int, int]) -> bool:
    """Whether two series are of one metric; ``test_acc1`` of MAE and its relatives is a validation accuracy."""
    one, two = (documents[at] for at in pair)
    first, second = (chosen[at] for at in pair)
    if first.metric.kind != second.metric.kind:
        # The score of a tidy table is what its author calls the score: it says no less than the other's name.
        return {first.metric.kind, second.metric.kind} == {"score", "accuracy"}
    if _identity(first) == _identity(second):
        return True
    if one.format == two.format or "score" in (first.metric.kind, second.metric.kind):
        return first.metric.kind == "score"
    known = [
        replace(series, metric=series.metric.of("val")) if _means_validation(document, series) else series
        for document, series in ((one, first), (two, second))
    ]
    return _identity(known[0]) == _identity(known[1])


def _means_validation(document: Document, series: Series) -> bool:
    if not document.format.test_is_val or series.metric.split != "test":
        return False
    return series.column.rpartition("/")[2].endswith(("test_acc1", "test_acc5")) and not any(
        each.metric.split == "val" and each.metric.kind != "other" for each in series_of(document)
    )
