"""``mto-analyze demo``: Figs. 1(a), 1(b), 2 and the report of bundled small models on bundled images, offline."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze.console import note
from mto_analyze.options import INPUT, DrawingOptions, OutputOptions, takes
from mto_analyze.repeating import write_record


@takes(OutputOptions, DrawingOptions, out=Path("demo"))
def demo(
    context: typer.Context,
    out: Path,
    overwrite: bool,
    quiet: bool,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only N of the 256 images.", rich_help_panel=INPUT)
    ] = None,
) -> None:
    """Measure bundled small MAE and SimMIM models, offline.

    Writes Figs. 1(a), 1(b) and 2 (PNG, PDF, CSV), report.html to explore in a browser, and run.json to --out.

    Example:
      mto-analyze demo
    """
    from mto_analysis.figures.files import file_names, write_figure
    from mto_analysis.runtime.outputs import OutputFolder, run_metadata

    figures = ("fig1a", "fig1b", "fig2-mae", "fig2-simmim")
    names = file_names([*figures, "fig1a.csv", "fig1b.csv", "fig2.csv"])
    folder = OutputFolder(out, [*names, "report.html", "run.json"], overwrite=overwrite)

    import torch

    from mto_analysis.demo import demo_sentences, measure_demo
    from mto_analysis.figures.plots.affinity import draw_affinity
    from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
    from mto_analysis.figures.report import render_report
    from mto_analysis.figures.report_contents import demo_report

    torch.set_num_threads(1)  # as fast for such small models, and no waiting for threads on a busy machine
    tables = measure_demo(limit=limit, say=partial(note, quiet=quiet))
    for figure, table in (("fig1a", tables.fig1a), ("fig1b", tables.fig1b)):
        write_figure(folder, figure, draw_heterogeneity(table))
        folder.write_table(f"{figure}.csv", table)
    folder.write_table("fig2.csv", tables.fig2)
    for model, maps in tables.maps.items():
        write_figure(folder, f"fig2-{model.lower()}", draw_affinity(maps, title=model))
    page = folder.write_bytes("report.html", render_report(demo_report(tables), title="Demo: small models").encode())
    metadata = run_metadata(context.params, models=tables.models, device="cpu")
    folder.write_json("run.json", metadata)
    written = [*names, "run.json", *write_record(out, metadata)]
    typer.echo("\n".join(demo_sentences(tables)))
    note(f"wrote {', '.join(written)} to {folder.path}; open {page} in a browser", quiet=quiet)
    note("next: mto-analyze heterogeneity --ckpt mae_vit_base_full --images IMAGES", quiet=quiet)
