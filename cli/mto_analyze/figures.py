"""``mto-analyze figures``: every figure and table of the paper, drawn anew; also what the scripts in figures/ run."""

from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.options import SOURCE, DecoderHeads, Heads, Offline, Overwrite, Quiet


def figures(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which, see --list; by default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for PNG, PDF, tables (.md, .tex), CSV, captions.md.")] = Path(
        "figures"
    ),
    ckpt: Annotated[
        list[str] | None, typer.Option(help=f"{SOURCE}; repeat to compare. By default the bundled small models.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Name of each checkpoint, in order.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder, list or Parquet file of images; by default 256 bundled ones.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many images, spread evenly.")] = None,
    experiment: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `experiment` wrote: draw what it measured (fig4, table3, supp-fig1, supp-fig2)."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Fetch the public MAE and SimMIM files and draw Figs. 1-2 of them.")
    ] = False,
    num_heads: Heads = None,
    decoder_num_heads: DecoderHeads = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "cpu",
    offline: Offline = False,
    listing: Annotated[bool, typer.Option("--list", help="Say what there is, and draw nothing.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw the paper's figures (PNG, PDF) and write its tables (Markdown, LaTeX), each with a CSV of its values."""
    from mto_analysis.figures.paper import FIGURES, Inputs, draw_paper

    if listing:
        width = max(map(len, FIGURES))
        typer.echo("\n".join(f"{name:{width}}  {one.title} ({one.origin})" for name, one in FIGURES.items()))
        return
    inputs = Inputs(
        tuple(ckpt or ()),
        tuple(label or ()),
        images,
        limit,
        experiment,
        num_heads,
        decoder_num_heads,
        batch_size,
        device,
        offline,
    )
    if public:
        from mto_analysis.figures.paper.public import draw_public
    draw = draw_public if public else draw_paper
    told = measuring.listener(context.params)
    for figure, paths in draw(names or (), out, inputs, overwrite=overwrite, arguments=context.params, listener=told):
        typer.echo(f"{figure.name}: {', '.join(path.name for path in paths)}")
    typer.echo(f"in {out}")
