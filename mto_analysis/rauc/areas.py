r"""How much faster a target method learns than its baseline: Eq. (6) and the measures that belong beside it.

Everything here is about one baseline curve and one target curve of ``(epochs, scores)``, linear between the logged
epochs and nowhere else: nothing is extrapolated. Seeds are in :mod:`mto_analysis.rauc.comparison`, their error bars in
:mod:`mto_analysis.rauc.intervals`, files in :mod:`mto_analysis.rauc.curves`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LARGEST_NUMBER",
    "LARGEST_RATIO",
    "Points",
    "Ratio",
    "area",
    "area_difference",
    "crossings",
    "curve_points",
    "epochs_to_score",
    "final_gap",
    "monotone_bounds",
    "ratio_of_areas",
    "rauc",
    "reference_for",
    "score_at",
    "share_saved",
]

Vector = NDArray[np.float64]

#: A ratio beyond this is not reported: the baseline's gain is then less than a thousandth of the span of the scores.
LARGEST_RATIO = 1000.0

#: Epochs and scores beyond this are no measurements, and their areas would overflow.
LARGEST_NUMBER = 1e100


class Points(NamedTuple):
    """One run: epochs strictly rising, and the score at each."""

    epochs: Vector
    scores: Vector


class Ratio(float):
    """RAUC as a plain number that also knows where it comes from; NaN where undefined, with the reason.

    Attributes:
        numerator: Area of the target above the reference, score times epochs.
        denominator: Area of the baseline above the reference.
        reference: What was subtracted from both, S1(E1) unless given.
        reason: Why the ratio is undefined, or ``None``.
    """

    numerator: float
    denominator: float
    reference: float
    reason: str | None

    def __new__(cls, numerator: float, denominator: float, reference: float, reason: str | None) -> Ratio:
        """Divide, unless a reason forbids it."""
        ratio = super().__new__(cls, math.nan if reason else numerator / denominator)
        ratio.numerator, ratio.denominator = numerator, denominator
        ratio.reference, ratio.reason = reference, reason
        return ratio

    def __getnewargs__(self) -> tuple[float, float, float, str | None]:  # type: ignore[override]
        """What a copy or a pickle needs to divide again."""
        return self.numerator, self.denominator, self.reference, self.reason

    def __repr__(self) -> str:
        """The number, or why there is none."""
        return f"Ratio(nan, {self.reason!r})" if self.reason else f"Ratio({float(self)!r})"


def curve_points(curve: Any, name: str = "curve") -> Points:
    """One run's curve from whatever holds it, sorted by epoch and checked.

    Args:
        curve: ``(epochs, scores)``, or a tidy frame (or mapping) with ``epoch`` and ``score``, or a plain mapping from
            epoch to score. A frame must hold one run: its rows of one method and one seed.
        name: What to call it in an error.

    Raises:
        ValueError: If it is empty, not finite, of two lengths, or has two scores for one epoch.

    Example:
        >>> curve_points({800: 63.9, 400: 57.4}).scores.tolist()
        [57.4, 63.9]
    """
    if isinstance(curve, Points):
        return curve
    if hasattr(curve, "columns") or (isinstance(curve, Mapping) and {"epoch", "score"} <= set(curve)):
        missing = {"epoch", "score"} - set(getattr(curve, "columns", curve))
        if missing:
            raise ValueError(f"{name} must have the columns epoch and score, {' and '.join(sorted(missing))} missing")
        curve = curve["epoch"], curve["score"]
    elif isinstance(curve, Mapping):
        curve = list(curve), list(curve.values())
    if len(curve) != 2:
        raise ValueError(f"{name} must be a pair (epochs, scores), got {len(curve)} parts")
    epochs, scores = (np.asarray(part, dtype=np.float64) for part in curve)
    if epochs.ndim != 1 or epochs.shape != scores.shape or not epochs.size:
        raise ValueError(f"{name} must have as many scores as epochs, got {epochs.shape} and {scores.shape}")
    for part, values in (("epochs", epochs), ("scores", scores)):
        if not (np.abs(values) <= LARGEST_NUMBER).all():
            at = np.flatnonzero(~(np.abs(values) <= LARGEST_NUMBER))[0]
            raise ValueError(f"{name} must be finite and of a sane size, {part}[{at}] is {values[at]:g}")
    order = np.argsort(epochs, kind="stable")
    epochs, scores = epochs[order], scores[order]
    repeated = np.flatnonzero(np.diff(epochs) == 0)
    if repeated.size:
        twice = f"epoch {epochs[repeated[0]]:g} comes twice"
        raise ValueError(f"{name} must have one score per epoch, {twice}; several runs are for compare()")
    return Points(epochs, scores)


def score_at(curve: Any, epoch: float, *, interpolate: bool = False) -> float:
    """The score at one epoch: the logged one, or on request the one on the line between two logged epochs.

    Raises:
        ValueError: If the epoch lies outside the log, or between two logged epochs without ``interpolate``.

    Example:
        >>> score_at(([100, 200], [60.0, 70.0]), 150, interpolate=True)
        65.0
    """
    epochs, scores = curve_points(curve)
    if not epochs[0] <= epoch <= epochs[-1]:
        raise ValueError(
            f"no score at {epoch:g}, the log runs from {epochs[0]:g} to {epochs[-1]:g} and nothing is extrapolated"
        )
    at = int(np.searchsorted(epochs, epoch))
    if epochs[at] == epoch:
        return float(scores[at])
    if not interpolate:
        raise ValueError(
            f"no score at {epoch:g}, which lies between the logged {epochs[at - 1]:g} and {epochs[at]:g};"
            " ask for interpolation (--interpolate) to take the line between them"
        )
    return float(np.interp(epoch, epochs, scores))


def _window(curve: Any, start: float, end: float, interpolate: bool) -> Points:
    """The curve's corners from ``start`` to ``end``, both included."""
    if not start < end:
        raise ValueError(f"start must be below end, got {start:g} and {end:g}")
    points = curve_points(curve)
    first = score_at(points, start, interpolate=interpolate)
    last = score_at(points, end, interpolate=interpolate)
    inside = (points.epochs > start) & (points.epochs < end)
    return Points(
        np.concatenate([[start], points.epochs[inside], [end]]),
        np.concatenate([[first], points.scores[inside], [last]]),
    )


