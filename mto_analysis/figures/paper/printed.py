"""Tables 1-3 and supplementary Tables 1-6: what is printed, beside what its own numbers give when recomputed."""

from __future__ import annotations

import string

import pandas as pd

from mto_analysis.figures.paper.inputs import Drawn
from mto_analysis.figures.paper.tables import PaperTable, paper_table
from mto_analysis.figures.paper.workbench import Workbench
from mto_analysis.figures.plots.style import TEXT_WIDTH
from mto_analysis.figures.plots.tables import draw_table

__all__ = ["table"]

# What the one word "recomputed" is in each table, for a reader who has the image alone.
_RECOMPUTED = {
    "3": "against all three",
    "supp1": "against baseline at 800",
    "supp2": "against baseline at 800, box / mask",
    "2": "recomputed",
}
_HEADS = {
    "printed RAUC": "printed",
    "reference needed": "needed",
    "L_spa": r"$L_{\mathrm{spa}}$",
    "L_e": "$L_e$",
    "L_r": "$L_r$",
    "top-1": "top-1 (%)",
}


def table(bench: Workbench) -> Drawn:
    """One of the paper's tables; grey columns are computed here from the printed ones."""
    if bench.inputs.experiment is not None:
        from mto_analysis.figures.paper.experiments import ablation_table

        return ablation_table(bench.name, bench.inputs.experiment)
    name = bench.name.removeprefix("supp-").removeprefix("table")
    printed = paper_table(f"supp{name}" if bench.name.startswith("supp-") else name)
    shown, remarks = _with_marks(printed.frame)
    if printed.name == "2":  # one column for what the page has no room for in three
        shown.insert(0, "baseline", shown.pop("S1") + ", " + shown.pop("backbone") + shown.pop("S2"))
    if printed.name == "3":
        shown = shown.replace("x", "\N{CHECK MARK}")
    computed = [column for column in ("recomputed", "reference needed") if column in shown]
    if _is_settings(printed):
        shown["setting"] = shown["setting"].str.replace("_", " ")
    shown = shown.replace(r"(^| )-(?=\d)", "\\1\N{MINUS SIGN}", regex=True)
    figure = draw_table(
        shown,
        title=printed.title,
        notes=(*remarks, *printed.notes),
        heads=_HEADS | {"recomputed": _RECOMPUTED.get(printed.name, "recomputed")},
        computed=computed,
        width=TEXT_WIDTH,
    )
    grey = " Grey columns are computed here from the printed numbers." if computed else ""
    spread = "" if _is_settings(printed) else "; no number of runs and no spread is given"
    caption = f"As the paper prints it{spread}.{grey} {' '.join(printed.notes)}"
    return Drawn({bench.name: figure}, {bench.name: printed.frame}, caption)


def _is_settings(printed: PaperTable) -> bool:
    return "value" in printed.frame


def _with_marks(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The table without empty columns, its notes as small letters and their explanations."""
    notes = [note for note in dict.fromkeys(frame["note"]) if note]
    letters = dict(zip(notes, string.ascii_lowercase, strict=False))
    shown = frame.drop(
        columns=["note", *(column for column in frame if not frame[column].astype(bool).any())], errors="ignore"
    )
    if "recomputed" in shown and set(shown["recomputed"]) == {"not possible"}:
        shown = shown.drop(columns="recomputed")
    marked = next(name for name in ("method", "S2", shown.columns[0]) if name in shown)
    marks = [f"$^{{{letters[note]}}}$" if note else "" for note in frame["note"]]
    if marked == "S2" and "printed RAUC" in shown:
        shown[marked] = marks
    else:
        shown[marked] = shown[marked] + marks
    return shown, [f"$^{{{letter}}}$ {note}" for note, letter in letters.items()]
