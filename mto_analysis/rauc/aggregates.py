r"""Methods over several tasks: mean, median, IQM, probability of improvement, profiles and sample efficiency.

The estimates and their stratified bootstrap are those of Agarwal et al., *Deep Reinforcement Learning at the Edge of
the Statistical Precipice* (NeurIPS 2021), whose reference implementation is the package rliable: runs are resampled
within each task, and intervals are percentiles of the resampled estimate.

A score matrix ``(runs, tasks)`` is here a list of tasks, because tasks need not have equally many runs: ``list(m.T)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mto_analysis.rauc.areas import Points, area, score_at
from mto_analysis.rauc.comparison import Comparison, shared_epochs, thinned
from mto_analysis.rauc.curves import CurveTable
from mto_analysis.rauc.intervals import BOOTSTRAP_SEED, FEWEST_RUNS_TO_RESAMPLE, RESAMPLES, divide

Vector = NDArray[np.float64]
#: The scores of each task's runs, along the last axis.
Tasks = Sequence[Vector]

#: What a run is scored by: its score at E2, and its area above the baseline's S1(E1) over the baseline's mean area.
MEASURES = ("final score", "RAUC")

#: Names in the tables.
IMPROVEMENT = "probability of improvement"
INTERVAL_METHOD = "stratified bootstrap of runs, percentile"

#: Resamples of profiles and curves, which have an interval at each of many places.
_CURVE_RESAMPLES = 2000
_MOST_PLACES = 60
_THRESHOLDS = 101


def mean_of_tasks(tasks: Tasks) -> Vector:
    """Mean over tasks of the mean over runs.

    Example:
        >>> float(mean_of_tasks([np.array([1.0, 3.0]), np.array([10.0])]))
        6.0
    """
    return np.asarray(np.mean([task.mean(axis=-1) for task in tasks], axis=0))


def median_of_tasks(tasks: Tasks) -> Vector:
    """Median over tasks of the mean over runs.

    Example:
        >>> float(median_of_tasks([np.array([1.0, 3.0]), np.array([10.0]), np.array([4.0])]))
        4.0
    """
    return np.asarray(np.median([task.mean(axis=-1) for task in tasks], axis=0))


def iqm(tasks: Tasks) -> Vector:
    """Interquartile mean: the mean of the middle half of all runs of all tasks, each counted once.

    Example:
        >>> float(iqm([np.array([0.0, 1.0]), np.array([3.0, 99.0])]))
        2.0
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.concatenate(tasks, axis=-1), 0.25, axis=-1))


def probability_of_improvement(target: Tasks, baseline: Tasks) -> Vector:
    """How often a run of the target beats a run of the baseline on one task (ties count half), mean over tasks.

    Example:
        >>> float(probability_of_improvement([np.array([1.0, 3.0])], [np.array([2.0, 1.0])]))
        0.625
    """
    wins = [
        ((two[..., :, None] > one[..., None, :]) + 0.5 * (two[..., :, None] == one[..., None, :])).mean(axis=(-2, -1))
        for two, one in zip(target, baseline, strict=True)
    ]
    return np.asarray(np.mean(wins, axis=0))


def performance_profile(tasks: Tasks, thresholds: Vector) -> Vector:
    """The share of all runs of all tasks that score more than each threshold, along the first axis.

    Example:
        >>> performance_profile([np.array([1.0, 3.0]), np.array([2.0, 2.5])], np.array([1.5, 2.5])).tolist()
        [0.75, 0.25]
    """
    runs = np.concatenate(tasks, axis=-1)
    return np.stack([(runs > threshold).mean(axis=-1) for threshold in thresholds])


