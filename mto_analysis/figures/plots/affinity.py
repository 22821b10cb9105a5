"""Fig. 2: affinity maps of every layer depth in one grid, masked tokens first, quadrants drawn and named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mto_analysis.figures.plots.style import describe, figure_width, new_axes, new_figure, paper_style
from mto_analysis.probe.quadrants import AffinityMap

#: How values become colours, as a colour bar says it.
SCALES = {
    "off-diagonal": "colours from min to max off the diagonal of each map",
    "per-map": "colours from min to max of each map",
    "shared": "one colour scale for all maps",
}
Scale = Literal["off-diagonal", "per-map", "shared"]

#: The kinds of affinity, as a colour bar names them.
KIND_WORDS = {
    "softmax": r"row-wise softmax $\psi(X X^{\top})$",
    "dot": r"dot product, $X X^{\top}$",
    "cosine": "cosine",
}

# viridis: perceptually uniform, safe for the colour-blind, and rising in lightness when printed in grey.
_COLOR_MAP = "viridis"
# Shares below this fraction of the largest are drawn alike on the logarithmic scale of a softmax.
_DECADES = 4
# Maps narrower than this, in inches, have their range of values below their name.
_ONE_LINE = 1.0


def plot_affinity_map(
    values: np.ndarray, num_masked: int, *, limits: tuple[float, float], log: bool = False, ax: Axes | None = None
) -> AxesImage:
    """One affinity map with the borders of its quadrants.

    Args:
        values: Rows and columns masked first: ``num_patches num_patches``.
        num_masked: Where the borders are.
        limits: Values of the darkest and the brightest colour; those beyond have the same colours.
        log: Logarithmic colours, for softmax.
        ax: Where to draw; by default a new figure's axes.
    """
    ax = ax or new_axes(2.5, 2.5)
    low, high = limits
    if log:
        norm: Normalize = LogNorm(max(low, high * 10**-_DECADES), high, clip=True)
    else:
        norm = Normalize(low, high if high > low else low + 1)
    # Nearest, or the borders of a quadrant blur into its neighbours.
    image = ax.imshow(values, cmap=_COLOR_MAP, norm=norm, interpolation="nearest", origin="upper")
    for line in (ax.axhline, ax.axvline):
        # White on black is seen on dark and bright maps alike.
        line(num_masked - 0.5, color="black", linewidth=1.2)
        line(num_masked - 0.5, color="white", linewidth=0.5)
    ax.grid(visible=False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def scale_limits(arrays: Sequence[np.ndarray], scale: Scale) -> list[tuple[float, float]]:
    """Values of the darkest and brightest colour of each map.

    A token resembles itself most: at full range the diagonal is bright and all else dark. ``off-diagonal`` therefore
    leaves it out.

    Example:
        >>> scale_limits([np.array([[9.0, 1.0], [2.0, 9.0]])], "off-diagonal")
        [(1.0, 2.0)]
    """
    shown = [each[~np.eye(len(each), dtype=bool)] if scale == "off-diagonal" and len(each) > 1 else each
             for each in arrays]  # fmt: skip
    limits = [(float(each.min()), float(each.max())) for each in shown]
    if scale == "shared":
        limits = [(min(low for low, _ in limits), max(high for _, high in limits))] * len(limits)
    return limits


def draw_affinity(
    maps: Sequence[AffinityMap],
    *,
    scale: Scale = "off-diagonal",
    log: bool = False,
    title: str | None = None,
    columns: int | None = None,
) -> Figure:
    """The maps of every layer depth of one model, from top left to bottom right; each stack begins a row.

    Args:
        maps: Of one model and one image (or the mean), in order of stack and layer depth.
        scale: ``off-diagonal`` stretches each map from the minimum to the maximum of its values off the diagonal;
            ``per-map`` includes the diagonal, as the paper does; ``shared`` gives equal values the same colour in all
            maps.
        log: Logarithmic colours over four decades, for a softmax: its largest shares leave the rest dark else.
        title: Such as the model's name.
        columns: Maps in a row; by default about twice as many as rows.

    Raises:
        ValueError: If there is no map, the scale is unknown, or a map that is no softmax is to be logarithmic.
    """
    if not maps:
        raise ValueError("there is no map to draw")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    if log and maps[0].kind != "softmax":
        raise ValueError(
            f"logarithmic colours need a softmax, which is positive; these maps are of the kind {maps[0].kind}"
        )
    stacks = [list(each) for _, each in groupby(maps, key=lambda each: each.stack)]
    width = figure_width()
    across = columns or _columns(max(map(len, stacks)))
    rows = [stack[start : start + across] for stack in stacks for start in range(0, len(stack), across)]
    across = max(map(len, rows))
    arrays = [each.values.double().numpy() for each in maps]
    limits = iter(zip(arrays, scale_limits(arrays, scale), strict=True))
    with paper_style():
        letter = mpl.rcParams["font.size"] / 8
        side = min((width - 0.6) / across, 2.2)
        one_line = side > _ONE_LINE * letter
        figure = new_figure(0.95)
        figure.set_figheight(len(rows) * (0.9 * side + (0.28 if one_line else 0.37) * letter) + 0.95 * letter)
        axes = figure.subplots(len(rows), across, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for row, line in enumerate(rows):
            for column, each in enumerate(line):
                ax = axes[row, column]
                ax.set_axis_on()
                values, ends = next(limits)
                image = plot_affinity_map(values, each.num_masked, limits=ends, log=log, ax=ax)
                _name_map(ax, each, ends if scale != "shared" else None, several=len(stacks) > 1, one_line=one_line)
        _name_quadrants(axes[0, 0], rows[0][0])
        _add_color_bar(figure, axes, image, maps[0].kind, scale)
        describe(figure, title=title, note=_note(maps))
    return figure


def _name_map(ax: Axes, each: AffinityMap, ends: tuple[float, float] | None, *, several: bool, one_line: bool) -> None:
    """Layer depth, and the ends of the map's own scale beside it or, in a narrow map, below it."""
    depth = f"layer depth {each.layer_depth}" if ends is None or one_line else f"depth {each.layer_depth}"
    name = f"{each.stack.replace('_', ' ')}, {depth}" if several else depth
    size = mpl.rcParams["font.size"]
    ax.set_title(name, fontsize="small", pad=3 if one_line or ends is None else 3 + 0.95 * size, loc="left")
    if ends is None:
        return
    words = f"{ends[0]:.2g} to {ends[1]:.2g}"
    if one_line and not several:
        ax.set_title(words, fontsize="x-small", pad=3, loc="right", color="0.35")
    else:
        ax.annotate(
            words, (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", size="x-small", color="0.35",
            va="bottom",
        )  # fmt: skip


def _add_color_bar(figure: Figure, axes: np.ndarray, image: AxesImage, kind: str, scale: Scale) -> None:
    bar = figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02,
        extend="max" if scale == "off-diagonal" else "neither",
    )  # fmt: skip
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(labelsize="x-small", length=2)
    if scale != "shared":
        bar.ax.minorticks_off()
        bar.set_ticks(list(image.get_clim()), labels=["min", "max"])
    narrow = figure.get_figwidth() < 4
    bar.set_label(f"{KIND_WORDS[kind]};{chr(10) if narrow else ' '}{SCALES[scale]}", size="small")


