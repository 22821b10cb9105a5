"""Effects of interventions on masked tokens, with intervals and controls: a row of panels per model."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import COLORS, MARKERS, describe, legend_below, new_axes, new_figure, paper_style
from mto_analysis.probe.interventions import CONDITIONS, INTERVENTIONS, MEASURES

_ACROSS = {"loss": "loss", "cosine": "cosine", "accuracy": "kNN accuracy\n(points)"}


def plot_effects(effects: pd.DataFrame, words: Mapping[str, str] = INTERVENTIONS, *, ax: Axes | None = None) -> Axes:
    """Effects on one measure of one model, a line per intervention: all masked tokens, some, and the control.

    Args:
        effects: Rows of ``interventions.csv``, of one model, stack, depth and measure.
        words: Intervention to its name, from top to bottom.
        ax: Where to draw; by default a new figure's axes.
    """
    if effects.empty:
        raise DataError("there is no effect to draw")
    ax = ax or new_axes(3.4, 2.6)
    ax.axvline(0, color="0.6", linewidth=0.7)
    for index, (condition, label) in enumerate(list(CONDITIONS.items())[:3]):
        mine = effects[effects["condition"] == condition].set_index("intervention")
        places = [place + 0.22 * (index - 1) for place, name in enumerate(words) if name in mine.index]
        mine = mine.loc[[name for name in words if name in mine.index]]
        ax.errorbar(
            mine["effect"],
            places,
            xerr=[mine["effect"] - mine["ci_low"], mine["ci_high"] - mine["effect"]],
            fmt=MARKERS[index],
            color=COLORS[index],
            markerfacecolor="white" if condition == "some_visible" else COLORS[index],
            markersize=3.5,
            linewidth=0.9,
            label=label,
        )
    ax.set_yticks(range(len(words)), list(words.values()))
    ax.set_ylim(len(words) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    return ax


def draw_interventions(table: pd.DataFrame) -> Figure:
    """A row of panels per model, stack and depth, a column per measure, with one legend.

    Args:
        table: Rows of ``interventions.csv``.
    """
    curves = list(table.groupby(["model", "stack", "from_depth"], sort=False))
    measures = [measure for measure in MEASURES if measure in set(table["measure"])]
    words = {name: text for name, text in INTERVENTIONS.items() if name in set(table["intervention"])}
    with paper_style():
        figure = new_figure((0.17 * len(words) + 0.5) * len(curves) + 0.8)
        axes = figure.subplots(len(curves), len(measures), squeeze=False, sharey=True, sharex="col")
        for row, ((model, stack, depth), mine) in zip(axes, curves, strict=True):
            for ax, measure in zip(row, measures, strict=True):
                of_measure = mine[mine["measure"] == measure]
                if of_measure.empty:  # a stack that pixels are not made from
                    ax.text(0.5, 0.5, "no loss", transform=ax.transAxes, ha="center")
                else:
                    plot_effects(of_measure, words, ax=ax)
            row[0].set_title(
                f"{model}, {str(stack).replace('_', ' ')}, from layer depth {depth}", fontsize="small", loc="left"
            )
        for ax, measure in zip(axes[-1], measures, strict=True):
            ax.set_xlabel(f"change of\n{_ACROSS[measure]}")
        handles, labels = next(ax for ax in axes.flat if ax.get_legend_handles_labels()[0]).get_legend_handles_labels()
        legend_below(figure, handles, labels)
        describe(figure, note=f"with minus without; 95 % intervals over {table['num_images'].max()} images, paired")
    return figure
