"""MFF: MAE whose decoder receives a weighted sum of several encoder layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mto_analysis.models.interface import ModelInfo
from mto_analysis.models.mae import MAE, MAEConfig

__all__ = ["MFF", "MFFConfig"]


@dataclass(frozen=True)
class MFFConfig(MAEConfig):
    """Architecture of an :class:`MFF`: ``fused`` layers, evenly spaced up to the last one."""

    fused: int = 6

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not 1 <= self.fused <= self.depth or self.depth % self.fused:
            raise ValueError(f"{self.fused} fused layers are not evenly spaced among {self.depth} blocks")


class MFF(MAE):
    """Multi-level feature fusion on MAE. Layer 0 is the decoder's input after its position embedding.

    Source:
        Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability" (ICCV 2023);
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/mff.py``.
    """

    def __init__(self, config: MFFConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        self.proj_layers = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.fused - 1))
        self.proj_weights = nn.Parameter(torch.ones(config.fused, 1, 1, 1))

    def _encode(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        apart = len(self.blocks) // len(self.proj_weights)
        outputs: list[Tensor] = []
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x, attn_mask=attn_mask)
            if depth % apart == 0:
                last = depth == len(self.blocks)
                outputs.append(x if last else self.proj_layers[len(outputs)](x))
        return (torch.stack(outputs) * self.proj_weights.softmax(dim=0)).sum(dim=0)
