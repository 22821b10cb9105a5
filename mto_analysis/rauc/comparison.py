"""A target method against its baseline over all seeds: RAUC, its error bars, and the measures beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.errors import DataError
from mto_analysis.rauc.areas import (
    Points,
    area,
    crossings,
    curve_points,
    epochs_to_score,
    monotone_bounds,
    ratio_of_areas,
    score_at,
    share_saved,
)
from mto_analysis.rauc.curves import CurveTable
from mto_analysis.rauc.intervals import (
    BOOTSTRAP_SEED,
    Interval,
    Moments,
    bca_paired,
    bca_unpaired,
    difference_interval,
    fieller,
    no_interval,
    one_seed,
    paired_moments,
    saved_interval,
    unpaired_moments,
)

Pairing = Literal["auto", "seed", "none"]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One baseline, one target, one window.

    Attributes:
        rauc: Eq. (6), mean numerator over mean denominator of the runs; None where undefined, see ``reason``.
        reason: Why it is undefined.
        numerator: Area of the target above the reference, mean over runs; score times epochs.
        denominator: The same of the baseline.
        reference: What was subtracted, S1(E1) unless given.
        reference_given: Whether it was given.
        interval: Fieller's, or why there is none.
        bootstrap: BCa over whole runs, or why there is none.
        area_difference: Area between the two curves.
        mean_lead: That area divided by the window's length, in score units.
        mean_lead_interval: Student's interval over pairs or Welch's over runs, or why there is none.
        final_baseline: The baseline's mean score at the end.
        final_gap: How far the target is ahead there.
        final_gap_interval: Student's or Welch's, or why there is none.
        epochs_to_final: Where the target first has the baseline's final score; None if it never has.
        share_saved: The share of training that this saves.
        share_saved_interval: Shares that a t test over the runs keeps, or why there is none.
        crossings: Where the lead changes hands.
        bounds: Smallest and largest RAUC of any curves monotone between the points; None is no bound.
        seeds_baseline: Labels of the baseline's runs, and
        seeds_target: of the target's.
        paired: Whether runs were paired by seed.
        pairing: How runs belong together and why, in words.
        notes: What else a reader should know.
    """

    baseline: str
    target: str
    start: float
    end: float
    rauc: float | None
    reason: str | None
    numerator: float
    denominator: float
    reference: float
    reference_given: bool
    interval: Interval
    bootstrap: Interval
    area_difference: float
    mean_lead: float
    mean_lead_interval: Interval
    final_baseline: float
    final_gap: float
    final_gap_interval: Interval
    epochs_to_final: float | None
    share_saved: float | None
    share_saved_interval: Interval
    crossings: tuple[float, ...]
    bounds: tuple[float | None, float | None]
    seeds_baseline: tuple[str, ...]
    seeds_target: tuple[str, ...]
    paired: bool
    pairing: str
    group: Mapping[str, str]
    notes: tuple[str, ...] = ()


def _runs(curves: Any, name: str) -> dict[str, Points]:
    """Runs by seed from a tidy frame with or without ``seed``, a mapping of runs, or a single run."""
    if hasattr(curves, "columns") and "seed" in curves.columns:
        return {str(seed): curve_points(run, name) for seed, run in curves.groupby("seed", sort=False, observed=True)}
    by_seed = isinstance(curves, Mapping) and not {"epoch", "score"} <= set(curves)
    if by_seed and not all(np.isscalar(value) for value in curves.values()):
        return {str(seed): curve_points(run, f"{name}, seed {seed}") for seed, run in curves.items()}
    return {"": curve_points(curves, name)}


def shared_epochs(runs: Collection[Points]) -> Vector:
    """Every epoch that one of the runs logged and all of them cover, rising."""
    first, last = max(run.epochs[0] for run in runs), min(run.epochs[-1] for run in runs)
    epochs = np.unique(np.concatenate([run.epochs for run in runs]))
    return np.asarray(epochs[(epochs >= first) & (epochs <= last)])


