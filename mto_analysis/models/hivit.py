"""HiViT: MAE whose patches are 4 x 4 tokens, merged by blocks without attention, before any attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.vit import VisiblePatches, feed_forward, transformer_blocks

_INNER = 4


@dataclass(frozen=True)
class HiViTConfig(MAEConfig):
    """Architecture of a :class:`HiViT`; the published base model by default.

    A patch starts as 4 x 4 tokens of a quarter of the width. ``stem_depths`` counts the MLP blocks before each of the
    two merges, ``stem_mlp_dim`` is the hidden width of the first. ``hierarchical`` is whether the decoder also gets
    the tokens of the stem.
    """

    dim: int = 512
    depth: int = 20
    num_heads: int = 8
    mlp_dim: int = 2048
    decoder_depth: int = 6
    class_token: bool = False
    stem_depths: tuple[int, int] = (4, 4)
    stem_mlp_dim: int = 384
    hierarchical: bool = True


class HiViT(MAE):
    """HiViT as a masked autoencoder. Layer 0 is the decoder's input after its position embedding.

    Inside a patch, MLP blocks and two merges turn 4 x 4 tokens into one, which attention then sees.

    Source:
        Zhang et al., "HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer" (ICLR 2023);
        zhangxiaosong18/hivit, ``self_supervised/models/models_hivit_mae.py``.
    """

    def _build_encoder(self) -> int:
        c = self.config
        dim, inner = c.dim // 4, c.patch_size // _INNER
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(c.channels, dim, inner, stride=inner), "norm": nn.LayerNorm(dim, eps=c.eps)}
        )
        self.cls_token = None
        self.pos_embed = nn.Parameter(self._position_table(c.dim), requires_grad=False)
        stem: list[nn.Module] = []
        for stage, depth in enumerate(c.stem_depths):
            stem += [MLPBlock(dim << stage, c.stem_mlp_dim << stage, eps=c.eps) for _ in range(depth)]
            stem.append(InnerMerging(dim << stage, eps=c.eps))
        self.stem = nn.ModuleList(stem)
        self.blocks = transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps)
        encoded_dim = int(c.dim) * (1 + 2 + 4 if c.hierarchical else 1)
        self.norm = nn.LayerNorm(encoded_dim, eps=c.eps)
        return encoded_dim

    def _encoded(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        *_, x = self._run_encoder(images, visible)
        return self.norm(x)  # type: ignore[no-any-return]

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        return self._run_encoder(images, None)

    def _run_encoder(self, images: Tensor, visible: VisiblePatches | None) -> Iterator[Tensor]:
        """Tokens of the patches before the blocks that attend and after each; stem tokens are beside the last ones."""
        rows, columns = self.info.grid
        x = self.patch_embed["proj"](images)  # type: ignore[index]
        x = x.reshape(len(x), -1, rows, _INNER, columns, _INNER).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
        positions = self.pos_embed.expand(len(x), -1, -1)
        if visible is not None:
            x = visible.take(x.flatten(2)).reshape(len(x), -1, *x.shape[2:])
            positions = visible.take(positions)
        x = self.patch_embed["norm"](x)  # type: ignore[index]
        finer: list[Tensor] = []
        for block in self.stem:
            if isinstance(block, InnerMerging) and self.config.hierarchical:
                finer.append(x.flatten(2))
            x = block(x)
        x = x[:, :, 0, 0] + positions
        attn_mask = None if visible is None else visible.attn_mask
        yield x
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, attn_mask=attn_mask)
            yield torch.cat([*finer, x], dim=2) if number == len(self.blocks) else x


class MLPBlock(nn.Module):
    """The second half of a pre-norm ViT block."""

    def __init__(self, dim: int, mlp_dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = feed_forward(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """One block; any shape whose last axis is the width."""
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class InnerMerging(nn.Module):
    """Join 2 x 2 tokens inside a patch into one of twice the width, in the order of Swin's."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge.

        Shapes:
            x: batch num_patches rows columns dim
            returns: batch num_patches rows/2 columns/2 2*dim
        """
        corners = [x[:, :, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))  # type: ignore[no-any-return]
