"""The atlas as one table: a row per checkpoint, stack, layer depth and measure, as Parquet and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.runtime.outputs import csv_bytes

#: Raised whenever a column changes its name or its meaning; tables of other versions are refused.
SCHEMA_VERSION = 1

#: Both files of a table in a folder.
TABLE_FILES = ("atlas.parquet", "atlas.csv")


class Column(NamedTuple):
    """A column of the table."""

    name: str
    kind: Literal["text", "integer", "number"]
    meaning: str
    optional: bool = False


COLUMNS = (
    Column("schema_version", "integer", "Of this table."),
    Column("checkpoint", "text", "Id of the registry, or the name that was given: letters, digits, dots, _ and -."),
    Column("source", "text", "Where the file is: id of the registry, hub address, URL or path."),
    Column("file_sha256", "text", "SHA-256 of the weights, over all files of a folder in order."),
    Column("hash_compared_with", "text", "What the file's hash was compared with: published, recorded, or neither."),
    Column("weights", "text", "model, or model_ema for the moving average inside the file."),
    Column("loading", "text", "What was given for what the file leaves open, such as head counts, as JSON."),
    Column("family", "text", "Architecture."),
    Column("style", "text", "Where masked tokens live: inpainting or decoder."),
    Column("layout", "text", "Whose file format it is."),
    Column("evidence", "text", "What reading this format was tried on: original code, slow reference or key names."),
    Column("backbone", "text", "Encoder, as the authors call it; empty outside the registry."),
    Column("epochs", "integer", "Of pre-training, where published.", optional=True),
    Column("image_size", "text", "Of the model, in pixels: the side, or HEIGHTxWIDTH."),
    Column("patch_size", "integer", "Side of a patch in pixels."),
    Column("config", "text", "Settings of the architecture, with the head counts used, as JSON."),
    Column("assumptions", "text", "What neither the file nor its shapes settle."),
    Column("mask_rule", "text", "How masks were sampled, and where that rule is from."),
    Column("mask_seed", "integer", "Seed of the random masks."),
    Column("masks_per_image", "integer", "Masks of each image, whose values are averaged first."),
    Column("masks_sha256", "text", "SHA-256 of all masks by image name."),
    Column("image_set", "text", "Name of the image set."),
    Column("images_sha256", "text", "SHA-256 over names and contents of the images that were measured."),
    Column("measures", "text", "What was asked to be measured."),
    Column("own_loss", "number", "The model's own loss on up to 16 images.", optional=True),
    Column("own_loss_of_mean", "number", "The same of predicting the mean.", optional=True),
    Column("own_loss_target", "text", "What the loss is of; empty for models that predict no pixels."),
    Column("precision", "text", "Of the model's forward: fp64, fp32, fp16 or bf16."),
    Column("hardware", "text", "Processor or GPU."),
    Column("mto_analysis_version", "text", "Version of this package."),
    Column("torch_version", "text", "Version of torch."),
    Column("timm_version", "text", "Version of timm."),
    Column("contributor", "text", "Who measured, if they say so."),
    Column("stack", "text", "Stack of layers that holds masked tokens."),
    Column("layer_depth", "integer", "Layers passed; 0 is the input of the first."),
    Column("measure", "text", "Name of the measure."),
    Column("head", "integer", "Attention head, counted from 1, of a measure per head.", optional=True),
    Column("other_stack", "text", "Second stack of a measure that compares two layers, if it is another."),
    Column("other_layer_depth", "integer", "Second layer depth of such a measure.", optional=True),
    Column("value", "number", "Mean over images, or number of all images together."),
    Column("ci_low", "number", "Lower end of the 95 % interval over images, where there is one.", optional=True),
    Column("ci_high", "number", "Upper end.", optional=True),
    Column("num_images", "integer", "Images that the value is of."),
    Column("num_visible", "number", "Mean number of visible tokens."),
)

#: What all rows have in common; otherwise they could not be compared.
SHARED = ("images_sha256", "mask_seed", "masks_per_image")
#: What a measurement is of: equal in two tables, the values must be, too.
MEASUREMENT = ("file_sha256", "weights", "loading")
#: What a row is of, within a measurement.
ROW = ("stack", "layer_depth", "measure", "head", "other_stack", "other_layer_depth")

#: Of checkpoints: files are called after them, so a name from a table of somebody's must not lead to another folder.
NAME = re.compile(r"[^\W_][\w.-]{0,99}")  # figures skip labels that begin with _
_PATTERNS = {
    **dict.fromkeys(("file_sha256", "masks_sha256", "images_sha256"), re.compile("[0-9a-f]{64}")),
    "weights": re.compile("model|model_ema"),
    "style": re.compile("inpainting|decoder"),
    "precision": re.compile("fp64|fp32|fp16|bf16"),
    "checkpoint": NAME,
    **dict.fromkeys(("stack", "measure"), re.compile(r"\S(.*\S)?")),
}
_FLOORS = {"layer_depth": 0, "num_images": 1, "masks_per_image": 1, "patch_size": 1, "num_visible": 1}
# Rounding of H, which is computed in float32 or better.
_SLACK = 1e-5
# Columns named in a message.
_NAMED = 5


def _schema() -> pa.Schema:
    kinds = {"text": pa.string(), "integer": pa.int64(), "number": pa.float64()}
    return pa.schema([pa.field(each.name, kinds[each.kind]) for each in COLUMNS])


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """A table as a Parquet file; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(table, _schema(), preserve_index=False), buffer)
    return buffer.getvalue()


