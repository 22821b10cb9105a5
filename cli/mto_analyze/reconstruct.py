"""``mto-analyze reconstruct``: what each model fills in where patches are masked, and its own loss."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze.console import note
from mto_analyze.options import Checkpoints, DecoderHeads, Heads, Offline, Overwrite, Quiet

FILES = ("reconstructions.png", "reconstructions.pdf", "reconstructions.csv", "run.json")


def reconstruct(
    context: typer.Context,
    ckpt: Checkpoints,
    images: Annotated[
        Path | None, typer.Option(help="Folder, list (.txt) or Parquet file; by default bundled CIFAR-10 images.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Name of each checkpoint, in order.")] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--image", help="An image by name (path below --images, or row); repeatable."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Without --image: so many, spread evenly.")] = 4,
    mask_ratio: Annotated[float | None, typer.Option(help="Fraction masked; by default the model's own.")] = None,
    mask_unit: Annotated[
        int | None, typer.Option(min=1, help="Pixels masked at once; by default the model's own.")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="Mask file (.npz with `mask` and `names`).")] = None,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    device: Annotated[str, typer.Option(help="auto (CUDA, else CPU), cpu, cuda, cuda:N, or mps.")] = "auto",
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    offline: Offline = False,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("reconstructions"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw original, masked input, reconstruction and reconstruction with visible patches pasted.

    Writes reconstructions.png, .pdf and .csv (losses per image), and run.json to --out.
    """
    from mto_analysis.runtime.outputs import OutputFolder, run_facts

    folder = OutputFolder(out, FILES, overwrite=overwrite)

    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.figures.plots.reconstruct import draw_reconstructions
    from mto_analysis.figures.plots.style import write_figure
    from mto_analysis.images import choose_images, open_images
    from mto_analysis.masks import load_masks
    from mto_analysis.probe.reconstruction import reconstruct_models
    from mto_analysis.probe.shown import shown_models
    from mto_analysis.probe.study import Settings
    from mto_analysis.runtime.devices import pick_device

    source = open_images(images or DEMO_IMAGES)
    models = shown_models(
        ckpt,
        choose_images(source, chosen) if chosen else source,
        Settings(
            limit=None if chosen else limit,
            mask_ratio=mask_ratio,
            mask_unit=mask_unit,
            masks=load_masks(masks) if masks else None,
            seed=seed,
            device=pick_device(device),
        ),
        labels=label,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        offline=offline,
        say=partial(note, quiet=quiet),
        warn=note,
    )
    study = reconstruct_models(models, warn=note)
    write_figure(folder, "reconstructions", draw_reconstructions(study.reconstructions))
    folder.write_table("reconstructions.csv", study.table())
    folder.write_json("run.json", run_facts(context.params, models=study.models))
    typer.echo(study.table().to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    note(f"wrote {', '.join(FILES)} to {folder.path}", quiet=quiet)
