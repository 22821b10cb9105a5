"""``mto-analyze heterogeneity``: Eq. (2) at every layer depth of one or several checkpoints (Fig. 1)."""

from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analysis.runtime.processes import Processes
from mto_analyze import measuring
from mto_analyze.console import as_text, launched, note
from mto_analyze.options import (
    BatchSize,
    Checkpoints,
    DecoderHeads,
    DeviceName,
    Dtype,
    Heads,
    Images,
    Labels,
    Limit,
    MaskRatio,
    Masks,
    MaskUnit,
    Offline,
    Out,
    Overwrite,
    Precision,
    Quiet,
    Seed,
    Strict,
    Workers,
)

if TYPE_CHECKING:
    from mto_analysis.probe.study import HeterogeneityStudy


class Definitions(StrEnum):
    """Which definitions of heterogeneity."""

    paper = "paper"
    all = "all"


MatchVisible = Annotated[
    bool, typer.Option("--match-visible", help="Leave equally many patches visible for all models.")
]
DefinitionsOption = Annotated[
    Definitions, typer.Option(help="all: also cosine, matched norms ..., and the model's own attention.")
]
ControlsOption = Annotated[
    bool, typer.Option("--controls", help="Also measure random weights, other mask tokens ... (says how long).")
]
PropertiesOption = Annotated[
    bool, typer.Option("--properties", help="Also the paper's three properties of masked tokens, as numbers.")
]
Difference = Annotated[
    bool, typer.Option("--difference", help="Also write paired differences per image (second minus first).")
]


