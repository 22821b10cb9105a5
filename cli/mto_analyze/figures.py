"""``mto-analyze figures``: every figure and table of the paper, drawn anew; also what the scripts in figures/ run."""

from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.options import (
    INPUT,
    AnyCheckpoints,
    ComputeOptions,
    DrawingOptions,
    Group,
    InputOptions,
    Labels,
    LoadingOptions,
    OutputOptions,
    StatedRatio,
    Style,
    Weights,
    WeightsOption,
    takes,
)
from mto_analyze.repeating import write_record


class Models(LoadingOptions):
    """What replaces the bundled models."""

    ckpt: AnyCheckpoints = None
    label: Labels = None
    mask_ratio: StatedRatio = None
    weights: Weights = WeightsOption.model


class Results(Group):
    """What replaces published results."""

    panel = INPUT
    experiment: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder written by `experiment`: draw what it measured (fig4, table3, supp-fig1, supp-fig2).",
        ),
    ] = None
    public: Annotated[
        bool, typer.Option("--public", help="Download the public MAE and SimMIM files and draw Figs. 1-2.")
    ] = False


@takes(
    InputOptions,
    Results,
    Models,
    OutputOptions,
    DrawingOptions,
    ComputeOptions,
    out=Path("figures"),
    style=Style.paper,
    batch_size=64,
    device="cpu",
)
def figures(
    context: typer.Context,
    ckpt: list[str] | None,
    label: list[str] | None,
    public: bool,
    out: Path,
    overwrite: bool,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Figures and tables, see --list; by default all.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the figures and tables, and draw nothing.")] = False,
) -> None:
    """Draw the paper's figures and write its tables.

    Figures are PNG and PDF, tables Markdown and LaTeX, each with a CSV of its values, and captions.md. By default they
    are those of the bundled small models.

    Example:
      mto-analyze figures fig3 table2 --out figures-of-the-paper
    """
    from mto_analysis.figures.paper import FIGURES, Inputs, draw_paper

    if listing:
        width = max(map(len, FIGURES))
        typer.echo("\n".join(f"{name:{width}}  {one.title} ({one.origin})" for name, one in FIGURES.items()))
        return
    replaced = measuring.options_of(Inputs, context.params) | {"loading": measuring.loading(context.params)}
    inputs = Inputs(tuple(ckpt or ()), tuple(label or ()), **replaced)
    if public:
        from mto_analysis.figures.paper.public import draw_public
    draw = draw_public if public else draw_paper
    told = measuring.listener(context.params)
    for figure, paths in draw(names or (), out, inputs, overwrite=overwrite, arguments=context.params, listener=told):
        typer.echo(f"{figure.name}: {', '.join(path.name for path in paths)}")
    typer.echo(f"wrote these and {', '.join(write_record(out))} to {out}")
