"""Learning curves with the areas of Eq. (6) shaded, as in Fig. 4, and RAUC over every window as a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from mto_analysis.figures.plots.evaluation import PROTOCOL_LABELS
from mto_analysis.figures.plots.style import COLUMN_WIDTH, looks_of, new_axes, new_figure, paper_style
from mto_analysis.rauc import Points
from mto_analysis.rauc.comparison import Comparison, mean_curve, scores_at
from mto_analysis.rauc.intervals import mean_interval
from mto_analysis.rauc.records import ratio_in_words

Runs = Mapping[str, Points]

_PANEL_HEIGHT = 2.7
_MAP_HEIGHT = 2.9

_FINE_TICKS = (0.4, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 2.5)
_WIDE_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def plot_rauc(
    comparison: Comparison,
    baseline: Runs,
    target: Runs,
    *,
    ax: Axes | None = None,
    axis: str = "epoch",
    score: str = "score",
) -> Axes:
    """Two learning curves, the areas that RAUC divides, and where the target reaches the baseline's final score.

    Grey: area of the baseline above the reference. Colour: what the target adds, hatched where it lags. With several
    seeds the curve is their mean and the bars are Student's interval of that mean.
    """
    ax = ax or new_axes(COLUMN_WIDTH, _PANEL_HEIGHT)
    looks = looks_of([comparison.baseline, comparison.target])
    first, second = (looks[name]["color"] for name in (comparison.baseline, comparison.target))
    one, two = mean_curve(baseline), mean_curve(target)
    start, end, level = comparison.start, comparison.end, comparison.reference
    epochs = np.unique(np.concatenate([[start, end], one.epochs, two.epochs]))
    epochs = epochs[(epochs >= start) & (epochs <= end)]
    # Corners where the curves cross, so that neither shade leaks over the other.
    epochs = np.unique(np.concatenate([epochs, comparison.crossings]))
    low, high = np.interp(epochs, *one), np.interp(epochs, *two)
    ax.fill_between(epochs, level, low, color="0.85", linewidth=0, label="baseline's area", zorder=0.5)
    ax.fill_between(
        epochs, low, high, where=high >= low, color=second, alpha=0.22, linewidth=0, label="target's lead", zorder=0.6
    )
    if (high < low).any():
        ax.fill_between(
            epochs, low, high, where=high <= low, facecolor="none", edgecolor=first, hatch="//////", linewidth=0,
            label="target's lag", zorder=0.7,
        )  # fmt: skip
    for runs, curve, name in ((baseline, one, comparison.baseline), (target, two, comparison.target)):
        every = max(1, len(curve.epochs) // 12)
        ax.plot(*curve, markevery=every, label=name, zorder=3, **looks[name])
        if len(runs) > 1:
            bars, middle = curve.epochs[::every], curve.scores[::every]
            scores = scores_at(runs, bars)
            ends = np.array([mean_interval(column, comparison.interval.confidence) for column in scores.T])
            ax.errorbar(
                bars,
                middle,
                yerr=np.abs(ends.T - middle),
                fmt="none",
                ecolor=looks[name]["color"],
                elinewidth=0.8,
                capsize=1.5,
                zorder=2,
            )
    ax.plot([start, end], [level, level], color="0.4", linewidth=0.8, linestyle=":")
    _mark_saving(ax, comparison)
    ax.set_xlabel({"images": "images seen"}.get(axis, axis))
    ax.set_ylabel(score)
    group = "".join(f", {PROTOCOL_LABELS.get(value, value)}" for value in comparison.group.values())
    ax.set_title(f"{comparison.target}{group}: RAUC {ratio_in_words(comparison)}")
    # Below the axis: inside, it would lie on a shaded area whichever corner it takes.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handlelength=1.8, labelspacing=0.3)
    return ax


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
    saved = comparison.share_saved_interval.around(comparison.share_saved, scale=100, default=".0f")
    # Towards the middle, where the baseline's area is empty.
    late = reached > (comparison.start + end) / 2
    text = ax.annotate(
        f"{saved} % saved", xy=(reached, min(comparison.reference, final)), xytext=(-3 if late else 3, 3),
        textcoords="offset points", ha="right" if late else "left", va="bottom", fontsize="small", color="0.2",
        zorder=4,
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
    """RAUC for every window, E1 across and E2 up, to scale: a ratio that holds for one window only shows at once.

    Colours are even in the logarithm, so that twice and half are equally strong, and the paler the less is known: with
    seeds the wider the interval, with one run the less the baseline gains in the window, because such ratios vary
    most. Windows whose interval contains 1 are grey with a dot, those whose ratio is undefined hatched.

    Args:
        grid: ``start end rauc low high gain`` from :func:`mto_analysis.rauc.comparison.window_grid`.
        chosen: Windows to frame, those that are reported.
        ax: Where to draw; a new figure without.
        axis: What the curves run over.
        title: Above the panel.
    """
    ax = ax or new_axes(COLUMN_WIDTH, _MAP_HEIGHT)
    cells = _cells(grid)
    seeds = bool(grid["low"].notna().any())
    defined = np.isfinite(cells["rauc"])
    undecided = defined & (cells["low"] <= 1) & (cells["high"] >= 1)
    shown = np.where(defined & ~undecided, np.maximum(cells["rauc"], 1e-9), np.nan)  # below 0: the last colour
    positive = shown[np.isfinite(shown) & (shown > 1e-9)]
    # One wild window next to a flat stretch must not take the colours from all others.
    reach = max(float(np.quantile(np.maximum(positive, 1 / positive), 0.9)) if positive.size else 1.0, 1.1)
    strength: Any = _precision(cells["low"], cells["high"]) if seeds else _share(cells["gain"])
    places = np.union1d(grid["start"], grid["end"])
    middle = (places[1:] + places[:-1]) / 2
    edges = np.concatenate([[2 * places[0] - middle[0]], middle, [2 * places[-1] - middle[-1]]])
    image = ax.pcolormesh(
        edges[:-1], edges[1:], np.ma.masked_invalid(shown), cmap="RdBu_r", norm=LogNorm(1 / reach, reach),
        alpha=strength,
    )  # fmt: skip
    hatched = {"facecolor": "white", "edgecolor": "0.6", "hatch": "//////", "linewidth": 0}
    boxes: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
        ("interval contains 1", undecided, {"facecolor": "0.9", "linewidth": 0}),
        ("undefined", np.isfinite(cells["gain"]) & ~defined, hatched),
    )
    handles: list[Any] = []
    for label, here, look in boxes:
        for row, column in np.argwhere(here):
            ax.add_patch(_box(edges, column, row, **look))
        if here.any():
            handles.append(Rectangle((0, 0), 1, 1, label=label, **look))
    rows, columns = np.nonzero(undecided)
    centres = (edges[1:] + edges[:-1]) / 2
    ax.scatter(centres[columns], centres[rows + 1], s=1.5, color="0.35", linewidth=0)
    frames = [
        _box(edges, int(np.searchsorted(places, start)), int(np.searchsorted(places, end)) - 1, **_FRAME)
        for start, end in chosen
        if start in places and end in places
    ]
    handles += [ax.add_patch(frame) for frame in frames][:1]
    darkness = np.minimum(np.abs(np.log(shown)) / math.log(reach), 1) * strength
    _write_ratios(ax, cells["rauc"], edges, darkness > 0.6)
    if np.diff(places).min() > 0.08 * np.ptp(places):
        ax.set_xticks(places[:-1])
        ax.set_yticks(places[1:])
    ax.set_xlabel(f"E1 ({axis})")
    ax.set_ylabel(f"E2 ({axis})")
    ax.set_title(title)
    ax.grid(visible=False)
    if handles:  # the corner below the diagonal has no windows
        ax.legend(handles=handles, loc="lower right", fontsize="x-small", handlelength=1.2, borderaxespad=0.2)
    ticks = [x for x in (_WIDE_TICKS if reach > 3 else _FINE_TICKS) if 1 / reach <= x <= reach]
    label = "RAUC (pale: wide interval)" if seeds else "RAUC (one run; pale: small gain)"
    bar = ax.figure.colorbar(image, ax=ax, extend="both", label=label, ticks=ticks, format="%g")
    bar.ax.minorticks_off()
    return ax


_FRAME: Mapping[str, Any] = {"fill": False, "edgecolor": "black", "linewidth": 1.2, "zorder": 3, "label": "reported"}


def _cells(grid: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of a grid as matrices, a row per E2 and a column per E1; NaN where there is no such window."""
    return {
        name: grid.pivot(index="end", columns="start", values=name).to_numpy(dtype=float)
        for name in ("rauc", "low", "high", "gain")
    }


