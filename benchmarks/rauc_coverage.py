"""How often do intervals hold the true value? Simulated runs, whose RAUC, gap, lead and saved share are known.

A run's curve is the method's true curve plus its luck: a shift of the whole run (half of it shared by the two methods'
runs of one seed), a slow drift along the epochs, and evaluation noise. Over tasks, each task has its own true curves
and the runs of different tasks are independent. Usage: ``python benchmarks/rauc_coverage.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mto_analysis.rauc.aggregates import iqm, mean_of_tasks, stratified_bootstrap
from mto_analysis.rauc.areas import Points, epochs_to_score, share_saved
from mto_analysis.rauc.intervals import (
    Interval,
    bca_paired,
    bca_unpaired,
    difference_interval,
    fieller,
    paired_moments,
    saved_interval,
    unpaired_moments,
)

Vector = NDArray[np.float64]

EPOCHS = np.arange(100.0, 401.0, 25.0)
WIDTH = EPOCHS[-1] - EPOCHS[0]
#: Standard deviations in points of accuracy: of a run's shift, its drift and an evaluation.
SHIFT, DRIFT, EVALUATION = 0.25, 0.25, 0.05


def true_curves() -> tuple[Vector, Vector]:
    def rising(top: float, pace: float) -> Vector:
        return top - (top - 80.5) * np.exp(-(EPOCHS - 50) / pace)

    return rising(83.4, 220.0), rising(83.8, 160.0)


def trapezoid(curves: Vector) -> Vector:
    return np.asarray(np.sum((curves[..., 1:] + curves[..., :-1]) / 2 * np.diff(EPOCHS), axis=-1))


def luck(generator: np.random.Generator, seeds: int) -> Vector:
    steps = generator.normal(0.0, DRIFT, (seeds, EPOCHS.size))
    drift = np.empty_like(steps)
    drift[:, 0] = steps[:, 0]
    for at in range(1, EPOCHS.size):  # stays of one size along the run, and remembers
        drift[:, at] = 0.9 * drift[:, at - 1] + np.sqrt(1 - 0.9**2) * steps[:, at]
    return drift + generator.normal(0.0, SHIFT, (seeds, 1)) + generator.normal(0.0, EVALUATION, steps.shape)


def areas(baseline: Vector, target: Vector) -> tuple[Vector, Vector, Vector]:
    """Target's, baseline's and the reference's areas, per run."""
    return trapezoid(target), trapezoid(baseline), baseline[:, 0] * WIDTH


def by_fieller(baseline: Vector, target: Vector, _: np.random.Generator) -> Interval:
    two, one, level = areas(baseline, target)
    return fieller(paired_moments(two - level, one - level))


def by_unpaired_fieller(baseline: Vector, target: Vector, _: np.random.Generator) -> Interval:
    return fieller(unpaired_moments(*areas(baseline, target)))


def by_bca(baseline: Vector, target: Vector, generator: np.random.Generator) -> Interval:
    two, one, level = areas(baseline, target)
    return bca_paired(two - level, one - level, generator, resamples=999)


def by_unpaired_bca(baseline: Vector, target: Vector, generator: np.random.Generator) -> Interval:
    return bca_unpaired(*areas(baseline, target), generator, resamples=999)


def percentiles(ratios: Vector) -> Interval:
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval("percentile", "bounded", float(low), float(high), 0.95, 0)


def by_epochs(baseline: Vector, target: Vector, generator: np.random.Generator) -> Interval:
    """What not to do: take every epoch of every run for a unit of its own and draw among them all."""
    weight = np.r_[0.5, np.ones(EPOCHS.size - 2), 0.5]
    level = baseline[:, :1]
    two, one = (weight * (target - level)).ravel(), (weight * (baseline - level)).ravel()
    pick = generator.integers(0, one.size, (499, one.size))
    return percentiles(two[pick].sum(axis=1) / one[pick].sum(axis=1))


def by_seeds_of_each_epoch(baseline: Vector, target: Vector, generator: np.random.Generator) -> Interval:
    """What not to do either: draw seeds, but anew for each epoch, as if runs had no luck that lasts."""
    seeds, draws = baseline.shape[0], 499
    pick = generator.integers(0, seeds, (draws, seeds, EPOCHS.size))
    columns = np.arange(EPOCHS.size)
    one, two = baseline[pick, columns].mean(axis=1), target[pick, columns].mean(axis=1)
    level = one[:, 0] * WIDTH
    return percentiles((trapezoid(two) - level) / (trapezoid(one) - level))


def of_gap(paired: bool) -> Callable[[Vector, Vector, np.random.Generator], Interval]:
    return lambda one, two, _: difference_interval(two[:, -1], one[:, -1], paired=paired)


def of_lead(paired: bool) -> Callable[[Vector, Vector, np.random.Generator], Interval]:
    return lambda one, two, _: difference_interval(trapezoid(two) / WIDTH, trapezoid(one) / WIDTH, paired=paired)


def of_saving(paired: bool) -> Callable[[Vector, Vector, np.random.Generator], Interval]:
    return lambda one, two, _: saved_interval(EPOCHS, two, one[:, -1], end=EPOCHS[-1], paired=paired)


