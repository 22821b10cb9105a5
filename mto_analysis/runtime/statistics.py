"""Quantiles that several subpackages need."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


def t_quantile(freedom: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
    """Two-sided quantile of Student's t: an interval reaches this many standard errors to either side.

    Args:
        freedom: Degrees of freedom, a number or an array; NaN comes back where they are not positive.
        confidence: Nominal coverage, between 0 and 1.

    Example:
        >>> t_quantile([2, 4]).round(3).tolist()
        [4.303, 2.776]
    """
    # scipy.special, because importing scipy.stats takes a second.
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return np.asarray(stdtrit(freedom, 0.5 + confidence / 2), dtype=np.float64)


def reach_of_mean(count: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
    """How many standard deviations of its observations Student's interval of a mean reaches to either side.

    Args:
        count: Observations, a number or an array; NaN comes back for fewer than two.
        confidence: Nominal coverage, between 0 and 1.

    Example:
        >>> reach_of_mean([3, 5]).round(3).tolist()
        [2.484, 1.242]
    """
    count = np.asarray(count)
    return np.asarray(t_quantile(count - 1, confidence) / np.sqrt(count), dtype=np.float64)


def jackknife_interval(value: float, without: Mapping[int, float], counts: Mapping[int, int]) -> tuple[float, float]:
    r"""95 % interval of a number of a whole sample, from the same number without each of some groups in turn.

    .. math:: s^2 = \frac{1}{g} \sum_j \frac{(\tilde\theta_j - \bar\theta)^2}{h_j - 1}, \quad
        \tilde\theta_j = h_j \theta - (h_j - 1) \theta_{(j)}, \quad h_j = n / m_j, \quad
        \bar\theta = g \theta - \sum_j (1 - 1 / h_j) \theta_{(j)}

    Groups may be of different sizes :math:`m_j` (Busing, Meijer and Van Der Leeden, "Delete-m jackknife for unequal m",
    1999). The interval is Student's t with ``g - 1`` degrees of freedom around the value; NaN with fewer than two
    groups.

    Args:
        value: Of the whole sample.
        without: By group that is left out.
        counts: Observations of each group.

    Example:
        >>> low, high = jackknife_interval(2.0, {0: 2.5, 1: 2.0, 2: 1.5}, {0: 1, 1: 1, 2: 1})
        >>> round(low, 3), round(high, 3)  # the mean of 1, 2 and 3: the usual interval
        (-0.484, 4.484)
    """
    if len(without) < 2:
        return float("nan"), float("nan")
    total = sum(counts[group] for group in without)
    shares = np.array([total / counts[group] for group in without])
    estimates = np.array(list(without.values()))
    pseudo = shares * value - (shares - 1) * estimates
    centre = len(shares) * value - ((1 - 1 / shares) * estimates).sum()
    half = float(t_quantile(len(shares) - 1) * np.sqrt(np.mean((pseudo - centre) ** 2 / (shares - 1))))
    return value - half, value + half