def _precision(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """From 1 for an interval without width down to 0.1; 0.5 where its ends differ by a factor of two."""
    positive = low > 0
    factor = np.divide(high, low, out=np.full_like(low, np.inf), where=positive)
    return np.asarray(np.maximum(1 / (1 + np.log2(factor)), 0.1))


def _share(gain: np.ndarray) -> np.ndarray:
    """From 1 for the window with the largest gain down to 0.1, even in the square root."""
    largest = np.nanmax(gain)
    share = np.nan_to_num(gain) / largest if largest > 0 else np.zeros_like(gain)
    return np.asarray(np.sqrt(np.clip(share, 0.01, 1)))


def _box(edges: np.ndarray, column: int, row: int, **look: Any) -> Rectangle:
    """The cell of a window, from its column and row; the first row is the second place."""
    corner = edges[column], edges[row + 1]
    return Rectangle(corner, edges[column + 1] - corner[0], edges[row + 2] - corner[1], **look)


def _write_ratios(ax: Axes, ratios: np.ndarray, edges: np.ndarray, strong: np.ndarray) -> None:
    """Numbers in the cells that have room for them."""
    size = ax.get_position().size * ax.figure.get_figure(root=True).get_size_inches() * 72
    centres, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    across, up = widths[:-1] * size[0] / (edges[-2] - edges[0]), widths[1:] * size[1] / (edges[-1] - edges[1])
    for row, column in np.argwhere(np.isfinite(ratios)):
        text = f"{ratios[row, column]:.2f}"
        if across[column] >= 3.4 * len(text) and up[row] >= 8:
            ax.text(
                centres[column], centres[row + 1], text, ha="center", va="center", fontsize="x-small",
                color="white" if strong[row, column] else "black",
            )  # fmt: skip


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    figure = new_figure(rows * height, share=0.5 * columns)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def rauc_figure(
    comparisons: Sequence[Comparison], runs: Sequence[tuple[Runs, Runs]], *, axis: str = "epoch", score: str
) -> Figure:
    """A panel per comparison, two in a row, like Fig. 4."""
    with paper_style(name for each in comparisons for name in (each.baseline, each.target)):
        figure, axes = _panels(len(comparisons), _PANEL_HEIGHT)
        for comparison, (baseline, target), ax in zip(comparisons, runs, axes, strict=True):
            plot_rauc(comparison, baseline, target, ax=ax, axis=axis, score=score)
    return figure


def rauc_windows_figure(
    grids: Mapping[str, pd.DataFrame], *, chosen: Iterable[tuple[float, float]] = (), axis: str = "epoch"
) -> Figure:
    """A heat map per pair of methods."""
    windows = list(chosen)
    with paper_style():
        figure, axes = _panels(len(grids), _MAP_HEIGHT)
        for (title, grid), ax in zip(grids.items(), axes, strict=True):
            plot_rauc_windows(grid, chosen=windows, ax=ax, axis=axis, title=title)
    return figure
