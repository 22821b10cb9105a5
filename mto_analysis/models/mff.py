"""MFF: MAE whose decoder receives a weighted sum of several encoder layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mto_analysis.models.interface import ModelInfo
from mto_analysis.models.mae import MAE, MAEConfig


@dataclass(frozen=True)
class MFFConfig(MAEConfig):
    """Architecture of an :class:`MFF`: the decoder gets a weighted sum of the outputs of blocks ``out_indices``."""

    out_indices: tuple[int, ...] = (0, 2, 4, 6, 8, 11)

    def __post_init__(self) -> None:
        """Check the values; a list, as JSON has it, becomes a tuple."""
        super().__post_init__()
        object.__setattr__(self, "out_indices", tuple(self.out_indices))
        if sorted({*self.out_indices, self.depth - 1}) != list(self.out_indices) or self.out_indices[0] < 0:
            raise ValueError(f"out_indices must ascend to the last block {self.depth - 1}, got {self.out_indices}")


class MFF(MAE):
    """Multi-level feature fusion on MAE. Layer 0 is the decoder's input after its position embedding.

    Source:
        Liu et al., "Improving Pixel-based MIM by Reducing Wasted Modeling Capability" (ICCV 2023);
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/mff.py``.
    """

    def __init__(self, config: MFFConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        self.proj_layers = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in config.out_indices[1:])
        self.proj_weights = nn.Parameter(torch.ones(len(config.out_indices), 1, 1, 1))
        self.out_indices = config.out_indices

    def _encode(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x, attn_mask=attn_mask)
            if number in self.out_indices:
                last = number == self.out_indices[-1]
                outputs.append(x if last else self.proj_layers[len(outputs)](x))
        return (torch.stack(outputs) * self.proj_weights.softmax(dim=0)).sum(dim=0)
