"""What other installed distributions add, by entry points; a broken one is a warning, never a failed command."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

_Result = TypeVar("_Result")


class Plugin(NamedTuple):
    """An entry point that was loaded, and the distribution that it is of."""

    name: str
    distribution: str
    value: Any

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result | None:
        """What a function of the plugin gives; ``None``, with a warning, if it fails."""
        try:
            return function(*arguments)
        except Exception as error:  # a plugin may fail in any way
            _warn(self.name, self.distribution, error)
            return None


@cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """The plugins of a group (``families``, ``layouts``, ``measures``, ``log_formats``) of all distributions.

    Example:
        >>> plugins("nothing_at_all")
        ()
    """
    found = []
    for entry in entry_points(group=f"mto_analysis.{group}"):
        distribution = entry.dist.name if entry.dist is not None else "an unknown distribution"
        try:
            found.append(Plugin(entry.name, distribution, entry.load()))
        except Exception as error:
            _warn(entry.name, distribution, error)
    return tuple(found)


def _warn(name: str, distribution: str, error: Exception) -> None:
    warnings.warn(f"plugin {name} of {distribution} is left out ({type(error).__name__}: {error})", stacklevel=3)
