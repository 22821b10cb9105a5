"""One file per architecture, on timm's blocks, all behind :class:`MaskedImageModel`."""

from mto_analysis.models.interface import LayerTokens, MaskedImageModel, ModelInfo
from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.simmim import SimMIM, SimMIMConfig

__all__ = ["MAE", "LayerTokens", "MAEConfig", "MaskedImageModel", "ModelInfo", "SimMIM", "SimMIMConfig"]
