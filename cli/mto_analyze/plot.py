"""``mto-analyze plot``: redraw and compare from saved tables, without a model."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.options import FIGURES, DrawingOptions, OutputOptions, takes


@takes(OutputOptions, DrawingOptions, out=Path("plot"))
def plot(
    context: typer.Context,
    out: Path,
    overwrite: bool,
    tables: Annotated[list[Path], typer.Argument(metavar="TABLE", help="heterogeneity.csv of one or several runs.")],
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Title of the figure.", rich_help_panel=FIGURES)
    ] = None,
) -> None:
    """Redraw Fig. 1 from saved tables; several tables are drawn together.

    Writes heterogeneity.png, heterogeneity.pdf, heterogeneity.csv (what was drawn) and run.json to --out.

    Example:
      mto-analyze plot mae/heterogeneity.csv simmim/heterogeneity.csv --out both
    """
    from mto_analysis.figures.files import file_names
    from mto_analysis.runtime.outputs import OutputFolder

    files = file_names(["heterogeneity.csv", "heterogeneity", "run.json"])
    OutputFolder(out, files, overwrite=overwrite)

    from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
    from mto_analysis.figures.saved import read_tables

    table = read_tables(tables)
    figure = partial(draw_heterogeneity, table, title=title)
    measuring.write(context.params, files, {"heterogeneity": figure, "heterogeneity.csv": table})
