"""What the figures of an experiment show, read back from their axes."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mto_analysis.figures.plots.experiment import (
    draw_experiment_curves,
    draw_trajectories,
    plot_experiment_curves,
    plot_final_scores,
    plot_profiles,
    plot_trajectories,
)
from mto_analysis.rauc.intervals import mean_interval

EPOCHS = [0, 2, 4]


@pytest.fixture
def curves() -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = [
        (f"M{method}", epoch, 20 + 5 * epoch + method + random.normal(), seed, f"R{method // 2}")
        for method in range(4)
        for seed in range(3)
        for epoch in EPOCHS
    ]
    return pd.DataFrame(rows, columns=["method", "epoch", "score", "seed", "recipe"])


@pytest.fixture
def layers() -> pd.DataFrame:
    rows = [
        (method, seed, epoch, "", depth, 3.0 - depth + 0.1 * epoch + 0.01 * seed, "MAE")
        for method in ("MAE", "MAE + MTO")
        for seed in range(3)
        for epoch in (1, 2)
        for depth in range(3)
    ]
    names = ["method", "seed", "epoch", "stack", "layer_depth", "heterogeneity", "recipe"]
    return pd.DataFrame(rows, columns=names)


def test_curves__are_means_over_seeds_with_their_interval(curves: pd.DataFrame) -> None:
    ax = plot_experiment_curves(curves[curves["method"] == "M0"])
    wide = curves[curves["method"] == "M0"].pivot_table(index="epoch", columns="seed", values="score")
    line, random = ax.get_lines()
    np.testing.assert_allclose(line.get_xdata(), EPOCHS)
    np.testing.assert_allclose(line.get_ydata(), wide.mean(axis=1))
    np.testing.assert_allclose(random.get_ydata(), wide.loc[0].mean())
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for epoch in EPOCHS:
        ends = corners[corners[:, 0] == epoch][:, 1]
        np.testing.assert_allclose((ends.min(), ends.max()), mean_interval(wide.loc[epoch].to_numpy(), 0.95))


def test_curves__of_one_seed_have_no_band(curves: pd.DataFrame) -> None:
    ax = plot_experiment_curves(curves[(curves["method"] == "M0") & (curves["seed"] == 0)])
    assert all(np.isnan(path.vertices).all() or not len(path.vertices) for path in ax.collections[0].get_paths())


def test_figure__has_a_panel_per_recipe(curves: pd.DataFrame) -> None:
    figure = draw_experiment_curves(curves)
    assert [ax.get_title() for ax in figure.axes] == ["R0", "R1"]
    labels = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
    assert labels == [["M0", "M1", "random encoder"], ["M2", "M3", "random encoder"]]


def test_figure__of_many_arms_shows_final_scores_instead_of_bands(curves: pd.DataFrame) -> None:
    parts = [curves[curves["method"] == "M0"].assign(method=f"arm {n}", recipe="R") for n in range(8)]
    figure = draw_experiment_curves(pd.concat(parts))
    left, right = figure.axes
    assert not left.collections
    assert [text.get_text() for text in right.get_yticklabels()] == [f"arm {n}" for n in range(8)]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in left.get_lines()[:8]}
    assert len(looks) == 8


def test_final_scores__are_those_of_the_last_epoch(curves: pd.DataFrame) -> None:
    part = curves[curves["method"] == "M1"]
    ax = plot_final_scores(part)
    dots, bar, mean = ax.get_lines()
    last = part.loc[part["epoch"] == 4, "score"].to_numpy()
    np.testing.assert_allclose(np.sort(dots.get_xdata()), np.sort(last))
    np.testing.assert_allclose(bar.get_xdata(), mean_interval(last, 0.95))
    np.testing.assert_allclose(mean.get_xdata(), last.mean())


def test_trajectories__have_a_line_per_layer_depth(layers: pd.DataFrame) -> None:
    ax = plot_trajectories(layers[layers["method"] == "MAE"])
    assert [line.get_label() for line in ax.get_lines()] == [f"layer depth {depth}" for depth in range(3)]
    np.testing.assert_allclose(ax.get_lines()[1].get_ydata(), [2.11, 2.21])


def test_trajectories__share_the_axis_from_zero_or_say_that_they_do_not(layers: pd.DataFrame) -> None:
    figure = draw_trajectories(pd.read_csv(io.StringIO(layers.assign(stack="").to_csv())))
    assert [ax.get_title() for ax in figure.axes] == ["MAE", "MAE + MTO"]
    assert [ax.get_ylim()[0] for ax in figure.axes] == [0, 0]
    assert all(ax.get_ylim()[1] > layers["heterogeneity"].max() for ax in figure.axes)
    near = layers.assign(heterogeneity=3.0 + 0.01 * layers["heterogeneity"])
    ax = draw_trajectories(near).axes[0]
    assert ax.dataLim.y0 > ax.get_ylim()[0] > 2.8  # intervals are not cut off
    assert "not from 0" in ax.get_ylabel()


def test_profiles__are_means_over_seeds_with_their_interval(layers: pd.DataFrame) -> None:
    ax = plot_profiles(layers[layers["epoch"] == 2])
    assert [line.get_label() for line in ax.get_lines()] == ["MAE", "MAE + MTO"]
    np.testing.assert_allclose(ax.get_lines()[0].get_xydata(), [(0, 3.21), (1, 2.21), (2, 1.21)])
    corners = ax.collections[0].get_paths()[0].vertices
    ends = corners[corners[:, 0] == 1][:, 1]
    np.testing.assert_allclose((ends.min(), ends.max()), mean_interval(np.array([2.2, 2.21, 2.22]), 0.95))


def test_trajectories__of_one_epoch_are_profiles_over_layer_depth(layers: pd.DataFrame) -> None:
    one = layers[layers["epoch"] == 1].assign(stack="first")
    figure = draw_trajectories(pd.concat([one, one.assign(stack="second"), one.assign(recipe="other")]))
    assert [ax.get_title() for ax in figure.axes] == ["MAE, first", "MAE, second", "other, first"]
    assert all(ax.get_xlabel() == "Layer depth" and len(ax.get_lines()) == 2 for ax in figure.axes)


@pytest.mark.parametrize("draw", ["curves", "layers"])
def test_legends__of_panels_side_by_side_do_not_meet(draw: str, curves: pd.DataFrame, layers: pd.DataFrame) -> None:
    names = [f"decoder {depth}" for depth in (1, 2, 12)]
    if draw == "curves":
        parts = [curves[curves["recipe"] == "R0"].replace({"M0": name, "M1": f"{name} + MTO"}) for name in names]
        figure = draw_experiment_curves(
            pd.concat([part.assign(recipe=name) for part, name in zip(parts, names, strict=True)])
        )
    else:
        parts = [
            layers[layers["epoch"] == 1].replace({"MAE": name, "MAE + MTO": f"{name} + MTO"}).assign(recipe=name)
            for name in names
        ]
        figure = draw_trajectories(pd.concat(parts))
    FigureCanvasAgg(figure).draw()
    boxes = [ax.get_legend().get_window_extent() for ax in figure.axes]
    assert len(boxes) == 3
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
