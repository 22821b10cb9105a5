"""``mto-analyze report``: one self-contained HTML file with figures, tables, run metadata and an explorer."""

from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.console import note
from mto_analyze.options import (
    AnyCheckpoints,
    AutoDecoderHeads,
    AutoHeads,
    BatchSize,
    DeviceName,
    Images,
    ImageSize,
    Labels,
    Limit,
    MaskRatio,
    Masks,
    MaskUnit,
    Mean,
    Models,
    Offline,
    Overwrite,
    Quiet,
    Seed,
    Std,
    ValueRange,
    WeightsOrFile,
)


def report(
    context: typer.Context,
    ckpt: AnyCheckpoints = None,
    model: Models = None,
    images: Images = None,
    value_range: ValueRange = None,
    label: Labels = None,
    limit: Limit = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--image", help="Show this image (path below --images, or row); repeatable."),
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Without --image: show so many.")] = 4,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Masked tokens, layer by layer",
    mask_ratio: MaskRatio = None,
    mask_unit: MaskUnit = None,
    masks: Masks = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: DeviceName = "auto",
    num_heads: AutoHeads = None,
    decoder_num_heads: AutoDecoderHeads = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    weights: WeightsOrFile = "model",
    offline: Offline = False,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a page to explore one or several checkpoints in a browser: it needs no network and no server."""
    from mto_analysis.runtime.outputs import OutputFolder

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)

    from mto_analysis.figures.report import render_report
    from mto_analysis.figures.report_contents import collect_report

    contents = collect_report(measuring.request(context.params), shown=chosen or show)
    content = render_report(contents, title=title).encode()
    folder.write_bytes(out.name, content)
    note(f"wrote {out}, {len(content) / 1e6:.1f} MB; open it in a browser", quiet=quiet)
