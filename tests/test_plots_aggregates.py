import numpy as np
import pandas as pd
import pytest

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.aggregates import draw_aggregates, plot_bands, plot_estimates
from mto_analysis.figures.plots.style import COLUMN_WIDTH, looks_of
from mto_analysis.rauc import Points
from mto_analysis.rauc.aggregates import aggregate
from mto_analysis.rauc.comparison import compare_methods
from mto_analysis.rauc.curves import CurveTable

LOOKS = looks_of(["MAE", "MTO"])


def panel():
    from matplotlib.figure import Figure

    return Figure(figsize=(COLUMN_WIDTH, 2)).subplots()


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(1)
    epochs = np.arange(0.0, 101, 25)
    rows = [
        pd.DataFrame(
            {
                "method": method, "seed": str(seed), "task": task, "epoch": epochs,
                "score": base + rng.normal(0, 1.0) + 20 * (1 - np.exp(-epochs / pace)),
            }
        )
        for base, task in ((50, "cars"), (60, "food"))
        for method, pace in (("MAE", 60), ("MTO", 40))
        for seed in range(3)
    ]  # fmt: skip
    table = CurveTable(pd.concat(rows, ignore_index=True), groups=("task",))
    assert isinstance(table.runs("MAE", {"task": "cars"})["0"], Points)
    (result,) = aggregate(table, compare_methods(table, [("MAE", "MTO")], [(0.0, 100.0)]))
    return result


def test_draw_aggregates__shows_all_estimates_and_curves_of_all_methods(found):
    figure = draw_aggregates(found, axis="epoch", score="top-1 accuracy (%)")
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels == [
        "top-1 accuracy (%) at epoch 100", "RAUC of a run", "probability of improvement over MAE",
        "threshold: top-1 accuracy (%) at epoch 100", "threshold: RAUC of a run", "epoch",
    ]  # fmt: skip
    assert "95 % stratified bootstrap" in figure.get_suptitle()
    curves = [line for line in figure.axes[5].get_lines() if len(line.get_xdata())]
    assert len(curves) == 2
    mto = found.efficiency[found.efficiency["method"] == "MTO"]
    assert np.allclose(curves[1].get_ydata(), mto["score"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MAE", "MTO"]


def test_plot_estimates__has_a_point_and_a_bar_each(found):
    rows = found.estimates[(found.estimates["measure"] == "final score") & (found.estimates["statistic"] == "IQM")]
    ax = plot_estimates(rows, LOOKS, ax=panel())
    assert [line.get_xdata()[0] for line in ax.get_lines()] == rows["value"].tolist()
    bars = [segments.get_segments()[0][:, 0].tolist() for segments in ax.collections]
    assert bars == rows[["low", "high"]].to_numpy().tolist()
    assert len({line.get_marker() for line in ax.get_lines()}) == 2


def test_plot_estimates__an_interval_without_an_end_leaves_the_panel():
    rows = pd.DataFrame({"statistic": ["IQM"], "method": ["MTO"], "value": [1.2], "low": [1.0], "high": [np.inf]})
    ax = plot_estimates(rows, LOOKS, ax=panel())
    assert ax.collections[0].get_segments()[0][1, 0] > ax.get_xlim()[1]
    with pytest.raises(DataError, match="no rows"):
        plot_estimates(rows.iloc[:0], LOOKS, ax=panel())


def test_plot_bands__without_intervals_has_curves_only():
    nothing = {"low": [np.nan, np.nan], "high": [np.nan, np.nan]}
    rows = pd.DataFrame({"method": ["MAE", "MAE"], "place": [0, 1], "score": [1.0, 2.0], **nothing})
    ax = plot_bands(rows, LOOKS, x="place", y="score", ax=panel())
    assert ax.get_lines()[0].get_ydata().tolist() == [1.0, 2.0]
    assert ax.get_ylim()[1] < 2.2
