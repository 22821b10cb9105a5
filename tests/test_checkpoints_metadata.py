"""Settings beside the weights: each that changes numbers is read, or refused by its name."""

from __future__ import annotations

import argparse
import collections
import json
import operator
import shutil
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_files import PUBLISHED, foreign
from safetensors.torch import load_file, save_file

from mto_analysis import CheckpointError, ModelInfo, inspect_checkpoint, load_checkpoint
from mto_analysis.checkpoints import RawCheckpoint, open_checkpoint
from mto_analysis.errors import HeadCountError

GOLDEN = Path(__file__).parent / "golden"
ORIGINALS = GOLDEN / "originals"
IMAGENET = (0.485, 0.456, 0.406)
HALF = (0.5, 0.5, 0.5)
BY_NAME = {each.name: each for each in PUBLISHED}
MAE = GOLDEN / "mae" / "checkpoint.pth"
MAE_HEADS = {"num_heads": 4, "decoder_num_heads": 2}


def hf_info(
    folder: Path, *, config: dict[str, Any] | None = None, preprocessor: dict[str, Any] | None = None
) -> ModelInfo:
    """Of the golden ViTMAE folder with other settings."""
    shutil.copytree(GOLDEN / "hf_vitmae" / "model", folder)
    stated = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(stated))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return load_checkpoint(folder).info


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": 0.25, "image_std": 2}, (0.25,) * 3, (2.0,) * 3),
        ({"image_mean": [0.25], "image_std": [2]}, None, None),
        ({"do_normalize": False, "image_mean": [0.9] * 3, "image_std": [0.9] * 3}, (0.0,) * 3, (1.0,) * 3),
        ({"image_mean": None, "image_std": None}, IMAGENET, (0.229, 0.224, 0.225)),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 16}, IMAGENET, (0.229, 0.224, 0.225)),
        ({"size": {"height": 16, "width": 16}}, IMAGENET, (0.229, 0.224, 0.225)),
        ({"size": {"shortest_edge": 20}}, IMAGENET, (0.229, 0.224, 0.225)),
        (
            {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
            IMAGENET,
            None,
        ),
        ({"size": 99, "do_resize": False}, IMAGENET, None),
    ],
)
def test_load_checkpoint__reads_every_form_of_a_preprocessor(tmp_path: Path, preprocessor, mean, std) -> None:
    side = json.loads((GOLDEN / "hf_vitmae" / "model" / "config.json").read_text())["image_size"]
    text = json.dumps(preprocessor).replace("16", str(side))
    if mean is None:
        with pytest.raises(CheckpointError, match="has 1 values, the model 3 channels; give --mean"):
            hf_info(tmp_path / "hf", preprocessor=json.loads(text))
        return
    info = hf_info(tmp_path / "hf", preprocessor=json.loads(text))
    assert info.mean == mean
    assert std is None or info.std == std


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        (
            {"image_mean": "imagenet", "image_std": 1},
            "image_mean must be numbers, got 'imagenet'; give --mean",
        ),
        ({"image_mean": [0.5, None, 0.5], "image_std": 1}, "image_mean must be numbers"),
        ({"image_mean": [0.5] * 3}, "has only one of image_mean and image_std"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0.0]}, "std .* must be above 0"),
        ({"image_mean": [127.5] * 3, "image_std": [127.5] * 3}, "mean .* must lie in 0..1, .* give --mean"),
        ({"do_normalize": True}, "has do_normalize, but no image_mean and image_std; give --mean and --std"),
        ({"do_rescale": False}, "only pixels scaled by 1/255 are read"),
        ({"rescale_factor": 1 / 127.5}, "only pixels scaled by 1/255 are read"),
        (
            {"size": {"height": 20, "width": 24}},
            r"makes images of \(20, 24\) px, the model .* give --image-size",
        ),
        ({"size": 99, "do_center_crop": True, "crop_size": 20}, "makes images of 20 px, the model takes"),
    ],
)
def test_load_checkpoint__refuses_a_preprocessor_that_is_not_read(tmp_path: Path, preprocessor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hf_info(tmp_path / "hf", preprocessor=preprocessor)
    if "image_mean" in preprocessor:
        given = load_checkpoint(tmp_path / "hf", mean=HALF, std=HALF).info
        assert (given.mean, given.statistics_source) == (HALF, "given")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "config.json has hidden_act='relu', only 'gelu' is read"),
        ({"hidden_act": "gelu_new"}, "config.json has hidden_act='gelu_new', only 'gelu' is read"),
        ({"qkv_bias": False}, "config.json has qkv_bias=False, but there is decoder.*query.bias"),
        ({"image_size": 99}, "states images of 96 x 96 px|do not divide"),
        ({"num_hidden_layers": 9}, "state num_hidden_layers=9, the weights have .: the file is truncated"),
        ({"decoder_num_hidden_layers": 9}, "state decoder_num_hidden_layers=9, the weights have"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a positive whole number, got '4'"),
        ({"mask_ratio": 1.5}, "states a mask_ratio of 1.5, which must lie between 0 and 1"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps must be a number, got '1e-12'"),
    ],
)
def test_load_checkpoint__refuses_a_config_that_is_not_read(tmp_path: Path, config, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hf_info(tmp_path / "hf", config=config)


def hiera(folder: Path, **changes: Any) -> ModelInfo:
    shutil.copytree(ORIGINALS / "hf_hiera_mua" / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: each for name, each in config.items() if each != "absent"}))
    return load_checkpoint(folder).info


