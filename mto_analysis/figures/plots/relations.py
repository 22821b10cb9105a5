"""Rank correlations of measures with accuracy, a panel per question."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.aggregates import plot_estimates
from mto_analysis.figures.plots.measures import measure_words
from mto_analysis.figures.plots.style import describe, legend_below, looks_of, new_figure, paper_style


def plot_relations(rows: pd.DataFrame, *, ax: Axes) -> Axes:
    """A point per correlation with its interval; the layers of a measure stand one below the other."""
    drawn = rows.dropna(subset="rho").rename(columns={"rho": "value", "layer": "method"})
    if drawn.empty:
        raise DataError("no correlation is defined, so there is nothing to draw")
    name: pd.Series[str] = drawn["measure"].map(measure_words) + np.where(
        drawn["given"] == "", "", "\ngiven the others"
    )
    drawn["name"] = name + ("\n" + drawn["stack"] if drawn["stack"].nunique() > 1 else "")
    plot_estimates(drawn, looks_of(rows["layer"].unique()), by="name", ax=ax)
    ax.axvline(0, color="0.3", linewidth=0.8, zorder=0.5)
    ax.set_xlim(-1.05, 1.05)
    ax.set_xlabel("rank correlation")
    return ax


def draw_relations(table: pd.DataFrame) -> Figure:
    """A panel per level of :attr:`~mto_analysis.rauc.relations.Relations.table` that has a correlation."""
    levels = list(dict.fromkeys(table.dropna(subset="rho")["level"]))
    if not levels:
        raise DataError("no correlation is defined, so there is nothing to draw")
    rows = max(len(each.drop_duplicates(["measure", "given", "stack"])) for _, each in table.groupby("level"))
    with paper_style(table["layer"]):
        figure = new_figure(1.4 + 0.3 * rows)
        axes = figure.subplots(1, len(levels), squeeze=False)[0]
        for level, ax in zip(levels, axes, strict=True):
            mine = table[table["level"] == level]
            plot_relations(mine, ax=ax)
            ax.set_title("\n".join([*level.split(", "), f"({mine['number'].max()})"]), fontsize="small")
        looks = looks_of(table["layer"].unique())
        handles = [axes[0].plot([], [], label=layer, markersize=4, **look)[0] for layer, look in looks.items()]
        legend_below(figure, handles, [str(handle.get_label()) for handle in handles], title="layer depth")
        describe(figure, note="Spearman's rank correlation with accuracy; intervals over methods or runs")
    return figure
