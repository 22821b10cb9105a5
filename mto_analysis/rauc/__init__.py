"""From accuracy logs to RAUC, Eq. (6), with intervals."""

from mto_analysis.rauc import areas
from mto_analysis.rauc.areas import *

#: Those of the modules: each name is listed once, where it is defined.
__all__: list[str] = []
__all__ += areas.__all__
