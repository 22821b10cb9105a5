"""Docstrings as the reference shows them: our sections, formulas, names and ``#:`` comments as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[2]

_FORMULA_LINE = re.compile(r"^( *)\.\. math:: (.+)$", re.MULTILINE)
_FORMULA = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:class|func|mod|data|meth):`~?([\w.]+)`")
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
    """A link where the whole path is given, to the page of a module or to the place of anything else; else the name."""
    path = match[1]
    name = f"`{path.rpartition('.')[2]}`"
    if not path.startswith("mto_analysis."):
        return f"`{path}`"
    place = ROOT / path.replace(".", "/")
    if place.is_dir() or place.with_suffix(".py").is_file():
        return f"[{name}]({path.removeprefix('mto_analysis.').replace('.', '-')}.md)"
    return f"[{name}][{path}]"


def _shapes(match: re.Match[str]) -> str:
    pairs = [line.strip().partition(":") for line in match[2].splitlines()]
    items = [
        f"{match[1]}- `{name}`: {shape.strip()}" if colon else f"{match[1]}  {name}" for name, colon, shape in pairs
    ]
    return "\n".join([f"{match[1]}**Shapes:**", "", *items, "", ""])
