"""Fig. 1: heterogeneity over layer depth, of several models (a) or of one model at several epochs (b)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import (
    LAYER_DEPTH,
    base_of,
    describe,
    figure_width,
    legend_below,
    looks_of,
    model_curves,
    new_axes,
    new_figure,
    paper_style,
)

REQUIRED_COLUMNS = ("model", "stack", "layer_depth", "heterogeneity", "normalized", "num_visible")

# More panels than this would be too small to read; all models then share one.
_MOST_PANELS = 6
_LABEL = r"$H\,/\,H_{\mathrm{max}}$"


def _curves(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """One curve per model and stack, in the order of the table."""
    missing = [column for column in REQUIRED_COLUMNS if column not in frame]
    if missing:
        raise DataError(f"the table lacks the columns {', '.join(missing)}")
    return [(label, curve.sort_values("layer_depth")) for label, curve in model_curves(frame)]


def _prepare(ax: Axes | None) -> Axes:
    ax = ax or new_axes()
    ax.set_xlabel(LAYER_DEPTH)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_share(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """H as a share of its bound, ``H / log(num_visible)``, on the range of the curves, so that a small fall is seen.

    An axis that does not begin at 0 says so. The bound is 1, a dotted line.

    Args:
        frame: Rows of ``heterogeneity.csv``.
        ax: Where to draw; by default a new figure's axes.
    """
    return _plot_shares(_curves(frame), _prepare(ax))


def _plot_shares(curves: Sequence[tuple[str, pd.DataFrame]], ax: Axes) -> Axes:
    ends = ("normalized_ci_low", "normalized_ci_high")
    looks = looks_of(label for label, _ in curves)
    for label, curve in curves:
        depth, look = curve["layer_depth"], looks[label]
        face = "white" if label.endswith(", early") else look["color"]  # hollow
        ax.plot(depth, curve["normalized"], label=label, clip_on=False, markerfacecolor=face, **look)
        if set(ends) <= set(curve):
            ax.fill_between(depth, curve[ends[0]], curve[ends[1]], color=look["color"], alpha=0.2, linewidth=0)
    ax.axhline(1, color="0.4", linewidth=0.7, linestyle=":")
    values = pd.concat([curve.get(name, curve["normalized"]) for _, curve in curves for name in ("normalized", *ends)])
    zoom_to(ax, float(values.min()), float(values.max()))
    ax.set_ylabel(_LABEL)
    return ax


def zoom_to(ax: Axes, lowest: float, highest: float) -> None:
    """Let an axis of H / H_max show a range of values from 0, or, where all are near the bound, from the lowest."""
    zoomed = lowest > 0.5
    top = 1.0 if highest > 0.7 else highest
    bottom = lowest if zoomed else 0.0
    room = 0.08 * (top - bottom) + 1e-6
    ax.set_ylim(bottom - room, top + room)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    if zoomed:
        ax.annotate("axis not from 0", (0.03, 0.03), xycoords="axes fraction", size="x-small", color="0.4")


def draw_heterogeneity(frame: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Fig. 1: a panel per model on its own range of H / H_max; epochs of one model share a panel.

    Models are variants of one where their labels agree up to a comma or a plus: ``MAE``, ``MAE, early``, ``MAE + MTO``.
    One curve has an axis in nats beside it.
    """
    curves = _curves(frame)
    groups: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for label, curve in curves:
        groups.setdefault(base_of(str(curve["model"].iloc[0])), []).append((label, curve))
    if len(groups) > _MOST_PANELS:
        groups = {"all models": curves}
    with paper_style(label for label, _ in curves):
        across = min(len(groups), 3 if figure_width() > 4 else 1)
        down = math.ceil(len(groups) / across)
        figure = new_figure(1.9 * down + 0.6, share=0.6 if len(groups) == 1 else 1)
        axes = figure.subplots(down, across, squeeze=False)
        for ax in axes.flat[len(groups) :]:
            ax.set_axis_off()
        for ax, (group, shown) in zip(axes.flat, groups.items(), strict=False):
            _plot_shares(shown, _prepare(ax))
            ax.set_title(f"{group}{_bound(shown)}", fontsize="small", loc="left")
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        if len(curves) == 1:
            _add_nats(axes[0, 0], curves[0][1])
        else:
            found = [pair for ax in axes.flat for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
            legend_below(figure, *zip(*found, strict=True), ncols=4)
        describe(figure, title=title, note=_note(frame))
    return figure


def _add_nats(ax: Axes, curve: pd.DataFrame) -> None:
    """H in nats on the right, where one bound holds at every layer depth."""
    bounds = np.log(curve["num_visible"].to_numpy())
    if np.ptp(bounds) < 1e-9 and bounds[0] > 0:
        nats = ax.secondary_yaxis("right", functions=(lambda share: share * bounds[0], lambda h: h / bounds[0]))
        nats.set_ylabel("$H$ (nats)")


def _bound(curves: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """The bound of H in nats, where all curves of a panel have one."""
    counts = {round(float(count), 6) for _, curve in curves for count in curve["num_visible"]}
    return f", $H_{{\\mathrm{{max}}}} = {math.log(counts.pop()):.3g}$ nats" if len(counts) == 1 else ""


def _note(frame: pd.DataFrame) -> str:
    text = "mean"
    if "num_images" in frame:
        counts = sorted({int(count) for count in frame["num_images"].dropna()})
        text += f" over {' or '.join(map(str, counts))} images"
    if {"ci_low", "ci_high"} <= set(frame):
        text += "; bands: 95 % interval over images"
    return f"{text}; dotted: bound $H_{{\\mathrm{{max}}}} = \\log N_{{\\mathrm{{visible}}}}$"
