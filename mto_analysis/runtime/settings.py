"""Settings: declared once, as typed fields of a frozen dataclass with their ranges; read from TOML and ``--set``.

:class:`Settings` checks choices and ranges whenever one is made, and :class:`Reader` makes them from a file whose
values ``--set`` replaces: defaults, then the file, then ``--set``. Every message says where the value is.
"""

from __future__ import annotations

import json
import math
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_TRUE = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Within:
    """Numbers that a setting may have, as an interval in the notation of mathematics.

    Example:
        >>> 0.0 in Within("[0, 1)"), 1.0 in Within("[0, 1)"), str(Within("(0, inf)"))
        (True, False, 'must be above 0')
    """

    interval: str

    def __contains__(self, value: float) -> bool:
        """Whether a number lies in the interval."""
        low, high = map(float, self.interval[1:-1].split(","))
        above = low <= value if self.interval[0] == "[" else low < value
        return above and (value <= high if self.interval[-1] == "]" else value < high)

    def __str__(self) -> str:
        """The rule in words."""
        low, high = self.interval[1:-1].split(", ")
        if high != "inf":
            return f"must lie in {self.interval}"
        return f"must be {'at least' if self.interval[0] == '[' else 'above'} {low}"


@dataclass(frozen=True)
class Rising:
    """Values of a sequence, each of which must be above the one before, or if not ``strict`` at least not below it."""

    strict: bool = True

    def __contains__(self, values: Collection[Any]) -> bool:
        """Whether a sequence rises."""
        return list(values) == sorted(set(values) if self.strict else values)

    def __str__(self) -> str:
        """The rule in words."""
        return "must rise" if self.strict else "must not fall"


Count = Annotated[int, Within("[1, inf)")]
Natural = Annotated[int, Within("[0, inf)")]
Positive = Annotated[float, Within("(0, inf)")]
NonNegative = Annotated[float, Within("[0, inf)")]
Fraction = Annotated[float, Within("[0, 1]")]
Below1 = Annotated[float, Within("[0, 1)")]
Share = Annotated[float, Within("(0, 1]")]


def field_types(settings: type) -> Mapping[str, Any]:
    """Names and declared types of a dataclass's fields, in order, with their ranges."""
    types_of = typing.get_type_hints(settings, include_extras=True)
    return {each.name: types_of[each.name] for each in fields(settings)}


class Settings:
    """Base of frozen dataclasses whose fields are settings: their choices and ranges are checked when one is made."""

    def __post_init__(self) -> None:
        """Check each value by itself."""
        for name, declared in field_types(type(self)).items():
            _check(name, declared, getattr(self, name))

    def _refuse(self, *rules: tuple[str, bool]) -> None:
        """Check what belongs together: each rule in words, and whether it is broken."""
        for rule, broken in rules:
            if broken:
                raise ValueError(rule)


