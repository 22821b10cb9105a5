"""Tables of an experiment file: every key taken once and checked, replaced by what ``--set`` says, none left over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mto_analysis.errors import ExperimentError
from mto_analysis.runtime.settings import parse_value, typed_value

__all__ = ["Overrides", "TableReader"]

_REQUIRED: Any = object()


class Overrides:
    """What ``--set`` says, by the path of the key; asked for by the tables, the rest is for the recipes."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.left = dict(texts)

    def take(self, path: str) -> str | None:
        """The text for a key, once."""
        return self.left.pop(path, None)


class TableReader:
    """One table of the file.

    Args:
        source: The file, for messages.
        path: Where the table is in it, as ``evaluation``; empty for the file itself.
        values: What TOML made of it.
        overrides: What ``--set`` says.

    Raises:
        ExperimentError: If it is no table.
    """

    def __init__(self, source: str, path: str, values: Any, overrides: Overrides) -> None:
        self.source, self.path, self.overrides = source, path, overrides
        if not isinstance(values, Mapping):
            raise self.error("", f"must be a table, got {values!r}")
        self._left = dict(values)

    def error(self, key: str, words: str) -> ExperimentError:
        """An error that names file and key."""
        name = self._name(key)
        return ExperimentError(f"{self.source}: {name + ': ' if name else ''}{words}")

    def _name(self, key: str) -> str:
        return ".".join(filter(None, (self.path, key)))

    def __contains__(self, key: str) -> bool:
        """Whether a key is there and was not taken yet."""
        return key in self._left

    def take(self, key: str, declared: Any, default: Any = _REQUIRED) -> Any:
        """A value of a declared type.

        Raises:
            ExperimentError: If it is missing and has no default, or of another type.
        """
        name = self._name(key)
        text = self.overrides.take(name)
        given = self._left.pop(key, None)
        try:
            if text is not None:
                return parse_value(name, declared, text)
            if given is None:
                if default is _REQUIRED:
                    raise self.error(key, "is missing")
                return default
            return typed_value(name, declared, given)
        except ExperimentError:
            raise
        except ValueError as error:
            raise ExperimentError(f"{self.source}: {error}") from error

    def raw(self, key: str, default: Any = None) -> Any:
        """A value to be read by the caller."""
        return self._left.pop(key, default)

    def table(self, key: str) -> TableReader:
        """A table inside this one; empty where it is missing."""
        return TableReader(self.source, self._name(key), self._left.pop(key, {}), self.overrides)

    def tables(self, key: str) -> list[TableReader]:
        """An array of tables; each is called by its ``name`` or ``label``, so that ``--set`` can find it.

        Raises:
            ExperimentError: If it is no array.
        """
        found = self._left.pop(key, [])
        if not isinstance(found, list):
            raise self.error(key, f"must be an array of tables ([[{self._name(key)}]])")
        return [
            TableReader(self.source, f"{self._name(key)}.{_called(each, number)}", each, self.overrides)
            for number, each in enumerate(found, start=1)
        ]

    def end(self, known: str) -> None:
        """No key may be left.

        Raises:
            ExperimentError: If one is; names it and those that are known.
        """
        if self._left:
            raise self.error(next(iter(self._left)), f"no such key; known are {known}")


def _called(values: Any, number: int) -> str:
    name = values.get("name", values.get("label", number)) if isinstance(values, Mapping) else number
    return str(name)
