"""A table as an image, in the form of a printed one: rules above, below and under the head, nothing between."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from mto_analysis.figures.plots.style import TEXT_WIDTH, paper_style

__all__ = ["draw_table"]

_SIZE = 7.0  # points
_NOTE_SIZE = 6.0
_LINE = 1.35  # of the font size
_GAP, _WIDEST_GAP = 7.0, 20.0  # points between columns
_EDGE = 2.0
_PAD = 3.0  # of a grey column


def draw_table(
    frame: pd.DataFrame,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    heads: Mapping[str, str] | None = None,
    computed: Sequence[str] = (),
    width: float = TEXT_WIDTH,
) -> Figure:
    """Draw a table of short texts; numbers stand right, and the last column is broken into lines to fit.

    Args:
        frame: Cells as they are to be printed.
        title: Above the table.
        notes: Small print under it.
        heads: Other names of columns.
        computed: Columns that are not the source's own; they stand on grey.
        width: Of the figure, in inches.

    Raises:
        ValueError: If the columns do not fit into the width.
    """
    heads = heads or {}
    header = [heads.get(str(column), str(column)) for column in frame.columns]
    rows = [[str(cell) for cell in row] for row in frame.itertuples(index=False, name=None)]
    total = width * 72 - 2 * _EDGE - 2 * _PAD
    widths = [max(_text_width(text, _SIZE) for text in column) for column in zip(header, *rows, strict=True)]
    gaps = len(widths) - 1
    room = total - sum(widths[:-1]) - _GAP * gaps
    if room < 0.9 * min(widths[-1], 40):
        raise ValueError(f"{len(widths)} columns do not fit into {width:.1f} inches")
    lines = [[cell.split("\n") for cell in row] for row in rows]
    for row, cells in zip(rows, lines, strict=True):
        cells[-1] = _wrapped(row[-1], room, _SIZE)
    widths[-1] = min(widths[-1], room)
    # A table narrower than the page stands in its middle, its columns not too far apart to be read together.
    gap = min(_GAP + (total - sum(widths) - _GAP * gaps) / max(gaps, 1), _WIDEST_GAP)
    across = sum(widths) + gap * gaps
    edge = _EDGE + _PAD + (total - across) / 2
    heights = [max(len(cell) for cell in cells) for cells in lines]
    small = [line for each in notes for line in _wrapped(each, total, _NOTE_SIZE)]
    title_lines = _wrapped(title, total, 8.0) if title else []
    step = _SIZE * _LINE
    height = (
        2 * _EDGE
        + len(title_lines) * 8 * _LINE
        + (sum(heights) + 1) * step
        + 0.35 * step * len(heights)
        + 1.5 * step
        + len(small) * _NOTE_SIZE * _LINE
        + 4
    )
    with paper_style():
        figure = Figure(figsize=(width, height / 72))
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        ax.set_xlim(0, width * 72)
        ax.set_ylim(height, 0)
        ax.set_axis_off()
        starts = [edge]
        for each in widths[:-1]:
            starts.append(starts[-1] + each + gap)
        right = [_is_number([row[at] for row in rows]) for at in range(len(header))]
        y = _EDGE
        for line in title_lines:
            ax.text(_EDGE, y, line, size=8, va="top", weight="bold")
            y += 8 * _LINE
        y += 0.3 * step
        top = y
        y += 0.3 * step
        _row(ax, [[text] for text in header], starts, widths, right, y)
        y += 1.15 * step
        middle = y
        y += 0.35 * step
        for cells, count in zip(lines, heights, strict=True):
            _row(ax, cells, starts, widths, right, y)
            y += (count + 0.35) * step
        for height_of_rule, weight in ((top, 0.9), (middle, 0.5), (y, 0.9)):
            _rule(ax, edge, height_of_rule, across, weight)
        for column in computed:
            at = list(map(str, frame.columns)).index(column)
            place = (starts[at] - _PAD, top)
            ax.add_patch(Rectangle(place, widths[at] + 2 * _PAD, y - top, facecolor="0.92", linewidth=0, zorder=0))
        y += 0.35 * step
        for line in small:
            ax.text(_EDGE, y, line, size=_NOTE_SIZE, va="top", color="0.25")
            y += _NOTE_SIZE * _LINE
    return figure


def _rule(ax: Axes, x: float, y: float, width: float, weight: float) -> None:
    ax.plot([x - _PAD, x + width + _PAD], [y, y], color="black", linewidth=weight, solid_capstyle="butt", clip_on=False)


def _row(
    ax: Axes,
    cells: Sequence[Sequence[str]],
    starts: Sequence[float],
    widths: Sequence[float],
    right: list[bool],
    y: float,
) -> None:
    for lines, start, across, at_right in zip(cells, starts, widths, right, strict=True):
        for index, line in enumerate(lines):
            ax.text(
                start + across if at_right else start, y + index * _SIZE * _LINE, line,
                size=_SIZE, va="top", ha="right" if at_right else "left",
            )  # fmt: skip


def _text_width(text: str, size: float) -> float:
    """Width in points in matplotlib's own font, with room for what a renderer's hinting adds."""
    if not text.strip():
        return 0.0
    return 1.03 * float(TextPath((0, 0), text, size=size, prop=FontProperties()).get_extents().width) + 0.5


def _wrapped(text: str, room: float, size: float) -> list[str]:
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _text_width(f"{lines[-1]} {word}", size) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _is_number(cells: Sequence[str]) -> bool:
    """Whether a column looks better on the right; empty cells follow their column."""
    try:
        return any(cells) and all(math.isfinite(float(cell.replace("\N{MINUS SIGN}", "-") or "0")) for cell in cells)
    except ValueError:
        return False
