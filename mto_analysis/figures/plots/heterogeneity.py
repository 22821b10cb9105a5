"""Fig. 1: heterogeneity over layer depth, of several models (a) or of one model at several epochs (b)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import COLORS, LINE_STYLES, MARKERS, PAGE_WIDTH, paper_style

__all__ = ["REQUIRED_COLUMNS", "draw_heterogeneity", "plot_fall", "plot_heterogeneity"]

REQUIRED_COLUMNS = ("model", "stack", "layer_depth", "heterogeneity", "normalized", "num_visible")

# H in float32 is exact to about 1e-6 nats; below this share of the bound a fall is rounding.
_FLOOR = 1e-7


def _curves(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """One curve per model and stack, in the order of the table."""
    missing = [column for column in REQUIRED_COLUMNS if column not in frame]
    if missing:
        raise DataError(f"the table lacks the columns {', '.join(missing)}")
    several = frame.groupby("model")["stack"].nunique().max() > 1
    return [
        (f"{model}, {stack}" if several else str(model), curve.sort_values("layer_depth"))
        for (model, stack), curve in frame.groupby(["model", "stack"], sort=False)
    ]


def _look(index: int) -> dict[str, object]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def _prepare(ax: Axes | None) -> Axes:
    if ax is None:
        ax = Figure(figsize=(PAGE_WIDTH / 2, 2.5)).subplots()
    ax.set_xlabel("Layer depth")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_heterogeneity(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Heterogeneity H over layer depth with its 95 % interval; dotted lines are the bounds log(num_visible).

    Args:
        frame: Rows of ``heterogeneity.csv``.
        ax: Where to draw; by default a new figure's axes.

    Raises:
        DataError: If a column is missing.
    """
    curves = _curves(frame)
    ax = _prepare(ax)
    colors: dict[float, str] = {}  # of bounds; models with the same number of visible patches share one
    for index, (label, curve) in enumerate(curves):
        depth = curve["layer_depth"].to_numpy()
        look = _look(index)
        ax.plot(depth, curve["heterogeneity"], label=label, **look)  # type: ignore[arg-type]
        if {"ci_low", "ci_high"} <= set(curve):
            ax.fill_between(depth, curve["ci_low"], curve["ci_high"], color=str(look["color"]), alpha=0.2, linewidth=0)
        bound = np.log(curve["num_visible"].to_numpy())
        if bound[-1] not in colors:
            colors[bound[-1]] = str(look["color"])
            visible = f"$\\log {curve['num_visible'].iloc[-1]:.4g}$"
            # Beside the axes, where no curve is.
            ax.annotate(
                visible, (1, bound[-1]), (2, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="left", va="center", size=6, color=colors[bound[-1]], annotation_clip=False,
            )  # fmt: skip
        ax.plot(depth, bound, color=colors[bound[-1]], linewidth=0.7, linestyle=":")
    ax.set_ylabel("Heterogeneity H (nats)")
    ax.set_ylim(bottom=0)
    return ax


def plot_fall(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """How far H lies below its bound, ``1 - H / log(num_visible)``, on a log axis: a fall of a thousandth can be seen.

    The axis points down, so that a falling H falls here too.

    Args:
        frame: Rows of ``heterogeneity.csv``.
        ax: Where to draw; by default a new figure's axes.

    Raises:
        DataError: If a column is missing.
    """
    curves = _curves(frame)
    ax = _prepare(ax)
    for index, (label, curve) in enumerate(curves):
        depth = curve["layer_depth"].to_numpy()
        look = _look(index)
        ax.plot(depth, (1 - curve["normalized"]).clip(lower=_FLOOR), label=label, **look)  # type: ignore[arg-type]
        if {"normalized_ci_low", "normalized_ci_high"} <= set(curve):
            low = (1 - curve["normalized_ci_high"]).clip(lower=_FLOOR)
            high = (1 - curve["normalized_ci_low"]).clip(lower=_FLOOR)
            ax.fill_between(depth, low, high, color=str(look["color"]), alpha=0.2, linewidth=0)
    ax.set_yscale("log")
    top = min(float((1 - frame["normalized"]).clip(lower=_FLOOR).min()) / 2, 0.1)
    ax.set_ylim(1.3, max(top, _FLOOR / 2))
    ax.set_ylabel(r"$1 - H\,/\,\log N_{\mathrm{visible}}$ (downwards)")
    return ax


def draw_heterogeneity(
    frame: pd.DataFrame, *, title: str | None = None, width: float = PAGE_WIDTH, note: bool = True
) -> Figure:
    """Both views of Fig. 1 side by side, with one legend.

    Args:
        frame: Rows of ``heterogeneity.csv``, of one or several models.
        title: Line above the figure.
        width: Of the figure, in inches.
        note: Say above the figure what is shown; leave it out where a caption does.

    Raises:
        DataError: If a column is missing.
    """
    with paper_style():
        figure = Figure(figsize=(width, 2.7 if width > 6 else 2.35), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_heterogeneity(frame, ax=left)
        plot_fall(frame, ax=right)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), handlelength=3)
        heading = "\n".join(filter(None, (title, _caption(frame) if note else "")))
        if heading:
            figure.suptitle(heading, fontsize=7, color="0.3")
    return figure


def _caption(frame: pd.DataFrame) -> str:
    text = "mean"
    if "num_images" in frame:
        counts = sorted({int(count) for count in frame["num_images"]})
        text += f" over {' or '.join(map(str, counts))} images"
    if {"ci_low", "ci_high"} <= set(frame):
        text += "; bands: 95 % interval over images"
    return f"{text}; dotted: bound $\\log N_{{\\mathrm{{visible}}}}$"
