"""How the images of an optimizer step are shared out: micro-batches, and images in one forward of one process."""

from __future__ import annotations

__all__ = ["accumulation_for", "micro_batch_size"]


def micro_batch_size(batch_size: int, *, processes: int, accumulation: int) -> int:
    """Images in one forward of one process.

    Raises:
        ValueError: If the effective batch cannot be shared out evenly.

    Example:
        >>> micro_batch_size(4096, processes=8, accumulation=4)
        128
    """
    parts = processes * accumulation
    if batch_size % parts:
        raise ValueError(
            f"the effective batch of {batch_size} images cannot be shared by {processes} processes x "
            f"{accumulation} accumulated micro-batches; change batch_size or the accumulation"
        )
    return batch_size // parts


def accumulation_for(batch_size: int, *, processes: int, micro_batch: int | None) -> int:
    """Micro-batches of one optimizer step, by the images in one forward of one process; the reverse of the above.

    Args:
        batch_size: Images of a step, over all processes and micro-batches.
        processes: How many there are.
        micro_batch: By default the whole batch, divided over the processes.

    Raises:
        ValueError: If the effective batch cannot be shared out evenly.

    Example:
        >>> accumulation_for(4096, processes=8, micro_batch=128)
        4
    """
    micro_batch = micro_batch or batch_size // processes
    if micro_batch < 1 or batch_size % (micro_batch * processes):
        raise ValueError(
            f"a batch of {batch_size} is no multiple of {processes} processes times {micro_batch} images; "
            "change --micro-batch or --set batch_size=N"
        )
    return batch_size // (micro_batch * processes)
