"""Models measured once for all figures that show them: the bundled ones, or whatever checkpoints are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from mto_analysis.figures.paper.inputs import Inputs
from mto_analysis.runtime.listener import Listener

# Tables and schematics are drawn at this bench too, and need not wait for torch.
if TYPE_CHECKING:
    from mto_analysis.probe.quadrants import AffinityMap
    from mto_analysis.probe.request import Request
    from mto_analysis.probe.study import Watch

#: What ends the label of a bundled model at 2 % of its training.
EARLY = ", early"


@dataclass(frozen=True)
class Curves:
    """Rows of ``heterogeneity.csv``, and metadata about each model."""

    table: pd.DataFrame
    models: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Maps:
    """Mean affinity maps by model, rows of ``quadrants.csv``, and the curves measured in the same pass."""

    maps: dict[str, list[AffinityMap]]
    quadrants: pd.DataFrame
    curves: Curves


@dataclass(frozen=True)
class Scrutiny:
    """What definitions and controls make of the curves."""

    curves: Curves
    definitions: pd.DataFrame
    attention: pd.DataFrame
    properties: pd.DataFrame
    controls: pd.DataFrame


class Workbench:
    """Measures on demand, and each thing once.

    Args:
        inputs: What is measured.
        maps: Keep affinity maps of every pass, as a figure will ask for them.
        listener: Takes notes, warnings and progress.
    """

    def __init__(self, inputs: Inputs, *, maps: bool = False, listener: Listener | None = None) -> None:
        self.inputs = inputs
        self.name = ""
        self._with_maps = maps
        self._listener = listener or Listener()

    @property
    def images_in_words(self) -> str:
        """What the images are, for captions."""
        from mto_analysis.demo import DEMO_IMAGES

        images = self.inputs.images
        return "CIFAR-10 test images" if images in (None, DEMO_IMAGES) else f"images of {images.name}"

    @cached_property
    def curves(self) -> Curves:
        """Heterogeneity of every model."""
        return self.maps.curves if self._with_maps else self._measure_all()[0]

    @cached_property
    def maps(self) -> Maps:
        """Mean affinity maps of every model."""
        from mto_analysis.probe.maps import MapRecorders, quadrant_table

        recorders = MapRecorders()
        curves, measured = self._measure_all(recorders.watch)
        return Maps(recorders.maps, quadrant_table(measured), curves)

    @cached_property
    def scrutiny(self) -> Scrutiny:
        """Definitions, attention, properties and controls of every model."""
        from mto_analysis.probe.controls import Controls
        from mto_analysis.probe.definition_study import Definitions
        from mto_analysis.probe.properties import Properties
        from mto_analysis.probe.study import measure_checkpoints, together

        names = ("curves", "definitions", "attention", "properties", "controls")
        found: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
        models: list[dict[str, Any]] = []
        for request in self._requests():
            definitions, controls, properties = Definitions(), Controls(request), Properties()
            watch = together(controls.watch, definitions.watch, properties.watch)
            study = measure_checkpoints(request, watch=watch, then=controls.then)
            found["definitions"].append(definitions.table(study))
            found["attention"].append(definitions.attention_table())
            found["controls"].append(controls.table(study))
            found["properties"].append(properties.table())
            found["curves"].append(study.table)
            models += study.models
        whole = {name: self._in_order(pd.concat(parts, ignore_index=True)) for name, parts in found.items()}
        curves = Curves(whole.pop("curves"), models)
        return Scrutiny(curves, **whole)

    def _measure_all(self, watch: Watch = lambda model, label: nullcontext(())) -> tuple[Curves, pd.DataFrame]:
        """Curves of every model, and the values per image."""
        from mto_analysis.probe.study import measure_checkpoints

        tables, measured, models = [], [], []
        for request in self._requests():
            study = measure_checkpoints(request, watch=watch)
            tables.append(study.table)
            measured.append(study.measured)
            models += study.models
        table = self._in_order(pd.concat(tables, ignore_index=True))
        return Curves(table, models), pd.concat(measured, ignore_index=True)

    def _in_order(self, table: pd.DataFrame) -> pd.DataFrame:
        """Bundled models at the end of training first, so that each looks the same in every figure."""
        if self.inputs.checkpoints:
            return table
        return table.sort_values("model", key=lambda names: names.str.endswith(EARLY), kind="stable", ignore_index=True)

    def _requests(self) -> Iterator[Request]:
        """Checkpoints that are measured under the same settings, together."""
        from mto_analysis.checkpoints import LoadOptions
        from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES, DEMO_MASKS
        from mto_analysis.images import open_images
        from mto_analysis.masks import load_masks
        from mto_analysis.probe.request import Request, Settings
        from mto_analysis.runtime.processes import pick_device

        inputs = self.inputs
        settings = Settings(limit=inputs.limit, batch_size=inputs.batch_size, device=pick_device(inputs.device))
        request = partial(
            Request,
            images=open_images(inputs.images or DEMO_IMAGES, value_range=inputs.value_range),
            loading=LoadOptions(**inputs.loading),
            listener=self._listener,
        )
        if inputs.checkpoints:
            yield request(inputs.checkpoints, settings=settings, labels=inputs.names)
            return
        for method, masks in DEMO_MASKS.items():
            labels = tuple(label for label in DEMO_CHECKPOINTS if label.startswith(method))
            own = replace(settings, masks=load_masks(masks) if inputs.bundled else None)
            yield request([DEMO_CHECKPOINTS[label] for label in labels], settings=own, labels=labels)
