"""Converter to :class:`CAE`: files of Atten4Vis/CAE and mmpretrain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Given, StateDict, block_numbers
from mto_analysis.checkpoints.metadata import arguments, flag, openmmlab_config, section, size, whole
from mto_analysis.checkpoints.openmmlab import mm_heads, openmmlab_state
from mto_analysis.checkpoints.positions import fit_positions
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.masks import MaskRule
from mto_analysis.models import CAE, CAEConfig, ModelInfo
from mto_analysis.runtime.pixels import HALF, IMAGENET

# Of 14 x 14 patches.
_PUBLISHED_PATCHES = 196
_MASKED, _MM_MASKED = 98, 75


def convert_cae(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of Atten4Vis/CAE; the copy of the encoder that makes targets, and the decoder, are left out.

    The code of 2022 calls the regressor ``pretext_neck`` and gives it the encoder's positions.

    Source:
        Atten4Vis/CAE, ``models/modeling_cae.py``, ``models/modeling_cae_helper.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.drop(r"(alignment_encoder|teacher|decoder)\..*", r"encoder\.lm_head\..*", r"regresser\.norm\..*")
    state.drop(r"pretext_neck\.(decoder_blocks|norm|norm2|head)\..*")
    state.rename(
        (r"^encoder\.", ""),
        (r"^rd_pos_embed$", "decoder_pos_embed"),
        (r"^(regresser|pretext_neck)\.regressor_blocks\.", "decoder_blocks."),
        (r"^encoder_to_regresser\.", "decoder_embed.0."),
        (r"^encoder_to_regresser_norm\.", "decoder_embed.1."),
    )
    return _cae(state, given, arguments(raw, given), _MASKED, "published CAE")


def convert_mm_cae(raw: RawCheckpoint, given: Given) -> Conversion:
    """CAE of mmpretrain, whose regressor takes the encoder's positions.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/cae.py``, ``models/necks/cae_neck.py``.
    """
    state = openmmlab_state(raw)
    state.drop(r"teacher\..*", r"neck\.(decoders|norm_regressor|norm_decoder|head)\b.*", r"head\..*")
    state.rename(
        (r"^neck\.regressors\.", "decoder_blocks."),
        (r"^neck\.", ""),
        (r"\.norm1_([qkv])_cross\.", r".norm1_\1."),
        (r"^(decoder_blocks\.\d+)\.mlp\.", r"\1.mlp_cross."),
    )
    settings = {
        "num_heads": mm_heads(raw),
        "img_size": section(openmmlab_config(raw), "backbone").get("img_size"),
        "decoder_num_heads": section(openmmlab_config(raw), "neck").get("num_heads"),
        "num_mask_patches": section(openmmlab_config(raw), "neck").get("mask_tokens_num"),
    }
    return _cae(state, given, settings, _MM_MASKED, "published mmpretrain CAE")


def _cae(state: StateDict, given: Given, settings: Mapping[str, Any], masked: int, source: str) -> Conversion:
    if "pos_embed" in state.tensors and "decoder_pos_embed" not in state.tensors:
        state.put({"decoder_pos_embed": state.tensors["pos_embed"].clone()}, state.origin["pos_embed"])
    state.rename((r"\.gamma_([12])$", r".ls\1.gamma"))
    state.fuse_qkv("blocks.")
    state.split_qkv("decoder_blocks.")
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    decoder_dim = state.shape("mask_token", 3)[2]
    stated_size = size(settings, "input_size", "img_size")
    grid = fit_positions(state, given, "pos_embed", "decoder_pos_embed", patch_size=patch_size, stated=stated_size)
    model = CAEConfig(
        image_size=grid.image_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=given.choose("num_heads", dim, stated=settings.get("num_heads"), published=ENCODER_HEADS),
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state.tensors else None,
        decoder_depth=block_numbers(state.tensors, "decoder_blocks."),
        decoder_dim=decoder_dim,
        decoder_num_heads=given.choose(
            "decoder_num_heads", decoder_dim, stated=settings.get("decoder_num_heads"), published=ENCODER_HEADS
        ),
        decoder_mlp_dim=state.shape("decoder_blocks.0.mlp_cross.fc1.weight", 2)[0],
    )
    num_masked = whole(settings, "num_mask_patches")
    stated = num_masked is not None and num_masked < grid.num_patches
    fraction = (num_masked or 0) / grid.num_patches if stated else masked / _PUBLISHED_PATCHES
    if not stated and grid.num_patches != _PUBLISHED_PATCHES:
        source = f"rule: the fraction of the {source}"
    statistics = HALF if flag(settings, "imagenet_default_mean_and_std") is False else IMAGENET
    info = ModelInfo(
        family="cae",
        style="decoder",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=MaskRule("blockwise", fraction, patch_size),
        mean=statistics[0],
        std=statistics[1],
        target="features",
        caveat="visible tokens are the same at every layer depth, so a curve shows the masked tokens alone",
        mask_rule_source="file" if stated else source,
        assumptions=grid.notes,
    )
    return Conversion(CAE, model, info, state)
