"""Converter to :class:`SimMIM`: ViT files of microsoft/SimMIM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Heads, StateDict, block_numbers, square_side
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masking import MaskRule
from mto_analysis.models import ModelInfo, SimMIM, SimMIMConfig

__all__ = ["convert_simmim"]

_PUBLISHED_RATIO = 0.6
_PUBLISHED_UNIT = 32
# The published ViT-B masks 2 x 2 patches at once (32 px of 16 px patches); files of other sizes that do not say follow.
_UNIT_IN_PATCHES = 2

_TABLE = "relative_position_bias_table"


def convert_simmim(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """ViT files of microsoft/SimMIM: shared or per-block relative position bias, or absolute positions.

    Mask unit and ratio come from the pickled config where the file has one.

    Source:
        microsoft/SimMIM, ``models/vision_transformer.py``, ``models/simmim.py``.
    """
    config = raw.extras.get("config")
    data = _section(config, "DATA")
    vit = _section(config, "MODEL", "VIT")

    state = StateDict(dict(raw.tensors))
    # Indices are recomputed; fc_norm belongs to classification and is not used in pre-training.
    state.drop(r"encoder\.(.*\.)?relative_position_index", r"encoder\.fc_norm\..*", r"encoder\.head\..*")
    state.rename(
        (r"^encoder\.", ""),
        (rf"^rel_pos_bias\.{_TABLE}$", f"position_biases.0.{_TABLE}"),
        (rf"^blocks\.(\d+)\.attn\.{_TABLE}$", rf"position_biases.\1.{_TABLE}"),
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"^decoder\.0\.", "decoder."),
    )
    shared = any(name == f"encoder.rel_pos_bias.{_TABLE}" for name in raw.tensors)
    state.fuse_qkv()

    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    table = f"position_biases.0.{_TABLE}"
    if table in state.tensors:
        rows, columns = state.shape(table, 2)
        grid = _grid_of_table(rows)
        stated: int | None = columns
    else:
        stated = _whole(vit, "NUM_HEADS")
        if "pos_embed" in state.tensors:
            grid = square_side(state.shape("pos_embed", 3)[1] - 1, "pos_embed")
        elif (side := _whole(data, "IMG_SIZE")) is not None:
            grid = side // patch_size
        else:
            raise CheckpointError("the file has no positions and no config, so its image size is unknown")
    bias: Literal["shared", "per_block"] | None = None
    if table in state.tensors:
        bias = "shared" if shared else "per_block"
    model = SimMIMConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=heads.choose("num_heads", dim, stated=stated, published=ENCODER_HEADS),
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state.tensors else None,
        position_bias=bias,
        absolute_positions="pos_embed" in state.tensors,
        final_norm="norm.weight" in state.tensors,
    )
    rule, source = _mask_rule(data, model.image_size, patch_size)
    info = ModelInfo(
        family="simmim_vit",
        style="inpainting",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=rule,
        target="pixels",
        criterion="l1",
        mask_rule_source=source,
    )
    return Conversion(SimMIM, model, info, state)


def _mask_rule(data: Mapping[str, Any], image_size: int, patch_size: int) -> tuple[MaskRule, str]:
    ratio, unit = data.get("MASK_RATIO"), _whole(data, "MASK_PATCH_SIZE")
    if isinstance(ratio, float) and 0 < ratio < 1 and unit:
        return MaskRule("block", ratio, unit), "file"
    if (image_size, patch_size) == (224, 16):
        return MaskRule("block", _PUBLISHED_RATIO, _PUBLISHED_UNIT), "published SimMIM ViT-B"
    unit = _UNIT_IN_PATCHES * patch_size
    return MaskRule("block", _PUBLISHED_RATIO, unit), "rule: units of 2 x 2 patches, as in the published SimMIM ViT-B"


def _grid_of_table(rows: int) -> int:
    """Side of the grid from the rows of a bias table with class-token entries: ``(2 side - 1)^2 + 3``."""
    width = math.isqrt(max(rows - 3, 0))
    if width * width != rows - 3 or width % 2 == 0:
        raise CheckpointError(f"a relative position table of {rows} rows fits no square grid")
    return (width + 1) // 2


def _section(config: Any, *path: str) -> Mapping[str, Any]:
    for name in path:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def _whole(facts: Mapping[str, Any], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
