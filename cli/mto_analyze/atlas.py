"""``mto-analyze atlas``: every public checkpoint measured alike, in one table that others can extend and verify."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analyze import measuring
from mto_analyze.console import Command, CommandGroup, note
from mto_analyze.experiment import engine_of
from mto_analyze.options import (
    INPUT,
    MASKS,
    MODEL,
    OUTPUT,
    CheckpointOptions,
    ComputeOptions,
    EngineName,
    EngineOptions,
    Group,
    Images,
    Limit,
    Measures,
    MeasuringPrecision,
    Offline,
    OutFile,
    OutputOptions,
    Overwrite,
    Precision,
    Quiet,
    Seed,
    Workers,
    takes,
)
from mto_analyze.repeating import write_record

if TYPE_CHECKING:
    from mto_analysis.atlas import AtlasFolder
    from mto_analysis.atlas.running import Ended
    from mto_analysis.images.image_sets import ImageSet

atlas = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Measure every public checkpoint alike, in one table to share."
)

DropFiles = Annotated[
    bool, typer.Option("--drop-files", help="Delete each download once it is measured.", rich_help_panel=OUTPUT)
]
Table = Annotated[Path, typer.Argument(metavar="TABLE", help="Table (.parquet, .csv), or the folder of an atlas.")]


class ImageSetOptions(Group):
    """Images to measure on, and which they must be."""

    panel = INPUT
    images: Images = None
    image_set: Annotated[
        str | None,
        typer.Option(
            "--image-set",
            metavar="NAME|FILE",
            help="Images by name and hash that --images must hold; by default all of it.",
        ),
    ] = None
    limit: Limit = None


class SampledMasks(Group):
    """Masks by each model's own rule."""

    panel = MASKS
    seed: Seed = 0
    masks_per_image: Annotated[int, typer.Option(min=1, metavar="N", help="Masks of each image.")] = 1


@atlas.command(cls=Command)
@takes(
    *(ImageSetOptions, SampledMasks, CheckpointOptions, OutputOptions, ComputeOptions, EngineOptions),
    without=("ckpt", "label", "overwrite"),
)
def run(
    context: typer.Context,
    out: Path,
    quiet: bool,
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="CKPT", help="Registry ids; or other checkpoints, as SOURCE or NAME=SOURCE."),
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="All of this family of the registry; repeatable.", rich_help_panel=MODEL),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All of the registry that can be measured.", rich_help_panel=MODEL)
    ] = False,
    drop_files: DropFiles = False,
    measures: Measures = "all,-attention,-cka",
    contributor: Annotated[
        str, typer.Option(metavar="NAME", help="Who measures, for the table.", rich_help_panel=OUTPUT)
    ] = "",
    precision: MeasuringPrecision = Precision.fp32,
    num_workers: Workers = 0,
) -> None:
    """Download, verify and measure checkpoints, one after the other.

    Writes atlas.parquet, atlas.csv, images.csv, run.json and, where checkpoints failed, failures.csv to --out. The same
    command resumes after an interruption, and tries again what failed. Exit code: that of the first failure.

    Example:
      mto-analyze atlas run --family mae --images VAL --out atlas
    """
    from mto_analysis.atlas import AtlasFolder, choose_entries, measure_all
    from mto_analysis.atlas.running import raise_failures
    from mto_analysis.checkpoints.registry import list_checkpoints

    entries = choose_entries(ids or (), families=family or (), every=every)
    if len(entries) > 1 and any(isinstance(context.params[name], int) for name in ("num_heads", "decoder_num_heads")):
        raise ValueError(
            "--num-heads N and --decoder-num-heads N are for one checkpoint; measure it alone, or give auto"
        )
    if every:
        left = len(list_checkpoints()) - len(choose_entries(every=True))
        note(f"{left} files of the registry cannot be measured, see mto-analyze checkpoints list", quiet=quiet)
    source, chosen = _images(context.params)
    failures = measure_all(
        dict.fromkeys(entries, _protocol(context.params)),
        source,
        chosen,
        folder := AtlasFolder(out),
        engine_of(context.params),
        drop_files=drop_files,
        progress=measuring.listener(context.params).progress,
        tell=_teller(quiet=quiet),
    )
    count = f"{len(entries) - len(failures)} of {len(entries)} checkpoints are measured"
    note(f"{count}; wrote {', '.join(_record(context.params, folder, chosen))} to {out}", quiet=quiet)
    if len(failures) < len(entries):
        note(f"next: mto-analyze atlas page {out}", quiet=quiet)
    raise_failures(failures, f"see {out / 'failures.csv'}, and run the same command again")


