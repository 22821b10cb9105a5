"""Settings from text and from TOML, brought to the type that a dataclass field declares, or refused in one line."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["field_types", "parse_value", "typed_value"]

_TRUE = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def field_types(settings: type) -> Mapping[str, Any]:
    """Names and declared types of a dataclass's fields, in order."""
    return typing.get_type_hints(settings)


def parse_value(name: str, declared: Any, text: str) -> Any:
    """A value that a user typed, as the type of the setting.

    Args:
        name: Of the setting, for the message.
        declared: Its type.
        text: What was typed; ``none`` leaves an optional setting out, lists are separated by commas.

    Raises:
        ValueError: If the text is not of that type.

    Example:
        >>> parse_value("betas", tuple[float, float], "0.9,0.95")
        (0.9, 0.95)
    """
    optional, kind = _optional(declared)
    text = text.strip()
    if optional and text.lower() in ("none", ""):
        return None
    if get_origin(kind) is tuple:
        inside = get_args(kind)[0]
        parts = [part for part in text.strip("()[]").split(",") if part.strip()]
        return typed_value(name, declared, [_one(name, declared, inside, part.strip()) for part in parts])
    return typed_value(name, declared, _one(name, declared, kind, text))


def typed_value(name: str, declared: Any, value: Any) -> Any:
    """A value of a TOML file, checked against the type of the setting; lists become tuples, whole numbers floats.

    Raises:
        ValueError: If it is of another type.

    Example:
        >>> typed_value("min_lr", float, 0)
        0.0
    """
    optional, kind = _optional(declared)
    if value is None and optional:
        return None
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        inside = get_args(kind)
        count = None if inside[-1] is Ellipsis else len(inside)
        if count in (None, len(value)):
            return tuple(typed_value(name, inside[0], each) for each in value)
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ValueError(f"{name} must be {_in_words(declared)}, got {value!r}")


def _one(name: str, declared: Any, kind: Any, text: str) -> Any:
    """Text as a single value."""
    try:
        if kind is bool:
            return _TRUE[text.lower()]
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} must be {_in_words(declared)}, got {text!r}") from None
    return text


def _optional(declared: Any) -> tuple[bool, Any]:
    """Whether a type allows ``None``, and the type without it."""
    if get_origin(declared) in (Union, types.UnionType):
        rest = [each for each in get_args(declared) if each is not type(None)]
        return len(rest) < len(get_args(declared)), rest[0]
    return False, declared


def _in_words(declared: Any) -> str:
    optional, kind = _optional(declared)
    if get_origin(kind) is Literal:
        words = f"one of {', '.join(map(str, get_args(kind)))}"
    elif get_origin(kind) is tuple:
        inside = get_args(kind)
        each = {int: "whole numbers", float: "numbers"}.get(inside[0], "values")
        words = f"{each} separated by commas" if inside[-1] is Ellipsis else f"{len(inside)} {each}"
    else:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
    return f"{words} or none" if optional else words
