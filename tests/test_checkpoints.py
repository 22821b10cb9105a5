"""Checkpoints: every layout loads strictly, nothing foreign ever runs, what cannot be used is refused in a line."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import io
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, Golden
from safetensors.torch import load_file, save_file
from tiny_models import make_mae, make_simmim, some_images, some_masks
from torch import Tensor

from mto_analysis import (
    CheckpointError,
    MaskRule,
    heterogeneity,
    image_batches,
    inspect_checkpoint,
    load_checkpoint,
    mask_keys,
    open_images,
    save_checkpoint,
)
from mto_analysis.checkpoints import checkpoint_sha256, open_checkpoint
from mto_analysis.checkpoints.conversion import Given, StateDict, block_numbers
from mto_analysis.checkpoints.layouts import LAYOUTS, Names
from mto_analysis.checkpoints.reading import read_checkpoint
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import HeadCountError
from mto_analysis.models.vit import relative_position_index
from mto_analysis.runtime.pixels import IMAGENET_MEAN, IMAGENET_STD

MAE_HEADS = {"num_heads": 4, "decoder_num_heads": 2}
MAE_FILE = GOLDEN / "mae" / "checkpoint.pth"
SIMMIM_FILE = GOLDEN / "simmim_vit" / "checkpoint.pth"
HF_FOLDER = GOLDEN / "hf_vitmae" / "model"


@pytest.fixture
def mae_state() -> dict[str, Tensor]:
    return torch.load(MAE_FILE, weights_only=True)["model"]


@pytest.fixture
def simmim_state() -> dict[str, Tensor]:
    return dict(read_checkpoint(SIMMIM_FILE).tensors)


@pytest.fixture
def foreign_module() -> Iterator[Callable[[str, str, Any], type]]:
    """Makes a class of a package that is not installed, importable while a file is written, and not afterwards."""
    made: list[str] = []

    def make(module: str, name: str, base: Any = object) -> type:
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            part = ".".join(parts[:depth])
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                made.append(part)
        kind = type(name, (base,), {"__module__": module, "__qualname__": name})
        setattr(sys.modules[module], name, kind)
        return kind

    yield make
    for part in made:
        sys.modules.pop(part, None)


def forget(*modules: str) -> None:
    for module in modules:
        sys.modules.pop(module, None)


def assert_same_model(model: torch.nn.Module, other: torch.nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
    assert model.config == other.config


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Loading.


def test_load_checkpoint__gives_a_float32_cpu_model_in_eval_mode(golden: Golden) -> None:
    model = golden.load()
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert (
        model.info.layout
        == {
            "mae": "facebookresearch/mae",
            "simmim_vit": "microsoft/SimMIM ViT",
            "hf_vitmae": "Hugging Face ViTMAE",
        }[golden.name]
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_load_checkpoint__takes_paths_of_either_kind(kind: type) -> None:
    assert_same_model(load_checkpoint(kind(MAE_FILE), **MAE_HEADS), load_checkpoint(MAE_FILE, **MAE_HEADS))
    assert load_checkpoint(kind(HF_FOLDER)).info.family == "mae"
    assert load_checkpoint(kind(HF_FOLDER / "model.safetensors")).info.family == "mae"


def test_load_checkpoint__reads_every_config_of_the_file(golden_of) -> None:
    simmim = golden_of("simmim_vit").load()
    assert simmim.info.mask_rule == MaskRule("block", 0.6, 16)
    assert simmim.info.mask_rule_source == "file"
    assert (simmim.config.num_heads, simmim.config.dim, simmim.config.depth) == (3, 48, 4)
    assert (simmim.info.target, simmim.info.criterion) == ("pixels", "l1")
    hf = golden_of("hf_vitmae").load()
    assert (hf.config.num_heads, hf.config.decoder_num_heads, hf.config.eps) == (4, 4, 1e-12)
    assert (hf.info.target, hf.info.criterion, hf.info.mask_rule_source) == ("normalized_pixels", "l2", "file")
    mae = golden_of("mae").load()
    assert (mae.info.target, mae.info.mask_rule_source) == (None, "published MAE")


def test_load_checkpoint__tells_where_a_mask_rule_comes_from(tmp_path: Path, simmim_state) -> None:
    torch.save({"model": simmim_state}, tmp_path / "plain.pth")
    info = load_checkpoint(tmp_path / "plain.pth").info
    assert info.mask_rule == MaskRule("block", 0.6, 16)
    assert info.mask_rule_source.startswith("rule: ")


def test_load_checkpoint__takes_files_of_every_root(tmp_path: Path, mae_state) -> None:
    expected = load_checkpoint(MAE_FILE, **MAE_HEADS)
    roots = {
        "flat": mae_state,
        "model": {"model": mae_state, "model_ema": {name: 0 * tensor for name, tensor in mae_state.items()}},
        "state_dict": {"state_dict": mae_state, "epoch": 3},
        "model_state": {"model_state": mae_state},
        "module": {"module": mae_state},
        "ordered": {"model": collections.OrderedDict(mae_state)},
        "parameters": {"model": {name: torch.nn.Parameter(tensor) for name, tensor in mae_state.items()}},
        "parallel": {"model": {f"module.{name}": tensor for name, tensor in mae_state.items()}},
        "twice parallel": {"model": {f"module.module.{name}": tensor for name, tensor in mae_state.items()}},
    }
    for name, root in roots.items():
        torch.save(root, tmp_path / f"{name}.pth")
        assert_same_model(load_checkpoint(tmp_path / f"{name}.pth", **MAE_HEADS), expected)


def test_load_checkpoint__strips_a_prefix_only_when_all_names_have_it(tmp_path: Path, mae_state) -> None:
    mixed = {(f"module.{name}" if name == "norm.bias" else name): tensor for name, tensor in mae_state.items()}
    torch.save({"model": mixed}, tmp_path / "mixed.pth")
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias; unknown: module\.norm\.bias"):
        load_checkpoint(tmp_path / "mixed.pth", **MAE_HEADS)


def test_load_checkpoint__reads_trainers_files(tmp_path: Path, mae_state) -> None:
    # What facebookresearch/mae's script writes, with what others put there too.
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    arguments = argparse.Namespace(
        mask_ratio=0.6,
        norm_pix_loss=True,
        lr=np.float64(1.5e-4),
        input_size=np.int64(64),
        device=torch.device("cpu"),
        output_dir=pathlib.PurePosixPath("out"),
        started=datetime.datetime(2024, 1, 1),
        steps=range(3),
        nested=argparse.Namespace(betas=(0.9, 0.95), extra={"a": [1, 2]}),
    )
    root = {
        "model": mae_state,
        "optimizer": optimizer.state_dict(),
        "epoch": 799,
        "scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict(),
        "args": arguments,
        "max_accuracy": np.float32(71.5),
        "history": collections.defaultdict(list, loss=[np.float64(0.4)]),
        "queue": collections.deque([1.0], maxlen=3),
        "array": np.arange(3.0),
    }
    torch.save(root, tmp_path / "trainer.pth")
    model = load_checkpoint(tmp_path / "trainer.pth", **MAE_HEADS)
    assert_same_model(model, load_checkpoint(MAE_FILE, **MAE_HEADS))
    assert model.info.mask_rule == MaskRule("random", 0.6, 8)
    assert (model.info.mask_rule_source, model.info.target) == ("file", "normalized_pixels")
    assert inspect_checkpoint(tmp_path / "trainer.pth", **MAE_HEADS).epoch == 799


def test_load_checkpoint__reads_a_pickled_config_without_its_package(
    tmp_path: Path, simmim_state, foreign_module
) -> None:
    node = foreign_module("yacs.config", "CfgNode", dict)
    data = node(MASK_RATIO=0.4, MASK_PATCH_SIZE=8, IMG_SIZE=64)
    data.__dict__["__immutable__"] = True
    config = node(DATA=data, MODEL=node(VIT=node(NUM_HEADS=3)))
    torch.save({"model": simmim_state, "config": config}, tmp_path / "simmim.pth")
    forget("yacs", "yacs.config")
    model = load_checkpoint(tmp_path / "simmim.pth")
    assert model.info.mask_rule == MaskRule("block", 0.4, 8)
    assert not {"yacs", "yacs.config"} & set(sys.modules)


def test_load_checkpoint__imports_neither_foreign_packages_nor_matplotlib() -> None:
    code = f"""
