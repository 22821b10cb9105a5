"""GreenMIM: MAE's decoder behind a Swin encoder of visible tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mto_analysis.models.interface import height_and_width
from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.vit import VisiblePatches, finer_mask, patch_embedding
from mto_analysis.models.windows import window_stages


@dataclass(frozen=True)
class GreenMIMConfig(MAEConfig):
    """Architecture of a :class:`GreenMIM`; the published Swin-B by default.

    ``dim``, ``mlp_dim`` and ``stage_heads[0]`` are those of the encoder's first stage; widths double with each stage.
    ``patch_size`` is the side of the encoder's first tokens; a token of the decoder spans one of the last stage.
    """

    patch_size: int = 4
    dim: int = 128
    depth: int = 24
    num_heads: int = 4
    mlp_dim: int = 512
    decoder_depth: int = 1
    class_token: bool = False
    depths: tuple[int, ...] = (2, 2, 18, 2)
    stage_heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 7


class GreenMIM(MAE):
    """GreenMIM: a Swin encoder of visible tokens. Layer 0 is the decoder's input after its position embedding.

    The original groups visible tokens of several windows to save time; here windows are whole, and nothing attends to
    their masked tokens, which gives the same numbers.

    Source:
        Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling" (NeurIPS 2022);
        LayneH/GreenMIM, ``modeling/``.
    """

    def _build_encoder(self) -> int:
        c = self.config
        height, width = height_and_width(c.image_size)
        norm = partial(nn.LayerNorm, eps=c.eps)
        self.patch_embed = patch_embedding(c.image_size, c.patch_size, c.channels, c.dim, norm=norm)
        self.cls_token = None
        strides = [c.patch_size << stage for stage in range(len(c.depths))]
        grids = [(height // stride, width // stride) for stride in strides]
        self.stages, self.merges = window_stages(
            grids, c.dim, c.mlp_dim, c.depths, c.stage_heads, c.window, version=1, eps=c.eps, outer_eps=c.eps
        )
        encoded_dim = int(c.dim) << (len(c.depths) - 1)
        self.norm = nn.LayerNorm(encoded_dim, eps=c.eps)
        return encoded_dim

    def encoder_blocks(self) -> Sequence[nn.Module]:
        """The blocks of all stages."""
        return tuple(block for blocks in self.stages for block in blocks)  # type: ignore[attr-defined]

    def _encoded(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        *_, x = self._run_encoder(images, visible.mask)
        return visible.take(self.norm(x))

    def _whole(self, images: Tensor) -> Iterator[Tensor]:
        return self._run_encoder(images, None)

    def _run_encoder(self, images: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        last = len(self.stages) - 1
        x = self.patch_embed(images)
        yield x
        for stage, blocks in enumerate(self.stages):
            hidden = None
            if mask is not None:
                hidden = finer_mask(mask.reshape(-1, 1, *self.info.grid), 1 << (last - stage)).flatten(1)
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, hidden)
                yield x
            if stage < last:
                x = self.merges[stage](x)
