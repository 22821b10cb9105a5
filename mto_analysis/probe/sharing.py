"""A probe whose images are shared between the processes of a launcher, with the result of one process in all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mto_analysis.images import ImageBatch
from mto_analysis.models import LayerTokens, MaskedImageModel
from mto_analysis.probe.accumulating import Setup, TokenMeasure
from mto_analysis.probe.engine import LayerMeasure, MaskSource, ProbeResult, run_measures, undisturbed
from mto_analysis.probe.measures import Measures, measuring
from mto_analysis.probe.request import Request, masked_batch


@runtime_checkable
class Shared(Protocol):
    """A layer measure that keeps something for itself, which can be put together from parts of the images."""

    def kept(self) -> Any:
        """What this process kept; it is pickled, so tensors are on the CPU."""

    def put_together(self, parts: Sequence[Any]) -> None:
        """Keep what all processes kept, in the order of images, instead of the own part."""


@runtime_checkable
class Anchored(Protocol):
    """A layer measure that compares all images with the first one, which may be in another process's part."""

    def anchor(self, stack: str, layer: LayerTokens) -> None:
        """Take note of layer depth 0 of the first batch."""


def shared_probe(
    request: Request,
    model: MaskedImageModel,
    masks: MaskSource,
    *,
    label: str = "",
    masks_per_image: int = 1,
    measures: Measures = "h",
    layer_measures: Sequence[LayerMeasure] = (),
    keep_masks: dict[str, list[Tensor]] | None = None,
) -> ProbeResult:
    """Probe this process's part of a request's images, and put the parts of all together; all get the whole.

    Parts are whole batches, so values are those of one process bit for bit. Sums over images (maps, attention) are
    equal to rounding.

    Returns:
        All chunks in the order of images; none if no image could be read.
    """
    setup = Setup(model, model.info.mask_grid, masks_per_image, compared=len(request.sources) > 1)
    with measuring(measures, setup, layer_measures) as made:
        source = masks if keep_masks is None else _kept(masks, keep_masks)
        return _shared(request, setup, masks, source, label, [*made, *layer_measures], keep_masks)


def _shared(
    request: Request,
    setup: Setup,
    masks: MaskSource,
    source: MaskSource,
    label: str,
    measures: Sequence[LayerMeasure],
    keep_masks: dict[str, list[Tensor]] | None,
) -> ProbeResult:
    settings, processes, model = request.settings, request.processes, setup.model
    rows = settings.rows(request.images)
    mine = processes.share(rows, settings.batch_size)
    objects: Sequence[object] = measures
    anchored = [each for each in objects if isinstance(each, Anchored)]
    if mine and not processes.main and anchored:
        _show_first(model, request.batches(model, rows), masks, anchored)
    batches = request.batches(model, mine, num_workers=settings.num_workers) if mine else iter(())
    stream = iter(request.listener.progress(batches, -(-len(mine) // settings.batch_size), label))
    first = next(stream, None)
    result = ProbeResult(())
    if first is not None:
        result = run_measures(setup, chain([first], stream), source, measures)
    if processes.count == 1:
        return result
    shared = [each for each in objects if isinstance(each, Shared)]
    values = replace(result, measures=())  # measures hold the model; what they kept is exchanged
    parts = processes.exchange((values, [each.kept() for each in shared], dict(keep_masks or {})))
    for number, measure in enumerate(shared):
        measure.put_together([kept[number] for _, kept, _ in parts])
    if keep_masks is not None:
        keep_masks.clear()
        for _, _, drawn in parts:
            keep_masks.update(drawn)
    whole = ProbeResult(()).merge(*(part for part, _, _ in parts))
    return replace(whole, measures=tuple(each for each in measures if isinstance(each, TokenMeasure)))


def _kept(masks: MaskSource, kept: dict[str, list[Tensor]]) -> MaskSource:
    def sample(names: Sequence[str], k: int) -> Tensor:
        drawn = masks(names, k)
        for name, mask in zip(names, drawn, strict=True):
            kept.setdefault(name, []).append(mask)
        return drawn

    return sample


def _show_first(
    model: MaskedImageModel, batches: Iterator[ImageBatch], masks: MaskSource, measures: Sequence[Anchored]
) -> None:
    batch = next(batches, None)
    if batch is None:
        return
    with undisturbed(model):
        images, mask = masked_batch(model, batch, masks)
        for stack in model.stacks:
            layer = next(iter(model.layer_tokens(images, mask, stack)))
            for measure in measures:
                measure.anchor(stack, layer)
