"""``mto-analyze tables``: the paper's tables, audited."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mto_analyze.options import INPUT, OUTPUT, Overwrite, takes
from mto_analyze.repeating import write_record


class Format(StrEnum):
    """How a table is written."""

    TEXT = "text"
    CSV = "csv"
    MARKDOWN = "markdown"
    LATEX = "latex"


SUFFIXES = {"text": "txt", "csv": "csv", "markdown": "md", "latex": "tex"}


@takes()
def tables(
    table: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="1, 2, 3, supp1 to supp6 or claims; repeatable; by default all.", rich_help_panel=INPUT
        ),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", metavar="NAME", help="text, csv, markdown or latex.", rich_help_panel=OUTPUT)
    ] = Format.TEXT,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write one file per table here, and print none.", rich_help_panel=OUTPUT),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Print the paper's tables with what can be recomputed from their own numbers.

    Example:
      mto-analyze tables --table 1 --table claims
    """
    from mto_analysis.figures.paper.tables import TABLE_NAMES, paper_table
    from mto_analysis.runtime.outputs import OutputFolder
    from mto_analysis.runtime.render import render

    try:
        chosen = [paper_table(name) for name in table or TABLE_NAMES]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--table") from None
    texts = {
        f"table_{one.name}.{SUFFIXES[form]}": render(one.frame, form.value, title=one.title, notes=one.notes)
        for one in chosen
    }
    if out is None:
        typer.echo("\n\n".join(texts.values()))
        return
    folder = OutputFolder(out, texts, overwrite=overwrite)
    for name, text in texts.items():
        typer.echo(folder.write_bytes(name, f"{text}\n".encode()))
    write_record(out)
