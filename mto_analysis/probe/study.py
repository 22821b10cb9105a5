"""Heterogeneity of one or several checkpoints on the same images: the measurement behind Fig. 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.images import BrokenImage
from mto_analysis.masks import masks_to_bytes
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.engine import LayerMeasure, ProbeResult
from mto_analysis.probe.measures import known_measures, names_of
from mto_analysis.probe.request import LoadedModel, Request
from mto_analysis.probe.sharing import shared_probe

_PER_IMAGE = ("model", "stack", "layer_depth", "image", "mask", "num_masked", "num_visible", "heterogeneity")

#: What else to measure in the same pass, given the model and its label; entered before the pass and left after it.
Watch = Callable[[MaskedImageModel, str], AbstractContextManager[Sequence[LayerMeasure]]]


def together(*watches: Watch) -> Watch:
    """Several watches as one."""

    @contextmanager
    def watch(model: MaskedImageModel, label: str) -> Iterator[Sequence[LayerMeasure]]:
        with ExitStack() as stack:
            yield [measure for each in watches for measure in stack.enter_context(each(model, label))]

    return watch


@dataclass
class HeterogeneityStudy:
    """What was measured: a row per model, stack and layer depth, the values per image, and metadata for ``run.json``.

    ``measured`` has a column for every number per image of every measure in the pass; ``measures`` is the tidy table of
    all measures (:meth:`ProbeResult.table`), of all models; ``masks`` holds, where they were kept, the masks of each
    model by image name.
    """

    table: pd.DataFrame
    measured: pd.DataFrame
    measures: pd.DataFrame
    models: list[dict[str, Any]]
    masks: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def per_image(self) -> pd.DataFrame:
        """Heterogeneity per image and mask: ``measured`` without what other measures saw in the pass."""
        return self.measured[list(_PER_IMAGE)]

    def mask_file(self, model: str) -> bytes:
        """The mask file of a model measured with ``keep_masks``, for others to measure on the same masks."""
        by_name = self.masks[model]
        return masks_to_bytes(torch.stack([torch.stack(each) for each in by_name.values()]).numpy(), list(by_name))


def measure_checkpoints(
    request: Request,
    *,
    watch: Watch = lambda model, label: nullcontext(()),
    then: Callable[[LoadedModel], object] = lambda loaded: None,
) -> HeterogeneityStudy:
    """Measure heterogeneity at every layer depth of each checkpoint on the same images.

    Several processes measure a part of the images each, in the batches of one process, and all of them get the whole
    result. A layer measure that keeps something for itself must then be a
    :class:`~mto_analysis.probe.sharing.Shared` one.

    Args:
        request: What to measure.
        watch: What else to measure in the same pass; its numbers are columns of ``measured``.
        then: Called with each model after its pass, while it is in memory.

    Example:
        >>> from mto_analysis.images import open_images
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
        >>> from mto_analysis.probe.request import Settings
        >>> request = Request([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES), Settings(limit=4))
        >>> measure_checkpoints(request).table["layer_depth"].tolist()
        [0, 1, 2, 3, 4]
    """
    study = HeterogeneityStudy(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), [], broken=request.broken)
    results: dict[str, ProbeResult] = {}
    for loaded in request.models():
        result = _measure(request, loaded, watch, study)
        study.models.append(request.measured(loaded))
        results[loaded.label] = result
        then(loaded)
    for table, of in (
        ("table", ProbeResult.summary),
        ("measured", ProbeResult.to_frame),
        ("measures", partial(_compared, results)),
    ):
        parts = [of(result).assign(model=label) for label, result in results.items()]
        setattr(study, table, model_first(pd.concat(parts, ignore_index=True)))
    study.table["num_skipped"] = len(study.broken)
    return study


def _compared(results: Mapping[str, ProbeResult], result: ProbeResult) -> pd.DataFrame:
    """All measures of a model, and what compares it with those after it."""
    later = list(results).index(next(label for label, each in results.items() if each is result)) + 1
    return result.table({label: results[label] for label in list(results)[later:]})


def _measure(request: Request, loaded: LoadedModel, watch: Watch, study: HeterogeneityStudy) -> ProbeResult:
    settings, rows = request.settings, request.settings.rows(request.images)
    with watch(loaded.model, loaded.label) as layer_measures:
        result = shared_probe(
            request,
            loaded.model,
            loaded.masks,
            label=loaded.label,
            masks_per_image=settings.masks_per_image,
            measures=settings.measures,
            layer_measures=layer_measures,
            keep_masks=study.masks.setdefault(loaded.label, {}) if settings.keep_masks else None,
        )
    for others in request.processes.exchange(dict(request.broken)):
        for name, reason in others.items():
            request.note_broken(BrokenImage(name, reason))
    if not result.chunks:
        raise DataError(f"none of the {len(rows)} images can be read; the first: {next(iter(request.broken.values()))}")
    for name, reason in result.left_out().items():
        request.listener.note(f"{loaded.label}: {name} is left out: {reason}")
    known = known_measures()
    asked = {known[name] for name in names_of(settings.measures)}
    watched = [each for each in layer_measures if type(each) not in asked]  # for tables of their own
    return replace(result, measures=tuple(each for each in result.measures if each not in watched))


def model_first(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the column ``model`` in front."""
    return table[["model", *(column for column in table if column != "model")]]