def read_table(source: str | Path) -> pd.DataFrame:
    """Read a table and check it.

    Args:
        source: A ``.parquet`` or ``.csv`` file, or a folder with ``atlas.parquet``.

    Raises:
        DataNotFoundError: If there is none.
        DataError: If it is not one of this version, or a value cannot be; names column and row.
    """
    import pyarrow.csv

    path = Path(source).expanduser()
    path = path / TABLE_FILES[0] if path.is_dir() else path
    if not path.is_file():
        raise DataNotFoundError(f"no atlas at {path}")
    schema, names = _schema(), _header(path)
    try:
        if path.suffix.lower() == ".csv":
            types = {field.name: field.type for field in schema}
            options = pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=False)
            _check_columns(path, names)
            content = pyarrow.csv.read_csv(path, convert_options=options)
        else:
            content = pq.read_table(path)
        _check_columns(path, content.column_names)
        found = content.select(schema.names).cast(schema)
    except (OSError, pa.ArrowException) as error:
        words = re.sub(r"CSV column #(\d+)", lambda at: f"the column {names[int(at[1])]}", str(error))
        words = re.sub(r"Could not open Parquet input source .*", "no Parquet file", " ".join(words.split()))
        raise DataError(f"{path} is not a table of an atlas: {words}") from error
    table: pd.DataFrame = found.to_pandas().astype({each.name: "Int64" for each in COLUMNS if _is_whole(each)})
    check_table(table, str(path))
    return table


def _is_whole(column: Column) -> bool:
    """Whether it holds whole numbers that may be missing."""
    return column.kind == "integer" and column.optional


def _header(path: Path) -> list[str]:
    """Column names of a CSV file, whatever else may be wrong with it."""
    if path.suffix.lower() != ".csv":
        return []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader([file.readline(2**16)]), [])


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    known = [each.name for each in COLUMNS]
    lacking, unknown = ([name for name in a if name not in b] for a, b in ((known, columns), (columns, known)))
    if len(columns) == 1 and ";" in columns[0]:
        raise DataError(f"{path} has all columns in one: save it with commas between columns and points in numbers")
    if lacking or unknown:
        words = [
            f"{what} {', '.join(repr(name)[1:-1] or 'a column without a name' for name in names[:_NAMED])}"
            + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            for what, names in (("lacks", lacking), ("has unknown", unknown))
            if names
        ]
        raise DataError(f"{path} is not a table of an atlas of version {SCHEMA_VERSION}: it {' and '.join(words)}")
    if twice := [name for name in known if list(columns).count(name) > 1]:
        raise DataError(f"{path} has the column {twice[0]} twice")


def _as_written(loading: str) -> str:
    try:
        return json.dumps(json.loads(loading), sort_keys=True)
    except ValueError:
        return ""


def check_table(table: pd.DataFrame, where: str) -> None:
    """Check that every value of a table can be, as far as that shows without measuring.

    Args:
        table: With the columns of :data:`COLUMNS`.
        where: It is from, for messages.
    """

    def refuse(bad: pd.Series, column: str, words: str) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            of = f"row {row + 1} ({table['checkpoint'].iloc[row]})"
            raise DataError(f"{where}: {of} has {column} {table[column].iloc[row]}, {words}")

    if table.empty:
        raise DataError(f"{where} has no rows")
    refuse(table["schema_version"] != SCHEMA_VERSION, "schema_version", f"read is {SCHEMA_VERSION}")
    for column in COLUMNS:
        if not column.optional:
            refuse(table[column.name].isna(), column.name, "and every row needs one")
        if column.kind == "number":
            refuse(np.isinf(table[column.name]), column.name, "which is not finite")
    for name, pattern in _PATTERNS.items():
        refuse(~table[name].map(lambda text, of=pattern: bool(of.fullmatch(text))), name, "which cannot be")
    # Compared as text, so there is one way to write it.
    refuse(table["loading"].map(_as_written) != table["loading"], "loading", "which atlas does not write so")
    for name, floor in _FLOORS.items():
        refuse(table[name] < floor, name, f"the smallest is {floor}")
    of_h = table["measure"] == "heterogeneity"
    for name, sign in (("ci_low", 1), ("ci_high", -1)):
        refuse(of_h & (table["num_images"] > 1) & table[name].isna(), name, "and H of several images has an interval")
        refuse(of_h & (sign * (table[name] - table["value"]) > _SLACK), name, "on the wrong side of the value")
    bound = np.log(table["num_visible"].where(of_h, 1.0))
    outside = (table["value"] < -_SLACK) | (table["value"] > bound + _SLACK)
    refuse(of_h & outside, "value", "and H lies between 0 and log(num_visible)")
    for name in SHARED:
        refuse(table[name] != table[name].iloc[0], name, f"and row 1 has {table[name].iloc[0]}: all need the same")
    several_masks = table.groupby(list(MEASUREMENT))["masks_sha256"].transform("nunique") > 1
    refuse(several_masks, "masks_sha256", "and another row of the same checkpoint has another one")
    refuse(table.duplicated(["checkpoint", *MEASUREMENT, *ROW]), "checkpoint", "with a measure of a layer given before")


def join_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables below each other, in the one order that all tables have."""
    joined = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[each.name for each in COLUMNS])
    keys = ["checkpoint", *MEASUREMENT, "measure", *ROW]
    return joined.sort_values(list(dict.fromkeys(keys)), ignore_index=True)[[each.name for each in COLUMNS]]


def table_outputs(table: pd.DataFrame) -> dict[str, bytes]:
    """Both files of a table."""
    return dict(zip(TABLE_FILES, (parquet_bytes(table), csv_bytes(table)), strict=True))
