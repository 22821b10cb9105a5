"""Every figure and table of the paper, drawn anew: what is measured, what is only published, and in which form.

``mto-analyze figures`` and the scripts in ``figures/`` call :func:`~mto_analysis.figures.paper.drawing.draw_paper`.
"""

from mto_analysis.figures.paper.catalogue import FIGURES, PaperFigure, find_figures
from mto_analysis.figures.paper.drawing import draw_paper
from mto_analysis.figures.paper.inputs import Drawn, Inputs

__all__ = ["FIGURES", "Drawn", "Inputs", "PaperFigure", "draw_paper", "find_figures"]
