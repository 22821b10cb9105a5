"""Converter to :class:`MILAN`: files of zejiangh/MILAN and mmpretrain."""

from __future__ import annotations

from dataclasses import replace

from mto_analysis.checkpoints.conversion import Conversion, Heads, StateDict
from mto_analysis.checkpoints.mae import mae_model
from mto_analysis.checkpoints.openmmlab import MM_MAE_NAMES, openmmlab_state
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.models import MILAN

__all__ = ["convert_milan", "convert_mm_milan"]


def convert_milan(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """Files of zejiangh/MILAN. Training chose visible patches by CLIP's attention; our masks are random.

    Source:
        zejiangh/MILAN, ``models_milan.py``.
    """
    return _milan(StateDict(dict(raw.tensors)), heads)


def convert_mm_milan(raw: RawCheckpoint, heads: Heads) -> Conversion:
    """MILAN of mmpretrain, the same under other names.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/milan.py``, ``models/necks/milan_neck.py``.
    """
    state = openmmlab_state(raw)
    state.rename(*MM_MAE_NAMES)
    return _milan(state, heads)


def _milan(state: StateDict, heads: Heads) -> Conversion:
    predicted = state.shape("decoder_pred.weight", 2)[0]
    conversion = mae_model(state, heads, {})
    state.split_qkv("decoder_blocks.")
    info = replace(
        conversion.info,
        family="milan",
        target="features",
        criterion=None,
        caveat="visible tokens are the same at every layer depth, so a curve shows the masked tokens alone",
        mask_rule_source="published ratio; MILAN chose visible patches by CLIP's attention, not at random",
    )
    config = replace(conversion.config, feature_dim=predicted)
    return replace(conversion, make=MILAN, config=config, info=info)
