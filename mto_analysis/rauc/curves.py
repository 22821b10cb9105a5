"""The tidy curve table ``method epoch score seed`` from any number of logs; what was odd is named by file and line.

What is done to the rows of one file is in :mod:`mto_analysis.rauc.logs.tidying`; here files become one table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.areas import Points
from mto_analysis.rauc.logs import Finding, Log, read_log
from mto_analysis.rauc.logs.provenance import Provenance, axis_label, score_label
from mto_analysis.rauc.logs.tidying import Unit, tidy

__all__ = ["CurveTable", "Source", "on_axis", "read_curves"]

EpochCount = Literal["as-written", "completed"]

#: File names that say nothing about the method; the folder's name does.
_NAMELESS = ("log", "log_rank0", "summary", "metrics", "trainer_state", "scalars", "events")


@dataclass(frozen=True)
class Source:
    """A log and, where the file does not say so itself, whose it is: ``FILE``, ``NAME=FILE`` or ``NAME@SEED=FILE``."""

    path: Path
    method: str | None = None
    seed: str | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read the command line's form; a file that exists under the whole text is that file.

        Example:
            >>> Source.parse("MAE@2=runs/log.txt")
            Source(path=PosixPath('runs/log.txt'), method='MAE', seed='2')
        """
        name, equals, path = text.partition("=")
        if not equals or not name or Path(text).exists():
            return cls(Path(text))
        method, at, seed = name.rpartition("@")
        return cls(Path(path), method, seed) if at and method else cls(Path(path), name)

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

    @property
    def methods(self) -> list[str]:
        """Names in the order in which the files have them."""
        return [str(name) for name in self.frame["method"].unique()]

    def runs(self, method: str, group: Mapping[str, str] | None = None) -> dict[str, Points]:
        """The runs of one method, by seed.

        Raises:
            DataError: If there is no such method (in this group).
        """
        rows = self.frame[self.frame["method"] == method]
        for column, value in (group or {}).items():
            rows = rows[rows[column] == value]
        if rows.empty:
            inside = "".join(f" with {column} = {value}" for column, value in (group or {}).items())
            raise DataError(f"no log has the method {method!r}{inside}; there are {', '.join(self.methods)}")
        return {
            str(seed): Points(run["epoch"].to_numpy(dtype=float), run["score"].to_numpy(dtype=float))
            for seed, run in rows.groupby("seed", sort=False)
        }


def read_curves(
    sources: Iterable[Source | str | Path],
    *,
    methods: Collection[str] | None = None,
    groups: Sequence[str] = (),
    axis_column: str | None = None,
    unit: Unit = "auto",
    epochs: EpochCount = "as-written",
    run: int | None = None,
    steps_per_epoch: float | None = None,
    score_column: str | None = None,
    epoch_column: str | None = None,
    method_column: str | None = None,
    seed_column: str | None = None,
) -> CurveTable:
    """Read logs into one table.

    Args:
        sources: Files, or :class:`Source` where a file doesn't say whose it is.
        methods: Keep and check only these.
        groups: Columns that separate curves of one method, such as ``backbone``.
        axis_column: A column to carry along as another axis (``images``, ``hours``).
        unit: ``auto`` decides per file; ``raw`` takes scores that are no accuracy.
        epochs: ``completed`` adds 1 where a trainer calls its first epoch 0.
        run: Which run to take from a file that holds several, from 1; -1 is the last.
        steps_per_epoch: Divide by this where a file counts steps.
        score_column: Name of the score, if unusual; likewise the other three.
        epoch_column: Name of the epoch.
        method_column: Name of the method column.
        seed_column: Name of the seed column.

    Raises:
        DataError: If a file cannot be read, mixes units or runs, or files count epochs differently.
    """
    parsed = [source if isinstance(source, Source) else Source(Path(source)) for source in sources]
    frames: list[pd.DataFrame] = []
    findings: list[Finding] = []
    counted: dict[bool | None, Log] = {}
    fractions: list[bool] = []
    provenance: list[Provenance] = []
    for source in parsed:
        log = read_log(
            source.path,
            score_column=score_column,
            epoch_column=epoch_column,
            method_column=method_column,
            seed_column=seed_column,
            keep=(*groups, *([axis_column] if axis_column else [])),
        )
        rows = _named(log, source, methods)
        if rows.empty:
            continue
        if steps_per_epoch is not None:
            rows = rows.assign(epoch=_epochs_of_steps(rows["epoch"].to_numpy(), steps_per_epoch))
        frame, found, fraction = tidy(log, rows, groups=groups, unit=unit, run=run)
        if log.epochs_completed is False and epochs == "completed":
            frame["epoch"] += 1
        frames.append(frame)
        findings += [*log.findings, *found]
        counted.setdefault(log.epochs_completed, log)
        fractions.append(fraction)
        provenance.append(_provenance(log, frame, "raw" if unit == "raw" else "fraction" if fraction else "percent"))
    if not frames:
        there = ", ".join(source.name() for source in parsed)
        raise DataError(f"no log has any of the methods {', '.join(sorted(methods or ()))}; the logs are {there}")
    if epochs == "as-written" and len(counted) > 1 and False in counted:
        zero, other = counted[False], next(log for key, log in counted.items() if key is not False)
        if True in counted:
            raise DataError(
                f"{zero.file} calls the first epoch 0 ({zero.form}) and {other.file} calls it 1 ({other.form});"
                " pass --epochs completed to count both alike"
            )
        findings.append(Finding(zero.file, None, f"counts epochs from 0; {other.file} is taken to do so too"))
    frame = pd.concat(frames, ignore_index=True)
    _refuse_one_run_from_two_files(frame, groups)
    return CurveTable(
        frame.drop(columns="file"),
        tuple(findings),
        origin=-1.0 if epochs == "as-written" and False in counted else 0.0,
        fraction=all(fractions),
        axis=axis_label(provenance),
        groups=tuple(groups),
        provenance=tuple(provenance),
    )


