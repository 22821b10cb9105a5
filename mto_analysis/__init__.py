"""Measure and optimize masked tokens in masked image models.

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
    from mto_analysis.errors import CheckpointError, DataError, MTOAnalysisError, NumericalError
    from mto_analysis.images import ImageBatch, image_batches, open_images
    from mto_analysis.masks import MaskRule, block_mask, blockwise_mask, load_masks, mask_keys, random_mask, save_masks
    from mto_analysis.models import LayerTokens, MaskedImageModel, ModelInfo
    from mto_analysis.models.targets import reconstruction_loss
    from mto_analysis.probe import ProbeResult
    from mto_analysis.probe.measuring import measure
    from mto_analysis.probe.own_loss import own_loss

__all__ = [
    "CheckpointError",
    "DataError",
    "ImageBatch",
    "LayerTokens",
    "MTOAnalysisError",
    "MaskRule",
    "MaskedImageModel",
    "ModelInfo",
    "NumericalError",
    "ProbeResult",
    "affinity_matrix",
    "block_mask",
    "blockwise_mask",
    "heterogeneity",
    "image_batches",
    "inspect_checkpoint",
    "load_checkpoint",
    "load_masks",
    "mask_keys",
    "measure",
    "open_images",
    "own_loss",
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
    "images": ("ImageBatch", "open_images", "image_batches"),
    "errors": ("CheckpointError", "DataError", "MTOAnalysisError", "NumericalError"),
    "masks": (
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
    "models.targets": ("reconstruction_loss",),
    "probe.measuring": ("measure",),
    "probe.own_loss": ("own_loss",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # of the installed distribution, so that it is stated once, in pyproject.toml
        from importlib.metadata import version  # 12 ms, which most commands need not spend

        return version("mto-analysis")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