def _columns(count: int) -> int:
    """About twice as many columns as rows, with a last row as full as can be: 13 maps as 5 + 5 + 3, 7 as 4 + 3."""
    best = max(1, round(math.sqrt(2 * count)))
    return math.ceil(count / math.ceil(count / best))


def _name_quadrants(ax: Axes, first: AffinityMap) -> None:
    """Names of the quadrants inside, and of rows and columns outside, of the first map."""
    count, border = len(first.values), first.num_masked
    # In the upper right corner, away from the diagonal.
    places = {"1st": (border, 0), "2nd": (count, 0), "3rd": (border, border), "4th": (count, border)}
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for name, (x, y) in places.items():
        ax.annotate(
            name,
            (x - 0.5, y - 0.5),
            (-3, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            size="x-small",
            bbox=box,
        )
    places_of_words, words = [border / 2 - 0.5, (border + count) / 2 - 0.5], ["masked", "visible"]
    ax.set_yticks(places_of_words, labels=words, rotation=90)
    ax.set_xticks(places_of_words, labels=words)
    if not first.in_order:
        ax.set_xlabel("token order", fontsize="x-small", labelpad=1)
    ax.tick_params(length=0, labelsize="x-small", pad=1)
    for label in ax.get_yticklabels():
        label.set_verticalalignment("center")


def _note(maps: Sequence[AffinityMap]) -> str:
    first = maps[0]
    what = f"image {first.image}" if first.image else f"mean over {first.num_images} images"
    if first.image is None and first.num_images == 1:
        what = "one image"
    unordered = sorted({each.stack for each in maps if not each.in_order})
    order = f"{', '.join(unordered)}: token order, as places of visible tokens are not known\n" if unordered else ""
    return (
        f"{order}{what}; rows: queries, columns: keys, masked tokens first;\n"
        "quadrants: 1st masked-masked, 2nd masked-visible, 3rd visible-masked, 4th visible-visible"
    )
