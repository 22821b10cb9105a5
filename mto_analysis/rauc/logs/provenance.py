"""What was read from a log: the one object that text, JSON, ``run.json`` and figure labels take it from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

AxisKind = Literal["epochs", "steps", "images", "hours", "other"]
ScoreKind = Literal["accuracy", "error", "loss", "score", "other"]

#: One unit of each axis, as an axis label and a table heading have it.
AXIS_NAMES = {"epochs": "epoch", "steps": "step", "images": "images", "hours": "hours"}


@dataclass(frozen=True)
class Provenance:
    """What was read from one log, and how it was understood.

    Attributes:
        file: The log.
        format: Name of its format.
        column: The column, key or tag of the score, as the file spells it.
        kind: ``accuracy``, ``error`` (1 - accuracy), ``loss``, ``score`` (the column of a tidy table, which says no
            more) or ``other``.
        metric: The score in words for an axis label, such as ``top-1 accuracy``.
        split: ``train``, ``val`` or ``test``; ``None`` where nothing says so.
        weights: ``model`` or ``EMA``.
        unit: ``percent``, ``fraction`` (shown in percent) or ``raw``.
        negated: True if lower is better, so that the curve has ``100 - error`` or ``-loss``.
        axis: What the rows are placed on in the file.
        axis_column: Its column.
        steps_per_epoch: What steps were divided by, if they were.
        first_epoch: The number of the first epoch: 0, 1, or ``None`` where neither the format nor the epochs say so.
        methods: The methods read from it.
        runs: Number of curves.
        points: Number of scores.
        first: Epoch (or step) and score of the first point, as the curve has them.
        last: The same of the last point.
        sha256: Hash of the file's bytes.
    """

    file: str
    format: str
    column: str
    kind: ScoreKind
    metric: str
    split: str | None
    weights: str
    unit: str
    negated: bool
    axis: AxisKind
    axis_column: str
    steps_per_epoch: float | None
    first_epoch: int | None
    methods: tuple[str, ...]
    runs: int
    points: int
    first: tuple[float, float]
    last: tuple[float, float]
    sha256: str

    def record(self) -> dict[str, Any]:
        """The object as JSON has it."""
        return asdict(self)

    @property
    def axis_name(self) -> str:
        """What the curve runs over, after steps have become epochs."""
        if self.axis == "steps" and self.steps_per_epoch is not None:
            return "epoch"
        return AXIS_NAMES.get(self.axis, self.axis_column)

    @property
    def score_name(self) -> str:
        """The label of a score axis."""
        if self.unit == "raw":
            return f"\N{MINUS SIGN}{self.metric}" if self.negated else self.metric
        return f"100 \N{MINUS SIGN} {self.metric} (%)" if self.negated else f"{self.metric} (%)"

    def __str__(self) -> str:
        """One line for a terminal."""
        what = self.metric if self.kind in ("accuracy", "error") and self.metric != self.column else self.kind
        of = " of ".join(part for part in (what, {"val": "validation"}.get(self.split or "", self.split)) if part)
        counted = "" if self.first_epoch is None or self.axis != "epochs" else f" from {self.first_epoch}"
        (x0, y0), (x1, y1) = self.first, self.last
        curves = f"{self.points} points" + (f" of {self.runs} runs" if self.runs > 1 else "")
        weights = ", EMA weights" if self.weights == "EMA" else ""
        unit = "fraction, shown in percent" if self.unit == "fraction" else self.unit
        divided = "" if self.steps_per_epoch is None else f", {self.steps_per_epoch:g} per epoch"
        turned = ", lower is better" if self.negated else ""
        return (
            f"{self.file}: {self.format}, {self.column!r} ({of}{weights}, {unit}{turned}) over {self.axis}{counted}"
            f" ({self.axis_column!r}{divided}), {curves}, {x0:g}: {y0:g} to {x1:g}: {y1:g}"
            f", sha256 {self.sha256[:12]}"
        )


def axis_label(read: Iterable[Provenance]) -> str:
    """What all curves run over; the word of the first log, as logs of different axes are never compared."""
    return next((one.axis_name for one in read), "epoch")


def score_label(read: Iterable[Provenance]) -> str:
    """The label of the score axis: the logs' own where they agree, else the most that holds for all."""
    names = list(dict.fromkeys(one.score_name for one in read))
    if len(names) == 1:
        return names[0]
    accuracies = all(name.endswith("accuracy (%)") for name in names)
    return "accuracy (%)" if accuracies else "score (%)" if all(name.endswith("(%)") for name in names) else "score"
