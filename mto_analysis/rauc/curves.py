"""The tidy curve table ``method epoch score seed`` from any number of logs; what was odd is named by file and line.

What is done to the rows of one file is in :mod:`mto_analysis.rauc.logs.tidying`; here files become one table.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import union_categoricals

from mto_analysis.errors import DataError
from mto_analysis.rauc.areas import Points
from mto_analysis.rauc.logs import Finding, Log, Request, choose, extract, open_log
from mto_analysis.rauc.logs.counting import Counted, EpochCount, count_alike
from mto_analysis.rauc.logs.provenance import AXIS_NAMES, Provenance, axis_label, score_label
from mto_analysis.rauc.logs.records import grouped
from mto_analysis.rauc.logs.tidying import Unit, curve_starts, tidy
from mto_analysis.runtime.settings import Options, Positive, Reader, Settings, Within

#: File names that say nothing about the method; the folder's name does.
_NAMELESS = ("log", "log_rank0", "summary", "metrics", "trainer_state", "scalars", "events")


@dataclass(frozen=True)
class Source(Settings):
    """A log, and where the file does not say so itself, whose it is and how to read it.

    Attributes:
        path: The file, or the folder of a run.
        method: The method's name.
        seed: The run's seed.
        score: Name of the score, for this log alone.
        epoch: Name of the epoch.
        run: Which run of a file that holds several: its place from 1 (-1 is the last) or its name.
        unit: ``percent``, ``fraction`` or ``raw``.
        steps_per_epoch: What to divide steps by.
        first_epoch: The number of the first epoch, 0 or 1, if neither the format nor the file tells; all logs of the
            comparison are then counted as epochs completed.
    """

    path: Path
    method: str | None = None
    seed: str | None = None
    score: str | None = None
    epoch: str | None = None
    run: str | None = None
    unit: Literal["percent", "fraction", "raw"] | None = None
    steps_per_epoch: Positive | None = None
    first_epoch: Annotated[int, Within("[0, 1]")] | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read the command line's form, ``[NAME[@SEED]=]FILE[[option=value,...]]``; an existing file is that file.

        Example:
            >>> Source.parse("MAE@2=runs/log.txt[score=test_acc1,unit=percent]").score
            'test_acc1'
            >>> Source.parse("MAE@2=runs/log.txt").seed
            '2'
        """
        if _exists(text):
            return cls(Path(text))
        bare, options = text, {}
        if found := re.fullmatch(r"(.+?)\[([a-z-]+=.*)\]", text, re.DOTALL):
            bare = found[1]
            pairs = (part.partition("=") for part in re.split(r",(?=[a-z-]+=)", found[2]))
            options = {key: value for key, _, value in pairs}
        name, equals, path = bare.partition("=")
        if not equals or not name or _exists(bare):
            return cls.of({"file": bare, **options}, text)
        method, at, seed = name.rpartition("@")
        named = {"method": method, "seed": seed} if at and method else {"method": name}
        return cls.of({"file": path, **named, **options}, text)

    @classmethod
    def of(cls, options: Mapping[str, Any], where: str) -> Source:
        """A log from its options by name, as a TOML list has them."""
        given = {key.replace("-", "_"): str(value) for key, value in options.items()}
        reader = Reader(where, {}, Options(given, where), error=DataError)
        return reader.read(cls, path=reader.take("file", Path))

    def name(self, wanted: Collection[str] = ()) -> str:
        """The method's name: the given one, else the file's (or its folder's, where files are all called log.txt)."""
        if self.method is not None:
            return self.method
        for other in (str(self.path), self.path.name):
            if other in wanted:
                return other
        stem = self.path.stem
        if stem in wanted or stem.split(".")[0] not in _NAMELESS:
            return stem
        return self.path.resolve().parent.name or stem


