"""Converters of iBOT's files, to :class:`InpaintingViT` and :class:`SimMIMSwin`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mto_analysis.checkpoints.conversion import ENCODER_HEADS, Conversion, Given, StateDict
from mto_analysis.checkpoints.inpainting import read_encoder
from mto_analysis.checkpoints.metadata import arguments, numbers
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.checkpoints.windows import OUR_SWIN_NAMES, convert_windows
from mto_analysis.masks import MaskRule

_HEADS = {384: 6, **ENCODER_HEADS}
_RATIO = 0.3
_OVERSHOOT = 0.1
_EPS = 1e-6


def convert_ibot(raw: RawCheckpoint, given: Given) -> Conversion:
    """The student of bytedance/ibot: absolute positions, so masked tokens differ at layer 0. The teacher sees no mask.

    Each image of a batch was masked at a ratio chosen among several, plus or minus a deviation, or not at all.

    Source:
        bytedance/ibot, ``models/vision_transformer.py``, ``loader.py``.
    """
    state = _student(raw)
    heads = arguments(raw, given).get("num_heads")
    encoder = read_encoder(state, given, stated=heads, published=_HEADS, overshoot=_OVERSHOOT)
    return replace(encoder, rule=_rule(raw, given, encoder.model.patch_size)).conversion("ibot")


def convert_ibot_swin(raw: RawCheckpoint, given: Given) -> Conversion:
    """The same with a Swin encoder, whose norms all have an epsilon of 1e-6; masked in units of its last stage.

    Source:
        bytedance/ibot, ``models/swin_transformer.py``.
    """
    state = _student(raw)
    state.rename(*OUR_SWIN_NAMES)
    conversion = convert_windows(state, given, eps=_EPS, outer_eps=_EPS)
    rule, source = _rule(raw, given, conversion.config.stride)
    rule = replace(rule, kind="block")
    info = replace(conversion.info, family="ibot_swin", target="features", mask_rule=rule)
    return replace(conversion, info=replace(info, mask_rule_source=f"{source}; single units instead of blocks of them"))


def _student(raw: RawCheckpoint) -> StateDict:
    state = StateDict(dict(raw.tensors))
    state.drop(r"(backbone\.)?head\..*")
    state.rename((r"^backbone\.", ""), (r"^masked_embed$", "mask_token"))
    state.shape("mask_token", 2)  # refuses another one
    state.tensors["mask_token"] = state.tensors["mask_token"].unsqueeze(0)
    return state


def _rule(raw: RawCheckpoint, given: Given, unit: int) -> tuple[MaskRule, str]:
    settings = arguments(raw, given)
    ratios = numbers(settings.get("pred_ratio")) or numbers([settings.get("pred_ratio")]) or ()
    stated = max((each for each in ratios if 0 < each < 1), default=None)
    kind: Literal["random", "blockwise"] = "random" if settings.get("pred_shape") == "rand" else "blockwise"
    source = "file: this fraction, varied" if stated else "published iBOT: this fraction +- 0.2, or none"
    return MaskRule(kind, stated or _RATIO, unit), source
