"""CSV tables of results, read back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mto_analysis.errors import DataError, DataNotFoundError

if TYPE_CHECKING:
    import pandas as pd


def read_table(path: Path, *, names: Iterable[str], text: Iterable[str] = ()) -> pd.DataFrame:
    """Read a CSV table whose names may be numbers, ``None`` or ``NA``.

    Args:
        path: The file.
        names: Columns of names, of which the table may lack some.
        text: Other columns of text; of them ``NA`` and the like are missing values, as of numbers.

    Raises:
        DataNotFoundError: If there is no such file.
        DataError: If it is no CSV table or holds no rows.
    """
    import pandas as pd

    if not path.is_file():
        raise DataNotFoundError(f"no table at {path}")
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(text, str))
        there = [name for name in names if name in table]
        table[there] = pd.read_csv(path, usecols=there, dtype=str, keep_default_na=False, na_values=[""])[there]
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise DataError(f"{path} is not a CSV table: {str(error).splitlines()[0]}") from error
    if table.empty:
        raise DataError(f"{path} holds no rows")
    return table


def refuse_nameless(table: pd.DataFrame, column: str, path: Path) -> None:
    """Refuse a table with a row whose name is missing."""
    if (empty := table[column].isna()).any():
        raise DataError(f"{path}, line {int(empty.to_numpy().argmax()) + 2}: {column} is empty")


def as_numbers(values: pd.Series, path: Path, *, may_lack: bool = True) -> pd.Series:
    """A column as numbers; a cell that holds something else, or nothing where none may be missing, is an error."""
    import pandas as pd

    number = pd.to_numeric(values, errors="coerce")
    wrong = number.isna() & (values.notna() | (not may_lack))
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise DataError(f"{path}, line {row + 2}: {values.name} must be a number, got {values.iloc[row]!r}")
    return number
