"""The encoder of the decoder-style families: a plain ViT with absolute positions, on all or on visible patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mto_analysis.models.stacked import StackedModel
from mto_analysis.models.vit import VisiblePatches
from mto_analysis.taps.tokens import run_blocks


class PositionedEncoder(StackedModel):
    """A family whose encoder gives all patches of an image their positions and runs its blocks one after the other.

    MFF too, whose sum of layers is for the decoder alone: downstream it uses the last block.
    """

    patch_embed: nn.Module
    cls_token: nn.Parameter | None
    pos_embed: nn.Parameter
    blocks: nn.ModuleList
    norm: nn.Module

    def encoder_blocks(self) -> Sequence[nn.Module]:
        """The encoder's blocks."""
        return tuple(self.blocks)

    def _embed(self, images: Tensor, visible: VisiblePatches | None = None) -> Tensor:
        """Class token, if any, and visible patches, or all, with their positions."""
        prefix = 0 if self.cls_token is None else 1
        x: Tensor = self.patch_embed(images) + self.pos_embed[:, prefix:]
        if visible is not None:
            x = visible.take(x)
        if self.cls_token is None:
            return x
        return torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        return run_blocks(self._embed(images), self.blocks)

    def final_norm(self) -> nn.Module:
        """The encoder's final norm."""
        return self.norm
