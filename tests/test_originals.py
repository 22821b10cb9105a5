"""Files as the original code bases write them, with settings beside the weights: tokens, heterogeneity and loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mto_analysis import CheckpointError, heterogeneity, load_checkpoint
from mto_analysis.models.targets import reconstruction_loss

ORIGINALS = Path(__file__).parent / "golden" / "originals"
FILES = sorted(
    path
    for folder in ORIGINALS.iterdir()
    if folder.is_dir()
    for path in folder.iterdir()
    if path.name == "model" or path.suffix in (".pth", ".pyth")
)


def whole_set(path: Path, tmp_path: Path) -> Path:
    """The file or folder of a set; sets that differ only in a config share weights and inputs with another one."""
    about = json.loads((path.parent / "meta.json").read_text())
    if (other := about.get("weights_and_inputs")) is None:
        return path
    folder = shutil.copytree(path.parent, tmp_path / "set")
    shutil.copy(ORIGINALS / other / "model" / "model.safetensors", folder / "model")
    shutil.copy(ORIGINALS / other / "inputs.npz", folder)
    return folder / "model"


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.name}-{path.stem}" for path in FILES])
def test_load_checkpoint__agrees_with_the_original_code(tmp_path: Path, path: Path) -> None:
    path = whole_set(path, tmp_path)
    about = json.loads((path.parent / "meta.json").read_text())
    if (library := about.get("built_by")) is not None:
        pytest.importorskip(library)
    model = load_checkpoint(path, **about["heads_to_give"])
    with np.load(path.parent / "inputs.npz") as inputs, np.load(path.parent / "expected.npz") as expected:
        images, mask = torch.from_numpy(inputs["images"]), torch.from_numpy(inputs["mask"])
        goals = dict(expected)
    with torch.no_grad():
        layers = list(model.layer_tokens(images, mask, model.stacks[0]))
        assert len(layers) == len(goals["heterogeneity"])
        for depth, tokens, of_depth in layers:
            goal = goals[f"tokens_{depth}"] if "tokens_0" in goals else goals["tokens"][depth]
            np.testing.assert_allclose(tokens.numpy(), goal, atol=1e-4, rtol=0)
            measured = heterogeneity(tokens, of_depth).numpy()
            np.testing.assert_allclose(measured, goals["heterogeneity"][depth], atol=2e-4, rtol=0)
        if "loss" in goals:
            info = model.info
            assert info.criterion is not None
            assert info.target not in (None, "features")
            loss = reconstruction_loss(
                model.reconstruct(images, mask),
                images,
                mask,
                info.patch_size,
                target=info.target,
                criterion=info.criterion,
            )
            assert loss.mean().item() == pytest.approx(float(goals["loss"]), abs=1e-4)


def test_load_checkpoint__reads_the_moving_average_on_request(tmp_path: Path) -> None:
    root = torch.load(ORIGINALS / "mae_lite" / "checkpoint_ema.pth", weights_only=True)
    name = "module.ema_model.module.mask_token"
    root["model"][name] = root["model"][name] + 1
    heads = {"num_heads": 12, "decoder_num_heads": 3}
    for holder in ("", "network.model."):
        held = root | {"model": {f"{holder}{key}": each for key, each in root["model"].items()}}
        torch.save(held, tmp_path / "file.pth")
        own, average = (
            load_checkpoint(tmp_path / "file.pth", weights=each, **heads).state_dict()
            for each in ("model", "model_ema")
        )
        torch.testing.assert_close(average["mask_token"], own["mask_token"] + 1)
        assert all(torch.equal(own[key], average[key]) for key in own if key != "mask_token")
    with pytest.raises(CheckpointError, match="holds no moving average"):
        load_checkpoint(ORIGINALS / "cae_2022" / "checkpoint.pth", weights="model_ema")
