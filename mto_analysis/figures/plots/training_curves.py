"""One pre-training run at a glance: its loss, heterogeneity of every layer depth, and the score, over epochs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.evaluation import plot_accuracy
from mto_analysis.figures.plots.experiment import depth_legend, plot_trajectories, scale_heterogeneity
from mto_analysis.figures.plots.style import COLORS, LINE_STYLES, describe, new_figure, paper_style

# Terms below this share of the loss are drawn on their own axis.
_SMALL = 0.1


def plot_losses(rows: pd.DataFrame, terms: Sequence[str] = (), *, ax: Axes) -> Axes:
    """The loss over pre-training epochs, and beside it the weighted terms that it is the sum of.

    Args:
        rows: Columns ``epoch loss`` and one per term.
        terms: Drawn where there are several.
        ax: Where to draw.
    """
    shown = ["loss", *(terms if len(terms) > 1 else ())]
    if rows.empty or (lacking := [name for name in ("epoch", *shown) if name not in rows]):
        raise DataError(f"nothing to draw: {'no rows' if rows.empty else f'no columns {lacking}'}")
    # A term of a hundredth of the loss would be a line at 0: it has an axis of its own.
    reach = rows["loss"].abs().max()
    small = [name for name in shown[1:] if rows[name].abs().max() < _SMALL * reach]
    beside = ax.twinx() if small else ax
    handles = []
    for name, color, style in zip(shown, ("0.2", *COLORS), LINE_STYLES, strict=False):
        words = "all terms" if name == "loss" else f"{name} (right axis)" if name in small else name
        own = beside if name in small else ax
        handles += own.plot(rows["epoch"], rows[name], color=color, linestyle=style, linewidth=1.1, label=words)
    if small:
        beside.grid(visible=False)
        beside.spines.right.set_visible(True)
    ax.set_xlabel("pre-training epoch")
    ax.set_ylabel("loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if len(shown) > 1:
        # Above, as inside it would lie on a curve.
        ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=2.4)
    return ax


def draw_run(
    rows: pd.DataFrame,
    layers: pd.DataFrame,
    curve: pd.DataFrame | None = None,
    *,
    terms: Sequence[str] = (),
    what: str = "",
) -> Figure:
    """A panel for the loss, one for H of each stack, and one for the score where the run was evaluated.

    Args:
        rows: Of ``metrics.csv``: ``epoch loss`` and the terms.
        layers: ``epoch stack layer_depth heterogeneity`` of the same rows.
        curve: ``method epoch score seed protocol``, or none.
        terms: Names of the weighted terms.
        what: What is shown, for the line above.
    """
    stacks = list(dict.fromkeys(layers["stack"]))
    scored = curve is not None and not curve.empty
    panels = 1 + len(stacks) + scored
    with paper_style():
        figure = new_figure(2.35, share={1: 0.5, 2: 0.75}.get(panels, 1))
        axes = list(figure.subplots(1, panels, squeeze=False).flat)
        plot_losses(rows, terms, ax=axes[0])
        for stack, ax in zip(stacks, axes[1:], strict=False):
            part = layers[layers["stack"] == stack].assign(seed=0)
            plot_trajectories(part, ax=ax)
            scale_heterogeneity([ax], part["heterogeneity"])
            if len(stacks) > 1:
                ax.set_title(stack.replace("_", " "))
        if curve is not None and scored:
            untrained = curve[curve["epoch"] == 0].groupby("method")["score"].mean()
            plot_accuracy(curve, {str(method): score for method, score in untrained.items()}, ax=axes[-1])
        if stacks:
            depth_legend(figure, sorted(map(int, layers["layer_depth"].unique())))
        describe(figure, title=what)
    return figure
