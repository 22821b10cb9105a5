"""What the ViT families share: timm's pre-norm block, relative position bias, sin-cos tables, pixels to patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Mlp, PatchEmbed  # type: ignore[attr-defined]
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mto_analysis.models.interface import ImageSize, check_heads


@dataclass(frozen=True)
class ViTConfig:
    """Architecture of a plain ViT encoder; ViT-B by default."""

    image_size: ImageSize = 224
    patch_size: int = 16
    channels: int = 3
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072

    def __post_init__(self) -> None:
        """Check the values."""
        check_heads(self.dim, self.num_heads)


def transformer_blocks(
    dim: int,
    depth: int,
    num_heads: int,
    mlp_dim: int,
    *,
    eps: float,
    layer_scale: float | None = None,
) -> nn.ModuleList:
    """Pre-norm ViT blocks of timm: ``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``.

    The BEiT code base has biases for queries and values only; its key bias is zero here, which changes nothing: a
    constant added to all keys shifts every logit of a query alike.
    """
    block = partial(
        Block,
        dim=dim,
        num_heads=num_heads,
        mlp_ratio=(mlp_dim + 0.5) / dim,  # timm truncates ratio * dim; the half keeps the width exact
        qkv_bias=True,
        init_values=layer_scale,
        norm_layer=partial(nn.LayerNorm, eps=eps),  # type: ignore[arg-type]
    )
    return nn.ModuleList([block() for _ in range(depth)])


def patch_embedding(
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int,
    dim: int,
    *,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """Patch embedding of timm: a convolution without overlap, flattened row by row, then a norm if one is given."""
    embedding: nn.Module = PatchEmbed(image_size, patch_size, channels, dim, norm_layer=norm)
    return embedding


def feed_forward(dim: int, mlp_dim: int) -> nn.Module:
    """The MLP of a block, ``fc2(gelu(fc1(x)))``, of timm."""
    mlp: nn.Module = Mlp(dim, mlp_dim)
    return mlp


def finer_mask(mask: Tensor, factor: int) -> Tensor:
    """A mask on a grid that is finer by a factor.

    Shapes:
        mask: batch 1 rows columns
        returns: batch 1 factor*rows factor*columns
    """
    return mask.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def coarser_mask(mask: Tensor, grid: tuple[int, int], factor: int) -> Tensor | None:
    """A mask on a grid that is coarser by a factor; ``None`` if it changes inside one of that grid's squares.

    Shapes:
        mask: batch factor*rows*factor*columns
        returns: batch rows*columns

    Example:
        >>> coarser_mask(torch.tensor([[True, True, False, False]]).repeat(1, 2), (1, 2), 2)
        tensor([[ True, False]])
    """
    squares = mask.reshape(len(mask), grid[0], factor, grid[1], factor)
    masked = squares.all(dim=4).all(dim=2)
    mixed = masked != squares.any(dim=4).any(dim=2)
    return None if bool(mixed.any()) else masked.flatten(1)


class VisiblePatches:
    """The visible patches of a batch of masks: for encoders that see nothing else.

    They keep their row-major order. The originals shuffle them; attention does not notice, as positions were added
    before. Where rows see different numbers of patches, shorter ones are filled up with masked patches, which no query
    may attend to.

    Shapes:
        mask: batch num_patches

    Args:
        mask: True where masked.
        prefix_tokens: Tokens that the encoder puts in front, attended to by all.

    Example:
        >>> visible = VisiblePatches(torch.tensor([[True, False], [False, False]]), prefix_tokens=0)
        >>> visible.take(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])).squeeze(2)
        tensor([[2., 1.],
                [3., 4.]])
        >>> visible.attended
        tensor([[ True, False],
                [ True,  True]])
    """

    def __init__(self, mask: Tensor, prefix_tokens: int = 1) -> None:
        self.mask = mask
        num_visible = (~mask).sum(dim=1)
        # One question to the device: each waits until it has done all its work.
        least, most = (int(each) for each in torch.stack(num_visible.aminmax()).tolist())
        self.index = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :most].unsqueeze(-1)
        #: Which of the taken tokens are real (batch num_tokens), or ``None`` where all are.
        self.attended: Tensor | None = None
        if least < most:
            self.attended = torch.arange(-prefix_tokens, most, device=mask.device) < num_visible[:, None]

    @property
    def attn_mask(self) -> Tensor | None:
        """The same for timm's blocks: ``batch 1 1 num_tokens``."""
        return None if self.attended is None else self.attended[:, None, None]

    def take(self, x: Tensor) -> Tensor:
        """Of all patches ``batch num_patches dim`` the visible ones."""
        return x.gather(1, self.index.expand(-1, -1, x.shape[-1]))

    def put_back(self, x: Tensor, masked: Tensor) -> Tensor:
        """Visible tokens at their places among ``masked`` ones, which broadcast to ``batch num_patches dim``."""
        placed = x.new_zeros(*self.mask.shape, x.shape[-1]).scatter(1, self.index.expand(-1, -1, x.shape[-1]), x)
        return torch.where(self.mask.unsqueeze(-1), masked.to(x.dtype), placed)


