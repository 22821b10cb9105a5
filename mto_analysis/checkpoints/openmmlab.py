"""Converters of OpenMMLab files (mmpretrain, mmselfsup) and of OpenMixup, whose names they share."""

from __future__ import annotations

from dataclasses import asdict, replace

from mto_analysis.checkpoints.beit import inpainting_model
from mto_analysis.checkpoints.conversion import Conversion, Heads, StateDict
from mto_analysis.checkpoints.inpainting import blockwise_rule, inpainting_config, rename_beit
from mto_analysis.checkpoints.mae import mae_model
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.checkpoints.simmim import simmim_vit
from mto_analysis.checkpoints.windows import OUR_SWIN_NAMES, convert_windows
from mto_analysis.errors import CheckpointError
from mto_analysis.models import MFF, MFFConfig
from mto_analysis.models.interface import IMAGENET_MEAN, IMAGENET_STD

__all__ = [
    "MM_MAE_NAMES",
    "convert_mm_beit",
    "convert_mm_beit_v2",
    "convert_mm_mae",
    "convert_mm_maskfeat",
    "convert_mm_mff",
    "convert_mm_swin",
    "convert_openmixup_simmim",
    "openmmlab_state",
]

#: Of MAE's decoder, after :func:`openmmlab_state`.
MM_MAE_NAMES = (
    (r"^neck\.decoder_blocks\.(\d+)\.ln([12])\.", r"decoder_blocks.\1.norm\2."),
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^neck\.", ""),
)

_BEIT_MASKED = 75
_MASKFEAT_MASKED, _MASKFEAT_LEAST = 78, 15
_SWIN_IMAGE = 192


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


def convert_mm_mae(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """MAE of mmpretrain, and EVA's MAE-style model, which predicts features.

    The stored position tables hold the row first, the original's the column; a table is just used as it is. Training
    normalised each patch.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/mae.py``, ``models/necks/mae_neck.py``.
    """
    state = openmmlab_state(raw)
    state.rename(*MM_MAE_NAMES)
    return mae_model(state, heads, {"norm_pix_loss": True})


def convert_mm_mff(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """MFF of mmpretrain: MAE with a weighted sum of encoder layers.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/mff.py``.
    """
    conversion = convert_mm_mae(raw, heads)
    fused = conversion.state.shape("proj_weights", 4)[0]
    config = MFFConfig(**asdict(conversion.config), fused=fused)
    return replace(conversion, make=MFF, config=config, info=replace(conversion.info, family="mff"))


def convert_mm_swin(raw: RawCheckpoint, heads: Heads) -> Conversion:
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
    conversion = convert_windows(state, heads)
    if conversion.info.image_size != _SWIN_IMAGE:
        raise CheckpointError(
            f"the last stage has a window as large as the first, so its map of {_SWIN_IMAGE} px is padded "
            "(pad_small_map), which this version does not read; get the same model from microsoft/SimMIM "
            "(simmim_pretrain__swin_large__img192_window12__800ep.pth, linked in its README)"
        )
    return conversion


def convert_mm_beit(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """BEiT of mmpretrain.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/beit.py``.
    """
    return _beit(raw, heads, "beit", "mmpretrain BEiT")


def convert_mm_beit_v2(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """BEiT v2 of mmpretrain; its neck aggregates patches and branches off after everything that is measured.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/beit.py``, ``models/necks/beitv2_neck.py``.
    """
    return _beit(raw, heads, "beit_v2", "mmpretrain BEiT v2")


def _beit(raw: RawCheckpoint, heads: Heads, family: str, published: str) -> Conversion:
    state = openmmlab_state(raw)
    state.drop(r"neck\..*", r"head\..*")
    rename_beit(state)
    model = inpainting_config(state, heads)
    rule = blockwise_rule(_BEIT_MASKED, published, model)
    return inpainting_model(family, state, model, rule, (IMAGENET_MEAN, IMAGENET_STD))


def convert_mm_maskfeat(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """MaskFeat of mmpretrain: absolute positions, so masked tokens differ at layer 0; predicts HOG features.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/maskfeat.py``.
    """
    state = openmmlab_state(raw)
    state.drop(r"neck\.fc\..*")
    model = inpainting_config(state, heads)
    rule = blockwise_rule(_MASKFEAT_MASKED, "mmpretrain MaskFeat", model, min_block=_MASKFEAT_LEAST)
    return inpainting_model("maskfeat", state, model, rule, (IMAGENET_MEAN, IMAGENET_STD))


def convert_openmixup_simmim(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """SimMIM ViT of Westlake-AI/openmixup: absolute positions, and a bias table in every block.

    Source:
        Westlake-AI/openmixup, ``openmixup/models/backbones/mim_vit.py``, ``models/heads/mim_head.py``.
    """
    state = openmmlab_state(raw)
    state.rename((r"^neck\.decoder\.0\.", "decoder."))
    rename_beit(state)
    return simmim_vit(state, inpainting_config(state, heads), {})