import sys
from mto_analysis import load_checkpoint
load_checkpoint({str(SIMMIM_FILE)!r})
load_checkpoint({str(HF_FOLDER)!r})
import mto_analysis.probe
foreign = ("yacs", "mmengine", "mmcv", "transformers", "matplotlib")  # drawing is for those who draw
bad = [name for name in sys.modules if name.split(".")[0] in foreign]
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "cli")])}


def test_load_checkpoint__reads_foreign_objects_of_other_trainers(tmp_path: Path, mae_state, foreign_module) -> None:
    buffer = foreign_module("mmengine.logging.history_buffer", "HistoryBuffer")()
    buffer.__dict__.update(_log_history=np.arange(3), _count_history=[1])
    nested = foreign_module("mmengine.config", "ConfigDict", dict)(a={"b": 1})
    torch.save({"state_dict": mae_state, "message_hub": {"x": buffer}, "meta": nested}, tmp_path / "mm.pth")
    forget("mmengine.logging.history_buffer", "mmengine.logging", "mmengine.config", "mmengine")
    assert_same_model(load_checkpoint(tmp_path / "mm.pth", **MAE_HEADS), load_checkpoint(MAE_FILE, **MAE_HEADS))


@pytest.mark.parametrize("extra", [{}, {"args": argparse.Namespace(mask_ratio=0.6), "lr": np.float64(1.0)}])
def test_load_checkpoint__reads_files_of_old_torch(tmp_path: Path, mae_state, extra: dict) -> None:
    torch.save({"model": mae_state, **extra}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = load_checkpoint(tmp_path / "old.pth", **MAE_HEADS)
    assert_same_model(model, load_checkpoint(MAE_FILE, **MAE_HEADS))
    assert model.info.mask_ratio == (0.6 if extra else 0.75)


def test_load_checkpoint__reads_simmim_with_positions_of_every_kind(tmp_path: Path) -> None:
    for variant in (
        {"position_bias": "shared"},
        {"position_bias": "per_block"},
        {"position_bias": None, "absolute_positions": True},
        {"position_bias": "per_block", "absolute_positions": True, "layer_scale": None},
    ):
        model = make_simmim(**variant)
        config = {"MODEL": {"VIT": {"NUM_HEADS": 3}}, "DATA": {"IMG_SIZE": 16}}
        torch.save({"model": simmim_layout(model), "config": config}, tmp_path / "simmim.pth")
        loaded = load_checkpoint(tmp_path / "simmim.pth")
        assert_same_model_but_key_bias(loaded, model)


def simmim_layout(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model under the names of microsoft/SimMIM's ViT, written from its source."""
    state: dict[str, Tensor] = {}
    shared = model.config.position_bias == "shared"
    for name, tensor in model.state_dict().items():
        if name.startswith("decoder."):
            state[name.replace("decoder.", "decoder.0.")] = tensor
        elif name.startswith("position_biases."):
            number = name.split(".")[1]
            owner = "rel_pos_bias" if shared else f"blocks.{number}.attn"
            state[f"encoder.{owner}.relative_position_bias_table"] = tensor
            state[f"encoder.{owner}.relative_position_index"] = relative_position_index(model.info.grid)
        elif name.endswith("qkv.bias"):
            query, _, value = tensor.chunk(3)
            state[f"encoder.{name.removesuffix('qkv.bias')}q_bias"] = query.clone()
            state[f"encoder.{name.removesuffix('qkv.bias')}v_bias"] = value.clone()
        else:
            state["encoder." + name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")] = tensor
    return state


def assert_same_model_but_key_bias(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert model.config == other.config or model.config.layer_scale is None or model.config.layer_scale == 0.1
    state, expected = model.state_dict(), other.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        if name.endswith("qkv.bias"):
            query, _, value = tensor.chunk(3)
            tensor = torch.cat([query, torch.zeros_like(query), value])
        assert torch.equal(state[name], tensor), name


def test_load_checkpoint__does_not_need_index_buffers(tmp_path: Path, simmim_state) -> None:
    without = {name: tensor for name, tensor in simmim_state.items() if not name.endswith("relative_position_index")}
    assert len(without) < len(simmim_state)
    torch.save({"model": without}, tmp_path / "simmim.pth")
    assert_same_model(load_checkpoint(tmp_path / "simmim.pth"), load_checkpoint(SIMMIM_FILE))


def rename_as_transformers_5(name: str) -> str:
    return name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer.")


def copy_hf(folder: Path, rename: Callable[[str], str] = str, **changes: Any) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((HF_FOLDER / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return {rename(name): tensor for name, tensor in load_file(HF_FOLDER / "model.safetensors").items()}


def test_load_checkpoint__reads_hugging_face_folders_of_every_form(tmp_path: Path) -> None:
    expected = load_checkpoint(HF_FOLDER)
    state = copy_hf(tmp_path / "resaved", rename_as_transformers_5)
    assert any("decoder_encoder" in name for name in state)
    save_file(state, tmp_path / "resaved" / "model.safetensors")
    torch.save(copy_hf(tmp_path / "bin"), tmp_path / "bin" / "pytorch_model.bin")
    state = copy_hf(tmp_path / "shards")
    names = sorted(state)
    parts = {"a.safetensors": names[:30], "b.safetensors": names[30:]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / "shards" / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for form in ("resaved", "bin", "shards"):
        assert_same_model(load_checkpoint(tmp_path / form), expected)
    (tmp_path / "shards" / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks b\.safetensors, which its index names"):
        load_checkpoint(tmp_path / "shards")


def test_load_checkpoint__does_not_follow_an_index_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_file(copy_hf(folder), tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks outside\.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads must be a positive whole number, got '4'"),
        ({"decoder_num_attention_heads": 0}, "decoder_num_attention_heads must be a positive whole number, got 0"),
        ({"num_attention_heads": 5}, "num_heads=5 does not divide the width 48"),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps must be a number, got 'tiny'"),
        ({"mask_ratio": 1.5}, "mask_ratio of 1.5, which must lie between 0 and 1"),
    ],
)
def test_load_checkpoint__refuses_impossible_configs(tmp_path: Path, changes: dict, message: str) -> None:
    save_file(copy_hf(tmp_path / "hf", **changes), tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "hf")
    one_line(error)


def test_load_checkpoint__needs_the_config_of_a_hugging_face_folder(tmp_path: Path) -> None:
    save_file(copy_hf(tmp_path / "hf"), tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        load_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs its config\.json beside it; give the whole folder"):
        load_checkpoint(tmp_path / "hf")


# Our own layout.


@pytest.mark.parametrize("make", [make_mae, make_simmim, lambda: make_simmim(position_bias="per_block")])
def test_save_checkpoint__loads_back_bit_equal_with_all_metadata(tmp_path: Path, make) -> None:
    model = make()
    save_checkpoint(model, tmp_path / "model.safetensors", notes={"trained": "not at all"})
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert_same_model(loaded, model)
    assert loaded.info.mask_rule == model.info.mask_rule
    assert loaded.info.layout == "mto_analysis"
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    images, mask = some_images(torch.Generator().manual_seed(0), 2), some_masks(torch.Generator().manual_seed(0), 2)
    assert torch.equal(loaded(images, mask), model(images, mask))


def test_save_checkpoint__carries_a_golden_file_without_loss(tmp_path: Path, golden: Golden) -> None:
    model = golden.load()
    save_checkpoint(model, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert_same_model(loaded, model)
    assert (loaded.info.target, loaded.info.mask_rule_source) == (model.info.target, model.info.mask_rule_source)


def test_save_checkpoint__in_float16_rounds_each_weight_once(tmp_path: Path) -> None:
    model = make_mae()
    save_checkpoint(model, tmp_path / "half.safetensors", dtype=torch.float16)
    save_checkpoint(model, tmp_path / "full.safetensors")
    loaded = load_checkpoint(tmp_path / "half.safetensors")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]


def test_save_checkpoint__replaces_whole_files_and_refuses_foreign_models(tmp_path: Path, two_stacks) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(make_mae(), path)
    save_checkpoint(make_simmim(), path)
    assert load_checkpoint(path).info.family == "simmim_vit"
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match=r"family must be one of mae, simmim_vit.*, got 'two_stacks'"):
        save_checkpoint(two_stacks, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "metadata is not readable"),
        ("[]", "metadata is not readable"),
        ('{"version": 99}', "written by a newer mto-analysis; upgrade"),
        ('{"version": 1, "family": "other", "config": {}, "info": {}}', "metadata is not readable"),
        ('{"version": 1, "family": "mae", "config": {"dim": "x"}, "info": {}}', "metadata is not readable"),
        ('{"version": 1, "family": "mae", "config": {"what": 1}, "info": {}}', "metadata is not readable"),
    ],
)
def test_load_checkpoint__refuses_broken_metadata(tmp_path: Path, about: str, message: str) -> None:
    save_file(make_mae().state_dict(), tmp_path / "m.safetensors", metadata={"mto_analysis": about})
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "m.safetensors")
    one_line(error)


def test_load_checkpoint__refuses_head_counts_that_contradict_our_own_file(tmp_path: Path) -> None:
    save_checkpoint(make_mae(), tmp_path / "m.safetensors")
    assert load_checkpoint(tmp_path / "m.safetensors", num_heads=3, decoder_num_heads=2).config.num_heads == 3
    with pytest.raises(CheckpointError, match="decoder_num_heads=4 contradicts the file, which has 2 heads"):
        load_checkpoint(tmp_path / "m.safetensors", decoder_num_heads=4)


# Head counts.


def test_load_checkpoint__asks_for_head_counts_it_cannot_know() -> None:
    with pytest.raises(HeadCountError, match=r"width 48; give it as num_heads=... \(--num-heads on the command"):
        load_checkpoint(MAE_FILE)
    with pytest.raises(HeadCountError, match=r"width 32; give it as decoder_num_heads=... \(--decoder-num-heads"):
        load_checkpoint(MAE_FILE, num_heads=4)
    with pytest.raises(CheckpointError, match="num_heads=5 does not divide the width 48"):
        load_checkpoint(MAE_FILE, num_heads=5, decoder_num_heads=2)
    with pytest.raises(CheckpointError, match="decoder_num_heads=3 does not divide the width 32"):
        load_checkpoint(MAE_FILE, num_heads=4, decoder_num_heads=3)


def test_load_checkpoint__takes_given_head_counts(golden_of) -> None:
    golden = golden_of("mae")
    model = load_checkpoint(MAE_FILE, num_heads=2, decoder_num_heads=4)
    assert (model.config.num_heads, model.config.decoder_num_heads) == (2, 4)
    with torch.no_grad():
        last = list(model.layer_tokens(golden.images, golden.mask))[-1].tokens.numpy()
    assert np.abs(last - golden.expected["tokens"][-1]).max() > 0.1  # a wrong count is silent but matters


def test_load_checkpoint__refuses_counts_that_contradict_the_file() -> None:
    assert load_checkpoint(SIMMIM_FILE, num_heads=3).config.num_heads == 3
    with pytest.raises(CheckpointError, match="num_heads=6 contradicts the file, which has 3 heads; leave --num-heads"):
        load_checkpoint(SIMMIM_FILE, num_heads=6)
    with pytest.raises(CheckpointError, match="decoder_num_heads=2 contradicts the file, which has 4 heads"):
        load_checkpoint(HF_FOLDER, decoder_num_heads=2)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16)])
def test_load_checkpoint__knows_published_widths(tmp_path: Path, width: int, heads: int) -> None:
    model = make_mae(dim=width, depth=1, num_heads=1, mlp_dim=8, decoder_dim=512, decoder_depth=1, decoder_num_heads=1)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    config = load_checkpoint(tmp_path / "mae.pth").config
    assert (config.num_heads, config.decoder_num_heads) == (heads, 16)


def test_heads_choose__prefers_the_file_then_the_user_then_the_published() -> None:
    published = {48: 12}
    assert Given().choose("num_heads", 48, stated=3, published=published) == 3
    assert Given(num_heads=4).choose("num_heads", 48, published=published) == 4
    assert Given(decoder_num_heads=4).choose("num_heads", 48, published=published) == 12


# Strictness.


def edit(state: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    edited = dict(state)
    tensor = edited.pop(name)
    if change is not None:
        edited[name] = change(tensor)
    return edited


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mask_token", None, "mask_token"),
        ("blocks.1.attn.qkv.weight", None, r"missing: blocks\.1\.attn\.qkv\.weight"),
        ("decoder_pred.bias", None, r"missing: decoder_pred\.bias"),
        ("cls_token", lambda t: t[..., :40], r"wrong shape: cls_token is \[1, 1, 40\], must be \[1, 1, 48\]"),
        ("norm.weight", lambda t: t[:, None], r"wrong shape: norm\.weight is \[48, 1\], must be \[48\]"),
        ("mask_token", lambda t: t[0], "mask_token must have 3 axes, none empty"),
        ("norm.bias", lambda t: t.long(), r"wrong type: norm\.bias is torch\.int64"),
        ("norm.bias", lambda t: t * float("nan"), r"norm\.bias holds values that are not finite"),
        (
            "decoder_blocks.2.mlp.fc1.bias",
            lambda t: t / 0,
            r"decoder_blocks\.2\.mlp\.fc1\.bias holds values that are not",
        ),
        ("pos_embed", lambda t: t[:, :60], "position tables differ in length: pos_embed 59, decoder_pos_embed 64"),
        ("decoder_blocks.0.norm1.weight", lambda t: t.to(torch.complex64), "is not a plain tensor"),
        ("norm.weight", lambda t: t.to_sparse(), r"norm\.weight is not a plain tensor"),
    ],
)
def test_load_checkpoint__names_what_is_wrong_with_a_tensor(
    tmp_path: Path, mae_state, name: str, change, message: str
) -> None:
    torch.save({"model": edit(mae_state, name, change)}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "mae.pth", **MAE_HEADS)
    assert "mae.pth" in one_line(error)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("encoder.mask_token", "mask_token"),
        ("encoder.blocks.2.attn.v_bias", r"lacks blocks\.2\.attn\.v_bias"),
        ("encoder.blocks.0.attn.q_bias", r"blocks\.0\.attn"),
        ("encoder.rel_pos_bias.relative_position_bias_table", "no positions|image size|heads|NUM_HEADS|position"),
    ],
)
def test_load_checkpoint__names_what_is_missing_in_simmim(tmp_path: Path, simmim_state, missing, message) -> None:
    torch.save({"model": edit(simmim_state, missing, None)}, tmp_path / "simmim.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / "simmim.pth")
    assert "simmim.pth" in one_line(error)


def test_load_checkpoint__names_what_is_unknown(tmp_path: Path, mae_state, simmim_state) -> None:
    torch.save({"model": mae_state | {"blocks.0.extra.weight": torch.ones(1)}}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"unknown: blocks\.0\.extra\.weight"):
        load_checkpoint(tmp_path / "mae.pth", **MAE_HEADS)
    torch.save({"model": simmim_state | {"encoder.extra": torch.ones(1)}}, tmp_path / "simmim.pth")
    with pytest.raises(CheckpointError, match=r"unknown: encoder\.extra"):  # under the file's name, not ours
        load_checkpoint(tmp_path / "simmim.pth")


def test_load_checkpoint__names_a_missing_block(tmp_path: Path, mae_state) -> None:
    gap = {name: tensor for name, tensor in mae_state.items() if not name.startswith("decoder_blocks.2.")}
    torch.save({"model": gap}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"decoder_blocks\.N are not numbered from 0 without a gap: \[0, 1, 3\]"):
        load_checkpoint(tmp_path / "mae.pth", **MAE_HEADS)


def test_load_checkpoint__names_a_missing_hugging_face_tensor(tmp_path: Path) -> None:
    state = copy_hf(tmp_path / "hf")
    for missing in ("decoder.mask_token", "vit.encoder.layer.1.attention.attention.key.weight"):
        save_file(edit(state, missing, None), tmp_path / "hf" / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"mask_token|blocks\.1\.attn\.k\.weight"):
            load_checkpoint(tmp_path / "hf")


def test_load_checkpoint__refuses_one_tensor_under_two_names(tmp_path: Path) -> None:
    state = copy_hf(tmp_path / "hf")
    name = "decoder.decoder_layers.0.layernorm_before.weight"
    state[rename_as_transformers_5(name)] = state[name].clone()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="the same tensor under two names"):
        load_checkpoint(tmp_path / "hf")


