"""A heterogeneity curve beside its controls: a row per model, a panel per control."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.heterogeneity import zoom_to
from mto_analysis.figures.plots.style import (
    COLORS,
    LAYER_DEPTH,
    Look,
    describe,
    figure_width,
    looks_of,
    model_curves,
    new_axes,
    new_figure,
    paper_style,
)


def plot_control(curve: pd.DataFrame, band: pd.DataFrame, *, look: Look | None = None, ax: Axes | None = None) -> Axes:
    """One model's H / log(num_visible) over layer depth, and the band of one control behind it, grey."""
    if curve.empty:
        raise DataError("there is no curve to draw")
    look = look or Look(color=COLORS[0], marker="o", linestyle="-")
    ax = ax or new_axes(2, 2)
    # A band narrower than a line would not be seen: its middle is drawn too.
    middle = (band["low"] + band["high"]) / 2
    ax.fill_between(band["layer_depth"], band["low"], band["high"], color="0.55", alpha=0.35, linewidth=0)
    ax.plot(band["layer_depth"], middle, color="0.35", linewidth=0.9, marker="x", markersize=3.5, label="control")
    ax.fill_between(
        curve["layer_depth"], curve["normalized_ci_low"], curve["normalized_ci_high"], color=look["color"], alpha=0.2,
        linewidth=0,
    )  # fmt: skip
    ax.plot(curve["layer_depth"], curve["normalized"], markersize=3, clip_on=False, label="model", **look)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return ax


def draw_controls(table: pd.DataFrame, bands: pd.DataFrame, words: Mapping[str, str]) -> Figure:
    """A row per model and stack, whose panels share their range; a column per control."""
    curves = model_curves(table)
    looks = looks_of(label for label, _ in curves)
    with paper_style():
        # A narrow figure has two lines of panels for each model.
        across = len(words) if figure_width() >= 0.9 * len(words) else -(-len(words) // 2)
        lines = -(-len(words) // across)
        figure = new_figure(1.05 * len(curves) * lines + 0.7)
        blocks = figure.subfigures(len(curves), 1, squeeze=False)[:, 0]
        for block, (label, curve) in zip(blocks, curves, strict=True):
            model, stack = curve["model"].iloc[0], curve["stack"].iloc[0]
            own = bands[(bands["model"] == model) & (bands["stack"] == stack)]
            axes = block.subplots(lines, across, squeeze=False, sharey=True)
            for ax in axes.flat[len(words) :]:
                ax.set_axis_off()
            for ax, (control, name) in zip(axes.flat, words.items(), strict=False):
                plot_control(curve, own[own["control"] == control], look=looks[label], ax=ax)
                if lines > 1 or block is blocks[0]:
                    ax.set_title(name.replace(" ", "\n", 1), fontsize="x-small", linespacing=0.95)
            lowest = min(float(curve["normalized"].min()), float(own["low"].min()))
            zoom_to(axes[0, 0], lowest, max(float(curve["normalized"].max()), float(own["high"].max())))
            for ax in axes[:, 0]:
                ax.set_ylabel(f"{label}\n$H\\,/\\,H_{{\\mathrm{{max}}}}$", fontsize="small")
        for ax in axes.flat[max(len(words) - across, 0) : len(words)]:
            ax.set_xlabel(LAYER_DEPTH, fontsize="small")
        describe(
            figure,
            note="colour: the model; grey crosses: the control of the panel; "
            "bands: 95 % intervals over images, widest ends over seeds",
        )
    return figure
