"""``mto-analyze reconstruct``: what each model fills in where patches are masked, and its own loss."""

from functools import partial
from pathlib import Path

import typer

from mto_analyze import measuring
from mto_analyze.options import (
    CheckpointOptions,
    DeviceName,
    DrawingOptions,
    ImageNames,
    InputOptions,
    MaskOptions,
    OutputOptions,
    Show,
    takes,
)


@takes(
    InputOptions,
    MaskOptions,
    CheckpointOptions,
    OutputOptions,
    DrawingOptions,
    without=("limit",),
    out=Path("reconstructions"),
)
def reconstruct(
    context: typer.Context,
    out: Path,
    overwrite: bool,
    chosen: ImageNames = None,
    show: Show = 4,
    device: DeviceName = "auto",
) -> None:
    """Draw original, masked input, reconstruction and reconstruction with visible patches pasted.

    Writes reconstructions.png, .pdf and .csv (losses per image), and run.json to --out.

    Example:
      mto-analyze reconstruct --ckpt mae_vit_base_full --images IMAGES --show 6
    """
    from mto_analysis.figures.files import file_names
    from mto_analysis.runtime.outputs import OutputFolder

    files = file_names(["reconstructions", "reconstructions.csv", "run.json"])
    OutputFolder(out, files, overwrite=overwrite)

    from mto_analysis.figures.plots.reconstruct import draw_reconstructions
    from mto_analysis.probe.reconstruction import reconstruct_models
    from mto_analysis.probe.shown import shown_models

    request = measuring.request(context.params, chosen=chosen or (), limit=None if chosen else show)
    study = reconstruct_models(shown_models(request), request.listener)
    table = study.table()
    figure = partial(draw_reconstructions, study.reconstructions)
    outputs = {"reconstructions": figure, "reconstructions.csv": table}
    measuring.write(context.params, files, outputs, models=study.models, skipped=request.skipped)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
