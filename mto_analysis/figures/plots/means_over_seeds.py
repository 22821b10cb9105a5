"""Scores of runs of several seeds: means with Student's interval over seeds, over epochs or over a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import COLORS, LINE_STYLES, MARKERS, TEXT_WIDTH, paper_style

__all__ = ["draw_runs", "method_look", "plot_runs"]

COLUMNS = ("panel", "method", "place", "score", "low", "high", "num_seeds")

# The baseline stands back, what is tried stands out; both also differ by marker and line.
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "0.35", "marker": "o", "linestyle": "--"},
    {"color": COLORS[0], "marker": "s", "linestyle": "-"},
    *(
        {"color": c, "marker": m, "linestyle": s}
        for c, m, s in zip(COLORS[1:], MARKERS[2:], LINE_STYLES[2:], strict=False)
    ),
)


def method_look(index: int) -> dict[str, Any]:
    """Colour, marker and line style of a method, by its place in the list of methods; the first is the baseline."""
    return _LOOKS[index % len(_LOOKS)]


def plot_runs(rows: pd.DataFrame, *, looks: Mapping[str, int] | None = None, bars: bool = False, ax: Axes) -> Axes:
    """A curve per method with its interval.

    Args:
        rows: Columns ``method place score low high num_seeds``; ``low`` and ``high`` may be empty for one seed.
        looks: Which look each method has, so that panels agree; by default in the order of the table.
        bars: Draw intervals as bars, where places between the points are no results; else as a band.
        ax: Where to draw.

    Raises:
        DataError: If a column is missing, or there are no rows.
    """
    missing = [column for column in COLUMNS[1:] if column not in rows]
    if missing or rows.empty:
        raise DataError(f"nothing to draw: {f'no columns {missing}' if missing else 'no rows'}")
    looks = looks or {str(name): index for index, name in enumerate(dict.fromkeys(rows["method"]))}
    for method, curve in rows.groupby("method", sort=False):
        look = method_look(looks[str(method)])
        every = max(1, len(curve) // 10)
        # Bars of two methods at one place would hide each other.
        places = curve["place"] + (0.14 * (looks[str(method)] - (len(looks) - 1) / 2) if bars else 0)
        ax.plot(places, curve["score"], markevery=every, markersize=3.5, label=str(method), **look)
        if bars:
            ends = (curve["score"] - curve["low"], curve["high"] - curve["score"])
            ax.errorbar(places, curve["score"], yerr=ends, fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=2)
        elif curve["low"].notna().any():
            ax.fill_between(places, curve["low"], curve["high"], color=look["color"], alpha=0.2, linewidth=0)
    return ax


def draw_runs(
    rows: pd.DataFrame,
    *,
    place: str,
    score: str | Mapping[str, str],
    remarks: Mapping[str, str] | None = None,
    zero: Sequence[str] = (),
    whole_places: bool = False,
    width: float = TEXT_WIDTH,
) -> Figure:
    """A panel per value of ``panel``, two in a row, with one legend.

    Args:
        rows: Columns ``panel method place score low high num_seeds``.
        place: Label of the horizontal axes.
        score: Label of the vertical axes, or one by panel.
        remarks: A short text inside a panel.
        zero: Panels with a line at 0.
        whole_places: Places are settings: ticks there, and bars instead of bands.
        width: Of the figure, in inches.
    """
    panels = list(dict.fromkeys(rows["panel"]))
    methods = list(dict.fromkeys(rows["method"]))
    looks = {method: index for index, method in enumerate(methods)}
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    with paper_style():
        figure = Figure(
            figsize=(width if across > 1 else 0.7 * width, 1.75 * down + 0.45 + 0.15 * (-(-len(methods) // 4))),
            layout="constrained",
        )
        axes = figure.subplots(down, across, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for index, (panel, ax) in enumerate(zip(panels, axes.flat, strict=False)):
            mine = rows[rows["panel"] == panel]
            if panel in zero:
                ax.axhline(0, color="0.3", linewidth=0.8)
            plot_runs(mine, looks=looks, bars=whole_places, ax=ax)
            ax.set_title(str(panel), fontsize=7.5)
            label = score if isinstance(score, str) else score[str(panel)]
            if index % across == 0 or not isinstance(score, str):
                ax.set_ylabel(label)
            if index >= len(panels) - across:
                ax.set_xlabel(place)
            if whole_places:
                ax.set_xticks(sorted(mine["place"].unique()))
            else:
                ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            if text := (remarks or {}).get(str(panel)):
                ax.annotate(
                    text, (0.98, 0.04), xycoords="axes fraction", ha="right", va="bottom", size=6.5, color="0.2"
                )
        handles = {
            label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), 4 if len("".join(handles)) < 40 else 2),
        )
    return figure
