"""One pass of a model over images: the tokens of every layer depth reduced to a few numbers per image."""

from mto_analysis.probe import engine
from mto_analysis.probe.engine import *

#: Those of the modules: each name is listed once, where it is defined.
__all__: list[str] = []
__all__ += engine.__all__
