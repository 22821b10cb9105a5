"""One look for every figure: widths of a paper's columns, colour-blind safe, readable in grey, fonts embedded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from mto_analysis.runtime.outputs import OutputFolder

__all__ = [
    "COLORS",
    "COLUMN_WIDTH",
    "LINE_STYLES",
    "MARKERS",
    "PAGE_WIDTH",
    "PAPER_STYLE",
    "TEXT_WIDTH",
    "figure_bytes",
    "paper_style",
    "write_figure",
]

#: Widths in inches of what commands and reports draw, over one and two columns.
COLUMN_WIDTH = 3.4
PAGE_WIDTH = 7.0
#: Text width of an LNCS page (122 mm, ECCV's), in inches: the figures of the paper are drawn to it.
TEXT_WIDTH = 122 / 25.4

#: seaborn's colour-blind palette without its pale tones, told apart in grey by marker and line style. Its values, as
#: to import seaborn takes as long as a small measurement.
COLORS = ("#0173b2", "#d55e00", "#029e73", "#de8f05", "#cc78bc", "#949494", "#ca9161")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

#: The style sheet; ``matplotlib.style.use(PAPER_STYLE)`` gives its look to anybody's figures.
PAPER_STYLE = Path(__file__).parents[2] / "assets/paper.mplstyle"
_STYLE: Any = mpl.rc_params_from_file(PAPER_STYLE, use_default_template=False)


@contextmanager
def paper_style() -> Iterator[None]:
    """Draw inside this context to get the project's look; global settings are as before afterwards."""
    with mpl.rc_context(_STYLE):
        yield


def figure_bytes(figure: Figure, kind: str, *, tight: bool = True) -> bytes:
    """A figure as the bytes of a ``png`` or ``pdf`` file, the same bytes for the same figure.

    Args:
        figure: What to write.
        kind: ``png`` or ``pdf``.
        tight: Cut margins off; without it the page has the figure's own size, such as a column's width.
    """
    buffer = io.BytesIO()
    # No creation date, so that a figure redrawn from the same table is the same file.
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    with mpl.rc_context(_STYLE):
        cut: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.03} if tight else {}
        figure.savefig(buffer, format=kind, metadata=metadata, **cut)
    return buffer.getvalue()


def write_figure(folder: OutputFolder, stem: str, figure: Figure) -> list[Path]:
    """Write a figure into a folder as ``stem.png`` (300 dpi) and ``stem.pdf`` (fonts embedded)."""
    return [folder.write_bytes(f"{stem}.{kind}", figure_bytes(figure, kind)) for kind in ("png", "pdf")]
