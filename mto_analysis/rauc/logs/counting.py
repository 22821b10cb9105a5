"""Whether logs count epochs alike: the first epoch is 0 in some and 1 in others, and mixing them shifts a curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Finding
from mto_analysis.rauc.logs.tidying import curve_starts

_ENOUGH = 4096
EpochCount = Literal["as-written", "completed"]


@dataclass(frozen=True)
class Counted:
    """What there is to know of how one log counts epochs.

    Attributes:
        file: The log.
        form: Name of its format.
        frame: Its curves; ``epoch`` is changed where logs are counted alike.
        first: The number of its first epoch, if its format or an option tells.
        counts_epochs: False where it counts steps or hours.
        told: Whether an option tells ``first``: then all logs are counted as epochs completed.
    """

    file: str
    form: str
    frame: pd.DataFrame
    first: int | None
    counts_epochs: bool = True
    told: bool = False

    def evident(self) -> int | None:
        """The number of the first epoch, from the epochs themselves where nothing else tells it."""
        return self.first if self.first is not None else _evident(self.frame["epoch"].to_numpy())

    @property
    def last(self) -> float:
        """The last epoch."""
        return float(self.frame["epoch"].max())


def _evident(epochs: np.ndarray) -> int | None:
    """What the epochs show: 0, 1, 2 or 4, 9, 14 count from 0; 1, 2, 3 or 5, 10, 15 from 1; 0, 5, 10 shows nothing.

    0, 5, 10, 14 counts from 0, too: each fifth epoch and the last of 15.
    A log that begins with 0 may also have been evaluated before training; its end tells, beside another log's.
    """
    places = np.unique(epochs[:_ENOUGH])  # curves are sorted: the first thousands show the step
    if places.size < 2 or places[0] != epochs.min():
        return None
    step = float(np.median(np.diff(places)))
    if step == 1:
        return {0.0: 0, 1.0: 1}.get(float(places[0]))
    if places[0] == 0 and (np.diff(places)[:-1] == step).all() and places[-1] - places[-2] == step - 1:
        return 0
    return {step - 1: 0, step: 1}.get(float(places[0]))


def count_alike(logs: Sequence[Counted], epochs: EpochCount) -> tuple[float, list[Finding]]:
    """Refuse logs of which one counts from 0 and another from 1; on request count all as epochs completed.

    Returns:
        Where training starts on the epoch axis (-1 where the first epoch is called 0, else 0), and what was assumed.
    """
    logs = [log for log in logs if log.counts_epochs]
    zero = [log for log in logs if log.first == 0]
    if epochs == "completed" or any(log.told for log in logs):
        return 0.0, _completed(logs, asked=epochs == "completed")
    for at, one in enumerate(logs):
        for two in logs[at + 1 :]:
            _refuse_shift(one, two)
        _refuse_shift_inside(one)
    other = [log for log in logs if log.first != 0]
    if not zero:
        return 0.0, []
    return -1.0, [
        Finding(log.file, None, f"counts epochs from 0; {other[0].file} is taken to do so too")
        for log in zero[:1]
        if other
    ]


def _completed(logs: Sequence[Counted], *, asked: bool) -> list[Finding]:
    """Add 1 to the epochs of logs that count from 0, in place.

    Args:
        logs: All of a comparison.
        asked: Whether for all of them, not only for those that others show to count otherwise.
    """
    findings = []
    # As they are written: what one log shows may not depend on whether another was changed before it.
    shown = [log.evident() for log in logs]
    mixed = asked or len(set(shown)) + any(log.first == 0 for log in logs) > 1
    ends = {log.last for log, first in zip(logs, shown, strict=True) if first == 1}
    for log, first in zip(logs, shown, strict=True):
        if log.first == 0:
            log.frame["epoch"] += 1
        elif log.first is None and first == 0 and mixed:
            if log.last in ends:
                findings.append(
                    Finding(log.file, None, "epoch 0 is taken as before training; [first-epoch=0] denies it")
                )
                continue
            log.frame["epoch"] += 1
            findings.append(
                Finding(
                    log.file,
                    None,
                    "counts epochs from 0, as its first one shows: 1 was added to each; [first-epoch=1] denies it",
                )
            )
    return findings


def _refuse_shift(one: Counted, two: Counted) -> None:
    """Two logs of which one evidently counts from 0 and the other from 1."""
    if {one.evident(), two.evident()} != {0, 1}:
        return
    zero, other = (one, two) if one.evident() == 0 else (two, one)
    # Equal ends show that epoch 0 of an unknown log is the state before training, and that all count alike.
    if not (zero.first == 0 and other.first == 1) and zero.last == other.last:
        return
    raise DataError(
        f"{zero.file} calls the first epoch 0 ({zero.form}) and {other.file} calls it 1 ({other.form});"
        " pass --epochs completed to count both alike, or tell a log's first epoch: --log 'NAME=FILE[first-epoch=1]'"
    )


def _refuse_shift_inside(log: Counted) -> None:
    """Two methods of one table with the same epochs shifted by one."""
    if log.first is not None:
        return
    epochs = log.frame["epoch"].to_numpy()
    begins = curve_starts(log.frame)
    ends = np.r_[begins[1:], epochs.size] - 1
    curves = pd.DataFrame({"method": log.frame["method"].iloc[begins], "min": epochs[begins], "max": epochs[ends]})
    spans = curves.groupby("method", sort=False, observed=True).agg({"min": "min", "max": "max"})
    zero = spans[spans["min"] == 0]
    shifted = spans[spans["min"] == 1]
    for name, span in shifted.iterrows():
        same = zero[zero["max"] == span["max"] - 1]
        if len(same):
            raise DataError(
                f"{log.file}: {same.index[0]!r} counts epochs from 0 and {name!r} from 1; give each a file of its own,"
                " or tell the table's first epoch with --log 'FILE[first-epoch=1]'"
            )
