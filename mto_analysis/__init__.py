"""Measure and optimise masked tokens in masked image models.

After "Emerging Property of Masked Token for Effective Pre-training" (ECCV 2024). Axis names, everywhere:
``batch num_patches num_masked num_visible num_tokens dim depth channels height width``. A mask is a bool tensor
``batch num_patches``, True = masked.

Names are imported when they are first used, so that ``import mto_analysis`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mto_analysis.affinity import affinity_matrix, heterogeneity, row_entropy, split_quadrants
    from mto_analysis.checkpoints import inspect_checkpoint, load_checkpoint, save_checkpoint
    from mto_analysis.data import PictureBatch, open_pictures, picture_batches
    from mto_analysis.errors import CheckpointError, DataError, MTOAnalysisError, NumericalError
    from mto_analysis.masking import (
        MaskRule,
        block_mask,
        blockwise_mask,
        load_masks,
        mask_keys,
        random_mask,
        save_masks,
    )
    from mto_analysis.models import LayerTokens, MaskedImageModel, ModelInfo
    from mto_analysis.probe import ProbeResult
    from mto_analysis.reconstruction import own_loss, reconstruction_loss

__all__ = [
    "CheckpointError",
    "DataError",
    "LayerTokens",
    "MTOAnalysisError",
    "MaskRule",
    "MaskedImageModel",
    "ModelInfo",
    "NumericalError",
    "PictureBatch",
    "ProbeResult",
    "affinity_matrix",
    "block_mask",
    "blockwise_mask",
    "heterogeneity",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_masks",
    "mask_keys",
    "open_pictures",
    "own_loss",
    "picture_batches",
    "random_mask",
    "reconstruction_loss",
    "row_entropy",
    "save_checkpoint",
    "save_masks",
    "split_quadrants",
]

_MODULES = {
    "affinity": ("affinity_matrix", "heterogeneity", "row_entropy", "split_quadrants"),
    "checkpoints": ("inspect_checkpoint", "load_checkpoint", "save_checkpoint"),
    "data": ("PictureBatch", "open_pictures", "picture_batches"),
    "errors": ("CheckpointError", "DataError", "MTOAnalysisError", "NumericalError"),
    "masking": (
        "MaskRule",
        "block_mask",
        "blockwise_mask",
        "load_masks",
        "mask_keys",
        "random_mask",
        "save_masks",
    ),
    "models": ("LayerTokens", "MaskedImageModel", "ModelInfo"),
    "probe": ("ProbeResult",),
    "reconstruction": ("own_loss", "reconstruction_loss"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
