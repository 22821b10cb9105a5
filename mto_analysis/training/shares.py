"""How the images of an optimizer step are shared out: micro-batches, and images in one forward of one process."""

from __future__ import annotations


def micro_batch_size(batch_size: int, *, processes: int, accumulation: int) -> int:
    """Images in one forward of one process.

    Example:
        >>> micro_batch_size(4096, processes=8, accumulation=4)
        128
    """
    parts = processes * accumulation
    if batch_size % parts:
        raise ValueError(
            f"the effective batch of {batch_size} images cannot be shared by {processes} processes x "
            f"{accumulation} accumulated micro-batches; change --set batch_size=N or --accumulation"
        )
    return batch_size // parts
