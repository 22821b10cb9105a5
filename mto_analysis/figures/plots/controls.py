"""A heterogeneity curve over the bands of its controls, one panel per model."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import COLORS, LINE_STYLES, PAGE_WIDTH, paper_style

__all__ = ["draw_controls", "plot_controls"]


def plot_controls(curve: pd.DataFrame, bands: pd.DataFrame, words: dict[str, str], *, ax: Axes | None = None) -> Axes:
    """One model's H / log(num_visible) over layer depth, black, and the bands of its controls under it.

    Args:
        curve: Rows of ``heterogeneity.csv``, of one model and stack.
        bands: Rows of :func:`~mto_analysis.probe.controls.control_bands`, of the same.
        words: Control to its name in the legend.
        ax: Where to draw; by default a new figure's axes.

    Raises:
        DataError: If there is no curve.
    """
    if curve.empty:
        raise DataError("there is no curve to draw")
    if ax is None:
        ax = Figure(figsize=(3.4, 2.6)).subplots()
    for index, (control, label) in enumerate(words.items()):
        band = bands[bands["control"] == control]
        color, line = COLORS[index % len(COLORS)], LINE_STYLES[index % len(LINE_STYLES)]
        ax.fill_between(band["layer_depth"], band["low"], band["high"], color=color, alpha=0.25, linewidth=0)
        # A band narrower than a line would not be seen, nor one that the curve covers.
        middle = (band["low"] + band["high"]) / 2
        ax.plot(band["layer_depth"], middle, color=color, linestyle=line, linewidth=1.1, label=label, zorder=3)
    ax.plot(
        curve["layer_depth"],
        curve["normalized"],
        color="black",
        marker="o",
        markersize=5,
        linewidth=2.2,
        label="the model",
    )
    low, high = curve["normalized_ci_low"], curve["normalized_ci_high"]
    ax.fill_between(curve["layer_depth"], low, high, color="black", alpha=0.2, linewidth=0)
    ax.set_xlabel("Layer depth")
    # All near the bound, as in SimMIM: the axis then shows what is there, not a line at the top.
    least = min(float(curve["normalized"].min()), float(bands["low"].min()))
    room = 0.05 if least < 0.5 else 0.1 * (1 - least) + 1e-3
    ax.set_ylim((0 if least < 0.5 else least) - room, 1 + room)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def draw_controls(
    table: pd.DataFrame,
    bands: pd.DataFrame,
    words: dict[str, str],
    *,
    width: float | None = None,
    note: bool = True,
) -> Figure:
    """A panel per model and stack, with one legend.

    Args:
        table: Rows of ``heterogeneity.csv``.
        bands: Rows of :func:`~mto_analysis.probe.controls.control_bands`.
        words: Control to its name in the legend.
        width: Of the figure, in inches; by default as its panels need.
        note: Say above the figure what is shown; leave it out where a caption does.
    """
    curves = list(table.groupby(["model", "stack"], sort=False))
    across = 2 if len(curves) == 4 else min(len(curves), 3)
    rows = -(-len(curves) // across)
    with paper_style():
        if width is None:
            width = PAGE_WIDTH * max(across, 2) / 3
        figure = Figure(figsize=(width, (2.3 if note else 1.8) * rows + (0.8 if note else 0.5)), layout="constrained")
        axes = figure.subplots(rows, across, squeeze=False)
        for ax in axes.flat[len(curves) :]:
            ax.set_axis_off()
        for ax, ((model, stack), curve) in zip(axes.flat, curves, strict=False):
            mine = bands[(bands["model"] == model) & (bands["stack"] == stack)]
            plot_controls(curve, mine, words, ax=ax)
            ax.set_title(f"{model}, {stack}", fontsize=7)
        axes[0, 0].set_ylabel(r"$H\,/\,\log N_{\mathrm{visible}}$")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=3)
        if note:
            figure.suptitle("bands: 95 % intervals over images, widest ends over seeds", fontsize=7, color="0.3")
    return figure
