"""Fig. 2: affinity maps of every layer depth.

By default the bundled small SimMIM (the paper shows SimMIM) and MAE on bundled CIFAR-10 pictures, mean over them; with
``--ckpt`` and ``--images`` any checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mto_analysis.data import open_pictures
from mto_analysis.demo import DEMO_PICTURES, measure_demo
from mto_analysis.outputs import OutputFolder
from mto_analysis.plots.affinity import draw_affinity
from mto_analysis.studies.affinity import map_checkpoints
from mto_analysis.studies.heterogeneity import Settings


def main(
    ckpt: Annotated[str | None, typer.Option(help="Checkpoint.")] = None,
    label: Annotated[str, typer.Option(help="Its name.")] = "model",
    images: Annotated[Path, typer.Option(help="Folder, list or Parquet file of pictures.")] = DEMO_PICTURES,
    limit: Annotated[int | None, typer.Option(help="Number of pictures.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures and table.")] = Path(__file__).parent,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    models = [label] if ckpt else ["SimMIM", "MAE"]
    stems = {model: "fig2" if index == 0 else f"fig2-{model.lower()}" for index, model in enumerate(models)}
    names = ["fig2.csv", *(f"{stem}.{kind}" for stem in stems.values() for kind in ("png", "pdf"))]
    folder = OutputFolder(out, names, overwrite=overwrite)
    if ckpt:
        study = map_checkpoints([ckpt], open_pictures(images), Settings(limit=limit), labels=[label], say=print)
        maps, table = study.maps, study.quadrants
    else:
        demo = measure_demo(limit=limit, say=print)
        maps, table = demo.maps, demo.fig2
    for model, stem in stems.items():
        folder.write_figure(stem, draw_affinity(maps[model], title=model))
    folder.write_table("fig2.csv", table)


if __name__ == "__main__":
    typer.run(main)
