"""Models small enough for any test; every parameter is drawn at random, so that nothing is zero and mistakes show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, LayerTokens, MAEConfig, MaskedImageModel, ModelInfo, SimMIM, SimMIMConfig

SIDE, PATCH, NUM_PATCHES = 16, 4, 16


def make_mae(seed: int = 1, **changes: Any) -> MAE:
    settings: dict[str, Any] = {
        "image_size": SIDE,
        "patch_size": PATCH,
        "dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_dim": 40,
        "decoder_dim": 16,
        "decoder_depth": 3,
        "decoder_num_heads": 2,
        "decoder_mlp_dim": 36,
    }
    config = MAEConfig(**(settings | changes))
    info = ModelInfo(
        family="mae",
        style="decoder",
        image_size=config.image_size,
        patch_size=config.patch_size,
        mask_rule=MaskRule("random", 0.75, config.patch_size),
        target="pixels",
        criterion="l2",
    )
    return randomize(MAE(config, info), seed)


def make_simmim(seed: int = 2, **changes: Any) -> SimMIM:
    settings: dict[str, Any] = {
        "image_size": SIDE,
        "patch_size": PATCH,
        "dim": 24,
        "depth": 3,
        "num_heads": 3,
        "mlp_dim": 40,
    }
    config = SimMIMConfig(**(settings | changes))
    info = ModelInfo(
        family="simmim_vit",
        style="inpainting",
        image_size=config.image_size,
        patch_size=config.patch_size,
        mask_rule=MaskRule("block", 0.5, 2 * config.patch_size),
        target="pixels",
        criterion="l1",
    )
    return randomize(SimMIM(config, info), seed)


def randomize(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name not in ("pos_embed", "decoder_pos_embed") or parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


class TwoStacks(MaskedImageModel):
    """Two stacks as a user might bring them; the second halves its grid after depth 0. Affine in pixel means."""

    stacks: ClassVar[tuple[str, ...]] = ("pixel_decoder", "feature_decoder")

    def __init__(self, info: ModelInfo) -> None:
        super().__init__({}, info)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)  # only eval mode gives the same numbers twice

    def depth(self, stack: str) -> int:
        return 1

    def _layer_tokens(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[LayerTokens]:
        rows, columns = self.info.grid
        patch = self.info.patch_size
        x = images.unfold(2, patch, patch).unfold(3, patch, patch).mean(dim=(-1, -2)).flatten(2).mT
        x = self.dropout(x * self.scale)
        yield LayerTokens(0, x, mask)
        if stack == "feature_decoder":
            x = x.reshape(len(x), rows // 2, 2, columns // 2, 2, -1).mean(dim=(2, 4)).flatten(1, 2)
            mask = mask.reshape(len(x), rows // 2, 2, columns // 2, 2).all(dim=4).all(dim=2).flatten(1)
        yield LayerTokens(1, x + 0.5, mask)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        raise ValueError("predicts no pixels")


def make_two_stacks() -> TwoStacks:
    info = ModelInfo(
        family="two_stacks",
        style="decoder",
        image_size=SIDE,
        patch_size=PATCH,
        mask_rule=MaskRule("block", 0.5, 2 * PATCH),
        target="features",
    )
    return TwoStacks(info).eval()


def some_images(generator: torch.Generator, count: int, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=generator)


def some_masks(
    generator: torch.Generator, count: int, num_patches: int = NUM_PATCHES, *, ragged: bool = False
) -> Tensor:
    """Random masks of 10 masked patches, or of 1, 2, 3 ... masked patches."""
    rank = torch.rand(count, num_patches, generator=generator).argsort(dim=1).argsort(dim=1)
    masked = 1 + torch.arange(count) % (num_patches - 1) if ragged else torch.full((count,), 10 * num_patches // 16)
    return rank < masked[:, None]
