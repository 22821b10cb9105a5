"""Accuracy along pre-training, one line per method, with what a random encoder of the same shape reaches."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.figures.plots.style import COLUMN_WIDTH, looks_of, new_axes, new_figure, paper_style

#: What the scores of each protocol are.
PROTOCOL_LABELS = {
    "knn": "kNN accuracy (%)",
    "linear_cached": "linear accuracy on features (%)",
    "linear_mae": "linear probe accuracy (%)",
    "finetune": "accuracy after fine-tuning (%)",
}


def plot_accuracy(table: pd.DataFrame, random: Mapping[str, float] | None = None, *, ax: Axes | None = None) -> Axes:
    """Top-1 accuracy over pre-training epochs: means over seeds, and every seed as a thin line where there are several.

    Args:
        table: ``method epoch score seed protocol``; rows without an epoch are left out.
        random: Accuracy of a random encoder for each method, dashed.
        ax: Where to draw; a new figure without.
    """
    ax = ax or new_axes(COLUMN_WIDTH, 2.3)
    shown = table[table["epoch"].notna()].astype({"epoch": float})
    looks = looks_of(shown["method"])
    for method, look in looks.items():
        rows = shown[shown["method"] == method]
        color = look["color"]
        if rows["seed"].nunique() > 1:
            for _, run in rows.groupby("seed"):
                ax.plot(run["epoch"], run["score"], color=color, linewidth=0.5, alpha=0.5)
        mean = rows.pivot_table(index="epoch", columns="seed", values="score").dropna().mean(axis=1)
        ax.plot(mean.index, mean, label=method, **look)
        if random and method in random:
            label = "random encoder" if len(set(random.values())) == 1 else f"random encoder ({method})"
            known = ax.get_legend_handles_labels()[1]
            own = "0.4" if label == "random encoder" else color
            label = "_" if label in known else label
            ax.axhline(random[method], color=own, linewidth=0.9, linestyle=(0, (4, 2)), label=label, zorder=1)
    ax.set_xlabel("pre-training epoch")
    protocols = shown["protocol"].unique()
    ax.set_ylabel(
        PROTOCOL_LABELS.get(protocols[0], "top-1 accuracy (%)") if len(protocols) == 1 else "top-1 accuracy (%)"
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="best", handlelength=2.2)
    return ax


def draw_accuracy(table: pd.DataFrame, random: Mapping[str, float] | None = None) -> Figure:
    """The same as a figure of one column, in the project's style."""
    with paper_style():
        figure = new_figure(2.3, share=0.5)
        plot_accuracy(table, random, ax=figure.subplots())
    return figure
