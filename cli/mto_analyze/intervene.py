"""``mto-analyze intervene``: what masked tokens cause, by cutting their attention or replacing them."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.options import (
    AsJson,
    ComputeOptions,
    DrawingOptions,
    InputOptions,
    MaskOptions,
    ModelOptions,
    OutputOptions,
    Strict,
    Workers,
    takes,
)


class Intervention(StrEnum):
    """What is done to masked tokens."""

    cut_visible_to_masked = "cut-visible-to-masked"
    cut_masked_to_visible = "cut-masked-to-visible"
    cut_masked_to_masked = "cut-masked-to-masked"
    cut_all_to_masked = "cut-all-to-masked"
    zero = "zero"
    mean = "mean"
    other_image = "other-image"
    freeze = "freeze"


@takes(
    InputOptions, MaskOptions, ModelOptions, OutputOptions, DrawingOptions, ComputeOptions, out=Path("interventions")
)
def intervene(
    context: typer.Context,
    out: Path,
    overwrite: bool,
    chosen: Annotated[
        list[Intervention] | None,
        typer.Option("--intervention", metavar="NAME", help="Only this one; repeatable. By default all."),
    ] = None,
    from_depth: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="DEPTH", help="Layer depth from which on it acts; by default 0; repeatable."),
    ] = None,
    controls: Annotated[bool, typer.Option(help="Also do the same to as many visible tokens.")] = True,
    neighbours: Annotated[
        int, typer.Option("-k", "--neighbours", min=1, metavar="K", help="Neighbours of kNN, if images have labels.")
    ] = 20,
    as_json: AsJson = False,
    num_workers: Workers = 0,
    strict: Strict = False,
) -> None:
    """Cut the attention of masked tokens or replace them, and measure what changes.

    Effects are differences within images, with 95 % intervals: of the reconstruction loss, of visible tokens (cosine
    with the intact forward) and of kNN accuracy from visible tokens. Writes interventions.csv, interventions.png and
    .pdf, and run.json to --out.

    Example:
      mto-analyze intervene --ckpt simmim_vit_base_800e --images IMAGES --limit 256
    """
    from mto_analysis.figures.files import file_names
    from mto_analysis.runtime.outputs import OutputFolder

    files = file_names(["interventions", "interventions.csv", "run.json"])
    OutputFolder(out, files, overwrite=overwrite)

    from mto_analysis.figures.plots.interventions import draw_interventions
    from mto_analysis.probe.interventions import INTERVENTIONS, intervene_on_checkpoints, intervention_sentences

    request = measuring.request(context.params)
    names = [each.value.replace("-", "_") for each in chosen or ()]
    study = intervene_on_checkpoints(
        request,
        interventions=list(dict.fromkeys(names)) or list(INTERVENTIONS),
        from_depths=sorted(set(from_depth or (0,))),
        controls=controls,
        neighbours=neighbours,
    )
    figure = partial(draw_interventions, study.table)
    outputs = {"interventions.csv": study.table, "interventions": figure}
    measuring.write(context.params, files, outputs, models=study.models, skipped=request.skipped)
    if as_json:
        typer.echo(study.table.to_json(orient="records", indent=2, double_precision=15))
    else:
        typer.echo(study.shown().to_string(index=False, float_format=lambda value: f"{value:.4g}"))
        typer.echo("\n".join(intervention_sentences(study.table)))
