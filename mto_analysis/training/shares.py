"""How images are shared out: steps of an epoch, and images in one forward of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mto_analysis.errors import DataError

if TYPE_CHECKING:
    from mto_analysis.images import Images
    from mto_analysis.training.recipes import Recipe

__all__ = ["micro_batch_size", "steps_in_epoch"]


def micro_batch_size(recipe: Recipe, *, processes: int, accumulation: int) -> int:
    """Images in one forward of one process.

    Raises:
        ValueError: If the effective batch cannot be shared out evenly.

    Example:
        >>> from mto_analysis.training import load_recipe
        >>> micro_batch_size(load_recipe("mae_vit_base"), processes=8, accumulation=4)  # of 4096
        128
    """
    parts = processes * accumulation
    if recipe.batch_size % parts:
        raise ValueError(
            f"the effective batch of {recipe.batch_size} images cannot be shared by {processes} processes x "
            f"{accumulation} accumulated micro-batches; change batch_size or the accumulation"
        )
    return recipe.batch_size // parts


def steps_in_epoch(recipe: Recipe, images: Images) -> int:
    """Optimizer steps of an epoch; images that do not fill a last batch are left out of it.

    Raises:
        DataError: If they do not fill one.
    """
    steps = len(images.names) // recipe.batch_size
    if not steps:
        raise DataError(
            f"{len(images.names)} images do not fill one batch of {recipe.batch_size}; use a smaller batch_size"
        )
    return steps
