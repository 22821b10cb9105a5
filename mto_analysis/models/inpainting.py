"""The ViT encoder of the inpainting-style families: masked tokens replace patches at its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mto_analysis.models.interface import ModelInfo
from mto_analysis.models.stacked import StackedModel
from mto_analysis.models.vit import RelativePositionBias, ViTConfig, patch_embedding, transformer_blocks
from mto_analysis.taps.tokens import run_blocks


@dataclass(frozen=True)
class InpaintingConfig(ViTConfig):
    """Architecture of an :class:`InpaintingViT`; that of the published SimMIM, BEiT and ConMIM ViT-B by default.

    ``position_bias`` is one relative position table for all blocks (``shared``), one per block (``per_block``) or none;
    ``absolute_positions`` adds a learned embedding to every token, masked ones too.
    """

    layer_scale: float | None = 0.1
    position_bias: Literal["shared", "per_block"] | None = "shared"
    absolute_positions: bool = False
    final_norm: bool = True
    eps: float = 1e-6


class InpaintingViT(StackedModel):
    """Encoder with masked tokens inside. Layer 0 is the input of block 0.

    Without absolute positions all masked tokens are one vector at layer 0; with them they differ by their position.
    This class predicts no pixels: heads for visual tokens or features say nothing about the tokens and are left out.

    Source:
        Bao et al., "BEiT" (ICLR 2022); microsoft/unilm. SimMIM, ConMIM and data2vec vision share the encoder.
    """

    stacks: ClassVar[tuple[str, ...]] = ("encoder",)

    def __init__(self, config: InpaintingConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        self.patch_embed = patch_embedding(c.image_size, c.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, info.num_patches + 1, c.dim)) if c.absolute_positions else None
        tables = {"shared": 1, "per_block": c.depth, None: 0}[c.position_bias]
        self.position_biases = nn.ModuleList(RelativePositionBias(info.grid, c.num_heads) for _ in range(tables))
        self.blocks = self._make_blocks()
        self.norm = nn.LayerNorm(c.dim, eps=c.eps) if c.final_norm else nn.Identity()

    def _make_blocks(self) -> nn.ModuleList:
        c = self.config
        return transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps, layer_scale=c.layer_scale)

    def _hidden(self, images: Tensor, mask: Tensor | None, stack: str = "encoder") -> Iterator[Tensor]:
        """Class and patch tokens at every layer depth: ``batch 1+num_patches dim``; nothing masked without a mask."""
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return run_blocks(x, self._biased_blocks())

    def _biased_blocks(self) -> Iterator[Callable[[Tensor], Tensor]]:
        bias = self.position_biases[0]() if self.config.position_bias == "shared" else None
        for depth, block in enumerate(self.blocks):
            if self.config.position_bias == "per_block":
                bias = self.position_biases[depth]()
            yield partial(block, attn_mask=bias)

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        return self._hidden(images, None)

    def final_norm(self) -> nn.Module:
        """The encoder's final norm."""
        return self.norm

    def encoder_blocks(self) -> Sequence[nn.Module]:
        """The encoder's blocks."""
        return tuple(self.blocks)

    def position_embedding(self, stack: str) -> Tensor | None:
        """The absolute positions, of models that have them."""
        return None if self.pos_embed is None else self.pos_embed[:, 1:]

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The encoder's blocks."""
        return tuple(self.blocks)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        raise ValueError(f"a {self.info.family} model predicts no pixels, so there is nothing to reconstruct")
