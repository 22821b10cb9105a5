"""Learning curves with the areas of Eq. (6) shaded, as in Fig. 4, and RAUC over every window as a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from mto_analysis.figures.plots.style import COLORS, COLUMN_WIDTH, PAGE_WIDTH
from mto_analysis.rauc import Points
from mto_analysis.rauc.comparison import Comparison, mean_curve
from mto_analysis.rauc.intervals import mean_interval

__all__ = ["plot_rauc", "plot_rauc_windows", "rauc_figure", "rauc_windows_figure"]

Runs = Mapping[str, Points]

_BASELINE, _TARGET = COLORS[0], COLORS[1]
_PANEL_HEIGHT = 2.7
_MAP_HEIGHT = 2.9

#: Up to this many cells a heat map also has its numbers.
_MOST_NUMBERS = 100
_FINE_TICKS = (0.4, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5)
_WIDE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def plot_rauc(
    comparison: Comparison,
    baseline: Runs,
    target: Runs,
    *,
    ax: Axes | None = None,
    axis: str = "epoch",
    score: str = "top-1 accuracy (%)",
) -> Axes:
    """Two learning curves, the areas that RAUC divides, and where the target reaches the baseline's final score.

    Grey: area of the baseline above the reference. Colour: what the target adds, hatched where it lags. With several
    seeds the curve is their mean and the bars are Student's interval of that mean.

    Args:
        comparison: The numbers to show.
        baseline: Runs of the baseline by seed.
        target: Runs of the target by seed.
        ax: Where to draw; a new figure without.
        axis: What the curves run over.
        score: Label of the score.
    """
    ax = Figure(figsize=(COLUMN_WIDTH, _PANEL_HEIGHT), layout="constrained").subplots() if ax is None else ax
    one, two = mean_curve(baseline), mean_curve(target)
    start, end, level = comparison.start, comparison.end, comparison.reference
    epochs = np.unique(np.concatenate([[start, end], one.epochs, two.epochs]))
    epochs = epochs[(epochs >= start) & (epochs <= end)]
    # Corners where the curves cross, so that neither shade leaks over the other.
    epochs = np.unique(np.concatenate([epochs, comparison.crossings]))
    low, high = np.interp(epochs, *one), np.interp(epochs, *two)
    ax.fill_between(epochs, level, low, color="0.85", linewidth=0, label="baseline's area", zorder=0.5)
    ax.fill_between(
        epochs, low, high, where=high >= low, color=_TARGET, alpha=0.22, linewidth=0, label="target's lead", zorder=0.6
    )
    if (high < low).any():
        ax.fill_between(
            epochs, low, high, where=high <= low, facecolor="none", edgecolor=_BASELINE, hatch="//////", linewidth=0,
            label="target's lag", zorder=0.7,
        )  # fmt: skip
    for runs, curve, name, color, marker in (
        (baseline, one, comparison.baseline, _BASELINE, "o"),
        (target, two, comparison.target, _TARGET, "s"),
    ):
        every = max(1, len(curve.epochs) // 12)
        ax.plot(*curve, color=color, marker=marker, markevery=every, label=name, zorder=3)
        if len(runs) > 1:
            bars = curve.epochs[::every]
            scores = np.array([np.interp(bars, *run) for run in runs.values()])
            ends = np.array([mean_interval(column, comparison.interval.confidence) for column in scores.T])
            middle = scores.mean(axis=0)
            ax.errorbar(
                bars,
                middle,
                yerr=np.abs(ends.T - middle),
                fmt="none",
                ecolor=color,
                elinewidth=0.8,
                capsize=1.5,
                zorder=2,
            )
    ax.plot([start, end], [level, level], color="0.4", linewidth=0.8, linestyle=":")
    _mark_saving(ax, comparison)
    ax.set_xlabel({"epoch": "pre-training epoch", "images": "images seen"}.get(axis, axis))
    ax.set_ylabel(score)
    group = "".join(f", {value}" for value in comparison.group.values())
    ax.set_title(f"{comparison.target}{group}: {_in_words(comparison)}")
    # Below the axis: inside, it would lie on a shaded area whichever corner it takes.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=1.8, labelspacing=0.3)
    return ax


def _in_words(comparison: Comparison) -> str:
    if comparison.rauc is None:
        return "RAUC undefined"
    interval = comparison.interval
    return f"RAUC {comparison.rauc:.2f}" + (
        f" [{interval.low:.2f}, {interval.high:.2f}]" if interval.kind == "bounded" else ""
    )


def _mark_saving(ax: Axes, comparison: Comparison) -> None:
    """The baseline's final score, back to where the target reaches it and down to the axis."""
    final, reached, end = comparison.final_baseline, comparison.epochs_to_final, comparison.end
    if reached is None or comparison.share_saved is None or not reached < end:
        ax.plot([comparison.start, end], [final, final], color="0.2", linewidth=0.8, linestyle="--", zorder=2.5)
        return
    ax.annotate(
        "", xy=(reached, final), xytext=(end, final), zorder=4,
        arrowprops={"arrowstyle": "->", "linewidth": 0.8, "color": "0.2", "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    ax.plot([reached, reached], [min(comparison.reference, final), final], color="0.2", linewidth=0.8, linestyle="--")
    text = ax.annotate(
        f"{100 * comparison.share_saved:.0f} % saved", xy=(end, final), xytext=(-3, 2),
        textcoords="offset points", ha="right", va="bottom", fontsize=7, color="0.2", zorder=4,
    )  # fmt: skip
    text.set_path_effects([withStroke(linewidth=1.5, foreground="white", alpha=0.8)])


def plot_rauc_windows(
    grid: pd.DataFrame,
    *,
    chosen: Iterable[tuple[float, float]] = (),
    ax: Axes | None = None,
    axis: str = "epoch",
    title: str = "",
) -> Axes:
    """RAUC for every window, E1 across and E2 up: a ratio that holds for one window only shows at once.

    White is 1 (no gain) and colours are even in the logarithm, so that twice and half are equally strong; windows
    where the ratio is undefined are hatched.

    Args:
        grid: ``start end rauc`` from :func:`mto_analysis.rauc.comparison.window_grid`.
        chosen: Windows to frame, those that are reported.
        ax: Where to draw; a new figure without.
        axis: What the curves run over.
        title: Above the panel.
    """
    ax = Figure(figsize=(COLUMN_WIDTH, _MAP_HEIGHT), layout="constrained").subplots() if ax is None else ax
    table = grid.pivot_table(index="end", columns="start", values="rauc", dropna=False)
    values = table.to_numpy(dtype=float)
    positive = values[np.isfinite(values) & (values > 0)]
    # One wild window next to a flat stretch must not take the colours from all others.
    reach = max(float(np.quantile(np.maximum(positive, 1 / positive), 0.9)) if positive.size else 1.0, 1.1)
    shown = np.where(np.isfinite(values), np.maximum(values, 1e-9), np.nan)  # zero and below: the colour beneath
    image = ax.pcolormesh(np.ma.masked_invalid(shown), cmap="RdBu_r", norm=LogNorm(1 / reach, reach))
    exists = grid.assign(here=1.0).pivot_table(index="end", columns="start", values="here").to_numpy(dtype=float)
    for row, column in np.argwhere(np.isfinite(exists) & ~np.isfinite(values)):
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor="0.95", edgecolor="0.6", hatch="////", linewidth=0))
    if values.size <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(values)):
            strong = abs(math.log(shown[row, column])) > 0.6 * math.log(reach)
            ax.text(
                column + 0.5, row + 0.5, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=6,
                color="white" if strong else "black",
            )  # fmt: skip
    for start, end in chosen:
        if start in table.columns and end in table.index:
            corner = float(np.searchsorted(table.columns, start)), float(np.searchsorted(table.index, end))
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.2, zorder=3))
    for one_axis, labels in ((ax.xaxis, table.columns), (ax.yaxis, table.index)):
        every = math.ceil(len(labels) / 8)
        one_axis.set_ticks(np.arange(0, len(labels), every) + 0.5, [f"{x:g}" for x in labels[::every]])
    ax.set_xlabel(f"E1 ({axis})")
    ax.set_ylabel(f"E2 ({axis})")
    ax.set_title(title)
    ax.grid(visible=False)
    ticks = [x for x in (_WIDE_TICKS if reach > 3 else _FINE_TICKS) if 1 / reach <= x <= reach]
    bar = ax.figure.colorbar(image, ax=ax, extend="both", label="RAUC", ticks=ticks, format="%g")
    bar.ax.minorticks_off()
    return ax


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    width = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def rauc_figure(
    comparisons: Sequence[Comparison], runs: Sequence[tuple[Runs, Runs]], *, axis: str = "epoch", score: str
) -> Figure:
    """A panel per comparison, two in a row, like Fig. 4."""
    figure, axes = _panels(len(comparisons), _PANEL_HEIGHT)
    for comparison, (baseline, target), ax in zip(comparisons, runs, axes, strict=True):
        plot_rauc(comparison, baseline, target, ax=ax, axis=axis, score=score)
    return figure


def rauc_windows_figure(
    grids: Mapping[str, pd.DataFrame], *, chosen: Iterable[tuple[float, float]] = (), axis: str = "epoch"
) -> Figure:
    """A heat map per pair of methods."""
    figure, axes = _panels(len(grids), _MAP_HEIGHT)
    windows = list(chosen)
    for (title, grid), ax in zip(grids.items(), axes, strict=True):
        plot_rauc_windows(grid, chosen=windows, ax=ax, axis=axis, title=title)
    return figure
