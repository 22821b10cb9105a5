import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from mto_analysis.figures.plots.rauc import plot_rauc, plot_rauc_windows, rauc_figure, rauc_windows_figure
from mto_analysis.rauc import Points
from mto_analysis.rauc.comparison import compare, window_grid

EPOCHS = np.array([100.0, 200.0, 300.0, 400.0])
MAE = {s: Points(EPOCHS, np.array([60.0, 66.0, 69.0, 70.0]) + d) for s, d in (("0", 0.0), ("1", 0.4), ("2", -0.1))}
MTO = {s: Points(EPOCHS, np.array([61.0, 68.0, 70.5, 71.0]) + d) for s, d in (("0", 0.1), ("1", 0.5), ("2", -0.3))}


def draw(one, two, **options):
    return plot_rauc(compare(one, two, 100, 400, names=("MAE", "MTO"), **options), one, two)


def test_plot_rauc__draws_mean_curves_bars_and_the_saving():
    ax = draw(MAE, MTO)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert np.allclose(lines["MAE"].get_ydata(), np.mean([run.scores for run in MAE.values()], axis=0))
    assert np.allclose(lines["MTO"].get_xdata(), EPOCHS)
    assert len(ax.containers) == 2
    assert any("% saved" in text.get_text() for text in ax.texts)
    assert ax.get_title().startswith("MTO: RAUC 1.")
    assert "[" in ax.get_title()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "baseline's area",
        "target's lead",
        "MAE",
        "MTO",
    ]


def test_plot_rauc__shades_the_areas_that_are_divided():
    one, two = {"0": MAE["0"]}, {"0": MTO["0"]}
    result = compare(one, two, 100, 400)
    ax = plot_rauc(result, one, two)

    def size(path):
        x, y = path.vertices[:-1].T
        return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2

    base, lead = (sum(size(path) for path in shade.get_paths()) for shade in ax.collections[:2])
    assert base == pytest.approx(result.denominator)
    assert lead == pytest.approx(result.area_difference)


def test_plot_rauc__a_worse_target_is_hatched_and_saves_nothing():
    one, two = {"0": MTO["0"]}, {"0": MAE["0"]}
    ax = plot_rauc(compare(one, two, 100, 400), one, two)
    assert "target's lag" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert not any("saved" in text.get_text() for text in ax.texts)


def test_plot_rauc__says_undefined():
    flat = {"0": Points(EPOCHS, np.full(4, 60.0))}
    assert plot_rauc(compare(flat, {"0": MTO["0"]}, 100, 400), flat, {"0": MTO["0"]}).get_title().endswith("undefined")


def test_plot_rauc_windows__shows_every_window_and_frames_the_chosen():
    grid = window_grid(MAE, MTO)
    ax = plot_rauc_windows(grid, chosen=[(100.0, 400.0)])
    cells = ax.collections[0].get_array()
    outside = int(((grid["low"] > 1) | (grid["high"] < 1)).sum())
    assert cells.count() == outside == len(grid)
    assert cells[2, 0] == pytest.approx(grid[(grid["start"] == 100) & (grid["end"] == 400)]["rauc"].item())
    frame = ax.patches[-1]
    assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((50.0, 350.0), 100.0, 100.0)
    assert len(ax.texts) == grid["rauc"].notna().sum()
    assert ax.get_xlabel() == "E1 (epoch)"


def test_plot_rauc_windows__draws_uneven_windows_to_scale():
    epochs = np.array([0.0, 10.0, 100.0, 400.0])
    one, two = ({s: Points(epochs, run.scores) for s, run in runs.items()} for runs in (MAE, MTO))
    mesh = plot_rauc_windows(window_grid(one, two)).collections[0].get_coordinates()
    assert mesh[0, :, 0].tolist() == [-5.0, 5.0, 55.0, 250.0]
    assert mesh[:, 0, 1].tolist() == [5.0, 55.0, 250.0, 550.0]


def test_plot_rauc_windows__marks_windows_whose_interval_contains_1():
    near = {s: Points(EPOCHS, MAE[s].scores + shift) for s, shift in (("0", 0.6), ("1", -0.4), ("2", 0.1))}
    grid = window_grid(MAE, near)
    ax = plot_rauc_windows(grid)
    inside = grid[(grid["low"] <= 1) & (grid["high"] >= 1)]
    assert len(inside) > 3
    dots = ax.collections[1].get_offsets()
    assert sorted(map(tuple, np.asarray(dots))) == sorted(zip(inside["start"], inside["end"], strict=True))
    assert "interval contains 1" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_plot_rauc_windows__the_most_uncertain_window_is_the_palest():
    grid = pd.DataFrame(
        {
            "start": [0.0, 0.0, 50.0], "end": [50.0, 100.0, 100.0], "rauc": [1.2, 1.3, 9.0],
            "low": [1.15, 1.25, 1.5], "high": [1.25, 1.35, 80.0], "gain": [5.0, 8.0, 1.0],
        }
    )  # fmt: skip
    alpha = plot_rauc_windows(grid).collections[0].get_alpha()
    assert alpha[1, 1] < 0.2 < 0.8 < min(alpha[0, 0], alpha[1, 0])
    fallen = plot_rauc_windows(grid.assign(rauc=[1.2, 1.3, -9.0], low=[1.15, 1.25, -80.0], high=[1.25, 1.35, 0.5]))
    assert next(text for text in fallen.texts if text.get_text() == "-9.00").get_color() == "black"  # legible on pale
    one_run = grid.assign(low=np.nan, high=np.nan)
    ax = plot_rauc_windows(one_run)
    assert ax.collections[0].get_array().count() == 3
    alpha = ax.collections[0].get_alpha()
    assert alpha[1, 1] < alpha[0, 0] < alpha[1, 0] == 1.0
    without_gain = plot_rauc_windows(one_run.assign(gain=-1.0, rauc=np.nan))
    assert without_gain.collections[0].get_array().count() == 0


def test_plot_rauc_windows__hatches_what_is_undefined():
    flat = {"0": Points(EPOCHS, np.array([60.0, 60.0, 61.0, 62.0]))}
    ax = plot_rauc_windows(window_grid(flat, {"0": MTO["0"]}))
    assert [patch.get_hatch() for patch in ax.patches] == ["//////"]


def test_figures__have_a_panel_each_and_change_no_setting():
    mpl.use("agg")
    before = mpl.rcParams.copy()
    result = compare(MAE, MTO, 100, 400)
    figure = rauc_figure([result] * 3, [(MAE, MTO)] * 3, score="top-1 accuracy (%)")
    maps = rauc_windows_figure({"a": window_grid(MAE, MTO)})
    assert [ax.axison for ax in figure.axes] == [True, True, True, False]
    assert len(maps.axes) == 2
    assert before == mpl.rcParams
