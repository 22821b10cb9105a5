"""What the paper states in words where its curves are not published as numbers: Fig. 4 and supplementary Figs. 1-2."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from mto_analysis.figures.plots.style import (
    COLORS,
    describe,
    figure_width,
    legend_below,
    looks_of,
    new_figure,
    paper_style,
)

_GAP = " ", "\n"  # between words of a label, in a wide and in a narrow figure
_LOOKS = looks_of(["baseline", "with MTO"])


def plot_epochs_saved(claims: pd.DataFrame, *, ax: Axes) -> Axes:
    """Epochs until the baseline's final accuracy is reached: the baseline's own, and those stated with MTO.

    Args:
        claims: Columns ``baseline backbone baseline_epochs reduction_percent epochs_with_mto``.
        ax: Where to draw, a row per line of the table from the top.
    """
    rows = range(len(claims))
    for row, claim in zip(rows, claims.to_dict("records"), strict=True):
        ax.annotate(
            "", (claim["epochs_with_mto"], row), (claim["baseline_epochs"], row),
            arrowprops={"arrowstyle": "-|>", "color": "0.6", "linewidth": 1.1, "shrinkA": 4, "shrinkB": 4,
                        "mutation_scale": 8}, zorder=1,
        )  # fmt: skip
        middle = (claim["epochs_with_mto"] + claim["baseline_epochs"]) / 2
        ax.annotate(
            f"\N{MINUS SIGN}{claim['reduction_percent']:g} %", (middle, row), (0, 2.5), textcoords="offset points",
            ha="center", va="bottom", size="small", color="0.25",
        )  # fmt: skip
    _mark(ax, claims["baseline_epochs"], rows, "baseline", "baseline")
    _mark(ax, claims["epochs_with_mto"], rows, "with MTO", "with MTO, as stated")
    ax.set_yticks(rows, [f"{claim['baseline']}, {claim['backbone']}" for claim in claims.to_dict("records")])
    ax.set_ylim(len(claims) - 0.5, -0.6)
    ax.set_xlim(0, 1.08 * float(claims["baseline_epochs"].max()))
    ax.set_xlabel(f"epochs until the{_GAP[figure_width() < 4]}baseline's final accuracy")
    ax.xaxis.set_major_locator(MultipleLocator(200))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    return ax


def plot_printed_rauc(rows: pd.DataFrame, *, ax: Axes) -> Axes:
    """RAUC of Table 1 by baseline, a mark per window; 1 is no gain.

    Args:
        rows: Columns ``baseline start_epoch end_epoch rauc``.
        ax: Where to draw, a row per baseline from the top.
    """
    baselines = list(dict.fromkeys(rows["baseline"]))
    windows = list(rows.groupby(["start_epoch", "end_epoch"], sort=False))
    for index, ((start, end), window) in enumerate(windows):
        offset = 0.16 * (2 * index - len(windows) + 1)
        places = [baselines.index(name) + offset for name in window["baseline"]]
        # Windows differ by filling: colours stand for methods.
        ax.hlines(places, 1, window["rauc"], color="0.55", linewidth=1.0, zorder=2)
        ax.plot(
            window["rauc"], places, "dD"[index % 2], color="0.2", markerfacecolor="0.2" if index % 2 else "white",
            label=f"RAUC, {start:g} to {end:g} epochs", zorder=3,
        )  # fmt: skip
        for value, place in zip(window["rauc"], places, strict=True):
            ax.annotate(
                f"{value:.2f}",
                (value, place),
                (4.5, 0),
                textcoords="offset points",
                va="center",
                size="x-small",
                color="0.25",
            )
    ax.axvline(1, color="0.3", linewidth=0.8)
    ax.set_yticks(range(len(baselines)), baselines)
    ax.set_ylim(len(baselines) - 0.5, -0.6)
    ax.set_xlim(0.95, 1.12 * float(rows["rauc"].max()) - 0.02)
    ax.set_xlabel(f"RAUC of Table 1{_GAP[figure_width() < 4]}(1: no gain)")
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MultipleLocator(0.2))
    return ax


def _mark(ax: Axes, epochs: pd.Series[float], rows: range, method: str, label: str) -> None:
    look = _LOOKS[method]
    ax.plot(epochs, rows, look["marker"], color=look["color"], label=label, zorder=3)


def draw_accuracy_claims(claims: pd.DataFrame, rauc: pd.DataFrame, *, says: str) -> Figure:
    """Both statements side by side: epochs saved (left), areas (right)."""
    height = 1.25 + 0.27 * max(len(claims), rauc["baseline"].nunique())
    with paper_style():
        figure = new_figure(height)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        plot_epochs_saved(claims, ax=left)
        plot_printed_rauc(rauc, ax=right)
        _legend_below(figure, left, right)
        describe(figure, title=says)
    return figure


def draw_depth_claims(claims: pd.DataFrame, *, says: str) -> Figure:
    """Decoder depths about which something is stated, a row per measure; no accuracy axis, as none is published.

    Args:
        claims: Columns ``measure decoder_depth kind words``; ``kind`` is ``best``, ``good_from``, ``below_best`` or
            ``lowest`` (whose depth is not stated).
        says: Line above: what this is drawn from, and what it is not.
    """
    measures = list(dict.fromkeys(claims["measure"]))
    with paper_style():
        figure = new_figure(0.95 + 0.5 * len(measures))
        ax = figure.subplots()
        reach = 12.0
        for row, measure in enumerate(measures):
            mine = claims[claims["measure"] == measure]
            ax.plot([1, reach], [row, row], color="0.85", linewidth=0.8, zorder=1)
            for claim in mine.to_dict("records"):
                if claim["kind"] == "good_from":
                    ax.plot([claim["decoder_depth"], reach], [row, row], color=COLORS[2], linewidth=7, alpha=0.35,
                            solid_capstyle="butt", zorder=2)  # fmt: skip
                elif claim["kind"] == "best":
                    ax.plot(claim["decoder_depth"], row, "o", color=COLORS[0], markersize=6, zorder=3)
                elif claim["kind"] == "below_best":
                    ax.plot(claim["decoder_depth"], row, "v", color=COLORS[1], markersize=6, zorder=3)
                else:
                    ax.annotate(
                        claim["words"], (1.0, row), xycoords=("axes fraction", "data"), xytext=(4, 0),
                        textcoords="offset points", va="center", size="small", color="0.25", annotation_clip=False,
                    )  # fmt: skip
        _depth_key(ax)
        ax.set_yticks(range(len(measures)), measures)
        ax.set_ylim(len(measures) - 0.4, -0.6)
        ax.set_xlim(0.5, reach + 0.5)
        ax.set_xticks(range(1, int(reach) + 1))
        ax.set_xlabel("decoder depth (blocks)")
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        _legend_below(figure, ax)
        describe(figure, title=says)
    return figure


def _depth_key(ax: Axes) -> None:
    ax.plot([], [], "o", color=COLORS[0], markersize=6, label="among the best two")
    ax.plot([], [], color=COLORS[2], linewidth=7, alpha=0.35, label="consistently better")
    ax.plot([], [], "v", color=COLORS[1], markersize=6, label="slightly below the best")


def _legend_below(figure: Figure, *axes: Axes) -> None:
    found = [ax.get_legend_handles_labels() for ax in axes]
    handles, labels = ([each for part in parts for each in part] for parts in zip(*found, strict=True))
    legend_below(figure, handles, labels, handlelength=1.2, columnspacing=1.2, fontsize="small")
