"""What a run shows along its way: a function that the caller gives draws it, and here it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mto_analysis.models import MaskedImageModel


class Shown(NamedTuple):
    """What is shown of an epoch."""

    figures: Mapping[str, bytes]
    rows: Sequence[Mapping[Any, Any]] = ()


#: Draws and measures the model after an epoch; 0 is before the first.
Show = Callable[[MaskedImageModel, int], Shown]
