"""All methods over several tasks: estimates with intervals, performance profiles and sample-efficiency curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import Look, describe, legend_below, looks_of, new_figure, paper_style
from mto_analysis.rauc.aggregates import IMPROVEMENT, Aggregates

Looks = Mapping[str, Look]
_PANEL_HEIGHT = 2.1


def plot_estimates(rows: pd.DataFrame, looks: Looks, *, by: str = "statistic", ax: Axes) -> Axes:
    """A point per estimate and a bar for its interval, which leaves the panel where it has no end.

    Args:
        rows: Columns ``method value low high`` and ``by``.
        looks: Colour, marker and line style of each method.
        by: The column whose values are the rows of the panel.
        ax: Where to draw.
    """
    if rows.empty:
        raise DataError("nothing to draw: no rows")
    names = list(dict.fromkeys(rows[by]))
    methods = [method for method in looks if method in set(rows["method"])]
    for method in methods:
        mine = rows[rows["method"] == method].drop_duplicates(by)
        look = looks[method]
        shift = 0.6 * ((methods.index(method) + 0.5) / len(methods) - 0.5)
        heights = np.array([names.index(name) for name in mine[by]]) + shift
        # Infinite ends reach the edge of the panel and beyond; where there is no interval, NaN draws nothing.
        edges = (-1e9, 1e9)
        ax.hlines(heights, mine["low"].clip(*edges), mine["high"].clip(*edges), color=look["color"], linewidth=1.4)
        ax.plot(mine["value"], heights, color=look["color"], marker=look["marker"], linestyle="none", markersize=4)
    shown = rows[["value", "low", "high"]].to_numpy(dtype=float)
    shown = shown[np.isfinite(shown)]
    pad = 0.06 * (np.ptp(shown) or abs(shown[0]) or 1.0)
    ax.set_xlim(shown.min() - pad, shown.max() + pad)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.grid(visible=False, axis="y")
    return ax


def plot_bands(rows: pd.DataFrame, looks: Looks, *, x: str, y: str, steps: bool = False, ax: Axes) -> Axes:
    """A curve per method with its interval as a band.

    Args:
        rows: Columns ``method``, ``x``, ``y``, ``low`` and ``high``.
        looks: Colour, marker and line style of each method.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        steps: Whether the curve is constant between its points, as shares of runs are.
        ax: Where to draw.
    """
    for method, curve in rows.groupby("method", sort=False):
        look = looks[str(method)]
        how: Any = "steps-post" if steps else "default"
        ax.plot(curve[x], curve[y], linewidth=1.3, drawstyle=how, color=look["color"], linestyle=look["linestyle"])
        step: Any = "post" if steps else None
        ax.fill_between(curve[x], curve["low"], curve["high"], color=look["color"], alpha=0.18, linewidth=0, step=step)
    ax.margins(x=0.01)
    return ax


def draw_aggregates(found: Aggregates, *, axis: str, score: str) -> Figure:
    """Estimates and profiles by each measure, probability of improvement, and sample efficiency, in one figure."""
    methods = list(dict.fromkeys(found.scores["method"]))
    looks = looks_of(methods)
    estimates = found.estimates
    measures = list(dict.fromkeys(found.profiles["measure"]))
    labels = {"final score": f"{score} at {axis} {found.end:g}", "RAUC": "RAUC of a run"}
    across = len(measures) + 1
    with paper_style():
        figure = new_figure(2 * _PANEL_HEIGHT + 0.5)
        upper, lower = figure.subplots(2, across, squeeze=False)
        for measure, above, below in zip(measures, upper, lower, strict=False):
            mine = estimates[(estimates["measure"] == measure) & (estimates["statistic"] != IMPROVEMENT)]
            plot_estimates(mine, looks, ax=above)
            above.set_xlabel(labels[measure])
            plot_bands(
                found.profiles[found.profiles["measure"] == measure], looks, x="threshold", y="share", steps=True,
                ax=below,
            )  # fmt: skip
            below.set_xlabel(f"threshold: {labels[measure]}")
            below.set_ylabel("share of runs above")
            below.set_ylim(-0.02, 1.02)
            if measure == "RAUC":
                for ax in (above, below):
                    ax.axvline(1.0, color="0.3", linewidth=0.8, zorder=0.5)
        wins = estimates[estimates["statistic"] == IMPROVEMENT]
        plot_estimates(wins, looks, by="measure", ax=upper[-1])
        upper[-1].axvline(0.5, color="0.3", linewidth=0.8, zorder=0.5)
        upper[-1].set_xlim(-0.03, 1.03)
        over = ", ".join(dict.fromkeys(wins["baseline"]))
        upper[-1].set_xlabel(f"{IMPROVEMENT} over {over}")
        plot_bands(found.efficiency, looks, x="place", y="score", ax=lower[-1])
        lower[-1].set_xlabel(axis)
        lower[-1].set_ylabel(f"IQM of {score}")
        _legend(figure, methods, looks)
        tasks = f"{len(found.tasks)} tasks ({_listed(found.tasks)}), {axis} {found.start:g} to {found.end:g}"
        intervals = f"bars and bands: {100 * estimates['confidence'].iloc[0]:g} % stratified bootstrap over runs"
        intervals = intervals if estimates["low"].notna().any() else "one run on a task: no intervals"
        describe(figure, note=f"{tasks}; {intervals}")
    return figure


def _listed(tasks: Sequence[str]) -> str:
    few = ", ".join(tasks[:4])
    return few if len(tasks) <= 4 else f"{few} and {len(tasks) - 4} more"


def _legend(figure: Figure, methods: Sequence[str], looks: Looks) -> None:
    ax = figure.axes[-1]
    handles = [ax.plot([], [], label=method, markersize=4, **looks[method])[0] for method in methods]
    legend_below(figure, handles, methods, ncols=5, handlelength=2.6)
