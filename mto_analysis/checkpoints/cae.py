"""Converter to :class:`CAE`: files of Atten4Vis/CAE and mmpretrain."""

from __future__ import annotations

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Heads, StateDict, block_numbers, square_side
from mto_analysis.checkpoints.openmmlab import openmmlab_state
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import CAE, CAEConfig, ModelInfo

__all__ = ["convert_cae", "convert_mm_cae"]

# Of 14 x 14 patches.
_PUBLISHED_PATCHES = 196
_MASKED, _MM_MASKED = 98, 75


def convert_cae(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Files of Atten4Vis/CAE; the copy of the encoder that makes targets, and the decoder, are left out.

    Source:
        Atten4Vis/CAE, ``models/modeling_cae.py``, ``models/modeling_cae_helper.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.drop(r"(alignment_encoder|teacher|decoder)\..*", r"encoder\.lm_head\..*", r"regresser\.norm\..*")
    state.rename(
        (r"^encoder\.", ""),
        (r"^rd_pos_embed$", "decoder_pos_embed"),
        (r"^regresser\.regressor_blocks\.", "decoder_blocks."),
    )
    return _cae(state, heads, MaskRule("blockwise", _MASKED / _PUBLISHED_PATCHES, 1), "published CAE")


def convert_mm_cae(raw: RawCheckpoint, heads: Heads) -> Conversion:
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
    if "pos_embed" in state.tensors:
        state.put({"decoder_pos_embed": state.tensors["pos_embed"].clone()}, state.origin["pos_embed"])
    return _cae(state, heads, MaskRule("blockwise", _MM_MASKED / _PUBLISHED_PATCHES, 1), "published mmpretrain CAE")


def _cae(state: StateDict, heads: Heads, rule: MaskRule, source: str) -> Conversion:
    state.rename((r"\.gamma_([12])$", r".ls\1.gamma"))
    state.fuse_qkv("blocks.")
    state.split_qkv("decoder_blocks.")
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    if (width := state.shape("mask_token", 3)[2]) != dim:
        raise CheckpointError(f"mask_token is {width} wide, the encoder {dim}: only equal widths were published")
    grid = square_side(state.shape("pos_embed", 3)[1] - 1, "pos_embed")
    model = CAEConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=heads.choose("num_heads", dim, published=ENCODER_HEADS),
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        layer_scale=0.1 if "blocks.0.ls1.gamma" in state.tensors else None,
        decoder_depth=block_numbers(state.tensors, "decoder_blocks."),
        decoder_num_heads=heads.choose("decoder_num_heads", dim, published=ENCODER_HEADS),
        decoder_mlp_dim=state.shape("decoder_blocks.0.mlp_cross.fc1.weight", 2)[0],
    )
    info = ModelInfo(
        family="cae",
        style="decoder",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=MaskRule("blockwise", rule.ratio, patch_size),
        target="features",
        caveat="visible tokens are the same at every layer depth, so a curve shows the masked tokens alone",
        mask_rule_source=source if grid * grid == _PUBLISHED_PATCHES else f"rule: the fraction of the {source}",
    )
    return Conversion(CAE, model, info, state)
