"""Hiera MAE: a hierarchical encoder of visible mask units, and MAE's decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mto_analysis.models.interface import ImageSize, ModelInfo, check_heads, height_and_width
from mto_analysis.models.stacked import StackedModel
from mto_analysis.models.vit import VisiblePatches, coarser_mask, feed_forward, finer_mask, transformer_blocks
from mto_analysis.taps.tokens import last_depth, run_blocks

_EMBED_STRIDE = 4


@dataclass(frozen=True)
class HieraConfig:
    """Architecture of a :class:`Hiera`; the published base model by default.

    ``dim`` and ``mlp_dim`` are those of the first stage and double with each stage; so do ``num_heads``, where only one
    number is given. The first ``pools`` changes of stage also halve the token grid; ``patch_size`` is the side of a
    decoder token in pixels, ``unit`` that of a mask unit in tokens of the first stage. In stages with ``local``
    attention, tokens attend inside their mask unit only; a block that starts a stage follows the stage before it.
    """

    image_size: ImageSize = 224
    patch_size: int = 16
    channels: int = 3
    kernel: int = 7
    dim: int = 96
    depths: tuple[int, ...] = (2, 3, 16, 3)
    num_heads: int | tuple[int, ...] = 1
    mlp_dim: int = 384
    pools: int = 2
    unit: int = 8
    local: tuple[bool, ...] = (True, True, False, False)
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    decoder_mlp_dim: int = 2048
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the values; a list, as JSON has it, becomes a tuple."""
        for name in ("depths", "local"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.num_heads, int):
            object.__setattr__(self, "num_heads", tuple(self.num_heads))
        if len(self.stage_heads) != len(self.depths) or len(self.local) < len(self.depths):
            raise ValueError(f"num_heads and local must name each of {len(self.depths)} stages")
        for stage, heads in enumerate(self.stage_heads):
            check_heads(self.dim << stage, heads)
        check_heads(self.decoder_dim, self.decoder_num_heads, "decoder_num_heads")
        if not 1 <= self.pools < min(len(self.depths), 4) or min(self.depths) < 1:
            raise ValueError(f"{self.pools} pools do not fit stages of {self.depths} blocks")
        if self.unit < 1 << self.pools or self.unit % (1 << self.pools):
            raise ValueError(f"{self.pools} pools do not fit a mask unit of {self.unit} tokens")
        sides = height_and_width(self.image_size)
        if any(side % self.unit_px for side in sides) or self.patch_size != _EMBED_STRIDE << self.pools:
            raise ValueError(f"mask units of {self.unit_px} px do not divide an image of {self.image_size} px")

    @property
    def stage_heads(self) -> tuple[int, ...]:
        """Attention heads of each stage."""
        if isinstance(self.num_heads, int):
            return tuple(self.num_heads << stage for stage in range(len(self.depths)))
        return self.num_heads

    @property
    def unit_px(self) -> int:
        """Side of a mask unit in pixels."""
        return self.unit * _EMBED_STRIDE


