"""Grids of patches from evidence in a file, and positions for other images: squares are never assumed in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mto_analysis import CheckpointError, load_checkpoint, save_checkpoint
from mto_analysis.checkpoints.conversion import Given, StateDict
from mto_analysis.checkpoints.positions import fit_positions, fit_relative_positions
from mto_analysis.masks import MaskRule
from mto_analysis.models import (
    MAE,
    InpaintingConfig,
    InpaintingViT,
    MAEConfig,
    ModelInfo,
    SimMIM,
    SimMIMConfig,
    SimMIMSwin,
    SwinConfig,
)
from mto_analysis.models.interface import ImageSize
from mto_analysis.models.vit import relative_position_index, sincos_table


def mae(size: ImageSize, *, seed: int = 0) -> MAE:
    """A small MAE with random weights and the original's position tables."""
    torch.manual_seed(seed)
    shape = {"dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "decoder_dim": 16, "decoder_depth": 1}
    config = MAEConfig(image_size=size, patch_size=4, decoder_num_heads=2, decoder_mlp_dim=32, **shape)
    info = ModelInfo("mae", "decoder", size, 4, MaskRule("random", 0.75, 4), target="pixels", criterion="l2")
    return MAE(config, info).eval()


def save(path: Path, model: torch.nn.Module, **beside: object) -> Path:
    torch.save({"model": dict(model.state_dict()), **beside}, path)
    return path


HEADS = {"num_heads": 2, "decoder_num_heads": 2}


def tokens(model: MAE, images: Tensor) -> Tensor:
    """The decoder's last tokens, with every fourth patch visible."""
    mask = torch.arange(model.info.num_patches).remainder(4).bool().expand(len(images), -1)
    with torch.no_grad():
        return list(model.layer_tokens(images, mask))[-1].tokens


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (8, 128), (24, 40), 32])
def test_load_checkpoint__reads_the_grid_from_sincos_tables(tmp_path: Path, size: ImageSize) -> None:
    model = mae(size)
    loaded = load_checkpoint(save(tmp_path / "file.pth", model), **HEADS)
    assert (loaded.info.image_size, loaded.info.assumptions) == (size, ())
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width)
    torch.testing.assert_close(tokens(loaded, images), tokens(model, images))
    assert loaded.reconstruct(images, torch.arange(model.info.num_patches).gt(3).expand(2, -1)).shape == images.shape


def test_load_checkpoint__takes_the_stated_or_given_size_of_learned_positions(tmp_path: Path) -> None:
    model = mae((16, 64))
    torch.nn.init.normal_(model.pos_embed)
    torch.nn.init.normal_(model.decoder_pos_embed)
    images = torch.randn(2, 3, 16, 64)
    for beside, given in (({}, {"image_size": (16, 64)}), ({"args": {"input_size": [16, 64]}}, {})):
        loaded = load_checkpoint(save(tmp_path / "file.pth", model, **beside), **HEADS, **given)
        torch.testing.assert_close(tokens(loaded, images), tokens(model, images))
        assert loaded.info.assumptions == ()
    torch.nn.init.normal_(model.pos_embed)
    model.decoder_pos_embed.data = sincos_table((4, 16), 16)  # computed, where the encoder's were learned
    loaded = load_checkpoint(save(tmp_path / "file.pth", model), **HEADS)
    assert (loaded.info.image_size, loaded.info.assumptions) == ((16, 64), ())
    torch.nn.init.normal_(model.decoder_pos_embed)
    square = load_checkpoint(save(tmp_path / "file.pth", model), **HEADS)
    assert square.info.image_size == 32
    assert "the patch grid is square, 8 x 8: positions do not tell" in square.info.assumptions[0]


@pytest.mark.parametrize(
    ("size", "beside", "message"),
    [
        ((16, 24), {}, "pos_embed is for 24 patches, which is not a square grid; give --image-size"),
        ((16, 64), {"args": {"input_size": 64}}, "states images of 64 x 64 px, pos_embed is for 64 patches"),
    ],
)
def test_load_checkpoint__refuses_positions_of_no_known_grid(tmp_path: Path, size, beside, message: str) -> None:
    model = mae(size)
    torch.nn.init.normal_(model.pos_embed)
    torch.nn.init.normal_(model.decoder_pos_embed)
    path = save(tmp_path / "file.pth", model, **beside)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, **HEADS)
    assert load_checkpoint(path, **HEADS, image_size=size).info.image_size == size
    with pytest.raises(CheckpointError, match="patches of 4 px do not divide an image of 18 x 32 px"):
        load_checkpoint(path, **HEADS, image_size=(18, 32))


