"""Eq. (2), affinity matrices and their quadrants: tensors in, tensors out."""

from mto_analysis.affinity import matrix, split
from mto_analysis.affinity.matrix import *
from mto_analysis.affinity.split import *

#: Those of the modules: each name is listed once, where it is defined.
__all__: list[str] = []
__all__ += matrix.__all__
__all__ += split.__all__
