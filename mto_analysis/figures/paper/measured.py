"""Figs. 1 and 2, and what stands beside them: drawn from models that are measured here."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mto_analysis.figures.paper.inputs import Drawn, map_stems
from mto_analysis.figures.paper.workbench import EARLY, Curves, Workbench
from mto_analysis.figures.plots.affinity import draw_affinity
from mto_analysis.figures.plots.controls import draw_controls
from mto_analysis.figures.plots.definitions import draw_definitions
from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
from mto_analysis.probe.controls import CONTROLS, control_bands, control_sentences
from mto_analysis.probe.quadrants import AffinityMap

_NO_PROOF = (
    "A falling curve alone does not show that a model has converged: random weights can give one (see controls)."
)


def fig1a(bench: Workbench) -> Drawn:
    """Heterogeneity of several models over layer depth; of the bundled ones, those at the end of training."""
    curves = bench.curves
    table = curves.table
    if not bench.inputs.checkpoints:
        table = table[~table["model"].str.endswith(EARLY)].reset_index(drop=True)
    return _heterogeneity(bench, curves, table, "of each model")


def fig1b(bench: Workbench) -> Drawn:
    """Heterogeneity of models at several epochs."""
    what = "of each checkpoint" if bench.inputs.checkpoints else "of models at 2 % (early) and at the end of training"
    return _heterogeneity(bench, bench.curves, bench.curves.table, what)


def _heterogeneity(bench: Workbench, curves: Curves, table: pd.DataFrame, what: str) -> Drawn:
    caption = (
        f"Heterogeneity H (Eq. 2) {what} over layer depth, as a share of its bound H_max = log(number of visible"
        f" patches), which is dotted where it is in range. Each panel has the range of its own curves, so that a small"
        f" fall is seen. {_over(bench, table)} {_NO_PROOF}"
    )
    figure = draw_heterogeneity(table)
    return Drawn({bench.name: figure}, {bench.name: table}, caption, _metadata(curves, table))


def fig2(bench: Workbench) -> Drawn:
    """Mean affinity maps of every layer depth; of the bundled models SimMIM's, as in the paper, and MAE's."""
    found = bench.maps
    models = bench.inputs.names or ("SimMIM", "MAE")
    stems = map_stems("fig2", bench.inputs)
    quadrants = found.quadrants[found.quadrants["model"].isin(models)].reset_index(drop=True)
    figures, tables = {}, {bench.name: quadrants}
    for model, stem in zip(models, stems, strict=True):
        figures[stem] = draw_affinity(found.maps[model], title=model)
        tables[f"{stem}-maps"] = map_table(model, found.maps[model])
    several = f" Files: {', '.join(f'{stem} ({model})' for model, stem in zip(models, stems, strict=True))}."
    caption = (
        f"Affinity between all tokens, the softmax of their dot products over each row, at every layer depth of"
        f" {models[0]}. Rows are queries, columns keys, masked tokens first: quadrant 1 masked-masked, 2 masked-visible"
        f" (where H is defined), 3 visible-masked, 4 visible-visible. Colours go from the minimum to the maximum"
        f" of each map off its diagonal (numbers above it; the diagonal, where a token meets itself, is beyond); so"
        f" colours of different maps cannot be compared."
        f" {_over(bench, quadrants, interval=False)}{several if len(models) > 1 else ''}"
    )
    return Drawn(figures, tables, caption, _metadata(found.curves, quadrants))


def map_table(model: str, maps: list[AffinityMap]) -> pd.DataFrame:
    """Affinity maps as rows ``model stack layer_depth row num_masked`` and a column per key, to five digits."""
    tables = []
    for each in maps:
        values = each.values.double().numpy()
        digits = 5 - np.ceil(np.log10(np.maximum(np.abs(values), 1e-300))).astype(int)
        rounded = np.vectorize(lambda value, at: round(float(value), int(at)))(values, np.minimum(digits, 12))
        frame = pd.DataFrame(rounded, columns=[str(column) for column in range(values.shape[1])])
        frame.insert(0, "num_masked", each.num_masked)
        frame.insert(0, "row", range(len(frame)))
        frame.insert(0, "layer_depth", each.layer_depth)
        frame.insert(0, "stack", each.stack)
        frame.insert(0, "model", model)
        tables.append(frame)
    return pd.concat(tables, ignore_index=True)


def definitions(bench: Workbench) -> Drawn:
    """Fig. 1 under every definition of heterogeneity, and the models' own attention."""
    found = bench.scrutiny
    caption = (
        "H over its bound H_max = log(number of visible patches) under twelve definitions, similarities of two tokens"
        " in several forms; the upper left is Eq. 2. Hollow marks: layer depth 0 without the position embedding. Last"
        " row: the models' own attention per block, mean and range over heads - the share that one kind of token gives"
        " to the other, and the entropy of that part."
        f" {_over(bench, found.definitions)} Where the fall of H needs raw dot products it follows the norms of tokens."
    )
    figure = draw_definitions(found.definitions, found.attention)
    tables = {"definitions": found.definitions, "attention": found.attention, "properties": found.properties}
    return Drawn({bench.name: figure}, tables, caption, _metadata(found.curves, found.definitions))


def controls(bench: Workbench) -> Drawn:
    """Fig. 1 beside its controls."""
    found = bench.scrutiny
    seeds = found.controls["seed"].nunique()
    caption = (
        "Colour: H over its bound at each layer depth, a row per model with a range of its own. Grey crosses: the same"
        " measurement on a control - random weights, random mask tokens, a mask token of zeros, the same tokens with"
        " other ones called masked, and visible tokens against each other. Bands: 95 % intervals over images, widest"
        f" ends over {seeds} seeds."
        f" {_over(bench, found.controls, interval=False)}"
        f" {' '.join(control_sentences(found.curves.table, found.controls))}"
    )
    bands = control_bands(found.controls)
    figure = draw_controls(found.curves.table, bands, CONTROLS)
    return Drawn({bench.name: figure}, {bench.name: found.controls}, caption, _metadata(found.curves, found.controls))


def _over(bench: Workbench, table: pd.DataFrame, *, interval: bool = True) -> str:
    counts = " or ".join(str(count) for count in sorted({int(count) for count in table["num_images"]}))
    bands = "; bands: Student's 95 % interval of the mean over images" if interval else ""
    models = ""
    if not bench.inputs.checkpoints:
        models = " Small models trained on CIFAR-10 (bundled), not the paper's own."
    return f"Mean over n = {counts} {bench.images_in_words}, one mask each{bands}.{models}"


def _metadata(curves: Curves, table: pd.DataFrame) -> dict[str, object]:
    shown = set(table["model"])
    return {"models": [metadata for metadata in curves.models if metadata["model"] in shown]}