def stratified_bootstrap(
    statistic: Callable[..., Vector],
    samples: Sequence[Tasks],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> tuple[Vector, Vector]:
    """Percentile interval of a statistic when the runs of each task are resampled, each task apart from the others.

    Args:
        statistic: Takes the samples, runs along the last axis, and reduces that axis.
        samples: Tasks of one method, or of several that are resampled independently.
        confidence: Nominal coverage.
        resamples: How many.
        seed: Of the resampling.

    Returns:
        Lower and upper end, with the shape of the statistic.

    Example:
        >>> runs = [np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 7.0])]
        >>> [float(end.round(2)) for end in stratified_bootstrap(mean_of_tasks, [runs])]
        [3.33, 4.67]
    """
    generator = np.random.default_rng(seed)
    resampled = [
        [task[..., generator.integers(task.shape[-1], size=(resamples, task.shape[-1]))] for task in tasks]
        for tasks in samples
    ]
    found = statistic(*resampled)
    # Not interpolated, so that resamples without a finite estimate give an infinite end and not NaN.
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail], axis=-1, method="nearest")
    return np.asarray(low), np.asarray(high)


@dataclass(frozen=True)
class _Measured:
    """One method by one measure: ``values`` makes the scores of its runs, by task, from samples that are resampled."""

    measure: str
    method: str
    baseline: str | None
    samples: Sequence[Tasks]
    values: Callable[..., Tasks]

    def then(self, reduce: Callable[[Tasks], Vector]) -> Callable[..., Vector]:
        """A statistic of the samples: one of the scores."""
        return lambda *samples: reduce(self.values(*samples))


@dataclass(frozen=True)
class _Resampling:
    """Intervals of one confidence, or none where a task has one run."""

    confidence: float
    possible: bool

    def ends(
        self, statistic: Callable[..., Vector], samples: Sequence[Tasks], resamples: int = RESAMPLES
    ) -> dict[str, Vector]:
        """Columns ``low`` and ``high`` of a statistic."""
        if not self.possible:
            return dict.fromkeys(("low", "high"), np.full_like(statistic(*samples), np.nan))
        ends = stratified_bootstrap(statistic, samples, confidence=self.confidence, resamples=resamples)
        return dict(zip(("low", "high"), ends, strict=True))


@dataclass(frozen=True)
class Aggregates:
    """All methods of one window over the tasks that all of them have.

    Attributes:
        start: E1.
        end: E2.
        tasks: Their names.
        scores: ``method task seed final_score area``, one row per run: the numbers that all others come from.
        estimates: ``measure statistic method baseline value low high confidence tasks runs``. A method's final score
            has no baseline; an end is empty where there is no interval, and infinite where it has no end.
        measured: Each method by each measure, for the profiles.
        curves: Runs by method and task, for the sample efficiency.
        resampling: How intervals are made.
        notes: What a reader should know.
    """

    start: float
    end: float
    tasks: tuple[str, ...]
    scores: pd.DataFrame
    estimates: pd.DataFrame
    measured: Sequence[_Measured]
    curves: Mapping[str, Sequence[Mapping[str, Points]]]
    resampling: _Resampling
    notes: tuple[str, ...] = ()

    @cached_property
    def profiles(self) -> pd.DataFrame:
        """Performance profiles: ``measure method baseline threshold share low high``."""
        parts = [_profile(one, self.measured, self.resampling) for one in self.measured]
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def efficiency(self) -> pd.DataFrame:
        """Sample-efficiency curves: ``method place score low high``, the IQM at each place on the axis."""
        return _efficiency(self.curves, self.resampling)


def aggregate(table: CurveTable, comparisons: Sequence[Comparison]) -> list[Aggregates]:
    """Aggregates over the groups of a table, one for each window in which methods were compared in two or more.

    A run has two measures: its score at E2; and its RAUC, its area above S1(E1) over the mean area of the baseline's
    runs on that task, whose mean over runs is the task's RAUC. The baseline is resampled with the runs.
    """
    windows: dict[tuple[float, float], list[Comparison]] = {}
    for one in comparisons:
        windows.setdefault((one.start, one.end), []).append(one)
    found = (_aggregate(table, mine, window) for window, mine in windows.items() if mine[0].group)
    return [each for each in found if each is not None]