def _exists(text: str) -> bool:
    """Whether there is a file of this name; a text that can be no name is none."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def listed_sources(path: Path) -> list[Source]:
    """The logs of a TOML list: tables ``[[log]]`` with ``file``, ``method``, ``seed`` and the options of a log.

    Files are relative to the list.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: the list of logs cannot be read ({error})") from error
    entries = content.pop("log", None)
    if content or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: a list of logs holds tables [[log]] and nothing else")
    sources = [Source.of(entry, f"{path}: log {at}") for at, entry in enumerate(entries, 1)]
    return [replace(source, path=path.parent / source.path) for source in sources]


@dataclass(frozen=True)
class CurveTable:
    """Curves ready to be compared.

    Attributes:
        frame: ``method epoch score seed`` and grouping columns, sorted, one row per epoch of a run.
        findings: What a reader of a result should know about the files.
        origin: Where training starts on the epoch axis: -1 where the first epoch is called 0, else 0.
        fraction: True if every file had scores from 0 to 1; the frame has them in percent.
        axis: ``epoch``, ``step``, or what :func:`on_axis` put in its place.
        provenance: What was read from each log.
    """

    frame: pd.DataFrame
    findings: tuple[Finding, ...] = ()
    origin: float = 0.0
    fraction: bool = False
    axis: str = "epoch"
    groups: tuple[str, ...] = field(default=())
    provenance: tuple[Provenance, ...] = ()

    @property
    def score_label(self) -> str:
        """The label of the score axis, from what was read."""
        return score_label(self.provenance)

    def as_score(self, value: float) -> float:
        """A score as the logs write it, on the curves' scale: in percent, and turned round where lower is better.

        Beside scores that are all from 0 to 1 a value of that size is meant in their unit.
        """
        negated = any(one.negated for one in self.provenance)
        raw = any(one.unit == "raw" for one in self.provenance)
        if self.fraction and abs(value) <= 1:
            value *= 100
        return (0.0 if raw else 100.0) - value if negated else value

    @property
    def methods(self) -> list[str]:
        """Names in the order in which the files have them."""
        return [str(name) for name in self.frame["method"].unique()]

    def runs(self, method: str, group: Mapping[str, str] | None = None) -> dict[str, Points]:
        """The runs of one method, by seed."""
        rows = self.frame[self.frame["method"] == method]
        for column, value in (group or {}).items():
            rows = rows[rows[column] == value]
        if rows.empty:
            inside = "".join(f" with {column} = {value}" for column, value in (group or {}).items())
            raise DataError(f"no log has the method {method!r}{inside}; found: {', '.join(map(repr, self.methods))}")
        return {
            str(seed): Points(run["epoch"].to_numpy(dtype=float), run["score"].to_numpy(dtype=float))
            for seed, run in rows.groupby("seed", sort=False, observed=True)
        }


_SAYS_EPOCHS = "--log 'NAME=FILE[first-epoch=1]' (or 0) tells that of epochs"


