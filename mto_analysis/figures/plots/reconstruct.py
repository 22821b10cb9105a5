"""Reconstructions in a grid: for each model a block of four columns, a row per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mto_analysis.figures.plots.style import describe, figure_width, new_axes, paper_style

if TYPE_CHECKING:
    from mto_analysis.probe.reconstruction import Reconstruction

#: Field of :class:`~mto_analysis.probe.reconstruction.Reconstruction` and its title, in reading order.
VIEWS = {
    "original": "original",
    "masked": "masked input",
    "reconstruction": "reconstruction",
    "pasted": "visible pasted",
}


def plot_view(reconstruction: Reconstruction, view: str, *, ax: Axes | None = None) -> Axes:
    """One view of a reconstruction, without axes; pixels stay squares."""
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    ax = ax or new_axes(1.5, 1.5)
    ax.imshow(getattr(reconstruction, view), interpolation="nearest", vmin=0, vmax=1)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax


def reconstruction_caption(rows: Sequence[Reconstruction]) -> str:
    """What must be said beside such a figure: where masks are, what was undone with whose statistics."""
    text = (
        "Masked patches are grey. Losses are each model's own, on masked patches, beside that of predicting the mean. "
        "Models are not trained to predict visible patches."
    )
    for number in sorted({row.num_channels for row in rows} - {1, 3}):
        shown = "the first is shown in grey" if number < 3 else "the first three are shown as red, green and blue"
        text += f" Of {number} channels {shown}."
    normalized = list(dict.fromkeys(row.model for row in rows if row.target.startswith("normalized")))
    if normalized:
        whose = ", ".join(normalized)
        text += (
            f" {whose}: patches are predicted centred and scaled; shown with the mean and standard deviation of the "
            "original patch, so their brightness and contrast are the original's, not predicted."
        )
    return text


def draw_reconstructions(rows: Sequence[Reconstruction], *, captioned: bool = True) -> Figure:
    """All models and images: blocks of models two abreast, each with its mean loss in the title."""
    if not rows:
        raise ValueError("there must be a reconstruction to draw, got none")
    models = list(dict.fromkeys(row.model for row in rows))
    abreast = min(2, len(models))
    lines = -(-len(models) // abreast)
    images = max(sum(row.model == model for row in rows) for model in models)
    cell = figure_width(0.5 * abreast + 0.17 * (abreast == 1)) / (4 * abreast)
    note = reconstruction_caption(rows) if captioned else ""
    height = lines * (images * 0.95 * cell + 0.42) + (0.13 * math.ceil(len(note) / (72 * cell)) if note else 0) + 0.05
    tight = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.0, hspace=0.0)
    with paper_style():
        figure = Figure(figsize=(abreast * 4 * cell, height), layout=tight)
        blocks = figure.subfigures(lines, abreast, squeeze=False, wspace=0.02, hspace=0.03).flat
        for block, model in zip(blocks, models, strict=False):
            _draw_block(block, model, [row for row in rows if row.model == model], cell)
        describe(figure, note=note)
    return figure


def _draw_block(block: SubFigure, model: str, rows: Sequence[Reconstruction], cell: float) -> None:
    loss, mean = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("loss", "predict_the_mean"))
    block.suptitle(f"{model}: loss {loss:.3g} (mean: {mean:.3g})", fontsize="medium")
    axes = block.subplots(len(rows), len(VIEWS), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax, view in zip(line, VIEWS, strict=True):
            plot_view(row, view, ax=ax)
        line[0].set_ylabel(_shortened(row.image, cell), fontsize="x-small")
    for ax, title in zip(axes[0], VIEWS.values(), strict=True):
        # Beside each other in one line where they have the room.
        narrow = 72 * cell < 7.5 * mpl.rcParams["font.size"]
        words, size = (title.replace(" ", "\n"), "x-small") if narrow else (title, "small")
        ax.set_title(words, fontsize=size, pad=2, linespacing=0.9)


def _shortened(name: str, height: float) -> str:
    """The end of a name, as much as two lines beside a row of this height in inches hold."""
    letters = max(4, int(height * 72 / (0.42 * mpl.rcParams["font.size"])))
    shown = name if len(name) <= 2 * letters else f"\N{HORIZONTAL ELLIPSIS}{name[1 - 2 * letters :]}"
    return "\n".join(shown[start : start + letters] for start in range(0, len(shown), letters))