def test_load_checkpoint__reads_hieras_target_and_refuses_its_other_forms(tmp_path: Path) -> None:
    assert hiera(tmp_path / "0", normalize_pixel_loss=False).target == "pixels"
    assert hiera(tmp_path / "1", normalize_pixel_loss="absent").target == "normalized_pixels"
    assert hiera(tmp_path / "2", mask_ratio=0.7).mask_ratio == 0.7
    for number, stated in enumerate((2, "two", [1.5, 1, 2, 4])):
        with pytest.raises(CheckpointError, match=r"num_heads=.*, not a whole number for each stage"):
            hiera(tmp_path / f"heads{number}", num_heads=stated)
    for number, (change, message) in enumerate(
        {
            "masked_unit_attention": ([1, 0], "masked_unit_attention must be a list of true and false"),
            "masked_unit_size": ([8, 4], "masked_unit_size must be square"),
            "query_stride": ([1, 2], r"query_stride=\[1, 2\], only \[2, 2\] is read"),
            "patch_stride": ([2, 2], r"patch_stride=\[2, 2\], only \[4, 4\] is read"),
            "patch_padding": ([2, 2], r"patch_padding=\[2, 2\], only \[3, 3\] is read"),
            "depths": ([1, 1, 2, 2], r"state depths=\[1, 1, 2, 2\], the weights have"),
            "embed_dim_multiplier": (3.0, "embed_dim_multiplier=3.0, only 2.0 is read"),
            "num_heads": ([1, 2], "num_heads and local must name each of 4 stages"),
        }.items()
    ):
        with pytest.raises(CheckpointError, match=message[1]):
            hiera(tmp_path / f"bad{number}", **{change: message[0]})


