"""Heterogeneity of one or several checkpoints on the same images: the measurement behind Fig. 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mto_analysis.checkpoints import checkpoint_sha256, load_checkpoint, resolve
from mto_analysis.errors import DataError, HeadCountError
from mto_analysis.images import BrokenImage, ImageBatch, Images, choose_images, image_batches
from mto_analysis.masks import MaskRule, masks_to_bytes
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.engine import (
    LayerMeasure,
    MaskSource,
    ProbeResult,
    masks_from_file,
    masks_from_rule,
    undisturbed,
)
from mto_analysis.probe.own_loss import own_loss
from mto_analysis.probe.pairing import rule_leaving
from mto_analysis.probe.sharing import Progress, shared_probe
from mto_analysis.runtime.outputs import chosen_labels
from mto_analysis.runtime.processes import Processes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HeterogeneityStudy", "Settings", "Watch", "load_source", "measure_checkpoints", "together"]

_SELF_CHECK_IMAGES = 16
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


@dataclass(frozen=True)
class Settings:
    """How to measure; the defaults are the model's own masks, once per image, on the CPU in float32.

    Args:
        limit: Number of images, spread evenly; all by default.
        mask_ratio: Instead of the model's own.
        mask_unit: Side in pixels of the square masked at once, instead of the model's own.
        num_visible: The model's own kind of mask, but with so many patches left visible.
        masks: Masks by image name, instead of drawing them.
        masks_per_image: Masks per image.
        seed: Of the masks.
        batch_size: Images at once; results do not depend on it beyond rounding.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: Of the model's forward; H is computed in at least float32.
        num_workers: Processes that decode images.
        strict: A broken image is an error.
        keep_masks: Keep the masks for :meth:`HeterogeneityStudy.mask_file`.
    """

    limit: int | None = None
    mask_ratio: float | None = None
    mask_unit: int | None = None
    num_visible: int | None = None
    masks: Mapping[str, Tensor] | None = None
    masks_per_image: int = 1
    seed: int = 0
    batch_size: int = 32
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    num_workers: int = 0
    strict: bool = False
    keep_masks: bool = False

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.masks is not None and (self.mask_ratio is not None or self.mask_unit is not None):
            raise ValueError("masks from a file have their own ratio and unit; leave mask_ratio and mask_unit out")
        if self.num_visible is not None and (self.masks, self.mask_ratio, self.mask_unit) != (None, None, None):
            raise ValueError("num_visible decides the mask; leave masks, mask_ratio and mask_unit out")

    def rows(self, images: Images) -> list[int]:
        """Which images are measured, by number."""
        total = len(images.names)
        count = min(self.limit or total, total)
        return [index * total // count for index in range(count)]

    def mask_source(self, model: MaskedImageModel) -> tuple[MaskSource, str, MaskRule | None]:
        """Where masks come from, in words, and their rule."""
        if self.masks is not None:
            return masks_from_file(model.info, self.masks), "from the mask file", None
        if self.num_visible is not None:
            rule = rule_leaving(model.info, self.num_visible)
        else:
            rule = model.info.mask_rule.with_options(ratio=self.mask_ratio, unit=self.mask_unit)
        origin = model.info.mask_rule_source if rule == model.info.mask_rule else "as asked for"
        return masks_from_rule(model.info, rule, seed=self.seed), f"{rule} ({origin}), seed {self.seed}", rule


@dataclass
class HeterogeneityStudy:
    """What was measured: a row per model, stack and layer depth, the values per image, and facts for ``run.json``.

    ``measured`` has a column for every number of every measure in the pass; ``masks`` holds, where they were kept, the
    masks of each model by image name.
    """

    table: pd.DataFrame
    measured: pd.DataFrame
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
    sources: Sequence[str | Path],
    images: Images,
    settings: Settings | None = None,
    *,
    labels: Sequence[str] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda message: None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = lambda batches, total, label: iter(batches),
    watch: Watch = lambda model, label: nullcontext(()),
    processes: Processes | None = None,
) -> HeterogeneityStudy:
    """Measure heterogeneity at every layer depth of each checkpoint on the same images.

    Several processes measure a part of the images each, in the batches of one process, and all of them get the whole
    result. A layer measure that keeps something for itself must then be a
    :class:`~mto_analysis.probe.sharing.Shared` one.

    Args:
        sources: Checkpoints, one after the other in memory: paths, registry ids, ``hf://owner/name``, URLs.
        images: From :func:`~mto_analysis.images.open_images`.
        settings: How to measure.
        labels: Names in table and figure; by default from the paths.
        num_heads: For checkpoints that do not hold their head counts.
        decoder_num_heads: The same for decoders.
        offline: Never touch the network.
        say: Takes notes for the user.
        warn: Takes warnings for the user.
        progress: Wraps the batches, given their number and a label.
        watch: What else to measure in the same pass; its numbers are columns of ``measured``.
        processes: Those of a launcher, from :func:`~mto_analysis.runtime.processes.in_step`; by default this one alone.

    Raises:
        ValueError: If labels do not fit, or an option does not.
        CheckpointError: If a checkpoint cannot be used.
        DataError: If no image can be read, or one is broken under ``strict``.
        NumericalError: If a value is not finite.

    Example:
        >>> from mto_analysis.images import open_images
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
        >>> study = measure_checkpoints([DEMO_CHECKPOINTS["MAE"]], open_images(DEMO_IMAGES), Settings(limit=4))
        >>> study.table["layer_depth"].tolist()
        [0, 1, 2, 3, 4]
    """
    import pandas as pd

    settings = settings or Settings()
    names = chosen_labels(sources, labels)
    study = HeterogeneityStudy(pd.DataFrame(), pd.DataFrame(), [])
    tables, values = [], []
    paths = [resolve(source, offline=offline) for source in sources]  # all of them, before an hour is spent on one
    for source, path, label in zip(sources, paths, names, strict=True):
        model = load_source(path, num_heads, decoder_num_heads, several=len(sources) > 1)
        result, facts = _measure(
            model, label, images, settings, study, say, warn, progress, watch, processes or Processes()
        )
        study.models.append({"model": label, "source": str(source), "sha256": checkpoint_sha256(path), **facts})
        tables.append(result.summary().assign(model=label))
        values.append(result.to_frame().assign(model=label))
    study.table, study.measured = (_model_first(pd.concat(each, ignore_index=True)) for each in (tables, values))
    study.table["num_skipped"] = len(study.broken)
    return study


def load_source(
    source: str | Path, num_heads: int | None, decoder_num_heads: int | None, *, several: bool, offline: bool = False
) -> MaskedImageModel:
    """Head counts given for several checkpoints are for those that need them."""
    if several:
        try:
            return load_checkpoint(source, offline=offline)
        except HeadCountError:
            pass
    return load_checkpoint(source, num_heads=num_heads, decoder_num_heads=decoder_num_heads, offline=offline)


def _measure(
    model: MaskedImageModel,
    label: str,
    images: Images,
    settings: Settings,
    study: HeterogeneityStudy,
    say: Callable[[str], None],
    warn: Callable[[str], None],
    progress: Progress,
    watch: Watch,
    processes: Processes,
) -> tuple[ProbeResult, dict[str, Any]]:
    info, broken = model.info, study.broken
    masks, words, rule = settings.mask_source(model)
    say(f"{label}: {info.family} ({info.layout}), {info.pixels}; masks: {words}")
    if info.caveat:
        say(f"{label}: {info.caveat}")
    for assumption in info.assumptions:
        say(f"{label}: assumed that {assumption}")

    def report(image: BrokenImage) -> None:
        if image.name not in broken:  # once, though every model meets it again
            broken[image.name] = image.reason
            warn(f"skipped {image.name}: {image.reason}")

    def batches(size: int, part: Sequence[int], num_workers: int) -> Iterator[ImageBatch]:
        on_broken = None if settings.strict else report
        chosen = choose_images(images, [images.names[row] for row in part])
        return image_batches(chosen, info, batch_size=size, num_workers=num_workers, on_broken=on_broken)

    model.to(settings.device, settings.dtype)
    loss = None
    rows = settings.rows(images)
    if processes.main:
        loss = _self_check(model, batches(_SELF_CHECK_IMAGES, rows, 0), masks, label, say, warn)
    with watch(model, label) as layer_measures:
        result = shared_probe(
            model,
            partial(batches, settings.batch_size),
            rows,
            masks,
            processes,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            label=label,
            progress=progress,
            masks_per_image=settings.masks_per_image,
            layer_measures=layer_measures,
            keep_masks=study.masks.setdefault(label, {}) if settings.keep_masks else None,
        )
    for others in processes.exchange(dict(broken)):
        for name, reason in others.items():
            report(BrokenImage(name, reason))
    if not result.chunks:
        raise DataError(f"none of the {len(rows)} images can be read; the first: {next(iter(broken.values()))}")
    return result, {
        "info": asdict(info),
        "config": asdict(model.config),
        "mask_rule": asdict(rule) if rule else None,
        "masks": words,
        "own_loss": loss,
    }


def _self_check(
    model: MaskedImageModel,
    batches: Iterator[ImageBatch],
    masks: MaskSource,
    label: str,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> dict[str, Any] | None:
    """The model's own loss on a few images, so that a wrong load is seen."""
    batch = next(batches, None)
    if batch is None:
        return None
    like = next(model.parameters())
    with undisturbed(model):
        mask = masks(batch.names, 0).to(like.device)
        loss = own_loss(model, batch.images.to(like.device, like.dtype), mask)
    if loss is None:
        say(f"{label}: predicts no pixels, so its own loss cannot be checked on images")
        return None
    (warn if loss.suspicious else say)(f"{label}: {loss.in_words(len(batch.names))}")
    return loss._asdict()


def _model_first(table: pd.DataFrame) -> pd.DataFrame:
    return table[["model", *(column for column in table if column != "model")]]
