"""Measures over layer depth, a panel each: masked and visible tokens of one measure stand together."""

from __future__ import annotations

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.style import (
    LAYER_DEPTH,
    describe,
    legend_below,
    looks_of,
    model_curves,
    new_figure,
    paper_style,
)

# Words for columns whose names do not read as such.
_WORDS = {
    "heterogeneity": "H (nats)",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "cka": "CKA",
    "cosine": "mean cosine",
    "frequency_low": "low-frequency amplitude",
    "frequency_high": "high-frequency amplitude",
    "frequency_log_ratio": "log(high / low) amplitude",
    "separability": "separability of masked tokens",
}
_PARTS = re.compile(r"(.+?)(?:(?<!_to)_(masked|visible))?")
_COLUMNS = 4
_LINES = {"masked": "-", "visible": "--", "": "-"}


def measure_words(name: str) -> str:
    """What a column of measures is called in a figure.

    Example:
        >>> measure_words("rankme_masked"), measure_words("effective_rank_visible")
        ('RankMe, masked', 'effective rank, visible')
    """
    base, kind = _PARTS.fullmatch(name).groups()  # type: ignore[union-attr]  # it matches any text
    return ", ".join(filter(None, (_WORDS.get(base, base.replace("_", " ")), kind)))


def plot_measure(rows: pd.DataFrame, *, ax: Axes) -> Axes:
    """One measure over layer depth, a curve with its interval per model, stack and kind of tokens.

    Args:
        rows: Of the table of measures, with columns ``model``, and ``kind``: ``masked`` (solid), ``visible`` (dashed)
            or empty.
        ax: Where to draw.
    """
    curves = model_curves(rows)
    looks = looks_of([label for label, _ in curves])
    for label, curve in curves:
        for kind, line in curve.groupby("kind", sort=False):
            colour, marker = looks[label]["color"], looks[label]["marker"]
            ax.plot(
                line["layer_depth"], line["value"], color=colour, marker=marker, linestyle=_LINES[str(kind)],
                markersize=3, linewidth=1.1,
            )  # fmt: skip
            ax.fill_between(line["layer_depth"], line["ci_low"], line["ci_high"], color=colour, alpha=0.18, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.ticklabel_format(axis="y", useOffset=False)
    return ax


def draw_measures(table: pd.DataFrame) -> Figure:
    """All measures that have a value at each layer depth, in panels; comparisons of two layers and heads are left out.

    Args:
        table: Of :meth:`~mto_analysis.probe.ProbeResult.table`, with a column ``model``.
    """
    compared = table["other_layer_depth"].notna() | (table["measure"] == "normalized_heterogeneity")
    rows = table[table["head"].isna() & ~compared & table["value"].notna()]
    if rows.empty:
        raise DataError("nothing to draw: no measure has a value")
    parts = rows["measure"].str.extract(f"^{_PARTS.pattern}$")
    rows = rows.assign(name=parts[0], kind=parts[1].fillna(""))
    # A measure that one of two stacks does not allow leaves its model's label as it is.
    curves = dict(model_curves(rows))
    rows = pd.concat([curve.assign(model=label, stack="") for label, curve in curves.items()])
    names = list(dict.fromkeys(rows["name"]))
    across = min(_COLUMNS, len(names))
    down = -(-len(names) // across)
    with paper_style(curves):
        figure = new_figure(0.8 + 1.35 * down)
        axes = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
        for ax, name in zip(axes, names, strict=False):
            plot_measure(rows[rows["name"] == name], ax=ax)
            ax.set_title(re.sub(" (masked|visible) to", r"\n\1 to", measure_words(name)), fontsize="small")
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        for ax in axes[max(len(names) - across, 0) : len(names)]:
            ax.xaxis.set_tick_params(labelbottom=True)  # also above a place that is empty
            ax.set_xlabel(LAYER_DEPTH)
        handles = [
            *(
                axes[0].plot([], [], color=look["color"], marker=look["marker"], label=label)[0]
                for label, look in looks_of(curves).items()
            ),
            *(
                axes[0].plot([], [], color="0.3", linestyle=_LINES[kind], label=kind)[0]
                for kind in ("masked", "visible")
            ),
        ]
        legend_below(figure, handles, [str(handle.get_label()) for handle in handles], ncols=5)
        describe(figure, note=f"mean of {rows['num_images'].max()} images with 95 % intervals")
    return figure
