"""Warnings of H that has collapsed, or of terms that are not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

# In nats: below this H of every layer, its gradients are gone.
_COLLAPSED = 1e-4


class CollapseWarning(UserWarning):
    """A term is not finite, L_spa is dead, or heterogeneity has collapsed; the message names term and step."""


def collapse_of(heterogeneity: Sequence[float]) -> str | None:
    """What is wrong with H of the layers of a stack, in words.

    Example:
        >>> collapse_of([0.3, 1e-9]), collapse_of([1e-5, 1e-9])
        (None, 'heterogeneity of all layers has collapsed to 0')
    """
    if not all(map(math.isfinite, heterogeneity)):
        return "heterogeneity is not finite"
    return "heterogeneity of all layers has collapsed to 0" if max(heterogeneity) < _COLLAPSED else None


def warn_of(message: str) -> None:
    """Warn the user whose line asked for the loss."""
    warnings.warn(message, CollapseWarning, stacklevel=4)
