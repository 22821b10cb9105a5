"""Saved tables, read back: ``heterogeneity.csv`` of one or several runs, and ``interventions.csv``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mto_analysis.errors import DataError
from mto_analysis.runtime.outputs import odd_label
from mto_analysis.runtime.tables import as_numbers, read_table, refuse_nameless

_COLUMNS = ("model", "stack", "layer_depth", "heterogeneity", "normalized", "num_visible")
_WORDS = ("model", "stack", "intervention", "condition", "measure")
_EFFECTS = (*_WORDS, "from_depth", "effect", "ci_low", "ci_high", "num_images")


def read_tables(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Read one or several tables as one; models of the same name are told apart by the folder of their table."""
    tables = [_read(Path(path)) for path in paths]
    names = [set(table["model"]) for table in tables]
    for index, (path, table) in enumerate(zip(paths, tables, strict=True)):
        if any(names[index] & other for at, other in enumerate(names) if at != index):
            table["model"] = table["model"] + f" ({Path(path).parent.name or Path(path).stem})"
    whole = pd.concat(tables, ignore_index=True)
    twice = whole.duplicated(["model", "stack", "layer_depth"])
    if twice.any():
        raise DataError(f"model {whole.loc[twice, 'model'].iloc[0]} is in the tables twice; leave one out")
    return whole


def read_effects(path: str | Path, models: Sequence[str]) -> pd.DataFrame:
    """The rows of an ``interventions.csv`` that are about some models; a model without any is warned of."""
    table = _read(Path(path), _EFFECTS, _WORDS, may_lack=("ci_low", "ci_high"))
    found = table[table["model"].isin(models)]
    if found.empty:
        raise DataError(
            f"{path} is about {', '.join(table['model'].unique())}, not about {', '.join(models)}; name the models as "
            "there, with --label"
        )
    known = set(found["model"])
    if missing := [model for model in models if model not in known]:
        warnings.warn(f"{path} has no interventions of {', '.join(missing)}", stacklevel=2)
    return found.reset_index(drop=True)


def _read(
    path: Path,
    columns: Sequence[str] = _COLUMNS,
    words: Sequence[str] = ("model", "stack"),
    may_lack: Sequence[str] = (),
) -> pd.DataFrame:
    table = read_table(path, names=words)
    missing = [column for column in columns if column not in table]
    if missing:
        kind = "a heterogeneity table" if columns is _COLUMNS else "a table of interventions"
        raise DataError(f"{path} is not {kind}: it lacks {', '.join(missing)}")
    refuse_nameless(table, "model", path)
    if odd := odd_label(table["model"]):
        raise DataError(f"{path}: the model {odd}; rename it")
    for column in (name for name in columns if name not in words):
        table[column] = as_numbers(table[column], path, may_lack=column in may_lack)
    return table
