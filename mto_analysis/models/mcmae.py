"""MCMAE: MAE whose encoder starts with two stages of masked convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.vit import VisiblePatches, finer_mask, transformer_blocks


@dataclass(frozen=True)
class MCMAEConfig(MAEConfig):
    """Architecture of an :class:`MCMAE`; the published base model by default.

    ``stem_dims`` are the widths of the two convolutional stages, ``stem_depths`` and ``stem_mlp_dims`` their blocks and
    hidden widths; ``strides`` are the sides of the three patch embeddings, whose product is ``patch_size``.
    """

    depth: int = 11
    class_token: bool = False
    stem_dims: tuple[int, int] = (256, 384)
    stem_depths: tuple[int, int] = (2, 2)
    stem_mlp_dims: tuple[int, int] = (1024, 1536)
    strides: tuple[int, int, int] = (4, 2, 2)


class MCMAE(MAE):
    """MCMAE, published as ConvMAE. Layer 0 is the decoder's input after its position embedding.

    Two stages of convolutions see the whole image, in which masked places are zero inside each block; from there on
    the encoder is that of MAE, and what the stages gave is added to its output.

    Source:
        Gao et al., "MCMAE: Masked Convolution Meets Masked Autoencoders" (NeurIPS 2022); Alpha-VL/ConvMAE,
        ``models_convmae.py``, ``vision_transformer.py``.
    """

    def _build_encoder(self) -> int:
        c = self.config
        widths = (c.channels, *c.stem_dims, c.dim)
        embeddings = [
            ConvEmbedding(into, out, stride)
            for into, out, stride in zip(widths[:-1], widths[1:], c.strides, strict=True)
        ]
        self.patch_embed1, self.patch_embed2, self.patch_embed3 = embeddings
        self.patch_embed4 = nn.Linear(c.dim, c.dim)
        self.blocks1, self.blocks2 = (
            nn.ModuleList(ConvBlock(dim, mlp_dim) for _ in range(depth))
            for dim, depth, mlp_dim in zip(c.stem_dims, c.stem_depths, c.stem_mlp_dims, strict=True)
        )
        second, third = c.strides[1] * c.strides[2], c.strides[2]
        self.stage1_output_decode = nn.Conv2d(c.stem_dims[0], c.dim, second, stride=second)
        self.stage2_output_decode = nn.Conv2d(c.stem_dims[1], c.dim, third, stride=third)
        self.cls_token = None
        self.pos_embed = nn.Parameter(self._position_table(c.dim), requires_grad=False)
        self.blocks = transformer_blocks(c.dim, c.depth, c.num_heads, c.mlp_dim, eps=c.eps)
        self.norm = nn.LayerNorm(c.dim, eps=c.eps)
        return int(c.dim)

    def _encoded(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        seen = ~visible.mask.reshape(-1, 1, *self.info.grid)
        x, added = self._stem(images, seen)
        x = self._encode(visible.take(x), visible.attn_mask) + visible.take(added)
        return self.norm(x)  # type: ignore[no-any-return]

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        x, added = self._stem(images, None)
        yield x
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            yield x + added if number == len(self.blocks) else x

    def _stem(self, images: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Placed tokens of all patches, and what is added to the encoder's output."""
        _, second, third = self.config.strides
        x = self.patch_embed1(images)
        for block in self.blocks1:
            x = block(x, _enlarged(seen, second * third))
        added = self.stage1_output_decode(x)
        x = self.patch_embed2(x)
        for block in self.blocks2:
            x = block(x, _enlarged(seen, third))
        added = added + self.stage2_output_decode(x)
        x = self.patch_embed4(self.patch_embed3(x).flatten(2).mT) + self.pos_embed
        return x, added.flatten(2).mT


def _enlarged(seen: Tensor | None, factor: int) -> Tensor | None:
    return None if seen is None else finer_mask(seen, factor)


class ConvEmbedding(nn.Module):
    """A convolution without overlap, its norm over channels and GELU."""

    def __init__(self, channels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, stride, stride=stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed; ``batch channels height width`` to ``batch dim height/stride width/stride``."""
        return nn.functional.gelu(_over_channels(self.norm, self.proj(x)))


class ConvBlock(nn.Module):
    """A pre-norm block with a 5 x 5 convolution of each channel in the place of attention."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"fc1": nn.Conv2d(dim, mlp_dim, 1), "fc2": nn.Conv2d(mlp_dim, dim, 1)})

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """One block.

        Shapes:
            x: batch dim height width
            seen: batch 1 height width (False where the convolution must see nothing)
            returns: batch dim height width
        """
        y = self.conv1(_over_channels(self.norm1, x))
        x = x + self.conv2(self.attn(y if seen is None else y * seen))
        y = self.mlp["fc1"](_over_channels(self.norm2, x))
        return x + self.mlp["fc2"](nn.functional.gelu(y))  # type: ignore[no-any-return]


def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
