"""A table as text for a terminal, CSV, Markdown or LaTeX; numbers arrive as the words they are to be printed as."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

__all__ = ["render"]

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def render(table: pd.DataFrame, kind: str, *, title: str = "", notes: Sequence[str] = ()) -> str:
    r"""Write a table; title and notes go along except in CSV, which holds nothing but the table.

    Example:
        >>> table = pd.DataFrame({"method": ["MAE", "MTO"], "rauc": [1, 1.3]})
        >>> print(render(table, "text"))
        method  rauc
        MAE        1
        MTO      1.3
        >>> print(render(table, "markdown"))
        | method | rauc |
        | :-- | --: |
        | MAE | 1 |
        | MTO | 1.3 |
        >>> render(table, "csv")
        'method,rauc\nMAE,1\nMTO,1.3'
    """
    rows = [[_word(cell) for cell in row] for row in table.itertuples(index=False, name=None)]
    header = [str(column) for column in table.columns]
    right = [all(_is_number(row[at]) for row in rows) for at in range(len(header))]
    write: dict[str, Callable[..., str]] = {"text": _text, "csv": _csv, "markdown": _markdown, "latex": _latex}
    if kind not in write:
        raise ValueError(f"kind must be one of {', '.join(write)}, got {kind!r}")
    return write[kind](header, rows, right, title, notes)


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


def _text(header: list[str], rows: list[list[str]], right: list[bool], title: str, notes: Sequence[str]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title] if title else []
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _csv(header: list[str], rows: list[list[str]], right: list[bool], title: str, notes: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue().rstrip("\n")


def _markdown(header: list[str], rows: list[list[str]], right: list[bool], title: str, notes: Sequence[str]) -> str:
    lines = [f"**{title}**", ""] if title else []
    rule = ["--:" if at_right else ":--" for at_right in right]
    for row in (header, rule, *rows):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)])


def _latex(header: list[str], rows: list[list[str]], right: list[bool], title: str, notes: Sequence[str]) -> str:
    def line(row: list[str]) -> str:
        return "    " + " & ".join("".join(_LATEX.get(sign, sign) for sign in cell) for cell in row) + r" \\"

    caption = " ".join([f"{title}." if title else "", *notes])
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            *([rf"  \caption{{{''.join(_LATEX.get(sign, sign) for sign in caption)}}}"] if caption.strip() else []),
            rf"  \begin{{tabular}}{{{''.join('r' if at_right else 'l' for at_right in right)}}}",
            r"    \toprule",
            line(header),
            r"    \midrule",
            *map(line, rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )
