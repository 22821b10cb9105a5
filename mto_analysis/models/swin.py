"""SimMIM with a Swin transformer, version 1 or 2: masked tokens in an encoder of stages whose token grid shrinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mto_analysis.models.interface import ImageSize, ModelInfo, check_heads, height_and_width
from mto_analysis.models.stacked import StackedModel
from mto_analysis.models.vit import coarser_mask, patch_embedding
from mto_analysis.models.windows import window_stages
from mto_analysis.taps.tokens import last_depth, run_blocks


@dataclass(frozen=True)
class SwinConfig:
    """Architecture of a :class:`SimMIMSwin`; the published Swin-B by default.

    ``dim``, ``mlp_dim`` are those of the first stage and double at each merge. A window that is no smaller than a
    stage's grid shrinks to the grid and is not shifted there. ``decoder`` is whether the head that predicts pixels is
    there. ``pretrained_windows`` are the windows by which version 2 scales offsets in each stage, 0 for its own.
    ``eps`` is that of the blocks and the final norm, ``outer_eps`` that of the norms of patches and merges.
    """

    image_size: ImageSize = 192
    patch_size: int = 4
    channels: int = 3
    dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    mlp_dim: int = 512
    window: int = 6
    version: Literal[1, 2] = 1
    patch_norm: bool = True
    absolute_positions: bool = False
    decoder: bool = True
    eps: float = 1e-5
    pretrained_windows: tuple[int, ...] = ()
    outer_eps: float = 1e-5

    def __post_init__(self) -> None:
        """Check the values; lists, as JSON has them, become tuples."""
        for name in ("depths", "num_heads", "pretrained_windows"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.depths) != len(self.num_heads) or not self.depths or min(*self.depths, *self.num_heads, 1) < 1:
            raise ValueError(f"depths and num_heads must name each stage, got {self.depths} and {self.num_heads}")
        if len(self.pretrained_windows) not in (0, len(self.depths)):
            raise ValueError(f"pretrained_windows must name each stage, got {self.pretrained_windows}")
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {self.version}")
        if any(side % self.stride for side in height_and_width(self.image_size)):
            raise ValueError(f"the stride of {self.stride} px does not divide an image of {self.image_size} px")
        for dim, heads, grid in zip(self.dims, self.num_heads, self.grids, strict=True):
            check_heads(dim, heads)
            if any(side % min(self.window, *grid) for side in grid):
                raise ValueError(f"a window of {self.window} does not divide a grid of {grid[0]} x {grid[1]}")

    @property
    def stride(self) -> int:
        """Pixels that a token of the last stage spans."""
        return self.patch_size << (len(self.depths) - 1)

    @property
    def dims(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.dim * 2**stage for stage in range(len(self.depths)))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage's token grid."""
        height, width = height_and_width(self.image_size)
        strides = [self.patch_size << stage for stage in range(len(self.depths))]
        return tuple((height // stride, width // stride) for stride in strides)


class SimMIMSwin(StackedModel):
    """SimMIM's Swin encoder. Layer 0 is the input of the first block; depths count the blocks of all stages.

    Between stages, 2 x 2 tokens merge into one; the mask of a depth is that of its own grid. What a merge gives is the
    next stage's input and no depth of its own.

    Source:
        Xie et al., "SimMIM" (CVPR 2022); Liu et al., "Swin Transformer" (ICCV 2021) and "Swin Transformer V2" (CVPR
        2022); microsoft/SimMIM, microsoft/Swin-Transformer.
    """

    stacks: ClassVar[tuple[str, ...]] = ("encoder",)
    encoder_prefix_tokens: int = 0
    stack_prefix_tokens: int = 0

    def __init__(self, config: SwinConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        c = config
        norm = partial(nn.LayerNorm, eps=c.outer_eps)
        self.patch_embed = patch_embedding(
            c.image_size, c.patch_size, c.channels, c.dim, norm=norm if c.patch_norm else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, info.num_patches, c.dim)) if c.absolute_positions else None
        self.stages, self.merges = window_stages(
            c.grids,
            c.dim,
            c.mlp_dim,
            c.depths,
            c.num_heads,
            c.window,
            version=c.version,
            eps=c.eps,
            outer_eps=c.outer_eps,
            pretrained=c.pretrained_windows,
        )
        self.norm = nn.LayerNorm(c.dims[-1], eps=c.eps)
        self.decoder = nn.Conv2d(c.dims[-1], c.stride**2 * c.channels, kernel_size=1) if c.decoder else None

    def _hidden(self, images: Tensor, mask: Tensor | None, stack: str = "encoder") -> Iterator[Tensor]:
        """Patch tokens at every layer depth: ``batch num_patches dim``, of the grid and width of their stage."""
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        return run_blocks(x, self._merging_blocks())

    def _merging_blocks(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for stage, blocks in enumerate(self.stages):
            for number, block in enumerate(blocks):  # type: ignore[arg-type,var-annotated]
                yield partial(_merge_first, self.merges[stage - 1], block) if stage and not number else block

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        return self._hidden(images, None)

    def final_norm(self) -> nn.Module:
        """The encoder's final norm."""
        return self.norm

    def encoder_blocks(self) -> Sequence[nn.Module]:
        """The blocks of all stages."""
        return tuple(block for blocks in self.stages for block in blocks)  # type: ignore[attr-defined]

    def stage_masks(self, mask: Tensor) -> list[Tensor]:
        """The mask on each stage's grid.

        Shapes:
            mask: batch num_patches (of the first stage)
            returns: for each stage batch num_patches (of that stage)
        """
        masks = [mask]
        for grid in self.config.grids[1:]:
            masked = coarser_mask(masks[-1], grid, 2)
            if masked is None:
                raise ValueError(
                    f"mask must not change inside squares of {self.config.stride} px, which a {self.info.family} model "
                    f"merges into one token; choose a mask unit of {self.config.stride} px"
                )
            masks.append(masked)
        return masks

    def stack_blocks(self, stack: str) -> Sequence[nn.Module]:
        """The blocks of all stages."""
        return self.encoder_blocks()

    def _masks(self, mask: Tensor) -> list[Tensor]:
        stages = self.stage_masks(mask)
        return [stages[0]] + [stages[stage] for stage, depth in enumerate(self.config.depths) for _ in range(depth)]

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        if self.decoder is None:
            raise ValueError("the checkpoint has no decoder, so it predicts no pixels")
        x = self.norm(last_depth(self._hidden(images, mask))).mT.reshape(len(images), -1, *self.config.grids[-1])
        return F.pixel_shuffle(self.decoder(x), self.config.stride)


def _merge_first(merge: nn.Module, block: nn.Module, x: Tensor) -> Tensor:
    return block(merge(x))  # type: ignore[no-any-return]
