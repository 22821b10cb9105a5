"""The figure of a run: what it shows, read back from its axes, and where it comes from."""

import numpy as np
import pandas as pd
import pytest
from pretraining_cases import run, small_recipe

from mto_analysis.errors import DataError
from mto_analysis.figures.plots.training_curves import draw_run
from mto_analysis.figures.run_folder import draw_run_folder
from mto_analysis.mto import MTOConfig
from mto_analysis.training import RunSettings
from mto_analysis.training.metrics import heterogeneity_by_layer


def table() -> pd.DataFrame:
    epochs = np.arange(1, 4)
    return pd.DataFrame(
        {
            "epoch": epochs,
            "loss": 1.0 / epochs,
            "pixels": 0.75 / epochs,
            "mto": 0.25 / epochs,
            "heterogeneity_0": 2.0 + epochs,
            "heterogeneity_1": 1.0 + epochs,
        }
    )


def test_draw_run__shows_loss_terms_layers_and_score():
    rows = table()
    curve = pd.DataFrame({"method": "m", "epoch": [0, 3], "score": [30.0, 40.0], "seed": 0, "protocol": "knn"})
    figure = draw_run(rows, heterogeneity_by_layer(rows), curve, terms=["pixels", "mto"])
    losses, layers, scores = figure.axes
    assert [line.get_label() for line in losses.get_lines()] == ["all terms", "pixels", "mto"]
    for line, name in zip(losses.get_lines(), ("loss", "pixels", "mto"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), rows[name])
    for depth, line in enumerate(layers.get_lines()):
        np.testing.assert_allclose(line.get_ydata(), rows[f"heterogeneity_{depth}"])
    assert scores.get_lines()[0].get_xydata().tolist() == [[0, 30], [3, 40]]
    assert "kNN" in scores.get_ylabel()


def test_draw_run__has_a_panel_per_stack_and_none_for_a_missing_score():
    rows = table().rename(columns={f"heterogeneity_{i}": f"{stack}/heterogeneity_0" for i, stack in enumerate("ab")})
    figure = draw_run(rows, heterogeneity_by_layer(rows), terms=["pixels"])
    assert [ax.get_title() for ax in figure.axes] == ["", "a", "b"]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["all terms"]


def test_draw_run_folder__draws_the_logged_steps_of_a_short_run(tmp_path):
    run(tmp_path, small_recipe(), RunSettings(device="cpu", log_every=2, mto=MTOConfig()), evaluate=lambda model: 12.5)
    drawn = draw_run_folder(tmp_path)
    assert [path.name for path in drawn] == ["run.png", "run.pdf"]
    before = drawn[0].read_bytes()
    draw_run_folder(tmp_path)
    assert drawn[0].read_bytes() == before


def test_draw_run_folder__says_what_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.csv is not the table of a run"):
        draw_run_folder(tmp_path)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="is not the table of a run"):
        draw_run_folder(tmp_path)
