"""Who hears what a long piece of work has to say while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Listener", "Progress"]

#: Wraps items that pass by, given their number and a label.
Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]


@dataclass(frozen=True)
class Listener:
    """Takes notes, warnings and progress; by default nobody listens.

    Args:
        note: Takes notes for the user.
        warn: Takes warnings for the user.
        progress: Wraps batches, given their number and a label.
    """

    note: Callable[[str], None] = lambda message: None
    warn: Callable[[str], None] = lambda message: None
    progress: Progress = lambda items, total, label: iter(items)
