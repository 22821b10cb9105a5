"""A table as one HTML file: sort, filter, plot measures over layer depth, and scores against measures."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mto_analysis.atlas.table import MEASUREMENT
from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.figures.pages import render_page

#: Columns of the page's table, by which it is sorted.
_COLUMNS = (
    ("label", "Checkpoint"),
    ("family", "Family"),
    ("backbone", "Backbone"),
    ("epochs", "Epochs"),
    ("layers", "Layers"),
    ("first", "First"),
    ("min", "Min"),
    ("last", "Last"),
    ("loss", "Own loss"),
    ("evidence", "Reading tried on"),
)
_ABOUT = {
    "source": "source",
    "file_sha256": "sha256 of the file",
    "hash_compared_with": "compared with",
    "layout": "layout",
    "evidence": "reading tried on",
    "image_size": "image (px)",
    "patch_size": "patch (px)",
    "weights": "weights",
    "loading": "given options",
    "config": "architecture",
    "assumptions": "assumed",
    "mask_rule": "masks",
    "masks_sha256": "sha256 of the masks",
    "precision": "precision",
    "hardware": "hardware",
    "mto_analysis_version": "mto-analysis",
    "torch_version": "torch",
    "contributor": "measured by",
}
_DIGITS = 7


def read_scores(source: str | Path, table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Read scores of checkpoints, such as accuracies.

    Args:
        source: CSV with the columns ``model`` (the checkpoint) and ``score``, and ``task`` where there are several.
        table: Whose checkpoints they are of; others are left out.

    Returns:
        For each task the score by checkpoint.
    """
    path = Path(source)
    if not path.is_file():
        raise DataNotFoundError(f"no scores at {path}")
    try:
        rows = pd.read_csv(path, dtype={"model": str, "task": str}, keep_default_na=False, na_values=[""])
        lacking = [name for name in ("model", "score") if name not in rows]
        if lacking:
            raise ValueError(f"it lacks {' and '.join(lacking)}, and has {', '.join(rows.columns)}")
        if rows.empty:
            raise ValueError("it has no rows")
        rows["score"] = pd.to_numeric(rows["score"])
    except ValueError as error:
        raise DataError(f"{path} is not a table of scores: {' '.join(str(error).split())}") from error
    if "task" not in rows:
        rows["task"] = "score"
    if (bad := rows[["model", "task", "score"]].isna().any(axis=1)).any():
        raise DataError(f"{path}: row {int(bad.to_numpy().argmax()) + 1} lacks a value")
    if (bad := ~np.isfinite(rows["score"])).any():
        raise DataError(f"{path}: row {int(bad.to_numpy().argmax()) + 1} has a score that is not finite")
    twice = rows[rows.duplicated(["model", "task"])]
    if len(twice):
        raise DataError(f"{path} gives {twice['task'].iloc[0]} of {twice['model'].iloc[0]} twice")
    known = rows[rows["model"].isin(table["checkpoint"])]
    if known.empty:
        raise DataError(f"{path} names no checkpoint of the table, only {', '.join(rows['model'].head(3))}, ...")
    files = table.groupby("checkpoint")["file_sha256"].nunique()
    if several := [name for name in known["model"] if files[name] > 1]:
        raise DataError(f"{path} gives a score of {several[0]}, which are {files[several[0]]} files in the table")
    return {
        str(task): {str(name): float(value) for name, value in zip(of["model"], of["score"], strict=True)}
        for task, of in known.groupby("task", sort=False)
    }


def render_atlas(
    table: pd.DataFrame,
    *,
    title: str = "Atlas of masked tokens",
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """A table as one HTML file that works offline."""
    per_layer = table[table["head"].isna() & table["other_layer_depth"].isna()]
    if per_layer.empty:
        raise DataError("the table has no measure per layer, so there is nothing to draw")
    labels = _labels(per_layer)
    names = list(dict.fromkeys(per_layer["measure"]))
    measures = sorted(names, key=lambda name: (name != "heterogeneity", name != "normalized_heterogeneity", name))
    keys = ["checkpoint", *MEASUREMENT, "stack"]
    checkpoints = [_checkpoint(labels[rows.index[0]], rows) for _, rows in per_layer.groupby(keys, sort=False)]
    return render_page(
        "atlas",
        title=title,
        version=version("mto-analysis"),
        skip=("plots", "the plots"),
        data={"checkpoints": [_for_script(each) for each in checkpoints], "scores": scores or {}},
        num_checkpoints=table["checkpoint"].nunique(),
        num_images=int(table["num_images"].max()),
        image_set=table["image_set"].iloc[0],
        images_sha256=table["images_sha256"].iloc[0],
        families=sorted(table["family"].unique()),
        bases=sorted({each["basis"] for each in checkpoints}),
        measures=measures,
        columns=_COLUMNS,
        rows=[_for_table(each, measures[0]) for each in checkpoints],
        doubts=any(each["loss"] is not None and each["loss"] >= 1 for each in checkpoints),
        tasks=list(scores or ()),
    )


def _labels(table: pd.DataFrame) -> pd.Series:
    """Names of curves: the checkpoint, with what tells files, options and stacks of one name apart."""
    labels = table["checkpoint"]
    for name in (*MEASUREMENT, "stack"):
        of = ["checkpoint", *MEASUREMENT] if name == "stack" else "checkpoint"
        several = table.groupby(of)[name].transform("nunique") > 1
        labels = labels.where(~several, labels + ", " + (table[name].str[:8] if name == "file_sha256" else table[name]))
    return labels


def _checkpoint(label: str, rows: pd.DataFrame) -> dict[str, Any]:
    """A stack of a checkpoint: what is known of it, and its measures over layer depth."""
    row = rows.iloc[0]
    curves = {
        str(measure): {
            "depth": curve["layer_depth"].tolist(),
            **{
                short: _rounded(curve[name]) for short, name in (("value",) * 2, ("low", "ci_low"), ("high", "ci_high"))
            },
        }
        for measure, curve in rows.sort_values("layer_depth").groupby("measure", sort=False)
    }
    # Not of models that predict no pixels, nor on images of one colour.
    known = row["own_loss_of_mean"] > 0 and not row.isna()["own_loss"]
    return {
        "label": label,
        "checkpoint": row["checkpoint"],
        **{name: row[name] for name in ("family", "backbone", "layout", "style", "evidence")},
        "basis": row["evidence"].partition(":")[0],
        "epochs": None if row.isna()["epochs"] else int(row["epochs"]),
        "layers": int(rows["layer_depth"].max()),
        "loss": float(row["own_loss"] / row["own_loss_of_mean"]) if known else None,
        "measures": curves,
        "about": {words: str(row[name]) for name, words in _ABOUT.items() if row[name] not in ("", "{}")},
    }


def _rounded(values: pd.Series) -> list[float | None]:
    return [None if value != value else float(f"{value:.{_DIGITS}g}") for value in values]


def _for_script(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.items() if name != "about"}


def _for_table(checkpoint: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """As the page shows it without its script."""
    curve = checkpoint["measures"].get(measure, {"depth": [], "value": []})
    at = dict(zip(curve["depth"], curve["value"], strict=True))
    shown = {"first": at.get(0), "min": min(at.values(), default=None), "last": at.get(checkpoint["layers"])}
    loss = checkpoint["loss"]
    return {
        **checkpoint,
        **{name: "" if value is None else f"{value:.4g}" for name, value in shown.items()},
        "loss": "" if loss is None else f"{loss:.3g}",
        "doubtful": loss is not None and loss >= 1,
    }
