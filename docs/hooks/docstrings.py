"""Docstrings as the reference shows them: our sections, formulas, names and ``#:`` comments as Markdown."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from public import public_paths  # noqa: E402  (extensions are loaded by path and see no folder of their own)

_FORMULA_LINE = re.compile(r"^( *)\.\. math:: (.+)$", re.MULTILINE)
_FORMULA = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
_SHAPES = re.compile(r"^( *)Shapes:\n((?:\1 +\S.*\n?)+)", re.MULTILINE)
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class OurDocstrings(griffe.Extension):
    """What griffe does not know of our docstring form."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Translate the docstring, or take the ``#:`` comment that stands above a value."""
        if obj.docstring is None and obj.is_attribute:
            text = comment_above(obj)
            obj.docstring = griffe.Docstring(text, parent=obj) if text else None
        if obj.docstring is not None:
            obj.docstring.value = translated(obj.docstring.value)


def translated(text: str) -> str:
    """Formulas, roles and sections of a docstring in Markdown."""
    text = _FORMULA_LINE.sub(r"\1```math\n\1\2\n\1```", text)
    text = _FORMULA.sub(r"$\1$", text)
    text = _ROLE.sub(_reference, text)
    text = _SHAPES.sub(_shapes, text)
    return _EXAMPLE.sub(r"\1Examples:", text)


def comment_above(obj: griffe.Object) -> str:
    """The ``#:`` lines right above an assignment."""
    found: list[str] = []
    number = (obj.lineno or 1) - 2
    lines = obj.lines_collection[obj.filepath]
    while number >= 0 and lines[number].strip().startswith("#:"):
        found.insert(0, lines[number].strip()[2:].strip())
        number -= 1
    return "\n".join(found)


def _reference(match: re.Match[str]) -> str:
    """A link where the path, or the class before its last dot, is public; else the name."""
    path = match[1]
    public = path in public_paths() or path.rpartition(".")[0] in public_paths()
    return f"[`{path.rpartition('.')[2]}`][{path}]" if public else f"`{path.removeprefix('mto_analysis.')}`"


def _shapes(match: re.Match[str]) -> str:
    pairs = [line.strip().partition(":") for line in match[2].splitlines()]
    items = [
        f"{match[1]}- `{name}`: {shape.strip()}" if colon else f"{match[1]}  {name}" for name, colon, shape in pairs
    ]
    return "\n".join([f"{match[1]}**Shapes:**", "", *items, "", ""])
