"""Converters to :class:`MAE`: files of facebookresearch/mae (published, trainer's) and Hugging Face ViTMAE folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mto_analysis.checkpoints.conversion import (
    ENCODER_HEADS,
    MAE_DECODER_HEADS,
    Conversion,
    Heads,
    StateDict,
    block_numbers,
    square_side,
)
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masking import MaskRule
from mto_analysis.models import MAE, MAEConfig, ModelInfo

__all__ = ["convert_hf_vitmae", "convert_mae"]

_PUBLISHED_RATIO = 0.75


def convert_mae(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Files of facebookresearch/mae: names are ours up to the original's; head counts are not in the file.

    Source:
        facebookresearch/mae, ``models_mae.py``.
    """
    arguments = raw.extras.get("args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    return _convert(StateDict(dict(raw.tensors)), heads, arguments)


def convert_hf_vitmae(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Hugging Face ``ViTMAEForPreTraining``: public names and those of transformers 5; facts in ``config.json``.

    Layer norms use the config's epsilon (1e-12), so numbers are those of Hugging Face; the original has 1e-6.

    Source:
        huggingface/transformers, ``models/vit_mae``.
    """
    if raw.config is None:
        raise CheckpointError("needs its config.json beside it; give the whole folder")
    state = StateDict(dict(raw.tensors))
    state.rename(
        (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
        (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^vit\.embeddings\.", ""),
        (r"^vit\.layernorm\.", "norm."),
        (r"^vit\.(encoder\.layer|layers)\.", "blocks."),
        (r"^decoder\.(decoder_layers|decoder_encoder\.layer|decoder_encoder\.layers|layers)\.", "decoder_blocks."),
        (r"^decoder\.", ""),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
        (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
        (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
    state.fuse_qkv()
    return _convert(state, heads, raw.config, config=raw.config)


def _convert(
    state: StateDict,
    heads: Heads,
    facts: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
) -> Conversion:
    """The architecture from shapes; ``facts`` may hold ``mask_ratio`` and ``norm_pix_loss``."""
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    decoder_dim = state.shape("mask_token", 3)[2]
    grid = square_side(state.shape("pos_embed", 3)[1] - 1, "pos_embed")
    stated = config or {}
    model = MAEConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=heads.choose("num_heads", dim, stated=_count(stated, "num_attention_heads"), published=ENCODER_HEADS),
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        decoder_dim=decoder_dim,
        decoder_depth=block_numbers(state.tensors, "decoder_blocks."),
        decoder_num_heads=heads.choose(
            "decoder_num_heads",
            decoder_dim,
            stated=_count(stated, "decoder_num_attention_heads"),
            published=MAE_DECODER_HEADS,
        ),
        decoder_mlp_dim=state.shape("decoder_blocks.0.mlp.fc1.weight", 2)[0],
        eps=_number(stated, "layer_norm_eps", 1e-6),
    )
    ratio = _number(facts, "mask_ratio", _PUBLISHED_RATIO)
    if not 0 < ratio < 1:
        raise CheckpointError(f"the file states a mask_ratio of {ratio}, which must lie between 0 and 1")
    target: Literal["pixels", "normalized_pixels"] | None = None
    if isinstance(facts.get("norm_pix_loss"), bool):
        target = "normalized_pixels" if facts["norm_pix_loss"] else "pixels"
    info = ModelInfo(
        family="mae",
        style="decoder",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=MaskRule("random", ratio, patch_size),
        target=target,
        criterion="l2",
        mask_rule_source="file" if "mask_ratio" in facts else "published MAE",
    )
    return Conversion(MAE, model, info, state)


def _count(facts: Mapping[str, Any], name: str) -> int | None:
    value = facts.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive whole number, got {value!r}")
    return value


def _number(facts: Mapping[str, Any], name: str, default: float) -> float:
    value = facts.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"the file's {name} must be a number, got {value!r}")
    return float(value)