def test_load_checkpoint__refuses_more_patches_than_fit_into_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pth", mae(32))
    with pytest.raises(CheckpointError, match="100000 px has 625000000 patches of 4 px, of which no more than 65536"):
        load_checkpoint(path, **HEADS, image_size=100_000)
    config = SwinConfig(32, 2, 3, 8, (1, 1), (2, 2), 16, window=4)
    swin = SimMIMSwin(config, ModelInfo("simmim_swin", "inpainting", 32, 2, MaskRule("block", 0.5, 4)))
    save_checkpoint(swin, tmp_path / "swin.safetensors")
    with pytest.raises(CheckpointError, match="positions of a simmim_swin model are not resized"):
        load_checkpoint(tmp_path / "swin.safetensors", image_size=100_000)


def smooth_table(rows: int, columns: int, dim: int = 64) -> Tensor:
    """A learned table, as training leaves it: neighbours are alike, above each other as well as side by side."""
    torch.manual_seed(1)
    field = torch.randn(1, dim, rows + 4, columns + 4)
    field = torch.nn.functional.avg_pool2d(field, 5, stride=1)
    return field.flatten(2).mT


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (16, 4), (8, 8), (6, 10), (14, 14)])
def test_fit_positions__reads_the_grid_from_rows_that_are_alike(rows: int, columns: int) -> None:
    state = StateDict({"pos_embed": torch.cat([torch.zeros(1, 1, 64), smooth_table(rows, columns)], dim=1)})
    grid = fit_positions(state, Given(), "pos_embed", patch_size=16)
    assert grid.sides == (rows, columns)
    said = "by the likeness of neighbouring positions"
    assert [said in note for note in grid.notes] == ([] if rows == columns else [True])


