"""Scores of runs of several seeds: means with Student's interval over seeds, over epochs or over a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.evaluation import PROTOCOL_LABELS
from mto_analysis.figures.plots.style import Look, legend_below, looks_of, new_figure, paper_style

COLUMNS = ("panel", "method", "place", "score", "low", "high", "num_seeds")


def plot_runs(rows: pd.DataFrame, *, looks: Mapping[str, Look] | None = None, bars: bool = False, ax: Axes) -> Axes:
    """A curve per method with its interval.

    Args:
        rows: Columns ``method place score low high num_seeds``; ``low`` and ``high`` may be empty for one seed.
        looks: Of the methods, where panels of one figure must agree.
        bars: Draw intervals as bars, where places between the points are no results; else as a band.
        ax: Where to draw.
    """
    missing = [column for column in COLUMNS[1:] if column not in rows]
    if missing or rows.empty:
        raise DataError(f"nothing to draw: {f'no columns {missing}' if missing else 'no rows'}")
    looks = looks or looks_of(rows["method"])
    order = list(looks)
    for method, curve in rows.groupby("method", sort=False):
        look = looks[str(method)]
        every = max(1, len(curve) // 10)
        # Bars of two methods at one place would hide each other.
        places = curve["place"] + (0.14 * (order.index(str(method)) - (len(looks) - 1) / 2) if bars else 0)
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
) -> Figure:
    """A panel per value of ``panel``, two in a row, with one legend.

    Args:
        rows: Columns ``panel method place score low high num_seeds``.
        place: Label of the horizontal axes.
        score: Label of the vertical axes, or one by panel.
        remarks: A short text inside a panel.
        zero: Panels with a line at 0.
        whole_places: Places are settings: ticks there, and bars instead of bands.
    """
    panels = list(dict.fromkeys(rows["panel"]))
    methods = list(dict.fromkeys(rows["method"]))
    looks = looks_of(methods)
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    with paper_style():
        figure = new_figure(1.75 * down + 0.45 + 0.15 * (-(-len(methods) // 4)), share=1 if across > 1 else 0.7)
        axes = figure.subplots(down, across, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for index, (panel, ax) in enumerate(zip(panels, axes.flat, strict=False)):
            mine = rows[rows["panel"] == panel]
            if panel in zero:
                ax.axhline(0, color="0.3", linewidth=0.8)
            plot_runs(mine, looks=looks, bars=whole_places, ax=ax)
            parts = str(panel).split(", ")
            words = (PROTOCOL_LABELS.get(part, part).removesuffix(" (%)") for part in parts)
            ax.set_title(", ".join(words), fontsize="medium")
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
                    text, (0.98, 0.04), xycoords="axes fraction", ha="right", va="bottom", size="small", color="0.2"
                )
        handles = {
            label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        legend_below(figure, handles.values(), handles, ncols=4 if len("".join(handles)) < 40 else 2)
    return figure