def area(curve: Any, start: float, end: float, *, reference: float = 0.0, interpolate: bool = False) -> float:
    r"""Area between a curve and a horizontal reference, :math:`\int_{E_1}^{E_2} (S(E) - r)\,dE`, by the trapezoid rule.

    Exact for what is known of the curve: straight lines between the logged epochs. Units: score times epochs.

    Raises:
        ValueError: If the window is empty or not covered by the log.

    Example:
        >>> area(([100, 200, 400], [60.0, 70.0, 74.0]), 100, 400, reference=60.0)
        2900.0
    """
    epochs, scores = _window(curve, start, end, interpolate)
    above = scores - reference
    return float(np.dot(np.diff(epochs), (above[1:] + above[:-1]) / 2))


def ratio_of_areas(
    numerator: float, denominator: float, reference: float, *, span: float, width: float, noise: float = 0.0
) -> Ratio:
    """Divide two areas above one reference, unless the baseline's gain says nothing.

    Args:
        numerator: Area of the target.
        denominator: Area of the baseline.
        reference: What was subtracted from both.
        span: Largest distance of any score of either curve from the reference; sets how small a gain may be.
        width: Length of the window.
        noise: A mean gain of the baseline up to this many score units counts as none.

    Example:
        >>> ratio_of_areas(5.0, 0.0, 60.0, span=1.0, width=100.0).reason
        "the baseline's gain is not positive: its area above the reference 60 is 0"
    """
    reason = None
    mean_gain = denominator / width
    # Sums of numbers of this size carry rounding errors of about this much: below it even the sign means nothing.
    rounding = 8 * float(np.finfo(np.float64).eps) * (abs(reference) + span)
    if denominator <= 0:
        reason = f"the baseline's gain is not positive: its area above the reference {reference:g} is {denominator:.6g}"
    elif mean_gain <= max(noise, span / LARGEST_RATIO, rounding):
        reason = (
            f"the baseline's gain is within noise of zero: its mean above the reference {reference:g}"
            f" is only {mean_gain:.2g}"
        )
    return Ratio(numerator, denominator, reference, reason)


