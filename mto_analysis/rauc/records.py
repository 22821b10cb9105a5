"""Comparisons as records for JSON, as numbers for CSV, and as tables to read, one of them laid out like Table 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mto_analysis.rauc.aggregates import IMPROVEMENT, INTERVAL_METHOD, MEASURES, Aggregates
from mto_analysis.rauc.comparison import Comparison
from mto_analysis.rauc.intervals import Interval, no_interval

#: Noisy curves logged at every epoch cross thousands of times; so many of the first places are listed.
_MOST_CROSSINGS = 20


#: Raised when a key of :func:`as_record` is renamed, removed or changes its meaning.
SCHEMA_VERSION = 1


def as_record(
    comparison: Comparison, axis: str = "epoch", logs: Sequence[Mapping[str, Any]] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A comparison as JSON has it: numbers, null where undefined, words for the intervals, and what was read."""
    record = {"schema_version": SCHEMA_VERSION, "kind": "comparison", "axis": axis, **vars(comparison)}
    record |= {"logs": list(logs), "notes": [*notes, *comparison.notes]}
    for key, value in record.items():
        if isinstance(value, Interval):
            record[key] = _interval_record(value)
    record["lead_changes"] = len(comparison.crossings)
    record["crossings"] = list(comparison.crossings[:_MOST_CROSSINGS])
    record["bounds"] = dict(zip(("low", "high"), comparison.bounds, strict=True))
    return {key: _finite(value) for key, value in record.items()}


def _interval_record(interval: Interval) -> dict[str, Any]:
    return {**{key: _finite(value) for key, value in vars(interval).items()}, "text": str(interval)}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_frame(comparisons: Sequence[Comparison], axis: str = "epoch") -> pd.DataFrame:
    """One row of numbers per comparison."""
    rows = []
    for one in comparisons:
        row = {
            "baseline": one.baseline,
            "target": one.target,
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
            **_ends("mean_lead", one.mean_lead_interval),
            "final_baseline": one.final_baseline,
            "final_gap": one.final_gap,
            **_ends("final_gap", one.final_gap_interval),
            "epochs_to_final": one.epochs_to_final,
            "share_saved": one.share_saved,
            **_ends("share_saved", one.share_saved_interval),
            "lead_changes": len(one.crossings),
            "last_crossing": one.crossings[-1] if one.crossings else None,
            "bound_low": one.bounds[0],
            "bound_high": one.bounds[1],
            "runs_baseline": len(one.seeds_baseline),
            "runs_target": len(one.seeds_target),
            "paired": one.paired,
            "pairing": one.pairing,
        }
        groups = {f"{name} (group)" if name in row else name: value for name, value in one.group.items()}
        rows.append({"baseline": one.baseline, "target": one.target, **groups, **row})
    return pd.DataFrame(rows)


def _ends(name: str, interval: Interval) -> dict[str, float | None]:
    return {f"{name}_low": interval.low, f"{name}_high": interval.high}


def _ratio(comparison: Comparison) -> str:
    return "undefined" if comparison.rauc is None else comparison.interval.around(comparison.rauc, default=".2f")


def ratio_in_words(comparison: Comparison) -> str:
    """``1.31 [1.08, 1.62]``; the ratio alone where its interval is not bounded, ``undefined`` where there is none."""
    bounded = comparison.rauc is not None and comparison.interval.kind == "bounded"
    return _ratio(comparison) + (f" {comparison.interval}" if bounded else "")


def _and_interval(
    value: float | None, interval: Interval, *, scale: float = 1.0, sign: str = "", unit: str = ""
) -> str:
    """``+0.37 [0.12, 0.62]``; without an interval the value alone."""
    said = "" if value is None else interval.around(value, scale=scale, sign=sign)
    words = interval.words(scale)
    if interval.kind == "bounded":
        return f"{said} {words}{unit}".strip()
    said += unit if said else ""
    return f"{said} ({words}{unit})".strip() if interval.kind in ("above", "below") else said


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
        row[f"({one.start:g}, {one.end:g})"] = ratio_in_words(one)
    return pd.DataFrame(list(rows.values())).fillna("")


def details(comparisons: Sequence[Comparison], axis: str = "epoch") -> pd.DataFrame:
    """What stands beside each ratio: a column per comparison, a row per quantity."""
    unit = {"epoch": "epochs", "step": "steps"}.get(axis, axis)
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
            "mean lead": _and_interval(one.mean_lead, one.mean_lead_interval, sign="+"),
            "baseline's final score": f"{one.final_baseline:.6g}",
            "final gap": _and_interval(one.final_gap, one.final_gap_interval, sign="+"),
            f"{unit} to the baseline's final score": reached,
            "share saved": _and_interval(one.share_saved, one.share_saved_interval, scale=100, unit=" %"),
            "lead changes at": _places(one.crossings),
            "runs (baseline, target)": f"{len(one.seeds_baseline)}, {len(one.seeds_target)}",
            "pairing": one.pairing,
        }
    return pd.DataFrame(columns).fillna("").rename_axis("").reset_index()


def aggregate_record(found: Aggregates, axis: str = "epoch") -> dict[str, Any]:
    """Estimates over tasks as JSON has them; curves and profiles are in the tables of ``--out``."""
    estimates = []
    for row in found.estimates.to_dict("records"):
        interval = _interval(row)
        kept = {str(key): _finite(value) for key, value in row.items() if key not in ("low", "high", "confidence")}
        estimates.append({**kept, "interval": _interval_record(interval)})
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "aggregate",
        "axis": axis,
        "start": found.start,
        "end": found.end,
        "tasks": list(found.tasks),
        "estimates": estimates,
        "notes": list(found.notes),
    }


def aggregate_table(found: Aggregates) -> pd.DataFrame:
    """A row per measure and method, a column per statistic, each with its interval."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in found.estimates.to_dict("records"):
        measure, method = str(one["measure"]), str(one["method"])
        row = rows.setdefault((measure, method), {"measure": measure, "method": method})
        over = f" over {one['baseline']}" if one["statistic"] == IMPROVEMENT else ""
        row[f"{one['statistic']}{over}"] = _and_interval(one["value"], _interval(one))
    in_order = [row for measure in MEASURES for row in rows.values() if row["measure"] == measure]
    return pd.DataFrame(in_order).fillna("")


def _interval(row: Mapping[Any, Any]) -> Interval:
    """The interval of an estimate over tasks, from its ends: NaN where there is none."""
    if math.isnan(row["low"]):
        return no_interval(INTERVAL_METHOD, "one run on a task", row["confidence"], row["runs"])
    return Interval.between(INTERVAL_METHOD, row["low"], row["high"], row["confidence"], row["runs"])
