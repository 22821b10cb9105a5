"""The study behind Fig. 2, its figure read back, and ``mto-analyze affinity``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import LogNorm
from typer.testing import CliRunner

from mto_analysis import save_masks
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.figures.plots.affinity import draw_affinity
from mto_analysis.images import choose_images, open_images
from mto_analysis.probe.maps import map_checkpoints
from mto_analysis.probe.quadrants import AffinityMap
from mto_analysis.probe.request import Request
from mto_analyze import app

runner = CliRunner()


def some_maps(count: int = 7, *, stack: str = "encoder", kind: str = "softmax") -> list[AffinityMap]:
    generator = torch.Generator().manual_seed(0)
    return [
        AffinityMap(stack, depth, None, 4, 3, kind, torch.rand(5, 5, generator=generator) + depth)  # type: ignore[arg-type]
        for depth in range(count)
    ]


def panels(figure: object) -> list[object]:
    return [ax for ax in figure.axes if ax.images]  # type: ignore[attr-defined]


def test_draw_affinity__one_panel_per_depth_in_reading_order_with_borders_and_names() -> None:
    maps = some_maps()
    figure = draw_affinity(maps)
    found = panels(figure)
    assert [ax.get_title(loc="left") for ax in found] == [f"layer depth {depth}" for depth in range(7)]
    figure.canvas.draw()
    corners = [(round(-ax.get_position().y0, 3), round(ax.get_position().x0, 3)) for ax in found]
    assert corners == sorted(corners)
    for ax, each in zip(found, maps, strict=True):
        image = ax.images[0]
        np.testing.assert_array_equal(image.get_array(), each.values.numpy())
        outside = each.values[~torch.eye(5, dtype=torch.bool)]
        assert (image.norm.vmin, image.norm.vmax) == (outside.min(), outside.max())
        assert {float(line.get_xdata()[0]) for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1]} == {2.5}
    assert [text.get_text() for text in found[0].texts] == ["1st", "2nd", "3rd", "4th"]
    assert [label.get_text() for label in found[0].get_yticklabels()] == ["masked", "visible"]
    assert "softmax" in figure.axes[-1].get_xlabel()
    assert "min to max off the diagonal of each map" in figure.axes[-1].get_xlabel()
    whole = panels(draw_affinity(maps, scale="per-map", log=True))
    for ax, each in zip(whole, maps, strict=True):
        norm = ax.images[0].norm
        assert isinstance(norm, LogNorm)
        assert (norm.vmin, norm.vmax) == (each.values.min(), each.values.max())
    with pytest.raises(ValueError, match="logarithmic colours need a softmax"):
        draw_affinity(some_maps(kind="dot"), log=True)


@pytest.mark.parametrize("kind", ["softmax", "dot", "cosine"])
def test_draw_affinity__shared_scale_names_kind_and_shares_limits(kind: str) -> None:
    maps = some_maps(kind=kind)
    figure = draw_affinity(maps, scale="shared")
    norms = [ax.images[0].norm for ax in panels(figure)]
    assert len({(norm.vmin, norm.vmax) for norm in norms}) == 1
    assert not isinstance(norms[0], LogNorm)
    label = figure.axes[-1].get_xlabel()
    assert "one colour scale for all maps" in label
    assert kind.split("_")[0] in label


def test_draw_affinity__each_stack_begins_a_row() -> None:
    figure = draw_affinity([*some_maps(3, stack="pixel_decoder"), *some_maps(5, stack="feature_decoder")])
    figure.canvas.draw()
    rows: dict[float, list[str]] = {}
    for ax in panels(figure):
        rows.setdefault(round(ax.get_position().y0, 2), []).append(ax.get_title(loc="left").split(",")[0])
    assert all(len(set(names)) == 1 for names in rows.values())


def test_draw_affinity__bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no map"):
        draw_affinity([])
    with pytest.raises(ValueError, match="scale must"):
        draw_affinity(some_maps(1), scale="log")  # type: ignore[arg-type]


def test_map_checkpoints__chosen_images_are_mapped_alone_and_unknown_ones_named() -> None:
    images = choose_images(open_images(DEMO_IMAGES), ["7", "3"])
    study = map_checkpoints(Request([DEMO_CHECKPOINTS["MAE"]], images, labels=["MAE"]), each_image=True)
    assert [(each.image, each.layer_depth) for each in study.maps["MAE"]][::5] == [("7", 0), ("3", 0)]
    assert set(study.quadrants["num_images"]) == {2}
    result = runner.invoke(app, ["affinity", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--image", "cat"])
    assert result.exit_code == 4
    assert "there is no image cat" in result.stderr


def test_affinity_command__writes_maps_table_and_figures(tmp_path: Path) -> None:
    arguments = ["affinity", "--ckpt", str(DEMO_CHECKPOINTS["SimMIM"]), "--limit", "4", "--out", str(tmp_path), "-q"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "affinity.npz",
        "affinity.pdf",
        "affinity.png",
        "quadrants.csv",
        "run.json",
        "run.toml",
        "methods.md",
    }
    table = pd.read_csv(tmp_path / "quadrants.csv")
    assert table["layer_depth"].tolist() == [depth for depth in range(7) for _ in range(4)]
    assert table["quadrant"].tolist() == [1, 2, 3, 4] * 7
    rows = table.groupby(["layer_depth", "rows"])["mass"].sum()
    assert rows.to_numpy() == pytest.approx(1)
    with np.load(tmp_path / "affinity.npz") as maps:
        model = table["model"].iloc[0]
        values, border = maps[f"{model}/encoder/mean/0"], int(maps[f"{model}/encoder/mean/0/num_masked"])
    assert values.shape == (64, 64)
    # The quadrant's mass again, from the map.
    assert values[:border, border:].sum(axis=1).mean() == pytest.approx(table["mass"][1], rel=1e-5)
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["kind"] == "softmax"

    again = runner.invoke(app, arguments)
    assert again.exit_code == 2
    assert "already holds" in again.stderr


def test_affinity_command__several_models_and_images_have_a_figure_each(tmp_path: Path) -> None:
    arguments = ["affinity", "--out", str(tmp_path), "-q", "--kind", "cosine", "--scale", "shared"]
    for name in ("MAE", "SimMIM"):
        arguments += ["--ckpt", str(DEMO_CHECKPOINTS[name]), "--label", name]
    result = runner.invoke(app, [*arguments, "--image", "0", "--image", "5"])
    assert result.exit_code == 0, result.output
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {f"affinity-{model}-{image}.png" for model in ("MAE", "SimMIM") for image in (0, 5)}


def test_affinity_command__mean_of_ragged_masks_ends_in_one_line(tmp_path: Path) -> None:
    ragged = np.zeros((256, 1, 64), dtype=bool)
    for row in range(256):
        ragged[row, 0, : 20 + row % 5] = True
    save_masks(tmp_path / "ragged.npz", ragged, [str(row) for row in range(256)])
    arguments = ["affinity", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--masks", str(tmp_path / "ragged.npz")]
    arguments += ["--out", str(tmp_path / "out"), "-q"]
    result = runner.invoke(app, [*arguments, "--limit", "20"])
    assert result.exit_code == 2
    assert "choose single images (--image)" in result.stderr.splitlines()[-1]
    assert runner.invoke(app, [*arguments, "--image", "3"]).exit_code == 0


@pytest.mark.parametrize(("extra", "code"), [(["--image", "none"], 4), (["--image", "1", "--limit", "3"], 2)])
def test_affinity_command__errors_have_their_codes(extra: list[str], code: int, tmp_path: Path) -> None:
    arguments = ["affinity", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--out", str(tmp_path), "-q", *extra]
    assert runner.invoke(app, arguments).exit_code == code
