"""Rank correlations of measures with accuracy, a panel per question."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.aggregates import plot_estimates
from mto_analysis.figures.plots.style import COLORS, MARKERS, PAGE_WIDTH, paper_style

__all__ = ["draw_relations", "plot_relations"]


def plot_relations(rows: pd.DataFrame, *, ax: Axes) -> Axes:
    """A point per correlation with its interval; the layers of a measure stand one below the other.

    Args:
        rows: Of :attr:`~mto_analysis.rauc.relations.Relations.table`, of one level.
        ax: Where to draw.

    Raises:
        DataError: If no correlation is defined.
    """
    drawn = rows.dropna(subset="rho").rename(columns={"rho": "value", "layer": "method"})
    if drawn.empty:
        raise DataError("no correlation is defined, so there is nothing to draw")
    names = drawn["measure"] + np.where(drawn["given"] == "", "", "\ngiven the others")
    several = drawn["stack"].nunique() > 1
    drawn["name"] = names + ("\n" + drawn["stack"] if several else "")
    looks: dict[str, dict[str, Any]] = {
        layer: {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
        for place, layer in enumerate(rows["layer"].unique())
    }
    plot_estimates(drawn, looks, by="name", ax=ax)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("rank correlation with accuracy")
    for layer, look in looks.items():
        ax.plot([], [], linestyle="none", label=layer, **look)
    return ax


def draw_relations(table: pd.DataFrame) -> Figure:
    """A panel per level of :attr:`~mto_analysis.rauc.relations.Relations.table` that has a correlation."""
    levels = list(dict.fromkeys(table.dropna(subset="rho")["level"]))
    if not levels:
        raise DataError("no correlation is defined, so there is nothing to draw")
    rows = max(table.groupby("level")[["measure", "given", "stack"]].apply(lambda each: len(each.drop_duplicates())))
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, 1.0 + 0.34 * rows), layout="constrained")
        axes = figure.subplots(1, len(levels), squeeze=False)[0]
        for level, ax in zip(levels, axes, strict=True):
            mine = table[table["level"] == level]
            plot_relations(mine, ax=ax)
            ax.set_title(f"{level}\n({int(mine['number'].max())})")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, title="layer depth", loc="outside right upper")
    return figure
