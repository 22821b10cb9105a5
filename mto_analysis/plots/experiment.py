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

from mto_analysis.intervals import mean_interval
from mto_analysis.plots.style import COLORS, LINE_STYLES, MARKERS, PAGE_WIDTH, paper_style

__all__ = ["draw_experiment_curves", "draw_trajectories", "plot_experiment_curves", "plot_trajectories"]

_PANEL_HEIGHT = 2.6
_MOST_COLUMNS = 3


def _mean_and_band(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """Mean over seeds at every epoch that all seeds have, with Student's 95 % interval of that mean (none of one)."""
    wide = runs.pivot_table(index="epoch", columns="seed", values=value).dropna()
    ends = [mean_interval(row, 0.95) if len(row) > 1 else (math.nan, math.nan) for row in wide.to_numpy()]
    return pd.DataFrame(
        {
            "mean": wide.mean(axis=1),
            "low": [low for low, _ in ends],
            "high": [high for _, high in ends],
        }
    )


def plot_experiment_curves(curves: pd.DataFrame, *, ax: Axes | None = None, score: str = "top-1 accuracy (%)") -> Axes:
    """Score over pre-training epochs, a line per method: the mean over seeds, and the band of its 95 % interval.

    The score at epoch 0, where there is one, is that of the random encoder: a dotted line at the mean over all runs.

    Args:
        curves: Rows of ``curves.csv``: ``method epoch score seed``.
        ax: Where to draw; a new figure without.
        score: Label of the score.
    """
    ax = Figure(figsize=(PAGE_WIDTH / 2, _PANEL_HEIGHT), layout="constrained").subplots() if ax is None else ax
    for index, (method, runs) in enumerate(curves.groupby("method", sort=False)):
        band = _mean_and_band(runs, "score")
        color = COLORS[index % len(COLORS)]
        ax.plot(
            band.index,
            band["mean"],
            label=str(method),
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            markevery=max(1, len(band) // 10),
        )
        ax.fill_between(band.index, band["low"], band["high"], color=color, alpha=0.18, linewidth=0)
    random = curves.loc[curves["epoch"] == 0, "score"]
    if len(random):
        ax.axhline(random.mean(), color="0.4", linewidth=0.8, linestyle=":", label="random encoder")
    ax.set_xlabel("pre-training epoch")
    ax.set_ylabel(score)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def draw_experiment_curves(curves: pd.DataFrame, *, score: str = "top-1 accuracy (%)") -> Figure:
    """A panel per recipe with all its arms.

    Args:
        curves: Rows of ``curves.csv``.
        score: Label of the score.
    """
    panels = list(curves.groupby("recipe", sort=False))
    columns = min(len(panels), _MOST_COLUMNS)
    rows = math.ceil(len(panels) / columns)
    seeds = curves["seed"].nunique()
    with paper_style():
        width = PAGE_WIDTH * (0.62 if columns == 1 else 1)
        figure = Figure(figsize=(width, rows * (_PANEL_HEIGHT + 0.35)), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for (recipe, part), ax in zip(panels, axes, strict=False):
            plot_experiment_curves(part, ax=ax, score=score)
            ax.set_title(str(recipe))
            ax.legend(loc="lower right" if len(part["method"].unique()) < 5 else "best", handlelength=2.6)
        for empty in axes[len(panels) :]:
            empty.set_axis_off()
        words = f"mean of {seeds} seeds; bands: 95 % interval of the mean" if seeds > 1 else "one seed"
        figure.suptitle(words, fontsize=7, color="0.3")
    return figure


def plot_trajectories(layers: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """H of each layer depth over pre-training epochs, from dark (layer depth 0) to light; mean and band over seeds.

    Args:
        layers: Rows of ``heterogeneity.csv`` of one method and stack: ``epoch seed layer_depth heterogeneity``.
        ax: Where to draw; a new figure without.
    """
    ax = Figure(figsize=(PAGE_WIDTH / 2, _PANEL_HEIGHT), layout="constrained").subplots() if ax is None else ax
    depths = sorted(map(int, layers["layer_depth"].unique()))
    colors = _depth_colors(max(depths))
    for depth in depths:
        band = _mean_and_band(layers[layers["layer_depth"] == depth], "heterogeneity")
        color = colors(depth)
        ax.plot(band.index, band["mean"], color=color, label=f"layer depth {depth}", linewidth=1.1)
        ax.fill_between(band.index, band["low"], band["high"], color=color, alpha=0.18, linewidth=0)
    ax.set_xlabel("pre-training epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(bottom=0)  # H is never negative, also where the interval of two seeds is
    return ax


def _depth_colors(deepest: int) -> Callable[[int], Any]:
    # Viridis without its palest tones, which vanish on white.
    scale = mpl.cm.ScalarMappable(Normalize(0, max(1, deepest) / 0.85), "viridis")

    def color(depth: int) -> Any:
        return scale.to_rgba(np.array(depth))

    return color


def draw_trajectories(layers: pd.DataFrame) -> Figure:
    """A panel per method (and stack), rows by recipe; panels of a row share the axis of H.

    Args:
        layers: Rows of ``heterogeneity.csv``.
    """
    rows: list[list[tuple[str, pd.DataFrame]]] = []
    for _, recipe in layers.groupby("recipe", sort=False):
        several = recipe["stack"].nunique() > 1
        panels = [
            (f"{method}, {stack}" if several else str(method), part)
            for (method, stack), part in recipe.groupby(["method", "stack"], sort=False)
        ]
        rows += [panels[start : start + _MOST_COLUMNS] for start in range(0, len(panels), _MOST_COLUMNS)]
    columns = max(len(row) for row in rows)
    with paper_style():
        width = PAGE_WIDTH * {1: 0.55, 2: 0.85}.get(columns, 1)
        figure = Figure(figsize=(width, len(rows) * (_PANEL_HEIGHT - 0.3) + 0.2), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
        for row, axes in zip(rows, grid, strict=True):
            for (title, part), ax in zip(row, axes, strict=False):
                plot_trajectories(part, ax=ax)
                ax.set_title(title)
            axes[0].set_ylabel("Heterogeneity H (nats)")
            for empty in axes[len(row) :]:
                empty.set_axis_off()
        _depth_legend(figure, sorted(map(int, layers["layer_depth"].unique())))
        seeds = layers["seed"].nunique()
        words = f"; mean of {seeds} seeds, bands: 95 % interval" if seeds > 1 else "; one seed"
        figure.suptitle(f"H while training, mean over an epoch's logged steps{words}", fontsize=7, color="0.3")
    return figure


def _depth_legend(figure: Figure, depths: Sequence[int]) -> None:
    colors = _depth_colors(max(depths))
    shown = depths if len(depths) <= 8 else [depths[round(at)] for at in np.linspace(0, len(depths) - 1, 7)]
    handles = [mpl.lines.Line2D([], [], color=colors(depth), label=f"{depth}") for depth in shown]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), title="layer depth", handlelength=1.5
    )
