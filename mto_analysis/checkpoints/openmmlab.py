"""Converters of OpenMMLab files (mmpretrain, mmselfsup) and of OpenMixup, whose names they share."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from mto_analysis.checkpoints.conversion import Conversion, Given, StateDict
from mto_analysis.checkpoints.inpainting import blockwise_rule, read_encoder, rename_beit
from mto_analysis.checkpoints.mae import mae_model
from mto_analysis.checkpoints.metadata import (
    criterion,
    numbers,
    openmmlab_config,
    ratio,
    refuse_other,
    section,
    size,
    slowfast_config,
)
from mto_analysis.checkpoints.positions import ADVICE
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.checkpoints.simmim import simmim_vit
from mto_analysis.checkpoints.windows import OUR_SWIN_NAMES, bias_tables, convert_windows, window_of_table
from mto_analysis.errors import CheckpointError
from mto_analysis.masks import MaskRule
from mto_analysis.models import MFF, MFFConfig
from mto_analysis.models.interface import ImageSize, height_and_width

#: Of MAE's decoder, after :func:`openmmlab_state`.
MM_MAE_NAMES = (
    (r"^neck\.decoder_blocks\.(\d+)\.ln([12])\.", r"decoder_blocks.\1.norm\2."),
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^neck\.", ""),
)

_BEIT_MASKED = 75
_MASKFEAT_MASKED, _MASKFEAT_LEAST = 78, 15
_SWIN_IMAGE = 192
_OPENMIXUP = ("the mask token replaces masked patches before the first block, OpenMixup's default",)
_MFF_BLOCKS = (0, 2, 4, 6, 8, 11)


def openmmlab_state(raw: RawCheckpoint) -> StateDict:
    """Tensors under the names of the original code bases, without the networks that make targets."""
    state = StateDict(dict(raw.tensors))
    state.drop(r"target_generator\..*", r"data_preprocessor\..*")
    state.rename(
        (r"\.layers\.(\d+)\.ln([12])\.", r".layers.\1.norm\2."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        (r"^backbone\.patch_embed\.projection\.", "patch_embed.proj."),
        (r"^backbone\.layers\.", "blocks."),
        (r"^backbone\.ln1\.", "norm."),
        (r"^backbone\.", ""),
    )
    return state


def mm_mae_settings(raw: RawCheckpoint) -> dict[str, Any]:
    """What the file's config states, under the names of :func:`mae_model`."""
    config = openmmlab_config(raw)
    head = section(config, "head")
    return {
        "num_heads": mm_heads(raw),
        "decoder_num_heads": section(config, "neck").get("decoder_num_heads"),
        "image_size": section(config, "backbone").get("img_size"),
        "mask_ratio": section(config, "backbone").get("mask_ratio"),
        # The published models have it, and the head's own default is not to.
        "norm_pix_loss": head.get("norm_pix", head.get("norm_pix_loss", False)) if head else True,
        "criterion": criterion(section(head, "loss")),
    }


def mm_heads(raw: RawCheckpoint) -> object:
    """Heads of the encoder, where the config names them; a name such as ``base`` stands for the published ones."""
    return section(openmmlab_config(raw), "backbone", "arch").get("num_heads")


def mm_image_size(raw: RawCheckpoint) -> ImageSize | None:
    """Image size, where the config names it."""
    return size(section(openmmlab_config(raw), "backbone"), "img_size")


def convert_mm_mae(raw: RawCheckpoint, given: Given) -> Conversion:
    """MAE of mmpretrain, and EVA's MAE-style model, which predicts features.

    The stored position tables hold the row first, the original's the column; a table is just used as it is. Published
    models were trained on normalized patches.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/mae.py``, ``models/necks/mae_neck.py``.
    """
    state = openmmlab_state(raw)
    state.rename(*MM_MAE_NAMES)
    conversion = mae_model(state, given, mm_mae_settings(raw))
    if section(openmmlab_config(raw), "head") or conversion.info.target == "features":
        return conversion
    notes = (*conversion.info.assumptions, "the target is normalized patches, as published: the file does not say")
    return replace(conversion, info=replace(conversion.info, assumptions=notes))


def convert_mm_mff(raw: RawCheckpoint, given: Given) -> Conversion:
    """MFF of mmpretrain: MAE with a weighted sum of encoder layers.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/mff.py``.
    """
    conversion = convert_mm_mae(raw, given)
    depth, fused = conversion.config.depth, conversion.state.shape("proj_weights", 4)[0]
    stated = numbers(section(openmmlab_config(raw), "backbone").get("out_indices"))
    assumptions = conversion.info.assumptions
    if stated is not None:
        indices = tuple(int(each) for each in stated)
    elif fused == depth:
        indices = tuple(range(depth))
    elif (depth, fused) == (12, len(_MFF_BLOCKS)):
        indices = _MFF_BLOCKS
        assumptions += (f"fused blocks are {_MFF_BLOCKS}, as in both published configs: the file does not say",)
    else:
        raise CheckpointError(
            f"the file does not say which {fused} of {depth} blocks are fused (out_indices of a config)"
        )
    config = MFFConfig(**asdict(conversion.config), out_indices=indices)
    return replace(
        conversion, make=MFF, config=config, info=replace(conversion.info, family="mff", assumptions=assumptions)
    )