def read_curves(
    sources: Iterable[Source | str | Path],
    *,
    methods: Collection[str] | None = None,
    wanted: Collection[str] = (),
    groups: Sequence[str] = (),
    axis_column: str | None = None,
    unit: Unit = "auto",
    epochs: EpochCount = "as-written",
    run: int | str | None = None,
    steps_per_epoch: float | None = None,
    lower_is_better: bool = False,
    score_column: str | None = None,
    epoch_column: str | None = None,
    method_column: str | None = None,
    seed_column: str | None = None,
) -> CurveTable:
    """Read logs into one table.

    Args:
        sources: Files, or :class:`Source` where a file doesn't say whose it is.
        methods: Keep and check only these.
        wanted: Further methods that are known to be compared: columns of these names hold their scores.
        groups: Columns that separate curves of one method, such as ``backbone``.
        axis_column: A column to carry along as another axis (``images``, ``hours``).
        unit: ``auto`` decides per file; ``raw`` takes scores that are no accuracy.
        epochs: ``completed`` adds 1 where a log calls its first epoch 0.
        run: Which run to take from a file that holds several, from 1; -1 is the last; or its name.
        steps_per_epoch: Divide by this where a file counts steps.
        lower_is_better: Scores are errors or losses: they are turned round, to ``100 - error`` and ``-loss``.
        score_column: Name of the score, if unusual; likewise the other three.
        epoch_column: Name of the epoch.
        method_column: Name of the method column.
        seed_column: Name of the seed column.
    """
    if reserved := {"method", "seed", "epoch", "score", "line", "row"} & {*groups}:
        raise DataError(f"{min(reserved)!r} is a name that curves need themselves, so it cannot be a group")
    parsed = [source if isinstance(source, Source) else Source(Path(source)) for source in sources]
    documents = [open_log(source.path, {*(methods or ()), *wanted}) for source in parsed]
    requests = [Request(source.score or score_column, lower_is_better, source.score is not None) for source in parsed]
    chosen, findings = choose(documents, requests)
    curves: list[_Curves] = []
    logs: list[tuple[Log, Source]] = []
    met: set[str] = set()
    protocols: dict[str, str] = {}
    for source, document, series in zip(parsed, documents, chosen, strict=True):
        log = extract(
            document, series, epoch_column=source.epoch or epoch_column, method_column=method_column,
            seed_column=seed_column, groups=tuple(groups), axis_column=axis_column,
        )  # fmt: skip
        per_epoch = source.steps_per_epoch or steps_per_epoch
        if source.first_epoch is not None and (log.axis == "other" or (log.axis == "steps" and per_epoch is None)):
            log = replace(log, axis="epochs")
        if log.axis == "other":
            told = f"nothing tells what {log.axis_column!r} counts: it is taken as it stands; {_SAYS_EPOCHS}"
            findings.append(Finding(log.file, None, told))
        which = source.run or run
        number = _as_number(which)
        logs.append((log, source))
        rows = _named(log, source, methods, None if which is None or number is not None else str(which))
        if "" in rows["method"].cat.categories:
            blank = np.asarray(rows["method"] == "")
            findings += grouped(log.file, rows["line"][blank], "skipped: a row without a method")
            rows = rows[~blank]
        if rows.empty:
            continue
        if log.form == "mto-analyze curves" and "protocol" not in groups:
            protocols |= {str(each): log.file for each in document.columns.labels("protocol")[rows["row"].to_numpy()]}
        met.update(rows["method"])
        said, found = _unit_of(log, source.unit or unit, lower_is_better)
        if log.axis != "steps":
            if source.steps_per_epoch is not None:
                raise DataError(f"{log.file}: steps-per-epoch is for logs that count steps; this one counts {log.axis}")
            per_epoch = None
        if per_epoch is not None:
            rows = rows.assign(epoch=_epochs_of_steps(rows["epoch"].to_numpy(), per_epoch))
        frame, more, fraction = tidy(log, rows, groups=groups, unit=said, run=number, must=source.run is not None)
        if lower_is_better:
            frame["score"] = (0.0 if said == "raw" else 100.0) - frame["score"]
        findings += [*log.findings, *found, *more]
        curves.append(_Curves(log, source, frame, said, fraction, per_epoch))
    unknown = sorted(set(methods or ()) - met)
    if unknown or not curves:
        names = {log.file: sorted(_named(log, source, None, None)["method"].unique()) for log, source in logs}
        there = "; ".join(f"{Path(file).name}: {', '.join(map(repr, each))}" for file, each in names.items())
        raise DataError(f"unknown methods: {', '.join(map(repr, unknown))}. Found in {there}")
    if steps_per_epoch is not None and all(each.log.axis != "steps" for each in curves):
        findings.append(Finding(curves[0].log.file, None, "steps per epoch are not used: no log counts steps"))
    _refuse_different_units(curves)
    _refuse_different_axes(curves)
    _refuse_different_protocols(protocols)
    counted = [each.counted() for each in curves]
    firsts = [each.evident() if each.counts_epochs else None for each in counted]
    origin, found = count_alike(counted, epochs)
    findings += found
    provenance = tuple(each.provenance(lower_is_better, first) for each, first in zip(curves, firsts, strict=True))
    _refuse_one_run_from_two_files(curves, groups)
    return CurveTable(
        _joined([each.frame for each in curves], ["method", "seed", *groups]),
        tuple(findings),
        origin=origin,
        fraction=all(each.fraction for each in curves),
        axis=axis_label(provenance),
        groups=tuple(groups),
        provenance=provenance,
    )