def rauc(
    baseline: Any,
    target: Any,
    start: float,
    end: float,
    *,
    reference: float | None = None,
    interpolate: bool = False,
    noise: float = 0.0,
) -> Ratio:
    r"""Relative area under the curve, Eq. (6): 1 = no gain, 1.3 = 30 % more area gained than the baseline.

    .. math::
        \mathrm{RAUC}(S_1, S_2; E_1, E_2) =
        \frac{\int_{E_1}^{E_2} (S_2(E) - S_1(E_1))\,dE}{\int_{E_1}^{E_2} (S_1(E) - S_1(E_1))\,dE}

    The paper prints no rule for a baseline that gains nothing. Here the ratio is then NaN with a ``reason``, also when
    the gain is so small beside the scores' span that the ratio could exceed ``LARGEST_RATIO``.

    Args:
        baseline: S1, in any form that :func:`curve_points` reads.
        target: S2.
        start: E1, a logged epoch of both curves unless ``interpolate``.
        end: E2.
        reference: Subtracted from both instead of S1(E1).
        interpolate: Allow E1 and E2 between logged epochs.
        noise: A mean gain of the baseline up to this many score units counts as none.

    Returns:
        A float that also has ``numerator``, ``denominator``, ``reference`` and ``reason``.

    Raises:
        ValueError: If a curve is unusable or does not cover the window.

    Example:
        >>> mae = [400, 800], [57.4, 63.9]  # linear evaluation, Table 2
        >>> mto = [400, 800], [63.6, 64.8]
        >>> round(rauc(mae, mto, 400, 800), 2)
        2.09
        >>> rauc(mae, mae, 400, 800)
        Ratio(1.0)
    """
    one, two = _window(baseline, start, end, interpolate), _window(target, start, end, interpolate)
    level = float(one.scores[0]) if reference is None else float(reference)
    if not math.isfinite(level):
        raise ValueError(f"reference must be finite, got {level}")
    return ratio_of_areas(
        area(two, start, end, reference=level),
        area(one, start, end, reference=level),
        level,
        span=float(np.abs(np.concatenate([one.scores, two.scores]) - level).max()),
        width=end - start,
        noise=noise,
    )


def reference_for(ratio: float, baseline: Any, target: Any, start: float, end: float) -> float:
    """The reference with which Eq. (6) would give ``ratio``: what a printed RAUC says about an unprinted curve.

    Raises:
        ValueError: If ``ratio`` is 1, which no reference (equal areas: every reference) gives.

    Example:
        >>> round(reference_for(1.23, ([400, 800], [57.4, 63.9]), ([400, 800], [63.6, 64.8]), 400, 800), 2)
        45.22
    """
    if ratio == 1:
        raise ValueError("ratio must differ from 1, which is reached in the limit of an infinitely low reference only")
    one, two = (area(curve, start, end) / (end - start) for curve in (baseline, target))
    return (two - ratio * one) / (1 - ratio)


def area_difference(baseline: Any, target: Any, start: float, end: float, *, interpolate: bool = False) -> float:
    """Area between target and baseline, score times epochs; divided by the window's length it is the mean lead.

    Example:
        >>> area_difference(([0, 10], [50.0, 60.0]), ([0, 10], [52.0, 62.0]), 0, 10)
        20.0
    """
    one, two = _window(baseline, start, end, interpolate), _window(target, start, end, interpolate)
    return area(two, start, end) - area(one, start, end)


def final_gap(baseline: Any, target: Any, end: float, *, interpolate: bool = False) -> float:
    """How far the target is ahead at the window's end, in score units."""
    return score_at(target, end, interpolate=interpolate) - score_at(baseline, end, interpolate=interpolate)


