"""``mto-analyze heterogeneity``: Eq. (2) at every layer depth of one or several checkpoints (Fig. 1)."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mto_analysis.runtime.processes import Processes
from mto_analyze.console import as_text, launched, note, progress
from mto_analyze.options import Checkpoints, DecoderHeads, Heads, Offline, Overwrite, Quiet

if TYPE_CHECKING:
    import pandas as pd

    from mto_analysis.runtime.outputs import OutputFolder

FILES = ("heterogeneity.csv", "heterogeneity_per_image.csv", "heterogeneity.png", "heterogeneity.pdf", "run.json")


DEFINITION_FILES = ("definitions.csv", "attention.csv", "definitions.png", "definitions.pdf")
CONTROL_FILES = ("controls.csv", "controls.png", "controls.pdf")


class Definitions(StrEnum):
    """Which definitions of heterogeneity."""

    paper = "paper"
    all = "all"


class Precision(StrEnum):
    """Number formats of the model's forward."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


@launched
def heterogeneity(
    context: typer.Context,
    ckpt: Checkpoints,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder, list (.txt) or Parquet file; by default 256 bundled CIFAR-10 images."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Name of each checkpoint, in order (Fig. 1b: epochs).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many images, spread evenly.")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="Fraction masked; by default the model's own.")] = None,
    mask_unit: Annotated[
        int | None, typer.Option(min=1, help="Pixels masked at once; by default the model's own.")
    ] = None,
    match_visible: Annotated[
        bool, typer.Option("--match-visible", help="Leave equally many patches visible for all models.")
    ] = False,
    masks: Annotated[Path | None, typer.Option(help="Mask file (.npz with `mask` and `names`).")] = None,
    save_masks: Annotated[bool, typer.Option("--save-masks", help="Also write masks-LABEL.npz, for --masks.")] = False,
    masks_per_image: Annotated[int, typer.Option(min=1, help="Masks per image.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto (CUDA, else CPU), cpu, cuda, cuda:N, or mps.")] = "auto",
    dtype: Annotated[
        Precision, typer.Option(help="Of the forward; H is always computed in float32 or better.")
    ] = Precision.float32,
    definitions: Annotated[
        Definitions, typer.Option(help="all: also cosine, matched norms ..., and the model's own attention.")
    ] = Definitions.paper,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also measure random weights, other mask tokens ... (says how long).")
    ] = False,
    properties: Annotated[
        bool, typer.Option("--properties", help="Also the paper's three properties of masked tokens, as numbers.")
    ] = False,
    difference: Annotated[
        bool, typer.Option("--difference", help="Of two checkpoints: second minus first, image by image.")
    ] = False,
    control_seeds: Annotated[int, typer.Option(min=1, help="Random weights and mask tokens to try.")] = 3,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that decode images.")] = 0,
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    offline: Offline = False,
    strict: Annotated[bool, typer.Option("--strict", help="A broken image is an error.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("heterogeneity"),
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
    from mto_analysis.runtime.outputs import OutputFolder, labels_of, run_facts

    labels = label or labels_of(ckpt)
    mask_files = _mask_files(labels) if save_masks else {}
    names = (*FILES, *mask_files, *(DEFINITION_FILES if definitions == Definitions.all else ()))
    names += CONTROL_FILES if controls else ()
    names += (*(["properties.csv"] if properties else []), *(["difference.csv"] if difference else []))
    if difference and len(labels) != 2:
        raise ValueError(f"--difference compares two checkpoints, got {len(labels)}")
    processes.on_main(partial(OutputFolder, out, names, overwrite=overwrite))

    import torch

    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
    from mto_analysis.figures.plots.style import write_figure
    from mto_analysis.images import open_images
    from mto_analysis.masks import load_masks
    from mto_analysis.probe.controls import Controls
    from mto_analysis.probe.definition_study import Definitions as Watched
    from mto_analysis.probe.pairing import paired_difference
    from mto_analysis.probe.property_study import Properties
    from mto_analysis.probe.study import Settings, measure_checkpoints, together
    from mto_analysis.runtime.devices import pick_device

    watched = Watched() if definitions == Definitions.all else None
    controlled = Controls(control_seeds) if controls else None
    seen = Properties() if properties else None
    if images is None:
        note("no --images: measuring on 256 bundled CIFAR-10 images of 32 px, fine for a first look only", quiet=quiet)
    settings = Settings(
        limit=limit,
        mask_ratio=mask_ratio,
        mask_unit=mask_unit,
        num_visible=matched_visible(ckpt, offline, num_heads, decoder_num_heads) if match_visible else None,
        masks=load_masks(masks) if masks else None,
        masks_per_image=masks_per_image,
        seed=seed,
        batch_size=batch_size,
        device=pick_device(device),
        dtype=getattr(torch, dtype),
        num_workers=num_workers,
        strict=strict,
        keep_masks=save_masks,
    )
    study = measure_checkpoints(
        ckpt,
        open_images(images or DEMO_IMAGES),
        settings,
        labels=labels,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
        say=partial(note, quiet=quiet),
        warn=note,
        progress=partial(progress, quiet=quiet),
        watch=together(*(each.watch for each in (watched, controlled, seen) if each)),
        processes=processes,
    )
    tables = (watched.take_table(study), watched.attention_table()) if watched else None
    rows = None
    if controlled:
        rows = controlled.measure(
            study,
            ckpt,
            open_images(images or DEMO_IMAGES),
            settings,
            num_heads=num_heads,
            decoder_num_heads=decoder_num_heads,
            offline=offline,
            say=partial(note, quiet=quiet),
            progress=partial(progress, quiet=quiet),
            processes=processes,
        )
    if not processes.main:
        return
    folder = OutputFolder(out, names, overwrite=overwrite)
    if tables:
        write_definitions(folder, *tables)
    if rows is not None:
        write_controls(folder, study.table, rows)
    if seen:
        folder.write_table("properties.csv", seen.table())
    if difference:
        folder.write_table("difference.csv", paired_difference(study.per_image, *labels))
    folder.write_table("heterogeneity.csv", study.table)
    folder.write_table("heterogeneity_per_image.csv", study.per_image)
    write_figure(folder, "heterogeneity", draw_heterogeneity(study.table))
    for name, model in mask_files.items():
        folder.write_bytes(name, study.mask_file(model))
    folder.write_json(
        "run.json", run_facts(context.params, models=study.models, skipped=study.broken, processes=processes.count)
    )
    typer.echo(as_text(study.table))
    note(f"wrote {', '.join(names)} to {folder.path}", quiet=quiet)


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


def write_definitions(folder: "OutputFolder", table: "pd.DataFrame", attention: "pd.DataFrame") -> None:
    """The tables and the figure of ``--definitions all``."""
    from mto_analysis.figures.plots.definitions import draw_definitions
    from mto_analysis.figures.plots.style import write_figure

    folder.write_table("definitions.csv", table)
    folder.write_table("attention.csv", attention)
    write_figure(folder, "definitions", draw_definitions(table, attention))


def write_controls(folder: "OutputFolder", table: "pd.DataFrame", controls: "pd.DataFrame") -> None:
    """The table, the figure and the sentences of ``--controls``."""
    from mto_analysis.figures.plots.controls import draw_controls
    from mto_analysis.figures.plots.style import write_figure
    from mto_analysis.probe.controls import CONTROLS, control_bands, control_sentences

    folder.write_table("controls.csv", controls)
    write_figure(folder, "controls", draw_controls(table, control_bands(controls), CONTROLS))
    typer.echo("\n".join(control_sentences(table, controls)))


def matched_visible(ckpt: list[str], offline: bool, num_heads: int | None, decoder_num_heads: int | None) -> int:
    """The number of visible patches of ``--match-visible``."""
    from mto_analysis.checkpoints import inspect_checkpoint
    from mto_analysis.probe.pairing import common_num_visible

    reports = [
        inspect_checkpoint(each, num_heads=num_heads, decoder_num_heads=decoder_num_heads, offline=offline)
        for each in ckpt
    ]
    return common_num_visible([report.info for report in reports])