def test_state_dict_shape__and_helpers_by_hand() -> None:
    with pytest.raises(CheckpointError, match="the file lacks a"):
        StateDict({}).shape("a", 1)
    with pytest.raises(CheckpointError, match=r"a must have 1 axes, none empty, got \[0\]"):
        StateDict({"a": torch.zeros(0)}).shape("a", 1)
    with pytest.raises(CheckpointError, match="without a gap"):
        block_numbers(["blocks.1.a"], "blocks.")


# Files that cannot be measured.


def test_load_checkpoint__says_what_a_file_without_mask_token_holds(tmp_path: Path, mae_state, simmim_state) -> None:
    encoder = {name: t for name, t in mae_state.items() if not name.startswith("decoder") and name != "mask_token"}
    swin = {name: t for name, t in simmim_state.items() if name.startswith("encoder.") and "mask_token" not in name}
    for tensors in (encoder, encoder | {"head.weight": torch.ones(10, 48)}, swin, {"conv1.weight": torch.ones(3)}):
        torch.save({"model": tensors}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match="none of its tensors is named mask_token or masked_embed") as error:
            load_checkpoint(tmp_path / "file.pth")
        assert sorted(tensors)[0] in str(error.value)
        one_line(error)


@pytest.mark.parametrize("part", ["", "_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("prefix", ["", "net.", "model.module.", "_orig_mod.module.", "_forward_module.mae."])
def test_load_checkpoint__removes_the_prefixes_of_wrappers(tmp_path: Path, mae_state, prefix: str, part: str) -> None:
    wrapped = {prefix + re.sub(r"(blocks\.\d+\.)", rf"\1{part}", name): tensor for name, tensor in mae_state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "file.ckpt")
    model = load_checkpoint(tmp_path / "file.ckpt", **MAE_HEADS)
    assert model.info.layout == "facebookresearch/mae"
    assert all(torch.equal(tensor, mae_state[name]) for name, tensor in model.state_dict().items())


def test_load_checkpoint__takes_the_only_state_dict_unless_it_is_an_average(tmp_path: Path, mae_state) -> None:
    path = tmp_path / "file.pth"
    torch.save({"model_state_dict": mae_state, "optimizer": {"state": {}}}, path)
    assert load_checkpoint(path, **MAE_HEADS).info.family == "mae"
    torch.save({"ema": mae_state, "epoch": 1}, path)
    with pytest.raises(CheckpointError, match="it has 'ema', 'epoch'; ema is a moving average: --weights model_ema"):
        load_checkpoint(path, **MAE_HEADS)


@pytest.mark.parametrize("name", ["trunk.masked_embedding", "mask_tokens.0", "encoder.mask_emb", "vit.maskToken"])
def test_load_checkpoint__names_a_mask_token_of_an_unknown_layout(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.zeros(1, 8), "head": torch.zeros(8)}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"it holds {name}: measure the model live"):
        load_checkpoint(tmp_path / "file.pth")


def test_load_checkpoint__refuses_tensors_with_and_without_the_prefix_of_a_wrapper(tmp_path: Path, mae_state) -> None:
    torch.save({"model": mae_state | {"_orig_mod.cls_token": mae_state["cls_token"]}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="holds tensors twice"):
        load_checkpoint(tmp_path / "file.pth", **MAE_HEADS)


def test_load_checkpoint__takes_heads_and_mask_ratio_from_lightning(tmp_path: Path, mae_state) -> None:
    lightning = {"state_dict": {f"model.{name}": tensor for name, tensor in mae_state.items()}}
    torch.save(lightning, tmp_path / "silent.ckpt")
    with pytest.raises(HeadCountError):
        load_checkpoint(tmp_path / "silent.ckpt")
    torch.save(lightning | {"hyper_parameters": {**MAE_HEADS, "mask_ratio": 0.6}}, tmp_path / "stated.ckpt")
    model = load_checkpoint(tmp_path / "stated.ckpt")
    assert (model.config.num_heads, model.config.decoder_num_heads) == tuple(MAE_HEADS.values())
    assert (model.info.mask_ratio, model.info.mask_rule_source) == (0.6, "file")


def test_load_checkpoint__takes_mean_and_std_from_the_preprocessor_unless_given(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    save_file(copy_hf(folder), folder / "model.safetensors")
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    info = load_checkpoint(folder).info
    assert (info.mean, info.std) == ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    assert info.statistics_source == "preprocessor_config.json"
    info = load_checkpoint(folder, mean=(0.1, 0.1, 0.1)).info
    assert (info.mean, info.std) == ((0.1, 0.1, 0.1), (0.5, 0.6, 0.7))
    assert info.statistics_source == "mean given, std preprocessor_config.json"
    assert load_checkpoint(folder, mean=(0.1,) * 3, std=(0.2,) * 3).info.statistics_source == "given"
    with pytest.raises(CheckpointError, match="has 1 values, the model 3 channels"):
        load_checkpoint(folder, mean=(0.1,))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"rescale_factor": 1.0}))
    with pytest.raises(CheckpointError, match="rescale_factor"):
        load_checkpoint(folder)


