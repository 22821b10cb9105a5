"""Fig. 2: affinity maps of every layer depth in one grid, masked tokens first, quadrants drawn and named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mto_analysis.figures.plots.style import PAGE_WIDTH, paper_style
from mto_analysis.probe.quadrants import AffinityMap

__all__ = ["KIND_WORDS", "draw_affinity", "plot_affinity_map"]

#: The kinds of affinity, as a colour bar names them.
KIND_WORDS = {
    "softmax": r"softmax of dot products over each row, $\psi(X X^{\top})$",
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
        limits: Values of the darkest and the brightest colour.
        log: Logarithmic colours, for softmax.
        ax: Where to draw; by default a new figure's axes.
    """
    if ax is None:
        ax = Figure(figsize=(2.5, 2.5)).subplots()
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


def draw_affinity(
    maps: Sequence[AffinityMap],
    *,
    scale: Literal["per-map", "shared"] = "per-map",
    title: str | None = None,
    columns: int | None = None,
    width: float = PAGE_WIDTH,
    note: bool = True,
) -> Figure:
    """The maps of every layer depth of one model, from top left to bottom right; each stack begins a row.

    Args:
        maps: Of one model and one image (or the mean), in order of stack and layer depth.
        scale: ``per-map`` stretches each map from its own least to its own greatest value, as the paper does;
            ``shared`` gives equal values the same colour in all maps (logarithmic for a softmax of wide range, whose
            largest shares would else leave the rest black).
        title: Line above the figure.
        columns: Maps in a row; by default about twice as many as rows.
        width: Of the figure, in inches.
        note: Say above the figure what is shown; leave it out where a caption does.

    Raises:
        ValueError: If there is no map, or the scale is unknown.
    """
    if not maps:
        raise ValueError("there is no map to draw")
    if scale not in ("per-map", "shared"):
        raise ValueError(f"scale must be per-map or shared, got {scale!r}")
    stacks = [list(each) for _, each in groupby(maps, key=lambda each: each.stack)]
    across = columns or _columns(max(map(len, stacks)))
    rows = [stack[start : start + across] for stack in stacks for start in range(0, len(stack), across)]
    across = max(map(len, rows))
    arrays = [each.values.double().numpy() for each in maps]
    everything = (min(map(np.min, arrays)), max(map(np.max, arrays)))
    log = scale == "shared" and maps[0].kind == "softmax" and everything[1] > 30 * everything[0]
    with paper_style():
        side = min((width - 0.6) / across, 2.2)
        height = side * len(rows) + (0.28 if side > _ONE_LINE else 0.37) * len(rows) + (0.95 if note or title else 0.42)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(len(rows), across, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        for row, line in enumerate(rows):
            for column, each in enumerate(line):
                ax = axes[row, column]
                ax.set_axis_on()
                values = each.values.double().numpy()
                limits = everything if scale == "shared" else (float(values.min()), float(values.max()))
                image = plot_affinity_map(values, each.num_masked, limits=limits, log=log, ax=ax)
                depth = f"{'layer depth' if side > 1.4 else 'depth'} {each.layer_depth}"
                name = f"{each.stack}, {depth}" if len(stacks) > 1 else depth
                ax.set_title(name, fontsize=7, pad=3 if side > _ONE_LINE or scale != "per-map" else 10.5, loc="left")
                if scale == "per-map":
                    words = f"{limits[0]:.2g} to {limits[1]:.2g}"
                    if side > _ONE_LINE:
                        ax.set_title(words, fontsize=5.5, pad=3, loc="right", color="0.35")
                    else:  # no room beside the name
                        ax.annotate(
                            words, (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", size=5.5,
                            color="0.35", va="bottom",
                        )  # fmt: skip
        _name_quadrants(axes[0, 0], rows[0][0])
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
        bar.outline.set_linewidth(0.5)
        bar.ax.tick_params(labelsize=6, length=2)
        if scale == "per-map":
            bar.set_ticks(list(image.get_clim()), labels=["least", "greatest"])
            bar.set_label(f"{KIND_WORDS[maps[0].kind]}; each map from its own least to greatest value", size=7)
        else:
            floored = log and everything[0] < everything[1] * 10**-_DECADES
            floor = f" (less than {10.0**-_DECADES:g} of the greatest drawn alike)" if floored else ""
            bar.set_label(f"{KIND_WORDS[maps[0].kind]}; one scale for all maps{floor}", size=7)
        heading = "\n".join(filter(None, (title, _caption(maps) if note else "")))
        if heading:
            figure.suptitle(heading, fontsize=7, color="0.3")
    return figure


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
            name, (x - 0.5, y - 0.5), (-3, -3), textcoords="offset points", ha="right", va="top", size=5.5, bbox=box
        )
    ax.set_yticks([border / 2 - 0.5, (border + count) / 2 - 0.5], labels=["masked", "visible"], rotation=90)
    ax.set_xticks([border / 2 - 0.5, (border + count) / 2 - 0.5], labels=["masked", "visible"])
    ax.tick_params(length=0, labelsize=5.5, pad=1)
    for label in ax.get_yticklabels():
        label.set_verticalalignment("center")


def _caption(maps: Sequence[AffinityMap]) -> str:
    first = maps[0]
    what = f"image {first.image}" if first.image else f"mean over {first.num_images} images"
    if first.image is None and first.num_images == 1:
        what = "one image"
    return (
        f"{what}; rows: queries, columns: keys, masked tokens first\n"
        "quadrants: 1st masked-masked, 2nd masked-visible, 3rd visible-masked, 4th visible-visible"
    )
