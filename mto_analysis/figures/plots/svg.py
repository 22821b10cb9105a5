"""Figures as SVG to be put into a page: no file header, no metadata, and no id that another figure could share."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure


def figure_svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element, the same text for the same figure.

    Letters are drawn as paths, so that the figure looks alike wherever it is read, without fonts.

    Args:
        figure: From any function here.
        name: Put before every id, as ids must be unique in a page; letters only.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing, dpi=200, bbox_inches="tight", pad_inches=0.03)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    # Nothing refers to an image's id, a hash of its pixels, which would be there twice for an image drawn twice.
    svg = re.sub(r' id="image\w+"', "", svg)
    # Sizes that a page can scale by its own type, so that letters of narrow and wide figures are equally large.
    svg = re.sub(r' width="([\d.]+)pt" height="[\d.]+pt"', r' style="width: calc(\1em / 8)"', svg, count=1)
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
