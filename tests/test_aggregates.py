"""Aggregates over tasks. ``golden/rliable.json`` holds what rliable 1.2.0 computed from the scores in it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mto_analysis.rauc import aggregates
from mto_analysis.rauc.aggregates import (
    aggregate,
    iqm,
    mean_of_tasks,
    median_of_tasks,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from mto_analysis.rauc.comparison import compare_methods
from mto_analysis.rauc.curves import CurveTable, read_curves
from mto_analysis.rauc.records import as_frame

RLIABLE = json.loads((Path(__file__).parent / "golden" / "rliable.json").read_text())
X, Y, FRAMES = (np.array(RLIABLE[name]) for name in ("x", "y", "frames"))
TASKS_X, TASKS_Y = list(X.T), list(Y.T)
STATISTICS = {"mean": mean_of_tasks, "median": median_of_tasks, "iqm": iqm}


@pytest.mark.parametrize("name", STATISTICS)
def test_estimates__equal_rliables(name):
    assert STATISTICS[name](TASKS_X) == pytest.approx(RLIABLE[name], abs=1e-9)


def test_iqm__trims_runs_of_all_tasks_together():
    assert iqm(TASKS_Y) == pytest.approx(RLIABLE["iqm_y"], abs=1e-9)
    curves = [FRAMES[:, task].T for task in range(FRAMES.shape[1])]
    assert iqm(curves) == pytest.approx(RLIABLE["efficiency"], abs=1e-9)


def test_probability_of_improvement__equals_rliables_with_ties_and_unequal_numbers_of_runs():
    found = probability_of_improvement(TASKS_X, TASKS_Y)
    assert found == pytest.approx(RLIABLE["probability_of_improvement"], abs=1e-9)
    assert probability_of_improvement(TASKS_Y, TASKS_X) == pytest.approx(1 - found)
    assert probability_of_improvement(TASKS_X, TASKS_X) == 0.5


def test_performance_profile__equals_rliables():
    thresholds = np.array(RLIABLE["thresholds"])
    for tasks, name in ((TASKS_X, "profile_x"), (TASKS_Y, "profile_y")):
        assert performance_profile(tasks, thresholds) == pytest.approx(RLIABLE[name], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "statistic", "samples"),
    [
        *((name, statistic, [TASKS_X]) for name, statistic in STATISTICS.items()),
        ("probability_of_improvement", probability_of_improvement, [TASKS_X, TASKS_Y]),
    ],
)
def test_stratified_bootstrap__agrees_with_rliables_within_resampling(name, statistic, samples):
    low, high = RLIABLE["intervals"][name]
    found = stratified_bootstrap(statistic, samples)
    assert [float(end) for end in found] == pytest.approx([low, high], abs=0.05 * (high - low))
    again = stratified_bootstrap(statistic, samples)
    assert [*found] == [*again]


def test_stratified_bootstrap__never_mixes_tasks():
    apart = [np.array([1.0, 1.0, 1.0]), np.array([50.0, 50.0])]
    assert [float(end) for end in stratified_bootstrap(mean_of_tasks, [apart])] == [25.5, 25.5]


def write_log(path, *, seeds=3, tasks=("food", "cars", "pets", "dtd"), flat=(), drop=()):
    rng = np.random.default_rng(5)
    epochs = np.arange(0, 101, 10)
    lines = ["method,task,seed,epoch,score"]
    for at, task in enumerate(tasks):
        for method, gain, pace in (("MAE", 20, 40), ("MTO", 20.5, 25), ("other", 15, 40)):
            for seed in range(seeds):
                curve = 50 + 5 * at + rng.normal(0, 0.3) + (0 if task in flat else gain) * (1 - np.exp(-epochs / pace))
                if (method, task) not in drop:
                    lines += [f"{method},{task},{seed},{e},{s:.4f}" for e, s in zip(epochs, curve, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return read_curves([path], groups=["task"])


PAIRS = [("MAE", "MTO"), ("MAE", "other")]


def estimate(found, measure, statistic, method):
    rows = found.estimates
    row = rows[(rows["measure"] == measure) & (rows["statistic"] == statistic) & (rows["method"] == method)]
    assert len(row) == 1
    return row.iloc[0]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(aggregates, "_CURVE_RESAMPLES", 200)


def test_aggregate__of_raucs_is_that_of_the_comparisons(tmp_path):
    table = write_log(tmp_path / "log.csv")
    comparisons = compare_methods(table, PAIRS, [(0, 100)])
    (found,) = aggregate(table, comparisons)
    assert found.tasks == ("food", "cars", "pets", "dtd")
    for method in ("MTO", "other"):
        ratios = [one.rauc for one in comparisons if one.target == method]
        assert estimate(found, "RAUC", "mean", method)["value"] == pytest.approx(np.mean(ratios))
        assert estimate(found, "RAUC", "median", method)["value"] == pytest.approx(np.median(ratios))
    assert estimate(found, "RAUC", "mean", "MAE")["value"] == pytest.approx(1.0)
    assert estimate(found, "RAUC", "probability of improvement", "MTO")["value"] == 1.0
    assert estimate(found, "RAUC", "probability of improvement", "other")["value"] < 0.2


def test_aggregate__estimates_come_from_the_scores_it_lists(tmp_path):
    table = write_log(tmp_path / "log.csv")
    (found,) = aggregate(table, compare_methods(table, PAIRS, [(0, 100)]))
    matrix = found.scores[found.scores["method"] == "MTO"].pivot(index="seed", columns="task", values="final_score")
    row = estimate(found, "final score", "mean", "MTO")
    assert row["value"] == pytest.approx(matrix.to_numpy().mean())
    assert row["low"] < row["value"] < row["high"]
    assert (row["tasks"], row["runs"]) == (4, 12)
    curve = found.efficiency[found.efficiency["method"] == "MTO"]
    assert curve["place"].tolist() == list(range(0, 101, 10))
    final = estimate(found, "final score", "IQM", "MTO")["value"]
    assert curve["score"].iloc[-1] == pytest.approx(final)
    assert (curve["low"] <= curve["score"]).all()
    assert (curve["score"] <= curve["high"]).all()
    profile = found.profiles[(found.profiles["method"] == "MTO") & (found.profiles["measure"] == "final score")]
    assert (profile["share"].diff().dropna() <= 0).all()
    assert profile["share"].iloc[-1] < profile["share"].iloc[0]


def test_aggregate__the_interval_of_a_rauc_counts_the_luck_of_the_baseline(tmp_path):
    table = write_log(tmp_path / "log.csv")
    (found,) = aggregate(table, compare_methods(table, [("MAE", "MTO")], [(0, 100)]))
    row = estimate(found, "RAUC", "mean", "MTO")
    runs = table.runs("MTO", {"task": "food"})
    assert len(runs) == 3
    with_baseline = row["high"] - row["low"]
    areas = [task["area"].to_numpy() for _, task in found.scores[found.scores["method"] == "MTO"].groupby("task")]
    gains = [
        task["area"].mean() - 100 * np.mean([run.scores[0] for run in table.runs("MAE", {"task": name}).values()])
        for name, task in found.scores[found.scores["method"] == "MAE"].groupby("task")
    ]
    alone = stratified_bootstrap(mean_of_tasks, [[a / g for a, g in zip(areas, gains, strict=True)]])
    assert with_baseline > 1.1 * float(alone[1] - alone[0])


def test_aggregate__an_undefined_ratio_of_one_task_leaves_no_rauc_over_all(tmp_path):
    table = write_log(tmp_path / "log.csv", flat=("cars",))
    (found,) = aggregate(table, compare_methods(table, PAIRS, [(0, 100)]))
    assert set(found.estimates.loc[found.estimates["statistic"] == "mean", "measure"]) == {"final score"}
    assert any("no RAUC over all tasks" in note and "cars" in note for note in found.notes)


def test_aggregate__one_run_on_a_task_has_no_interval(tmp_path):
    table = write_log(tmp_path / "log.csv", seeds=1)
    (found,) = aggregate(table, compare_methods(table, PAIRS, [(0, 100)]))
    assert found.estimates[["low", "high"]].isna().all(axis=None)
    assert found.efficiency["low"].isna().all()
    assert any("has one run on food" in note for note in found.notes)


def test_aggregate__takes_the_tasks_that_all_methods_have(tmp_path):
    table = write_log(tmp_path / "log.csv", drop=[("other", "pets")])
    (found,) = aggregate(table, compare_methods(table, PAIRS, [(0, 100)]))
    assert found.tasks == ("food", "cars", "dtd")
    assert "left out: pets" in found.notes[0]
    assert found.notes[1:] == ("a task has 3 runs: the bootstrap's intervals over tasks are too narrow",)


def test_aggregate__tasks_with_different_numbers_of_runs_are_named(tmp_path):
    table = write_log(tmp_path / "log.csv", seeds=6)
    kept = table.frame[(table.frame["task"] != "cars") | (table.frame["seed"] != "5")]
    table = CurveTable(kept, groups=table.groups)
    (found,) = aggregate(table, compare_methods(table, PAIRS, [(0, 100)]))
    assert found.notes == ("tasks have 5 to 6 runs: the IQM and profiles count every run once",)
    assert estimate(found, "final score", "IQM", "MTO")["runs"] == 23


def test_aggregate__needs_two_tasks_and_goes_over_windows(tmp_path):
    table = write_log(tmp_path / "log.csv")
    found = aggregate(table, compare_methods(table, PAIRS, [(0, 100), (0, 50)]))
    assert [(one.start, one.end) for one in found] == [(0.0, 100.0), (0.0, 50.0)]
    alone = write_log(tmp_path / "one.csv", tasks=("food",))
    assert aggregate(alone, compare_methods(alone, PAIRS, [(0, 100)])) == []


def test_aggregate__leaves_out_what_comparisons_left_out(tmp_path):
    rows = [
        f"{method},{epoch},{50 + 5 * epoch + ahead + seed * 0.3 + 30 * (seed == 3)},{seed},{task}"
        for task in "ab"
        for method, ahead in (("x", 0), ("y", 1))
        for seed in range(3 + ahead)
        for epoch in (1, 2, 3)
    ]
    (tmp_path / "log.csv").write_text("method,epoch,score,seed,task\n" + "\n".join(rows) + "\n")
    table = read_curves([tmp_path / "log.csv"], groups=["task"])
    comparisons = compare_methods(table, [("x", "y")], [(1, 3)], pairing="seed")
    (found,) = aggregate(table, comparisons)
    assert sorted(set(found.scores["seed"])) == ["0", "1", "2"]
    assert estimate(found, "RAUC", "mean", "y")["value"] == pytest.approx(np.mean([one.rauc for one in comparisons]))
    frame = as_frame([replace(one, group={"target": "a"}) for one in comparisons])
    assert (frame["target"].unique().tolist(), frame["target (group)"].unique().tolist()) == (["y"], ["a"])
