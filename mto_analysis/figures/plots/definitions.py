"""Where the fall of heterogeneity with depth holds: small multiples over definitions, and the model's own attention."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import (
    LAYER_DEPTH,
    describe,
    looks_of,
    model_curves,
    new_axes,
    new_figure,
    paper_style,
)
from mto_analysis.probe.definitions import COSINE_TEMPERATURE

# Rows and columns of panels; a cosine does not see norms, so that its definitions with matched norms are the raw one.
_SIMILARITIES = {
    "dot": "dot product",
    "scaled_dot": r"dot product $/\,\sqrt{D}$",
    "cosine": f"cosine / {COSINE_TEMPERATURE:g}",
    "centred_cosine": f"centred cosine / {COSINE_TEMPERATURE:g}",
}
_TOKENS = {
    "raw": "raw\ntokens",
    "layer_norm": "layer-normalized\ntokens",
    "matched_each": "each norm\nas at depth 0",
    "matched_kind": "mean norms\nas at depth 0",
}
_GRID = [
    [
        "legend" if "cosine" in similarity and "matched" in tokens else similarity + f"_{tokens}" * (tokens != "raw")
        for tokens in _TOKENS
    ]
    for similarity in _SIMILARITIES
]
#: Columns of ``attention.csv`` and what they are.
ATTENTION = {
    "mass_masked_to_visible": ("masked to visible", "share of attention"),
    "mass_visible_to_masked": ("visible to masked", "share of attention"),
    "entropy_masked_to_visible": ("masked to visible", "entropy (nats)"),
    "entropy_visible_to_masked": ("visible to masked", "entropy (nats)"),
}


def plot_definition(table: pd.DataFrame, definition: str, *, ax: Axes | None = None) -> Axes:
    """H / log(num_visible) over layer depth under one definition, a curve per model and stack.

    A hollow mark at layer depth 0 is the value without the position embedding.

    Args:
        table: Rows of ``definitions.csv``.
        definition: Which.
        ax: Where to draw; by default a new figure's axes.
    """
    ax = ax or new_axes(2.5, 2)
    rows = table[table["definition"] == definition]
    if rows.empty:
        raise DataError(f"the table has no definition {definition}")
    curves = model_curves(rows)
    looks = looks_of(label for label, _ in curves)
    for label, both in curves:
        curve, bare = both[both["position"] == "with"], both[both["position"] == "without"]
        look = looks[label]
        ax.plot(curve["layer_depth"], curve["normalized"], label=label, markersize=3, clip_on=False, **look)
        low, high = curve["normalized_ci_low"], curve["normalized_ci_high"]
        ax.fill_between(curve["layer_depth"], low, high, color=look["color"], alpha=0.2, linewidth=0)
        if len(bare):
            ax.plot(
                bare["layer_depth"], bare["normalized"], color=look["color"], marker=look["marker"],
                markerfacecolor="white", linestyle="none", markersize=4, label="_without position",
            )  # fmt: skip
    ax.set_ylim(-0.03, 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return ax


def draw_definitions(table: pd.DataFrame, attention: pd.DataFrame, *, title: str | None = None) -> Figure:
    """All definitions, a row per similarity and a column per form of tokens; below, the models' own attention.

    Args:
        table: Rows of ``definitions.csv``.
        attention: Rows of ``attention.csv``; may be empty.
        title: Line above the figure.
    """
    both = len(attention) > 0
    with paper_style(label for label, _ in model_curves(table)):
        figure = new_figure(5.6 if both else 4.2)
        above, *below = figure.subfigures(1 + both, 1, height_ratios=(3, 1)[: 1 + both], squeeze=False)[:, 0]
        axes = above.subplot_mosaic(_GRID, sharey=True)
        for row, (names, similarity) in enumerate(zip(_GRID, _SIMILARITIES.values(), strict=True)):
            for column, name in enumerate(names):
                if name == "legend":
                    continue
                plot_definition(table, name, ax=axes[name])
                if row == 0:
                    axes[name].set_title(list(_TOKENS.values())[column], fontsize="small", pad=3)
                if row + 1 < len(_GRID) and _GRID[row + 1][column] != "legend":
                    axes[name].tick_params(labelbottom=False)
                else:
                    axes[name].set_xlabel(LAYER_DEPTH, fontsize="small")
            axes[names[0]].set_ylabel(f"{similarity}\n$H\\,/\\,H_{{\\mathrm{{max}}}}$", fontsize="small")
        axes["dot"].annotate("Eq. 2", (0.95, 0.5), xycoords="axes fraction", ha="right", size="small", color="0.3")
        axes["legend"].set_axis_off()
        axes["legend"].legend(*axes["dot"].get_legend_handles_labels(), loc="center")
        note = "bands: 95 % interval over images; hollow: layer depth 0 without the position embedding"
        for part in below:
            part.suptitle("the models' own attention", fontsize="small")
            for ax, (statistic, words) in zip(part.subplots(1, len(ATTENTION)), ATTENTION.items(), strict=True):
                plot_attention(attention, statistic, ax=ax)
                ax.set_title(words[0].replace(" ", "\n", 1), fontsize="small", pad=3)
                ax.set_ylabel(words[1], fontsize="small")
            note += "; own attention: mean and range over heads"
        describe(figure, title=title, note=note)
    return figure


def plot_attention(attention: pd.DataFrame, column: str, *, ax: Axes | None = None) -> Axes:
    """A statistic of the models' own attention over blocks: mean over heads, and their range as a band.

    Args:
        attention: Rows of ``attention.csv``.
        column: One of :data:`ATTENTION`.
        ax: Where to draw; by default a new figure's axes.
    """
    ax = ax or new_axes(2.5, 2)
    curves = model_curves(attention)
    looks = looks_of(label for label, _ in curves)
    for label, rows in curves:
        blocks = rows.groupby("block")[column].agg(["mean", "min", "max"])
        look = looks[label]
        ax.plot(blocks.index, blocks["mean"], markersize=3, clip_on=False, label=label, **look)
        ax.fill_between(blocks.index, blocks["min"], blocks["max"], color=look["color"], alpha=0.12, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if column.startswith("mass"):
        ax.set_ylim(-0.03, 1.05)
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("Block", fontsize="small")
    return ax
