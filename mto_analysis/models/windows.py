"""Blocks of the Swin transformers, versions 1 and 2: attention inside windows, merging between stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from mto_analysis.models.vit import RelativePositionBias, feed_forward, relative_position_index, transformer_blocks

# Between regions that the cyclic shift brought together; the original adds it rather than minus infinity.
_APART = -100.0
_MOST_LOGIT_SCALE = 4.605170185988092  # log 100


class WindowBlock(nn.Module):
    """A Swin block: timm's ViT block over windows of tokens, cyclically shifted in every second block.

    Norms and the MLP act on single tokens, so the residual stream as a whole can be cut into windows. timm's own Swin
    block keeps indices and shift masks where the model is built, which is the meta device for a checkpoint.

    Args:
        dim: Width.
        num_heads: Attention heads.
        mlp_dim: Width of the hidden layer.
        grid: Rows and columns of tokens.
        window: Side of a window; it shrinks to the shorter side of the grid, and is never shifted then.
        shifted: Whether windows are shifted by half of their side.
        version: 1, or 2: cosine attention, norms after each branch, a small network for the position bias.
        eps: Of the layer norms.
        pretrained: Version 2: the window by whose side offsets are scaled; 0 is its own.
    """

    apart: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        grid: tuple[int, int],
        window: int,
        *,
        shifted: bool,
        version: Literal[1, 2],
        eps: float,
        pretrained: int = 0,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.window = min(window, *grid)
        self.shift = self.window // 2 if shifted and min(grid) > window else 0
        apart = shift_mask(grid, self.window, self.shift) if self.shift else None
        self.register_buffer("apart", apart, persistent=False)
        self.block: nn.Module
        self.position_bias: nn.Module
        if version == 1:
            self.block = transformer_blocks(dim, 1, num_heads, mlp_dim, eps=eps)[0]
            self.position_bias = RelativePositionBias((self.window,) * 2, num_heads, class_token=False)
        else:
            self.block = CosineBlock(dim, num_heads, mlp_dim, eps=eps)
            self.position_bias = LogPositionBias(self.window, num_heads, pretrained)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """One block.

        Shapes:
            x: batch num_patches dim
            hidden: batch num_patches (True = not attended to)
            returns: batch num_patches dim
        """
        batch, num_patches, dim = x.shape
        side = (self.window, self.window)
        bias = self.position_bias()
        if self.apart is not None:
            bias = (bias + self.apart.to(bias.dtype)).repeat(batch, 1, 1, 1)
        windows = self._windows(x)
        if hidden is not None:
            keys = self._windows(hidden.unsqueeze(2).to(x.dtype)).squeeze(2)
            bias = bias + _APART * keys[:, None, None]
        windows = self.block(windows, attn_mask=bias)
        x = window_reverse(windows.reshape(-1, *side, dim), side, *self.grid)
        return x.roll((self.shift, self.shift), (1, 2)).reshape(batch, num_patches, dim)

    def _windows(self, x: Tensor) -> Tensor:
        """Shifted windows ``windows window_tokens dim`` of tokens ``batch num_patches dim``."""
        x = x.reshape(len(x), *self.grid, -1).roll((-self.shift, -self.shift), (1, 2))
        return window_partition(x, (self.window, self.window)).flatten(1, 2)


def window_stages(
    grids: Sequence[tuple[int, int]],
    dim: int,
    mlp_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window: int,
    *,
    version: Literal[1, 2],
    eps: float,
    outer_eps: float,
    pretrained: Sequence[int] = (),
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The blocks of each stage, every second one shifted, and the merges between stages.

    Args:
        grids: Rows and columns of tokens of each stage.
        dim: Width of the first stage; it doubles with each merge.
        mlp_dim: Width of the hidden layers of the first stage; it doubles too.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window: Side of a window.
        version: As for :class:`WindowBlock`.
        eps: Of the norms of blocks.
        outer_eps: Of the norms of merges.
        pretrained: Version 2: windows of the stages by which offsets are scaled.
    """
    stages, merges = nn.ModuleList(), nn.ModuleList()
    for stage, grid in enumerate(grids):
        block = partial(
            WindowBlock, dim << stage, num_heads[stage], mlp_dim << stage, grid, window, version=version, eps=eps
        )
        if pretrained:
            block = partial(block, pretrained=pretrained[stage])
        stages.append(nn.ModuleList(block(shifted=number % 2 == 1) for number in range(depths[stage])))
        if stage + 1 < len(grids):
            merges.append(PatchMerging(dim << stage, grid, norm_first=version == 1, eps=outer_eps))
    return stages, merges


