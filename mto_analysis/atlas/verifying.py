"""Measuring a random part of somebody's table again, and comparing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from mto_analysis.atlas.measuring import Entry, Protocol, loading_from
from mto_analysis.atlas.merging import Agreement, agreement, check_comparable, row_words
from mto_analysis.atlas.table import MEASUREMENT, ROW
from mto_analysis.errors import DataError

# Rows named in a message.
_NAMED = 3


class Sample(NamedTuple):
    """Measurements of a table that are made again."""

    rows: pd.DataFrame
    wanted: dict[Entry, Protocol]


def sample_table(table: pd.DataFrame, fraction: float, *, seed: int, protocol: Protocol) -> Sample:
    """Sample checkpoints of a table, with all their rows.

    Args:
        table: From :func:`~mto_analysis.atlas.table.read_table`.
        fraction: Of its checkpoints, above 0 and up to 1; at least one is sampled.
        seed: Of the sample.
        protocol: Batch size and device; everything that numbers depend on is as in the table.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    keys = ["checkpoint", *MEASUREMENT]
    first = table.drop_duplicates(keys).sort_values(keys, ignore_index=True)
    sampled = random.Random(seed).sample(range(len(first)), math.ceil(fraction * len(first)))
    rows = table.merge(first.iloc[sampled][keys], on=keys)
    # A merged table may have rows of one checkpoint that were measured in several ways.
    ways = rows.drop_duplicates([*keys, "measures", "precision"]).sort_values(keys, kind="stable", ignore_index=True)
    several = set(ways["checkpoint"][ways.duplicated("checkpoint")])
    wanted: dict[Entry, Protocol] = {}
    for number, row in enumerate(ways.to_dict("records")):
        name = f"{row['checkpoint']}-{number}" if row["checkpoint"] in several else row["checkpoint"]
        entry = Entry(name, row["source"], row["file_sha256"])
        try:
            wanted[entry] = replace(
                protocol,
                seed=int(row["mask_seed"]),
                masks_per_image=int(row["masks_per_image"]),
                measures=row["measures"],
                precision=row["precision"],
                loading=replace(loading_from(row["loading"]), weights=row["weights"], offline=protocol.loading.offline),
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"{row['checkpoint']} cannot be measured as the table states: {error}") from error
    return Sample(rows, wanted)


def compare_again(sample: Sample, again: pd.DataFrame) -> tuple[pd.DataFrame, Agreement]:
    """Compare the sampled rows with what was measured again.

    Args:
        sample: Of the table.
        again: The table of the new measurement, where anything was measured.

    Returns:
        A row per checkpoint with ``rows``, ``compared``, ``of_tolerance`` (the largest difference, as a fraction of its
        tolerance) and ``agrees``; and the rows themselves.
    """
    check_comparable({"the table": sample.rows, "the new measurement": again})
    found = agreement(sample.rows, again)
    of = found.rows.assign(of_tolerance=found.rows["difference"] / found.rows["tolerance"]).groupby("checkpoint")
    summary = sample.rows.groupby("checkpoint").size().to_frame("rows")
    summary["compared"] = of.size().reindex(summary.index, fill_value=0)
    summary["of_tolerance"] = of["of_tolerance"].max().reindex(summary.index)
    in_one = _in_one(sample, again)["checkpoint"]
    summary["agrees"] = of["agrees"].all().reindex(summary.index, fill_value=False) & ~summary.index.isin(in_one)
    return summary.reset_index(), found


def check_complete(sample: Sample, again: pd.DataFrame) -> None:
    """Refuse a table that lacks rows of what was measured again, or has others."""
    in_one = _in_one(sample, again)
    words = []
    same = sample.rows.merge(again[list(MEASUREMENT)].drop_duplicates(), on=list(MEASUREMENT))
    if nothing := sorted({*sample.rows["checkpoint"]} - {*same["checkpoint"]}):
        words.append(
            f"nothing measured again is of the file, weights and options that are stated of {', '.join(nothing)}"
        )
    for side, what in (("right_only", "the table lacks"), ("left_only", "there is again no measurement of")):
        rows = in_one[in_one["_merge"] == side]
        if len(rows):
            named = "; ".join(row_words(row) for row in rows.head(_NAMED).to_dict("records"))
            words.append(
                f"{what} {len(rows)} row{'s' * (len(rows) > 1)}: {named}{'; ...' if len(rows) > _NAMED else ''}"
            )
    if words:
        raise DataError(f"{'; '.join(words)}; the others agree")


def _in_one(sample: Sample, again: pd.DataFrame) -> pd.DataFrame:
    """Rows of what was measured again that only one table has."""
    names = sample.rows[["checkpoint", *MEASUREMENT]].drop_duplicates()
    there = names.merge(again[[*MEASUREMENT, *ROW]].drop_duplicates(), on=list(MEASUREMENT))
    claimed = sample.rows[there.columns].merge(there[list(MEASUREMENT)].drop_duplicates(), on=list(MEASUREMENT))
    both = claimed.merge(there, how="outer", on=list(there.columns), indicator=True)
    return both[both["_merge"] != "both"]
