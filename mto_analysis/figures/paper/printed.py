"""Tables 1-3 and supplementary Tables 1-6: what is printed, beside what its own numbers give when recomputed."""

from __future__ import annotations

from mto_analysis.figures.paper.inputs import Drawn, table_texts
from mto_analysis.figures.paper.tables import paper_table
from mto_analysis.figures.paper.workbench import Workbench


def table(bench: Workbench) -> Drawn:
    """One of the paper's tables; the columns ``recomputed`` and ``reference needed`` are computed from the others."""
    if bench.inputs.experiment is not None:
        from mto_analysis.figures.paper.experiments import ablation_table

        return ablation_table(bench.name, bench.inputs.experiment)
    name = bench.name.removeprefix("supp-").removeprefix("table")
    printed = paper_table(f"supp{name}" if bench.name.startswith("supp-") else name)
    spread = "" if "value" in printed.frame else "; no number of runs and no spread is given"
    caption = f"As the paper prints it{spread}. {' '.join(printed.notes)}"
    texts = table_texts(bench.name, printed.frame, title=printed.title, notes=printed.notes)
    return Drawn({}, {bench.name: printed.frame}, caption, texts=texts)