def mean_curve(runs: Mapping[str, Points]) -> Points:
    """Mean over runs, at every epoch that one of them logged and all of them cover."""
    epochs = shared_epochs(runs.values())
    if not epochs.size:
        raise ValueError("the runs have no epoch in common")
    return Points(epochs, scores_at(runs, epochs).mean(axis=0))


def compare(
    baseline: Any,
    target: Any,
    start: float,
    end: float,
    *,
    reference: float | None = None,
    interpolate: bool = False,
    confidence: float = 0.95,
    pairing: Pairing = "auto",
    noise: float = 0.0,
    origin: float = 0.0,
    names: tuple[str, str] = ("baseline", "target"),
    group: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare two methods inside one window, each with one run or several.

    Runs are paired by seed on request, or when those of a seed start from one score, which shows that they share
    their initial weights: an equal name alone shows nothing. Otherwise all runs of both count and the interval knows
    that S1(E1) stands in numerator and denominator.

    Args:
        baseline: Runs of the baseline: a tidy frame with ``seed``, a mapping from seed to curve, or one curve.
        target: Runs of the target.
        start: E1.
        end: E2.
        reference: Subtracted from both instead of S1(E1).
        interpolate: Allow E1 and E2 between logged epochs.
        confidence: Nominal coverage of the intervals.
        pairing: ``auto`` pairs runs that share what pairing needs, ``seed`` those of equal names (and leaves out the
            others), ``none`` no runs.
        noise: A mean gain of the baseline up to this many score units counts as none.
        origin: Where training starts on the epoch axis; see :func:`mto_analysis.rauc.areas.share_saved`.
        names: What to call the two.
        group: Values of the grouping columns, for the record.

    Example:
        >>> mae = {0: ([0, 50, 100], [50.0, 60.0, 64.0]), 1: ([0, 50, 100], [50.4, 60.1, 64.3])}
        >>> mto = {0: ([0, 50, 100], [51.0, 63.0, 66.0]), 1: ([0, 50, 100], [51.2, 63.3, 66.5])}
        >>> result = compare(mae, mto, 0, 100)
        >>> round(result.rauc, 2), str(result.interval), round(result.epochs_to_final, 1)
        (1.27, '[1.14, 1.40]', 66.1)
    """
    one, two, how, notes = _paired_runs(_runs(baseline, names[0]), _runs(target, names[1]), pairing, names)
    paired = how.startswith(_BY_SEED)
    width = end - start
    levels = [
        score_at(run, start, interpolate=interpolate) if reference is None else float(reference) for run in one.values()
    ]
    level = float(np.mean(levels))
    below = levels if paired else [level] * len(two)  # what each target run is measured above

    def areas(runs: Mapping[str, Points], references: Sequence[float]) -> Vector:
        above = zip(runs.values(), references, strict=True)
        return np.array([area(run, start, end, reference=each, interpolate=interpolate) for run, each in above])

    gains_one, gains_two = areas(one, levels), areas(two, below)
    numerator, denominator = float(gains_two.mean()), float(gains_one.mean())
    mean_one, mean_two = mean_curve(one), mean_curve(two)
    inside = np.concatenate([run.scores[(run.epochs >= start) & (run.epochs <= end)] for run in (mean_one, mean_two)])
    span = float(np.abs(inside - level).max(initial=0.0))
    ratio = ratio_of_areas(numerator, denominator, level, span=span, width=width, noise=noise)
    reason = ratio.reason

    areas_two, areas_one = gains_two + width * np.array(below), gains_one + width * np.array(levels)
    samples = (gains_two, gains_one) if paired else (areas_two, areas_one, width * np.array(levels))
    interval, bootstrap = _intervals(samples, paired, confidence)
    if reason is None and interval.kind in ("outside", "everything"):
        reason = f"the baseline's gain is within noise of zero over {interval.runs} seeds: {interval.reason}"
    if min(len(one), len(two)) > 1 and all(np.ptp(gains) == 0 for gains in (gains_one, gains_two)):
        notes.append("all seeds have the same scores: copies of one run?")

    final = score_at(mean_one, end, interpolate=True)
    finals_one, finals_two = (
        np.array([score_at(run, end, interpolate=True) for run in runs.values()]) for runs in (one, two)
    )
    reached = epochs_to_score(mean_two, final, end=end)
    places = np.append(mean_two.epochs[mean_two.epochs < end], end)
    options: dict[str, Any] = {"paired": paired, "confidence": confidence}
    notes += _cautions(mean_one, mean_two, (start, end), final, reached, None if reason else denominator / width)
    return Comparison(
        baseline=names[0],
        target=names[1],
        start=float(start),
        end=float(end),
        rauc=None if reason else float(ratio),
        reason=reason,
        numerator=numerator,
        denominator=denominator,
        reference=level,
        reference_given=reference is not None,
        interval=interval,
        bootstrap=bootstrap,
        area_difference=numerator - denominator,
        mean_lead=(numerator - denominator) / width,
        mean_lead_interval=difference_interval(areas_two / width, areas_one / width, **options),
        final_baseline=final,
        final_gap=score_at(mean_two, end, interpolate=True) - final,
        final_gap_interval=difference_interval(finals_two, finals_one, **options),
        epochs_to_final=reached,
        share_saved=None if reached is None or end <= origin else share_saved(reached, end, origin=origin),
        share_saved_interval=saved_interval(
            places, scores_at(two, places), finals_one, end=end, origin=origin, **options
        ),
        crossings=tuple(crossings(mean_one, mean_two, start, end, interpolate=True)),
        bounds=(None, None)
        if reason
        else monotone_bounds(mean_one, mean_two, start, end, reference=level, interpolate=True),
        seeds_baseline=tuple(one),
        seeds_target=tuple(two),
        paired=paired,
        pairing=how,
        group=dict(group or {}),
        notes=tuple(notes),
    )


#: How every description of paired runs begins.
_BY_SEED = "by seed"


def _paired_runs(
    one: dict[str, Points], two: dict[str, Points], pairing: Pairing, names: tuple[str, str]
) -> tuple[dict[str, Points], dict[str, Points], str, list[str]]:
    """The runs that count, in one order where they pair; how they do, in words; what a reader should know of it."""
    shared = [seed for seed in one if seed in two]
    if pairing == "seed" and not shared:
        raise ValueError(f"no seed pairs: {names[0]} has {', '.join(one)}, {names[1]} has {', '.join(two)}")
    same = set(one) == set(two)
    if pairing == "seed" or (pairing == "auto" and same and _share_their_start(one, two)):
        dropped = len(one) + len(two) - 2 * len(shared)
        notes = [f"{dropped} runs without a partner were left out"] if dropped else []
        why = "requested" if pairing == "seed" else "runs of a seed start from the same score"
        notes += [f"runs are paired by seed, because {why}"] if pairing == "auto" else []
        how = f"{_BY_SEED} ({why})"
        return {seed: one[seed] for seed in shared}, {seed: two[seed] for seed in shared}, how, notes
    if pairing == "none":
        return one, two, "none (requested)", []
    if max(len(one), len(two)) < 2:
        return one, two, "none (one run each)", []
    if same:
        told = "seeds have equal names, but nothing shows that runs of a seed share anything; --pairing seed pairs them"
        return one, two, "none (equal names only)", [f"{told}: the interval is the unpaired one"]
    told = f"seeds do not pair ({len(one)} and {len(two)} runs): the interval is the unpaired one"
    return one, two, "none (different seeds)", [told]


def _share_their_start(one: Mapping[str, Points], two: Mapping[str, Points]) -> bool:
    """Whether the runs of each seed start from one score, and no two seeds from the same.

    Runs from equal initial weights are equally good before training, to the last digit. Chance level or a common
    checkpoint gives several seeds the same score, which says nothing about a pair.
    """
    starts = {seed: run.scores[0] for seed, run in one.items()}
    same = all(starts[seed] == run.scores[0] for seed, run in two.items())
    return same and len(set(starts.values())) == len(starts) > 1


def scores_at(runs: Mapping[str, Points], epochs: Vector) -> Vector:
    """Scores of every run at these epochs, ``(runs, epochs)``."""
    return np.array([np.interp(epochs, *run) for run in runs.values()])


def _cautions(
    one: Points, two: Points, window: tuple[float, float], final: float, reached: float | None, mean_gain: float | None
) -> list[str]:
    """What the mean curves do that the numbers alone would hide."""
    start, end = window
    notes = []
    if reached is not None and reached == two.epochs[0]:
        notes.append("the target has the baseline's final score from its first logged epoch on: it may save more")
    if reached is not None and (two.scores[(two.epochs > reached) & (two.epochs <= end)] < final).any():
        notes.append("the target falls below the baseline's final score again after it first reached it")
    fall = float(np.max(-np.diff(one.scores[(one.epochs >= start) & (one.epochs <= end)]), initial=0.0))
    if mean_gain is not None and fall > mean_gain:
        notes.append(f"the baseline falls by {fall:.3g} inside the window, more than its mean gain: a fragile ratio")
    return notes


def _intervals(samples: Sequence[Vector], paired: bool, confidence: float) -> tuple[Interval, Interval]:
    """Fieller's interval and the bootstrap over whole runs; neither where a side has one run.

    Samples are those of :func:`paired_moments` or :func:`unpaired_moments`.
    """
    target, baseline = samples[0].size, samples[1].size
    if min(target, baseline) < 2:
        said, how = one_seed(target, baseline), "paired by seed" if paired else "unpaired"
        return (
            no_interval(f"Fieller, {how}", said, confidence, 1),
            no_interval(f"BCa bootstrap of whole runs, {how}", said, confidence, 1),
        )
    moments: Callable[..., Moments] = paired_moments if paired else unpaired_moments
    bca: Callable[..., Interval] = bca_paired if paired else bca_unpaired
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    return fieller(moments(*samples), confidence), bca(*samples, generator, confidence=confidence)


def common_window(table: CurveTable, methods: Iterable[str]) -> tuple[float, float]:
    """The longest window whose ends every run of these methods has logged, in every group that has them."""
    keys = ["seed", *table.groups]
    logged = []
    for method in methods:
        table.runs(method)  # refuses a method that is not there
        rows = table.frame[table.frame["method"] == method]
        logged += [run["epoch"].to_numpy(dtype=float) for _, run in rows.groupby(keys, sort=False, observed=True)]
    shared = logged[0]
    for epochs in logged[1:]:
        shared = np.intersect1d(shared, epochs)
    if shared.size < 2:
        raise DataError("the runs share fewer than two logged epochs; give --start and --end, and --interpolate")
    first, last = max(each.min() for each in logged), min(each.max() for each in logged)
    if 2 * (shared[-1] - shared[0]) < last - first:
        raise DataError(
            f"all runs cover {first:g} to {last:g}, but the {table.axis} is logged by all of them from {shared[0]:g} to"
            f" {shared[-1]:g} only; give --start and --end, and --interpolate"
        )
    return float(shared[0]), float(shared[-1])


def compare_methods(
    table: CurveTable, pairs: Sequence[tuple[str, str]], windows: Sequence[tuple[float, float]], **options: Any
) -> list[Comparison]:
    """Every pair of methods in every window (and group), in that order: the rows of the paper's Table 1."""
    results = []
    for baseline, target in pairs:
        for group in _groups(table, baseline, target):
            one, two = table.runs(baseline, group), table.runs(target, group)
            for start, end in windows:
                try:
                    results.append(
                        compare(
                            one, two, start, end, origin=table.origin, names=(baseline, target), group=group, **options
                        )
                    )
                except ValueError as error:
                    raise DataError(f"{target} against {baseline} from {start:g} to {end:g}: {error}") from error
    return results


def _groups(table: CurveTable, baseline: str, target: str) -> list[dict[str, str]]:
    """Values of the grouping columns that both methods have."""
    if not table.groups:
        return [{}]
    columns = list(table.groups)
    has = [
        table.frame.loc[table.frame["method"] == method, columns].drop_duplicates().itertuples(index=False, name=None)
        for method in (baseline, target)
    ]
    first, second = list(has[0]), set(has[1])
    shared = [dict(zip(columns, map(str, values), strict=True)) for values in first if values in second]
    if not shared:
        raise DataError(f"{baseline} and {target} share no value of {', '.join(columns)}")
    return shared


def thinned(epochs: Vector, most: int) -> Vector:
    """At most so many of these epochs, spread evenly over them; the first and the last stay."""
    if epochs.size <= most:
        return epochs
    return np.asarray(epochs[np.unique(np.linspace(0, epochs.size - 1, most).round().astype(int))])


def window_grid(
    baseline: Any,
    target: Any,
    *,
    reference: float | None = None,
    paired: bool = False,
    confidence: float = 0.95,
    noise: float = 0.0,
    most: int = 60,
) -> pd.DataFrame:
    """RAUC for every window between epochs that both mean curves have: how much does the choice of window matter?

    Args:
        baseline: Runs of the baseline, as for :func:`compare`.
        target: Runs of the target.
        reference: Subtracted from both instead of S1(E1).
        paired: Whether runs of equal seeds are pairs; then both must have the same seeds.
        confidence: Nominal coverage of Fieller's interval.
        noise: A mean gain of the baseline up to this many score units counts as none.
        most: At most this many epochs, spread evenly over those logged.

    Returns:
        Tidy table ``start end rauc low high gain``: NaN where undefined, no interval where a side has one run, and the
        baseline's mean gain in score units.

    Example:
        >>> grid = window_grid(([0, 50, 100], [50.0, 60.0, 64.0]), ([0, 50, 100], [52.0, 63.0, 66.0]))
        >>> grid[["start", "end", "rauc", "gain"]].round(2)
           start    end  rauc  gain
        0    0.0   50.0  1.50   5.0
        1    0.0  100.0  1.29   8.5
        2   50.0  100.0  2.25   2.0
    """
    one, two = _runs(baseline, "baseline"), _runs(target, "target")
    two = {seed: two[seed] for seed in one} if paired else two
    mean_one, mean_two = mean_curve(one), mean_curve(two)
    epochs = np.intersect1d(mean_one.epochs, mean_two.epochs)
    if epochs.size < 2:
        raise ValueError("baseline and target share fewer than two epochs")
    epochs = thinned(epochs, most)
    levels, below_one, below_two = scores_at(one, epochs), _areas_below(one, epochs), _areas_below(two, epochs)
    if reference is not None:
        levels = np.full_like(levels, reference)
    rows = []
    for first, last in combinations(range(epochs.size), 2):
        start, end = float(epochs[first]), float(epochs[last])
        areas_one, areas_two = (below[:, last] - below[:, first] for below in (below_one, below_two))
        under = (end - start) * levels[:, first]
        level = float(levels[:, first].mean())
        inside = [run.scores[(run.epochs >= start) & (run.epochs <= end)] for run in (mean_one, mean_two)]
        ratio = ratio_of_areas(
            float(areas_two.mean() - under.mean()), float((areas_one - under).mean()), level,
            span=float(np.abs(np.concatenate(inside) - level).max()), width=end - start, noise=noise,
        )  # fmt: skip
        value, low, high = float(ratio), math.nan, math.nan
        if min(len(one), len(two)) > 1:
            interval = fieller(
                paired_moments(areas_two - under, areas_one - under)
                if paired
                else unpaired_moments(areas_two, areas_one, under),
                confidence,
            )
            if interval.kind == "bounded" and interval.low is not None and interval.high is not None:
                low, high = interval.low, interval.high
            else:
                value = math.nan
        rows.append((start, end, value, low, high, ratio.denominator / (end - start)))
    return pd.DataFrame(rows, columns=["start", "end", "rauc", "low", "high", "gain"])


def _areas_below(runs: Mapping[str, Points], epochs: Vector) -> Vector:
    """Area under each run from the first of these epochs to each of them, ``(runs, epochs)``."""
    found = []
    for run in runs.values():
        corners = np.union1d(epochs, run.epochs[(run.epochs > epochs[0]) & (run.epochs < epochs[-1])])
        scores = np.interp(corners, *run)
        steps = np.diff(corners) * (scores[1:] + scores[:-1]) / 2
        found.append(np.append(0.0, np.cumsum(steps))[np.searchsorted(corners, epochs)])
    return np.array(found)
