"""The encoder of the decoder-style families: a plain ViT with absolute positions and a class token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mto_analysis.models.stacked import StackedModel

__all__ = ["PositionedEncoder"]


class PositionedEncoder(StackedModel):
    """A family whose encoder gives all patches of an image their positions and runs its blocks one after the other.

    MFF too, whose sum of layers is for the decoder alone: downstream it uses the last block.
    """

    patch_embed: nn.Module
    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.Module

    def encoder_blocks(self) -> Sequence[nn.Module]:
        """The encoder's blocks."""
        return tuple(self.blocks)

    def _whole(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x  # type: ignore[no-any-return]

    def _final_norm(self) -> nn.Module:
        return self.norm
