"""Who hears what a long piece of work has to say while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

#: Wraps items that pass by, given their number and a label.
Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]


@dataclass(frozen=True)
class Listener:
    """Takes notes, warnings and progress; by default nobody listens."""

    note: Callable[[str], None] = lambda message: None
    warn: Callable[[str], None] = lambda message: None
    progress: Progress = lambda items, total, label: iter(items)


def duration(seconds: float) -> str:
    """A time in the unit that a person would use.

    Example:
        >>> [duration(each) for each in (0.2, 45, 400, 9000, 469200)]
        ['1 s', '45 s', '7 min', '2.5 h', '130 h (5.4 days)']
    """
    hours = seconds / 3600
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if hours < 1.5:
        return f"{round(seconds / 60)} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours:.0f} h ({hours / 24:.1f} days)"
