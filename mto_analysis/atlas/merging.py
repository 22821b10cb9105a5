"""Tables of different people as one, and whether measurements of the same thing agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mto_analysis.atlas.table import MEASUREMENT, ROW, check_table, join_tables
from mto_analysis.errors import DataError

#: How far two measurements may be apart, as a fraction of the curve's largest absolute value, by the precision of the
#: forward; of two precisions the coarser counts. On the bundled models all measures differ from fp64 by up to 4e-6
#: (fp32), 2e-2 (fp16) and 9e-2 (bf16); deeper models and other hardware round more.
TOLERANCES = {"fp64": 1e-6, "fp32": 1e-3, "fp16": 5e-2, "bf16": 1.5e-1}
_NUMBERS = ("value", "ci_low", "ci_high")
_OF_LOSS = ("own_loss", "own_loss_of_mean")
#: What follows from file, images and masks; texts may be put in other words by another version.
_COUNTS = ("num_images", "num_visible")
_FROM_FILE = ("family", "style", "layout", "image_size", "patch_size", "config", "own_loss_target")
#: And from where the file is, which the registry may know.
_FROM_SOURCE = ("assumptions", "backbone", "epochs", "evidence", "mask_rule")
# What a difference may come from.
_MADE_WITH = ("precision", "hardware", "mto_analysis_version")
# Rows named in a message.
_NAMED = 5


class Agreement(NamedTuple):
    """How well two tables agree on what both have measured.

    Attributes:
        rows: A row per measure of a layer of both, with both values, ``difference`` (of value, interval and own loss
            the largest, as a fraction of the curve's largest absolute value, or of the loss), ``tolerance``,
            ``agrees``, and ``differs``: the first column that does not agree.
    """

    rows: pd.DataFrame

    @property
    def largest(self) -> float:
        """The largest difference, as a fraction of the tolerance."""
        return float((self.rows["difference"] / self.rows["tolerance"]).max()) if len(self.rows) else 0.0

    def check(self) -> None:
        """Refuse what does not agree."""
        bad = self.rows[~self.rows["agrees"]]
        if bad.empty:
            return
        words = []
        # What is said of the checkpoint is in all its rows.
        named = bad[bad["differs"].isin(_NUMBERS) | ~bad.duplicated(["checkpoint", "differs"])]
        for _, row in named.head(_NAMED).iterrows():
            made_with = {side: ", ".join(row[f"{name}_{side}"] for name in _MADE_WITH) for side in "ab"}
            of = [row[f"{row['differs']}_{side}"] for side in "ab"]
            both = " and ".join(
                f"{f'{each:.6g}' if isinstance(each, float) else each} ({made_with[side]})"
                for each, side in zip(of, "ab", strict=True)
            )
            words.append(f"{row_words(row)}: {row['differs']} {both}")
        more = "; ..." if len(named) > _NAMED else ""
        raise DataError(
            f"{len(bad)} of {len(self.rows)} rows of both tables differ beyond rounding: {'; '.join(words)}{more}"
        )


def row_words(row: Mapping[Any, Any] | pd.Series) -> str:
    """Which row of a table this is."""
    more = [f"{name.replace('_', ' ')} {row[name]}" for name in ("head", "other_layer_depth") if not pd.isna(row[name])]
    return ", ".join([row["checkpoint"], row["stack"], f"layer depth {row['layer_depth']}", row["measure"], *more])


def check_comparable(tables: Mapping[str, pd.DataFrame]) -> None:
    """Refuse tables that are not of the same images and masks."""
    (first, table), *others = tables.items()
    for name, other in others:
        a, b = table.iloc[0], other.iloc[0]
        for columns, what, words in (
            (("images_sha256",), "images", "{num_images} of {image_set}, sha256 {images_sha256:.8}..."),
            (("mask_seed", "masks_per_image"), "masks", "seed {mask_seed}, {masks_per_image} per image"),
        ):
            if any(a[column] != b[column] for column in columns):
                both = " and ".join(words.format_map(row.to_dict()) for row in (a, b))
                raise DataError(f"{first} and {name} are of different {what}: {both}; only like tables can be merged")
        about_masks = ["checkpoint", "masks_sha256", "mask_rule"]
        of_a, of_b = (each.groupby(list(MEASUREMENT))[about_masks].first() for each in (table, other))
        joined = of_a.merge(of_b, left_index=True, right_index=True, suffixes=("_a", "_b"))
        for row in joined[joined["masks_sha256_a"] != joined["masks_sha256_b"]].itertuples():
            raise DataError(
                f"{row.checkpoint_a} has different masks in {first} ({row.mask_rule_a}) and in {name} "
                f"({row.mask_rule_b}); only like tables can be merged"
            )


def agreement(a: pd.DataFrame, b: pd.DataFrame) -> Agreement:
    """Compare what two tables have both measured.

    Args:
        a: A table.
        b: Another one, of the same images and masks.
    """
    key = [*MEASUREMENT, *ROW]
    columns = ["checkpoint", "source", *_MADE_WITH, *_NUMBERS, *_OF_LOSS, *_COUNTS, *_FROM_FILE, *_FROM_SOURCE]
    both = a[key + columns].merge(b[key + columns], on=key, suffixes=("_a", "_b"))
    rows = both.rename(columns={"checkpoint_a": "checkpoint"})
    of_curve = rows.groupby([each for each in key if not each.endswith("layer_depth")], dropna=False)
    scale = of_curve["value_a"].transform(lambda each: each.abs().max())
    same_version = rows["mto_analysis_version_a"] == rows["mto_analysis_version_b"]
    same_source = same_version & (rows["source_a"] == rows["source_b"])

    def apart(number: str, of: pd.Series) -> pd.Series:
        first, second = rows[f"{number}_a"], rows[f"{number}_b"]
        difference = (first - second).abs()
        # Infinite where only one has it, and of a curve that is zero in one table alone.
        fraction = (difference / of.where(of > 0)).fillna(np.inf).where(difference > 0, 0.0)
        return fraction.where(first.isna() == second.isna(), np.inf)

    def unlike(name: str, where: pd.Series) -> pd.Series:
        return (where & (rows[f"{name}_a"].map(str) != rows[f"{name}_b"].map(str))).map({True: np.inf, False: 0.0})

    differences = {
        **{name: apart(name, scale) for name in _NUMBERS},
        **{name: apart(name, rows[f"{name}_a"].abs()) for name in (*_OF_LOSS, *_COUNTS)},
        **{name: unlike(name, same_version) for name in _FROM_FILE},
        **{name: unlike(name, same_source) for name in _FROM_SOURCE},
    }
    each = np.stack([column.to_numpy(float) for column in differences.values()])
    rows["difference"] = each.max(axis=0)
    rows["tolerance"] = np.maximum(rows["precision_a"].map(TOLERANCES), rows["precision_b"].map(TOLERANCES))
    rows["agrees"] = rows["difference"] <= rows["tolerance"]
    rows["differs"] = np.array(list(differences))[(each > rows["tolerance"].to_numpy(float)).argmax(axis=0)]
    return Agreement(rows)


def merge_tables(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, Agreement]:
    """Join tables of the same images and masks; what several have measured must agree.

    Of equal rows the one of the finest precision stays, then that of the first table.

    Args:
        tables: At least two, by a name for messages.

    Returns:
        The table, and how well the tables agree.
    """
    if len(tables) < 2:
        raise ValueError(f"give at least two different tables to merge, got {len(tables)}")
    check_comparable(tables)
    merged, found = next(iter(tables.values())), []
    for table in list(tables.values())[1:]:
        compared = agreement(merged, table)
        compared.check()
        found.append(compared.rows)
        finest_first = pd.concat([merged, table], ignore_index=True)
        finest_first = finest_first.sort_values("precision", key=lambda each: each.map(TOLERANCES), kind="stable")
        merged = join_tables([finest_first.drop_duplicates(["checkpoint", *MEASUREMENT, *ROW])])
    check_table(merged, "the merged table")
    return merged, Agreement(pd.concat(found, ignore_index=True))


def describe(found: Agreement) -> str:
    """In a sentence, how well tables agree."""
    if found.rows.empty:
        return "no row is in two of them"
    largest = f"the largest difference is {found.largest:.2g} of its tolerance"
    return f"{len(found.rows)} rows are in two of them and agree: {largest}"