def test_fit_positions__resizes_as_the_originals_do() -> None:
    table, decoder = torch.randn(1, 17, 8), sincos_table((4, 4), 8)
    learned = torch.randn(1, 17, 8)
    state = StateDict({"pos_embed": table, "decoder_pos_embed": decoder, "learned": learned})
    names = ("pos_embed", "decoder_pos_embed", "learned")
    grid = fit_positions(state, Given(image_size=(24, 64)), *names, patch_size=8, stated=32)
    assert grid.image_size == (24, 64)
    assert grid.notes == ("positions of 4 x 4 patches are resized to 3 x 8 as --image-size asks",)
    for name, source in (("pos_embed", table), ("learned", learned)):
        places = source[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
        places = torch.nn.functional.interpolate(places, size=(3, 8), mode="bicubic", align_corners=False)
        torch.testing.assert_close(state.tensors[name][:, 1:], places.permute(0, 2, 3, 1).reshape(1, 24, 8))
        assert torch.equal(state.tensors[name][:, :1], source[:, :1])
    torch.testing.assert_close(state.tensors["decoder_pos_embed"], sincos_table((3, 8), 8))


@pytest.mark.parametrize("grid", [(1, 16), (16, 1), (2, 8)])
def test_fit_positions__reads_single_rows_and_columns(grid: tuple[int, int]) -> None:
    state = StateDict({"pos_embed": sincos_table(grid, 8)})
    assert fit_positions(state, Given(), "pos_embed", patch_size=4).sides == grid


def test_fit_positions__divides_by_the_old_sides_as_dino_does() -> None:
    table = torch.randn(1, 17, 8)
    state = StateDict({"pos_embed": table})
    fit_positions(state, Given(image_size=(24, 64)), "pos_embed", patch_size=8, stated=32, overshoot=0.1)
    places = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    places = torch.nn.functional.interpolate(places, scale_factor=(3.1 / 4, 8.1 / 4), mode="bicubic")
    torch.testing.assert_close(state.tensors["pos_embed"][:, 1:], places.permute(0, 2, 3, 1).reshape(1, 24, 8))


def test_fit_positions__refuses_tables_of_different_length() -> None:
    state = StateDict({"a": torch.zeros(1, 17, 8), "b": torch.zeros(1, 10, 8)})
    with pytest.raises(CheckpointError, match="position tables differ in length: a 16, b 9"):
        fit_positions(state, Given(), "a", "b", patch_size=8)


def relative(grid: tuple[int, int], **tensors: Tensor) -> StateDict:
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    return StateDict({"table": torch.zeros(rows, 2), **tensors})


def test_fit_relative_positions__reads_the_grid_from_the_index_beside_the_table() -> None:
    for grid in ((2, 5), (5, 2), (5, 41)):
        state = relative(grid, index=relative_position_index(grid))
        found = fit_relative_positions(state, Given(), "table", index="index", patch_size=4)
        assert (found.sides, found.notes, list(state.tensors)) == (grid, (), ["table"])
    wrong = relative((4, 4), index=relative_position_index((4, 4)).flip(0))
    with pytest.raises(CheckpointError, match="table and the index stored beside it fit no grid"):
        fit_relative_positions(wrong, Given(), "table", index="index", patch_size=4)


def test_fit_relative_positions__without_an_index_takes_the_size_or_says_that_it_assumes_a_square() -> None:
    def find(given: Given, stated: ImageSize | None = None) -> tuple[tuple[int, int], bool]:
        grid = fit_relative_positions(relative((14, 14)), given, "table", index="index", patch_size=4, stated=stated)
        return grid.sides, bool(grid.notes)

    assert find(Given()) == ((14, 14), True)  # 27 x 27 offsets are also 9 x 81: a grid of 5 x 41
    assert find(Given(), 56) == ((14, 14), False)
    assert find(Given(image_size=(20, 164))) == ((5, 41), False)
    with pytest.raises(CheckpointError, match="not for the 8 x 8 patches of the size that --image-size gives: tables"):
        find(Given(image_size=32))
    with pytest.raises(CheckpointError, match="fit no grid of up to 1600 patches"):
        fit_relative_positions(relative((41, 41)), Given(), "table", index="index", patch_size=4)


def test_load_checkpoint__resizes_positions_of_our_own_layout_or_says_why_not(tmp_path: Path) -> None:
    model = mae(32)
    save_checkpoint(model, tmp_path / "own.safetensors")
    loaded = load_checkpoint(tmp_path / "own.safetensors", image_size=(16, 64))
    assert (loaded.config.image_size, loaded.info.num_patches) == ((16, 64), 64)
    assert "resized to 4 x 16" in loaded.info.assumptions[0]
    assert tokens(loaded, torch.zeros(1, 3, 16, 64)).shape == (1, 64, 16)
    save_checkpoint(loaded, tmp_path / "again.safetensors")
    again = load_checkpoint(tmp_path / "again.safetensors")
    assert (again.info, again.config) == (loaded.info, loaded.config)
    config = SimMIMConfig(image_size=32, patch_size=4, dim=16, depth=1, num_heads=2, mlp_dim=32)
    relative_model = SimMIM(config, ModelInfo("simmim_vit", "inpainting", 32, 4, MaskRule("block", 0.6, 8)))
    save_checkpoint(relative_model, tmp_path / "relative.safetensors")
    with pytest.raises(CheckpointError, match="positions of a simmim_vit model are not resized"):
        load_checkpoint(tmp_path / "relative.safetensors", image_size=64)


@pytest.mark.parametrize("positions", ["shared", "per_block", None])
def test_layer_tokens__of_an_encoder_on_a_grid_that_is_not_square(positions) -> None:
    torch.manual_seed(0)
    config = InpaintingConfig(
        image_size=(16, 24), patch_size=4, dim=16, depth=2, num_heads=2, mlp_dim=32, position_bias=positions
    )
    config = replace(config, absolute_positions=positions is None)
    model = InpaintingViT(config, ModelInfo("beit", "inpainting", (16, 24), 4, MaskRule("blockwise", 0.4, 4)))
    mask = torch.arange(24).lt(9).expand(2, -1)
    shapes = [layer.tokens.shape for layer in model.layer_tokens(torch.randn(2, 3, 16, 24), mask)]
    assert shapes == [(2, 24, 16)] * 3
    with pytest.raises(ValueError, match=r"images must be \[batch, 3, 16, 24\], got \[2, 3, 24, 16\]"):
        model.layer_tokens(torch.randn(2, 3, 24, 16), mask)


def test_layer_tokens__of_swin_on_a_grid_that_is_not_square_is_that_of_the_transposed_image() -> None:
    config = SwinConfig((32, 64), 2, 3, 8, (2, 2), (2, 2), 16, window=4)
    info = ModelInfo("simmim_swin", "inpainting", (32, 64), 2, MaskRule("block", 0.5, 4))
    torch.manual_seed(0)
    model = SimMIMSwin(config, info).eval()
    turned = SimMIMSwin(replace(config, image_size=(64, 32)), replace(info, image_size=(64, 32))).eval()
    state = dict(model.state_dict())
    for name, value in state.items():
        if name.endswith("bias_table"):
            state[name] = value.reshape(7, 7, -1).transpose(0, 1).reshape(value.shape)
        if name == "patch_embed.proj.weight":
            state[name] = value.transpose(2, 3)
        if name.startswith("merges"):  # (0, 0), (1, 0), (0, 1), (1, 1)
            state[name] = value.reshape(*value.shape[:-1], 2, 2, -1).transpose(-2, -3).reshape(value.shape)
    turned.load_state_dict(state)
    images = torch.randn(1, 3, 32, 64)
    units = torch.rand(8, 16) < 0.5
    mask = units.repeat_interleave(2, 0).repeat_interleave(2, 1)
    with torch.no_grad():
        layers = list(model.layer_tokens(images, mask.reshape(1, -1)))
        others = list(turned.layer_tokens(images.mT, mask.T.reshape(1, -1)))
    for layer, other in zip(layers, others, strict=True):
        rows = 16 if layer.tokens.shape[1] == 512 else 8
        expected = layer.tokens.reshape(1, rows, 2 * rows, -1).transpose(1, 2).flatten(1, 2)
        torch.testing.assert_close(other.tokens, expected, atol=1e-5, rtol=1e-4)
