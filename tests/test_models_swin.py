"""SimMIM's Swin: stages, masks on shrinking grids, windows, and what cannot be built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mto_analysis.masks import MaskRule, mask_keys
from mto_analysis.models import ModelInfo, SimMIMSwin, SwinConfig
from mto_analysis.models.windows import PatchMerging, shift_mask


def make_swin(**changes: Any) -> SimMIMSwin:
    settings: dict[str, Any] = {
        "image_size": 64,
        "dim": 8,
        "depths": (1, 2, 1),
        "num_heads": (1, 2, 2),
        "mlp_dim": 16,
        "window": 4,
    }
    config = SwinConfig(**(settings | changes))
    info = ModelInfo("simmim_swin", "inpainting", config.image_size, 4, MaskRule("block", 0.5, 16), criterion="l1")
    torch.manual_seed(0)
    return SimMIMSwin(config, info).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Tensor:
    return MaskRule("block", 0.5, 16).sample(mask_keys(["a", "b"]), (16, 16), 4)


def test_layer_tokens__count_blocks_over_all_stages_with_the_mask_of_each_grid(images: Tensor, mask: Tensor) -> None:
    layers = list(make_swin().layer_tokens(images, mask))
    assert [layer.tokens.shape[1:] for layer in layers] == [(256, 8), (256, 8), (64, 16), (64, 16), (16, 32)]
    assert [layer.mask.shape[1] for layer in layers] == [256, 256, 64, 64, 16]
    assert all(int(layer.mask.sum()) * 2 == layer.mask.numel() for layer in layers)
    # probe sorts tokens anew only where the mask is another object.
    assert layers[0].mask is layers[1].mask
    assert layers[2].mask is layers[3].mask


@pytest.mark.parametrize("version", [1, 2])
def test_layer_tokens__do_not_depend_on_masked_pixels(images: Tensor, mask: Tensor, version: Any) -> None:
    model = make_swin(version=version)
    hidden = mask.reshape(2, 1, 16, 16).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = torch.where(hidden, 100.0, images)
    with torch.no_grad():
        for one, other in zip(model.layer_tokens(images, mask), model.layer_tokens(changed, mask), strict=True):
            assert torch.equal(one.tokens, other.tokens)


def test_layer_tokens__refuses_a_mask_that_changes_inside_what_a_merge_joins(images: Tensor, mask: Tensor) -> None:
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(ValueError, match="mask must not change inside squares of 16 px"):
        make_swin().layer_tokens(images, mask)


def test_reconstruct__gives_a_image_or_says_that_the_head_is_missing(images: Tensor, mask: Tensor) -> None:
    with torch.no_grad():
        assert make_swin().reconstruct(images, mask).shape == images.shape
    with pytest.raises(ValueError, match="no decoder"):
        make_swin(decoder=False).reconstruct(images, mask)


def test_shift_mask__keeps_apart_only_what_the_shift_brought_together() -> None:
    mask = shift_mask((8, 8), 4, 2)
    assert mask.shape == (4, 1, 16, 16)
    assert int(mask[0].count_nonzero()) == 0
    assert int(mask[1].count_nonzero()) == 2 * 8 * 8  # halves of the window
    assert int(mask[3].count_nonzero()) == 16 * 12  # quarters


def test_patch_merging__joins_tokens_column_by_column() -> None:
    merge = PatchMerging(1, (2, 2), norm_first=False)
    merge.norm = torch.nn.Identity()
    torch.nn.init.eye_(merge.reduction.weight)
    rows = torch.tensor([[[0.0], [1.0], [10.0], [11.0]]])  # 10 * row + column
    assert merge(rows).flatten().tolist() == [0.0, 10.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": (1, 2)}, "depths and num_heads must name each stage"),
        ({"num_heads": (3, 2, 2)}, "num_heads must divide the width 8"),
        ({"window": 5}, "a window of 5 does not divide a grid of 16"),
        ({"image_size": 72}, "does not divide an image of 72 px"),
        ({"version": 3}, "version must be 1 or 2"),
    ],
)
def test_swin_config__checks_its_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_swin(**changes)


def test_swin_config__takes_lists_as_json_has_them() -> None:
    assert SwinConfig(depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]) == SwinConfig()  # type: ignore[arg-type]