def test_load_checkpoint__a_network_written_for_other_statistics_is_the_same(tmp_path: Path) -> None:
    state = copy_hf(tmp_path / "half")
    mean, std = (torch.tensor(each) for each in (IMAGENET_MEAN, IMAGENET_STD))
    weight, bias = (f"vit.embeddings.patch_embeddings.projection.{name}" for name in ("weight", "bias"))
    state[bias] = state[bias] + (state[weight] * ((0.5 - mean) / std).view(1, 3, 1, 1)).sum((1, 2, 3))
    state[weight] = state[weight] * (0.5 / std).view(1, 3, 1, 1)
    save_file(state, tmp_path / "half" / "model.safetensors")
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "half" / "preprocessor_config.json").write_text(json.dumps(settings))
    found = []
    for source in (HF_FOLDER, tmp_path / "half"):
        model = load_checkpoint(source)
        batch = next(image_batches(open_images(DEMO_IMAGES), model.info, batch_size=2))
        mask = model.info.mask_rule.sample(mask_keys(batch.names), model.info.grid, model.info.patch_size)
        with torch.no_grad():
            found.append([heterogeneity(layer.tokens, layer.mask) for layer in model.layer_tokens(batch.images, mask)])
    torch.testing.assert_close(*map(torch.stack, found), atol=1e-5, rtol=1e-4)


