"""Figures in tests: drawn but not rendered, which is most of a small run's time, except where a test says so."""

from __future__ import annotations

from matplotlib.figure import Figure

from mto_analysis.figures.plots import style

render = style.figure_bytes


def only_name_the_format(figure: Figure, kind: str) -> bytes:
    """In place of :func:`render`."""
    return kind.encode()
