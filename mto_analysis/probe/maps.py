"""Affinity maps and their quadrants for one or several checkpoints: the measurement behind Fig. 2."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.probe.engine import LayerMeasure
from mto_analysis.probe.quadrants import QUADRANT_STATISTICS, AffinityKind, AffinityMap, AffinityMaps
from mto_analysis.probe.request import Request
from mto_analysis.probe.study import HeterogeneityStudy, measure_checkpoints

QUADRANT_NAMES = {1: "masked-masked", 2: "masked-visible", 3: "visible-masked", 4: "visible-visible"}


@dataclass
class AffinityStudy:
    """Maps of each model, the table of quadrants, and the heterogeneity measured in the same pass."""

    maps: dict[str, list[AffinityMap]]
    quadrants: pd.DataFrame
    heterogeneity: HeterogeneityStudy

    def maps_file(self) -> bytes:
        """The bytes of ``affinity.npz``: an array ``num_patches num_patches`` per map.

        Keys are ``model/stack/image/layer depth``, with ``mean`` for the mean over images; ``num_masked`` after one
        more slash holds how many rows and columns, the first ones, are masked.
        """
        arrays: dict[str, Any] = {}
        for model, maps in self.maps.items():
            for each in maps:
                key = f"{model}/{each.stack}/{each.image or 'mean'}/{each.layer_depth}"
                arrays[key] = each.values.float().numpy()
                arrays[f"{key}/num_masked"] = np.int32(each.num_masked)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()


def map_checkpoints(request: Request, *, kind: AffinityKind = "softmax", each_image: bool = False) -> AffinityStudy:
    """Map the affinity of tokens at every layer depth of each checkpoint, and measure its quadrants in the same pass.

    Args:
        request: What to measure.
        kind: What the maps show.
        each_image: Map the images one by one; by default the mean over all.

    Raises:
        ValueError: If an option does not fit, or the mean of masks of different counts is wanted.

    Example:
        >>> from mto_analysis.images import open_images
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
        >>> from mto_analysis.probe.request import Settings
        >>> request = Request([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES), Settings(limit=4))
        >>> [tuple(each.values.shape) for maps in map_checkpoints(request).maps.values() for each in maps][:2]
        [(64, 64), (64, 64)]
    """
    recorders = MapRecorders(kind, each_image=each_image)
    study = measure_checkpoints(request, watch=recorders.watch)
    return AffinityStudy(recorders.maps, quadrant_table(study.measured), study)


class MapRecorders:
    """Watches the passes of :func:`~mto_analysis.probe.study.measure_checkpoints` and keeps the maps of each model.

    Args:
        kind: What the maps show.
        each_image: Map the images one by one; by default the mean over all.
        wanted: Of which models there are maps; by default of all.
    """

    def __init__(
        self,
        kind: AffinityKind = "softmax",
        *,
        each_image: bool = False,
        wanted: Callable[[ModelInfo], bool] = lambda info: True,
    ) -> None:
        self._kind, self._each_image, self._wanted = kind, each_image, wanted
        self._recorders: dict[str, AffinityMaps] = {}

    def watch(self, model: MaskedImageModel, label: str) -> nullcontext[Sequence[LayerMeasure]]:
        """The measure of one model."""
        if not self._wanted(model.info):
            return nullcontext(())
        self._recorders[label] = AffinityMaps(self._kind, each_image=self._each_image)
        return nullcontext((self._recorders[label],))

    @property
    def maps(self) -> dict[str, list[AffinityMap]]:
        """The maps by model."""
        return {label: recorder.maps for label, recorder in self._recorders.items()}


def quadrant_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Means over images of the columns of :func:`~.quadrants.quadrant_statistics`, a row per quadrant.

    Columns: ``model stack layer_depth quadrant rows columns mass dot_mean dot_std cosine_mean cosine_std row_entropy
    num_masked num_visible num_images``. ``row_entropy`` is that of the quadrant's rows over all columns, so the same
    for the first and second, and for the third and fourth quadrant. Deviations are within an image, then averaged.
    """
    keys = ["model", "stack", "layer_depth"]
    groups = measured.groupby(keys, sort=False)
    means = groups.mean(numeric_only=True).assign(num_images=groups["image"].nunique()).reset_index()
    tables = []
    for quadrant, name in QUADRANT_NAMES.items():
        rows, columns = name.split("-")
        table = means[keys].assign(quadrant=quadrant, rows=rows, columns=columns)
        for statistic in QUADRANT_STATISTICS:
            table[statistic] = means[f"q{quadrant}_{statistic}"]
        table["row_entropy"] = means[f"row_entropy_{rows}"]
        tables.append(table.assign(**{count: means[count] for count in ("num_masked", "num_visible", "num_images")}))
    table = pd.concat(tables)
    order = table.index  # rows of one layer depth together, its quadrants in reading order
    return table.iloc[order.argsort(kind="stable")].reset_index(drop=True)