class Hiera(StackedModel):
    """Hiera, pre-trained as a masked autoencoder. Layer 0 is the decoder's input after its position embedding.

    The encoder sees whole mask units only: pixels of masked ones are zero in its convolution, and their tokens are left
    out. Outputs of the pooled stages and of the last one are added up for the decoder.

    Source:
        Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles" (ICML 2023);
        facebookresearch/hiera.
    """

    stacks: ClassVar[tuple[str, ...]] = ("decoder",)
    stack_prefix_tokens: int = 0

    def __init__(self, config: HieraConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        out_dim = c.dim << (len(c.depths) - 1)
        height, width = height_and_width(c.image_size)
        #: Rows and columns of mask units.
        self.units = height // c.unit_px, width // c.unit_px
        self.patch_embed = nn.Conv2d(c.channels, c.dim, c.kernel, stride=_EMBED_STRIDE, padding=c.kernel // 2)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.units[0] * self.units[1] * c.unit**2, c.dim))
        ends = list(accumulate(c.depths))
        self.blocks = nn.ModuleList()
        for number in range(ends[-1]):
            stage = sum(number >= end for end in ends)
            starts = number in ends
            self.blocks.append(
                HieraBlock(
                    c.dim << (stage - starts),
                    c.dim << stage,
                    c.stage_heads[stage],
                    c.mlp_dim << stage,
                    pool=starts and stage <= c.pools,
                    local=c.local[stage - starts],
                    eps=c.eps,
                )
            )
        # Blocks whose output goes to the decoder, and what brings each to the decoder's grid.
        self.fused = [*(end - 1 for end in ends[: c.pools]), ends[-1] - 1]
        self.fusion = nn.ModuleList(
            nn.Conv2d(c.dim << stage, out_dim, 1 << (c.pools - stage), stride=1 << (c.pools - stage))
            for stage in range(c.pools)
        )
        self.encoder_norm = nn.LayerNorm(out_dim, eps=c.eps)
        self.decoder_embed = nn.Linear(out_dim, c.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, info.num_patches, c.decoder_dim))
        self.decoder_blocks = transformer_blocks(
            c.decoder_dim, c.decoder_depth, c.decoder_num_heads, c.decoder_mlp_dim, eps=c.eps
        )
        self.decoder_norm = nn.LayerNorm(c.decoder_dim, eps=c.eps)
        self.decoder_pred = nn.Linear(c.decoder_dim, c.patch_size**2 * c.channels)

    def _unit_mask(self, mask: Tensor) -> Tensor:
        """The mask of units ``batch num_units``, which must be wholly masked or visible."""
        masked = coarser_mask(mask, self.units, self.info.grid[0] // self.units[0])
        if masked is None:
            size = self.config.unit_px
            raise ValueError(f"mask must not change inside squares of {size} px; choose a mask unit of {size} px")
        return masked

    def _encode(self, images: Tensor, units: Tensor) -> Tensor:
        """Decoder tokens of visible units, the mask token elsewhere: ``batch num_patches decoder_dim``, row-major."""
        batch, c, (rows, columns) = len(images), self.config, self.units
        hidden = finer_mask(units.reshape(batch, 1, rows, columns), c.unit_px)
        x = self.patch_embed(images.masked_fill(hidden, 0)).flatten(2).mT + self.pos_embed
        x = x.reshape(batch, rows, c.unit, columns, c.unit, -1).transpose(2, 3).reshape(batch, rows * columns, -1)
        visible = VisiblePatches(units, prefix_tokens=0)
        x = visible.take(x).reshape(batch, -1, c.unit, c.unit, c.dim)
        fused: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x, visible.attended)
            if number in self.fused[:-1]:
                y = self.fusion[len(fused)](x.flatten(0, 1).permute(0, 3, 1, 2))
                fused.append(y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]))
        x = self.decoder_embed(self.encoder_norm(sum(fused, start=x)))
        inside = x.shape[2]
        x = visible.put_back(x.flatten(2), self.mask_token.repeat(1, 1, inside * inside))
        x = x.reshape(batch, rows, columns, inside, inside, -1).transpose(2, 3)
        return x.reshape(batch, self.info.num_patches, -1)

    def _hidden(self, images: Tensor, mask: Tensor, stack: str) -> Iterator[Tensor]:
        return run_blocks(self._encode(images, self._unit_mask(mask)) + self.decoder_pos_embed, self.decoder_blocks)

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The decoder's blocks."""
        return tuple(self.decoder_blocks)

    def _masks(self, mask: Tensor) -> Iterable[Tensor]:
        self._unit_mask(mask)  # refuses it at the call
        return super()._masks(mask)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        x = last_depth(self._hidden(images, mask, "decoder"))
        x = self.decoder_pred(self.decoder_norm(x)).mT.reshape(len(images), -1, *self.info.grid)
        return F.pixel_shuffle(x, self.config.patch_size)  # inside a patch values run channel, row, column


class HieraBlock(nn.Module):
    """A pre-norm block that may change the width and halve the grid by max pooling, of queries too.

    Args:
        dim: Width of the input.
        out_dim: Width of the output.
        num_heads: Attention heads.
        mlp_dim: Width of the hidden layer.
        pool: Whether 2 x 2 tokens become one.
        local: Whether tokens attend inside their mask unit only.
        eps: Of the layer norms.
    """

    def __init__(
        self, dim: int, out_dim: int, num_heads: int, mlp_dim: int, *, pool: bool, local: bool, eps: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.pool = pool
        self.local = local
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * out_dim)
        self.attn_proj = nn.Linear(out_dim, out_dim)
        self.proj = nn.Linear(dim, out_dim) if dim != out_dim else None
        self.norm2 = nn.LayerNorm(out_dim, eps=eps)
        self.mlp = feed_forward(out_dim, mlp_dim)

    def forward(self, x: Tensor, attended: Tensor | None = None) -> Tensor:
        """One block.

        Shapes:
            x: batch num_units side side dim
            attended: batch num_units (True = may be attended to)
            returns: batch num_units side side out_dim (half the side where it pools)
        """
        y = self.norm1(x)
        if self.proj is not None:
            x = self._pool(self.proj(y))
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        x = x + self.attn_proj(self._attend(self._pool(q), k, v, attended))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def _pool(self, x: Tensor) -> Tensor:
        if not self.pool:
            return x
        batch, units, side, _, dim = x.shape
        return x.reshape(batch, units, side // 2, 2, side // 2, 2, dim).amax(dim=(3, 5))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None) -> Tensor:
        batch, units, _, _, dim = q.shape
        sequences = batch * units if self.local else batch
        heads = [
            part.reshape(sequences, -1, self.num_heads, dim // self.num_heads).transpose(1, 2) for part in (q, k, v)
        ]
        seen = None
        if attended is not None and not self.local:
            seen = attended.repeat_interleave(k.shape[2] * k.shape[3], dim=1)[:, None, None]
        x = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=seen)
        return x.transpose(1, 2).flatten(2).reshape(q.shape)
