"""Converter to :class:`InpaintingViT`: ViT files of bytedance/ibot."""

from __future__ import annotations

from mto_analysis.checkpoints.beit import inpainting_model
from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Heads, StateDict
from mto_analysis.checkpoints.inpainting import inpainting_config
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.masks import MaskRule
from mto_analysis.models.interface import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["convert_ibot"]

_HEADS = {384: 6, **ENCODER_HEADS}
_RATIO = 0.3


def convert_ibot(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """The student of bytedance/ibot: absolute positions, so masked tokens differ at layer 0. The teacher sees no mask.

    Source:
        bytedance/ibot, ``models/vision_transformer.py``.
    """
    state = StateDict(dict(raw.tensors))
    state.drop(r"(backbone\.)?head\..*")
    state.rename((r"^backbone\.", ""), (r"^masked_embed$", "mask_token"))
    if state.shape("mask_token", 2):
        state.tensors["mask_token"] = state.tensors["mask_token"].unsqueeze(0)
    model = inpainting_config(state, heads, published=_HEADS)
    rule = MaskRule("blockwise", _RATIO, model.patch_size)
    return inpainting_model(
        "ibot", state, model, (rule, "published iBOT: this fraction +- 0.2, or none"), (IMAGENET_MEAN, IMAGENET_STD)
    )