@atlas.command(cls=Command)
@takes(OutputOptions)
def merge(
    tables: Annotated[list[Path], typer.Argument(metavar="TABLE", help="Tables, or folders of atlases.")],
    out: Path,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Merge tables of different people into one.

    What several have measured must agree within the tolerance of its precision. Tables of different images or masks
    are refused. Writes atlas.parquet and atlas.csv to --out.

    Example:
      mto-analyze atlas merge atlas theirs.parquet --out merged
    """
    from mto_analysis.atlas import merge_tables, read_table
    from mto_analysis.atlas.merging import describe
    from mto_analysis.atlas.table import table_outputs
    from mto_analysis.figures.files import write_outputs
    from mto_analysis.runtime.outputs import OutputFolder

    if (out / "parts").is_dir():
        raise ValueError(f"{out} is the folder of a run, whose table comes from its parts; choose another --out")
    merged, found = merge_tables({str(path): read_table(path) for path in tables})
    outputs = table_outputs(merged)
    write_outputs(OutputFolder(out, outputs, overwrite=overwrite), outputs)
    note(f"{describe(found)}; wrote {', '.join(outputs)} to {out}", quiet=quiet)


@atlas.command(cls=Command)
@takes(ImageSetOptions, ComputeOptions, EngineOptions)
def verify(
    context: typer.Context,
    table: Table,
    quiet: Quiet = False,
    fraction: Annotated[float, typer.Option(metavar="F", help="Part of the checkpoints, from 0 to 1.")] = 0.1,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sample.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep the new measurements here, and resume.", rich_help_panel=OUTPUT),
    ] = None,
    drop_files: DropFiles = False,
    num_workers: Workers = 0,
    offline: Offline = False,
) -> None:
    """Measure a random part of a table again, and compare.

    Images, masks, precision and loading are those of the table. Exit code 4 if values differ beyond the tolerance of
    their precision, else that of the first checkpoint that could not be measured.

    Example:
      mto-analyze atlas verify atlas --images VAL --image-set val.csv
    """
    from mto_analysis.atlas import AtlasFolder, compare_again, measure_all, read_table, sample_table
    from mto_analysis.atlas.running import raise_failures
    from mto_analysis.atlas.verifying import check_complete

    claimed = read_table(table)
    sample = sample_table(claimed, fraction, seed=seed, protocol=_protocol(context.params))
    given = {**context.params, "limit": context.params["limit"] or int(claimed["num_images"].max())}
    source, chosen = _images(given)
    if chosen.sha256 != (there := claimed["images_sha256"].iloc[0]):
        raise ValueError(
            f"{table} was measured on other images: {claimed['image_set'].iloc[0]} ({there[:8]}...), these are "
            f"{chosen.name} ({chosen.sha256[:8]}...); give --images and --image-set of the table"
        )
    with _folder_or_temporary(out) as kept:
        folder = AtlasFolder(kept)
        failures = measure_all(
            sample.wanted,
            source,
            chosen,
            folder,
            engine_of(context.params),
            drop_files=drop_files,
            progress=measuring.listener(context.params).progress,
            tell=_teller(quiet=quiet),
        )
        again = folder.table()
    if len(failures) == len(sample.wanted):
        raise_failures(failures, "nothing was verified")
    summary, found = compare_again(sample, again)
    typer.echo(summary.to_string(index=False, float_format=lambda value: f"{value:.2g}"))
    found.check()
    raise_failures(failures, "the others agree")
    check_complete(sample, again)


@contextmanager
def _folder_or_temporary(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder) / "again"
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing was kept; with --out FOLDER the same command resumes") from None


@atlas.command(cls=Command)
@takes()
def page(
    table: Table,
    out: OutFile = Path("atlas.html"),
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV with model, score and perhaps task, drawn against measures."),
    ] = None,
    title: Annotated[
        str, typer.Option(metavar="TEXT", help="Heading of the page.", rich_help_panel=OUTPUT)
    ] = "Atlas of masked tokens",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a table as a page to sort, filter and plot.

    It is one HTML file that needs no network and no server.

    Example:
      mto-analyze atlas page atlas --out atlas.html
    """
    from mto_analysis.atlas import read_table
    from mto_analysis.atlas.page import read_scores, render_atlas
    from mto_analysis.runtime.outputs import OutputFolder

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)
    rows = read_table(table)
    given = read_scores(scores, rows) if scores else None
    for task, of in (given or {}).items():
        note(f"{task}: given of {len(of)} of {rows['checkpoint'].nunique()} checkpoints", quiet=quiet)
    content = render_atlas(rows, title=title, scores=given).encode()
    folder.write_bytes(out.name, content)
    note(f"wrote {out}, {len(content) / 1e6:.2g} MB; open it in a browser", quiet=quiet)


