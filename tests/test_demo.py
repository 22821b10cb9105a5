"""The demo: its numbers are the original code's, and what it says is what it measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from golden_files import GOLDEN

from mto_analysis import load_checkpoint, load_masks, open_images, own_loss
from mto_analysis.demo import (
    DEMO_CHECKPOINTS,
    DEMO_IMAGES,
    DEMO_MASKS,
    DemoTables,
    demo_batches,
    demo_sentences,
    measure_demo,
)
from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
from mto_analysis.probe import masks_from_file, probe

FILES = {"MAE": "mae_final", "MAE, early": "mae_early", "SimMIM": "simmim_final", "SimMIM, early": "simmim_early"}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """What the original code measures, rows in the order of the bundled images."""
    with np.load(GOLDEN / "cifar10_reference.npz") as file:
        values = dict(file)
    cells = pq.read_table(DEMO_IMAGES)["image"].to_pylist()
    place = {name: row for row, name in enumerate(values["names"].tolist())}
    order = [place[cell["path"]] for cell in cells]
    assert sorted(order) == list(range(256))
    for name, value in values.items():
        if name.endswith("mask"):
            values[name] = value[order]
        elif value.ndim == 2:
            values[name] = value[:, order]
    return values


@pytest.fixture(scope="module")
def tables() -> DemoTables:
    """Of every fourth image; a test of figures measures all."""
    return measure_demo(limit=64)


def test_measure_demo__means_equal_the_original_code(tables: DemoTables, reference) -> None:
    assert_means_equal(tables, {name: reference[name][:, ::4] for name in FILES.values()})


@pytest.mark.slow
def test_measure_demo__means_of_all_images_equal_the_original_code(reference) -> None:
    assert_means_equal(measure_demo(), reference)


def assert_means_equal(tables: DemoTables, reference: dict[str, np.ndarray]) -> None:
    # The bundled weights are rounded to float16; 2e-4 is what that may cost.
    for label, name in FILES.items():
        rows = tables.fig1b[tables.fig1b["model"] == label]
        expected = reference[name]
        assert rows["layer_depth"].tolist() == list(range(len(expected)))
        np.testing.assert_allclose(rows["heterogeneity"], expected.mean(axis=1), atol=2e-4, rtol=0)
        np.testing.assert_allclose(rows["heterogeneity_std"], expected.std(axis=1, ddof=1), atol=2e-4, rtol=0)
        assert (rows["num_images"] == expected.shape[1]).all()


@pytest.mark.parametrize("label", ["MAE", "SimMIM"])
def test_probe__of_each_bundled_image_equals_the_original_code(label: str, reference) -> None:
    model = load_checkpoint(DEMO_CHECKPOINTS[label])
    masks = masks_from_file(model.info, load_masks(DEMO_MASKS[label]))
    frame = probe(model, demo_batches(model.info, limit=64), masks).to_frame()
    values = frame.pivot(index="layer_depth", columns="image", values="heterogeneity")
    expected = pd.DataFrame(reference[FILES[label]], columns=[str(row) for row in range(256)])[values.columns]
    difference = np.abs(values.to_numpy() - expected.to_numpy())
    assert difference.max() < 1e-2
    assert np.median(difference) < 2e-4  # single images: rounding of float16 weights
    spread = np.abs(np.diff(np.sort(expected.to_numpy(), axis=1), axis=1)).mean()
    assert difference.mean() < spread  # so a row that belongs to another image shows


@pytest.mark.parametrize("method", ["MAE", "SimMIM"])
def test_demo_masks__are_those_of_the_original_run(method: str, reference) -> None:
    masks = load_masks(DEMO_MASKS[method])
    assert list(masks) == [str(row) for row in range(256)]
    found = torch.stack([mask[0] for mask in masks.values()]).numpy()
    assert (found == reference[f"{method.lower()}_mask"]).all()


def test_demo_checkpoints__have_the_metadata_of_their_training() -> None:
    for label, path in DEMO_CHECKPOINTS.items():
        info = load_checkpoint(path).info
        assert (info.image_size, info.patch_size) == (32, 4)
        assert info.target == "pixels"
        rule = info.mask_rule
        expected = ("random", 0.75, 4) if label.startswith("MAE") else ("block", 0.6, 8)
        assert (rule.kind, rule.ratio, rule.unit) == expected
    assert sum(path.stat().st_size for path in DEMO_CHECKPOINTS.values()) < 15e6


@pytest.mark.parametrize(("label", "original"), [("MAE", 0.360), ("SimMIM", 0.527), ("MAE, early", 0.855)])
def test_own_loss__of_the_demo_models_is_near_the_originals(label: str, original: float, reference) -> None:
    # The original code's is over 500 test images, ours over the 256 bundled ones.
    assert float(reference[f"{FILES[label]}_loss"]) == pytest.approx(original, rel=0.1)
    model = load_checkpoint(DEMO_CHECKPOINTS[label])
    (batch,) = demo_batches(model.info, batch_size=256)
    loss = own_loss(model, batch.images, torch.from_numpy(reference[f"{FILES[label].split('_')[0]}_mask"]))
    assert loss.loss == pytest.approx(original, rel=0.1)
    assert not loss.suspicious


def test_measure_demo__self_check_finds_final_models_better(tables: DemoTables) -> None:
    losses = {metadata["model"]: metadata["own_loss"] for metadata in tables.models}
    for model in ("MAE", "SimMIM"):
        assert losses[model]["loss"] < losses[f"{model}, early"]["loss"]
        assert losses[model]["loss"] < 0.9 * losses[model]["predict_the_mean"]


def test_measure_demo__makes_the_tables_of_both_figures(tables: DemoTables) -> None:
    assert tables.fig1a["model"].unique().tolist() == ["MAE", "SimMIM"]
    assert tables.fig1b["model"].unique().tolist() == list(FILES)
    figure = draw_heterogeneity(tables.fig1b)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == sorted(FILES)
    assert [metadata["model"] for metadata in tables.models] == list(FILES)


def test_demo_sentences__say_what_was_measured(tables: DemoTables) -> None:
    sentences = demo_sentences(tables)
    assert len(sentences) == 3
    maximum = {"MAE": math.log(16), "SimMIM": math.log(24)}  # of 64 patches 0.25 and 0.375 are visible
    share = {}
    for label in FILES:
        h = tables.fig1b[tables.fig1b["model"] == label]["heterogeneity"]
        share[label] = (100 * h / maximum[label.split(",")[0]]).tolist()
    mae, early, simmim, simmim_early = share.values()
    assert f"(H at {mae[-1]:.1f} % of its maximum)" in sentences[0]
    spread = 24 ** (simmim[-1] / 100)
    assert f"over {spread:.1f} of 24 in SimMIM ({simmim[-1]:.1f} %)" in sentences[0]
    assert f"by {mae[-1] - early[-1]:+.1f} points in MAE (from {early[-1]:.1f} % at" in sentences[1]
    assert f"by {simmim[-1] - simmim_early[-1]:+.1f} in SimMIM (from {simmim_early[-1]:.1f} %)" in sentences[1]
    assert f"goes from {early[0]:.1f} % to {early[-1]:.1f} % over layer depth" in sentences[2]
    assert "does not show that a model has converged" in sentences[2]
    rising = tables.fig1b.assign(normalized=tables.fig1b["layer_depth"] / 10)
    assert "its curve does not fall" in demo_sentences(replace(tables, fig1b=rising))[2]


def test_demo_batches__are_the_bundled_images() -> None:
    assert len(open_images(DEMO_IMAGES).names) == 256
    info = load_checkpoint(DEMO_CHECKPOINTS["MAE"]).info
    names = [name for batch in demo_batches(info, limit=4, batch_size=3) for name in batch.names]
    assert names == ["0", "64", "128", "192"]
    assert Path(DEMO_IMAGES).stat().st_size < 1e6
