"""``mto-analyze relate``: whether H and other measures go with accuracy, over checkpoints, seeds and epochs."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mto_analyze import measuring
from mto_analyze.console import note
from mto_analyze.options import ADVANCED, INPUT, AsJson, Confidence, DrawingOptions, OutputOptions, takes

MeasureTables = Annotated[
    list[str],
    typer.Option(
        "--measures",
        metavar="[NAME=]FILE",
        help="measures.csv, heterogeneity.csv of a command or of runs, or atlas.csv; repeatable.",
        rich_help_panel=INPUT,
    ),
]
Scores = Annotated[
    list[str],
    typer.Option(
        "--scores",
        metavar="[NAME=]FILE",
        help="CSV with model and score, or any log that rauc reads; repeatable.",
        rich_help_panel=INPUT,
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer", metavar="first|last|mean|N", help="Layer depth; repeatable; by default first, last and mean."
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option("--given", metavar="MEASURE", help="Hold this constant for H; repeatable; by default all others."),
]
ScoreColumn = Annotated[str | None, typer.Option(metavar="NAME", help="Column of the score.", rich_help_panel=ADVANCED)]


@takes(OutputOptions, DrawingOptions, out=Path("relate"))
def relate(
    context: typer.Context,
    measures: MeasureTables,
    scores: Scores,
    out: Path,
    overwrite: bool,
    quiet: bool,
    layer: Layers = None,
    given: Given = None,
    score_column: ScoreColumn = None,
    confidence: Confidence = 0.95,
    as_json: AsJson = False,
) -> None:
    """Relate measures to accuracy: rank correlations, and those of H given the other measures.

    Prints one plain sentence per question; p values are corrected for the number of questions. Writes
    relations.csv, checkpoints.csv (what was joined), seeds.csv (measures over the seeds of each method), the figure
    relations and run.json to --out.

    Example:
      mto-analyze relate --measures runs/heterogeneity.csv --scores runs/curves.csv
    """
    from mto_analysis.figures.files import file_names
    from mto_analysis.figures.plots.relations import draw_relations
    from mto_analysis.rauc.relations import LAYERS, read_measures, read_scores
    from mto_analysis.rauc.relations import relate as related
    from mto_analysis.runtime.outputs import OutputFolder

    files = file_names(["relations.csv", "checkpoints.csv", "seeds.csv", "relations", "run.json"])
    OutputFolder(out, files, overwrite=overwrite)
    tables = read_measures(measures), read_scores(scores, score=score_column, say=partial(note, quiet=quiet))
    found = related(*tables, layers=layer or LAYERS, given=given, confidence=confidence)
    outputs: dict[str, Any] = {
        "relations.csv": found.table,
        "checkpoints.csv": found.checkpoints,
        "seeds.csv": found.seeds,
    }
    if found.table["rho"].notna().any():
        outputs["relations"] = partial(draw_relations, found.table)
    else:
        files = [name for name in files if not name.startswith("relations.") or name in outputs]
    measuring.write({**context.params, "quiet": quiet or as_json}, files, outputs, **found.record())
    typer.echo(json.dumps(found.record(), indent=2) if as_json else "\n".join([found.sentence, *found.notes]))