def shift_mask(grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """What to add to logits in shifted windows: tokens from opposite edges of the map must not meet.

    Shapes:
        returns: num_windows 1 window_tokens window_tokens

    Example:
        >>> shift_mask((4, 4), 2, 1).shape
        torch.Size([4, 1, 4, 4])
        >>> int(shift_mask((4, 4), 2, 1)[0].count_nonzero())  # the first window lies inside the map
        0
    """
    bands = []
    for side in grid:
        place = torch.arange(side, device="cpu")
        bands.append((place >= side - window).long() + (place >= side - shift).long())
    region = (3 * bands[0][:, None] + bands[1]).reshape(1, *grid, 1)
    windows = window_partition(region, (window, window)).flatten(1)
    return _APART * (windows[:, :, None] != windows[:, None, :]).unsqueeze(1).float()


class PatchMerging(nn.Module):
    """Join 2 x 2 tokens into one of twice the width; version 1 normalizes before the reduction, version 2 after.

    Channels run over the tokens at (row, column) (0, 0), (1, 0), (0, 1), (1, 1), as in the original.
    """

    def __init__(self, dim: int, grid: tuple[int, int], *, norm_first: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.grid = grid
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge.

        Shapes:
            x: batch num_patches dim
            returns: batch num_patches/4 2*dim
        """
        rows, columns = self.grid[0] // 2, self.grid[1] // 2
        x = x.reshape(len(x), rows, 2, columns, 2, -1).permute(0, 1, 3, 4, 2, 5).reshape(len(x), rows * columns, -1)
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))  # type: ignore[no-any-return]


class CosineBlock(nn.Module):
    """Version 2's block: norms come after attention and MLP, before each is added to its input."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, eps: float) -> None:
        super().__init__()
        self.attn = CosineAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = feed_forward(dim, mlp_dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        """One block; shapes as in :class:`CosineAttention`."""
        x = x + self.norm1(self.attn(x, attn_mask))
        return x + self.norm2(self.mlp(x))  # type: ignore[no-any-return]


class CosineAttention(nn.Module):
    """Version 2's attention: cosines of queries and keys, times a learned factor per head."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        """Attend.

        Shapes:
            x: batch num_tokens dim
            attn_mask: batch num_heads num_tokens num_tokens (added to the logits)
            returns: batch num_tokens dim
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=_MOST_LOGIT_SCALE).exp()
        x = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=attn_mask, scale=1.0)
        return self.proj(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def window_coordinates(window: int, pretrained: int = 0) -> Tensor:
    """Log-spaced offsets of two tokens of a window, 1 at its far side, or at that of the pretrained window.

    Shapes:
        returns: num_offsets 2 (row, column)

    Example:
        >>> window_coordinates(2)[0]
        tensor([-1.0566, -1.0566])
    """
    offset = (
        torch.arange(1 - window, window, dtype=torch.float32, device="cpu") * 8 / max((pretrained or window) - 1, 1)
    )
    offset = offset.sign() * (offset.abs() + 1).log2() / 3
    return torch.stack(torch.meshgrid(offset, offset, indexing="ij"), dim=-1).reshape(-1, 2)


class LogPositionBias(nn.Module):
    """Version 2's bias: a small network of the log-spaced offset of two tokens of a window, between 0 and 16."""

    index: Tensor
    coords: Tensor

    def __init__(self, window: int, num_heads: int, pretrained: int = 0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False))
        self.register_buffer("coords", window_coordinates(window, pretrained), persistent=False)
        index = relative_position_index((window, window))[1:, 1:].contiguous()
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """The bias to add to the logits.

        Shapes:
            returns: 1 num_heads num_tokens num_tokens
        """
        table = 16 * torch.sigmoid(self.mlp(self.coords))
        return table[self.index].permute(2, 0, 1).unsqueeze(0).contiguous()
