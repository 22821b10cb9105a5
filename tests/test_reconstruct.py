"""Reconstructions: values, what is undone and how, the figure read back, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from mto_analysis import save_checkpoint
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_IMAGES
from mto_analysis.errors import CheckpointError, DataError
from mto_analysis.figures.plots.reconstruct import VIEWS, draw_reconstructions, plot_view, reconstruction_caption
from mto_analysis.images import choose_images, open_images
from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, MAEConfig, ModelInfo
from mto_analysis.models.targets import normalize_patches, reconstruction_loss, restore_patches
from mto_analysis.models.vit import patchify, unpatchify
from mto_analysis.probe.own_loss import own_loss
from mto_analysis.probe.reconstruction import (
    MASK_GREY,
    ReconstructionStudy,
    reconstruct_models,
    reconstruct_shown,
    reconstruction_views,
    to_pixels,
)
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.shown import ShownModel, shown_models
from mto_analysis.runtime.listener import Listener
from mto_analyze import app

CONFIG = MAEConfig(
    image_size=16,
    patch_size=4,
    dim=24,
    depth=1,
    num_heads=3,
    mlp_dim=32,
    decoder_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    decoder_mlp_dim=24,
)


def make_model(target: str | None = "normalized_pixels", criterion: str | None = "l2") -> MAE:
    torch.manual_seed(3)
    info = ModelInfo("mae", "decoder", 16, 4, MaskRule("random", 0.75, 4), target=target, criterion=criterion)
    return MAE(CONFIG, info).eval()


def demo_models(*labels: str, limit: int = 2) -> list[ShownModel]:
    sources = [DEMO_CHECKPOINTS[label] for label in labels]
    return list(shown_models(Request(sources, open_images(DEMO_IMAGES), Settings(limit=limit), labels)))


@pytest.fixture(scope="module")
def study() -> ReconstructionStudy:
    return reconstruct_models(demo_models("MAE", "SimMIM"))


def test_restore_patches__undoes_normalization_exactly() -> None:
    patches = torch.randn(2, 5, 48, dtype=torch.float64) * 3 + 1
    assert torch.allclose(restore_patches(normalize_patches(patches), like=patches), patches, atol=1e-12)


def test_restore_patches__takes_mean_and_deviation_from_the_original() -> None:
    like = torch.tensor([[[10.0, 14.0, 18.0]]], dtype=torch.float64)  # mean 14, variance 16
    restored = restore_patches(torch.tensor([[[-1.0, 0.0, 2.0]]], dtype=torch.float64), like)
    assert restored.flatten().tolist() == pytest.approx([10, 14, 22], abs=1e-5)


def test_reconstruction_views__of_a_perfect_prediction_are_the_original() -> None:
    info = make_model().info
    images = torch.randn(2, 3, 16, 16)
    mask = torch.rand(2, 16) < 0.5
    patches = patchify(images, 4)
    perfect = unpatchify(normalize_patches(patches), 4, info.grid)
    views = reconstruction_views(perfect, images, mask, info, target="normalized_pixels")
    for view in (views.original, views.reconstruction, views.pasted):
        torch.testing.assert_close(view, to_pixels(images, info), atol=1e-5, rtol=0)


def test_reconstruction_views__paste_visible_patches_and_grey_masked_ones() -> None:
    info = make_model().info
    images, prediction = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1 of 4
    views = reconstruction_views(prediction, images, mask, info, target="pixels")
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:8, 4:8] = True
    assert (views.masked[0][:, inside] == MASK_GREY).all()
    for channel in range(3):
        zero, one = info.mean[channel], info.mean[channel] + info.std[channel]
        assert views.pasted[0, channel][inside].tolist() == pytest.approx([one] * 16)
        assert views.pasted[0, channel][~inside].tolist() == pytest.approx([zero] * 240)
        assert views.masked[0, channel][~inside].tolist() == pytest.approx([zero] * 240)


def test_to_pixels__gives_the_image_back() -> None:
    shown = demo_models("MAE")[0]
    image = open_images(DEMO_IMAGES).open(0)  # 32 px, as the model wants: nothing is resized
    pixels = to_pixels(shown.images, shown.model.info)[0].permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(pixels, np.asarray(image), atol=1e-3)


def test_reconstruct_shown__losses_are_the_models_own() -> None:
    shown = demo_models("MAE")[0]
    rows = reconstruct_shown(shown)
    whole = own_loss(shown.model, shown.images, shown.mask)
    assert whole is not None
    assert np.mean([row.loss for row in rows]) == pytest.approx(whole.loss, rel=1e-6)
    assert np.mean([row.predict_the_mean for row in rows]) == pytest.approx(whole.predict_the_mean, rel=1e-6)
    with torch.no_grad():
        prediction = shown.model.reconstruct(shown.images, shown.mask)
    by_hand = reconstruction_loss(prediction, shown.images, shown.mask, 4)
    assert [row.loss for row in rows] == pytest.approx(by_hand.tolist(), rel=1e-6)


def test_reconstruct_models__leaves_out_a_model_without_pixels_and_refuses_when_none_is_left() -> None:
    good = demo_models("MAE")[0]
    bare = ShownModel("contrastive", good.model, good.names, good.images, good.mask, None, {})
    said: list[str] = []
    study = reconstruct_models([bare, good], Listener(warn=said.append))
    assert {row.model for row in study.reconstructions} == {"MAE"}
    assert said == ["contrastive (mae) predicts no pixels, so there is nothing to reconstruct"]
    with pytest.raises(CheckpointError, match=r"contrastive \(mae\) predicts no pixels"):
        reconstruct_models([bare])
    with pytest.raises(ValueError, match="predicts no pixels"):
        reconstruct_shown(bare)


def test_shown_models__warns_of_a_model_that_does_no_better_than_the_mean(tmp_path: Path) -> None:
    save_checkpoint(make_model(), tmp_path / "random.safetensors")
    said: list[str] = []
    images = open_images(DEMO_IMAGES)
    listener = Listener(warn=said.append)
    list(shown_models(Request([tmp_path / "random.safetensors"], images, Settings(limit=1), listener=listener)))
    assert len(said) == 1
    assert "untrained or loaded wrongly" in said[0]
    assert "1 image)" in said[0]


def test_choose_images__keeps_order_and_names_what_is_missing() -> None:
    images = open_images(DEMO_IMAGES)
    chosen = choose_images(images, ["7", "3"])
    assert list(chosen.names) == ["7", "3"]
    assert np.array_equal(np.asarray(chosen.open(0)), np.asarray(images.open(7)))
    with pytest.raises(DataError, match="no image cat, dog; there are 256: 0, 1, 2"):
        choose_images(images, ["cat", "3", "dog"])


def test_draw_reconstructions__draws_each_view_of_each_image(study: ReconstructionStudy) -> None:
    figure = draw_reconstructions(study.reconstructions)
    blocks = list(figure.subfigs)
    assert [block.get_suptitle().split(":")[0] for block in blocks] == ["MAE", "SimMIM"]
    for block, rows in zip(blocks, (study.reconstructions[:2], study.reconstructions[2:]), strict=True):
        assert len(block.axes) == 8
        assert [ax.get_title() for ax in block.axes[:4]] == list(VIEWS.values())
        for index, ax in enumerate(block.axes):
            drawn = ax.images[0].get_array()
            np.testing.assert_array_equal(drawn, getattr(rows[index // 4], list(VIEWS)[index % 4]))
        assert f"{np.mean([row.loss for row in rows]):.3g}" in block.get_suptitle()


def test_plot_view__refuses_an_unknown_view(study: ReconstructionStudy) -> None:
    with pytest.raises(ValueError, match="view must be one of original, masked"):
        plot_view(study.reconstructions[0], "blurred")
    with pytest.raises(ValueError, match="got none"):
        draw_reconstructions([])


def test_reconstruction_caption__says_whose_statistics_were_used(study: ReconstructionStudy) -> None:
    assert "standard deviation" not in reconstruction_caption(study.reconstructions)
    shown = demo_models("MAE")[0]
    normalized = ShownModel(
        "MAE-n", shown.model, shown.names, shown.images, shown.mask,
        shown.own_loss and shown.own_loss._replace(target="normalized_pixels"), {},
    )  # fmt: skip
    caption = reconstruction_caption(reconstruct_shown(normalized))
    assert "MAE-n: patches are predicted centred and scaled" in caption
    assert "mean and standard deviation of the original patch" in caption


@pytest.mark.rendered
def test_reconstruct_command__writes_figure_table_and_metadata(tmp_path: Path) -> None:
    arguments = ["reconstruct", "--ckpt", str(DEMO_CHECKPOINTS["MAE"]), "--image", "9", "--image", "4"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "reconstruction loss" in result.stderr
    assert "predicting the mean" in result.stderr
    table = pd.read_csv(tmp_path / "out" / "reconstructions.csv", dtype={"image": str})
    assert table["image"].tolist() == ["9", "4"]
    assert (table["loss"] < table["predict_the_mean"]).all()
    metadata = json.loads((tmp_path / "out" / "run.json").read_text())
    assert metadata["models"][0]["own_loss"]["loss"] == pytest.approx(table["loss"].mean(), rel=1e-5)
    for kind, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / "out" / f"reconstructions.{kind}").read_bytes().startswith(magic)
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert again.exit_code == 2
    unknown = CliRunner().invoke(app, [*arguments, "--image", "none", "--out", str(tmp_path / "new")])
    assert unknown.exit_code == 4
    assert "no image none" in unknown.stderr


def test_reconstruct_command__says_in_one_line_that_a_model_predicts_no_pixels(tmp_path: Path) -> None:
    save_checkpoint(make_model(target="features", criterion=None), tmp_path / "features.safetensors")
    result = CliRunner().invoke(
        app, ["reconstruct", "-q", "--ckpt", str(tmp_path / "features.safetensors"), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 3
    line = "mto-analyze: error: features (mae) predicts no pixels, so there is nothing to reconstruct"
    assert result.stderr.splitlines() == [line]
    assert not (tmp_path / "out").exists()
