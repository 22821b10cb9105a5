"""Saved ``heterogeneity.csv`` tables, read back and put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mto_analysis.errors import DataError, DataNotFoundError

__all__ = ["read_tables"]

_COLUMNS = ("model", "stack", "layer_depth", "heterogeneity", "normalized", "num_visible")


def read_tables(paths: Sequence[str | Path]) -> pd.DataFrame:
    """Read one or several tables as one; models of the same name are told apart by the folder of their table.

    Raises:
        DataNotFoundError: If there is no such file.
        DataError: If it is not a heterogeneity table, or a model is in it twice.
    """
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


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise DataNotFoundError(f"no table at {path}")
    try:
        table = pd.read_csv(path, dtype={"model": str, "stack": str})
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise DataError(f"{path} is not a CSV table: {str(error).splitlines()[0]}") from error
    missing = [column for column in _COLUMNS if column not in table]
    if missing:
        raise DataError(f"{path} is not a heterogeneity table: it lacks {', '.join(missing)}")
    for column in _COLUMNS[2:]:
        values = pd.to_numeric(table[column], errors="coerce")
        if values.isna().any():
            line = int(values.isna().to_numpy().argmax()) + 2
            raise DataError(f"{path}, line {line}: {column} must be a number, got {table[column].iloc[line - 2]!r}")
        table[column] = values
    if table.empty:
        raise DataError(f"{path} holds no rows")
    return table
