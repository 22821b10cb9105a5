"""Fig. 1(a): heterogeneity of several pre-trained models over layer depth.

By default the bundled small MAE and SimMIM models on bundled CIFAR-10 pictures; with ``--ckpt`` and ``--images`` any
checkpoints: the public MAE and SimMIM files give the paper's own figure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mto_analysis.data import open_pictures
from mto_analysis.demo import DEMO_PICTURES, measure_demo
from mto_analysis.outputs import OutputFolder
from mto_analysis.plots.heterogeneity import draw_heterogeneity
from mto_analysis.studies.heterogeneity import Settings, measure_checkpoints


def main(
    ckpt: Annotated[list[str] | None, typer.Option(help="Checkpoint; repeat to compare.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Name of each checkpoint, in order.")] = None,
    images: Annotated[Path, typer.Option(help="Folder, list or Parquet file of pictures.")] = DEMO_PICTURES,
    limit: Annotated[int | None, typer.Option(help="Number of pictures.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for figure and table.")] = Path(__file__).parent,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    folder = OutputFolder(out, [f"fig1a.{kind}" for kind in ("png", "pdf", "csv")], overwrite=overwrite)
    if ckpt:
        table = measure_checkpoints(ckpt, open_pictures(images), Settings(limit=limit), labels=label, say=print).table
    else:
        table = measure_demo(limit=limit, say=print).fig1a
    folder.write_figure("fig1a", draw_heterogeneity(table))
    folder.write_table("fig1a.csv", table)


if __name__ == "__main__":
    typer.run(main)
