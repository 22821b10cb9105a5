"""Figures of the paper into a folder: images, tables, metadata and captions, each written whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mto_analysis.figures.files import add_captions, write_figure
from mto_analysis.figures.paper.catalogue import FIGURES, PaperFigure, find_figures
from mto_analysis.figures.paper.inputs import Drawn, Inputs
from mto_analysis.runtime.listener import Listener
from mto_analysis.runtime.outputs import OutputFolder, run_metadata


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
    caption = f"{figure.title}. {drawn.caption}"
    main = next(iter(drawn.figures or drawn.tables))
    paths = [path for stem, each in drawn.figures.items() for path in write_figure(folder, stem, each, caption="")]
    paths += [folder.write_bytes(name, text.encode()) for name, text in drawn.texts.items()]
    paths += [folder.write_table(f"{stem}.csv", table) for stem, table in drawn.tables.items()]
    paths.append(folder.write_json(f"{main}.json", run_metadata(arguments or {}, **drawn.metadata)))
    add_captions(folder.path, {main: caption}, order=[*FIGURES, *(f"{name}-measured" for name in FIGURES)])
    return paths
