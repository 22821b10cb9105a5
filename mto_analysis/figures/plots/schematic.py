"""Fig. 3 in our own form: where masked tokens live in the two styles, and what each loss of MTO acts on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from mto_analysis.figures.plots.style import COLORS, LAYER_DEPTH, figure_width, paper_style

# Losses keep their colours through all panels; dark enough for text.
_VISIBLE, _SPA, _E, _R = COLORS[0], "#00785a", "#b34700", "#9c3f8d"
_INK = "0.15"

#: A row of eight tokens, True = masked, as both styles show it.
TOKENS = (False, True, True, False, True, True, False, True)


def _token(ax: Axes, x: float, y: float, masked: bool, *, side: float = 0.42, faint: bool = False) -> None:
    """A visible token is full, a masked one hatched, so that they differ in grey too."""
    ax.add_patch(
        Rectangle(
            (x - side / 2, y - side / 2),
            side,
            side,
            facecolor="white" if masked else _VISIBLE,
            edgecolor="0.35" if masked else _VISIBLE,
            hatch="/////" if masked else None,
            linewidth=0.7,
            alpha=0.25 if faint else 1.0,
            zorder=3,
        )
    )


def _box(ax: Axes, x: float, y: float, width: float, height: float, text: str, *, strong: bool = False) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="0.9" if strong else "0.97",
            edgecolor=_INK if strong else "0.5",
            linewidth=1.3 if strong else 0.7,
            zorder=2,
        )
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", size="small", color=_INK, zorder=4)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "0.35") -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=6, linewidth=0.8, color=color, shrinkA=0, shrinkB=0, zorder=1
        )
    )


def _bare(ax: Axes, width: float, height: float) -> Axes:
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return ax


def plot_style(ax: Axes, style: str, *, tokens: Sequence[bool] = TOKENS) -> Axes:
    """Tokens on their way through a model of one style, bottom to top; the stack that MTO acts on is framed.

    Args:
        ax: Where to draw; 7.2 units wide, 5.1 high.
        style: ``inpainting`` (masked tokens enter the encoder) or ``decoder`` (they enter only the decoder).
        tokens: True where masked.
    """
    if style not in ("inpainting", "decoder"):
        raise ValueError(f"style must be inpainting or decoder, got {style!r}")
    _bare(ax, 7.2, 5.1)
    places = 0.62 + 0.58 * np.arange(len(tokens))
    middle, left, width = float(places.mean()), 0.32, float(places[-1]) - 0.02
    beside = left + width + 0.3
    kept = [x for x, masked in zip(places, tokens, strict=True) if not masked]
    if style == "inpainting":
        low, high, meeting = 1.0, 3.92, 0.35
        for x in places:
            _arrow(ax, (x, 0.6), (x, 0.97))
        _box(ax, left, low, width, high - low, "Encoder\nall tokens", strong=True)
    else:
        low, high, meeting = 2.62, 3.92, 1.97
        for x, masked in zip(places, tokens, strict=True):
            _token(ax, x, 0.35, masked, faint=masked)
        for y, masked, words in ((0.72, False, "visible"), (0.24, True, "masked")):
            _token(ax, beside + 0.12, y, masked, side=0.3)
            ax.text(beside + 0.4, y, words, va="center", size="x-small", color="0.25")
        for x in kept:
            _arrow(ax, (x, 0.6), (x, 0.9))
            _arrow(ax, (x, 1.5), (x, 1.72))
        _box(ax, left, 0.92, width, 0.58, "Encoder: visible tokens only")
        for x in places:
            _arrow(ax, (x, 2.22), (x, 2.6))
        _box(ax, left, low, width, high - low, "Decoder\nall tokens", strong=True)
    for x, masked in zip(places, tokens, strict=True):
        _token(ax, x, meeting, masked)
    _arrow(ax, (middle, high + 0.03), (middle, high + 0.4))
    _box(ax, left, high + 0.43, width, 0.52, "Prediction of masked patches")
    ax.text(beside - 0.02, meeting, "masked\ntokens join", va="center", size="x-small", color="0.25", linespacing=1.0)
    _levels(ax, beside, low, high)
    return ax


def _levels(ax: Axes, x: float, low: float, high: float) -> None:
    """Layer depths beside a stack, and the losses that act there."""
    ax.plot([x, x], [low, high], color=_INK, linewidth=0.8)
    for y in np.linspace(low, high, 4):
        ax.plot([x - 0.08, x + 0.08], [y, y], color=_INK, linewidth=0.8)
    ax.text(x + 0.18, low, "$l=0$", va="center", size="small", color=_INK)
    ax.text(x + 0.86, low + 0.2, r"$L_{\mathrm{spa}}$", va="center", size="small", color=_SPA)
    ax.text(x + 0.86, low - 0.2, r"$L_e$", va="center", size="small", color=_E)
    ax.text(x + 0.18, high, "$l=L$", va="center", size="small", color=_INK)
    ax.text(x + 0.18, (low + high) / 2, "$L_r$", va="center", size="small", color=_R)


def plot_losses_on_affinity(ax: Axes, *, num_masked: int = 5, num_visible: int = 3) -> Axes:
    """The affinity matrix in quadrants: rows that L_spa sharpens, and the quadrant of H, and so of L_e and L_r."""
    count = num_masked + num_visible
    ax.set_xlim(-1.1, count + 3.6)
    ax.set_ylim(count + 0.15, -1.1)
    ax.set_anchor("W")
    ax.set_aspect("equal")
    ax.set_axis_off()
    border = num_masked
    shades = {(0, 0): "0.97", (0, 1): "#f7e0bd", (1, 0): "#cfeadf", (1, 1): "#cfeadf"}
    spans = ((0, border), (border, count))
    names = {(0, 0): "1st", (0, 1): "2nd", (1, 0): "3rd", (1, 1): "4th"}
    for (row, column), shade in shades.items():
        (top, bottom), (left, right) = spans[row], spans[column]
        ax.add_patch(
            Rectangle((left, top), right - left, bottom - top, facecolor=shade, edgecolor="white", linewidth=0)
        )
        ax.text(left + 0.15, top + 0.15, names[row, column], ha="left", va="top", size="x-small", color="0.35")
    for line in range(count + 1):
        ax.plot([0, count], [line, line], color="white", linewidth=0.6)
        ax.plot([line, line], [0, count], color="white", linewidth=0.6)
    ax.plot([0, count], [border, border], color=_INK, linewidth=0.9, zorder=3)
    ax.plot([border, border], [0, count], color=_INK, linewidth=0.9, zorder=3)
    ax.add_patch(Rectangle((0, 0), count, count, fill=False, edgecolor=_INK, linewidth=0.9, zorder=3))
    # One row of each kind, as what the losses are sums over; inside the lines, so that both are seen.
    ax.add_patch(
        Rectangle((border + 0.08, 2.08), num_visible - 0.16, 0.84, fill=False, edgecolor=_E, linewidth=1.5, zorder=4)
    )
    ax.add_patch(
        Rectangle((0.08, border + 1.08), count - 0.16, 0.84, fill=False, edgecolor=_SPA, linewidth=1.5, zorder=4)
    )
    for at in range(count):
        masked = at < border
        _token(ax, at + 0.5, -0.55, masked, side=0.62)
        _token(ax, -0.55, at + 0.5, masked, side=0.62)
    for low, high, y, words, color in (
        (0, border, 2.5, "$H$: entropy of\nmasked rows\nover visible\ncolumns;\n$L_e$ raises it", _E),
        (border, count, border + 1.5, "$L_{\\mathrm{spa}}$ lowers\nthe entropy of\nvisible rows", _SPA),
    ):
        ax.plot([count + 0.25] * 2, [low + 0.1, high - 0.1], color=color, linewidth=1.5, solid_capstyle="butt")
        ax.text(count + 0.5, y, words, va="center", size="small", color=color, linespacing=1.15)
    return ax


def plot_losses_over_depth(ax: Axes) -> Axes:
    """What the losses ask of H over layer depth: high at depth 0, then lower step by step; not measured."""
    depth = np.arange(5)
    h = np.array([0.86, 0.66, 0.47, 0.31, 0.2])
    ax.plot(depth, h, color=_INK, marker="o", markersize=4, linewidth=1.1, zorder=3)
    ax.annotate(
        "", (0, 1.08), (0, h[0] + 0.04), arrowprops={"arrowstyle": "-|>", "color": _E, "linewidth": 1.6}, zorder=4
    )
    ax.text(0.15, 1.03, r"$L_e$ raises $H_0$", size="small", va="center", color=_E)
    for left in depth[:-1]:
        ax.annotate(
            "", (left + 0.93, h[left + 1] + 0.045), (left + 0.93, h[left] + 0.01),
            arrowprops={"arrowstyle": "-|>", "color": _R, "linewidth": 1.4}, zorder=2,
        )  # fmt: skip
        ax.plot([left, left + 0.93], [h[left]] * 2, color=_R, linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
    ax.text(2.15, 0.7, "$L_r$ asks for\n$H_l < H_{l-1}$", size="small", va="center", color=_R, linespacing=1.15)
    ax.set_xlim(-0.35, 4.35)
    ax.set_ylim(0, 1.18)
    ax.set_xticks(depth, ["0", "1", "2", r"$\cdots$", "$L$"])
    ax.set_yticks([])
    ax.grid(visible=False)
    ax.set_xlabel(f"{LAYER_DEPTH} $l$")
    ax.set_ylabel("$H_l$")
    return ax


def draw_schematic() -> Figure:
    """Fig. 3 in four panels: the two styles above, the losses on the affinity matrix and over layer depth below."""
    with paper_style():
        width = figure_width()
        figure = Figure(figsize=(width, 0.86 * width))
        titles = {
            "a": (0.0, 1.0, "Inpainting style (SimMIM, ConMIM, BEiT)"),
            "b": (0.5, 1.0, "Decoder style (MAE, BootMAE)"),
            "c": (0.0, 0.51, r"Affinity matrix $\psi(XX^{\top})$ at layer depth 0"),
            "d": (0.5, 0.51, "Heterogeneity that MTO asks for (sketch)"),
        }
        for letter, (x, y, words) in titles.items():
            figure.text(x + 0.012, y - 0.01, letter, size="small", va="top", weight="bold")
            figure.text(x + 0.045, y - 0.01, words, size="small", va="top")
        tall = 0.5 * 5.1 / 7.2 / 0.86
        for x, style in ((0.0, "inpainting"), (0.5, "decoder")):
            plot_style(figure.add_axes((x, 0.955 - tall, 0.5, tall)), style)
        plot_losses_on_affinity(figure.add_axes((0.005, 0.01, 0.53, 0.445)))
        plot_losses_over_depth(figure.add_axes((0.6, 0.105, 0.38, 0.34)))
    return figure