@launched
def heterogeneity(
    context: typer.Context,
    ckpt: Checkpoints,
    images: Images = None,
    label: Labels = None,
    limit: Limit = None,
    mask_ratio: MaskRatio = None,
    mask_unit: MaskUnit = None,
    match_visible: MatchVisible = False,
    masks: Masks = None,
    save_masks: Annotated[bool, typer.Option("--save-masks", help="Also write masks-LABEL.npz, for --masks.")] = False,
    masks_per_image: Annotated[int, typer.Option(min=1, help="Masks per image.")] = 1,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: DeviceName = "auto",
    dtype: Dtype = Precision.float32,
    definitions: DefinitionsOption = Definitions.paper,
    controls: ControlsOption = False,
    properties: PropertiesOption = False,
    difference: Difference = False,
    control_seeds: Annotated[int, typer.Option(min=1, help="Random weights and mask tokens to try.")] = 3,
    num_workers: Workers = 0,
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    offline: Offline = False,
    strict: Strict = False,
    out: Out = Path("heterogeneity"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    *,
    processes: Processes,
) -> None:
    """Measure heterogeneity (Eq. 2) at every layer depth and draw Fig. 1.

    Writes heterogeneity.csv, heterogeneity_per_image.csv, heterogeneity.png and .pdf, and run.json to --out; with
    --definitions all also definitions.csv, attention.csv, definitions.png and .pdf; with --controls also controls.csv,
    controls.png and .pdf.
    """
    from mto_analysis.runtime.outputs import OutputFolder, labels_of

    given = {**context.params, "label": label or labels_of(ckpt)}
    if difference and len(given["label"]) != 2:
        raise ValueError(f"--difference compares two checkpoints, got {len(given['label'])}")
    files = output_files(given)
    processes.on_main(partial(OutputFolder, out, files, overwrite=overwrite))
    outputs, study, sentences = measure(given, processes)
    if not processes.main:
        return

    from mto_analysis.figures.files import write_outputs
    from mto_analysis.runtime.outputs import run_facts

    facts = run_facts(context.params, models=study.models, skipped=study.broken, processes=processes.count)
    write_outputs(OutputFolder(out, files, overwrite=overwrite), {**outputs, "run.json": facts})
    typer.echo("\n".join([*sentences, as_text(study.table)]))
    note(f"wrote {', '.join(files)} to {out}", quiet=quiet)


def output_files(given: Mapping[str, Any]) -> list[str]:
    """Names of all files of a run, before it measures anything."""
    from mto_analysis.figures.files import file_names

    names = ["heterogeneity.csv", "heterogeneity_per_image.csv", "heterogeneity", "run.json"]
    names += _mask_files(given["label"]) if given["save_masks"] else ()
    names += ("definitions.csv", "attention.csv", "definitions") if given["definitions"] == Definitions.all else ()
    names += ("controls.csv", "controls") if given["controls"] else ()
    names += [f"{name}.csv" for name in ("properties", "difference") if given[name]]
    return file_names(names)


def measure(given: Mapping[str, Any], processes: Processes) -> tuple[dict[str, Any], "HeterogeneityStudy", list[str]]:
    """One pass over the images, and those of the controls: outputs by name, the study, and what to say of it."""
    from mto_analysis.figures.plots.controls import draw_controls
    from mto_analysis.figures.plots.definitions import draw_definitions
    from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
    from mto_analysis.probe.controls import CONTROLS, Controls, control_bands, control_sentences
    from mto_analysis.probe.definition_study import Definitions as Watched
    from mto_analysis.probe.pairing import paired_difference
    from mto_analysis.probe.property_study import Properties
    from mto_analysis.probe.study import measure_checkpoints, together

    watched = Watched() if given["definitions"] == Definitions.all else None
    controls = Controls(given["control_seeds"]) if given["controls"] else None
    seen = Properties() if given["properties"] else None
    chosen, telling = measuring.images(given), measuring.telling(given)
    if given["images"] is None:
        telling["say"]("no --images: measuring on 256 bundled CIFAR-10 images of 32 px, fine for a first look only")
    visible = matched_visible(given) if given["match_visible"] else None
    settings = measuring.settings(given, num_visible=visible, keep_masks=given["save_masks"])
    watch = together(*(each.watch for each in (watched, controls, seen) if each))
    options = {"labels": given["label"], "watch": watch, "processes": processes, **telling}
    study = measure_checkpoints(given["ckpt"], chosen, settings, **options)
    outputs: dict[str, Any] = {}
    sentences: list[str] = []
    if watched:
        table, attention = watched.table(study), watched.attention_table()
        figure = draw_definitions(table, attention)
        outputs |= {"definitions.csv": table, "attention.csv": attention, "definitions": figure}
    if controls:
        del telling["warn"]
        rows = controls.measure(study, given["ckpt"], chosen, settings, processes=processes, **telling)
        figure = draw_controls(study.table, control_bands(rows), CONTROLS)
        outputs |= {"controls.csv": rows, "controls": figure}
        sentences = control_sentences(study.table, rows)
    if seen:
        outputs["properties.csv"] = seen.table()
    if given["difference"]:
        outputs["difference.csv"] = paired_difference(study.per_image, *given["label"])
    outputs |= {"heterogeneity.csv": study.table, "heterogeneity_per_image.csv": study.per_image}
    outputs["heterogeneity"] = draw_heterogeneity(study.table)
    masks = _mask_files(given["label"]) if given["save_masks"] else {}
    return {**outputs, **{name: study.mask_file(model) for name, model in masks.items()}}, study, sentences


def _mask_files(labels: list[str]) -> dict[str, str]:
    """The label behind each mask file; two labels may not end up in one file."""
    from mto_analysis.runtime.outputs import file_word

    files: dict[str, str] = {}
    for label in labels:
        name = f"masks-{file_word(label)}.npz"
        if name in files and files[name] != label:
            raise ValueError(f"labels {files[name]!r} and {label!r} would share the mask file {name}; change one")
        files[name] = label
    return files


def matched_visible(given: Mapping[str, Any]) -> int:
    """The number of visible patches of ``--match-visible``."""
    from mto_analysis.checkpoints import inspect_checkpoint
    from mto_analysis.probe.pairing import common_num_visible

    options: dict[str, Any] = {name: given[name] for name in ("num_heads", "decoder_num_heads", "offline")}
    return common_num_visible([inspect_checkpoint(each, **options).info for each in given["ckpt"]])
