"""One look for every figure: type, widths and colours by style, told apart in grey, fonts embedded."""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mto_analysis.figures.options import current_drawing

#: Widths in inches of what commands and reports draw, over one and two columns.
COLUMN_WIDTH = 3.4
PAGE_WIDTH = 7.0
#: Text width of an LNCS page (122 mm, ECCV's), in inches: figures in paper style are drawn to it.
TEXT_WIDTH = 122 / 25.4

#: seaborn's colour-blind palette without its palest tones, and without grey, which is left to baselines, controls and
#: random encoders. Its values, as to import seaborn takes as long as a small measurement.
COLORS = ("#0173b2", "#d55e00", "#029e73", "#de8f05", "#cc78bc", "#56b4e9", "#ca9161")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

#: The style sheet; ``matplotlib.style.use(PAPER_STYLE)`` gives its look to anybody's figures.
PAPER_STYLE = Path(__file__).parents[2] / "assets/paper.mplstyle"
_BASE: Any = mpl.rc_params_from_file(PAPER_STYLE, use_default_template=False)
# Text sizes in figures are relative to font.size, so that these reach all of them. STIX is matplotlib's own Times.
_STYLES: dict[str, Any] = {
    "screen": {},
    "paper": {"font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9},
    "slides": {"font.size": 11, "lines.linewidth": 2.2, "lines.markersize": 6, "axes.linewidth": 1, "savefig.dpi": 320},
}
_WIDTHS = {"screen": PAGE_WIDTH, "paper": TEXT_WIDTH, "slides": PAGE_WIDTH}

#: What the axis over layers is called in every figure.
LAYER_DEPTH = "Layer depth"

# Lines, bands and letters have fewer colours, photographs more.
_DRAWN_COLORS = 10_000


class Look(TypedDict):
    """Colour, marker and line style of a curve, as arguments of ``Axes.plot``."""

    color: str
    marker: str
    linestyle: Any


# What figures of this project often show together.
_SLOTS = {"MAE": 0, "SimMIM": 1, "with MTO": 2}
_VARIANT = re.compile(r"( \+ |, )")
_BASELINE = Look(color="0.35", marker="o", linestyle="--")
_TOGETHER: ContextVar[frozenset[str]] = ContextVar("together", default=frozenset())


def looks_of(labels: Iterable[str]) -> dict[str, Look]:
    """The look of each label: the only place where models get colour, marker and line style.

    A look follows from the label's text alone, so that a model keeps it whatever else is drawn. Only where two labels
    that are shown together (:func:`shown_together`) would share a look, one takes the next that is free, in the
    order of their sorted names. The first seven labels have colours of their own; beyond, colours return with another
    marker and line style.

    Args:
        labels: Of curves; the looks come in their order.

    Example:
        >>> both = looks_of(["SimMIM", "MAE"])
        >>> both["MAE"] == looks_of(["MAE"])["MAE"], both["MAE"]["marker"]
        (True, 'o')
    """
    names = list(dict.fromkeys(labels))
    count = len(COLORS)
    taken: set[int] = set()
    looks = {"baseline": _BASELINE}
    together = {*names, *_TOGETHER.get()} - looks.keys()
    for name in sorted(together, key=lambda name: (base_of(name) not in _SLOTS, base_of(name) != name, name)):
        base = base_of(name)
        # "MAE + MTO" and "MAE, early" stand beside "MAE", always in the same other colour.
        first = _SLOTS.get(base, zlib.crc32(base.encode())) + 2 * (base != name)
        places = (turn * count + (first + step) % count for turn in itertools.count() for step in range(count))
        place = next(place for place in places if place not in taken)
        taken.add(place)
        turn, slot = divmod(place, count)
        marker = (slot + turn) % count
        line = (marker + turn + turn // count) % count  # no pair of marker and line twice, to be told apart in grey
        looks[name] = Look(color=COLORS[slot], marker=MARKERS[marker], linestyle=LINE_STYLES[line])
    return {name: looks[name] for name in names}


@contextmanager
def shown_together(labels: Iterable[str]) -> Iterator[None]:
    """Give these labels different looks, the same in all figures and panels that are drawn inside this context."""
    token = _TOGETHER.set(_TOGETHER.get() | set(labels))
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def model_curves(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each model and stack by their label, in the order of the table.

    The stack is named where a model has several.

    Args:
        table: Columns ``model`` and ``stack``.
    """
    if table.empty:
        return []
    several = table.groupby("model")["stack"].nunique().max() > 1
    return [
        (f"{model}, {str(stack).replace('_', ' ')}" if several else str(model), curve)
        for (model, stack), curve in table.groupby(["model", "stack"], sort=False)
    ]


def base_of(label: str) -> str:
    """The model that a label is a variant of: of another epoch, after a comma, or with something added, after a plus.

    Example:
        >>> base_of("MAE + MTO"), base_of("SimMIM, early"), base_of("mine")
        ('MAE', 'SimMIM', 'mine')
    """
    return _VARIANT.split(label, maxsplit=1)[0]


@contextmanager
def paper_style(labels: Iterable[str] = ()) -> Iterator[None]:
    """Draw inside this context to get the look of the current style; global settings are as before afterwards.

    Args:
        labels: Of all curves of the figure, which look alike in all its panels.
    """
    with mpl.rc_context(_BASE), mpl.rc_context(_STYLES[current_drawing().style]), shown_together(labels):
        yield


def figure_width(share: float = 1.0) -> float:
    """Width of a figure in inches: that which the user asked for, else a share of the style's."""
    options = current_drawing()
    return options.width or share * _WIDTHS[options.style]


def new_figure(height: float, *, share: float = 1.0) -> Figure:
    """A figure of the current style, laid out so that nothing overlaps and the file has just its width.

    Args:
        height: In inches, at a type size of 8 points; larger type makes it higher.
        share: Of the style's width that the figure needs, unless the user asked for a width.
    """
    return Figure(figsize=(figure_width(share), height * mpl.rcParams["font.size"] / 8), layout="constrained")


def new_axes(width: float = PAGE_WIDTH / 2, height: float = 2.5) -> Axes:
    """Axes of a new figure, for a plot that was not given any; width and height in inches."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def describe(figure: Figure, *, title: str | None = None, note: str = "") -> None:
    """Put a title above a figure, and below it what is shown, which in paper style is left to the caption.

    Args:
        figure: Any; its label (``figure.get_label()``) becomes the note, which the caption file is made from.
        title: Such as the model's name.
        note: What is shown, on how many images, with which intervals.
    """
    figure.set_label(" ".join(note.split()))
    inside = "" if current_drawing().style == "paper" else _wrapped(note, figure)
    if heading := "\n".join(filter(None, (_wrapped(title or "", figure), inside))):
        figure.suptitle(heading, fontsize="small", color="0.3")


def legend_below(figure: Figure, handles: Iterable[Artist], labels: Iterable[str], **options: Any) -> None:
    """A legend below all panels, in as many columns as the figure's width holds."""
    shown, names = list(handles), list(labels)
    for columns in range(min(options.pop("ncols", len(shown)), len(shown)), 0, -1):
        rows = math.ceil(len(shown) / columns)
        across = math.ceil(len(shown) / rows)  # rows as full as can be
        legend = figure.legend(shown, names, loc="outside lower center", ncols=across, **options)
        if columns == 1 or legend.get_window_extent().width <= 0.98 * figure.bbox.width:
            return
        legend.remove()


def _wrapped(note: str, figure: Figure) -> str:
    """A note in lines of the figure's width; formulas stay whole."""
    whole = re.sub(r"\$.*?\$", lambda formula: formula[0].replace(" ", "\N{NO-BREAK SPACE}"), note)
    letters = int(figure.get_figwidth() * 72 / (0.48 * mpl.rcParams["font.size"]))
    lines = (textwrap.fill(line, letters, break_long_words=False) for line in whole.splitlines())
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    # No creation date, so that a figure redrawn from the same table is the same file.
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind, {"Software": None})
    with paper_style(), mpl.rc_context({"svg.hashsalt": "mto-analysis"}):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return _with_palette(buffer) if kind == "png" else buffer.getvalue()


def _with_palette(png: io.BytesIO) -> bytes:
    """A drawing as PNG of 256 colours, a third of the size; photographs keep all of theirs."""
    with Image.open(png) as image:
        whole = image.convert("RGB")
        if whole.getcolors(_DRAWN_COLORS) is None:
            return png.getvalue()
        small = io.BytesIO()
        whole.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True, dpi=image.info["dpi"])
    return small.getvalue()
