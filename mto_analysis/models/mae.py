"""MAE: the encoder sees visible patches only; masked tokens live in the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mto_analysis.models.encoder import PositionedEncoder
from mto_analysis.models.interface import ModelInfo, check_heads
from mto_analysis.models.vit import (
    VisiblePatches,
    ViTConfig,
    patch_embedding,
    sincos_table,
    transformer_blocks,
    unpatchify,
)
from mto_analysis.taps.tokens import last_depth, run_blocks


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """Architecture of an :class:`MAE`; widths of the published ViT-B by default.

    ``feature_dim`` is the width of what the decoder predicts where that is features instead of pixels; ``class_token``
    is whether one is in both stacks.
    """

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    decoder_mlp_dim: int = 2048
    feature_dim: int | None = None
    eps: float = 1e-6
    class_token: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_heads(self.decoder_dim, self.decoder_num_heads, "decoder_num_heads")


class MAE(PositionedEncoder):
    """Masked autoencoder. Layer 0 is the decoder's input after its position embedding.

    Families with the same decoder and another encoder replace :meth:`_build_encoder` and :meth:`_encoded`.

    Source:
        He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); facebookresearch/mae.
    """

    stacks: ClassVar[tuple[str, ...]] = ("decoder",)

    def __init__(self, config: MAEConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        self.encoder_prefix_tokens = self.stack_prefix_tokens = int(c.class_token)
        encoded_dim = self._build_encoder()
        self.decoder_embed = nn.Linear(encoded_dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(self._position_table(c.decoder_dim), requires_grad=False)
        self.decoder_blocks = transformer_blocks(
            c.decoder_dim, c.decoder_depth, c.decoder_num_heads, c.decoder_mlp_dim, eps=c.eps
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_dim, eps=c.eps)
        self.decoder_pred = nn.Linear(c.decoder_dim, c.feature_dim or info.patch_size**2 * c.channels)

    def _build_encoder(self) -> int:
        """Make the encoder's modules; the width of what it gives to the decoder."""
        c = self.config
        self.patch_embed = patch_embedding(c.image_size, c.patch_size, c.channels, c.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim)) if c.class_token else None
        self.pos_embed = nn.Parameter(self._position_table(c.dim), requires_grad=False)
        self.blocks = transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps)
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        return int(c.dim)

    def _position_table(self, dim: int) -> Tensor:
        return sincos_table(self.info.grid, dim)[:, 1 - self.stack_prefix_tokens :]

    def _encoded(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        """Class token, if any, and visible patches as the encoder gives them: ``batch num_tokens encoded_dim``."""
        return self.norm(self._encode(self._embed(images, visible), visible.attn_mask))  # type: ignore[no-any-return]

    def _decoder_input(self, images: Tensor, mask: Tensor) -> Tensor:
        """Class and patch tokens as the first decoder block receives them: ``batch num_tokens decoder_dim``."""
        prefix = self.stack_prefix_tokens
        visible = VisiblePatches(mask, prefix)
        x = self.decoder_embed(self._encoded(images, visible))
        tokens = visible.put_back(x[:, prefix:], self.mask_token)
        return torch.cat([x[:, :prefix], tokens], dim=1) + self.decoder_pos_embed

    def _encode(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask)
        return x

    def _hidden(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[Tensor]:
        return run_blocks(self._decoder_input(images, mask), self.decoder_blocks)

    def position_embedding(self, stack: str) -> Tensor:
        """The decoder's sin-cos table."""
        return self.decoder_pos_embed[:, self.stack_prefix_tokens :]

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The decoder's blocks."""
        return tuple(self.decoder_blocks)

    def predict_patches(self, images: Tensor, mask: Tensor) -> Tensor:
        """What the decoder predicts for every patch, without any check: for training.

        Shapes:
            images: batch channels height width
            mask: batch num_patches
            returns: batch num_patches values (row, column, channel; or features)
        """
        x = last_depth(self._hidden(images, mask, "decoder"))
        return self.decoder_pred(self.decoder_norm(x))[:, self.stack_prefix_tokens :]  # type: ignore[no-any-return]

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        if self.config.feature_dim is not None:
            raise ValueError(f"this {self.info.family} model predicts features, not pixels: nothing to reconstruct")
        return unpatchify(self.predict_patches(images, mask), self.info.patch_size, self.info.grid)
