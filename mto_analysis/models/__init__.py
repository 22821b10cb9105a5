"""One file per architecture, on timm's blocks, all behind :class:`MaskedImageModel`."""

from mto_analysis.models.bootmae import BootMAE, BootMAEConfig
from mto_analysis.models.cae import CAE, CAEConfig
from mto_analysis.models.conmim import ConMIM, ConMIMConfig
from mto_analysis.models.eva02 import EVA02, EVA02Config
from mto_analysis.models.greenmim import GreenMIM, GreenMIMConfig
from mto_analysis.models.hiera import Hiera, HieraConfig
from mto_analysis.models.hivit import HiViT, HiViTConfig
from mto_analysis.models.inpainting import InpaintingConfig, InpaintingViT
from mto_analysis.models.interface import MaskedImageModel, ModelInfo
from mto_analysis.models.mae import MAE, MAEConfig
from mto_analysis.models.mcmae import MCMAE, MCMAEConfig
from mto_analysis.models.mff import MFF, MFFConfig
from mto_analysis.models.milan import MILAN
from mto_analysis.models.simmim import SimMIM, SimMIMConfig
from mto_analysis.models.swin import SimMIMSwin, SwinConfig
from mto_analysis.taps.tokens import LayerTokens

__all__ = [
    "CAE",
    "EVA02",
    "MAE",
    "MCMAE",
    "MFF",
    "MILAN",
    "BootMAE",
    "BootMAEConfig",
    "CAEConfig",
    "ConMIM",
    "ConMIMConfig",
    "EVA02Config",
    "GreenMIM",
    "GreenMIMConfig",
    "HiViT",
    "HiViTConfig",
    "Hiera",
    "HieraConfig",
    "InpaintingConfig",
    "InpaintingViT",
    "LayerTokens",
    "MAEConfig",
    "MCMAEConfig",
    "MFFConfig",
    "MaskedImageModel",
    "ModelInfo",
    "SimMIM",
    "SimMIMConfig",
    "SimMIMSwin",
    "SwinConfig",
]
