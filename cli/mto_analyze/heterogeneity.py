"""``mto-analyze heterogeneity``: Eq. (2) at every layer depth of one or several checkpoints (Fig. 1)."""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mto_analysis.runtime.processes import this_process
from mto_analyze import measuring
from mto_analyze.console import as_text, launchable
from mto_analyze.options import (
    ADVANCED,
    AutoWorkers,
    ComputeOptions,
    DrawingOptions,
    InputOptions,
    MaskOptions,
    Measures,
    MeasuringPrecision,
    ModelOptions,
    OutputOptions,
    Precision,
    Strict,
    takes,
)

if TYPE_CHECKING:
    from mto_analysis.models import MaskedImageModel
    from mto_analysis.probe.request import LoadedModel, Request
    from mto_analysis.probe.study import HeterogeneityStudy, Watch


class Definitions(StrEnum):
    """Which definitions of heterogeneity."""

    paper = "paper"
    all = "all"


DefinitionsOption = Annotated[
    Definitions,
    typer.Option(metavar="NAME", help="paper; or all: also cosine, matched norms, attention and others."),
]
ControlsOption = Annotated[
    bool,
    typer.Option("--controls", help="Also measure controls: random weights, other mask tokens and others."),
]
PropertiesOption = Annotated[
    bool,
    typer.Option(
        "--properties",
        help="Also measure the paper's three properties.",
        rich_help_panel=ADVANCED,
    ),
]
Difference = Annotated[
    bool,
    typer.Option(
        "--difference",
        help="Also write paired differences (second - first).",
        rich_help_panel=ADVANCED,
    ),
]
ControlSeeds = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Seeds of the random controls.", rich_help_panel=ADVANCED),
]
MatchVisible = Annotated[
    bool,
    typer.Option(
        "--match-visible",
        help="The same number of visible patches for all models.",
        rich_help_panel=ADVANCED,
    ),
]
MasksPerImage = Annotated[int, typer.Option(min=1, metavar="N", help="Masks per image.", rich_help_panel=ADVANCED)]
SaveMasks = Annotated[
    bool,
    typer.Option("--save-masks", help="Also write masks-LABEL.npz, for --masks.", rich_help_panel=ADVANCED),
]


@launchable
@takes(
    InputOptions, MaskOptions, ModelOptions, OutputOptions, DrawingOptions, ComputeOptions, out=Path("heterogeneity")
)
def heterogeneity(
    context: typer.Context,
    out: Path,
    overwrite: bool,
    label: list[str] | None,
    measures: Measures = "h",
    definitions: DefinitionsOption = Definitions.paper,
    controls: ControlsOption = False,
    control_seeds: ControlSeeds = 3,
    properties: PropertiesOption = False,
    difference: Difference = False,
    match_visible: MatchVisible = False,
    masks_per_image: MasksPerImage = 1,
    save_masks: SaveMasks = False,
    precision: MeasuringPrecision = Precision.fp32,
    num_workers: AutoWorkers = None,
    strict: Strict = False,
) -> None:
    """Measure heterogeneity (Eq. 2) at every layer depth and draw Fig. 1.

    Writes heterogeneity.csv, heterogeneity_per_image.csv, the figure and run.json to --out; --measures, --definitions
    all and --controls write a table and a figure each.

    Example:
      mto-analyze heterogeneity --ckpt mae_vit_base_full --images IMAGES --limit 500
    """
    from mto_analysis.figures.files import file_names
    from mto_analysis.runtime.outputs import OutputFolder, chosen_labels

    given = {**context.params, "label": chosen_labels(measuring.sources(context.params), label)}
    parts = parts_of(given)
    files = file_names([*(name for part in parts for name in part.names), "run.json"])
    processes = this_process()
    processes.on_main(partial(OutputFolder, out, files, overwrite=overwrite))
    request = measuring.request(given, processes=processes, keep_masks=save_masks)
    study, outputs = measured(request, parts)
    if not processes.main:
        return
    measuring.write(given, files, outputs, models=study.models, skipped=request.skipped, processes=processes.count)
    if controls:
        from mto_analysis.probe.controls import control_sentences

        typer.echo("\n".join(control_sentences(study.table, outputs["controls.csv"])))
    typer.echo(as_text(study.table))


class Begun(NamedTuple):
    """A part of the result on its way: what it writes in the end, and what it watches until then."""

    outputs: "Callable[[HeterogeneityStudy], dict[str, Any]]"
    watch: "Watch | None" = None
    then: "Callable[[LoadedModel], object] | None" = None


class Part(NamedTuple):
    """A part of the result; the names of what it writes are known before anything is measured."""

    names: tuple[str, ...]
    begin: "Callable[[Request], Begun]"


