"""Figures of an experiment: learning curves of all arms (Fig. 4), and heterogeneity per layer over the epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.figures.plots.style import (
    LAYER_DEPTH,
    PAGE_WIDTH,
    describe,
    figure_width,
    legend_below,
    looks_of,
    new_axes,
    new_figure,
    paper_style,
)
from mto_analysis.rauc.intervals import mean_interval

_PANEL_HEIGHT = 2.6
_MOST_COLUMNS = 3
_MOST_BANDS = 4
_NEAR_BOUND = 0.6


def _mean_and_band(runs: pd.DataFrame, value: str, over: str = "epoch") -> pd.DataFrame:
    """Mean over seeds at every epoch that all seeds have, with Student's 95 % interval of that mean (none of one)."""
    wide = runs.pivot_table(index=over, columns="seed", values=value).dropna()
    ends = [mean_interval(row, 0.95) if len(row) > 1 else (math.nan, math.nan) for row in wide.to_numpy()]
    return pd.DataFrame(
        {
            "mean": wide.mean(axis=1),
            "low": [low for low, _ in ends],
            "high": [high for _, high in ends],
        }
    )


def _fill(ax: Axes, band: pd.DataFrame, color: Any) -> None:
    ax.fill_between(band.index, band["low"], band["high"], color=color, alpha=0.18, linewidth=0)