def test_open_checkpoint__is_read_once_for_all_uses(tmp_path: Path, mae_state) -> None:
    torch.save({"model": mae_state}, tmp_path / "file.pth")
    raw = open_checkpoint(tmp_path / "file.pth")
    digest = raw.sha256
    (tmp_path / "file.pth").unlink()
    assert load_checkpoint(raw, **MAE_HEADS).info == inspect_checkpoint(raw, **MAE_HEADS).info
    assert len(raw.sha256) == 64
    assert raw.sha256 == digest


def test_layouts__recognize_the_golden_files(golden: Golden) -> None:
    names = Names(read_checkpoint(golden.source).tensors)
    matching = [layout.name for layout in LAYOUTS if layout.matches(names)]
    assert matching[0] == golden.load().info.layout


WEB_PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download it again"),
        (b"   \n", "is empty; download it again"),
        (WEB_PAGE, "is a web page, not weights"),
        (POINTER, "is a git-lfs pointer, not weights; run `git lfs pull`"),
        (b"hello, these are my notes\n", "is a text file, not weights"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not a torch or safetensors file|damaged or truncated"),
        (b"PK\x03\x04 not really an archive", "truncated or damaged|damaged or truncated"),
        (b"\x80\x02}q\x00.", "not a torch or safetensors file|damaged or truncated"),
    ],
)
def test_load_checkpoint__refuses_what_is_not_a_checkpoint(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path / name)
    assert name in one_line(error)