def _aggregate(table: CurveTable, comparisons: Sequence[Comparison], window: tuple[float, float]) -> Aggregates | None:
    """One window, if all methods share two tasks or more."""
    pairs = list(dict.fromkeys((one.baseline, one.target) for one in comparisons))
    methods = list(dict.fromkeys(name for pair in pairs for name in pair))
    groups, notes = _shared_groups(comparisons, pairs)
    if len(groups) < 2:
        return None
    curves = {method: [_compared_runs(table, comparisons, method, group) for group in groups] for method in methods}
    scores = _scores(curves, groups, window)
    notes += _notes_on_runs(scores)
    reference = comparisons[0].reference if comparisons[0].reference_given else None
    finals, areas = ({m: _by_task(scores, m, column) for m in methods} for column in ("final_score", "area"))
    gains = {
        baseline: [
            np.stack([areas_, _levels(task, window, reference)])
            for areas_, task in zip(areas[baseline], curves[baseline], strict=True)
        ]
        for baseline, _ in pairs
    }
    measured = [_Measured("final score", method, None, [finals[method]], _as_they_are) for method in methods]
    undefined = [one for one in comparisons if one.rauc is None and one.group in groups]
    if undefined:
        one = undefined[0]
        notes.append(
            f"there is no RAUC over all tasks: {one.target} / {one.baseline} has none on {_task(one.group)}"
            f" ({one.reason})"
        )
    else:
        measured += [_Measured("RAUC", name, name, [tasks], _of_baseline) for name, tasks in gains.items()]
        measured += [_Measured("RAUC", two, one, [areas[two], gains[one]], _relative) for one, two in pairs]
    wins = [
        _Measured(measure, two, one, [by_task[two], by_task[one]], _as_they_are)
        for measure, by_task in zip(MEASURES, (finals, areas), strict=True)
        for one, two in pairs
    ]
    confidence = comparisons[0].interval.confidence
    resampling = _Resampling(confidence, bool((scores.groupby(["method", "task"])["seed"].size() > 1).all()))
    estimates = _estimates(measured, wins, resampling)
    return Aggregates(
        *window,
        tasks=tuple(dict.fromkeys(scores["task"])),
        scores=scores,
        estimates=estimates.assign(
            confidence=confidence, tasks=len(groups), runs=estimates["method"].map(scores["method"].value_counts())
        ),
        measured=measured,
        curves=curves,
        resampling=resampling,
        notes=tuple(notes),
    )


def _task(group: Mapping[str, str]) -> str:
    """Name of the task that a group is."""
    return ", ".join(group.values())


def _compared_runs(
    table: CurveTable, comparisons: Sequence[Comparison], method: str, group: Mapping[str, str]
) -> dict[str, Points]:
    """Runs of a method on a task that any comparison kept: a run without a partner may have been left out."""
    kept = {
        seed
        for one in comparisons
        for name, seeds in ((one.baseline, one.seeds_baseline), (one.target, one.seeds_target))
        if one.group == group and name == method
        for seed in seeds
    }
    return {seed: run for seed, run in table.runs(method, group).items() if seed in kept}


def _shared_groups(
    comparisons: Sequence[Comparison], pairs: Sequence[tuple[str, str]]
) -> tuple[list[Mapping[str, str]], list[str]]:
    """Groups in which every pair was compared, and a note on those in which only some were."""
    of_pair = [[one.group for one in comparisons if (one.baseline, one.target) == pair] for pair in pairs]
    shared = [group for group in of_pair[0] if all(group in groups for groups in of_pair)]
    others = {_task(group) for groups in of_pair for group in groups if group not in shared}
    return shared, [f"tasks that some methods lack were left out: {', '.join(sorted(others))}"] if others else []


def _scores(
    curves: Mapping[str, Sequence[Mapping[str, Points]]],
    groups: Sequence[Mapping[str, str]],
    window: tuple[float, float],
) -> pd.DataFrame:
    """Both scores of every run; comparisons have already refused runs that do not cover the window."""
    return pd.DataFrame(
        [
            {
                "method": method,
                "task": _task(group),
                "seed": seed,
                "final_score": score_at(run, window[1], interpolate=True),
                "area": area(run, *window, interpolate=True),
            }
            for method, tasks in curves.items()
            for group, runs in zip(groups, tasks, strict=True)
            for seed, run in runs.items()
        ]
    )


