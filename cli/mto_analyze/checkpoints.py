"""``mto-analyze checkpoints``: the registry of public files, fetching, verifying and converting them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mto_analyze import measuring
from mto_analyze.console import note
from mto_analyze.inspect import in_words
from mto_analyze.options import (
    Checkpoint,
    DecoderHeads,
    Heads,
    ImageSize,
    Mean,
    Offline,
    Overwrite,
    Std,
    Weights,
    WeightsOption,
)

if TYPE_CHECKING:
    from mto_analysis.checkpoints import registry

checkpoints = typer.Typer(no_args_is_help=True, help="Public checkpoints: which there are, getting and checking them.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="Id, as `list` prints it.")]


@checkpoints.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    with_mask_token: Annotated[bool, typer.Option("--with-mask-token", help="Only files with a mask token.")] = False,
    as_json: AsJson = False,
) -> None:
    """List every public checkpoint that is known: which has the mask token and the decoder, and whether it loads."""
    from mto_analysis.checkpoints.registry import list_checkpoints

    rows = list_checkpoints(family=family, with_mask_token=with_mask_token)
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=2))
        return
    lines = [("id", "backbone", "epochs", "mask token", "decoder", "loads", "tried on"), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@checkpoints.command()
def info(name: Id, as_json: AsJson = False) -> None:
    """Print all that is known about one public checkpoint."""
    from mto_analysis.checkpoints.registry import find_checkpoint

    metadata = find_checkpoint(name).to_dict()
    if as_json:
        typer.echo(json.dumps(metadata, indent=2))
        return
    words = {"True": "yes", "False": "no", "None": "not published", "": "not known"}
    for key, value in metadata.items():
        typer.echo(f"{key.replace('_', ' ') + ':':<17}{words.get(str(value), value)}")


@checkpoints.command()
def fetch(
    source: Checkpoint,
    offline: Offline = False,
    cache: Annotated[Path | None, typer.Option(help="Folder for fetched files, instead of the usual ones.")] = None,
) -> None:
    """Bring a checkpoint to this machine and print where it is. Going on where an earlier attempt stopped."""
    from mto_analysis.checkpoints import resolve

    typer.echo(resolve(source, offline=offline, cache=cache))


@checkpoints.command()
def verify(
    source: Checkpoint,
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    image_size: ImageSize = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Check that a checkpoint is whole: recognised, every tensor there and finite, its hash the published or first one.

    Exit code 3 if not.
    """
    from mto_analysis.checkpoints.verification import verify_checkpoint

    result = verify_checkpoint(
        source,
        num_heads=num_heads,
        decoder_num_heads=decoder_num_heads,
        image_size=image_size,
        offline=offline,
    )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    compared = " and ".join(result.compared_with)
    typer.echo(in_words(result.report))
    typer.echo(f"{'published as:':<15}{result.published_as or 'not a file of the registry'}")
    typer.echo(f"{'sha256:':<15}{result.sha256} ({f'as {compared}' if compared else 'nothing to compare with'})")


@checkpoints.command()
def convert(
    context: typer.Context,
    source: Checkpoint,
    out: Annotated[Path, typer.Argument(help="File to write, *.safetensors.")],
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    weights: Weights = WeightsOption.model,
    offline: Offline = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in our own layout, with all metadata inside; it loads back bit for bit."""
    from mto_analysis.runtime.outputs import OutputFolder

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)

    from mto_analysis.checkpoints import load_checkpoint, open_checkpoint, save_checkpoint

    opened = open_checkpoint(source, weights=weights.value, offline=offline)
    model = load_checkpoint(opened, **measuring.loading(context.params))
    folder.path.mkdir(parents=True, exist_ok=True)
    origin = {"converted_from": source, "layout": model.info.layout, "sha256": opened.sha256}
    save_checkpoint(model, out, notes=origin)
    note(f"wrote {out}")


def _cells(row: "registry.Checkpoint") -> tuple[str, ...]:
    length = str(row.epochs) if row.epochs else f"{row.iterations // 1000}k it." if row.iterations else "?"
    truths = ("yes" if truth else "no" for truth in (row.has_mask_token, row.has_decoder, row.loads))
    return (row.id, row.backbone, length, *truths, row.evidence)