def parts_of(given: Mapping[str, Any]) -> list[Part]:
    """What the options ask for."""
    labels, masks = given["label"], _mask_files(given["label"]) if given["save_masks"] else {}
    if given["difference"] and len(labels) != 2:
        raise ValueError(f"--difference compares two checkpoints, got {len(labels)}")
    parts = [Part(("heterogeneity.csv", "heterogeneity_per_image.csv", "heterogeneity"), _curves)]
    if given["measures"] != "h":
        parts.append(Part(("measures.csv", "measures"), _measures))
    if masks:
        parts.append(Part(tuple(masks), partial(_masks, masks)))
    # Its passes follow the main one, when no other part watches any more.
    if given["controls"]:
        parts.append(Part(("controls.csv", "controls"), partial(_controls, given["control_seeds"])))
    if given["definitions"] == Definitions.all:
        parts.append(Part(("definitions.csv", "attention.csv", "definitions"), _definitions))
    if given["properties"]:
        parts.append(Part(("properties.csv",), _properties))
    if given["difference"]:
        parts.append(Part(("difference.csv",), partial(_difference, labels)))
    return parts


def measured(request: "Request", parts: Sequence[Part]) -> "tuple[HeterogeneityStudy, dict[str, Any]]":
    """One pass over the images, and those of the controls: the study, and all outputs by name."""
    from mto_analysis.probe.study import measure_checkpoints, together

    begun = [part.begin(request) for part in parts]

    def then(loaded: "LoadedModel") -> None:
        for each in begun:
            if each.then:
                each.then(loaded)

    study = measure_checkpoints(request, watch=together(*(each.watch for each in begun if each.watch)), then=then)
    outputs = [each.outputs(study) for each in begun] if request.processes.main else []
    return study, {name: content for each in outputs for name, content in each.items()}


def _curves(request: "Request") -> Begun:
    from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity

    return Begun(
        lambda study: {
            "heterogeneity.csv": study.table,
            "heterogeneity_per_image.csv": study.per_image,
            "heterogeneity": partial(draw_heterogeneity, study.table),
        }
    )


def _measures(request: "Request") -> Begun:
    from mto_analysis.figures.plots.measures import draw_measures

    return Begun(lambda study: {"measures.csv": study.measures, "measures": partial(draw_measures, study.measures)})


def _masks(files: Mapping[str, str], request: "Request") -> Begun:
    return Begun(lambda study: {name: study.mask_file(label) for name, label in files.items()})


def _controls(seeds: int, request: "Request") -> Begun:
    from mto_analysis.figures.plots.controls import draw_controls
    from mto_analysis.probe.controls import CONTROLS, Controls, control_bands

    controls = Controls(request, seeds)

    def outputs(study: "HeterogeneityStudy") -> dict[str, Any]:
        rows = controls.table(study)
        figure = partial(draw_controls, study.table, control_bands(rows), CONTROLS)
        return {"controls.csv": rows, "controls": figure}

    return Begun(outputs, controls.watch, controls.then)


def _definitions(request: "Request") -> Begun:
    from mto_analysis.figures.plots.definitions import draw_definitions
    from mto_analysis.probe.definition_study import Definitions as Watched

    watched = Watched(request.settings.masks_per_image)

    def outputs(study: "HeterogeneityStudy") -> dict[str, Any]:
        table, attention = watched.table(study), watched.attention_table()
        figure = partial(draw_definitions, table, attention)
        return {"definitions.csv": table, "attention.csv": attention, "definitions": figure}

    return Begun(outputs, watched.watch)


def _properties(request: "Request") -> Begun:
    from mto_analysis.probe.properties import Properties

    properties = Properties()
    return Begun(lambda study: {"properties.csv": properties.table()}, properties.watch)


def _difference(labels: Sequence[str], request: "Request") -> Begun:
    from contextlib import nullcontext

    from mto_analysis.probe.pairing import check_stacks, paired_difference

    stacks: dict[str, Sequence[str]] = {}

    def watch(model: "MaskedImageModel", label: str) -> Any:
        stacks[label] = model.stacks
        check_stacks(stacks)  # before the second model is measured
        return nullcontext(())

    def outputs(study: "HeterogeneityStudy") -> dict[str, Any]:
        table = paired_difference(study.per_image, *labels)
        counts = table[["num_visible_first", "num_visible_second"]].iloc[0]
        if counts.iloc[0] != counts.iloc[1]:
            request.listener.warn(
                f"difference.csv compares {counts.iloc[0]:g} with {counts.iloc[1]:g} visible patches, on which H "
                "depends; add --match-visible, or use normalized_difference"
            )
        return {"difference.csv": table}

    return Begun(outputs, watch)


def _mask_files(labels: Sequence[str]) -> dict[str, str]:
    """The label behind each mask file."""
    from mto_analysis.runtime.outputs import file_words

    return dict(zip((f"masks-{word}.npz" for word in file_words(labels)), labels, strict=True))
