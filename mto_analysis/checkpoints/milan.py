"""Converter to :class:`MILAN`: files of zejiangh/MILAN and mmpretrain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mto_analysis.checkpoints.conversion import Conversion, Given, StateDict
from mto_analysis.checkpoints.mae import mae_model
from mto_analysis.checkpoints.metadata import arguments, flag
from mto_analysis.checkpoints.openmmlab import MM_MAE_NAMES, mm_mae_settings, openmmlab_state
from mto_analysis.checkpoints.reading import RawCheckpoint
from mto_analysis.models import MILAN


def convert_milan(raw: RawCheckpoint, given: Given) -> Conversion:
    """Files of zejiangh/MILAN. Training chose visible patches by CLIP's attention; our masks are random.

    Source:
        zejiangh/MILAN, ``models_milan.py``.
    """
    settings = arguments(raw, given)
    return _milan(StateDict(dict(raw.tensors)), given, settings)


def convert_mm_milan(raw: RawCheckpoint, given: Given) -> Conversion:
    """MILAN of mmpretrain, the same under other names.

    Source:
        open-mmlab/mmpretrain, ``mmpretrain/models/selfsup/milan.py``, ``models/necks/milan_neck.py``.
    """
    state = openmmlab_state(raw)
    state.rename(*MM_MAE_NAMES)
    return _milan(state, given, mm_mae_settings(raw))


def _milan(state: StateDict, given: Given, settings: Mapping[str, Any]) -> Conversion:
    predicted = state.shape("decoder_pred.weight", 2)[0]
    conversion = mae_model(state, given, settings)
    state.split_qkv("decoder_blocks.")
    # Trained on pixels, for comparison, where the file says so; a width alone does not tell.
    ratio_from = "ratio: file" if conversion.info.mask_rule_source == "file" else "published ratio"
    pixels = flag(settings, "use_clip") is False and conversion.config.feature_dim is None
    info = replace(
        conversion.info,
        family="milan",
        target=conversion.info.target if pixels else "features",
        criterion="l2" if pixels else None,
        caveat="visible tokens are the same at every layer depth, so a curve shows the masked tokens alone",
        mask_rule_source=f"{ratio_from}; MILAN chose visible patches by CLIP's attention, not at random",
    )
    config = replace(conversion.config, feature_dim=None if pixels else predicted)
    return replace(conversion, make=MILAN, config=config, info=info)
