"""How images are shared out: steps of an epoch, and images in one forward of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mto_analysis.errors import DataError

if TYPE_CHECKING:
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


def steps_in_epoch(count: int, batch_size: int, kind: str = "images") -> int:
    """Optimizer steps of an epoch; images that do not fill a last batch are left out of it.

    Args:
        count: Training images.
        batch_size: Images of a step, over all processes and micro-batches.
        kind: What the message calls them.

    Raises:
        DataError: If they do not fill one.

    Example:
        >>> steps_in_epoch(50_000, 4096)
        12
    """
    if count < batch_size:
        raise DataError(
            f"{count} {kind} do not fill one batch of {batch_size}; choose a smaller one with --set batch_size=N"
        )
    return count // batch_size