def _by_task(scores: pd.DataFrame, method: str, column: str) -> list[Vector]:
    rows = scores[scores["method"] == method]
    return [task[column].to_numpy(dtype=float) for _, task in rows.groupby("task", sort=False)]


def _levels(runs: Mapping[str, Points], window: tuple[float, float], reference: float | None) -> Vector:
    """Area under the reference, for each of the baseline's runs."""
    start, end = window
    levels = [score_at(run, start, interpolate=True) if reference is None else reference for run in runs.values()]
    return (end - start) * np.array(levels)


def _notes_on_runs(scores: pd.DataFrame) -> list[str]:
    counts = scores.groupby(["method", "task"], sort=False).size().reset_index(name="runs")
    fewest, most = counts["runs"].min(), counts["runs"].max()
    if fewest == 1:
        one = counts[counts["runs"] == 1].iloc[0]
        return [f"{one['method']} has one run on {one['task']}: no intervals over tasks"]
    notes = []
    if fewest < FEWEST_RUNS_TO_RESAMPLE:
        notes.append(f"a task has {fewest} runs: the bootstrap's intervals over tasks are too narrow")
    if fewest < most:
        notes.append(f"tasks have {fewest} to {most} runs: the IQM and profiles count every run once")
    return notes


def _as_they_are(tasks: Tasks) -> Tasks:
    return tasks


def _relative(tasks: Tasks, baselines: Tasks) -> Tasks:
    """Areas above the baseline's mean reference over its mean area; infinite where a resample has no gain."""
    found = []
    for areas, (baseline, reference) in zip(tasks, baselines, strict=True):
        level = reference.mean(axis=-1, keepdims=True)
        found.append(divide(areas - level, baseline.mean(axis=-1, keepdims=True) - level))
    return found


def _of_baseline(baselines: Tasks) -> Tasks:
    return _relative([baseline for baseline, _ in baselines], baselines)


def _estimates(measured: Sequence[_Measured], wins: Sequence[_Measured], resampling: _Resampling) -> pd.DataFrame:
    def row(one: _Measured, name: str, statistic: Callable[..., Vector]) -> dict[str, Any]:
        ends = {key: float(end) for key, end in resampling.ends(statistic, one.samples).items()}
        named = {"measure": one.measure, "statistic": name, "method": one.method, "baseline": one.baseline}
        return {**named, "value": float(statistic(*one.samples)), **ends}

    statistics = {"mean": mean_of_tasks, "median": median_of_tasks, "IQM": iqm}
    rows = [row(one, name, one.then(reduce)) for one in measured for name, reduce in statistics.items()]
    return pd.DataFrame(rows + [row(one, IMPROVEMENT, probability_of_improvement) for one in wins])


def _profile(one: _Measured, measured: Sequence[_Measured], resampling: _Resampling) -> pd.DataFrame:
    """Over thresholds that are the same for all methods of one measure."""
    alike = [each for each in measured if each.measure == one.measure]
    runs = np.concatenate([task for each in alike for task in each.values(*each.samples)])
    thresholds = np.linspace(runs.min(), runs.max(), _THRESHOLDS)
    share = one.then(partial(performance_profile, thresholds=thresholds))
    columns = {"share": share(*one.samples), **resampling.ends(share, one.samples, _CURVE_RESAMPLES)}
    named = {"measure": one.measure, "method": one.method, "baseline": one.baseline}
    return pd.DataFrame({**named, "threshold": thresholds, **columns})


def _efficiency(curves: Mapping[str, Sequence[Mapping[str, Points]]], resampling: _Resampling) -> pd.DataFrame:
    """IQM of the score over all tasks, at places on the axis that all runs cover."""
    runs = [run for tasks in curves.values() for task in tasks for run in task.values()]
    places = thinned(shared_epochs(runs), _MOST_PLACES)
    parts = []
    for method, tasks in curves.items():
        scores = [np.stack([np.interp(places, *run) for run in task.values()], axis=-1) for task in tasks]
        ends = resampling.ends(iqm, [scores], _CURVE_RESAMPLES)
        parts.append(pd.DataFrame({"method": method, "place": places, "score": iqm(scores), **ends}))
    return pd.concat(parts, ignore_index=True)
