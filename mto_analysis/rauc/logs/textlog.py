"""Text logs of SimMIM and Swin: the accuracy line carries no epoch, the line before it does."""

from __future__ import annotations

import re

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.rauc.logs.records import Log, grouped

__all__ = ["read_text_log"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_EPOCH = re.compile(r"EPOCH (\d+) training takes|Epoch: \[(\d+)\] Total time")
_ACCURACY = re.compile(r"\* Acc@1 (\S+)")


def read_text_log(name: str, data: bytes) -> Log:
    """Accuracy lines, each with the epoch that finished last before it.

    A resumed run evaluates the loaded weights before it trains on; that line repeats an epoch and is left out.

    Raises:
        DataError: If no accuracy belongs to an epoch.
    """
    epoch: int | None = None
    loaded = False
    rows: list[tuple[int, float, int]] = []
    homeless: list[int] = []
    for number, raw in enumerate(data.decode(errors="replace").split("\n"), 1):
        line = _COLOUR.sub("", raw) if "\x1b" in raw else raw
        if "Resuming from" in line:
            loaded = True
        elif "Start training" in line:
            loaded = False
        elif finished := _EPOCH.search(line):
            epoch, loaded = int(finished[1] or finished[2]), False
        elif accuracy := _ACCURACY.search(line):
            if epoch is None or loaded:
                homeless.append(number)
                continue
            try:
                rows.append((epoch, float(accuracy[1]), number))
            except ValueError:
                raise DataError(f"{name}:{number}: {accuracy[1]!r} is not an accuracy") from None
    if not rows:
        raise DataError(f"{name}: no accuracy line (* Acc@1 ...) follows a finished epoch")
    return Log(
        name,
        "SimMIM text",
        pd.DataFrame(rows, columns=["epoch", "score", "line"]).astype({"epoch": float}),
        epochs_completed=False,
        percent=True,
        findings=tuple(grouped(name, homeless, "skipped: an accuracy before training started or went on")),
        column="Acc@1",
        axis_column="EPOCH",
    )
