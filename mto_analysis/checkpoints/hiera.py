"""Converters to :class:`Hiera`: files of facebookresearch/hiera and Hugging Face folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mto_analysis.checkpoints.conversion import Conversion, Given, StateDict, block_numbers, one_count
from mto_analysis.checkpoints.metadata import (
    count,
    flag,
    hf_config,
    numbers,
    ratio,
    refuse_other,
    section,
    size,
    whole,
    within,
)
from mto_analysis.checkpoints.positions import fit_positions
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import Hiera, HieraConfig, ModelInfo

# Of the first stage, by its width: tiny, small and base; base_plus; large; huge.
_HEADS = {96: 1, 112: 2, 144: 2, 256: 4}
_DECODER_HEADS = {512: 16}
_STRIDE = 4
_UNIT = 8  # tokens of the first stage
_LOCAL = (True, True, False, False)
_RATIO = 0.6
_PUBLISHED = "units of 8 x 8 tokens, attention inside them in stages 1 and 2, and normalized patches as the target"


def convert_hiera(raw: RawCheckpoint, given: Given) -> Conversion:
    """Pre-training files of facebookresearch/hiera; head counts are not in the file.

    Source:
        facebookresearch/hiera, ``hiera/hiera_mae.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.rename((r"^patch_embed\.proj\.", "patch_embed."), (r"^multi_scale_fusion_heads\.", "fusion."))
    settings = raw.config or section(raw.extras, "config")
    names = {
        "mask_unit_size": "masked_unit_size",
        "mask_unit_attn": "masked_unit_attention",
        "q_stride": "query_stride",
    }
    config = {names.get(name, name): value for name, value in settings.items()}
    refuse_other(config, "its config", head_mul=2.0, dim_mul=2.0, sep_pos_embed=False, no_head_dim_scale=False)
    if (first := whole(config, "num_heads")) is not None:
        config["num_heads"] = [first << stage for stage in range(len(config.get("stages") or _LOCAL))]
    return _hiera(state, given, config)


def convert_hf_hiera(raw: RawCheckpoint, given: Given) -> Conversion:
    """Hugging Face ``HieraForPreTraining``; settings in ``config.json``.

    Source:
        huggingface/transformers, ``models/hiera``.
    """
    config = hf_config(raw)
    depths = config.get("depths")
    if not isinstance(depths, list) or not all(isinstance(depth, int) and 0 < depth < 100 for depth in depths):
        raise CheckpointError(f"config.json: depths must be a list of whole numbers, got {depths!r}")
    state = StateDict(dict(raw.tensors))
    state.rename(
        *(
            (rf"^hiera\.encoder\.stages\.{stage}\.layers\.{layer}\.", f"blocks.{sum(depths[:stage]) + layer}.")
            for stage, depth in enumerate(depths)
            for layer in range(depth)
        ),
        (r"^hiera\.embeddings\.patch_embeddings\.projection\.", "patch_embed."),
        (r"^hiera\.embeddings\.position_embeddings$", "pos_embed"),
        (r"^multiscale_fusion\.multi_scale_fusion_heads\.", "fusion."),
        (r"^decoder\.decoder_block\.layers\.", "decoder_blocks."),
        (r"^decoder\.decoder_embeddings\.", "decoder_embed."),
        (r"^decoder\.decoder_position_embeddings$", "decoder_pos_embed"),
        (r"^decoder\.", ""),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
    )
    return _hiera(state, given, config)


def _hiera(state: StateDict, given: Given, config: Mapping[str, Any]) -> Conversion:
    state.rename((r"^(blocks\.\d+)\.attn\.qkv\.", r"\1.qkv."), (r"^(blocks\.\d+)\.attn\.proj\.", r"\1.attn_proj."))
    dim, channels, kernel, _ = state.shape("patch_embed.weight", 4)
    decoder_dim = state.shape("mask_token", 3)[2]
    blocks = block_numbers(state.tensors, "blocks.")
    # A block that changes the width starts a stage.
    starts = sorted(
        int(match[1]) for name in state.tensors if (match := re.fullmatch(r"blocks\.(\d+)\.proj\.weight", name))
    )
    pools = block_numbers(state.tensors, "fusion.")
    grid = fit_positions(
        state, given, "pos_embed", patch_size=_STRIDE, prefix_tokens=0, stated=size(config, "image_size", "input_size")
    )
    patch_size, placed = _STRIDE << min(pools, 4), replace(given, image_size=grid.image_size)
    stated = None if given.image_size else grid.image_size
    fit_positions(state, placed, "decoder_pos_embed", patch_size=patch_size, prefix_tokens=0, stated=stated)
    stage_heads = config.get("num_heads")
    if stage_heads is not None and not (isinstance(stage_heads, (list, tuple)) and all(map(one_count, stage_heads))):
        raise CheckpointError(f"its config has num_heads={stage_heads!r}, not a whole number for each stage")
    local = _LOCAL if config.get("masked_unit_attention") is None else config["masked_unit_attention"]
    if not isinstance(local, (list, tuple)) or not all(isinstance(each, bool) for each in local):
        raise CheckpointError(f"config.json: masked_unit_attention must be a list of true and false, got {local!r}")
    geometry = {"patch_stride": [_STRIDE] * 2, "patch_padding": [kernel // 2] * 2, "query_stride": [2, 2]}
    refuse_other(config, "config.json", **geometry, embed_dim_multiplier=2.0)
    unit = _square(config, "masked_unit_size", _UNIT)
    try:
        model = HieraConfig(
            image_size=grid.image_size,
            patch_size=patch_size,
            channels=channels,
            kernel=kernel,
            dim=dim,
            depths=tuple(end - start for start, end in zip([0, *starts], [*starts, blocks], strict=True)),
            num_heads=tuple(stage_heads)
            if stage_heads and given.choose("num_heads", dim, stated=stage_heads[0])
            else given.choose("num_heads", dim, published=_HEADS),
            unit=unit,
            local=tuple(local),
            mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
            pools=pools,
            decoder_dim=decoder_dim,
            decoder_depth=block_numbers(state.tensors, "decoder_blocks."),
            decoder_num_heads=given.choose(
                "decoder_num_heads", decoder_dim, stated=count(config, "decoder_num_heads"), published=_DECODER_HEADS
            ),
            decoder_mlp_dim=state.shape("decoder_blocks.0.mlp.fc1.weight", 2)[0],
            eps=within(config, "layer_norm_eps", 1e-6),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the file describes no working Hiera model: {error}") from error
    notes = grid.notes
    if stage_heads is None:
        notes += ("attention heads double with each stage, as in the published models: the file does not say",)
    if not config:
        notes += (f"{_PUBLISHED}, as in the published models: the file does not say",)
    stated_ratio = ratio(config, given)
    info = ModelInfo(
        family="hiera",
        style="decoder",
        image_size=model.image_size,
        patch_size=model.patch_size,
        mask_rule=MaskRule("block", stated_ratio or _RATIO, model.unit_px),
        target="pixels" if flag(config, "normalize_pixel_loss") is False else "normalized_pixels",
        criterion="l2",
        mask_rule_source="file" if stated_ratio else "published Hiera",
        assumptions=notes,
    )
    return Conversion(Hiera, model, info, state)


def _square(config: Mapping[str, Any], name: str, default: int) -> int:
    """The side that a config states for rows and columns alike."""
    sides = numbers(config.get(name))
    if sides is None:
        return default
    if len(set(sides)) > 1 or not sides[0].is_integer() or sides[0] < 1:
        raise CheckpointError(f"config.json: {name} must be square, got {config[name]}")
    return int(sides[0])