@pytest.mark.parametrize("source", [MAE_FILE, SIMMIM_FILE, HF_FOLDER / "model.safetensors"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_load_checkpoint__refuses_truncated_files(tmp_path: Path, source: Path, share: float) -> None:
    whole = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(whole[: int(len(whole) * share)])
    for read in (load_checkpoint, inspect_checkpoint):
        with pytest.raises(CheckpointError, match="truncated") as error:
            read(path)
        one_line(error)


def test_load_checkpoint__refuses_truncated_old_files(tmp_path: Path, mae_state) -> None:
    torch.save({"model": mae_state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "old.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "old.pth", **MAE_HEADS)


def test_load_checkpoint__refuses_damage_in_the_middle(tmp_path: Path) -> None:
    whole = bytearray(MAE_FILE.read_bytes())
    start = whole.index(b"data.pkl") + 200
    whole[start : start + 300] = bytes(300)
    (tmp_path / "damaged.pth").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"damaged") as error:
        load_checkpoint(tmp_path / "damaged.pth", **MAE_HEADS)
    one_line(error)


def test_load_checkpoint__refuses_missing_paths_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("root", [torch.ones(3), [1, 2], {"epoch": 3}, {}, {"model": {"a": 1}}, {"model": {}}, "text"])
def test_load_checkpoint__refuses_files_without_a_state_dict(tmp_path: Path, root: object) -> None:
    torch.save(root, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not a dict of tensors|holds no state dict") as error:
        load_checkpoint(tmp_path / "other.pth")
    one_line(error)


def test_load_checkpoint__refuses_a_state_dict_with_other_things_in_it(tmp_path: Path, mae_state) -> None:
    torch.save({"model": mae_state | {"note": "text"}}, tmp_path / "mixed.pth")
    with pytest.raises(CheckpointError, match="entry 'note' is not a tensor with a name"):
        load_checkpoint(tmp_path / "mixed.pth", **MAE_HEADS)


def test_load_checkpoint__refuses_tensors_larger_than_their_data(tmp_path: Path, mae_state) -> None:
    huge = torch.ones(1).expand(10**6, 10**6)  # a strided view: a few bytes that claim terabytes
    torch.save({"model": mae_state | {"huge": huge}}, tmp_path / "huge.pth")
    with pytest.raises(CheckpointError, match=r"huge declares .* but the file holds less data"):
        load_checkpoint(tmp_path / "huge.pth", **MAE_HEADS)


# Nothing runs.


class Bomb:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def bombs(marker: Path) -> dict[str, object]:
    text = str(marker)
    write = f"open({text!r}, 'w').close()"
    return {
        "os.system": Bomb(os.system, f"touch {text}"),
        "open": Bomb(open, text, "w"),
        "exec": Bomb(exec, write),
        "eval": Bomb(eval, write),
        "Popen": Bomb(subprocess.Popen, ["touch", text]),
        "pathlib": Bomb(pathlib.Path.touch, pathlib.PosixPath(text)),
        "getattr": Bomb(getattr, Path, "touch"),
        "torch.load": Bomb(torch.load, text),
        "numpy": Bomb(np.save, text, [1]),
        "io.open": Bomb(io.open, text, "w"),
        "os.mkdir": Bomb(os.mkdir, text),
        "torch.save": Bomb(torch.save, 1, text),
        "numpy tofile": Bomb(np.memmap, text, "float32", "w+", 0, (3,)),
    }


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old torch"])
@pytest.mark.parametrize("place", ["root", "beside", "inside"])
@pytest.mark.parametrize("kind", sorted(bombs(Path("x"))))
def test_load_checkpoint__runs_nothing(tmp_path: Path, mae_state, kind: str, place: str, old: bool) -> None:
    marker = tmp_path / "ran"
    bomb = bombs(marker)[kind]
    root = {
        "root": bomb,
        "beside": {"model": mae_state, "args": argparse.Namespace(x=[bomb])},
        "inside": {"model": {**mae_state, "norm.weight": bomb}},
    }[place]
    torch.save(root, tmp_path / "bomb.pth", _use_new_zipfile_serialization=not old)
    before = set(tmp_path.iterdir())
    for read in (load_checkpoint, inspect_checkpoint):
        # A foreign object beside the weights may become an inert stand-in; everything else is refused.
        inert = place == "beside" and kind in ("numpy", "torch.load", "torch.save", "numpy tofile", "getattr")
        with contextlib.nullcontext() if inert else pytest.raises(CheckpointError) as error:
            read(tmp_path / "bomb.pth", **MAE_HEADS)
        if error is not None:
            one_line(error)
        assert set(tmp_path.iterdir()) == before, "the file ran something"


@pytest.mark.parametrize("kind", ["os.system", "open", "exec", "eval", "Popen", "io.open"])
def test_load_checkpoint__names_what_an_attack_asks_for(tmp_path: Path, mae_state, kind: str) -> None:
    torch.save({"model": mae_state, "x": bombs(tmp_path / "ran")[kind]}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="to be called, which no checkpoint needs: it may be an attack; nothing"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_load_checkpoint__refuses_plain_pickles(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for protocol in range(6):
        (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(os.system, f"touch {marker}"), protocol=protocol))
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "plain.pth")
    assert not marker.exists()


def test_load_checkpoint__refuses_archives_that_unpack_to_more(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(CheckpointError, match=r"declares more data than it holds; it was not written by torch\.save"):
        load_checkpoint(tmp_path / "zip.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match=r"not written by torch\.save"):
        load_checkpoint(tmp_path / "other.pth")


# Inspecting.


def test_inspect_checkpoint__reports_what_loading_gives(golden: Golden) -> None:
    report, model = inspect_checkpoint(golden.source, **golden.heads), golden.load()
    assert report.info == model.info
    assert report.depths == {model.stacks[0]: 4}
    assert report.config["num_heads"] == model.config.num_heads
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.dtypes == ("float32",) or golden.name == "simmim_vit"
    assert report.needed == ()
    json.dumps(report.to_dict())


def test_inspect_checkpoint__lists_what_is_missing_and_dropped() -> None:
    report = inspect_checkpoint(MAE_FILE)
    assert report.needed == ("num_heads", "decoder_num_heads")
    assert (report.config["num_heads"], report.config["decoder_num_heads"]) == (None, None)
    assert inspect_checkpoint(MAE_FILE, num_heads=4).needed == ("decoder_num_heads",)
    dropped = inspect_checkpoint(SIMMIM_FILE).dropped
    assert "encoder.rel_pos_bias.relative_position_index" in dropped
    assert all("relative_position_index" in name or "fc_norm" in name or "head" in name for name in dropped)


def test_inspect_checkpoint__is_as_strict_as_loading(tmp_path: Path, mae_state) -> None:
    torch.save({"model": edit(mae_state, "norm.bias", None)}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias"):
        inspect_checkpoint(tmp_path / "mae.pth")


def test_checkpoint_sha256__is_that_of_the_file() -> None:
    import hashlib

    assert checkpoint_sha256(MAE_FILE) == hashlib.sha256(MAE_FILE.read_bytes()).hexdigest()
    assert checkpoint_sha256(HF_FOLDER) == hashlib.sha256((HF_FOLDER / "model.safetensors").read_bytes()).hexdigest()
