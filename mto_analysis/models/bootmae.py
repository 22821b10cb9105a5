"""BootMAE: two decoders, one for pixels and one for features, each with masked tokens of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from mto_analysis.models.attention import CrossAttention
from mto_analysis.models.encoder import PositionedEncoder
from mto_analysis.models.interface import ModelInfo
from mto_analysis.models.vit import (
    VisiblePatches,
    ViTConfig,
    feed_forward,
    patch_embedding,
    sincos_table,
    transformer_blocks,
)
from mto_analysis.taps.tokens import last_depth, run_blocks


@dataclass(frozen=True)
class BootMAEConfig(ViTConfig):
    """Architecture of a :class:`BootMAE`; the published ViT-B by default.

    Both decoders take the encoder's number of heads. Where it does not divide a decoder's width, heads are
    ``width // num_heads`` wide and attention is a little narrower than the residual stream: 504 of 512 for ViT-B.
    """

    decoder_dim: int = 512
    decoder_mlp_dim: int = 2048
    decoder_depth: int = 2
    feature_mlp_dim: int = 3072
    feature_depth: int = 2
    feature_dim: int = 768
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the values."""
        if self.num_heads < 1 or self.dim % self.num_heads or self.decoder_dim < self.num_heads:
            raise ValueError(f"num_heads must divide the width {self.dim}, got {self.num_heads}")


class BootMAE(PositionedEncoder):
    """Bootstrapped masked autoencoder. Layer 0 is a decoder's input.

    In both decoders masked tokens carry their position and visible ones do not: those bring theirs from the encoder.
    Each block also attends to visible tokens of the encoder: those after its first block (pixels) or its last one
    (features).

    Source:
        Dong et al., "Bootstrapped Masked Autoencoders for Vision BERT Pretraining" (ECCV 2022); LightDXY/BootMAE.
    """

    stacks: ClassVar[tuple[str, ...]] = ("pixel_decoder", "feature_decoder")

    def __init__(self, config: BootMAEConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        self.patch_embed = patch_embedding(c.image_size, c.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        table = sincos_table(info.grid, c.dim, rows_first=True)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps)
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        block = partial(BootMAEBlock, num_heads=c.num_heads, memory_dim=c.dim, eps=c.eps)

        self.pixel_embed = nn.Linear(c.dim, c.decoder_dim)
        self.pixel_mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        table = sincos_table(info.grid, c.decoder_dim, rows_first=True)
        self.pixel_pos_embed = nn.Parameter(table, requires_grad=False)
        self.pixel_blocks = nn.ModuleList(
            block(dim=c.decoder_dim, mlp_dim=c.decoder_mlp_dim) for _ in range(c.decoder_depth)
        )
        self.pixel_norm = nn.LayerNorm(c.decoder_dim, eps=c.eps)
        self.pixel_pred = nn.ConvTranspose2d(c.decoder_dim, c.channels, c.patch_size, stride=c.patch_size)

        self.feature_embed = nn.Linear(c.dim, c.dim)
        self.feature_mask_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.feature_blocks = nn.ModuleList(block(dim=c.dim, mlp_dim=c.feature_mlp_dim) for _ in range(c.feature_depth))
        self.feature_norm = nn.LayerNorm(c.dim, eps=c.eps)
        self.feature_pred = nn.Linear(c.dim, c.feature_dim)

    def _encode(self, images: Tensor, visible: VisiblePatches) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's output after its norm, and its tokens after the first and after the last block."""
        x = first = self._embed(images, visible)
        for depth, block in enumerate(self.blocks):
            x = block(x, attn_mask=visible.attn_mask)
            if depth == 0:
                first = x
        return self.norm(x), first, x

    def _decode(self, encoded: Tensor, memory: Tensor, visible: VisiblePatches, stack: str) -> Iterator[Tensor]:
        """Class and patch tokens of a decoder at every layer depth: ``batch 1+num_patches dim``."""
        if stack == "pixel_decoder":
            x, blocks = self.pixel_embed(encoded), self.pixel_blocks
            masked = self.pixel_mask_token + self.pixel_pos_embed[:, 1:]
        else:
            x, blocks = self.feature_embed(encoded), self.feature_blocks
            masked = self.feature_mask_token + self.pos_embed[:, 1:]
        x = torch.cat([x[:, :1], visible.put_back(x[:, 1:], masked)], dim=1)
        return run_blocks(x, (partial(block, memory=memory, attended=visible.attended) for block in blocks))

    def _hidden(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[Tensor]:
        """The same from images."""
        visible = VisiblePatches(mask)
        encoded, first, last = self._encode(images, visible)
        return self._decode(encoded, first if stack == "pixel_decoder" else last, visible, stack)

    def predict(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and features of every patch from one pass through the encoder, without any check: for training.

        Shapes:
            images: batch channels height width
            mask: batch num_patches
            returns: batch channels height width; batch num_patches feature_dim
        """
        visible = VisiblePatches(mask)
        encoded, first, last = self._encode(images, visible)
        pixels = last_depth(self._decode(encoded, first, visible, "pixel_decoder"))
        features = last_depth(self._decode(encoded, last, visible, "feature_decoder"))
        return self._to_pixels(pixels), self.feature_pred(self.feature_norm(features))[:, 1:]

    def whole_features(self, images: Tensor) -> Tensor:
        """Patch tokens after the last block, before the norm, of images without any mask: the feature target.

        Shapes:
            images: batch channels height width
            returns: batch num_patches dim
        """
        return last_depth(self._whole(images))[:, 1:]

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The blocks of one of the two decoders."""
        return tuple(self.pixel_blocks if stack == "pixel_decoder" else self.feature_blocks)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return self._to_pixels(last_depth(self._hidden(images, mask, "pixel_decoder")))

    def _to_pixels(self, x: Tensor) -> Tensor:
        """The pixel decoder's last tokens as an image."""
        x = self.pixel_norm(x)[:, 1:].mT.reshape(len(x), -1, *self.info.grid)
        return self.pixel_pred(x)  # type: ignore[no-any-return]


class BootMAEBlock(nn.Module):
    """Self-attention, then attention to the encoder's tokens, then an MLP; pre-norm, each added to its input."""

    def __init__(self, dim: int, mlp_dim: int, num_heads: int, memory_dim: int, *, eps: float) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, num_heads, head_dim)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.norm4 = nn.LayerNorm(memory_dim, eps=eps)
        self.c_attn = CrossAttention(dim, num_heads, head_dim, memory_dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = feed_forward(dim, mlp_dim)

    def forward(self, x: Tensor, memory: Tensor, attended: Tensor | None = None) -> Tensor:
        """One block.

        Shapes:
            x: batch num_tokens dim
            memory: batch num_memory memory_dim
            attended: batch num_memory (True = may be attended to)
            returns: batch num_tokens dim
        """
        y = self.norm1(x)
        x = x + self.attn(y, y)
        x = x + self.c_attn(self.norm3(x), self.norm4(memory), attended=attended)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
