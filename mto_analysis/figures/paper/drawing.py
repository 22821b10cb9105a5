"""Figures of the paper into a folder: images, tables, metadata and captions, each written whole."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mto_analysis.errors import DataError
from mto_analysis.figures.paper.catalogue import FIGURES, PaperFigure, find_figures
from mto_analysis.figures.paper.inputs import Drawn, Inputs
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.outputs import OutputFolder, run_metadata, write_atomically

__all__ = ["CAPTIONS", "draw_paper", "merge_captions"]

#: File of the captions, beside the figures; a figure that is drawn anew replaces its own paragraph in it.
CAPTIONS = "captions.md"

_HEAD = "# What the figures show"


def draw_paper(
    names: Iterable[str],
    out: str | Path,
    inputs: Inputs | None = None,
    *,
    overwrite: bool = False,
    arguments: Mapping[str, Any] | None = None,
    listener: Listener | None = None,
) -> Iterator[tuple[PaperFigure, list[Path]]]:
    """Draw figures of the paper one after the other, each written before the next begins.

    Args:
        names: Of :data:`~mto_analysis.figures.paper.catalogue.FIGURES`; none for all that fit the inputs.
        out: Folder for PNG and PDF (tables: Markdown and LaTeX), CSV, ``NAME.json`` and ``captions.md``.
        inputs: What stands in place of the bundled models, images and results.
        overwrite: Replace files that exist.
        arguments: For ``NAME.json``.
        listener: Takes notes, warnings and progress.

    Yields:
        Each figure, and its files.

    Raises:
        ValueError: If a name is unknown or an input does not fit; before anything is measured.
        OutputExistsError: If a file exists and ``overwrite`` is false; before anything is measured.
    """
    inputs = inputs or Inputs()
    figures = find_figures(names, inputs=inputs)
    folders = {each.name: OutputFolder(out, each.files(inputs), overwrite=overwrite) for each in figures}
    return _draw(figures, folders, inputs, arguments or {}, listener)


def _draw(
    figures: Iterable[PaperFigure],
    folders: Mapping[str, OutputFolder],
    inputs: Inputs,
    arguments: Mapping[str, Any],
    listener: Listener | None,
) -> Iterator[tuple[PaperFigure, list[Path]]]:
    from mto_analysis.figures.paper.workbench import Workbench

    bench = Workbench(inputs, maps="fig2" in folders, listener=listener)
    for figure in figures:
        bench.name = figure.name
        yield figure, write_drawn(figure, figure.draw(bench), folders[figure.name], arguments)


def write_drawn(
    figure: PaperFigure, drawn: Drawn, folder: OutputFolder, arguments: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write what was drawn, and its caption among the others of the folder."""
    from mto_analysis.figures.plots.style import figure_bytes

    paths = [
        folder.write_bytes(f"{stem}.{kind}", figure_bytes(each, kind, tight=False))
        for stem, each in drawn.figures.items()
        for kind in ("png", "pdf")
    ]
    paths += [folder.write_bytes(name, text.encode()) for name, text in drawn.texts.items()]
    paths += [folder.write_table(f"{stem}.csv", table) for stem, table in drawn.tables.items()]
    stem = next(iter(drawn.figures or drawn.tables))
    paths.append(folder.write_json(f"{stem}.json", run_metadata(arguments or {}, **drawn.metadata)))
    captions = folder.path / CAPTIONS
    try:
        before = captions.read_text(encoding="utf-8") if captions.exists() else ""
    except (OSError, ValueError) as error:
        raise DataError(f"{captions} cannot be read as text; move it away") from error
    after = merge_captions(before, {stem: f"{figure.title}. {drawn.caption}"})
    write_atomically(captions, after.encode())
    return paths


def merge_captions(text: str, captions: Mapping[str, str]) -> str:
    """A file of captions with some of them replaced or added, in the order of the paper.

    Example:
        >>> print(merge_captions("", {"fig2": "Maps."}))
        # What the figures show
        <BLANKLINE>
        ## fig2
        <BLANKLINE>
        Maps.
        <BLANKLINE>
    """
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    there = {name.strip(): body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    there |= {
        name: textwrap.fill(body, 120, break_long_words=False, break_on_hyphens=False)
        for name, body in captions.items()
    }
    order = [*FIGURES, *(f"{name}-measured" for name in FIGURES)]
    names = sorted(there, key=lambda name: (order.index(name) if name in order else len(order), name))
    head = parts[0].strip() or _HEAD
    return "\n\n".join([head, *(f"## {name}\n\n{there[name]}" for name in names)]) + "\n"
