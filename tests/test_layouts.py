"""Every published layout: recognised from the file alone, tokens as the reference has them, damage refused by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from published_files import PUBLISHED, Published

from mto_analysis import CheckpointError, inspect_checkpoint, load_checkpoint, save_checkpoint
from mto_analysis.checkpoints import HeadCountError
from mto_analysis.masking import mask_keys

BY_NAME = {each.name: each for each in PUBLISHED}


@pytest.fixture(params=BY_NAME)
def published(request: pytest.FixtureRequest) -> Published:
    return BY_NAME[request.param]


def test_load_checkpoint__tokens_agree_with_the_reference_on_masks_of_different_counts(
    published: Published, tmp_path: Path
) -> None:
    model = load_checkpoint(published.save(tmp_path), **published.heads)
    assert model.info.family == published.family
    assert published.name.split(",")[0] in model.info.layout
    assert set(model.stacks) == set(published.references)
    batch = 1 if model.info.num_patches > 1000 else 2
    images = torch.randn(batch, 3, *(model.info.image_size,) * 2, generator=torch.Generator().manual_seed(1))
    mask = model.info.mask_rule.draw(mask_keys(["a", "b"][:batch]), model.info.grid, model.info.patch_size)
    if model.info.family == "hiera":
        mask[0] = (torch.arange(36) % 6 < 4) & (torch.arange(36) // 6 < 4)  # 4 of 9 units instead of 6
    elif batch > 1 and model.info.family not in ("simmim_swin", "simmim_swinv2"):
        mask[0, mask[0].nonzero()[0]] = False  # one masked patch less than in the second picture
        assert len(set(mask.sum(dim=1).tolist())) > 1 or model.info.mask_rule.kind == "blockwise"
    weights = {name: tensor.double() for name, tensor in published.weights().items()}
    with torch.no_grad():
        for stack, reference in published.references.items():
            layers = list(model.layer_tokens(images, mask, stack))
            assert [layer.depth for layer in layers] == list(range(model.depth(stack) + 1))
            for row in range(batch):
                expected = reference(weights, images[row].double(), mask[row])
                for layer, tokens in zip(layers, expected, strict=True):
                    torch.testing.assert_close(layer.tokens[row].double(), tokens, atol=1e-4, rtol=1e-5)


def test_load_checkpoint__runs_and_imports_nothing_foreign(published: Published, tmp_path: Path) -> None:
    path = published.save(tmp_path)
    load_checkpoint(path, **published.heads)
    assert not {"yacs", "mmengine"} & set(sys.modules)


def test_save_checkpoint__loads_back_bit_for_bit(published: Published, tmp_path: Path) -> None:
    model = load_checkpoint(published.save(tmp_path), **published.heads)
    save_checkpoint(model, tmp_path / "ours.safetensors")
    again = load_checkpoint(tmp_path / "ours.safetensors")
    assert again.config == model.config
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_inspect_checkpoint__names_the_head_counts_that_must_be_given(published: Published, tmp_path: Path) -> None:
    path = published.save(tmp_path)
    report = inspect_checkpoint(path)
    assert report.info.family == published.family
    assert set(report.needed) == set(published.heads)
    if published.heads:
        with pytest.raises(HeadCountError, match=r"--(decoder-)?num-heads"):
            load_checkpoint(path)


def test_load_checkpoint__refuses_a_missing_mask_token_by_name(published: Published, tmp_path: Path) -> None:
    path = published.save(tmp_path, lambda tensors: tensors.pop(published.mask_token))
    with pytest.raises(CheckpointError, match="mask_token"):
        load_checkpoint(path, **published.heads)


def test_load_checkpoint__refuses_an_unknown_key_by_name(published: Published, tmp_path: Path) -> None:
    name = f"{published.probe_key}_surprise"
    prefix = "module." if published.name == "MAE-Lite" else ""
    path = published.save(tmp_path, lambda tensors: tensors.update({prefix + name: torch.ones(2)}))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_checkpoint(path, **published.heads)


def test_load_checkpoint__refuses_a_wrong_shape_by_name(published: Published, tmp_path: Path) -> None:
    prefix = "module." if published.name == "MAE-Lite" else ""
    name = prefix + published.probe_key
    path = published.save(tmp_path, lambda tensors: tensors.update({name: tensors[name][1:].contiguous()}))
    with pytest.raises(CheckpointError, match=f"wrong shape: {re.escape(published.probe_key)} is"):
        load_checkpoint(path, **published.heads)
