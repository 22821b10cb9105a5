"""Everything a report needs, of several checkpoints: H over all images, and a few images in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES, DEMO_MASKS, DemoTables
from mto_analysis.figures.report import ReportContents
from mto_analysis.images import Images, choose_images, open_images
from mto_analysis.masks import load_masks
from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.probe import LayerMeasure
from mto_analysis.probe.explore import MAX_PATCHES, Explored, explore_shown
from mto_analysis.probe.quadrants import AffinityMaps
from mto_analysis.probe.reconstruction import Reconstruction, reconstruct_shown
from mto_analysis.probe.sharing import Progress
from mto_analysis.probe.shown import shown_models
from mto_analysis.probe.study import Settings, measure_checkpoints
from mto_analysis.runtime.outputs import labels_of, run_facts

__all__ = ["collect_report", "demo_report", "show_images", "used_versions"]


def show_images(
    sources: Sequence[str | Path],
    images: Images,
    settings: Settings,
    *,
    labels: Sequence[str],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    offline: bool = False,
) -> tuple[list[Explored], list[Reconstruction]]:
    """All ``images`` through each checkpoint, for the explorer, and reconstructed where a model predicts pixels."""
    explored, reconstructions = [], []
    for shown in shown_models(
        sources,
        images,
        replace(settings, limit=None),
        labels=labels,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
    ):
        explored += explore_shown(shown)
        reconstructions += reconstruct_shown(shown) if shown.own_loss else []
    return explored, reconstructions


def collect_report(
    sources: Sequence[str | Path],
    images: Images,
    settings: Settings | None = None,
    *,
    labels: Sequence[str] | None = None,
    shown: Sequence[str] | int = 4,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    offline: bool = False,
    say: Callable[[str], None] = lambda message: None,
    warn: Callable[[str], None] = lambda message: None,
    progress: Progress = lambda batches, total, label: iter(batches),
) -> ReportContents:
    """Measure checkpoints on the same images and look at a few of them closely.

    Args:
        sources: Checkpoints: paths, registry ids, ``hf://owner/name``, URLs.
        images: From :func:`~mto_analysis.images.open_images`.
        settings: How to measure.
        labels: Names of the models; by default from the paths.
        shown: Names of the images for explorer and reconstructions, or how many of those measured, spread evenly.
        num_heads: For checkpoints that do not hold their head counts.
        decoder_num_heads: The same for decoders.
        offline: Never touch the network.
        say: Takes notes for the user.
        warn: Takes warnings for the user.
        progress: Wraps the batches, given their number and a label.

    Raises:
        ValueError: If labels do not fit, or an option does not.
        CheckpointError: If a checkpoint cannot be used.
        DataError: If no image can be read, or one to be shown is not there.
        NumericalError: If a value is not finite.
    """
    settings = settings or Settings()
    names = list(labels) if labels else labels_of(sources)
    # Names that are not there are an error now, not after measuring.
    chosen = images if isinstance(shown, int) else choose_images(images, shown)
    recorders: dict[str, AffinityMaps] = {}

    def watch(model: MaskedImageModel, label: str) -> nullcontext[Sequence[LayerMeasure]]:
        if not _has_mean_maps(model.info, settings):
            return nullcontext(())
        recorders[label] = AffinityMaps()
        return nullcontext((recorders[label],))

    study = measure_checkpoints(
        sources,
        images,
        settings,
        labels=names,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
        say=say,
        warn=warn,
        progress=progress,
        watch=watch,
    )
    if isinstance(shown, int):
        measured = list(dict.fromkeys(study.per_image["image"]))  # broken images are not among them
        count = min(shown, len(measured))
        chosen = choose_images(images, [measured[index * len(measured) // count] for index in range(count)])
    explored, reconstructions = show_images(
        sources,
        chosen,
        settings,
        labels=names,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
    )
    maps = {label: recorder.maps for label, recorder in recorders.items()}
    return ReportContents(study.table, study.models, explored, reconstructions, used_versions(), maps)


def _has_mean_maps(info: ModelInfo, settings: Settings) -> bool:
    """Whether maps can be averaged, which needs equal counts of masked patches, and drawn small enough."""
    if info.num_patches > MAX_PATCHES:
        return False
    if settings.masks is None:
        return info.mask_rule.with_options(unit=settings.mask_unit).kind != "blockwise"
    return len({count for masks in settings.masks.values() for count in masks.sum(dim=-1).tolist()}) == 1


def used_versions() -> dict[str, str]:
    """Versions of Python and the packages behind the numbers; no time and no machine: the same run, the same report."""
    facts = run_facts({})
    return {**facts["versions"], "python": facts["python"]}


def demo_report(tables: DemoTables, *, shown: int = 4) -> ReportContents:
    """The bundled models on a few of the bundled images in full, for the report.

    Args:
        tables: What :func:`measure_demo` measured.
        shown: Number of images.
    """
    images = open_images(DEMO_IMAGES)
    names = [images.names[index * len(images.names) // shown] for index in range(shown)]
    explored, reconstructions = [], []
    for method, masks in DEMO_MASKS.items():
        labels = [label for label in DEMO_CHECKPOINTS if label.startswith(method)]
        sources = [DEMO_CHECKPOINTS[label] for label in labels]
        found = show_images(sources, choose_images(images, names), Settings(masks=load_masks(masks)), labels=labels)
        explored += found[0]
        reconstructions += found[1]
    return ReportContents(tables.fig1b, tables.models, explored, reconstructions, used_versions(), tables.maps)