@atlas.command(cls=Command)
@takes()
def images(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder, list (.txt) or Parquet file of images.")],
    out: OutFile,
    limit: Limit = None,
    overwrite: Overwrite = False,
) -> None:
    """Write down which images these are, by name and hash.

    The file is for --image-set: with it everybody measures the same images, or is told which are not.

    Example:
      mto-analyze atlas images VAL --out val.csv
    """
    from mto_analysis.images import open_images
    from mto_analysis.images.image_sets import summarize_images
    from mto_analysis.runtime.outputs import OutputFolder

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)
    found = summarize_images(open_images(images), out.stem, limit=limit)
    folder.write_bytes(out.name, found.to_csv())
    typer.echo(f"{len(found.digests)} images, sha256 {found.sha256}")


def _record(given: Mapping[str, Any], folder: AtlasFolder, image_set: ImageSet) -> list[str]:
    """Write what was run beside the table; the names of all files."""
    from mto_analysis.atlas.table import table_outputs
    from mto_analysis.runtime.outputs import json_bytes, run_metadata, write_atomically
    from mto_analysis.runtime.processes import pick_device

    table = folder.table()
    metadata = run_metadata(
        given,
        checkpoints=sorted(set(table["checkpoint"])),
        image_set={"name": image_set.name, "count": len(image_set.digests), "sha256": image_set.sha256},
        device=pick_device(given["device"]) if given["engine"] is EngineName.local else given["device"],
    )
    write_atomically(folder.path / "run.json", json_bytes(metadata))
    files = [*(table_outputs(table) if len(table) else ()), "images.csv", "run.json"]
    return [*files, *write_record(folder.path, metadata if len(table) else None)]


def _images(given: Mapping[str, Any]) -> tuple[Path, ImageSet]:
    """Where the images are, and which."""
    from mto_analysis.demo import DEMO_IMAGES
    from mto_analysis.images import open_images
    from mto_analysis.images.image_sets import load_image_set, summarize_images

    source = given["images"]
    if source is None:
        note(
            "no --images: measuring on 256 bundled CIFAR-10 images of 32 px, for a first look only",
            quiet=given["quiet"],
        )
        source = DEMO_IMAGES
    if given["image_set"] is None and source != DEMO_IMAGES:
        return source, summarize_images(open_images(source), source.stem, limit=given["limit"])
    return source, load_image_set(given["image_set"] or DEMO_IMAGES.stem).limited(given["limit"])


def _protocol(given: Mapping[str, Any]) -> Any:
    """How to measure, from the options that a command has."""
    from mto_analysis.atlas import Protocol
    from mto_analysis.checkpoints import LoadOptions
    from mto_analysis.runtime.processes import pick_device

    options: dict[str, Any] = measuring.options_of(Protocol, given)
    if given["engine"] is EngineName.local:
        pick_device(given["device"])  # one that is not there is an error now, not of each checkpoint
    loading = LoadOptions(**measuring.loading(given))
    return Protocol(**{**options, "precision": str(given.get("precision", Precision.fp32)), "loading": loading})


def _teller(*, quiet: bool) -> Any:
    """Says how each checkpoint ended; warnings and failures always."""

    def tell(ended: Ended) -> None:
        for words in ended.notes:
            note(words, quiet=quiet)
        if ended.failure:
            note(f"{ended.entry.name} failed: {ended.failure.reason}")
        else:
            note(f"{ended.entry.name}: measured", quiet=quiet)

    return tell
