"""``mto-analyze plot``: redraw and compare from saved tables, without a model."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.options import Overwrite, Quiet


def plot(
    context: typer.Context,
    tables: Annotated[list[Path], typer.Argument(help="heterogeneity.csv of one or several runs.")],
    title: Annotated[str | None, typer.Option(help="Line above the figure.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the table behind it.")] = Path("plot"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Redraw Fig. 1 from saved tables; several tables are drawn together.

    Writes heterogeneity.png, heterogeneity.pdf, heterogeneity.csv (what was drawn) and run.json to --out.
    """
    from mto_analysis.runtime.outputs import OutputFolder

    files = ("heterogeneity.csv", "heterogeneity.png", "heterogeneity.pdf", "run.json")
    OutputFolder(out, files, overwrite=overwrite)

    from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
    from mto_analysis.probe.saved import read_tables

    table = read_tables(tables)
    figure = partial(draw_heterogeneity, table, title=title)
    measuring.write(context.params, files, {"heterogeneity": figure, "heterogeneity.csv": table})
