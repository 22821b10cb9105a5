"""EVA-02: an encoder with masked tokens inside, rotary positions and gated MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import build_rotary_pos_embed  # type: ignore[attr-defined]
from timm.models.eva import EvaBlock
from torch import Tensor, nn

from mto_analysis.models.inpainting import InpaintingConfig, InpaintingViT
from mto_analysis.models.interface import ModelInfo


@dataclass(frozen=True)
class EVA02Config(InpaintingConfig):
    """Architecture of an :class:`EVA02`; the published tiny model by default.

    ``mlp_norm`` is whether a norm follows the gate, as in the larger models; ``rotary_grid`` are rows and columns of
    the grid over whose sides rotary positions count.
    """

    patch_size: int = 14
    dim: int = 192
    num_heads: int = 3
    mlp_dim: int = 512
    layer_scale: float | None = None
    position_bias: None = None
    absolute_positions: bool = True
    mlp_norm: bool = False
    rotary_grid: tuple[int, int] = (16, 16)


class EVA02(InpaintingViT):
    """EVA-02. Layer 0 is the input of block 0: absolute positions, so masked tokens differ there.

    In attention, queries and keys of patches are also rotated by their row and column; the class token's are not.

    Source:
        Fang et al., "EVA-02: A Visual Representation for Neon Genesis" (2023); baaivision/EVA, ``EVA-02/asuka``.
    """

    rope: Tensor

    def __init__(self, config: EVA02Config, info: ModelInfo) -> None:
        super().__init__(config, info)
        table = rotary_table(info.grid, config.dim // config.num_heads, config.rotary_grid)
        self.register_buffer("rope", torch.cat(table, dim=1), persistent=False)

    def _make_blocks(self) -> nn.ModuleList:
        c = self.config
        block = partial(
            EvaBlock,
            dim=c.dim,
            num_heads=c.num_heads,
            attn_type="rope",
            mlp_ratio=(c.mlp_dim + 0.5) / c.dim,  # timm truncates ratio * dim; the half keeps the width exact
            swiglu_mlp=True,
            scale_mlp=c.mlp_norm,
            norm_layer=partial(nn.LayerNorm, eps=c.eps),
        )
        return nn.ModuleList([block() for _ in range(c.depth)])

    def _biased_blocks(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (partial(block, rope=self.rope) for block in self.blocks)


def rotary_table(grid: tuple[int, int], head_dim: int, counted_over: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sines and cosines of the angles by which pairs of channels are turned.

    The first half of the channels turns with the row, the second with the column, at frequencies
    ``10000^(-2k / (head_dim / 2))``.

    Shapes:
        returns: num_patches head_dim; num_patches head_dim

    Args:
        grid: Rows and columns of patches.
        head_dim: Width of an attention head.
        counted_over: Rows and columns of the grid of pre-training, over which a finer grid is spread.

    Example:
        >>> rotary_table((1, 2), 4, (1, 2))[1].round(decimals=2)
        tensor([[1.0000, 1.0000, 1.0000, 1.0000],
                [1.0000, 1.0000, 0.5400, 0.5400]])
    """
    sines, cosines = build_rotary_pos_embed(
        list(grid), dim=head_dim, in_pixels=False, ref_feat_shape=list(counted_over), device=torch.device("cpu")
    )
    return sines, cosines
