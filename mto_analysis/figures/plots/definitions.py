"""Where the fall of heterogeneity with depth holds: small multiples over definitions, and the model's own attention."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import COLORS, LINE_STYLES, MARKERS, PAGE_WIDTH, paper_style
from mto_analysis.probe.definitions import COSINE_TEMPERATURE

__all__ = ["draw_definitions", "plot_definition"]

SIMILARITIES = {
    "dot": "dot product",
    "scaled_dot": r"dot product $/\,\sqrt{D}$",
    "cosine": f"cosine / {COSINE_TEMPERATURE:g}",
    "centred_cosine": f"centred cosine / {COSINE_TEMPERATURE:g}",
}
TOKENS = {
    "raw": "raw tokens",
    "layer_norm": "layer-normalised",
    "matched_each": "each token's norm\nas at depth 0",
    "matched_kind": "each kind's norm\nas at depth 0",
}
# The four places of the grid that hold no definition, as a cosine does not see norms.
_ATTENTION = {
    ("matched_each", "cosine"): ("mass_masked_to_visible", "attention, share:\nmasked to visible"),
    ("matched_each", "centred_cosine"): ("mass_visible_to_masked", "attention, share:\nvisible to masked"),
    ("matched_kind", "cosine"): ("entropy_masked_to_visible", "attention, nats:\nmasked to visible"),
    ("matched_kind", "centred_cosine"): ("entropy_visible_to_masked", "attention, nats:\nvisible to masked"),
}


def plot_definition(table: pd.DataFrame, definition: str, *, ax: Axes | None = None) -> Axes:
    """H / log(num_visible) over layer depth under one definition, a curve per model and stack.

    A hollow mark at layer depth 0 is the value without the position embedding.

    Args:
        table: Rows of ``definitions.csv``.
        definition: Which.
        ax: Where to draw; by default a new figure's axes.

    Raises:
        DataError: If the table has no such definition.
    """
    if ax is None:
        ax = Figure(figsize=(2.5, 2)).subplots()
    rows = table[table["definition"] == definition]
    if rows.empty:
        raise DataError(f"the table has no definition {definition}")
    for index, (label, curves) in enumerate(_by_model(rows)):
        curve, bare = curves[curves["position"] == "with"], curves[curves["position"] == "without"]
        color = COLORS[index % len(COLORS)]
        look = {"marker": MARKERS[index % len(MARKERS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}
        ax.plot(curve["layer_depth"], curve["normalized"], color=color, label=label, markersize=3, **look)  # type: ignore[arg-type]
        low, high = curve["normalized_ci_low"], curve["normalized_ci_high"]
        ax.fill_between(curve["layer_depth"], low, high, color=color, alpha=0.2, linewidth=0)
        if len(bare):
            ax.plot(
                bare["layer_depth"], bare["normalized"], color=color, marker=look["marker"], markerfacecolor="white",
                linestyle="none", markersize=4, label="_without position",
            )  # fmt: skip
    ax.set_ylim(-0.03, 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return ax


def draw_definitions(
    table: pd.DataFrame,
    attention: pd.DataFrame,
    *,
    title: str | None = None,
    width: float = PAGE_WIDTH,
    note: bool = True,
) -> Figure:
    """All definitions, a row per form of tokens and a column per similarity; attention in the places left over.

    Args:
        table: Rows of ``definitions.csv``.
        attention: Rows of ``attention.csv``; may be empty.
        title: Line above the figure.
        width: Of the figure, in inches.
        note: Say above the figure what is shown; leave it out where a caption does.
    """
    with paper_style():
        figure = Figure(figsize=(width, 6.6 if width > 6 else 5.4), layout="constrained")
        axes = figure.subplots(len(TOKENS), len(SIMILARITIES), sharex=False)
        for row, (tokens, row_words) in enumerate(TOKENS.items()):
            for column, (similarity, words) in enumerate(SIMILARITIES.items()):
                ax = axes[row, column]
                name = similarity if tokens == "raw" else f"{similarity}_{tokens}"
                if (tokens, similarity) in _ATTENTION:
                    _plot_attention(attention, *_ATTENTION[tokens, similarity], ax=ax)
                    continue
                plot_definition(table, name, ax=ax)
                if row == 0:
                    ax.set_title(words + (" (Eq. 2)" if column == 0 else ""), fontsize=7 if width > 6 else 6.3)
                if column == 0:
                    ax.set_ylabel(row_words, fontsize=7)
                else:
                    ax.tick_params(labelleft=False)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), handlelength=3)
        for ax in axes[-1]:
            ax.set_xlabel("block" if ax.get_facecolor()[0] < 1 else "layer depth", fontsize=7)
        figure.supylabel(r"$H\,/\,\log N_{\mathrm{visible}}$", fontsize=8)
        caption = (
            "bands: 95 % interval over images; hollow: layer depth 0 without the position embedding\n"
            "grey panels: the model's own attention, mean and range over heads"
        )
        heading = "\n".join(filter(None, (title, caption if note else "")))
        if heading:
            figure.suptitle(heading, fontsize=7, color="0.3")
    return figure


def _plot_attention(attention: pd.DataFrame, column: str, words: str, *, ax: Axes) -> None:
    """Mean over heads per block, and the range of heads."""
    ax.set_title(words, fontsize=6, pad=3)
    for index, (_, rows) in enumerate(_by_model(attention)):
        blocks = rows.groupby("block")[column].agg(["mean", "min", "max"])
        color = COLORS[index % len(COLORS)]
        marker, line = MARKERS[index % len(MARKERS)], LINE_STYLES[index % len(LINE_STYLES)]
        ax.plot(blocks.index, blocks["mean"], color=color, marker=marker, linestyle=line, markersize=3)
        ax.fill_between(blocks.index, blocks["min"], blocks["max"], color=color, alpha=0.12, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if column.startswith("mass"):
        ax.set_ylim(-0.03, 1.05)
    else:
        ax.set_ylim(bottom=0)
    ax.set_facecolor("0.97")


def _by_model(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    if table.empty:
        return []
    several = table.groupby("model")["stack"].nunique().max() > 1
    groups = table.groupby(["model", "stack"], sort=False)
    return [(f"{model}, {stack}" if several else str(model), rows) for (model, stack), rows in groups]