def epochs_to_score(curve: Any, score: float, *, end: float = math.inf) -> float | None:
    """The epoch at which a curve first reaches ``score``, on the line between logged epochs; None if it never does.

    Looks from the first logged epoch to ``end``, so a curve that starts above gives its first logged epoch.

    Example:
        >>> epochs_to_score(([100, 200, 300], [60.0, 70.0, 74.0]), 72.0)
        250.0
    """
    epochs, scores = curve_points(curve)
    reached = np.flatnonzero((scores >= score) & (epochs <= end))
    if not reached.size:
        beyond = np.flatnonzero((scores >= score) & (epochs > end))
        if not beyond.size or beyond[0] == 0 or epochs[beyond[0] - 1] >= end:
            return None
        reached = beyond  # the line may still cross before an end that lies between two logged epochs
    at = int(reached[0])
    if at == 0:
        return float(epochs[0])
    low, high = scores[at - 1], scores[at]
    epoch = float(epochs[at - 1] + (epochs[at] - epochs[at - 1]) * ((score - low) / (high - low)))
    return epoch if epoch <= end else None


def share_saved(reached: float, end: float, *, origin: float = 0.0) -> float:
    """Share of the training that a target saves by reaching the baseline's final score early (section 5.3).

    Args:
        reached: Where the target has the baseline's final score.
        end: Where the baseline has it.
        origin: Where training starts on this axis: 0, or -1 for logs that call the first epoch 0.

    Example:
        >>> round(share_saved(368, 800), 2)  # the paper's "54 %" for SimMIM
        0.54
    """
    if not origin < end:
        raise ValueError(f"end must lie after the start of training at {origin:g}, got {end:g}")
    return 1 - (reached - origin) / (end - origin)


def crossings(baseline: Any, target: Any, start: float, end: float, *, interpolate: bool = False) -> list[float]:
    """Where the lead changes hands inside a window, in order; empty if one of the two stays ahead throughout.

    Example:
        >>> crossings(([0, 10], [50.0, 60.0]), ([0, 10], [48.0, 62.0]), 0, 10)
        [5.0]
    """
    one, two = _window(baseline, start, end, interpolate), _window(target, start, end, interpolate)
    same = np.array_equal(one.epochs, two.epochs)  # a union sorts, which takes long for logs of every step
    epochs = one.epochs if same else np.union1d(one.epochs, two.epochs)
    lead = np.interp(epochs, *two) - np.interp(epochs, *one)
    epochs, lead = epochs[lead != 0], lead[lead != 0]  # touching without passing is no change of hands
    at = np.flatnonzero(np.sign(lead[1:]) != np.sign(lead[:-1]))
    share = lead[at] / (lead[at] - lead[at + 1])
    places: list[float] = (epochs[at] + share * (epochs[at + 1] - epochs[at])).tolist()
    return places


def _step_areas(curve: Points, reference: float) -> tuple[float, float]:
    """Smallest and largest area under a curve that is monotone between each two corners."""
    above, widths = curve.scores - reference, np.diff(curve.epochs)
    ends = np.stack([above[:-1], above[1:]])
    return float(np.dot(widths, ends.min(axis=0))), float(np.dot(widths, ends.max(axis=0)))


def monotone_bounds(
    baseline: Any,
    target: Any,
    start: float,
    end: float,
    *,
    reference: float | None = None,
    interpolate: bool = False,
) -> tuple[float | None, float | None]:
    """The smallest and largest RAUC that the logged points allow if nothing is known between them but direction.

    Every curve through the points that is monotone between neighbours lies between two staircases; the trapezoid of
    Eq. (6) lies inside. ``None`` marks a side without a bound, because the baseline's lower staircase gains nothing
    (always so for two points: log more epochs).

    Example:
        >>> low, high = monotone_bounds(([0, 1, 2], [0.0, 6.0, 8.0]), ([0, 1, 2], [0.0, 7.0, 9.0]), 0, 2)
        >>> round(low, 3), round(high, 3)
        (0.5, 2.667)
    """
    one, two = _window(baseline, start, end, interpolate), _window(target, start, end, interpolate)
    level = float(one.scores[0]) if reference is None else reference
    (den_low, den_high), (num_low, num_high) = _step_areas(one, level), _step_areas(two, level)
    if den_high <= 0:
        return None, None
    low = num_low / den_high if num_low >= 0 else (num_low / den_low if den_low > 0 else None)
    high = num_high / den_high if num_high < 0 else (num_high / den_low if den_low > 0 else None)
    return low, high
