"""A table as text for a terminal, CSV, Markdown or LaTeX, by tabulate and pandas."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pandas as pd


def render(table: pd.DataFrame, kind: str, *, title: str = "", notes: Sequence[str] = ()) -> str:
    r"""A table as text; columns of numbers are aligned right.

    Args:
        table: Cells are written as they are, floats with six significant digits, missing ones empty.
        kind: ``text``, ``csv``, ``markdown`` or ``latex`` (which needs the package booktabs).
        title: Above the table, or in its caption; not in CSV, which holds nothing but the table.
        notes: Below the table, or in its caption; not in CSV.

    Example:
        >>> table = pd.DataFrame({"method": ["MAE", "MTO"], "rauc": [1, 1.3]})
        >>> print(render(table, "text"))
        method  rauc
        MAE        1
        MTO      1.3
        >>> print(render(table, "markdown"))
        | method   |   rauc |
        |:---------|-------:|
        | MAE      |      1 |
        | MTO      |    1.3 |
        >>> render(table, "csv")
        'method,rauc\nMAE,1\nMTO,1.3'
    """
    words = table.map(_word)
    names = [str(name) for name in words.columns]
    right = [bool(words.iloc[:, at].map(_is_number).all()) for at in range(len(names))]
    if kind == "csv":
        return str(words.to_csv(index=False, lineterminator="\n")).rstrip("\n")
    if kind == "text":
        # As a first row, because tabulate makes columns wider than their headers.
        lines = [line.rstrip() for line in _tabulate([names, *words.to_numpy()], right, "plain").splitlines()]
        return "\n".join([*([title] if title else []), *lines, *(f"  {note}" for note in notes)])
    if kind == "markdown":
        escaped = words.map(lambda word: word.replace("|", "\\|"))
        above, below = [f"**{title}**", ""] if title else [], ["", *(f"- {note}" for note in notes)] if notes else []
        return "\n".join([*above, _tabulate(escaped.to_numpy(), right, "pipe", headers=names), *below])
    if kind == "latex":
        style = words.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
        form = "".join("r" if at_right else "l" for at_right in right)
        caption = re.sub(r"([&%$#_{}])", r"\\\1", " ".join([f"{title}." if title else "", *notes]).strip())
        options: dict[str, Any] = {"hrules": True, "column_format": form, "position_float": "centering"}
        return f"% needs \\usepackage{{booktabs}}\n{style.to_latex(caption=caption or None, **options)}".rstrip("\n")
    raise ValueError(f"kind must be one of text, csv, markdown, latex, got {kind!r}")


def _tabulate(rows: Any, right: Sequence[bool], form: str, *, headers: Sequence[str] = ()) -> str:
    from tabulate import tabulate

    align = ["right" if at_right else "left" for at_right in right]
    return str(tabulate(rows, headers=headers, tablefmt=form, colalign=align, disable_numparse=True))


def _word(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return f"{cell:g}" if isinstance(cell, float) else str(cell)


def _is_number(word: str) -> bool:
    """Whether a cell looks better on the right; empty cells follow their column."""
    try:
        float(word or "0")
    except ValueError:
        return False
    return True
