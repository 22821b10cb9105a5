"""Parity with the original implementations, family by family: tokens of every layer depth, heterogeneity, pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mto_analysis import heterogeneity, load_checkpoint
from mto_analysis.models import MaskedImageModel

GOLDEN = Path(__file__).parent / "golden"

# folder, file, heads that the file does not hold, stack -> suffix of the names in expected.npz
CASES = {
    "simmim_swin": ("checkpoint.pth", {}, {"encoder": ""}),
    "bootmae": ("checkpoint.pth", {"num_heads": 3}, {"pixel_decoder": "_pixel", "feature_decoder": "_feature"}),
    "conmim": ("checkpoint.pth", {}, {"encoder": ""}),
    "hf_beit": ("model", {}, {"encoder": ""}),
    "hf_beit_ape": ("model", {}, {"encoder": ""}),
}


def load(name: str) -> tuple[MaskedImageModel, dict[str, Any], dict[str, Any]]:
    file, heads, _ = CASES[name]
    with np.load(GOLDEN / name / "inputs.npz") as inputs, np.load(GOLDEN / name / "expected.npz") as expected:
        return load_checkpoint(GOLDEN / name / file, **heads), dict(inputs), dict(expected)


def assert_parity(model: MaskedImageModel, inputs: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    images, mask = torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["mask"])
    with torch.no_grad():
        for stack, suffix in CASES[name][2].items():
            depths = 0
            for depth, tokens, of_depth in model.layer_tokens(images, mask, stack):
                goal = expected[f"tokens_{depth}"] if "tokens_0" in expected else expected[f"tokens{suffix}"][depth]
                np.testing.assert_allclose(tokens.numpy(), goal, atol=2e-5)
                measured = heterogeneity(tokens, of_depth).numpy()
                np.testing.assert_allclose(measured, expected[f"heterogeneity{suffix}"][depth], atol=5e-5)
                depths += 1
            assert depths == len(expected[f"heterogeneity{suffix}"]) == model.depth(stack) + 1


@pytest.mark.parametrize("name", CASES)
def test_layer_tokens__agree_with_the_original_code(name: str) -> None:
    assert_parity(*load(name), name)


def test_layer_tokens__carry_the_mask_of_each_stage_of_swin() -> None:
    model, inputs, expected = load("simmim_swin")
    layers = model.layer_tokens(torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["mask"]))
    for depth, _, mask in layers:
        np.testing.assert_array_equal(mask.numpy(), expected[f"mask_stage_{expected['layer_stage'][depth]}"])


def test_reconstruct__agrees_with_bootmae() -> None:
    model, inputs, expected = load("bootmae")
    with torch.no_grad():
        pixels = model.reconstruct(torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["mask"]))
    np.testing.assert_allclose(pixels.numpy(), expected["out_pixel"], atol=2e-5)


@pytest.mark.parametrize("name", ["hf_beit", "hf_beit_ape"])
@pytest.mark.parametrize("generation", ["saved by transformers 5", "kept in memory by transformers 5"])
def test_load_checkpoint__reads_every_generation_of_hugging_face_names(
    name: str, generation: str, tmp_path: Path
) -> None:
    source = GOLDEN / name / "model"
    tensors = {key: value for key, value in load_file(source / "model.safetensors").items() if "index" not in key}
    if generation.startswith("kept"):
        rules = (
            (r"encoder\.layer\.(\d+)\.attention\.attention\.relative_", r"layers.\1.relative_"),
            (r"encoder\.relative_position_bias", "shared_position_bias"),
            (r"encoder\.layer\.", "layers."),
            (r"attention\.attention\.(q|k|v)[a-z]+\.", r"attention.\1_proj."),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"intermediate\.dense", "mlp.fc1"),
            (r"output\.dense", "mlp.fc2"),
        )
        for pattern, replacement in rules:
            tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
        assert "beit.layers.0.attention.o_proj.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    _, inputs, expected = load(name)
    assert_parity(load_checkpoint(tmp_path), inputs, expected, name)


@pytest.mark.parametrize(
    ("name", "mean", "kind", "ratio", "unit"),
    [
        ("simmim_swin", 0.485, "block", 0.6, 32),
        ("bootmae", 0.5, "random", 0.75, 8),
        ("conmim", 0.485, "block", 0.75, 16),
        ("hf_beit", 0.5, "blockwise", 75 / 196, 8),
    ],
)
def test_info__says_how_the_model_was_fed(name: str, mean: float, kind: str, ratio: float, unit: int) -> None:
    info = load(name)[0].info
    assert (info.mean[0], info.mask_rule.kind, info.mask_unit) == (mean, kind, unit)
    assert info.mask_ratio == pytest.approx(ratio)
