"""Converter to :class:`BootMAE`: files of LightDXY/BootMAE."""

from __future__ import annotations

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Given, StateDict, block_numbers
from mto_analysis.checkpoints.metadata import arguments, flag, size, within
from mto_analysis.checkpoints.positions import fit_positions
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import BootMAE, BootMAEConfig, ModelInfo
from mto_analysis.runtime.pixels import HALF, IMAGENET

_PUBLISHED_RATIO = 0.75


def convert_bootmae(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of LightDXY/BootMAE; ``model_ema``, which lies beside the model, never saw a masked token.

    The number of heads is not in the file, but the width of the pixel decoder's attention, ``width // heads * heads``,
    contradicts most wrong ones. Masks of the original are blocks topped up at random to 3/4 of the patches; ours are
    random.

    Source:
        LightDXY/BootMAE, ``models/modeling_pretrain.py``.
    """
    settings = arguments(raw, given)
    state = StateDict(dict(raw.tensors))
    state.rename(
        (r"^decode_blocks\.", "pixel_blocks."),
        (r"^decode_blocks_1\.", "feature_blocks."),
        (r"^decode_norm\.", "pixel_norm."),
        (r"^decode_norm_1\.", "feature_norm."),
        (r"^down\.", "pixel_embed."),
        (r"^down_1\.", "feature_embed."),
        (r"^lm_head\.proj\.", "pixel_pred."),
        (r"^lm_head_1\.", "feature_pred."),
        (r"^mask_token$", "pixel_mask_token"),
        (r"^mask_token_1$", "feature_mask_token"),
        (r"^de_pos_embed$", "pixel_pos_embed"),
    )
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    decoder_dim = state.shape("pixel_mask_token", 3)[2]
    attn_dim = state.shape("pixel_blocks.0.attn.qkv.weight", 2)[0] // 3
    fitting = [each for each in range(1, dim + 1) if dim % each == 0 and decoder_dim // each * each == attn_dim]
    if not fitting:
        raise CheckpointError(f"attention {attn_dim} wide in a pixel decoder of {decoder_dim} fits no number of heads")
    num_heads = given.choose(
        "num_heads", dim, stated=settings.get("num_heads"), published=ENCODER_HEADS, fitting=fitting
    )
    if num_heads not in fitting:
        raise CheckpointError(
            f"num_heads={num_heads} contradicts the file, whose pixel decoder has attention {attn_dim} wide; "
            f"give --num-heads, one of {', '.join(map(str, fitting))}"
        )
    if given.decoder_num_heads not in (None, num_heads):
        raise CheckpointError(f"decoder_num_heads must be num_heads={num_heads}: BootMAE has one number for both")
    state.fuse_qkv("blocks.")
    state.split_qkv("pixel_blocks.", "feature_blocks.")
    tables = ("pos_embed", "pixel_pos_embed")
    grid = fit_positions(state, given, *tables, patch_size=patch_size, stated=size(settings, "input_size"))
    model = BootMAEConfig(
        image_size=grid.image_size,
        patch_size=patch_size,
        channels=channels,
        dim=dim,
        depth=block_numbers(state.tensors, "blocks."),
        num_heads=num_heads,
        mlp_dim=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        decoder_dim=decoder_dim,
        decoder_mlp_dim=state.shape("pixel_blocks.0.mlp.fc1.weight", 2)[0],
        decoder_depth=block_numbers(state.tensors, "pixel_blocks."),
        feature_mlp_dim=state.shape("feature_blocks.0.mlp.fc1.weight", 2)[0],
        feature_depth=block_numbers(state.tensors, "feature_blocks."),
        feature_dim=state.shape("feature_pred.weight", 2)[0],
    )
    mean, std = IMAGENET if flag(settings, "imagenet_default_mean_and_std") else HALF
    masked = within(settings, "mask_num", 0) / grid.num_patches
    stated = 0 < masked < 1
    info = ModelInfo(
        family="bootmae",
        style="decoder",
        image_size=model.image_size,
        patch_size=patch_size,
        mask_rule=MaskRule("random", masked if stated else _PUBLISHED_RATIO, patch_size),
        mean=mean,
        std=std,
        target="normalized_channels",
        criterion="l2",
        mask_rule_source=f"{'file' if stated else 'published BootMAE'}, whose blocks are topped up at random to this",
        assumptions=grid.notes,
    )
    return Conversion(BootMAE, model, info, state)
