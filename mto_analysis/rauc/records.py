"""Comparisons as records for JSON, as numbers for CSV, and as tables to read, one of them laid out like Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mto_analysis.rauc.comparison import Comparison

__all__ = ["as_frame", "as_record", "details", "table1"]


#: Noisy curves logged at every epoch cross thousands of times; so many of the first places are listed.
_MOST_CROSSINGS = 20


def as_record(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON has it: numbers, null where undefined, and words for the intervals."""
    record = {**vars(comparison)}
    for key in ("interval", "bootstrap"):
        record[key] = {**vars(record[key]), "text": str(record[key])}
    record["lead_changes"] = len(comparison.crossings)
    record["crossings"] = list(comparison.crossings[:_MOST_CROSSINGS])
    record["bounds"] = dict(zip(("low", "high"), comparison.bounds, strict=True))
    return {key: _finite(value) for key, value in record.items()}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_frame(comparisons: Sequence[Comparison], axis: str = "epoch") -> pd.DataFrame:
    """One row of numbers per comparison."""
    return pd.DataFrame(
        {
            "baseline": one.baseline,
            "target": one.target,
            **one.group,
            "axis": axis,
            "start": one.start,
            "end": one.end,
            "rauc": one.rauc,
            "reason": one.reason,
            "low": one.interval.low if one.interval.kind == "bounded" else None,
            "high": one.interval.high if one.interval.kind == "bounded" else None,
            "interval": str(one.interval),
            "interval_method": one.interval.method,
            "bootstrap_low": one.bootstrap.low,
            "bootstrap_high": one.bootstrap.high,
            "confidence": one.interval.confidence,
            "numerator": one.numerator,
            "denominator": one.denominator,
            "reference": one.reference,
            "area_difference": one.area_difference,
            "mean_lead": one.mean_lead,
            "final_baseline": one.final_baseline,
            "final_gap": one.final_gap,
            "epochs_to_final": one.epochs_to_final,
            "share_saved": one.share_saved,
            "lead_changes": len(one.crossings),
            "last_crossing": one.crossings[-1] if one.crossings else None,
            "bound_low": one.bounds[0],
            "bound_high": one.bounds[1],
            "runs_baseline": len(one.seeds_baseline),
            "runs_target": len(one.seeds_target),
            "paired": one.paired,
        }
        for one in comparisons
    )


def _ratio(comparison: Comparison) -> str:
    return "undefined" if comparison.rauc is None else f"{comparison.rauc:.2f}"


def _places(crossings: Sequence[float]) -> str:
    places = ", ".join(f"{x:.4g}" for x in crossings[:4])
    return (f"{places} and {len(crossings) - 4} more" if len(crossings) > 4 else places) or "never"


def table1(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Rows of pairs, columns of windows, as in the paper's Table 1; an interval follows its ratio."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for one in comparisons:
        row = rows.setdefault(
            (one.baseline, one.target, *one.group.values()), {"S1": one.baseline, "S2": one.target, **one.group}
        )
        bounded = f" {one.interval}" if one.rauc is not None and one.interval.kind == "bounded" else ""
        row[f"({one.start:g}, {one.end:g})"] = _ratio(one) + bounded
    return pd.DataFrame(list(rows.values())).fillna("")


def details(comparisons: Sequence[Comparison], axis: str = "epoch") -> pd.DataFrame:
    """What stands beside each ratio: a column per comparison, a row per quantity."""
    unit = {"epoch": "epochs"}.get(axis, axis)
    columns = {}
    for one in comparisons:
        per_cent = f"{100 * one.interval.confidence:g} %"
        low, high = ("none" if bound is None else f"{bound:.2f}" for bound in one.bounds)
        reached = "not reached" if one.epochs_to_final is None else f"{one.epochs_to_final:.4g}"
        name = " ".join([f"{one.target} / {one.baseline}", *one.group.values(), f"({one.start:g}, {one.end:g})"])
        columns[name] = {
            "RAUC": _ratio(one),
            f"{per_cent} interval ({one.interval.method})": str(one.interval),
            f"{per_cent} bootstrap (whole runs, BCa)": str(one.bootstrap),
            "numerator (target's area)": f"{one.numerator:.6g}",
            "denominator (baseline's area)": f"{one.denominator:.6g}",
            "reference": f"{one.reference:.6g}",
            "bounds of monotone curves": f"{low} to {high}",
            "area difference": f"{one.area_difference:.6g}",
            "mean lead": f"{one.mean_lead:+.3g}",
            "baseline's final score": f"{one.final_baseline:.6g}",
            "final gap": f"{one.final_gap:+.3g}",
            f"{unit} to the baseline's final score": reached,
            "share saved": "" if one.share_saved is None else f"{100 * one.share_saved:.1f} %",
            "lead changes at": _places(one.crossings),
            "runs (baseline, target)": f"{len(one.seeds_baseline)}, {len(one.seeds_target)}",
        }
    return pd.DataFrame(columns).fillna("").rename_axis("").reset_index()
