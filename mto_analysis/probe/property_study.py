"""The paper's three properties of masked tokens, per model, measured beside heterogeneity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd

from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.engine import LayerMeasure
from mto_analysis.probe.properties import PropertyMeasure


class Properties:
    """Watches models for :func:`~mto_analysis.probe.study.measure_checkpoints`."""

    def __init__(self) -> None:
        self._measures: dict[str, PropertyMeasure] = {}

    @contextmanager
    def watch(self, model: MaskedImageModel, label: str) -> Iterator[Sequence[LayerMeasure]]:
        """The measure of one model."""
        self._measures[label] = PropertyMeasure(model)
        yield (self._measures[label],)

    def table(self) -> pd.DataFrame:
        """Rows of :meth:`PropertyMeasure.to_frame`, per model."""
        tables = [measure.to_frame().assign(model=label) for label, measure in self._measures.items()]
        return pd.concat(tables, ignore_index=True)[["model", "stack", "property", "value"]]
