"""One look for every figure: widths of a paper's columns, colour-blind safe, readable in grey, fonts embedded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

__all__ = ["COLORS", "COLUMN_WIDTH", "LINE_STYLES", "MARKERS", "PAGE_WIDTH", "figure_bytes", "paper_style"]

#: Widths of a figure over one and two columns, in inches.
COLUMN_WIDTH = 3.4
PAGE_WIDTH = 7.0

#: seaborn's colour-blind palette without its pale tones, told apart in grey by marker and line style.
COLORS = tuple(sns.color_palette("colorblind").as_hex()[i] for i in (0, 3, 2, 1, 4, 7, 5))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.5,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw inside this context to get the project's look; global settings are as before afterwards."""
    with mpl.rc_context(_STYLE):
        yield


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a ``png`` or ``pdf`` file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    # No creation date, so that a figure redrawn from the same table is the same file.
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight", pad_inches=0.03)
    return buffer.getvalue()