class RelativePositionBias(nn.Module):
    """A learned bias on attention logits for each offset of two patches, and three entries for the class token.

    Args:
        grid: Rows and columns of patches.
        num_heads: Attention heads.
        class_token: Whether there is one; Swin's windows have none.

    Source:
        Bao et al., "BEiT" (ICLR 2022); the same table as in microsoft/SimMIM's ViT and, without class token, in Swin.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int, *, class_token: bool = True) -> None:
        super().__init__()
        num_offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if class_token else 0)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        index = relative_position_index(grid)
        self.register_buffer("index", index if class_token else index[1:, 1:].contiguous(), persistent=False)

    def forward(self) -> Tensor:
        """The bias to add to the logits.

        Shapes:
            returns: 1 num_heads num_tokens num_tokens (class token first)
        """
        return self.relative_position_bias_table[self.index].permute(2, 0, 1).unsqueeze(0).contiguous()


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Row of the bias table for each query (row) and key (column); token 0 is the class token.

    Shapes:
        returns: num_tokens num_tokens

    Example:
        >>> relative_position_index((1, 2))
        tensor([[5, 3, 3],
                [4, 1, 0],
                [4, 2, 1]])
    """
    rows, columns = grid
    # On the CPU even where a model is built on the meta device: checkpoints hold no indices to fill in later.
    cell = torch.arange(rows * columns, device="cpu")
    y, x = cell // columns, cell % columns
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(rows * columns + 1, rows * columns + 1, dtype=torch.long, device="cpu")
    index[1:, 1:] = (y[:, None] - y + rows - 1) * (2 * columns - 1) + (x[:, None] - x + columns - 1)
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def sincos_table(grid: tuple[int, int], dim: int, *, rows_first: bool = False) -> Tensor:
    """MAE's fixed position table: the first half of the channels encodes the column, the second the row.

    In each half, sines come before cosines, at frequencies ``10000^(-k / (dim / 4))``; the class token's row is zero.

    Shapes:
        returns: 1 num_tokens dim

    Args:
        grid: Rows and columns of patches.
        dim: Width of a token.
        rows_first: Whether the first half encodes the row instead, as in MoCo v3 and BootMAE.

    Source:
        He et al. (CVPR 2022); facebookresearch/mae.

    Example:
        >>> sincos_table((1, 1), 4)
        tensor([[[0., 0., 0., 0.],
                 [0., 1., 0., 1.]]])
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    halves = []
    for position in (y, x) if rows_first else (x, y):
        angle = position.flatten().to(torch.float64)[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    table = torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.cat(halves, dim=1)])
    return table.to(torch.float32).unsqueeze(0)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches; inside a patch values run row, column, channel (MAE's order).

    Shapes:
        images: batch channels height width
        returns: batch num_patches values

    Example:
        >>> patchify(torch.arange(4.0).reshape(1, 1, 2, 2), patch_size=1).flatten()
        tensor([0., 1., 2., 3.])
    """
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches back into images; the inverse of :func:`patchify`.

    Shapes:
        patches: batch num_patches values
        returns: batch channels height width
    """
    x = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid[0] * patch_size, grid[1] * patch_size)
