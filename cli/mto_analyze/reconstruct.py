"""``mto-analyze reconstruct``: what each model fills in where patches are masked, and its own loss."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.options import (
    AutoDecoderHeads,
    AutoHeads,
    Checkpoints,
    DeviceName,
    Images,
    ImageSize,
    Labels,
    MaskRatio,
    Masks,
    MaskUnit,
    Mean,
    Offline,
    Out,
    Overwrite,
    Quiet,
    Seed,
    Std,
    ValueRange,
    Weights,
    WeightsOption,
)

FILES = ("reconstructions.png", "reconstructions.pdf", "reconstructions.csv", "run.json")


def reconstruct(
    context: typer.Context,
    ckpt: Checkpoints,
    images: Images = None,
    value_range: ValueRange = None,
    label: Labels = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--image", help="An image by name (path below --images, or row); repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Without --image: so many, spread evenly.")] = 4,
    mask_ratio: MaskRatio = None,
    mask_unit: MaskUnit = None,
    masks: Masks = None,
    seed: Seed = 0,
    device: DeviceName = "auto",
    num_heads: AutoHeads = None,
    decoder_num_heads: AutoDecoderHeads = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    weights: Weights = WeightsOption.model,
    offline: Offline = False,
    out: Out = Path("reconstructions"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw original, masked input, reconstruction and reconstruction with visible patches pasted.

    Writes reconstructions.png, .pdf and .csv (losses per image), and run.json to --out.
    """
    from mto_analysis.runtime.outputs import OutputFolder

    OutputFolder(out, FILES, overwrite=overwrite)

    from mto_analysis.figures.plots.reconstruct import draw_reconstructions
    from mto_analysis.probe.reconstruction import reconstruct_models
    from mto_analysis.probe.shown import shown_models

    request = measuring.request(context.params, chosen=chosen or (), limit=None if chosen else limit)
    study = reconstruct_models(shown_models(request), request.listener)
    table = study.table()
    figure = partial(draw_reconstructions, study.reconstructions)
    outputs = {"reconstructions": figure, "reconstructions.csv": table}
    measuring.write(context.params, FILES, outputs, models=study.models, skipped=request.skipped)
    typer.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
