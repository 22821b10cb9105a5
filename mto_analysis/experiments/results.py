"""What an experiment showed: curves, RAUC over epochs and over training time, H per layer, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.experiments.runs import ExperimentRuns, best_candidate, read_curve
from mto_analysis.rauc import Points
from mto_analysis.rauc.comparison import Comparison, Pairing, compare
from mto_analysis.rauc.records import as_frame
from mto_analysis.training import RunFolder
from mto_analysis.training.metrics import heterogeneity_by_layer, layer_of

#: The axis of equal time: seconds of training, evaluations not counted. A step of a method lasts the median over all
#: its runs, so other work on the machine, a pause or a restart leaves no trace.
TIME = "seconds"

# A mean gain of the baseline up to this, in points of accuracy, is none.
_NOISE = 0.01


@dataclass(frozen=True)
class Results:
    """Tables of an experiment.

    Attributes:
        curves: ``method epoch score seed seconds recipe arm protocol``.
        heterogeneity: ``method seed epoch stack layer_depth heterogeneity recipe arm``; means over an epoch's logged
            steps, in training mode.
        speed: ``method seed step_seconds images_per_second data_wait``, medians over logged steps.
        terms: Of each run's last logged step: ``method seed``, the loss and its terms, those of MTO unweighted.
        choice: ``variant candidate seed final mean``, the baseline's among them; empty without a choice.
        chosen: Candidate by variant.
        comparisons: Every pair in every window, over epochs.
        timed: The same pairs over the time that both have; one window each.
    """

    curves: pd.DataFrame
    heterogeneity: pd.DataFrame
    speed: pd.DataFrame
    terms: pd.DataFrame
    choice: pd.DataFrame
    chosen: dict[str, str]
    comparisons: tuple[Comparison, ...]
    timed: tuple[Comparison, ...]

    def runs(self, method: str, axis: str = "epoch") -> dict[str, Points]:
        """Curves of a method by seed, over epochs or seconds."""
        rows = self.curves[self.curves["method"] == method]
        return {
            str(seed): Points(run[axis].to_numpy(dtype=float), run["score"].to_numpy(dtype=float))
            for seed, run in rows.groupby("seed", sort=False)
        }

    def rauc_table(self) -> pd.DataFrame:
        """Rows of :func:`~mto_analysis.rauc.records.as_frame`, over epochs and over seconds."""
        tables = [as_frame(self.comparisons), as_frame(self.timed, TIME)]
        return pd.concat([each for each in tables if len(each)] or tables[:1], ignore_index=True)


def collect(runs: ExperimentRuns) -> Results:
    """Read what all runs left.

    Raises:
        DataError: If a run has no curve yet.
    """
    curves, layers, speeds, terms = [], [], [], []
    for run in runs.main:
        runs.resolve(run).check()  # settings that are chosen now may be others than those it was trained with
        curve = read_curve(run)
        if curve.empty:
            raise DataError(f"{run.name} has no scores yet: run the experiment again")
        who: dict[str, Any] = {"method": run.method, "seed": run.seed, "recipe": run.variant, "arm": run.arm}
        metrics = pd.read_csv(RunFolder(run.folder).metrics)
        epochs, steps = (metrics[metrics["kind"] == kind] for kind in ("epoch", "step"))
        steps_per_epoch = epochs["step"].iloc[-1] / epochs["epoch"].iloc[-1]
        curves.append(curve.assign(steps=curve["epoch"] * steps_per_epoch, **who))
        layers.append(heterogeneity_by_layer(epochs).assign(**who))
        terms.append({**who, **_last_terms(steps)})
        rate = steps["images_per_second"].median()
        speeds.append(
            {
                "method": run.method,
                "seed": run.seed,
                "step_seconds": run.recipe.batch_size / rate,
                "images_per_second": rate,
                "data_wait": steps["data_wait"].median(),
            }
        )
    speed = pd.DataFrame(speeds)
    table = pd.concat(curves, ignore_index=True)
    table[TIME] = table["steps"] * table["method"].map(speed.groupby("method")["step_seconds"].median())
    table = table[["method", "epoch", "score", "seed", TIME, "recipe", "arm", "protocol"]]
    choice = runs.chosen_table()
    settings = runs.experiment.choice
    chosen = {}
    if settings is not None:
        for variant in runs.experiment.variants:
            chosen[variant.label] = best_candidate(choice, variant.label, settings)
    results = Results(
        table,
        pd.concat(layers, ignore_index=True)[
            ["method", "seed", "epoch", "stack", "layer_depth", "heterogeneity", "recipe", "arm"]
        ],
        speed,
        pd.DataFrame(terms),
        choice,
        chosen,
        (),
        (),
    )
    pairs, windows = runs.experiment.pairs, runs.experiment.windows
    over_epochs = [_compared(results, pair, window) for pair in pairs for window in windows]
    over_time = [_timed(results, pair) for pair in pairs]
    return replace(
        results,
        comparisons=tuple(each for each in over_epochs if each is not None),
        timed=tuple(each for each in over_time if each is not None),
    )


def _last_terms(steps: pd.DataFrame) -> dict[str, float]:
    """The loss and its terms at the last logged step."""
    last = steps.iloc[-1]
    start, end = list(steps.columns).index("loss"), list(steps.columns).index("lr")
    names = [name for name in steps.columns[start:end] if layer_of(name) is None]
    return {name: float(last[name]) for name in names if name != "mask_token_grad_norm"}


def _compared(results: Results, pair: tuple[str, str], window: tuple[float, float]) -> Comparison | None:
    """RAUC from the first evaluated epoch at or after the window's start to that at or after its end."""
    baseline, target = (results.runs(method) for method in pair)
    shared = _shared_epochs([*baseline.values(), *target.values()])
    places = np.searchsorted(shared, np.array(window) * shared[-1] - 1e-9)
    start, end = (float(shared[min(place, len(shared) - 1)]) for place in places)
    if not start < end:
        return None
    return compare(baseline, target, start, end, names=pair, noise=_NOISE, pairing=_pairing(baseline, target))


def _timed(results: Results, pair: tuple[str, str]) -> Comparison | None:
    """RAUC over the training time that all runs of both methods have had."""
    baseline, target = (results.runs(method, TIME) for method in pair)
    runs = [*baseline.values(), *target.values()]
    start, end = max(run.epochs[0] for run in runs), min(run.epochs[-1] for run in runs)
    if not start < end:
        return None
    how = _pairing(baseline, target)
    return compare(baseline, target, float(start), float(end), interpolate=True, names=pair, noise=_NOISE, pairing=how)


def _pairing(baseline: Mapping[str, Points], target: Mapping[str, Points]) -> Pairing:
    """Runs of one seed of an experiment share weights, order, augmentation and masks: they pair where all do."""
    return "seed" if set(baseline) == set(target) else "none"


def _shared_epochs(runs: Sequence[Points]) -> np.ndarray:
    shared = runs[0].epochs
    for run in runs[1:]:
        shared = np.intersect1d(shared, run.epochs)
    if not shared.size:
        raise DataError("the runs share no evaluated epoch")
    return shared
