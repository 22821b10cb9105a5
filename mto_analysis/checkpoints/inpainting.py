"""What the converters to :class:`InpaintingViT` share: names of the BEiT code base, the architecture, mask rules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Heads, StateDict, block_numbers, square_side
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import InpaintingConfig

__all__ = ["block_rule", "blockwise_rule", "inpainting_config", "rename_beit"]

_TABLE = "relative_position_bias_table"
# The published ViT-B masks 2 x 2 patches at once (32 px of 16 px patches); files of other sizes that do not say follow.
_UNIT_IN_PATCHES = 2
# Its indices grow with the fourth power of the side: a damaged file must not fill the memory.
_MOST_PATCHES = 40
# Published for 14 x 14 patches.
_PUBLISHED_PATCHES = 196


def rename_beit(state: StateDict) -> None:
    """From names of the BEiT code base (after its prefix is gone) to ours; indices are dropped, to be recomputed."""
    state.drop(r"(.*\.)?relative_position_index")
    state.rename(
        (rf"^rel_pos_bias\.{_TABLE}$", f"position_biases.0.{_TABLE}"),
        (rf"^blocks\.(\d+)\.attn\.{_TABLE}$", rf"position_biases.\1.{_TABLE}"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
    )
    state.fuse_qkv()


def inpainting_config(
    state: StateDict,
    heads: Heads,
    *,
    stated: int | None = None,
    image_size: int | None = None,
    published: Mapping[int, int] = ENCODER_HEADS,
    eps: float = 1e-6,
) -> InpaintingConfig:
    """The architecture, from shapes under our names.

    Args:
        state: Tensors under the model's names.
        heads: Given by the user.
        stated: Number of heads that a config states, where no table does.
        image_size: That a config states, where no positions do.
        published: Heads by width.
        eps: Of the layer norms.

    Raises:
        CheckpointError: If shapes fit no model, or nothing tells the image size.
    """
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    table = f"position_biases.0.{_TABLE}"
    bias: Literal["shared", "per_block"] | None = None
    if table in state.tensors:
        rows, stated = state.shape(table, 2)
        grid = _grid_of_table(rows)
        # The table of one block has that block's number in its name, a shared one has none.
        bias = "per_block" if re.search(r"\.\d+\.", state.origin[table]) else "shared"
    elif "pos_embed" in state.tensors:
        grid = square_side(state.shape("pos_embed", 3)[1] - 1, "pos_embed")
    elif image_size is not None:
        grid = image_size // patch_size
    else:
        raise CheckpointError("the file has no positions and no config, so its image size is unknown")
    return InpaintingConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=heads.choose("num_heads", dim, stated=stated, published=published),
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state.tensors else None,
        position_bias=bias,
        absolute_positions="pos_embed" in state.tensors,
        final_norm="norm.weight" in state.tensors,
        eps=eps,
    )


def block_rule(ratio: float, published: str, model: InpaintingConfig) -> tuple[MaskRule, str]:
    """Square units of 32 px, and where that comes from; for other sizes than the published one 2 x 2 patches."""
    rule = MaskRule("block", ratio, _UNIT_IN_PATCHES * model.patch_size)
    if (model.image_size, model.patch_size) == (224, 16):
        return rule, f"published {published}"
    return rule, f"rule: units of 2 x 2 patches, as in the published {published}"


def blockwise_rule(
    num_masked: int, published: str, model: InpaintingConfig, *, of: int = _PUBLISHED_PATCHES, min_block: int = 16
) -> tuple[MaskRule, str]:
    """BEiT's blockwise mask of ``num_masked`` of ``of`` patches, and where that comes from; in proportion elsewhere."""
    rule = MaskRule("blockwise", num_masked / of, model.patch_size, min_block)
    if (model.image_size // model.patch_size) ** 2 == of:
        return rule, f"published {published}"
    return rule, f"rule: the fraction of patches of the published {published}"


def _grid_of_table(rows: int) -> int:
    """Side of the grid from the rows of a bias table with class-token entries: ``(2 side - 1)^2 + 3``."""
    width = math.isqrt(max(rows - 3, 0))
    if width * width != rows - 3 or width % 2 == 0:
        raise CheckpointError(f"a relative position table of {rows} rows fits no square grid")
    if (side := (width + 1) // 2) > _MOST_PATCHES:
        raise CheckpointError(f"a relative position table for {side} x {side} patches is not of a published kind")
    return side
