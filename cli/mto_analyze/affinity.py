"""``mto-analyze affinity``: affinity maps of every layer depth and the numbers of their quadrants (Fig. 2)."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analysis.runtime.processes import this_process
from mto_analyze import measuring
from mto_analyze.console import launchable
from mto_analyze.options import (
    FIGURES,
    AutoWorkers,
    ComputeOptions,
    DrawingOptions,
    ImageNames,
    InputOptions,
    MaskOptions,
    ModelOptions,
    OutputOptions,
    Strict,
    takes,
)

if TYPE_CHECKING:
    from mto_analysis.probe.maps import AffinityStudy


#: Columns of ``quadrants.csv`` that fit a terminal.
SHOWN = ["model", "stack", "layer_depth", "quadrant", "mass", "dot_mean", "cosine_mean", "row_entropy"]


class Kind(StrEnum):
    """What a map shows."""

    softmax = "softmax"
    dot = "dot"
    cosine = "cosine"


class Scale(StrEnum):
    """How values become colours."""

    off_diagonal = "off-diagonal"
    per_map = "per-map"
    shared = "shared"


KindOption = Annotated[Kind, typer.Option(metavar="NAME", help="softmax (the paper's psi), dot or cosine.")]
ScaleOption = Annotated[
    Scale,
    typer.Option(
        metavar="NAME",
        help="Colours from min to max of each map: off-diagonal, per-map (with its diagonal, as in the paper) or "
        "shared by all.",
        rich_help_panel=FIGURES,
    ),
]
Log = Annotated[bool, typer.Option("--log", help="Logarithmic colours, of a softmax.", rich_help_panel=FIGURES)]


@launchable
@takes(InputOptions, MaskOptions, ModelOptions, OutputOptions, DrawingOptions, ComputeOptions, out=Path("affinity"))
def affinity(
    context: typer.Context,
    out: Path,
    overwrite: bool,
    label: list[str] | None,
    limit: int | None,
    kind: KindOption = Kind.softmax,
    scale: ScaleOption = Scale.off_diagonal,
    log: Log = False,
    chosen: ImageNames = None,
    num_workers: AutoWorkers = None,
    strict: Strict = False,
) -> None:
    """Map the affinity of all pairs of tokens at every layer depth (Fig. 2), masked tokens first.

    Writes affinity.png and .pdf (one pair per model and image), affinity.npz, quadrants.csv and run.json to --out.

    Example:
      mto-analyze affinity --ckpt mae_vit_base_full --images IMAGES --limit 256
    """
    from mto_analysis.figures.files import file_names
    from mto_analysis.runtime.outputs import OutputFolder, chosen_labels

    if chosen and limit:
        raise ValueError("--image names the images, so leave --limit out")
    if log and kind is not Kind.softmax:
        raise ValueError(f"--log needs --kind softmax, whose values are positive, got --kind {kind.value}")
    given = {**context.params, "label": chosen_labels(measuring.sources(context.params), label)}
    stems = figure_stems(given["label"], chosen or [""])
    files = file_names(["affinity.npz", "quadrants.csv", *stems.values(), "run.json"])
    processes = this_process()
    processes.on_main(partial(OutputFolder, out, files, overwrite=overwrite))

    from mto_analysis.probe.maps import map_checkpoints

    request = measuring.request(given, chosen=chosen or (), processes=processes)
    study = map_checkpoints(request, kind=kind.value, each_image=bool(chosen))
    if not processes.main:
        return
    metadata = {"models": study.heterogeneity.models, "skipped": request.skipped, "processes": processes.count}
    measuring.write(given, files, drawn(study, stems, scale=scale.value, log=log), **metadata)
    typer.echo(study.quadrants[SHOWN].to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def figure_stems(labels: Sequence[str], images: Sequence[str]) -> dict[tuple[str, str], str]:
    """The figure of each model and image; a part of the name that is always the same is left out."""
    from mto_analysis.runtime.outputs import file_words

    pairs = [(model, image) for model in labels for image in images]
    names = [" ".join(["affinity", *([model] if len(labels) > 1 else []), image]) for model, image in pairs]
    return dict(zip(pairs, file_words(names), strict=True))


def drawn(study: "AffinityStudy", stems: Mapping[tuple[str, str], str], **how: Any) -> dict[str, Any]:
    """The outputs of a study by name: its tables, and a figure for each model and image."""
    from mto_analysis.figures.plots.affinity import draw_affinity

    outputs: dict[str, Any] = {"quadrants.csv": study.quadrants, "affinity.npz": study.maps_file()}
    for (model, image), stem in stems.items():
        maps = [each for each in study.maps[model] if (each.image or "") == image]
        if maps:  # none where the image was broken and skipped
            outputs[stem] = partial(draw_affinity, maps, title=model, **how)
    return outputs
