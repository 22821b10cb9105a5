"""Converters of families with MAE's decoder and another encoder: HiViT, MCMAE, GreenMIM, I-JEPA."""

from __future__ import annotations

import re
from dataclasses import replace

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Given, StateDict, block_numbers
from mto_analysis.checkpoints.mae import mae_model
from mto_analysis.checkpoints.metadata import arguments
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.checkpoints.windows import OUR_SWIN_NAMES, bias_tables, window_of_table
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import MCMAE, GreenMIM, GreenMIMConfig, HiViT, HiViTConfig, MCMAEConfig

_INNER = 4
_HIVIT_HEADS = {512: 8}
_GIANT_HEADS = {**ENCODER_HEADS, 1408: 16}
_TARGETS = 0.5


def convert_hivit(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of zhangxiaosong18/hivit, whose one list of blocks holds those without attention, merges and the others.

    Source:
        zhangxiaosong18/hivit, ``self_supervised/models/models_hivit_mae.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.rename((r"^absolute_pos_embed$", "pos_embed"))
    merges = sorted(
        int(match[1]) for name in state.tensors if (match := re.fullmatch(r"blocks\.(\d+)\.reduction\.weight", name))
    )
    if len(merges) != 2:
        raise CheckpointError(f"its blocks merge tokens {len(merges)} times, HiViT's 2 times")
    start, total = merges[1] + 1, block_numbers(state.tensors, "blocks.")
    state.rename(
        *((rf"^blocks\.{number}\.", f"stem.{number}.") for number in range(start)),
        *((rf"^blocks\.{number}\.", f"blocks.{number - start}.") for number in range(start, total)),
    )
    dim = state.shape("pos_embed", 3)[2]
    _, channels, inner, _ = state.shape("patch_embed.proj.weight", 4)
    return mae_model(
        state,
        given,
        arguments(raw, given),
        published=_HIVIT_HEADS,
        make=HiViT,
        architecture=HiViTConfig,
        dim=dim,
        channels=channels,
        patch_size=inner * _INNER,
        stem_depths=(merges[0], merges[1] - merges[0] - 1),
        stem_mlp_dim=state.shape("stem.0.mlp.fc1.weight", 2)[0],
        hierarchical=state.shape("decoder_embed.weight", 2)[1] != dim,
    )


def convert_mcmae(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of Alpha-VL/ConvMAE that hold the decoder; the published one does not.

    Source:
        Alpha-VL/ConvMAE, ``models_convmae.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.rename((r"^blocks3\.", "blocks."))
    shapes = [state.shape(f"patch_embed{stage}.proj.weight", 4) for stage in (1, 2, 3)]
    strides = tuple(shape[2] for shape in shapes)
    return mae_model(
        state,
        given,
        arguments(raw, given),
        make=MCMAE,
        architecture=MCMAEConfig,
        dim=shapes[2][0],
        channels=shapes[0][1],
        patch_size=strides[0] * strides[1] * strides[2],
        stem_dims=(shapes[0][0], shapes[1][0]),
        stem_depths=tuple(block_numbers(state.tensors, f"blocks{stage}.") for stage in (1, 2)),
        stem_mlp_dims=tuple(state.shape(f"blocks{stage}.0.mlp.fc1.weight", 4)[0] for stage in (1, 2)),
        strides=strides,
    )


def convert_greenmim(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of LayneH/GreenMIM with a Swin encoder.

    Source:
        LayneH/GreenMIM, ``modeling/green_swin_models.py``, ``modeling/base_green_model.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.drop(r".*\.relative_position_index")
    state.rename((r"^encoder\.", ""), *OUR_SWIN_NAMES)
    dim, channels, patch_size, _ = state.shape("patch_embed.proj.weight", 4)
    tables = bias_tables(state)
    depths = tuple(block_numbers(state.tensors, f"stages.{stage}.") for stage in range(len(tables)))
    unit = patch_size << (len(depths) - 1)
    conversion = mae_model(
        state,
        given,
        arguments(raw, given),
        make=GreenMIM,
        architecture=GreenMIMConfig,
        unit=unit,
        dim=dim,
        channels=channels,
        patch_size=patch_size,
        depth=sum(depths),
        depths=depths,
        num_heads=tables[0][1],
        stage_heads=tuple(heads for _, heads in tables),
        mlp_dim=state.shape("stages.0.0.block.mlp.fc1.weight", 2)[0],
        window=window_of_table(tables[0][0]),
    )
    return replace(
        conversion, info=replace(conversion.info, mask_rule=MaskRule("random", conversion.info.mask_ratio, unit))
    )


def convert_ijepa(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of facebookresearch/ijepa: the context encoder and the predictor, which has as many heads.

    Source:
        facebookresearch/ijepa, ``src/models/vision_transformer.py``, ``src/train.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.rename(
        (r"^encoder\.", ""),
        (r"^predictor\.predictor_proj\.", "decoder_pred."),
        (r"^predictor\.predictor_", "decoder_"),
        (r"^predictor\.", ""),
    )
    dim = state.shape("patch_embed.proj.weight", 4)[0]
    settings = arguments(raw, given)
    num_heads = given.choose("num_heads", dim, stated=settings.get("num_heads"), published=_GIANT_HEADS)
    conversion = mae_model(
        state,
        replace(given, decoder_num_heads=given.decoder_num_heads or num_heads),
        settings,
        published=_GIANT_HEADS,
        feature_dim=dim,
    )
    info = replace(
        conversion.info,
        family="ijepa",
        mask_rule=MaskRule("blockwise", _TARGETS, conversion.info.patch_size),
        mask_rule_source="rule: I-JEPA's targets, four blocks of 15 to 20 %, cover about half of an image",
        caveat="in training, patches that are neither context nor target were absent; here each is one or the other",
    )
    return replace(conversion, info=info)
