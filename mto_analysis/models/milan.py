"""MILAN: MAE's encoder, and a decoder that updates masked tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mto_analysis.models.attention import CrossAttention
from mto_analysis.models.interface import ModelInfo
from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.vit import feed_forward
from mto_analysis.taps.tokens import run_blocks


class MILAN(MAE):
    """Masked image pretraining on language assisted representation. Layer 0 is the decoder's input.

    Class and visible tokens stay as they enter the decoder, at every layer depth: a curve of heterogeneity shows the
    masked tokens alone.

    Source:
        Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation" (2022); zejiangh/MILAN.
    """

    def __init__(self, config: MAEConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        self.decoder_blocks = nn.ModuleList(
            PromptingBlock(c.decoder_dim, c.decoder_num_heads, c.decoder_mlp_dim, eps=c.eps)
            for _ in range(c.decoder_depth)
        )

    def _hidden(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[Tensor]:
        masked = nn.functional.pad(mask, (self.stack_prefix_tokens, 0)).unsqueeze(-1)  # the class token never is
        blocks = (partial(_update_masked, block, masked) for block in self.decoder_blocks)
        return run_blocks(self._decoder_input(images, mask), blocks)


def _update_masked(block: nn.Module, masked: Tensor, x: Tensor) -> Tensor:
    return torch.where(masked, block(x, masked), x)


class PromptingBlock(nn.Module):
    """Attention of masked tokens, normalized, to all tokens, of which visible ones are not; then an MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, num_heads, dim // num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = feed_forward(dim, mlp_dim)

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        """One block, of which only the masked rows mean something.

        Shapes:
            x: batch num_tokens dim
            masked: batch num_tokens 1
            returns: batch num_tokens dim
        """
        y = self.norm1(x)
        x = x + self.attn(y, torch.where(masked, y, x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
