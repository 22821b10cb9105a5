"""Small models for the tests of maps, definitions and controls: random weights, and a grid that shrinks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mto_analysis.images import ImageBatch
from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, LayerTokens, MAEConfig, MaskedImageModel, ModelInfo, SimMIM, SimMIMConfig


def small_mae() -> MAE:
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=16,
        patch_size=4,
        dim=16,
        depth=1,
        num_heads=2,
        mlp_dim=32,
        decoder_dim=16,
        decoder_depth=2,
        decoder_num_heads=2,
        decoder_mlp_dim=32,
    )
    return _shaken(MAE(config, ModelInfo("mae", "decoder", 16, 4, MaskRule("random", 0.75, 4), criterion="l2")))


def small_simmim(*, absolute_positions: bool = False, rule: MaskRule | None = None) -> SimMIM:
    torch.manual_seed(0)
    config = SimMIMConfig(
        image_size=16, patch_size=4, dim=16, depth=2, num_heads=2, mlp_dim=32, absolute_positions=absolute_positions
    )
    rule = rule or MaskRule("block", 0.5, 8)
    return _shaken(SimMIM(config, ModelInfo("simmim_vit", "inpainting", 16, 4, rule, target="pixels", criterion="l1")))


def _shaken(model: MaskedImageModel) -> MaskedImageModel:  # type: ignore[type-var]
    """All learned tensors random, the zero ones too."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@dataclass(frozen=True)
class NoConfig:
    pass


class Shrinking(MaskedImageModel):
    """Like a Swin: patches are merged two by two after the first block; masks cover whole merged patches."""

    stacks: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self) -> None:
        info = ModelInfo("shrinking", "inpainting", 16, 2, MaskRule("block", 0.5, 4))
        super().__init__(NoConfig(), info)
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.mask_token = nn.Parameter(torch.randn(8))

    def depth(self, stack: str) -> int:
        return 2

    def _layer_tokens(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[LayerTokens]:
        x = self.embed(images).flatten(2).mT
        x = torch.where(mask[..., None], self.mask_token, x)
        yield LayerTokens(0, x, mask)
        yield LayerTokens(1, x + x.roll(1, dims=1), mask)
        grid = x.mT.reshape(len(x), 8, 8, 8)
        merged = nn.functional.avg_pool2d(grid, 2).flatten(2).mT
        yield LayerTokens(2, merged, mask.reshape(len(x), 8, 8)[:, ::2, ::2].flatten(1))

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        raise ValueError("predicts no pixels")


def batch_of(model: MaskedImageModel, size: int = 5) -> ImageBatch:
    side = model.info.image_size
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))
    return ImageBatch(tuple(f"p{index}" for index in range(size)), images)


def random_masks(size: int, num_patches: int, num_masked: int) -> Tensor:
    mask = torch.zeros(size, num_patches, dtype=torch.bool)
    for row in range(size):
        mask[row, torch.randperm(num_patches, generator=torch.Generator().manual_seed(row))[:num_masked]] = True
    return mask