def openmmlab(folder: Path, change: Callable[[str], str]) -> ModelInfo:
    """Of the golden file of mmpretrain, with another text of the config."""
    root = torch.load(ORIGINALS / "mm_mae_raw_pixels_half" / "checkpoint_published.pth", weights_only=True)
    text = change(root["meta"]["cfg"])
    assert text != root["meta"]["cfg"]
    root["meta"]["cfg"] = text
    torch.save(root, folder / "file.pth")
    return load_checkpoint(folder / "file.pth").info


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("to_rgb=True", "to_rgb=False", "no bgr_to_rgb=True, so images were BGR"),
        ("to_rgb=True,", "", "no bgr_to_rgb=True, so images were BGR"),
        ("img_size=48", "img_size=48, norm_cfg=dict(type='LN', eps=1e-5)", r"\(backbone\) has eps=1e-05, only 1e-06"),
        ("img_size=48", "img_size=48, layer_cfgs=dict(act_cfg=dict(type='ReLU'))", "type='ReLU', only 'GELU' is read"),
        (
            "img_size=48",
            "img_size=48, layer_cfgs=dict(ffn_type='swiglu_fused')",
            "ffn_type='swiglu_fused', only",
        ),
        ("num_patches=36", "num_patches=36, norm_cfg=dict(type='LN', eps=1e-5)", r"\(neck\) has eps=1e-05"),
        ("criterion='L2'", "criterion='Huber'", "has criterion='Huber', only 'L1' and 'L2' are read"),
        ("img_size=48", "img_size=64", "states images of 64 x 64 px, backbone.pos_embed is for 36 patches"),
        ("num_heads=3", "num_heads=5", "num_heads=5 does not divide the width 24"),
        ("mask_ratio=0.5", "mask_ratio=2", "mask_ratio of 2"),
        ("num_layers=3", "num_layers=4", "state num_layers=4, the weights have 3"),
        ("decoder_depth=2", "decoder_depth=3", "state decoder_depth=3, the weights have 2"),
    ],
)
def test_load_checkpoint__refuses_an_openmmlab_config_that_is_not_read(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        openmmlab(tmp_path, lambda text: text.replace(old, new))


def test_load_checkpoint__reads_an_openmmlab_config(tmp_path: Path) -> None:
    info = openmmlab(tmp_path, lambda text: text.replace("criterion='L2'", "criterion='L1'"))
    assert (info.criterion, info.target, info.mask_ratio) == ("l1", "pixels", 0.5)
    head = openmmlab(tmp_path, lambda text: text.replace("norm_pix=False,", ""))  # the head's own default
    assert head.target == "pixels"
    grey = openmmlab(tmp_path, lambda text: text.replace("123.675", "127.5").replace("to_rgb", "bgr_to_rgb"))
    assert grey.mean[0] == 0.5


def test_load_checkpoint__says_what_it_assumes_of_an_openmmlab_file_without_config(tmp_path: Path) -> None:
    with pytest.raises(HeadCountError, match="not in the file"):
        openmmlab(tmp_path, lambda _: "")
    info = load_checkpoint(tmp_path / "file.pth", num_heads=3, decoder_num_heads=4).info
    assert info.assumptions[0] == "the target is normalized patches, as published: the file does not say"


def test_load_checkpoint__reads_the_image_size_of_mmpretrains_swin(tmp_path: Path) -> None:
    root = torch.load(ORIGINALS / "mm_simmim_swin_w3_96" / "checkpoint_published.pth", weights_only=True)
    stated, file = root["meta"]["cfg"], tmp_path / "file.pth"
    for text, given, size in (
        (stated.replace("img_size=96", "img_size=(96, 192)"), None, (96, 192)),
        ("", 96, 96),
        ("", None, 192),
    ):
        root["meta"]["cfg"] = text
        torch.save(root, file)
        info = load_checkpoint(file, image_size=given).info
        assert info.image_size == size
        assert any("the image size is 192 px" in note for note in info.assumptions) == (size == 192)


def test_load_checkpoint__keeps_all_notes_of_mff(tmp_path: Path) -> None:
    root = torch.load(ORIGINALS / "mm_mff" / "checkpoint_published.pth", weights_only=True)
    root["meta"]["cfg"] = ""
    torch.save(root, tmp_path / "file.pth")
    heads = json.loads((ORIGINALS / "mm_mff" / "meta.json").read_text())["heads_to_give"]
    heads = {"num_heads": 3, "decoder_num_heads": 4} | heads
    notes = load_checkpoint(tmp_path / "file.pth", **heads).info.assumptions
    assert notes[0].startswith("the target is normalized patches")
    assert "fused blocks are" in notes[-1]


def test_load_checkpoint__what_a_file_states_wins_over_mae_lites_habits(tmp_path: Path) -> None:
    root = {"start_epoch": 3, "model": torch.load(MAE, weights_only=True)["model"]}
    torch.save(root | {"args": {"norm_pix_loss": False, "num_heads": 4}}, tmp_path / "file.pth")
    info = load_checkpoint(tmp_path / "file.pth", decoder_num_heads=2).info
    assert (info.layout, info.target, info.assumptions) == ("MAE-Lite", "pixels", ())
    torch.save(root, tmp_path / "file.pth")
    info = load_checkpoint(tmp_path / "file.pth", **MAE_HEADS).info
    assert (info.target, info.assumptions[0].split(",")[0]) == ("normalized_pixels", "normalized patches")


def test_load_checkpoint__says_that_biases_are_zero(tmp_path: Path) -> None:
    state = torch.load(MAE, weights_only=True)["model"]
    bare = {name: each for name, each in state.items() if not name.startswith("blocks.") or ".qkv.bias" not in name}
    torch.save({"model": bare}, tmp_path / "file.pth")
    notes = load_checkpoint(tmp_path / "file.pth", **MAE_HEADS).info.assumptions
    assert "biases of query, key and value are zero in blocks: the file has none" in notes


def test_load_checkpoint__refuses_grids_that_transformers_resizes(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "hf_beit" / "model", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": [24, 184]}))  # as many offsets as 8 x 8 have
    state = {name: each for name, each in load_file(folder / "model.safetensors").items() if "_index" not in name}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="grids that are not square, which is not read"):
        load_checkpoint(folder)


def statistics_of(name: str, folder: Path, **arguments: Any) -> ModelInfo:
    """Of a file of one of the BEiT code bases, with these arguments of its trainer."""
    published = BY_NAME[name]
    path = published.save(folder)
    root = torch.load(path, weights_only=False)
    root["args"] = argparse.Namespace(**arguments)
    torch.save(root, path)
    return load_checkpoint(path, **published.heads).info


@pytest.mark.parametrize(
    ("name", "silent", "told_not_to"),
    [
        ("BEiT", HALF, HALF),
        ("BEiT v2", IMAGENET, HALF),
        ("data2vec vision", IMAGENET, HALF),
        ("ConMIM", IMAGENET, HALF),
        ("CAE", IMAGENET, HALF),
    ],
)
def test_load_checkpoint__reads_the_arguments_of_the_beit_code_bases(
    tmp_path: Path, name: str, silent, told_not_to
) -> None:
    flag = "imagenet_default_mean_and_std"
    assert statistics_of(name, tmp_path).mean == silent
    assert statistics_of(name, tmp_path, **{flag: False}).mean == told_not_to
    assert statistics_of(name, tmp_path, **{flag: True}).mean == IMAGENET
    assert statistics_of(name, tmp_path, **{flag: np.bool_(False)}).mean == silent  # not a plain value: as if absent
    if name != "ConMIM":
        info = statistics_of(name, tmp_path, num_mask_patches=9)
        assert (info.mask_ratio, info.mask_rule_source) == (9 / 36, "file")


def test_load_checkpoint__reads_the_masks_of_ibot(tmp_path: Path) -> None:
    published = BY_NAME["iBOT"]
    path = published.save(tmp_path)
    root = torch.load(path, weights_only=False)
    for arguments, kind, ratio in (
        ({"pred_ratio": [0.0, 0.4], "pred_shape": "block"}, "blockwise", 0.4),
        ({"pred_ratio": 0.7, "pred_shape": "rand"}, "random", 0.7),
        ({"pred_ratio": None}, "blockwise", 0.3),
    ):
        root["args"] = argparse.Namespace(**arguments)
        torch.save(root, path)
        rule = load_checkpoint(path, **published.heads).info.mask_rule
        assert (rule.kind, rule.ratio) == (kind, ratio)


def test_load_checkpoint__reads_how_many_patches_bootmae_masked(tmp_path: Path) -> None:
    raw = open_checkpoint(GOLDEN / "bootmae" / "checkpoint.pth")
    count = raw.tensors["pos_embed"].shape[1] - 1
    torch.save({"model": raw.tensors, "args": {"mask_num": count / 2}}, tmp_path / "file.pth")
    info = load_checkpoint(tmp_path / "file.pth", num_heads=3).info
    assert info.mask_ratio == 0.5
    assert info.mask_rule_source.startswith("file")


def test_load_checkpoint__says_what_it_takes_from_published_mae_lite(tmp_path: Path) -> None:
    state = torch.load(ORIGINALS / "mae_lite" / "checkpoint_ema.pth", weights_only=True)
    torch.save(state, tmp_path / "file.pth")
    info = load_checkpoint(tmp_path / "file.pth", num_heads=12, decoder_num_heads=3).info
    assert "normalized patches, as of published MAE-Lite: the file does not say" in info.assumptions[-1]


def simmim_swin(folder: Path, **swin: Any) -> ModelInfo:
    path = ORIGINALS / "st_simmim_swinv2_pretrained_window" / "checkpoint.pth"
    raw = open_checkpoint(path)
    config = {"DATA": raw.extras["config"]["DATA"], "MODEL": {"SWINV2": swin}}
    torch.save({"model": raw.tensors, "config": config}, folder / "file.pth")
    return load_checkpoint(folder / "file.pth").info


def test_load_checkpoint__compares_windows_and_shift_masks_with_what_a_config_states(tmp_path: Path) -> None:
    assert simmim_swin(tmp_path, WINDOW_SIZE=4, QK_SCALE=None).image_size == 32
    with pytest.raises(CheckpointError, match=r"its config has QK_SCALE=0\.5, only None is read"):
        simmim_swin(tmp_path, WINDOW_SIZE=4, QK_SCALE=0.5)
    with pytest.raises(CheckpointError, match="states a window of 2 tokens, its coordinates have 4"):
        simmim_swin(tmp_path, WINDOW_SIZE=2)
    path = ORIGINALS / "st_simmim_swinv2_pretrained_window" / "checkpoint.pth"
    tensors = open_checkpoint(path).tensors
    torch.save({"model": tensors}, tmp_path / "alone.pth")
    assert load_checkpoint(tmp_path / "alone.pth").info.image_size == 32  # of its shift masks
    torch.save({"model": tensors, "config": {"DATA": {"IMG_SIZE": 64}}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"states images of 64 px, its shift masks are for \(32, 32\)"):
        load_checkpoint(tmp_path / "other.pth")
    name = next(name for name in tensors if name.endswith("attn_mask"))
    torch.save({"model": tensors | {name: tensors[name].flip(0)}}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match="is no shift mask of windows of 4 tokens"):
        load_checkpoint(tmp_path / "wrong.pth")


def test_load_checkpoint__reads_hieras_own_config_or_says_that_heads_double(tmp_path: Path) -> None:
    state = open_checkpoint(ORIGINALS / "hiera_rect" / "checkpoint.pth").tensors
    given = {"decoder_num_heads": 2, "image_size": (64, 96)}
    torch.save({"model_state": state}, tmp_path / "silent.pth")
    silent = load_checkpoint(tmp_path / "silent.pth", num_heads=1, **given).info
    assert "heads double with each stage" in silent.assumptions[0]
    told = {"num_heads": 1, "input_size": (64, 96), "mask_unit_attn": (True, True, False, False), "head_mul": 2.0}
    torch.save({"model_state": state, "config": told}, tmp_path / "told.pth")
    model = load_checkpoint(tmp_path / "told.pth", decoder_num_heads=2)
    assert (model.config.stage_heads, model.info.assumptions) == ((1, 2, 4, 8), ())
    torch.save({"model_state": state, "config": told | {"head_mul": 1.0}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"its config has head_mul=1\.0, only 2\.0 is read"):
        load_checkpoint(tmp_path / "other.pth", decoder_num_heads=2)


def test_load_checkpoint__reads_models_of_one_frame(tmp_path: Path) -> None:
    state = dict(open_checkpoint(MAE).tensors)
    kernel = state["patch_embed.proj.weight"]
    expected = load_checkpoint(MAE, **MAE_HEADS).state_dict()
    for frames in (1, 3):
        state["patch_embed.proj.weight"] = kernel.unsqueeze(2).repeat(1, 1, frames, 1, 1)
        torch.save(state, tmp_path / "file.pt")
        if frames > 1:
            with pytest.raises(CheckpointError, match="its patches span 3 frames, only models of one are read"):
                load_checkpoint(tmp_path / "file.pt", **MAE_HEADS)
        else:
            loaded = load_checkpoint(tmp_path / "file.pt", **MAE_HEADS).state_dict()
            assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_load_checkpoint__takes_rows_and_columns_from_a_config(tmp_path: Path) -> None:
    stated = json.loads((GOLDEN / "hf_vitmae" / "model" / "config.json").read_text())
    side = stated["image_size"]
    info = hf_info(tmp_path / "hf", config={"image_size": [side // 2, 2 * side]})
    assert (info.image_size, info.assumptions) == ((side // 2, 2 * side), ())
    assert info.grid[1] == 4 * info.grid[0]


def test_load_checkpoint__reads_ijepas_moving_average_on_request(tmp_path: Path) -> None:
    path = BY_NAME["I-JEPA"].save(tmp_path)
    own, average = (
        load_checkpoint(path, num_heads=2, weights=weights).state_dict() for weights in ("model", "model_ema")
    )
    for name, tensor in own.items():
        of_encoder = not name.startswith(("decoder", "mask_token"))
        torch.testing.assert_close(average[name], tensor + 1 if of_encoder else tensor)


def test_load_checkpoint__names_the_mask_token_of_a_layout_that_is_not_read(tmp_path: Path) -> None:
    state = {name: each for name, each in open_checkpoint(MAE).tensors.items() if "pos_embed" not in name}
    torch.save({"model": state}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="a layout that is unknown; it holds mask_token: measure the model live"):
        load_checkpoint(tmp_path / "file.pth", **MAE_HEADS)


def with_settings(hyper_parameters: object) -> RawCheckpoint:
    """The golden MAE with settings of Lightning."""
    return replace(open_checkpoint(MAE), extras={"hyper_parameters": hyper_parameters})


def test_load_checkpoint__reads_settings_in_parts(tmp_path: Path) -> None:
    stored = open_checkpoint(GOLDEN / "omegaconf.ckpt").extras["hyper_parameters"]
    assert stored == {
        "model": {
            "num_heads": 4,
            "decoder": {"num_heads": 2},
            "img_size": [64, 64],
            "mask_ratio": 0.6,
            "encoder_lr": "${lr}",
            "teacher": {"num_heads": 12},
            "extra": None,
        },
        "lr": None,
    }
    attributes = {"args": argparse.Namespace(model=types.SimpleNamespace(mask_ratio=0.6)), "model": {}}
    torch.save(attributes | {"state_dict": open_checkpoint(MAE).tensors}, tmp_path / "file.ckpt")
    assert load_checkpoint(tmp_path / "file.ckpt", **MAE_HEADS).info.mask_ratio == 0.6
    for settings in (
        stored,
        {"mae": {"encoder": {"num_heads": 4}, "decoder": {"num_heads": 2, "depth": 4}, "mask": {"mask_ratio": 0.6}}},
        {
            "num_heads": [4, 4, 4],
            "probe": {"num_heads": 1},
            "net": {"decoder_num_heads": 2, "num_heads": 8},
            "mask_ratio": 0.6,
        },
    ):
        model = load_checkpoint(with_settings(settings))
        assert (model.config.num_heads, model.config.decoder_num_heads, model.info.mask_ratio) == (4, 2, 0.6)
        assert model.info.unsettled_heads == ()


@pytest.mark.parametrize(
    ("settings", "message", "given"),
    [
        ({"a": {"num_heads": 4}, "b": {"num_heads": 8}}, r"state hyper_parameters\.a\.num_heads = 4 and", "num_heads"),
        ({"model": {"num_heads": "${heads}"}}, r"num_heads = '\$\{heads\}'; give --num-heads", "num_heads"),
        (
            {"num_heads": [2, 4]},
            r"num_heads=\[2, 4\], only one number for all .*; give --num-heads",
            "num_heads",
        ),
        ({"num_heads": 8.0}, "states num_heads=8.0, only one number", "num_heads"),
        ({"model": {"decoder": {"depth": 3}}}, "state decoder_depth=3, the weights have 4", None),
        ({"data": {"image_size": 96}}, "states images of 96 x 96 px, pos_embed is for 64 patches", "image_size"),
        ({"image_size": "64"}, "image_size = '64'; give --image-size", "image_size"),
        ({"mask_ratio": "high"}, "mask_ratio of 'high', which must .*; give --mask-ratio", "mask_ratio"),
        ({"mask_ratio": [0.5, 0.9]}, r"mask_ratio of \[0.5, 0.9\], .*; give --mask-ratio", "mask_ratio"),
        ({"a": {"mask_ratio": 0.5}, "b": {"mask_ratio": 0.9}}, r"of \[0.5, 0.9\], .*; give --mask-ratio", "mask_ratio"),
        ({"mask_ratio": 1}, "mask_ratio of 1, which must lie between 0 and 1; give --mask-ratio", "mask_ratio"),
        ({"a": {"layer_norm_eps": 1e-5}, "b": {"layer_norm_eps": 1e-6}}, "layer_norm_eps must be a number, got", None),
    ],
)
def test_load_checkpoint__refuses_settings_in_parts_that_contradict(settings, message: str, given: str | None) -> None:
    raw = with_settings(settings)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(raw, **{name: each for name, each in MAE_HEADS.items() if name != given})
    if given:
        option: dict[str, Any] = {"num_heads": {}, "image_size": {"image_size": 64}, "mask_ratio": {"mask_ratio": 0.6}}
        info = load_checkpoint(raw, **MAE_HEADS, **option[given]).info
        assert given != "mask_ratio" or (info.mask_ratio, info.mask_rule_source) == (0.6, "given")
        if given != "num_heads" or "only one number" in message:
            with pytest.raises(CheckpointError, match=message):
                inspect_checkpoint(raw, **{name: each for name, each in MAE_HEADS.items() if name != given})


# Objects of other software.


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def test_open_checkpoint__reads_around_harmless_objects_and_mappings(tmp_path: Path) -> None:
    state = torch.load(MAE, weights_only=True)["model"]
    with foreign("mmengine.config.config", "ConfigDict") as (config,):
        beside = {
            "args": argparse.Namespace(mask_ratio=0.6, num_heads=np.int64(4), where=Path("x"), getter=None),
            "config": Call(config, {"DATA": {"IMG_SIZE": 16}}),
            "hooks": [Call(operator.attrgetter, "x"), Call(getattr, 1, "real"), Call(collections.Counter, {"a": 1})],
            "lock": Call(threading.Event),
            "bytes": bytearray(b"12"),
        }
        torch.save({"model": state, **beside}, tmp_path / "file.pth")
    raw = open_checkpoint(tmp_path / "file.pth")
    assert raw.extras["args"] == {"mask_ratio": 0.6, "num_heads": None, "where": None, "getter": None}
    assert raw.extras["config"] == {"DATA": {"IMG_SIZE": 16}}
    assert load_checkpoint(raw, **MAE_HEADS).info.mask_ratio == 0.6


def test_open_checkpoint__ends_where_an_object_of_omegaconf_holds_itself(tmp_path: Path) -> None:
    with foreign("omegaconf.nodes", "AnyNode") as (node,):
        loop, items = node(), node()
        vars(loop)["_val"], vars(items)["_content"] = loop, [items]
        torch.save({"model": {"x": torch.zeros(1)}, "args": {"loop": loop, "items": items}}, tmp_path / "file.pth")
    found = open_checkpoint(tmp_path / "file.pth").extras["args"]
    assert found["loop"] is None
    assert str(found["items"]).strip("[]") == ""


def test_open_checkpoint__names_the_class_of_a_model_that_was_saved_whole(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"an object of torch\.nn\.modules\.linear\.Linear, not its"):
        open_checkpoint(tmp_path / "model.pth")
    torch.save({"model": {}, "x": Call(bytearray, 2**40)}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="asks for more memory than a checkpoint needs"):
        open_checkpoint(tmp_path / "bomb.pth")
