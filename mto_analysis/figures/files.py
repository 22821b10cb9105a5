"""The outputs of a result as files: one function writes them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mto_analysis.runtime.outputs import OutputFolder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    #: A table (``NAME.csv``), bytes, metadata (``.json``), or what draws a figure (``NAME``: ``.png`` and ``.pdf``).
    Output = pd.DataFrame | bytes | Mapping[str, Any] | Callable[[], Figure]

__all__ = ["file_names", "write_outputs"]


def file_names(names: Iterable[str]) -> list[str]:
    """The files of outputs: a name without suffix is a figure, which is two.

    Example:
        >>> file_names(["map-cat.jpg", "curve.csv"])
        ['map-cat.jpg.png', 'map-cat.jpg.pdf', 'curve.csv']
    """
    # A figure may be named after an image, and so end like one.
    written = (".csv", ".json", ".npz")
    return [file for name in names for file in ([name] if name.endswith(written) else [f"{name}.png", f"{name}.pdf"])]


def write_outputs(folder: OutputFolder, outputs: Mapping[str, Output]) -> None:
    """Write what a result consists of, each file whole or not at all: what was measured first, then the figures."""
    import pandas as pd

    for name, content in sorted(outputs.items(), key=lambda item: callable(item[1])):
        if isinstance(content, bytes):
            folder.write_bytes(name, content)
        elif isinstance(content, Mapping):
            folder.write_json(name, content)
        elif isinstance(content, pd.DataFrame):
            folder.write_table(name, content)
        else:
            from mto_analysis.figures.plots.style import write_figure

            write_figure(folder, name, content())