def _provenance(log: Log, frame: pd.DataFrame, unit: str) -> Provenance:
    """What was read from one log."""
    first, last = (
        (float(row["epoch"]), float(row["score"]))
        for row in (frame.iloc[frame["epoch"].argmin()], frame.iloc[frame["epoch"].argmax()])
    )
    return Provenance(
        file=log.file, format=log.form, column=log.column, kind="accuracy", metric="top-1 accuracy",
        split=None, weights="model", unit=unit, negated=False,
        axis=log.axis, axis_column=log.axis_column, steps_per_epoch=None,
        first_epoch=None if log.epochs_completed is None else int(log.epochs_completed),
        methods=tuple(map(str, frame["method"].unique())), runs=frame.groupby(["method", "seed"]).ngroups,
        points=len(frame), first=first, last=last, sha256=log.sha256,
    )  # fmt: skip


def _named(log: Log, source: Source, methods: Collection[str] | None) -> pd.DataFrame:
    """Rows with a method and a seed each, of the wanted methods only."""
    rows = log.rows
    if "method" not in rows:
        rows = rows.assign(method=source.name(methods or ()))
    else:
        text = rows["method"].fillna("").astype(str).str.strip()
        if source.method is not None:
            several = [name for name in text.unique() if name]
            if len(several) > 1:
                raise DataError(
                    f"{log.file}: holds {len(several)} methods ({', '.join(several[:4])});"
                    f" {source.method}=FILE names a file with one, give the file alone"
                )
            text = text.where(text == "", source.method)
        rows = rows.assign(method=text)
    if methods is not None:
        rows = rows[rows["method"].isin(list(methods))]
    if source.seed is not None:
        return rows.assign(seed=source.seed)
    if "seed" not in rows:
        # A run without a seed pairs with nothing: its file is its label.
        return rows.assign(seed=str(source.path))
    if pd.api.types.is_float_dtype(rows["seed"]) and (rows["seed"] % 1 == 0).all():
        return rows.assign(seed=rows["seed"].astype(int).astype(str))
    return rows.assign(seed=rows["seed"].fillna("").astype(str))


def _epochs_of_steps(steps: np.ndarray, per_epoch: float) -> np.ndarray:
    """Finished epochs from steps, whether the last step of an epoch is written as n or as n - 1."""
    if not per_epoch > 0:
        raise DataError(f"--steps-per-epoch must be positive, got {per_epoch:g}")
    shifted = steps + 1
    return np.asarray((shifted if not (shifted % per_epoch).any() else steps) / per_epoch, dtype=np.float64)


def _refuse_one_run_from_two_files(frame: pd.DataFrame, groups: Sequence[str]) -> None:
    """Two files for one method and seed are two runs, or one counted twice."""
    files = frame.groupby(["method", "seed", *groups], sort=False)["file"].agg(["min", "max"])
    twice = files[files["min"] != files["max"]]
    if not twice.empty:
        method, seed = twice.index[0][:2]
        low, high = twice.iloc[0]
        raise DataError(f"{high}: {method!r} seed {seed!r} is also in {low}; name seeds with NAME@SEED=FILE")


def on_axis(table: CurveTable, axis: str, per_epoch: Mapping[str, float] | float | None = None) -> CurveTable:
    """The same curves against images seen or hours instead of epochs.

    Args:
        table: Curves over epochs.
        axis: ``images``, ``hours`` or any other cost of an epoch.
        per_epoch: That cost of one epoch, one for all or by method; without it the table's column ``axis`` is used.

    Raises:
        DataError: If neither is there, or the axis does not rise with the epoch.
    """
    frame = table.frame
    if per_epoch is not None:
        rates = {name: per_epoch for name in table.methods} if isinstance(per_epoch, (int, float)) else per_epoch
        lacking = [name for name in table.methods if name not in rates]
        if lacking:
            raise DataError(f"the {axis} of an epoch of {lacking[0]!r} are not given; say --per-epoch NAME=VALUE")
        if any(not 0 < rate < np.inf for rate in rates.values()):
            raise DataError(f"the {axis} of an epoch must be positive numbers, got {dict(rates)}")
        place = (frame["epoch"] - table.origin) * frame["method"].map(rates)
    elif axis in frame:
        place = pd.to_numeric(frame[axis], errors="coerce").astype(float)
        if not np.isfinite(place).all():
            raise DataError(f"the column {axis!r} has no number for {frame['method'][~np.isfinite(place)].iloc[0]!r}")
    else:
        raise DataError(f"the logs have no column {axis!r}; say what an epoch costs with --per-epoch NAME=VALUE")
    keys = ["method", "seed", *table.groups]
    if (place.groupby([frame[key] for key in keys], sort=False).diff() <= 0).any():
        raise DataError(f"the column {axis!r} does not rise with the epoch in every run")
    return replace(table, frame=frame.assign(epoch=place), origin=0.0, axis=axis)
