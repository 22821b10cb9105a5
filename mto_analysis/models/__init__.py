"""One file per architecture, on timm's blocks, all behind :class:`MaskedImageModel`."""

from mto_analysis.models.bootmae import BootMAE, BootMAEConfig
from mto_analysis.models.cae import CAE, CAEConfig
from mto_analysis.models.conmim import ConMIM, ConMIMConfig
from mto_analysis.models.hiera import Hiera, HieraConfig
from mto_analysis.models.inpainting import InpaintingConfig, InpaintingViT
from mto_analysis.models.interface import MaskedImageModel, ModelInfo
from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.mff import MFF, MFFConfig
from mto_analysis.models.milan import MILAN
from mto_analysis.models.simmim import SimMIM, SimMIMConfig
from mto_analysis.models.swin import SimMIMSwin, SwinConfig
from mto_analysis.taps.tokens import LayerTokens

__all__ = [
    "CAE",
    "MAE",
    "MFF",
    "MILAN",
    "BootMAE",
    "BootMAEConfig",
    "CAEConfig",
    "ConMIM",
    "ConMIMConfig",
    "Hiera",
    "HieraConfig",
    "InpaintingConfig",
    "InpaintingViT",
    "LayerTokens",
    "MAEConfig",
    "MFFConfig",
    "MaskedImageModel",
    "ModelInfo",
    "SimMIM",
    "SimMIMConfig",
    "SimMIMSwin",
    "SwinConfig",
]
