"""From a checkpoint as published to a model: safe reading, recognizing the layout, one converter per origin.

The names are imported when they are first used: the registry needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mto_analysis.checkpoints.fetching import resolve
    from mto_analysis.checkpoints.loading import (
        CheckpointReport,
        checkpoint_info,
        inspect_checkpoint,
        load_checkpoint,
        open_checkpoint,
    )
    from mto_analysis.checkpoints.native import save_checkpoint
    from mto_analysis.checkpoints.options import LoadOptions
    from mto_analysis.checkpoints.reading import RawCheckpoint, checkpoint_sha256

__all__ = [
    "CheckpointReport",
    "LoadOptions",
    "RawCheckpoint",
    "checkpoint_info",
    "checkpoint_sha256",
    "inspect_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "resolve",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mto_analysis.checkpoints import fetching, loading, native, options, reading

    return next(vars(module)[name] for module in (loading, fetching, native, options, reading) if name in vars(module))
