"""The report: one self-contained HTML file with figures, tables, run metadata and an explorer of affinity maps."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from mto_analysis.figures.pages import render_page
from mto_analysis.figures.plots.affinity import draw_affinity
from mto_analysis.figures.plots.heterogeneity import draw_heterogeneity
from mto_analysis.figures.plots.interventions import draw_interventions
from mto_analysis.figures.plots.reconstruct import draw_reconstructions, reconstruction_caption
from mto_analysis.figures.plots.style import looks_of, model_curves
from mto_analysis.figures.plots.svg import figure_svg
from mto_analysis.probe.explore import MAX_PATCHES, Explored
from mto_analysis.probe.interventions import CONDITIONS, INTERVENTIONS, MEASURES, intervention_sentences
from mto_analysis.probe.quadrants import AffinityMap
from mto_analysis.probe.reconstruction import Reconstruction

# Viridis at 33 places; the script draws straight lines between them.
_MAP_COLOURS = [[round(255 * value) for value in mpl.colormaps["viridis"](at / 32)[:3]] for at in range(33)]


@dataclass(frozen=True)
class ReportContents:
    """What a report shows.

    Args:
        table: Rows of ``heterogeneity.csv``.
        models: Metadata of each model, as for ``run.json``.
        explored: Chosen images in each stack of each model.
        reconstructions: The same images as the models fill them in.
        versions: Of the packages that made the numbers.
        maps: Mean affinity maps of each model, drawn as Fig. 2.
        interventions: Rows of ``interventions.csv`` of these models, or none.
        figures: More figures by their captions.
    """

    table: pd.DataFrame
    models: Sequence[Mapping[str, Any]]
    explored: Sequence[Explored]
    reconstructions: Sequence[Reconstruction]
    versions: Mapping[str, str]
    maps: Mapping[str, Sequence[AffinityMap]] = field(default_factory=dict)
    interventions: pd.DataFrame | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)


def render_report(contents: ReportContents, *, title: str = "Masked tokens, layer by layer") -> str:
    """The report as one HTML file."""
    reconstructions, curves = list(contents.reconstructions), model_curves(contents.table)
    maps = {f"Affinity maps, {model}": draw_affinity(list(each), title=model) for model, each in contents.maps.items()}
    drawn = draw_reconstructions(reconstructions, captioned=False) if reconstructions else None
    return render_page(
        "report",
        title=title,
        version=contents.versions.get("mto-analysis", ""),
        skip=("explorer", "the explorer"),
        data={"title": title, **_explorer_data(contents.explored, curves)},
        explorable=any(_depths(each) for each in contents.explored),
        too_large=[each.model for each in contents.explored if not _depths(each)],
        product_error=f"{max((each.product_error for each in contents.explored), default=0):.2g}",
        heterogeneity_error=f"{max((each.heterogeneity_error for each in contents.explored), default=0):.1g}",
        max_patches=MAX_PATCHES,
        num_shown=max((len(each.images) for each in contents.explored), default=0),
        curves=Markup(figure_svg(draw_heterogeneity(contents.table), "curves")),
        figures={
            caption: Markup(figure_svg(figure, f"figure{number}"))
            for number, (caption, figure) in enumerate({**maps, **contents.figures}.items())
        },
        sentences=[_sentence(label, curve) for label, curve in curves],
        models=[_model_table(label, curve, _masses(contents.explored, curve)) for label, curve in curves],
        reconstructions=Markup(figure_svg(drawn, "reconstructions")) if drawn else None,
        reconstruction_caption=reconstruction_caption(reconstructions) if reconstructions else "",
        losses=[
            {
                "model": row.model,
                "image": row.image,
                "target": f"{row.target.replace('_', ' ')}, {row.criterion}",
                "loss": f"{row.loss:.4g}",
                "mean": f"{row.predict_the_mean:.4g}",
            }
            for row in reconstructions
        ],
        interventions=None if contents.interventions is None else _interventions(contents.interventions),
        metadata=[{"label": model["model"], "metadata": _metadata(model)} for model in contents.models],
        versions=contents.versions,
    )


def _sentence(label: str, curve: pd.DataFrame) -> str:
    first, last = curve.iloc[0], curve.iloc[-1]
    return (
        f"{label}: H goes from {first.heterogeneity:.4f} at layer depth {first.layer_depth:.0f} "
        f"({_below_bound(first.normalized)}) to {last.heterogeneity:.4f} at {last.layer_depth:.0f} "
        f"({_below_bound(last.normalized)})."
    )


def _below_bound(normalized: float) -> str:
    """How far H lies below its bound, in percent; digits below 0.001 % would show rounding errors."""
    gap = 100 * (1 - normalized)
    return f"{'less than 0.001' if gap < 0.001 else f'{gap:.3g}'} % below its bound"


def _masses(explored: Sequence[Explored], curve: pd.DataFrame) -> dict[int, np.ndarray]:
    """Mean quadrant masses over the images shown, by layer depth."""
    masses: dict[int, list[tuple[float, ...]]] = {}
    for each in explored:
        if (each.model, each.stack) == (curve["model"].iloc[0], curve["stack"].iloc[0]):
            for depth in _depths(each):
                masses.setdefault(depth.layer_depth, []).append(depth.quadrant_mass)
    return {depth: np.mean(rows, axis=0) for depth, rows in masses.items()}


def _depths(explored: Explored) -> list[Any]:
    return [depth for image in explored.images for depth in image.depths]


def _model_table(label: str, curve: pd.DataFrame, masses: Mapping[int, np.ndarray]) -> dict[str, Any]:
    rows = []
    for row in curve.to_dict("records"):
        known = math.isfinite(row["ci_low"])  # one image has no interval
        rows.append(
            {
                "depth": row["layer_depth"],
                "h": f"{row['heterogeneity']:.4f}",
                "interval": f"{row['ci_low']:.4f} to {row['ci_high']:.4f}" if known else "-",
                "below": _below_bound(row["normalized"]),
                "masses": [f"{mass:.3f}" for mass in masses.get(row["layer_depth"], ())] or ["-"] * 4,
            }
        )
    bounds = sorted({f"{math.log(count):.4f}" for count in curve["num_visible"]})
    return {"label": label, "num_images": int(curve["num_images"].max()), "bound": " to ".join(bounds), "rows": rows}


def _interventions(table: pd.DataFrame) -> dict[str, Any]:
    """Figure, sentences and all effects, in words."""
    names = ("model", "stack", "from_depth", "intervention", "condition", "measure", "effect", "ci_low", "ci_high")
    words: dict[str, Mapping[str, str]] = {"intervention": INTERVENTIONS, "condition": CONDITIONS, "measure": MEASURES}
    rows = [
        [
            f"{value:.4g}" if isinstance(value, float) else words.get(name, {}).get(str(value), str(value))
            for name, value in zip(names, row, strict=True)
        ]
        for row in table[list(names)].itertuples(index=False)
    ]
    return {
        "figure": Markup(figure_svg(draw_interventions(table), "interventions")),
        "sentences": intervention_sentences(table),
        "columns": ["Model", "Stack", "From depth", "Intervention", "Tokens", "Measure", "Effect", "CI low", "CI high"],
        "rows": rows,
    }


def _metadata(model: Mapping[str, Any]) -> dict[str, str]:
    info, loss = model["info"], model["own_loss"]
    sides = info["image_size"]
    if isinstance(sides, (list, tuple)):
        sides = " x ".join(map(str, sides))
    metadata = {
        "file": Path(str(model["source"])).name,
        "sha256": model["sha256"] or "of no file",
        "family": f"{info['family']} ({info['layout']}), {info['style']}-style",
        "architecture": ", ".join(f"{name} {value}" for name, value in model["config"].items()),
        "image": f"{sides} px, patches of {info['patch_size']} px",
        "masks": model["masks"],
        "own loss": "predicts no pixels",
    }
    if loss:
        metadata["own loss"] = f"{loss['loss']:.4g}, predicting the mean {loss['predict_the_mean']:.4g}"
    return metadata


def _explorer_data(explored: Sequence[Explored], curves: Sequence[tuple[str, pd.DataFrame]]) -> dict[str, Any]:
    """What the script reads; images that several models share are held once."""
    images: list[str] = []

    def index_of(pixels: np.ndarray) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="png", optimize=True)
        uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if uri not in images:
            images.append(uri)
        return images.index(uri)

    labels = {(curve["model"].iloc[0], curve["stack"].iloc[0]): label for label, curve in curves}
    looks = looks_of(labels.values())  # as in the figures
    models = [
        {
            "label": labels[each.model, each.stack] + ", token order: places are not known" * (not each.in_order),
            "colour": looks[labels[each.model, each.stack]]["color"],
            "num_depths": each.num_depths,
            "aspect": each.aspect,
            "left_out": each.left_out,
            "images": [
                {
                    "name": image.image,
                    "image": index_of(image.pixels),
                    "depths": [
                        {
                            "depth": depth.layer_depth,
                            "mask": "".join("01"[int(masked)] for masked in depth.mask),
                            "low": depth.products.low,
                            "step": depth.products.step,
                            "levels": base64.b64encode(depth.products.levels).decode(),
                        }
                        for depth in image.depths
                    ],
                }
                for image in each.images
            ],
        }
        for each in explored
        if _depths(each)
    ]
    return {"models": models, "images": images, "colours": _MAP_COLOURS}
