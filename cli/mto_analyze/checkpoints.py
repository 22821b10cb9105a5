"""``mto-analyze checkpoints``: the registry of public files, fetching, verifying and converting them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mto_analyze import measuring
from mto_analyze.console import Command, CommandGroup, note
from mto_analyze.inspect import in_words
from mto_analyze.options import (
    INPUT,
    OUTPUT,
    AsJson,
    Checkpoint,
    FileOptions,
    Offline,
    OutFile,
    Overwrite,
    WeightsOption,
    takes,
)

if TYPE_CHECKING:
    from mto_analysis.checkpoints import registry

checkpoints = typer.Typer(cls=CommandGroup, help="List, download, verify and convert public checkpoints.")

Id = Annotated[str, typer.Argument(metavar="ID", help="Registry id, as printed by `checkpoints list`.")]


@checkpoints.command("list", cls=Command)
@takes()
def list_(
    text: Annotated[
        str | None,
        typer.Argument(metavar="[TEXT]", help="Only ids and backbones that contain this, as vit-b or simmim."),
    ] = None,
    family: Annotated[str | None, typer.Option(metavar="NAME", help="Only this family.", rich_help_panel=INPUT)] = None,
    with_mask_token: Annotated[
        bool, typer.Option("--with-mask-token", help="Only files with a mask token.", rich_help_panel=INPUT)
    ] = False,
    loadable: Annotated[
        bool, typer.Option("--loadable", help="Only files that can be measured.", rich_help_panel=INPUT)
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the public checkpoints, with those that have a mask token and a decoder.

    What else is known about one is printed by `info`, and about all with --json.

    Example:
      mto-analyze checkpoints list --family mae --with-mask-token
    """
    from mto_analysis.checkpoints.registry import list_checkpoints

    rows = [
        row
        for row in list_checkpoints(family=family, with_mask_token=with_mask_token)
        if (row.loads or not loadable) and (text or "").lower() in f"{row.id} {row.backbone}".lower()
    ]
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=2))
        return
    lines = [("id", "backbone", "epochs", "mask", "decoder", "loads"), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if not rows:
        note("no public checkpoint matches; leave a filter out")


@checkpoints.command(cls=Command)
@takes()
def info(name: Id, as_json: AsJson = False) -> None:
    """Print everything known about one public checkpoint.

    Example:
      mto-analyze checkpoints info simmim_vit_base_800e
    """
    from mto_analysis.checkpoints.registry import find_checkpoint

    metadata = find_checkpoint(name).to_dict()
    if as_json:
        typer.echo(json.dumps(metadata, indent=2))
        return
    words = {"True": "yes", "False": "no", "None": "not published", "": "none"}
    if statistics := metadata["mean_and_std"]:
        metadata["mean_and_std"] = "; ".join(", ".join(map(str, values)) for values in statistics)
    for key, value in metadata.items():
        typer.echo(f"{key.replace('_', ' ') + ':':<17}{words.get(str(value), value)}")


@checkpoints.command(cls=Command)
@takes()
def fetch(
    ckpt: Checkpoint,
    offline: Offline = False,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Download folder, instead of the default cache.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Download a checkpoint (resuming a partial download) and print its path.

    Example:
      mto-analyze checkpoints fetch mae_vit_base_full
    """
    from mto_analysis.checkpoints import resolve

    typer.echo(resolve(ckpt, offline=offline, cache=cache))


@checkpoints.command(cls=Command)
@takes(FileOptions)
def verify(context: typer.Context, ckpt: Checkpoint, as_json: AsJson = False) -> None:
    """Check that a checkpoint is complete.

    Its layout is recognized, every tensor is there and finite, and its hash is the published one or that of the first
    download. Exit code 3 if not.

    Example:
      mto-analyze checkpoints verify mae_vit_base_full
    """
    from mto_analysis.checkpoints import LoadOptions
    from mto_analysis.checkpoints.verification import verify_checkpoint

    result = verify_checkpoint(ckpt, LoadOptions(**measuring.loading(context.params)))
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    compared = " and ".join(result.compared_with)
    typer.echo(in_words(result.report))
    typer.echo(f"{'published as:':<15}{result.published_as or 'not a file of the registry'}")
    typer.echo(f"{'sha256:':<15}{result.sha256} ({f'as {compared}' if compared else 'nothing to compare with'})")


@checkpoints.command(cls=Command)
@takes(FileOptions)
def convert(
    context: typer.Context,
    ckpt: Checkpoint,
    out: OutFile,
    weights: WeightsOption,
    offline: bool,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint to the layout of this package.

    The result is a safetensors file that includes all metadata and loads back bit for bit.

    Example:
      mto-analyze checkpoints convert mae_vit_base_full --out mae.safetensors
    """
    from mto_analysis.runtime.outputs import OutputFolder

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)

    from mto_analysis.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint

    opened = open_checkpoint(ckpt, weights=weights.value, offline=offline)
    model = load_checkpoint(opened, **measuring.loading(context.params))
    folder.path.mkdir(parents=True, exist_ok=True)
    origin = {"converted_from": ckpt, "layout": model.info.layout, "sha256": opened.sha256}
    save_checkpoint(model, out, notes=origin)
    note(f"wrote {out}")


def _cells(row: "registry.Checkpoint") -> tuple[str, ...]:
    """A row of the list, short enough for 100 columns."""
    length = str(row.epochs) if row.epochs else f"{row.iterations // 1000}k it." if row.iterations else "?"
    truths = ("yes" if truth else "no" for truth in (row.has_mask_token, row.has_decoder, row.loads))
    backbone = row.backbone if len(row.backbone) <= 17 else f"{row.backbone[:16].rstrip()}…"
    return (row.id, backbone, length, *truths)
