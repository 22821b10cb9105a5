"""SimMIM with a ViT: masked tokens replace patches at the encoder's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mto_analysis.models.interface import LayerTokens, MaskedImageModel, ModelInfo
from mto_analysis.models.vit import RelativePositionBias, patch_embedding, transformer_blocks

__all__ = ["SimMIM", "SimMIMConfig"]


@dataclass(frozen=True)
class SimMIMConfig:
    """Architecture of a :class:`SimMIM`; the published ViT-B by default.

    ``position_bias`` is one relative position table for all blocks (``shared``), one per block (``per_block``) or none;
    ``absolute_positions`` adds a learned embedding to every token, masked ones too.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    layer_scale: float | None = 0.1
    position_bias: Literal["shared", "per_block"] | None = "shared"
    absolute_positions: bool = False
    final_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the values."""
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide the width {self.dim}, got {self.num_heads}")


class SimMIM(MaskedImageModel):
    """SimMIM's ViT. Layer 0 is the input of block 0: without absolute positions all masked tokens are one vector there.

    Source:
        Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022); microsoft/SimMIM.
    """

    stacks: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self, config: SimMIMConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        self.patch_embed = patch_embedding(c.image_size, c.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, info.num_patches + 1, c.dim)) if c.absolute_positions else None
        tables = {"shared": 1, "per_block": c.depth, None: 0}[c.position_bias]
        self.position_biases = nn.ModuleList(RelativePositionBias(info.grid, c.num_heads) for _ in range(tables))
        self.blocks = transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps, layer_scale=c.layer_scale)
        self.norm = nn.LayerNorm(c.dim, eps=c.eps) if c.final_norm else nn.Identity()
        self.decoder = nn.Conv2d(c.dim, c.patch_size**2 * c.channels, kernel_size=1)

    def _hidden(self, images: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Class and patch tokens at every layer depth: ``batch 1+num_patches dim``."""
        x = self.patch_embed(images)
        x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        yield x
        bias = self.position_biases[0]() if self.config.position_bias == "shared" else None
        for depth, block in enumerate(self.blocks):
            if self.config.position_bias == "per_block":
                bias = self.position_biases[depth]()
            x = block(x, attn_mask=bias)
            yield x

    def position_embedding(self, stack: str) -> Tensor | None:
        """The absolute positions, of models that have them."""
        return None if self.pos_embed is None else self.pos_embed[:, 1:]

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The encoder's blocks."""
        return tuple(self.blocks)

    def depth(self, stack: str) -> int:
        """The last layer depth of a stack, its number of blocks."""
        return len(self.blocks)

    def _layer_tokens(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[LayerTokens]:
        for depth, x in enumerate(self._hidden(images, mask)):
            yield LayerTokens(depth, x[:, 1:], mask)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        for x in self._hidden(images, mask):  # noqa: B007 - only the last depth is wanted
            pass
        x = self.norm(x)[:, 1:].mT.reshape(len(images), -1, *self.info.grid)
        return nn.functional.pixel_shuffle(self.decoder(x), self.config.patch_size)
