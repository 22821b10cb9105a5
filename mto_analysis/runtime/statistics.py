"""Quantiles that several subpackages need."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["t_quantile"]


def t_quantile(freedom: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
    """Two-sided quantile of Student's t: an interval reaches this many standard errors to either side.

    Args:
        freedom: Degrees of freedom, a number or an array; NaN comes back where they are not positive.
        confidence: Nominal coverage, between 0 and 1.

    Raises:
        ValueError: If ``confidence`` is not between 0 and 1.

    Example:
        >>> t_quantile([2, 4]).round(3).tolist()
        [4.303, 2.776]
    """
    # scipy.special, because importing scipy.stats takes a second.
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return np.asarray(stdtrit(freedom, 0.5 + confidence / 2), dtype=np.float64)