def plot_experiment_curves(
    curves: pd.DataFrame, *, ax: Axes | None = None, score: str = "top-1 accuracy (%)", bands: bool = True
) -> Axes:
    """Score over pre-training epochs, a line per method: the mean over seeds, and the band of its 95 % interval.

    The score at epoch 0, where there is one, is that of the random encoder: a dotted line at the mean over all runs.

    Args:
        curves: Rows of ``curves.csv``: ``method epoch score seed``.
        ax: Where to draw; a new figure without.
        score: Label of the score.
        bands: Draw them; of many methods they hide each other.
    """
    ax = ax or new_axes(PAGE_WIDTH / 2, _PANEL_HEIGHT)
    looks = looks_of(curves["method"].astype(str))
    for method, runs in curves.groupby("method", sort=False):
        band = _mean_and_band(runs, "score")
        look = looks[str(method)]
        ax.plot(band.index, band["mean"], label=str(method), markevery=max(1, len(band) // 10), **look)
        if bands:
            _fill(ax, band, look["color"])
    random = curves.loc[curves["epoch"] == 0, "score"]
    if len(random):
        ax.axhline(random.mean(), color="0.4", linewidth=0.8, linestyle=":", label="random encoder")
    ax.set_xlabel("pre-training epoch")
    ax.set_ylabel(score)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return ax


def plot_final_scores(curves: pd.DataFrame, *, ax: Axes | None = None, score: str = "top-1 accuracy (%)") -> Axes:
    """Score at the last epoch, a row per method: the mean over seeds with its 95 % interval, and each seed as a dot."""
    ax = ax or new_axes(PAGE_WIDTH / 2, _PANEL_HEIGHT)
    looks = looks_of(curves["method"].astype(str))
    names = []
    for index, (method, runs) in enumerate(curves.groupby("method", sort=False)):
        values = runs.loc[runs["epoch"] == runs["epoch"].max(), "score"].to_numpy()
        look = looks[str(method)]
        names.append(str(method))
        ax.plot(values, np.full(len(values), index), ".", color=look["color"], alpha=0.5, markersize=4)
        if len(values) > 1:
            ax.plot(mean_interval(values, 0.95), (index, index), color=look["color"], linewidth=1.2)
        ax.plot(values.mean(), index, marker=look["marker"], color=look["color"], markersize=5, label=str(method))
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(f"final {score}")
    return ax


def draw_experiment_curves(curves: pd.DataFrame, *, score: str = "top-1 accuracy (%)") -> Figure:
    """A panel per recipe with all its arms; where they are many, without bands and with their final scores beside."""
    panels = list(curves.groupby("recipe", sort=False))
    many = max(part["method"].nunique() for _, part in panels) > _MOST_BANDS
    columns = min(2 if many else min(len(panels), _MOST_COLUMNS), _columns_that_fit())
    seeds = curves["seed"].nunique()
    with paper_style(curves["method"].astype(str)):
        figure, axes = _grid_of_panels(len(panels) * (2 if many else 1), columns, sharey=not many)
        for number, (recipe, part) in enumerate(panels):
            ax = axes[2 * number if many else number]
            plot_experiment_curves(part, ax=ax, score=score, bands=not many)
            ax.set_title(str(recipe))
            if many:
                plot_final_scores(part, ax=axes[2 * number + 1], score=score)
            else:
                _legend_below(ax, columns)
        what = "dots: seeds, bars" if many else "bands"
        words = f"mean of {seeds} seeds; {what}: 95 % interval of the mean" if seeds > 1 else "one seed"
        describe(figure, note=words)
    return figure


def _columns_that_fit() -> int:
    """Panels side by side, with room for their legends."""
    return max(1, int(figure_width() / 2))


def _grid_of_panels(count: int, columns: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(count / columns)
    figure = new_figure(rows * (_PANEL_HEIGHT + 0.5), share=0.6 if columns == 1 else 1)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def _legend_below(ax: Axes, columns: int) -> None:
    """Below the axis: inside, it would lie on a curve. Narrow beside many panels, else it would lie on its like."""
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=1 if columns == _MOST_COLUMNS else 2, handlelength=2.6
    )


def plot_trajectories(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """H of each layer depth over pre-training epochs, from dark (layer depth 0) to light; mean and band over seeds.

    Args:
        layers: Rows of ``heterogeneity.csv`` of one method and stack: ``epoch seed layer_depth heterogeneity``.
        ax: Where to draw; a new figure without.
    """
    ax = ax or new_axes(PAGE_WIDTH / 2, _PANEL_HEIGHT)
    depths = sorted(map(int, layers["layer_depth"].unique()))
    colors = _depth_colors(max(depths))
    for depth in depths:
        # H is never negative, nor need its interval over seeds be.
        band = _mean_and_band(layers[layers["layer_depth"] == depth], "heterogeneity").clip(lower=0)
        color = colors(depth)
        ax.plot(band.index, band["mean"], color=color, label=f"layer depth {depth}", linewidth=1.1)
        _fill(ax, band, color)
    ax.set_xlabel("pre-training epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set_ylim(bottom=0, auto=True)
    return ax


def plot_profiles(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """H over layer depth, a line per method: the mean over seeds, and the band of its 95 % interval.

    Args:
        layers: Rows of ``heterogeneity.csv`` of one epoch and stack: ``method seed layer_depth heterogeneity``.
        ax: Where to draw; a new figure without.
    """
    ax = ax or new_axes(PAGE_WIDTH / 2, _PANEL_HEIGHT)
    looks = looks_of(layers["method"].astype(str))
    for method, runs in layers.groupby("method", sort=False):
        band = _mean_and_band(runs, "heterogeneity", over="layer_depth").clip(lower=0)
        look = looks[str(method)]
        ax.plot(band.index, band["mean"], label=str(method), **look)
        _fill(ax, band, look["color"])
    ax.set_xlabel(LAYER_DEPTH)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def _depth_colors(deepest: int) -> Callable[[int], Any]:
    # Viridis without its palest tones, which vanish on white.
    scale = mpl.cm.ScalarMappable(Normalize(0, max(1, deepest) / 0.85), "viridis")

    def color(depth: int) -> Any:
        return scale.to_rgba(np.array(depth))

    return color


def draw_trajectories(layers: pd.DataFrame) -> Figure:
    """A panel per method (and stack), rows by recipe; panels of a row share the axis of H.

    Of a single epoch there is nothing to follow: H is drawn over layer depth then, a panel per recipe (and stack).

    Args:
        layers: Rows of ``heterogeneity.csv``.
    """
    layers = layers.assign(stack=layers["stack"].astype(object).fillna(""))  # CSV has no empty names
    if layers["epoch"].nunique() == 1:
        return _draw_profiles(layers)
    rows: list[list[tuple[str, pd.DataFrame]]] = []
    for _, recipe in layers.groupby("recipe", sort=False):
        several = recipe["stack"].nunique() > 1
        panels = [
            (f"{method}, {str(stack).replace('_', ' ')}" if several else str(method), part)
            for (method, stack), part in recipe.groupby(["method", "stack"], sort=False)
        ]
        rows += [panels[start : start + _MOST_COLUMNS] for start in range(0, len(panels), _MOST_COLUMNS)]
    columns = max(len(row) for row in rows)
    with paper_style():
        height = _PANEL_HEIGHT - (0.3 if len(rows) < 4 else 0.8)
        figure = new_figure(len(rows) * height + 0.5, share={1: 0.55, 2: 0.85}.get(columns, 1))
        grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
        for row, axes in zip(rows, grid, strict=True):
            for (title, part), ax in zip(row, axes, strict=False):
                plot_trajectories(part, ax=ax)
                ax.set_title(title)
            scale_heterogeneity(axes[: len(row)], pd.concat([part["heterogeneity"] for _, part in row]))
            for empty in axes[len(row) :]:
                empty.set_axis_off()
        depth_legend(figure, sorted(map(int, layers["layer_depth"].unique())))
        _say_what_is_shown(figure, layers)
    return figure


def _draw_profiles(layers: pd.DataFrame) -> Figure:
    several = layers.groupby("recipe")["stack"].nunique().max() > 1
    panels = list(layers.groupby(["recipe", "stack"], sort=False))
    columns = min(len(panels), _MOST_COLUMNS, _columns_that_fit())
    with paper_style(layers["method"].astype(str)):
        figure, axes = _grid_of_panels(len(panels), columns)
        for ((recipe, stack), part), ax in zip(panels, axes, strict=True):
            plot_profiles(part, ax=ax)
            ax.set_title(f"{recipe}, {str(stack).replace('_', ' ')}" if several else str(recipe))
            scale_heterogeneity([ax], part["heterogeneity"])
            _legend_below(ax, columns)
        _say_what_is_shown(figure, layers)
    return figure


def _say_what_is_shown(figure: Figure, layers: pd.DataFrame) -> None:
    seeds = layers["seed"].nunique()
    words = f"; mean of {seeds} seeds, bands: 95 % interval" if seeds > 1 else "; one seed"
    describe(figure, note=f"H while training, mean over an epoch's logged steps{words}")


def scale_heterogeneity(axes: Sequence[Axes], values: pd.Series) -> None:
    """Axis of H from 0; where H stays near its bound, as in SimMIM, that would lay all layers on one line."""
    near = values.min() > _NEAR_BOUND * values.max()
    lowest = min(max(float(ax.dataLim.y0), 0.0) for ax in axes)  # of bands
    ax = axes[0]
    ax.set_ylim(bottom=min(values.min() - 0.05 * np.ptp(values), lowest) if near else 0)
    ax.set_ylabel("H (nats), not from 0" if near else "Heterogeneity H (nats)")


def depth_legend(figure: Figure, depths: Sequence[int]) -> None:
    """Colours of the layer depths, below the figure; of many depths, some."""
    colors = _depth_colors(max(depths))
    shown = depths if len(depths) <= 8 else [depths[round(at)] for at in np.linspace(0, len(depths) - 1, 7)]
    handles = [mpl.lines.Line2D([], [], color=colors(depth), label=f"{depth}") for depth in shown]
    legend_below(figure, handles, [str(depth) for depth in shown], title="layer depth", handlelength=1.5)
