r"""Intervals over runs: of a ratio of means, of a difference of means, and of the training that a target saves.

The unit is the run (a seed), never the epoch: epochs of one run share its luck, and resampling them promises a
precision that nobody has (``benchmarks/rauc_coverage.py`` shows by how much). RAUC over several runs is the mean of
their numerators over the mean of their denominators, hence Fieller's interval and the BCa bootstrap of a ratio of
means.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mto_analysis.rauc.areas import LARGEST_RATIO, Points, epochs_to_score, share_saved
from mto_analysis.runtime.statistics import reach_of_mean, t_quantile

Vector = NDArray[np.float64]

#: Below this many runs the bootstrap has too few distinct samples to say anything (4 runs: 35).
FEWEST_RUNS_TO_RESAMPLE = 5

#: Seed of every bootstrap: the same logs give the same interval.
BOOTSTRAP_SEED = 0
#: How many resamples an interval is made from.
RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """A set of plausible values, or the plain statement that there is none.

    Attributes:
        method: How it was made.
        kind: ``bounded`` (low to high), ``above`` (from low on), ``below`` (up to high), ``outside`` (everything except
            low to high), ``everything`` or ``none``.
        low: Lower end, where there is one.
        high: Upper end, where there is one.
        confidence: Nominal coverage, 0 to 1.
        runs: Number of independent units (pairs, or runs of the smaller side).
        reason: Why there is no bounded interval.
    """

    method: str
    kind: str
    low: float | None
    high: float | None
    confidence: float
    runs: int
    reason: str | None = None

    @classmethod
    def between(cls, method: str, low: float | None, high: float | None, confidence: float, runs: int) -> Interval:
        """From low to high, either of which may be missing: the interval then has no end there."""
        low, high = (None if end is None or math.isinf(end) else float(end) for end in (low, high))
        kind = {(True, True): "bounded", (True, False): "above", (False, True): "below", (False, False): "everything"}
        return cls(method, kind[low is not None, high is not None], low, high, confidence, runs)

    def __str__(self) -> str:
        """The interval in words a table can hold, with as many digits as its width supports."""
        return self.words()

    def words(self, scale: float = 1.0) -> str:
        """The interval as text.

        Args:
            scale: Both ends are multiplied by it: 100 for a share in percent.
        """
        low, high = (None if x is None else self._rounded(scale * x, scale) for x in (self.low, self.high))
        texts = {
            "bounded": f"[{low}, {high}]",
            "above": f"at least {low}",
            "below": f"at most {high}",
            "outside": f"unbounded: all but {low} to {high}",
            "everything": "unbounded",
        }
        return texts.get(self.kind, f"no interval: {self.reason}")

    def around(self, value: float, *, scale: float = 1.0, sign: str = "", default: str = ".3g") -> str:
        """A value that this interval belongs to, with as many digits as the interval supports.

        Args:
            value: The point estimate.
            scale: It is multiplied by this.
            sign: ``+`` writes the sign of positive values as well.
            default: Format where the interval has no width to go by.
        """
        number = scale * value
        return f"{number:{sign}{default}}" if self._width is None else self._rounded(number, scale, sign)

    @property
    def _width(self) -> float | None:
        return abs(self.high - self.low) if self.low is not None and self.high is not None else None

    def _rounded(self, number: float, scale: float, sign: str = "") -> str:
        width = self._width
        # Ends that differ by rounding errors only have no width to go by.
        if width is None or width <= 1e-9 * max(abs(self.low or 0.0), abs(self.high or 0.0)):
            return f"{number:{sign}.3g}"
        return f"{number:{sign}z.{decimals(scale * width)}f}"


def decimals(width: float) -> int:
    """Decimal places of an interval's ends: two significant digits of its width, and one place below a width of 100.

    Example:
        >>> decimals(0.17), decimals(32.0), decimals(0.0042)
        (2, 1, 4)
    """
    return max(1 - math.floor(math.log10(width)), 1 if width < 100 else 0)


@dataclass(frozen=True)
class Moments:
    """Two means, the covariance of these means, and the degrees of freedom behind it."""

    numerator: float
    denominator: float
    var_numerator: float
    var_denominator: float
    covariance: float
    freedom: float
    runs: int
    method: str


def no_interval(method: str, reason: str, confidence: float, runs: int) -> Interval:
    """One seed, or too few: said, not guessed."""
    return Interval(method, "none", None, None, confidence, runs, reason)


def paired_moments(numerators: ArrayLike, denominators: ArrayLike) -> Moments:
    """Means over runs whose numerator and denominator belong together (same seed).

    Example:
        >>> paired_moments([4.0, 6.0], [2.0, 4.0]).covariance
        1.0
    """
    y, x = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if y.shape != x.shape or y.ndim != 1 or y.size < 2:
        raise ValueError(f"numerators and denominators must pair over two or more runs, got {y.shape} and {x.shape}")
    cov = np.cov(y, x) / y.size
    return Moments(
        float(y.mean()), float(x.mean()), float(cov[0, 0]), float(cov[1, 1]), float(cov[0, 1]),
        y.size - 1, y.size, "Fieller, paired by seed",
    )  # fmt: skip


def unpaired_moments(target_areas: ArrayLike, baseline_areas: ArrayLike, reference_areas: ArrayLike) -> Moments:
    r"""Means over independent runs, with the covariance that the shared reference S1(E1) brings.

    Per run, :math:`A = \int S\,dE` and :math:`R = S_1(E_1)(E_2 - E_1)`: numerator :math:`\bar A_2 - \bar R`,
    denominator :math:`\bar A_1 - \bar R`. R comes from the baseline's runs and stands in both, hence the covariance
    :math:`-\mathrm{cov}(R, A_1 - R) / n_1`. Degrees of freedom after Welch and Satterthwaite, for the variance of
    numerator minus ratio times denominator at the point estimate.

    Args:
        target_areas: A2 per target run.
        baseline_areas: A1 per baseline run.
        reference_areas: R per baseline run; constant for an explicit reference.
    """
    a2, a1, r = (np.asarray(x, dtype=np.float64) for x in (target_areas, baseline_areas, reference_areas))
    if min(a2.size, a1.size) < 2 or a1.shape != r.shape:
        raise ValueError(f"each side must have two or more runs, got {a2.size} and {a1.size} (references: {r.size})")
    numerator, denominator = float(a2.mean() - r.mean()), float((a1 - r).mean())
    cov = np.cov(r, a1 - r) / a1.size
    target = float(a2.var(ddof=1) / a2.size)
    # A ratio beyond all measure, whose square would overflow, is undefined: its degrees of freedom do not matter.
    ratio = numerator / denominator if abs(denominator) * LARGEST_RATIO**2 > abs(numerator) else 0.0
    baseline = float((r + ratio * (a1 - r)).var(ddof=1) / a1.size)
    freedom = float(_welch_freedom(np.array(target), np.array(baseline), a2.size, a1.size))
    return Moments(
        numerator, denominator, target + float(cov[0, 0]), float(cov[1, 1]), -float(cov[0, 1]),
        freedom, min(a1.size, a2.size), "Fieller, unpaired",
    )  # fmt: skip


def _welch_freedom(first: Vector, second: Vector, first_runs: int, second_runs: int) -> Vector:
    """Degrees of freedom after Welch and Satterthwaite, from the variances of two means.

    By their shares, as squares of variances of large scores overflow. Where no run differs from another, which Welch
    divides 0 by 0 for, those of the smaller side.
    """
    both = first + second
    share = np.divide(first, both, out=np.ones_like(both), where=both > 0)
    freedom = 1 / (share**2 / (first_runs - 1) + (1 - share) ** 2 / (second_runs - 1))
    return np.asarray(np.where(both > 0, freedom, min(first_runs, second_runs) - 1))


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean over runs.

    Example:
        >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        raise ValueError(f"values must come from two or more runs, got {x.size}")
    half = float(x.std(ddof=1) * reach_of_mean(x.size, confidence))
    return float(x.mean()) - half, float(x.mean()) + half


def difference_band(
    target: ArrayLike, baseline: ArrayLike, *, paired: bool, confidence: float = 0.95
) -> tuple[Vector, Vector, Vector]:
    """Difference of two means over runs, and the ends of its interval, for each of several quantities.

    Student's t over the differences of pairs, or Welch's over runs that do not pair.

    Args:
        target: ``(runs, quantities)``, two runs or more.
        baseline: ``(runs, quantities)`` or ``(runs, 1)``; as many runs where they pair, in the same order.
        paired: Whether row i of both is one pair.
        confidence: Nominal coverage of each interval.

    Returns:
        Difference, lower and upper end, ``(quantities,)`` each.

    Example:
        >>> band = difference_band([[3.0], [4.0], [5.0]], [[1.0], [2.5], [2.5]], paired=True)
        >>> [float(x.round(2)[0]) for x in band]
        [2.0, 0.76, 3.24]
    """
    two, one = np.asarray(target, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    middle = two.mean(axis=0) - one.mean(axis=0)
    if paired:
        freedom: ArrayLike = len(two) - 1
        variance = (two - one).var(axis=0, ddof=1) / len(two)
    else:
        parts = two.var(axis=0, ddof=1) / len(two), one.var(axis=0, ddof=1) / len(one)
        variance = parts[0] + parts[1]
        freedom = _welch_freedom(*parts, len(two), len(one))
    half = t_quantile(freedom, confidence) * np.sqrt(variance)
    return middle, middle - half, middle + half


def difference_interval(target: ArrayLike, baseline: ArrayLike, *, paired: bool, confidence: float = 0.95) -> Interval:
    """Interval of the difference of two means over runs, as of the final gap and of the mean lead.

    Example:
        >>> str(difference_interval([3.0, 4.0, 5.0], [1.0, 2.5, 2.5], paired=True))
        '[0.8, 3.2]'
        >>> str(difference_interval([3.0], [1.0], paired=True))
        'no interval: one seed'
    """
    two, one = np.asarray(target, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    runs = min(two.size, one.size)
    method = "Student, paired by seed" if paired else "Welch, unpaired"
    if runs < 2:
        return no_interval(method, one_seed(two.size, one.size), confidence, runs)
    _, low, high = difference_band(two[:, None], one[:, None], paired=paired, confidence=confidence)
    return Interval.between(method, low[0], high[0], confidence, runs)


def one_seed(target: int, baseline: int) -> str:
    """Why so many runs of both have no interval."""
    return "one seed" if target == baseline else "one side has one seed"


def saved_interval(
    epochs: Vector,
    target: ArrayLike,
    finals: ArrayLike,
    *,
    end: float,
    origin: float = 0.0,
    paired: bool,
    confidence: float = 0.95,
) -> Interval:
    r"""Interval of the share of training that a target saves, by inverting a t test as Fieller's does.

    An epoch e is kept when a t test over the runs cannot reject :math:`S_2(e) = S_1(E_2)`; the interval spans all kept
    epochs, as shares. It has no lower end where the target may not have the baseline's final score at :math:`E_2`
    yet, and no upper end where it may have had it before its first logged epoch.

    Args:
        epochs: Where the target's scores are, rising, the last one at ``end``.
        target: Its scores, ``(runs, epochs)``.
        finals: The baseline's score at ``end`` in each of its runs.
        end: E2.
        origin: Where training starts on this axis.
        paired: Whether the runs of both pair, in the given order.
        confidence: Nominal coverage.

    Example:
        >>> scores = [[60.0, 66.0, 70.0], [60.4, 66.2, 70.6], [59.8, 66.1, 70.1]]
        >>> str(saved_interval(np.array([0.0, 50.0, 100.0]), scores, [65.0, 65.4, 64.9], end=100, paired=True))
        '[0.544, 0.617]'
    """
    two, one = np.asarray(target, dtype=np.float64), np.asarray(finals, dtype=np.float64)
    runs = min(len(two), one.size)
    method = f"t test of the score at each epoch, {'paired by seed' if paired else 'unpaired'}"
    if runs < 2:
        return no_interval(method, one_seed(len(two), one.size), confidence, runs)
    if not origin < end:
        return no_interval(method, "training starts after the window's end", confidence, runs)
    _, low, high = difference_band(two, one[:, None], paired=paired, confidence=confidence)
    first = epochs_to_score(Points(epochs, high), 0.0)
    # The last epoch at which the lead is not sure is the first of the mirrored curve.
    last = epochs_to_score(Points(-epochs[::-1], -low[::-1]), 0.0)
    if first is None:
        return no_interval(method, "the baseline's final score is not reached", confidence, runs)
    most = None if first <= epochs[0] else share_saved(first, end, origin=origin)
    least = None if last == -end else share_saved(epochs[0] if last is None else -last, end, origin=origin)
    return Interval.between(method, least, most, confidence, runs)


def fieller(moments: Moments, confidence: float = 0.95) -> Interval:
    r"""Fieller's interval: all ratios :math:`\theta` that a t test of numerator minus :math:`\theta` denominator keeps.

    Unlike the usual error propagation it is exact for normal means however noisy the denominator is. When the
    denominator itself cannot be told from zero the set has no end, and that is the honest answer.

    Example:
        >>> str(fieller(paired_moments([4.0, 5.0, 6.0], [2.0, 2.5, 2.9])))
        '[1.85, 2.11]'
        >>> str(fieller(paired_moments([4.0, 5.0, 6.0], [-1.0, 0.1, 1.2])))
        'unbounded: all but -1.0 to 2.6'
    """
    y, x = moments.numerator, moments.denominator
    t2 = float(t_quantile(moments.freedom, confidence)) ** 2
    # theta is kept when a theta^2 - 2 b theta + c <= 0.
    a = x * x - t2 * moments.var_denominator
    b = x * y - t2 * moments.covariance
    c = y * y - t2 * moments.var_numerator
    root = b * b - a * c

    def interval(kind: str, low: float | None, high: float | None, reason: str | None) -> Interval:
        return Interval(moments.method, kind, low, high, confidence, moments.runs, reason)

    said = f"the baseline's gain cannot be told from zero at {100 * confidence:g} % confidence"
    if a > 0:
        half = math.sqrt(max(root, 0.0))
        low, high = (b - half) / a, (b + half) / a
        if math.isfinite(low) and math.isfinite(high):  # scores beyond all measure overflow here
            return interval("bounded", low, high, None)
    elif a < 0 and root > 0:
        half = math.sqrt(root)
        return interval("outside", (b + half) / a, (b - half) / a, said)
    return interval("everything", None, None, said)


def divide(numerators: Vector, denominators: Vector) -> Vector:
    """Ratios, infinite where the denominator is not positive.

    Example:
        >>> divide(np.array([3.0, 3.0]), np.array([2.0, -1.0])).tolist()
        [1.5, inf]
    """
    positive = denominators > 0
    return np.where(positive, numerators / np.where(positive, denominators, 1.0), math.inf)


def _bca(
    samples: tuple[Vector, ...],
    ratio: Callable[..., Vector],
    generator: np.random.Generator,
    *,
    paired: bool,
    confidence: float,
    resamples: int,
) -> Interval:
    from scipy.stats import bootstrap

    runs = min(sample.size for sample in samples)
    method = f"BCa bootstrap of whole runs, {'paired by seed' if paired else 'unpaired'}"
    if runs < FEWEST_RUNS_TO_RESAMPLE:
        needed = f"{runs} {'pairs' if paired else 'runs'}, {FEWEST_RUNS_TO_RESAMPLE} needed"
        return no_interval(method, needed, confidence, runs)
    # A resample without a gain of the baseline has an infinite ratio, which scipy's arithmetic turns into no number.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = bootstrap(
            samples,
            ratio,
            paired=paired,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=confidence,
            method="BCa",
            rng=generator,
        ).confidence_interval
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return Interval(method, "everything", None, None, confidence, runs, "resamples lose the baseline's gain")
    return Interval(method, "bounded", float(found.low), float(found.high), confidence, runs)


def bca_paired(
    numerators: ArrayLike,
    denominators: ArrayLike,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """BCa bootstrap that resamples whole pairs of runs (``scipy.stats.bootstrap``); none below five pairs.

    Example:
        >>> y, x = [4.0, 5.0, 6.0, 5.5, 4.8], [2.0, 2.5, 2.9, 2.8, 2.4]
        >>> str(bca_paired(y, x, np.random.default_rng(0)))
        '[1.983, 2.046]'
    """
    y, x = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)

    def ratio(top: Vector, bottom: Vector, axis: int = -1) -> Vector:
        return divide(top.mean(axis=axis), bottom.mean(axis=axis))

    return _bca((y, x), ratio, generator, paired=True, confidence=confidence, resamples=resamples)


def bca_unpaired(
    target_areas: ArrayLike,
    baseline_areas: ArrayLike,
    reference_areas: ArrayLike,
    generator: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """BCa bootstrap that resamples target and baseline runs apart, each baseline run with its own reference."""
    a2, a1, r = (np.asarray(x, dtype=np.float64) for x in (target_areas, baseline_areas, reference_areas))

    def ratio(target: Vector, baseline: Vector, axis: int = -1) -> Vector:
        rows = baseline.astype(np.int64)  # runs by number: an area and its reference stay together
        level = r[rows].mean(axis=axis)
        return divide(target.mean(axis=axis) - level, a1[rows].mean(axis=axis) - level)

    baseline = np.arange(a1.size, dtype=np.float64)
    return _bca((a2, baseline), ratio, generator, paired=False, confidence=confidence, resamples=resamples)
