"""``mto-analyze report``: one self-contained HTML file with figures, tables, run metadata and an explorer."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze import measuring
from mto_analyze.console import note
from mto_analyze.options import (
    INPUT,
    OUTPUT,
    ComputeOptions,
    ImageNames,
    InputOptions,
    MaskOptions,
    Measures,
    ModelOptions,
    OutFile,
    OutputOptions,
    Show,
    takes,
)
from mto_analyze.repeating import write_record


@takes(InputOptions, MaskOptions, ModelOptions, OutputOptions, ComputeOptions, without=("out",))
def report(
    context: typer.Context,
    overwrite: bool,
    quiet: bool,
    device: str,
    chosen: ImageNames = None,
    show: Show = 4,
    measures: Measures = "h",
    interventions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also show this interventions.csv of the same models.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    title: Annotated[
        str, typer.Option(metavar="TEXT", help="Heading of the page.", rich_help_panel=OUTPUT)
    ] = "Masked tokens, layer by layer",
    out: OutFile = Path("report.html"),
) -> None:
    """Write a page to explore one or several checkpoints in a browser.

    It is one HTML file that needs no network and no server.

    Example:
      mto-analyze report --ckpt mae_vit_base_full --images IMAGES --out mae.html
    """
    from mto_analysis.runtime.outputs import OutputFolder, run_metadata

    folder = OutputFolder(out.parent, [out.name], overwrite=overwrite)

    from mto_analysis.figures.report import render_report
    from mto_analysis.figures.report_contents import collect_report
    from mto_analysis.figures.saved import read_effects
    from mto_analysis.runtime.processes import pick_device

    request = measuring.request(context.params)
    effects = None if interventions is None else read_effects(interventions, request.labels)
    contents = replace(collect_report(request, shown=chosen or show), interventions=effects)
    content = render_report(contents, title=title).encode()
    folder.write_bytes(out.name, content)
    metadata = run_metadata(context.params, models=contents.models, device=pick_device(device))
    written = ", ".join([f"{out} ({len(content) / 1e6:.1f} MB)", *write_record(out, metadata)])
    note(f"wrote {written}; open {out.name} in a browser", quiet=quiet)
