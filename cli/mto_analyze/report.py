"""``mto-analyze report``: one self-contained HTML file with figures, tables, run facts and an explorer."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze.console import note, progress
from mto_analyze.options import Checkpoints, DecoderHeads, Heads, Offline, Overwrite, Quiet


def report(
    ckpt: Checkpoints,
    images: Annotated[
        Path | None, typer.Option(help="Folder, list (.txt) or Parquet file; by default bundled CIFAR-10 images.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Name of each checkpoint, in order.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure H on so many images, spread evenly.")] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--image", help="Show this image (path below --images, or row); repeatable."),
    ] = None,
    show: Annotated[int, typer.Option(min=1, help="Without --image: show so many.")] = 4,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Masked tokens, layer by layer",
    mask_ratio: Annotated[float | None, typer.Option(help="Fraction masked; by default the model's own.")] = None,
    mask_unit: Annotated[
        int | None, typer.Option(min=1, help="Pixels masked at once; by default the model's own.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Mask file (.npz with `mask` and `names`).")] = None,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Annotated[str, typer.Option(help="auto (CUDA, else CPU), cpu, cuda, cuda:N, or mps.")] = "auto",
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    offline: Offline = False,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a page to explore one or several checkpoints in a browser: it needs no network and no server."""
    from mto_analysis.runtime.outputs import OutputFolder

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)

    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.figures.report import render_report
    from mto_analysis.figures.report_contents import collect_report
    from mto_analysis.images import open_images
    from mto_analysis.masks import load_masks
    from mto_analysis.probe.study import Settings
    from mto_analysis.runtime.devices import pick_device

    contents = collect_report(
        ckpt,
        open_images(images or DEMO_IMAGES),
        Settings(
            limit=limit,
            mask_ratio=mask_ratio,
            mask_unit=mask_unit,
            masks=load_masks(masks) if masks else None,
            seed=seed,
            batch_size=batch_size,
            device=pick_device(device),
        ),
        labels=label,
        shown=chosen or show,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
        say=partial(note, quiet=quiet),
        warn=note,
        progress=partial(progress, quiet=quiet),
    )
    content = render_report(contents, title=title).encode()
    folder.write_bytes(out.name, content)
    note(f"wrote {out}, {len(content) / 1e6:.1f} MB; open it in a browser", quiet=quiet)
