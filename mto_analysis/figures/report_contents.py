"""Everything a report needs, of several checkpoints: H over all images, and a few images in full."""

from __future__ import annotations

from collections.abc import Sequence

from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES, DEMO_MASKS, DemoTables
from mto_analysis.figures.plots.measures import draw_measures
from mto_analysis.figures.report import ReportContents
from mto_analysis.images import Images, choose_images, open_images
from mto_analysis.images.interface import spread_rows
from mto_analysis.masks import load_masks
from mto_analysis.models import ModelInfo
from mto_analysis.probe.explore import MAX_PATCHES, Explored, explore_shown
from mto_analysis.probe.maps import MapRecorders
from mto_analysis.probe.reconstruction import Reconstruction, reconstruct_shown
from mto_analysis.probe.request import LoadedModel, Request, Settings
from mto_analysis.probe.shown import ShownModel, show, shown_models
from mto_analysis.probe.study import measure_checkpoints
from mto_analysis.runtime.outputs import run_metadata


def collect_report(request: Request, *, shown: Sequence[str] | int = 4) -> ReportContents:
    """Measure checkpoints on the same images and look at a few of them closely.

    Args:
        request: What to measure.
        shown: Names of the images for explorer and reconstructions, or how many of those measured, spread evenly.
    """
    # Names that are not there are an error now, not after measuring.
    chosen = None if isinstance(shown, int) else choose_images(request.images, shown)
    recorders = MapRecorders(wanted=lambda info: _has_mean_maps(info, request.settings))
    explored: list[Explored] = []
    reconstructions: list[Reconstruction] = []

    def look_closely(loaded: LoadedModel) -> None:
        images = _spread(request, shown) if isinstance(shown, int) else chosen
        if images is not None:
            found = look_at(show(loaded, images))
            explored.extend(found[0])
            reconstructions.extend(found[1])

    study = measure_checkpoints(request, watch=recorders.watch, then=look_closely)
    figures = {} if request.settings.measures == "h" else {"Measures over layer depth": draw_measures(study.measures)}
    return ReportContents(
        study.table, study.models, explored, reconstructions, used_versions(), recorders.maps, figures=figures
    )


def _spread(request: Request, count: int) -> Images:
    """So many of the measured images, spread evenly; broken ones are not among them."""
    names = [request.images.names[row] for row in request.settings.rows(request.images)]
    measured = [name for name in names if name not in request.broken]
    return choose_images(request.images, [measured[row] for row in spread_rows(len(measured), count)])


def look_at(shown: ShownModel) -> tuple[list[Explored], list[Reconstruction]]:
    """The chosen images for the explorer, and reconstructed where a model predicts pixels."""
    return explore_shown(shown), reconstruct_shown(shown) if shown.own_loss else []


def _has_mean_maps(info: ModelInfo, settings: Settings) -> bool:
    """Whether maps can be averaged, which needs equal counts of masked patches, and drawn small enough."""
    if info.num_patches > MAX_PATCHES:
        return False
    if settings.masks is None:
        return info.mask_rule.with_options(unit=settings.mask_unit).kind != "blockwise"
    return len({count for masks in settings.masks.values() for count in masks.sum(dim=-1).tolist()}) == 1


def used_versions() -> dict[str, str]:
    """Versions of Python and the packages behind the numbers; no time and no machine: the same run, the same report."""
    metadata = run_metadata({})
    return {**metadata["versions"], "python": metadata["python"]}


def demo_report(tables: DemoTables, *, shown: int = 4) -> ReportContents:
    """The bundled models on a few of the bundled images in full, for the report."""
    images = open_images(DEMO_IMAGES)
    names = [images.names[index * len(images.names) // shown] for index in range(shown)]
    explored: list[Explored] = []
    reconstructions: list[Reconstruction] = []
    for method, masks in DEMO_MASKS.items():
        labels = [label for label in DEMO_CHECKPOINTS if label.startswith(method)]
        sources = [DEMO_CHECKPOINTS[label] for label in labels]
        request = Request(sources, choose_images(images, names), Settings(masks=load_masks(masks)), labels)
        for found in map(look_at, shown_models(request)):
            explored += found[0]
            reconstructions += found[1]
    return ReportContents(tables.fig1b, tables.models, explored, reconstructions, used_versions(), tables.maps)