class Options:
    """What ``--set`` gives, by the full name of the setting: text, or values of their type.

    Args:
        values: By name.
        where: What messages call their origin.
        shared: Whether what the file's own settings leave over is for others.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "--set", *, shared: bool = False) -> None:
        self.left, self.where, self.shared = dict(values), where, shared


class Reader:
    """One table of a settings file; every value is taken once, and none may be left over.

    Args:
        where: The file, for messages.
        values: What TOML or JSON made of the table.
        options: What replaces its values.
        path: Where the table is in the file, as ``evaluation``; empty for the file itself.
        whole: Whether this is all that is read, so that it must take all that ``options`` give.
        error: Class of the errors.

    Attributes:
        sources: Where each value that was taken comes from, by name; those at their default are not in it.
    """

    def __init__(
        self,
        where: str,
        values: Any = None,
        options: Options | None = None,
        *,
        path: str = "",
        whole: bool = True,
        error: type[ValueError] = ValueError,
    ) -> None:
        self.where, self.path, self.options, self._error = where, path, options or Options({}), error
        self._whole = whole
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise self.error(f"must be a table, got {values!r}")
        self._left = dict(values)
        self._known: list[str] = []
        self._tables: list[Reader] = []
        self.sources: dict[str, str] = {}

    def error(self, words: str) -> ValueError:
        """An error that names file and table."""
        return self._error(": ".join(filter(None, (self.where, self.path, words))))

    def _name(self, key: str) -> str:
        return ".".join(filter(None, (self.path, key)))

    def __contains__(self, key: str) -> bool:
        """Whether the file has a key that was not taken yet."""
        return key in self._left

    def take(self, key: str, declared: Any, default: Any = MISSING) -> Any:
        """A value of a declared type: what ``--set`` says, else the file, else the default."""
        name, options = self._name(key), self.options
        self._known.append(key)
        value = self._left.pop(key, None)
        given = name in options.left
        if given:
            value = options.left.pop(name)
        elif value is None:
            if default is MISSING:
                raise self._error(f"{self.where}: lacks {name}")
            return default
        where = options.where if given else self.where
        self.sources[name] = where
        try:
            return _parsed(name, declared, value) if given and isinstance(value, str) else _typed(name, declared, value)
        except ValueError as error:
            raise self._error(f"{where}: {error}") from error

    def given(self, declared: Mapping[str, Any]) -> dict[str, Any]:
        """The values of those settings that file or ``--set`` give."""
        found = {name: self.take(name, kind, None) for name, kind in declared.items()}
        return {name: value for name, value in found.items() if self._name(name) in self.sources}

    def read(self, kind: type[T], start: T | None = None, **values: Any) -> T:
        """A dataclass with the fields that are given; after it, no key may be left.

        Args:
            kind: Its class.
            start: One whose values are the defaults.
            values: Fields that are no settings here, or that the caller has read.
        """
        values |= self.given({name: each for name, each in field_types(kind).items() if name not in values})
        self.end()
        if start is None:
            own = [each for each in fields(kind) if each.name not in values]  # type: ignore[arg-type]
            if missing := [self._name(each.name) for each in own if each.default is each.default_factory is MISSING]:
                raise self._error(f"{self.where}: lacks {', '.join(missing)}")
        try:
            return kind(**values) if start is None else replace(start, **values)  # type: ignore[type-var]
        except ValueError as error:
            raise self.error(str(error)) from error

    def raw(self, key: str, default: Any = None) -> Any:
        """A value to be read by the caller."""
        self._known.append(key)
        return self._left.pop(key, default)

    def inner(self, values: Any, *keys: str) -> Reader:
        """Values as a table inside this one, under its keys."""
        return Reader(self.where, values, self.options, path=self._name(".".join(keys)), whole=False, error=self._error)

    def table(self, key: str) -> Reader:
        """A table inside this one; empty where it is missing."""
        self._tables.append(self.inner(self._left.pop(key, None), key))
        return self._tables[-1]

    def tables(self, key: str) -> list[Reader]:
        """An array of tables; each is called by its ``name`` or ``label``, so that ``--set`` can find it."""
        found = self.raw(key, [])
        if not isinstance(found, list):
            raise self._error(f"{self.where}: {self._name(key)} must be an array of tables ([[{self._name(key)}]])")
        return [self.inner(each, key, _called(each, number)) for number, each in enumerate(found, start=1)]

    def end(self) -> None:
        """No key may be left."""
        for table in self._tables:
            table.end()
        unknown = [(self.where, self._name(key)) for key in self._left]
        if self._whole and not self.options.shared:
            unknown += [(self.options.where, name) for name in self.options.left]
        for where, name in unknown:
            raise self._error(f"{where}: no setting is called {name!r}; known are {', '.join(self._names())}")

    def _names(self) -> list[str]:
        """Full names of the settings that were asked for here and in the tables inside."""
        inside = [name for table in self._tables for name in table._names()]
        return [*dict.fromkeys(self._name(key) for key in self._known), *inside]


def _called(values: Any, number: int) -> str:
    name = values.get("name", values.get("label", number)) if isinstance(values, Mapping) else number
    return str(name)


def bundled_names(kind: str) -> tuple[str, ...]:
    """Names of the settings files of a kind that come with the package.

    Example:
        >>> "mae_cifar10" in bundled_names("recipes")
        True
    """
    folder = resources.files("mto_analysis") / "assets" / kind
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def open_settings(
    kind: str, name_or_path: str | Path, options: Options | None = None, *, error: type[ValueError] = ValueError
) -> tuple[Reader, Path | None]:
    """A reader of a settings file that comes with the package, by name, or of one of the user's own, by its path.

    Returns:
        The reader, and the folder of a user's file.
    """
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    bundled = text in bundled_names(kind)
    if not bundled and not path.is_file():
        one = kind.removesuffix("s")
        known = ", ".join(bundled_names(kind))
        raise error(f"no {one} is called {text!r}, nor is it a file; known are {known}")
    file = resources.files("mto_analysis") / "assets" / kind / f"{text}.toml" if bundled else path
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except tomllib.TOMLDecodeError as reason:
        raise error(f"{text} is not TOML: {reason}") from reason
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{text} cannot be read: {reason}") from reason
    values.setdefault("name", path.stem)
    return Reader(text, values, options, error=error), None if bundled else path.parent


def toml_value(value: Any) -> str:
    """A plain value in TOML.

    Example:
        >>> toml_value(("a", 1, True))
        '["a", 1, true]'
    """
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(toml_value, value))}]"
    # TOML writes texts and truths as JSON does, and numbers as Python does (inf).
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, str)) else repr(value)


def _parsed(name: str, declared: Any, text: str) -> Any:
    """A value that a user typed, as the type of the setting; ``none`` leaves an optional one out.

    Example:
        >>> _parsed("betas", tuple[float, float], "0.9,0.95")
        (0.9, 0.95)
    """
    optional, kind, _ = _kind(declared)
    text = text.strip()
    if optional and text.lower() in ("none", ""):
        return None
    if get_origin(kind) is tuple:
        inside = _kind(get_args(kind)[0])[1]
        parts = [part.strip() for part in text.strip("()[]").split(",") if part.strip()]
        return _typed(name, declared, [_one(name, declared, inside, part) for part in parts])
    return _typed(name, declared, _one(name, declared, kind, text))


def _one(name: str, declared: Any, kind: Any, text: str) -> Any:
    """Text as a single value."""
    try:
        if kind is bool:
            return _TRUE[text.lower()]
        if kind in (int, float, Path):
            return kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {_in_words(declared)}, got {text!r}") from None
    return text


def _typed(name: str, declared: Any, value: Any) -> Any:
    """A value of a file as the type of the setting: lists become tuples, whole numbers floats, tables dataclasses.

    Example:
        >>> _typed("min_lr", float, 0)
        0.0
    """
    value = _converted(name, declared, value)
    _check(name, declared, value)
    return value


def _converted(name: str, declared: Any, value: Any) -> Any:
    optional, kind, _ = _kind(declared)
    inside = get_args(kind)
    if value is None and optional:
        return None
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        if inside[-1] is Ellipsis or len(inside) == len(value):
            kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
            return tuple(_converted(name, each, part) for each, part in zip(kinds, value, strict=True))
    elif get_origin(kind) is Literal:
        if value in inside:
            return value
    elif get_origin(kind) is not None and isinstance(value, Mapping):
        return {key: _converted(f"{name}.{key}", inside[1], each) for key, each in value.items()}
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return Reader(name, value).read(kind)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ValueError(f"{name} must be {_in_words(declared)}, got {value!r}")


def _check(name: str, declared: Any, value: Any) -> None:
    """Whether a value is one of its choices and in its range, and so is each part of it."""
    optional, kind, rules = _kind(declared)
    if value is None and optional:
        return
    for rule in rules:
        if value not in rule:
            infinite = isinstance(value, float) and not math.isfinite(value)
            raise ValueError(f"{name} {'must be finite' if infinite else rule}, got {value!r}")
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"{name} must be {_in_words(declared)}, got {value!r}")
    if get_origin(kind) is tuple:
        inside = get_args(kind)
        for part, each in zip(value, inside[:1] * len(value) if inside[-1] is Ellipsis else inside, strict=False):
            _check(name, each, part)


def _kind(declared: Any) -> tuple[bool, Any, tuple[Any, ...]]:
    """Whether a type allows ``None``, the type without it, and its rules."""
    rules: tuple[Any, ...] = ()
    if get_origin(declared) is Annotated:
        declared, *found = get_args(declared)
        rules = tuple(found)
    if get_origin(declared) in (Union, types.UnionType):
        rest = [each for each in get_args(declared) if each is not type(None)]
        _, kind, inner = _kind(rest[0])
        return len(rest) < len(get_args(declared)), kind, (*rules, *inner)
    return False, declared, rules


def _in_words(declared: Any) -> str:
    optional, kind, _ = _kind(declared)
    if get_origin(kind) is Literal:
        words = f"one of {', '.join(map(str, get_args(kind)))}"
    elif get_origin(kind) is tuple:
        inside = get_args(kind)
        each = {int: "whole numbers", float: "numbers"}.get(_kind(inside[0])[1], "values")
        words = f"{each} separated by commas" if inside[-1] is Ellipsis else f"{len(inside)} {each}"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a table")
    return f"{words} or none" if optional else words