@dataclass
class _Curves:
    """The curves of one log while logs become one table."""

    log: Log
    source: Source
    frame: pd.DataFrame
    unit: Unit
    fraction: bool
    steps_per_epoch: float | None

    @property
    def counts_epochs(self) -> bool:
        return self.log.axis == "epochs" or self.steps_per_epoch is not None

    def same_run(self, other: _Curves) -> bool:
        """Whether it is the same run of one file, for the same method."""
        same = (self.source.run, self.log.series) == (other.source.run, other.log.series)
        return same and not set(self.frame["method"]).isdisjoint(other.frame["method"])

    def counted(self) -> Counted:
        """What there is to know of how it counts epochs."""
        first = self.source.first_epoch
        if first is None:
            first = 1 if self.steps_per_epoch is not None else self.log.document.format.first_epoch
        told = self.source.first_epoch is not None
        return Counted(self.log.file, self.log.form, self.frame, first, self.counts_epochs, told)

    def provenance(self, negated: bool, first_epoch: int | None) -> Provenance:
        """What was read from it, once logs are counted alike."""
        frame, series = self.frame, self.log.series
        first, last = (
            (float(row["epoch"]), float(row["score"]))
            for row in (frame.iloc[frame["epoch"].argmin()], frame.iloc[frame["epoch"].argmax()])
        )
        return Provenance(
            file=self.log.file, format=self.log.form, column=series.name, kind=series.metric.kind,
            metric=series.metric.words(series.name), split=series.metric.split, weights=series.metric.weights,
            unit="raw" if self.unit == "raw" else "fraction" if self.fraction else "percent", negated=negated,
            axis=self.log.axis, axis_column=self.log.axis_column, steps_per_epoch=self.steps_per_epoch,
            first_epoch=first_epoch,
            methods=tuple(map(str, frame["method"].unique())),
            runs=len(curve_starts(frame)),
            points=len(frame), first=first, last=last, sha256=self.log.document.sha256,
        )  # fmt: skip


def _as_number(run: int | str | None) -> int | None:
    """A run's place; None where it is a name."""
    return int(run) if run is not None and re.fullmatch(r"[-+]?\d{1,9}", str(run)) else None


def _unit_of(log: Log, unit: Unit, lower: bool) -> tuple[Unit, list[Finding]]:
    """The unit to read a series in, and a word where it is odd."""
    series = log.series
    kind = series.metric.kind
    if lower and kind == "accuracy":
        raise DataError(
            f"{log.file}: {series.name!r} is an accuracy, of which higher is better; drop --lower-is-better"
        )
    if kind in ("error", "loss") and not lower:
        if unit != "raw":
            raise DataError(
                f"{log.file}: {series.name!r} is no accuracy but {'an error' if kind == 'error' else 'a loss'}:"
                " say --lower-is-better (or --unit raw to take it as it stands)"
            )
        return unit, [Finding(log.file, None, f"{series.name!r} is taken as it stands; of a {kind} lower is better")]
    if unit == "auto" and (kind == "other" or (kind == "score" and lower)):
        raise DataError(
            f"{log.file}: nothing tells what {series.name!r} is; say --unit percent, fraction or raw"
            " (or for this log alone --log 'NAME=FILE[unit=...]')"
        )
    return ("raw" if kind == "loss" else unit), []


