"""Whether the fall of heterogeneity with depth holds: all definitions, attention and controls of the bundled models.

The numbers of ``docs/definitions.md`` are those of the tables this writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from mto_analysis.data import open_pictures
from mto_analysis.demo import DEMO_CHECKPOINTS, DEMO_MASKS, DEMO_PICTURES
from mto_analysis.masking import load_masks
from mto_analysis.outputs import OutputFolder
from mto_analysis.plots.controls import draw_controls
from mto_analysis.plots.definitions import draw_definitions
from mto_analysis.studies.controls import CONTROLS, Controls, control_bands, control_sentences
from mto_analysis.studies.definitions import Definitions
from mto_analysis.studies.heterogeneity import Settings, measure_checkpoints, together
from mto_analysis.studies.properties import Properties


def main(
    limit: Annotated[int | None, typer.Option(help="Number of pictures.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures and tables.")] = Path(__file__).parent,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    tables = ("definitions", "attention", "controls", "properties")
    drawn = [f"{name}.{kind}" for name in ("definitions", "controls") for kind in ("png", "pdf")]
    folder = OutputFolder(out, [*(f"{name}.csv" for name in tables), *drawn], overwrite=overwrite)
    pictures = open_pictures(DEMO_PICTURES)
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in (*tables, "curves")}
    for method, masks in DEMO_MASKS.items():
        labels = [label for label in DEMO_CHECKPOINTS if label.startswith(method)]
        settings = Settings(limit=limit, masks=load_masks(masks), batch_size=64)
        sources = [DEMO_CHECKPOINTS[label] for label in labels]
        definitions, controls, properties = Definitions(), Controls(), Properties()
        watch = together(definitions.watch, controls.watch, properties.watch)
        study = measure_checkpoints(sources, pictures, settings, labels=labels, say=print, watch=watch)
        found["definitions"].append(definitions.take_table(study))
        found["attention"].append(definitions.attention_table())
        found["controls"].append(controls.measure(study, sources, pictures, settings, say=print))
        found["properties"].append(properties.table())
        found["curves"].append(study.table)
    whole = {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}
    for name in tables:
        folder.write_table(f"{name}.csv", whole[name])
    folder.write_figure("definitions", draw_definitions(whole["definitions"], whole["attention"]))
    folder.write_figure("controls", draw_controls(whole["curves"], control_bands(whole["controls"]), CONTROLS))
    print("\n".join(control_sentences(whole["curves"], whole["controls"])))


if __name__ == "__main__":
    typer.run(main)