def convert_mm_swin(raw: RawCheckpoint, given: Given) -> Conversion:
    """SimMIM Swin of mmpretrain, whose merges run over channels first and then over the four tokens.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/simmim.py``, ``models/utils/embed.py`` (``PatchMerging``).
    """
    state = openmmlab_state(raw)
    state.rename(
        (r"^stages\.", "layers."),
        (r"\.attn\.w_msa\.", ".attn."),
        (r"^norm3\.", "norm."),
        (r"^neck\.decoder\.0\.", "decoder."),
        *OUR_SWIN_NAMES,
    )
    for name in [name for name in state.tensors if name.startswith("merges.")]:
        tensor = state.tensors[name]
        if tensor.ndim == 0 or tensor.shape[-1] % 4:
            raise CheckpointError(f"{state.origin[name]} must join 4 tokens, got {list(tensor.shape)}")
        # From (channel, row, column) to the original's (column, row, channel).
        state.tensors[name] = tensor.reshape(*tensor.shape[:-1], -1, 2, 2).transpose(-1, -3).flatten(-3)
    stated, note = mm_image_size(raw), ""
    if (image_size := stated or given.image_size) is None:
        image_size = _SWIN_IMAGE
        note = f"the image size is {_SWIN_IMAGE} px, as of the published models: the file does not say; {ADVICE}"
    tables = bias_tables(state)
    stride = state.shape("patch_embed.proj.weight", 4)[2] << (len(tables) - 1)
    rows, columns = (side // stride for side in height_and_width(image_size))
    if (window := window_of_table(tables[-1][0])) > min(rows, columns):
        raise CheckpointError(
            f"the last stage has a window of {window} tokens on a map of {rows} x {columns} "
            f"({'assumed: ' if note else ''}{image_size} px), which mmpretrain pads (pad_small_map); padded maps are "
            f"not read{f': for another size, {ADVICE}' if note else ''}"
        )
    loss = criterion(section(openmmlab_config(raw), "head", "loss"))
    conversion = convert_windows(state, given, image_size=image_size, criterion=loss or "l1")
    notes = conversion.info.assumptions + ((note,) if note else ())
    return replace(conversion, info=replace(conversion.info, assumptions=notes))


def convert_mm_beit(raw: RawCheckpoint, given: Given) -> Conversion:
    """BEiT of mmpretrain.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/beit.py``.
    """
    return _beit(raw, given, "beit", "mmpretrain BEiT")


def convert_mm_beit_v2(raw: RawCheckpoint, given: Given) -> Conversion:
    """BEiT v2 of mmpretrain; its neck aggregates patches and branches off after everything that is measured.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/beit.py``, ``models/necks/beitv2_neck.py``.
    """
    return _beit(raw, given, "beit_v2", "mmpretrain BEiT v2")


def _beit(raw: RawCheckpoint, given: Given, family: str, published: str) -> Conversion:
    state = openmmlab_state(raw)
    state.drop(r"neck\..*", r"head\..*")
    rename_beit(state)
    encoder = read_encoder(state, given, stated=mm_heads(raw), image_size=mm_image_size(raw))
    return encoder.published(blockwise_rule(_BEIT_MASKED, published, encoder.model)).conversion(family)


def convert_mm_maskfeat(raw: RawCheckpoint, given: Given) -> Conversion:
    """MaskFeat of mmpretrain: absolute positions, so masked tokens differ at layer 0; predicts HOG features.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/maskfeat.py``.
    """
    state = openmmlab_state(raw)
    state.drop(r"neck\.fc\..*")
    encoder = read_encoder(state, given, stated=mm_heads(raw), image_size=mm_image_size(raw))
    rule = blockwise_rule(_MASKFEAT_MASKED, "mmpretrain MaskFeat", encoder.model, min_block=_MASKFEAT_LEAST)
    return encoder.published(rule).conversion("maskfeat")


def convert_slowfast_maskfeat(raw: RawCheckpoint, given: Given) -> Conversion:
    """MaskFeat of PySlowFast on images: an MViT without pooling, which is a ViT; predicts HOG features.

    Source:
        facebookresearch/SlowFast, ``slowfast/models/masked.py``, ``slowfast/models/video_model_builder.py``.
    """
    config = slowfast_config(raw)
    state = StateDict(dict(raw.tensors))
    state.drop(r"hogs\..*", r"pred_head\..*")
    encoder = read_encoder(
        state,
        given,
        stated=section(config, "MVIT").get("NUM_HEADS"),
        image_size=size(section(config, "DATA"), "TRAIN_CROP_SIZE"),
    )
    rule, source = blockwise_rule(_MASKFEAT_MASKED, "MaskFeat", encoder.model, min_block=_MASKFEAT_LEAST)
    if (stated := ratio(section(config, "AUG"), given, "MASK_RATIO")) is not None:
        rule, source = MaskRule(rule.kind, stated, rule.unit, rule.min_block), f"ratio: file; blocks: {source}"
    return encoder.published((rule, source)).conversion("maskfeat")


def convert_openmixup_simmim(raw: RawCheckpoint, given: Given) -> Conversion:
    """SimMIM ViT of Westlake-AI/openmixup: absolute positions, and a bias table in every block.

    Source:
        Westlake-AI/openmixup, ``openmixup/models/backbones/mim_vit.py``, ``models/heads/mim_head.py``.
    """
    state = openmmlab_state(raw)
    state.rename((r"^neck\.decoder\.0\.", "decoder."))
    rename_beit(state)
    backbone = section(openmmlab_config(raw), "backbone")
    refuse_other(backbone, "the file's config", replace=True, mask_layer=0)
    refuse_other(section(openmmlab_config(raw), "head", "loss"), "the file's config (loss)", mode="l1_loss")
    encoder = read_encoder(state, given, image_size=size(backbone, "img_size"))
    return simmim_vit(replace(encoder, notes=(*encoder.notes, *(() if backbone else _OPENMIXUP))), {}, given)