def _refuse_different_units(curves: Sequence[_Curves]) -> None:
    """Scores in percent and raw ones have no common scale, and one column of one format has one unit."""
    of_column: dict[tuple[str, str], _Curves] = {}
    for other in curves[1:]:
        if (other.unit == "raw") != (curves[0].unit == "raw"):
            raise DataError(
                f"{curves[0].log.file} is read in {curves[0].unit.replace('auto', 'percent')} and {other.log.file} in"
                f" {other.unit.replace('auto', 'percent')}; give both the same with --unit"
            )
    for each in curves:
        if each.unit == "auto":
            first = of_column.setdefault((each.log.form, each.log.series.name), each)
            if first.fraction != each.fraction:
                low, high = (first, each) if first.fraction else (each, first)
                raise DataError(
                    f"{low.log.series.name!r} never exceeds 1 in {low.log.file} and does in {high.log.file}; say of the"
                    " former --log 'NAME=FILE[unit=fraction]', or [unit=percent] if its run collapsed"
                )


def _refuse_different_axes(curves: Sequence[_Curves]) -> None:
    """Steps and epochs have no common scale."""

    def said(each: _Curves) -> str:
        return "epochs" if each.counts_epochs else each.log.axis if each.log.axis != "other" else each.log.axis_column

    for other in curves[1:]:
        kinds = {said(other), said(curves[0])}
        if len(kinds) > 1:
            settled = (
                "--steps-per-epoch turns steps into epochs (1 where each step is an epoch)"
                if kinds == {"steps", "epochs"}
                else f"name a column that both have with --epoch-column, or, if both count epochs, {_SAYS_EPOCHS}"
            )
            raise DataError(
                f"{curves[0].log.file} counts {said(curves[0])} and {other.log.file} counts {said(other)}; {settled}"
            )


def _refuse_different_protocols(files: Mapping[str, str]) -> None:
    """Accuracies of kNN and of a linear classifier have no common scale."""
    if len(files) > 1:
        told = " and ".join(f"{protocol} ({file})" for protocol, file in files.items())
        raise DataError(f"scores are of {told}; compare those of one protocol, or each with --group protocol")


def refuse_different_scores(tables: Sequence[CurveTable]) -> None:
    """Logs that were read one by one, and whose scores are put together."""
    told = {(one.metric, one.split, one.unit): one.file for table in tables for one in table.provenance}
    if len(told) > 1:
        words = [
            f"{file} has {metric} ({split or 'no split named'}, {unit})" for (metric, split, unit), file in told.items()
        ]
        raise DataError(f"scores of different kinds: {'; '.join(words)}; choose with --score-column")


def _named(log: Log, source: Source, methods: Collection[str] | None, run: str | None) -> pd.DataFrame:
    """Rows with a method and a seed each, of the wanted methods (and the named run) only."""
    rows = log.rows
    if run is not None:
        if "method" not in rows or run not in rows["method"].cat.categories:
            there = ", ".join(filter(None, rows["method"].cat.categories)) if "method" in rows else "no names of runs"
            raise DataError(f"{log.file}: there is no run {run!r}; it has {there}")
        rows = rows[rows["method"] == run]
    if "method" not in rows:
        rows = rows.assign(method=pd.Categorical([source.name(methods or ())]).repeat(len(rows)))
    elif source.method is not None:
        several = [name for name in rows["method"].cat.remove_unused_categories().cat.categories if name]
        if len(several) > 1:
            raise DataError(
                f"{log.file}: holds {len(several)} methods ({', '.join(several)}); {source.method}=FILE names a file"
                f" with one: give the file alone, or choose with '{source.method}=FILE[run=...]'"
            )
        rows = rows.assign(method=pd.Categorical([source.method]).repeat(len(rows)))
    if methods is not None:
        rows = rows[rows["method"].isin(list(methods))]
    if source.seed is not None:
        return rows.assign(seed=pd.Categorical([source.seed]).repeat(len(rows)))
    if "seed" not in rows:
        # A run without a seed pairs with nothing: its file is its label.
        return rows.assign(seed=pd.Categorical([str(source.path)]).repeat(len(rows)))
    return rows


