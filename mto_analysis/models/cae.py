"""CAE: a regressor predicts the representation of masked patches from that of visible ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from mto_analysis.models.attention import CrossAttention
from mto_analysis.models.encoder import PositionedEncoder
from mto_analysis.models.interface import ModelInfo, check_heads
from mto_analysis.models.vit import VisiblePatches, ViTConfig, feed_forward, patch_embedding, transformer_blocks
from mto_analysis.taps.tokens import run_blocks


@dataclass(frozen=True)
class CAEConfig(ViTConfig):
    """Architecture of a :class:`CAE`; the published ViT-B by default.

    A regressor of another width than the encoder, ``decoder_dim``, starts with a projection and its norm.
    """

    layer_scale: float | None = 0.1
    decoder_dim: int = 768
    decoder_depth: int = 4
    decoder_num_heads: int = 12
    decoder_mlp_dim: int = 3072
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_heads(self.decoder_dim, self.decoder_num_heads, "decoder_num_heads")


class CAE(PositionedEncoder):
    """Context autoencoder. Layer 0 is the regressor's input: there all masked tokens are one vector.

    Positions enter only inside attention. Visible tokens stay what the encoder gave at every layer depth, so a curve of
    heterogeneity shows the masked tokens alone. The decoder behind the regressor sees no visible token and is left out.

    Source:
        Chen et al., "Context Autoencoder for Self-Supervised Representation Learning" (IJCV 2024); Atten4Vis/CAE.
    """

    stacks: ClassVar[tuple[str, ...]] = ("regressor",)
    stack_prefix_tokens: int = 0

    def __init__(self, config: CAEConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        self.patch_embed = patch_embedding(c.image_size, c.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, info.num_patches + 1, c.dim), requires_grad=False)
        self.blocks = transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps, layer_scale=c.layer_scale)
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        self.decoder_embed: nn.Module = nn.Identity()
        if c.decoder_dim != c.dim:
            self.decoder_embed = nn.Sequential(nn.Linear(c.dim, c.decoder_dim), nn.LayerNorm(c.decoder_dim, eps=c.eps))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, info.num_patches + 1, c.decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(RegressorBlock(c) for _ in range(c.decoder_depth))

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The regressor's blocks."""
        return tuple(self.decoder_blocks)

    def _hidden(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[Tensor]:
        visible = VisiblePatches(mask)
        x = self._embed(images, visible)
        for block in self.blocks:
            x = block(x, attn_mask=visible.attn_mask)
        x = visible.put_back(self.decoder_embed(self.norm(x))[:, 1:], self.mask_token)
        return run_blocks(x, (partial(self._update_masked, block, mask) for block in self.decoder_blocks))

    def _update_masked(self, block: nn.Module, mask: Tensor, x: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), block(x, self.decoder_pos_embed[:, 1:]), x)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        raise ValueError(f"a {self.info.family} model predicts visual tokens, not pixels: nothing to reconstruct")


class RegressorBlock(nn.Module):
    """Attention of masked tokens to all tokens, whose values carry no position; then an MLP, both with layer scale."""

    def __init__(self, config: CAEConfig) -> None:
        super().__init__()
        dim, eps = config.decoder_dim, config.eps
        self.norm1_q = nn.LayerNorm(dim, eps=eps)
        self.norm1_k = nn.LayerNorm(dim, eps=eps)
        self.norm1_v = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, config.decoder_num_heads, dim // config.decoder_num_heads)
        self.gamma_1_cross = nn.Parameter(torch.ones(dim))
        self.norm2_cross = nn.LayerNorm(dim, eps=eps)
        self.mlp_cross = feed_forward(dim, config.decoder_mlp_dim)
        self.gamma_2_cross = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """One block, of which only the masked rows mean something.

        Shapes:
            x: batch num_patches dim
            positions: 1 num_patches dim
            returns: batch num_patches dim
        """
        placed = x + positions
        y = self.cross_attn(self.norm1_q(placed), self.norm1_k(placed), self.norm1_v(x))
        # The original goes on from the normalized sum, not from the sum.
        x = self.norm2_cross(x + self.gamma_1_cross * y)
        return x + self.gamma_2_cross * self.mlp_cross(x)  # type: ignore[no-any-return]
