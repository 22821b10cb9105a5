"""Heterogeneity under every definition, and the model's own attention, beside the measurement of Fig. 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd

from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.accumulating import Setup
from mto_analysis.probe.attention import Attention
from mto_analysis.probe.definitions import DEFINITIONS, DefinitionMeasure
from mto_analysis.probe.engine import LayerMeasure, mean_and_interval
from mto_analysis.probe.request import Request
from mto_analysis.probe.study import HeterogeneityStudy, measure_checkpoints, model_first


class Definitions:
    """Watches models for :func:`measure_checkpoints` and makes the two tables from what it saw."""

    def __init__(self, masks_per_image: int = 1) -> None:
        self._masks_per_image = masks_per_image
        self._attention: dict[str, Attention] = {}

    @contextmanager
    def watch(self, model: MaskedImageModel, label: str) -> Iterator[Sequence[LayerMeasure]]:
        """Measures for one model, watching its attention while it runs."""
        setup = Setup(model, model.info.mask_grid, self._masks_per_image)
        with Attention(setup).watching() as attention:
            self._attention[label] = attention
            yield (DefinitionMeasure(model), attention)

    def attention_table(self) -> pd.DataFrame:
        """Rows of :meth:`Attention.to_frame` per model."""
        tables = [watch.to_frame().assign(model=label) for label, watch in self._attention.items()]
        return model_first(pd.concat(tables, ignore_index=True))

    @staticmethod
    def table(study: HeterogeneityStudy) -> pd.DataFrame:
        """One row per model, stack, layer depth, definition and position.

        Columns: ``model stack layer_depth definition similarity tokens position temperature centring``, then
        ``heterogeneity`` and ``normalized`` with their 95 % intervals over images, ``num_visible num_images``.
        ``position`` is ``without`` in a second row of layer depth 0 where the position embedding can be taken off.
        """
        keys = ["model", "stack", "layer_depth"]
        frame = study.measured
        bound = np.log(np.maximum(frame["num_visible"], 2))
        tables = []
        for definition in DEFINITIONS:
            for position, suffix in (("with", ""), ("without", DefinitionMeasure.SUFFIX)):
                column = definition.name + suffix
                if column not in frame:
                    continue
                values = frame[[*keys, "image", "num_visible"]].assign(
                    heterogeneity=frame[column], normalized=frame[column] / bound
                )
                values = values.dropna(subset="heterogeneity")
                if position == "without":
                    values = values[values["layer_depth"] == 0]
                table = mean_and_interval(values, keys, ["heterogeneity", "normalized"])
                tables.append(
                    table.assign(
                        definition=definition.name,
                        similarity=definition.similarity,
                        tokens=definition.tokens,
                        position=position,
                        temperature=definition.temperature,
                        centring=definition.centring,
                    )
                )
        table = pd.concat(tables, ignore_index=True)
        first = [*keys, "definition", "similarity", "tokens", "position", "temperature", "centring"]
        return table[[*first, *(column for column in table if column not in first)]]


def measure_definitions(request: Request) -> tuple[HeterogeneityStudy, pd.DataFrame, pd.DataFrame]:
    """Measure H under every definition and the model's own attention, in one pass.

    Returns:
        The study as without definitions, the table of definitions, and that of attention.
    """
    definitions = Definitions(request.settings.masks_per_image)
    study = measure_checkpoints(request, watch=definitions.watch)
    return study, definitions.table(study), definitions.attention_table()