def _epochs_of_steps(steps: NDArray[np.float64], per_epoch: float) -> NDArray[np.float64]:
    """Finished epochs from steps, whether the last step of an epoch is written as n or as n - 1."""
    if not 0 < per_epoch < np.inf:
        raise DataError(f"--steps-per-epoch must be positive, got {per_epoch:g}")
    shifted = steps + 1
    from_zero = not (shifted % per_epoch).any() and ((steps % per_epoch).any() or (steps == 0).any())
    return np.asarray((shifted if from_zero else steps) / per_epoch, dtype=np.float64)


def _joined(frames: Sequence[pd.DataFrame], keys: Sequence[str]) -> pd.DataFrame:
    """One table of all; names stay categories, of which a million rows take little time."""
    if len(frames) == 1:
        return frames[0]
    names = {key: union_categoricals([pd.Categorical(frame[key]) for frame in frames]) for key in keys}
    rest = [frame.drop(columns=[*keys]) for frame in frames]
    return pd.concat(rest, ignore_index=True).assign(**names)[[*frames[0]]]


def _refuse_one_run_from_two_files(curves: Sequence[_Curves], groups: Sequence[str]) -> None:
    """Two files for one method and seed are two runs, or one counted twice."""
    for at, one in enumerate(curves):
        for two in curves[at + 1 :]:
            if one.log.document.sha256 == two.log.document.sha256 and one.same_run(two):
                raise DataError(f"{two.log.file}: the same run as {one.log.file}, given for one method twice")
    seen: dict[tuple[str, ...], str] = {}
    for each in curves if len(curves) > 1 else ():
        for row in each.frame[["method", "seed", *groups]].drop_duplicates().itertuples(index=False):
            key = tuple(map(str, row))
            if key in seen and seen[key] != each.log.file:
                method, seed = key[:2]
                low, high = sorted([seen[key], each.log.file])
                raise DataError(f"{high}: {method!r} seed {seed!r} is also in {low}; name seeds with NAME@SEED=FILE")
            seen[key] = each.log.file


def on_axis(table: CurveTable, axis: str, per_epoch: Mapping[str, float] | float | None = None) -> CurveTable:
    """The same curves against images seen or hours instead of epochs.

    Args:
        table: Curves over epochs.
        axis: ``images``, ``hours`` or any other cost of an epoch.
        per_epoch: That cost of one epoch, one for all or by method; without it the table's column ``axis`` is used.
    """
    frame = table.frame
    if per_epoch is not None:
        if table.axis in set(AXIS_NAMES.values()) - {"epoch"}:
            raise DataError(
                f"the logs count {table.axis}, not epochs, so {axis} of an epoch cannot be used; "
                "--steps-per-epoch turns steps into epochs"
            )
        rates = {name: per_epoch for name in table.methods} if isinstance(per_epoch, (int, float)) else per_epoch
        lacking = [name for name in table.methods if name not in rates]
        if lacking:
            raise DataError(f"the {axis} of an epoch of {lacking[0]!r} are not given; say --per-epoch NAME=VALUE")
        if any(not 0 < rate < np.inf for rate in rates.values()):
            raise DataError(f"the {axis} of an epoch must be positive numbers, got {dict(rates)}")
        place = (frame["epoch"] - table.origin) * frame["method"].map(rates).astype(float)
    elif axis in frame:
        place = pd.to_numeric(frame[axis], errors="coerce").astype(float)
        if not np.isfinite(place).all():
            raise DataError(f"the column {axis!r} has no number for {frame['method'][~np.isfinite(place)].iloc[0]!r}")
    else:
        raise DataError(f"the logs have no column {axis!r}; say what an epoch costs with --per-epoch NAME=VALUE")
    keys = ["method", "seed", *table.groups]
    if (place.groupby([frame[key] for key in keys], sort=False, observed=True).diff() <= 0).any():
        raise DataError(f"the column {axis!r} does not rise with the epoch in every run")
    return replace(table, frame=frame.assign(epoch=place), origin=0.0, axis=axis)
