"""The outputs of a result as files: one function writes them all."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.figures.options import current_drawing
from mto_analysis.runtime.outputs import OutputFolder, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    #: A table (``NAME.csv``), bytes, metadata (``.json``), or what draws a figure (``NAME``: a file per format).
    Output = pd.DataFrame | bytes | Mapping[str, Any] | Callable[[], Figure]

#: File of the captions, beside the figures; a figure that is drawn anew replaces its own paragraph in it.
CAPTIONS = "captions.md"

_HEAD = "# What the figures show"


def file_names(names: Iterable[str]) -> list[str]:
    """The files of outputs: a name without suffix is a figure, which is one in each format.

    Example:
        >>> file_names(["map-cat.jpg", "curve.csv"])
        ['map-cat.jpg.png', 'map-cat.jpg.pdf', 'curve.csv']
    """
    # A figure may be named after an image, and so end like one.
    written = (".csv", ".json", ".npz", ".md")
    kinds = current_drawing().formats
    return [
        file for name in names for file in ([name] if name.endswith(written) else [f"{name}.{kind}" for kind in kinds])
    ]


def write_outputs(folder: OutputFolder, outputs: Mapping[str, Output]) -> None:
    """Write what a result consists of, each file whole or not at all: what was measured first, then the figures."""
    for name, content in sorted(outputs.items(), key=lambda item: callable(item[1])):
        if isinstance(content, bytes):
            folder.write_bytes(name, content)
        elif isinstance(content, Mapping):
            folder.write_json(name, content)
        elif isinstance(content, pd.DataFrame):
            folder.write_table(name, content)
        else:
            write_figure(folder, name, content())


def write_figure(folder: OutputFolder | Path, stem: str, figure: Figure, *, caption: str | None = None) -> list[Path]:
    """Write a figure into a folder as ``stem.FORMAT``, and in paper style its note into the caption file.

    Args:
        folder: Where to write; one given by its path exists.
        stem: Of the files.
        figure: What to write.
        caption: What the caption file says instead of the figure's note.
    """
    from mto_analysis.figures.plots.style import figure_bytes

    options = current_drawing()
    files = {f"{stem}.{kind}": figure_bytes(figure, kind) for kind in options.formats}
    path = folder.path if isinstance(folder, OutputFolder) else folder
    for name, content in files.items():
        if isinstance(folder, OutputFolder):
            folder.write_bytes(name, content)
        else:
            write_atomically(path / name, content)
    words = caption if caption is not None else str(figure.get_label()) if options.style == "paper" else ""
    if words:
        add_captions(path, {stem: words})
    return [path / name for name in files]


def add_captions(folder: Path, captions: Mapping[str, str], *, order: Sequence[str] = ()) -> None:
    """Add captions to the caption file of a folder, or replace those of the same names."""
    path = folder / CAPTIONS
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as text; move it away") from error
    write_atomically(path, merge_captions(before, captions, order=order).encode())


def merge_captions(text: str, captions: Mapping[str, str], *, order: Sequence[str] = ()) -> str:
    """A file of captions with some of them replaced or added, in an order of names, others after them.

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
    there = [(name.strip(), body.strip()) for name, body in zip(parts[1::2], parts[2::2], strict=True)]
    there = [(name, body) for name, body in there if name not in captions]  # a user's own may have one name twice
    there += [
        (name, textwrap.fill(body, 120, break_long_words=False, break_on_hyphens=False))
        for name, body in captions.items()
    ]
    there.sort(key=lambda each: (order.index(each[0]) if each[0] in order else len(order), each[0]))
    head = parts[0].strip() or _HEAD
    return "\n\n".join([head, *(f"## {name}\n\n{body}" for name, body in there)]) + "\n"
