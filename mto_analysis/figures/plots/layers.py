"""Accuracy of an encoder at every layer depth, and heterogeneity beside it: a row of panels per model."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.evaluation import PROTOCOL_LABELS
from mto_analysis.figures.plots.heterogeneity import plot_share
from mto_analysis.figures.plots.style import (
    COLORS,
    LAYER_DEPTH,
    LINE_STYLES,
    MARKERS,
    describe,
    legend_below,
    new_axes,
    new_figure,
    paper_style,
)
from mto_analysis.training.evaluation.layers import LAYER_POOLINGS


def plot_layers(scores: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Accuracy over layer depth for each pooling, with 95 % intervals; a ring around the chosen layer.

    Args:
        scores: Rows of ``layers.csv``, of one model.
        ax: Where to draw; by default a new figure's axes.
    """
    if scores.empty:
        raise DataError("there is no accuracy to draw")
    ax = ax or new_axes(3.4, 2.4)
    for index, (pooling, label) in enumerate(LAYER_POOLINGS.items()):
        rows = scores[scores["pooling"] == pooling]
        if len(rows):
            color = COLORS[index]
            ax.plot(
                rows["layer"],
                rows["score"],
                color=color,
                marker=MARKERS[index],
                linestyle=LINE_STYLES[index],
                label=label,
            )
            ax.fill_between(rows["layer"], rows["ci_low"], rows["ci_high"], color=color, alpha=0.15, linewidth=0)
    chosen = scores[scores["chosen"]]
    ax.plot(chosen["layer"], chosen["score"], "o", markersize=11, markerfacecolor="none", color="black", label="chosen")
    ax.set_xlabel(f"{LAYER_DEPTH} of the encoder")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def draw_layers(scores: pd.DataFrame, heterogeneity: pd.DataFrame, protocol: str) -> Figure:
    """A row per model: accuracy at the left, H / H_max of its masked tokens at the right, where it is known.

    Accuracy has one range for all models, H its own for each.

    Args:
        scores: Rows of ``layers.csv``.
        heterogeneity: Rows of ``heterogeneity.csv``; in decoder-style models their depths are those of the decoder.
        protocol: Of the scores.
    """
    models = list(scores["model"].unique())
    with paper_style(models):
        figure = new_figure(1.9 * len(models) + 0.7)
        axes = figure.subplots(len(models), 1 if heterogeneity.empty else 2, squeeze=False)
        for (left, *right), model in zip(axes, models, strict=True):
            plot_layers(scores[scores["model"] == model], ax=left)
            left.sharey(axes[0, 0])
            left.set_title(model, fontsize="small", loc="left")
            left.set_ylabel(PROTOCOL_LABELS[protocol])
            curve = heterogeneity[heterogeneity["model"] == model]
            for ax in right:
                if curve.empty:
                    ax.set_axis_off()
                    continue
                plot_share(curve, ax=ax)
                ax.set_xlabel(f"{LAYER_DEPTH} of the {' and '.join(curve['stack'].unique())}")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        legend_below(figure, handles, labels)
        row = scores.iloc[0]
        note = f"chosen on {row['num_selection']} test images, scored on {row['num_images']} others; 95 % intervals"
        describe(figure, note=note)
    return figure