def true_rauc(one: Vector, two: Vector) -> float:
    level = one[0] * WIDTH
    return float((trapezoid(two) - level) / (trapezoid(one) - level))


def true_saving(one: Vector, two: Vector) -> float:
    reached = epochs_to_score(Points(EPOCHS, two), float(one[-1]))
    assert reached is not None
    return share_saved(reached, float(EPOCHS[-1]))


TRUTHS: dict[str, Callable[[Vector, Vector], float]] = {
    "RAUC": true_rauc,
    "gap": lambda one, two: float(two[-1] - one[-1]),
    "lead": lambda one, two: float((trapezoid(two) - trapezoid(one)) / WIDTH),
    "saved": true_saving,
}
METHODS: dict[str, tuple[Callable[[Vector, Vector, np.random.Generator], Interval], str, bool]] = {
    "RAUC: Fieller, paired": (by_fieller, "RAUC", True),
    "RAUC: Fieller, unpaired": (by_unpaired_fieller, "RAUC", False),
    "RAUC: BCa over whole runs, paired": (by_bca, "RAUC", True),
    "RAUC: BCa over whole runs, unpaired": (by_unpaired_bca, "RAUC", False),
    "RAUC: bootstrap per epoch": (by_epochs, "RAUC", True),
    "RAUC: bootstrap of seeds, per epoch": (by_seeds_of_each_epoch, "RAUC", True),
    "final gap: Student, paired": (of_gap(True), "gap", True),
    "final gap: Welch, unpaired": (of_gap(False), "gap", False),
    "mean lead: Student, paired": (of_lead(True), "lead", True),
    "mean lead: Welch, unpaired": (of_lead(False), "lead", False),
    "share saved: t tests, paired": (of_saving(True), "saved", True),
    "share saved: t tests, unpaired": (of_saving(False), "saved", False),
}
#: Tasks of the last lines, and what each adds to all scores.
TASKS = (0.0, 0.4, 0.8, 3.0)


def holds(interval: Interval, truth: float) -> bool:
    low = -np.inf if interval.low is None else interval.low
    high = np.inf if interval.high is None else interval.high
    return low <= truth <= high if interval.kind != "outside" else not low < truth < high


def coverage(method: str, seeds: int, repeats: int, generator: np.random.Generator) -> tuple[float, float, float]:
    """Share of intervals that hold the truth, share without two bounds, median width of the others."""
    make, quantity, paired = METHODS[method]
    one, two = true_curves()
    truth = TRUTHS[quantity](one, two)
    hit, unbounded, widths = 0, 0, []
    for _ in range(repeats):
        shared = luck(generator, seeds) if paired else 0.0
        mix = np.sqrt(0.5) if paired else 1.0
        first, second = (mix * luck(generator, seeds) + np.sqrt(0.5) * shared for _ in range(2))
        interval = make(one + first, two + second, generator)
        if interval.kind == "none":
            return float("nan"), float("nan"), float("nan")
        hit += holds(interval, truth)
        unbounded += interval.kind != "bounded"
        if interval.kind == "bounded" and interval.low is not None and interval.high is not None:
            widths.append(interval.high - interval.low)
    return hit / repeats, unbounded / repeats, float(np.median(widths)) if widths else float("nan")


def coverage_over_tasks(
    statistic: Callable[[Sequence[Vector]], Vector], seeds: int, repeats: int, generator: np.random.Generator
) -> tuple[float, float, float]:
    """The same for the final score of one method over all tasks, by the stratified bootstrap."""
    _, two = true_curves()

    def finals(runs: int) -> list[Vector]:
        return [two[-1] + shift + luck(generator, runs)[:, -1] for shift in TASKS]

    truth, hit, widths = float(statistic(finals(200_000))), 0, []
    for _ in range(repeats):
        ends = stratified_bootstrap(statistic, [finals(seeds)], resamples=999, seed=int(generator.integers(2**31)))
        low, high = (float(end) for end in ends)
        hit += low <= truth <= high
        widths.append(high - low)
    return hit / repeats, 0.0, float(np.median(widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Intervals whose names begin so.")
    options = parser.parse_args()
    print(f"coverage of nominal 95 % intervals, {options.repeats} simulated experiments each")
    print(f"{'interval':<40}{'seeds':>6}{'covers':>9}{'unbounded':>11}{'median width':>14}")
    jobs = {name: partial(coverage, name) for name in METHODS} | {
        f"{len(TASKS)} tasks: bootstrap of the {name}": partial(coverage_over_tasks, statistic)
        for name, statistic in (("mean", mean_of_tasks), ("IQM", iqm))
    }
    for name, job in jobs.items():
        for seeds in (3, 5, 10) if name.startswith(options.only) else ():
            share, unbounded, width = job(seeds, options.repeats, np.random.default_rng(options.seed))
            cells = f"{100 * share:>7.1f} %{100 * unbounded:>9.1f} %{width:>14.3f}" if share == share else "     none"
            print(f"{name:<40}{seeds:>6}{cells}", flush=True)


if __name__ == "__main__":
    main()
