"""Does a measure go with accuracy? Rank correlations over checkpoints, given other measures, and what they allow.

Checkpoints of one run are not independent, and seeds of one method are luck and not further methods. So there are two
questions, each with its own unit: *across methods*, seeds are averaged and each method counts once, at its last epoch;
*within runs*, the correlation over the epochs of a run is one number, and runs are what the interval is over. As both a
measure and accuracy change with training time, the second is also asked with the epoch held constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.rauc.curves import CurveTable, Source, read_curves, refuse_different_scores
from mto_analysis.runtime.statistics import reach_of_mean, t_quantile
from mto_analysis.runtime.tables import as_numbers, read_table, refuse_nameless

Vector = NDArray[np.float64]

#: With fewer methods than this, plus one per measure that is held constant, nothing is concluded across methods.
FEWEST_METHODS = 10
#: With fewer runs than this nothing is concluded within runs.
FEWEST_RUNS = 5
#: Epochs that a run needs for a correlation over them, and for one with the epoch held constant.
FEWEST_EPOCHS, FEWEST_EPOCHS_GIVEN_TIME = 4, 5

# With at most so many values every permutation is tried: 5040.
_MOST_PERMUTED = 7

#: Which layer depths stand for a model.
LAYERS = ("first", "last", "mean")

_KEYS = ["method", "seed", "epoch"]
# What a label says of a checkpoint, where the table has no column for it.
_LABEL = {"seed": r"(?:(?:@|,? seed )(?P<seed>\w+))?", "epoch": r"(?:,? epoch (?P<epoch>\d+))?"}


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval.

    Attributes:
        value: From -1 to 1; NaN where one of both is constant.
        low: Of the interval; NaN where there are too few.
        high: The same.
        p: Probability of one as far from 0 without any relation, two-sided.
        number: Of what it is over.
    """

    value: float
    low: float
    high: float
    p: float
    number: int


_UNDEFINED = (math.nan,) * 4


def rank_correlation(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Correlation:
    r"""Spearman's rank correlation, with the interval of Bonett and Wright and, of few values, an exact p.

    .. math:: \tanh\Bigl(\operatorname{artanh} \rho \pm z \sqrt{(1 + \rho^2 / 2) / (n - 3)}\Bigr)

    Shapes:
        x, y: number

    Source:
        Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman correlations" (2000).

    Example:
        >>> round(rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]).value, 6)
        0.8
    """
    return partial_rank_correlation(x, y, np.empty((len(np.asarray(x)), 0)), confidence)


def partial_rank_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike, confidence: float = 0.95) -> Correlation:
    """Spearman's rank correlation of what linear functions of other ranks leave of both.

    Degrees of freedom and the interval count each of the others as one value less.

    Shapes:
        x, y: number
        given: number others

    Example:
        >>> x = np.arange(12.0)
        >>> round(partial_rank_correlation(x, x + [0, 3] * 6, x[:, None]).value, 3)  # nothing is left of x
        nan
    """
    from scipy.special import stdtr
    from scipy.stats import norm, rankdata

    columns = np.column_stack([np.asarray(x, float), np.asarray(y, float), np.asarray(given, float)])
    if not np.isfinite(columns).all():
        raise ValueError("ranks need finite values")
    number, others = len(columns), columns.shape[1] - 2
    freedom = number - 2 - others
    ranks = rankdata(columns, axis=0) - (number + 1) / 2
    fit = np.linalg.lstsq(ranks[:, 2:], ranks[:, :2], rcond=None)[0]
    left = ranks[:, :2] - ranks[:, 2:] @ fit
    spread = np.sqrt((left**2).sum(axis=0))
    if freedom < 1 or (spread <= 1e-6 * np.sqrt((ranks[:, :2] ** 2).sum(axis=0).clip(1e-300))).any():
        return Correlation(*_UNDEFINED, number)
    value = float(np.clip(left[:, 0] @ left[:, 1] / spread.prod(), -1, 1))
    statistic = value * math.sqrt(freedom / max(1 - value**2, 1e-300))
    p = float(2 * stdtr(freedom, -abs(statistic)))
    if not others and number <= _MOST_PERMUTED:
        products = [left[:, 0] @ left[list(order), 1] for order in itertools.permutations(range(number))]
        p = float(np.mean(np.abs(products) >= abs(left[:, 0] @ left[:, 1]) - 1e-9))
    if freedom < 2 or abs(value) == 1:
        return Correlation(value, math.nan, math.nan, p, number)
    reach = norm.ppf(0.5 + confidence / 2) * math.sqrt((1 + value**2 / 2) / (freedom - 1))
    low, high = np.tanh(np.arctanh(value) + np.array([-reach, reach]))
    return Correlation(value, float(low), float(high), p, number)


def _mean_over_runs(values: Sequence[float], confidence: float) -> Correlation:
    """Mean of the runs' correlations, with Student's interval, and its p."""
    from scipy.special import stdtr

    x = np.asarray(values, float)
    if len(x) < 2:
        return Correlation(float(x.mean()) if len(x) else math.nan, math.nan, math.nan, math.nan, len(x))
    mean, error = float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))
    reach = float(t_quantile(len(x) - 1, confidence)) * error
    # Where all agree, the share of signs that are as far from 0.
    p = float(2 * stdtr(len(x) - 1, -abs(mean) / error)) if error > 1e-9 else 2.0 ** (1 - len(x)) if mean else 1.0
    return Correlation(mean, max(mean - reach, -1.0), min(mean + reach, 1.0), p, len(x))


def holm(p: ArrayLike) -> Vector:
    """P-values as they are after Holm's correction for their number; those that are NaN are no comparison.

    Source:
        Holm, "A simple sequentially rejective multiple test procedure" (1979).

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    given = np.asarray(p, dtype=float)
    adjusted = np.full(given.shape, np.nan)
    there = np.flatnonzero(~np.isnan(given))
    order = there[np.argsort(given[there], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * given[order]), 1.0)
    return adjusted


# ---- reading


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    return (f"{name}: ", Path(path)) if equals and not Path(text).exists() else ("", Path(text))


def _read_csv(path: Path) -> pd.DataFrame:
    return read_table(path, names=("method", "model", "checkpoint"), text=("seed", "stack"))


def _keyed(table: pd.DataFrame, path: Path, prefix: str) -> pd.DataFrame:
    """With columns method, seed and epoch, of which the last two may be empty."""
    name = next((column for column in ("method", "model", "checkpoint") if column in table), None)
    if name is None:
        raise DataError(f"{path} has neither a column model nor method, so its rows belong to no checkpoint")
    refuse_nameless(table, name, path)
    parts = "".join(part for key, part in _LABEL.items() if key not in table)
    found = table[name].str.extract(f"(?s)^(?P<method>.+?){parts}$")
    own = {key: (found if key in found else table)[key] for key in _LABEL}
    epoch = pd.to_numeric(own["epoch"], errors="coerce")
    if (odd := own["epoch"][epoch.isna() & own["epoch"].notna()]).any():
        raise DataError(f"{path}: the epoch {odd.iloc[0]!r} is no number")
    # pandas writes 0.0 for the seed 0 where another row has none.
    seed = own["seed"].fillna("").astype(str).str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    return table.assign(method=prefix + found["method"], seed=seed, epoch=epoch)


def read_measures(paths: Sequence[str]) -> pd.DataFrame:
    """Tables of measures as one: ``measures.csv``, or tables of H over layer depths (of a command, or of runs).

    A path may be given as ``NAME=FILE``, which puts the name before those of the methods. A model called ``NAME@SEED``
    or ``NAME, seed SEED`` is a seed of the method NAME, and ``NAME, seed SEED, epoch EPOCH`` a checkpoint of it. H is
    taken over its bound where all tables have that. Of attention the mean over heads is taken, of CKA the alignment
    with the last layer depth.

    Returns:
        Columns ``method seed epoch stack layer_depth measure value``.
    """
    tables = []
    for text in paths:
        prefix, path = _named_file(text)
        tables.append(_tidy(_keyed(_read_csv(path), path, prefix), path))
    whole = pd.concat(tables, ignore_index=True)
    keys = [*_KEYS, "stack", "layer_depth", "measure"]
    if (twice := whole.duplicated(keys)).any():
        row = whole[twice].iloc[0]
        seed = f", seed {row['seed']}" if row["seed"] else ""
        epoch = f", epoch {row['epoch']:g}" if pd.notna(row["epoch"]) else ""
        raise DataError(
            f"{row['method']}{seed}{epoch}: {row['measure']} at layer depth {row['layer_depth']} is in the tables "
            "twice; name the tables with NAME=FILE"
        )
    number = whole["method"].nunique()
    both = whole[whole["measure"] == "normalized_heterogeneity"]["method"].nunique()
    kept = whole[whole["measure"] != ("heterogeneity" if both == number else "normalized_heterogeneity")]
    return kept.replace({"measure": {"normalized_heterogeneity": "heterogeneity"}})


def _tidy(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    keys = [*_KEYS, "stack", "layer_depth"]
    if not {"layer_depth", "stack"} <= {*table.columns}:
        raise DataError(f"{path} is no table of measures: it lacks stack or layer_depth")
    of_numbers = {"layer_depth", "value", "heterogeneity", "normalized"} & {*table.columns}
    table = table.assign(
        stack=table["stack"].fillna(""), **{name: as_numbers(table[name], path) for name in of_numbers}
    )
    if {"measure", "value"} <= {*table.columns}:
        empty = pd.Series(pd.NA, index=table.index)
        pair = table.get("other_layer_depth", empty)
        last = table.groupby([*_KEYS, "stack"], dropna=False)["layer_depth"].transform("max")
        own = table.get("head", empty).isna() & table.get("other_model", empty).isna() & (pair.isna() | (pair == last))
        return table.loc[own & table["value"].notna(), [*keys, "measure", "value"]]
    columns = {"heterogeneity": "heterogeneity", "normalized": "normalized_heterogeneity"}
    if "heterogeneity" not in table:
        raise DataError(f"{path} is no table of measures: it has neither measure and value nor heterogeneity")
    named = table.rename(columns=columns)
    return named.melt(keys, [name for name in columns.values() if name in named], var_name="measure")


def read_scores(
    paths: Sequence[str], *, score: str | None = None, say: Callable[[str], None] = lambda finding: None
) -> pd.DataFrame:
    """Accuracies: tables ``model score`` of one row per checkpoint, or logs over epochs in any format of ``rauc``.

    Args:
        paths: Files, or ``NAME=FILE``; as for :func:`read_measures`.
        score: Column of the score, where it is not called ``score`` or ``accuracy``.
        say: Gets what a reader of the logs should know.

    Returns:
        Columns ``method seed epoch score``; the epoch is NaN where there is none.
    """
    tables: list[pd.DataFrame] = []
    logs: list[CurveTable] = []
    for text in paths:
        prefix, path = _named_file(text)
        if path.suffix == ".csv" and "epoch" not in (table := _read_csv(path)):
            name = score or next((each for each in ("score", "accuracy") if each in table), None)
            if name not in table:
                raise DataError(f"{path} has no column {name or 'score or accuracy'}; name one with --score-column")
            rows = _keyed(table, path, prefix).rename(columns={str(name): "score"})
            rows = rows.assign(score=as_numbers(rows["score"], path))
            below, most = int(((rows["score"].abs() < 1) & (rows["score"] != 0)).sum()), rows["score"].max()
            if below and most > 1:
                say(f"{path}: scores below 1 ({below}) are beside others of up to {most:g}: two units?")
        else:
            if not path.exists():
                raise DataNotFoundError(f"no log at {path}")
            curves = read_curves([Source(path)], score_column=score)
            # A run without a seed has its file in place of one.
            frame = curves.frame.astype({"method": str, "seed": str}).replace({"seed": {str(path): ""}})
            rows = _keyed(frame, path, prefix)
            logs.append(curves)
            for finding in curves.findings:
                say(str(finding))
        tables.append(rows.dropna(subset="score")[[*_KEYS, "score"]])
    refuse_different_scores(logs)
    whole = pd.concat(tables, ignore_index=True)
    small = [bool((each["score"].abs() <= 1).all()) for each in tables]
    if len(set(small)) > 1:
        at, other = small.index(True), small.index(False)
        raise DataError(f"{paths[at]} has scores from 0 to 1 and {paths[other]} has others: give both in percent")
    if (twice := whole.duplicated(_KEYS)).any():
        row = whole[twice].iloc[0]
        raise DataError(f"{row['method']}, seed {row['seed'] or '-'} has two scores; name the tables with NAME=FILE")
    return whole


# ---- joining


def over_seeds(measures: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Measures of each method and epoch over its seeds, not over images: mean and Student's interval.

    Columns: ``method epoch stack layer_depth measure value ci_low ci_high num_seeds``; ends are NaN with one seed.
    """
    keys = ["method", "epoch", "stack", "layer_depth", "measure"]
    groups = measures.groupby(keys, sort=False, dropna=False)["value"]
    table = groups.agg(["mean", "std", "size"]).reset_index()
    half = table["std"] * reach_of_mean(table["size"], confidence)
    low, high = table["mean"] - half, table["mean"] + half
    return table.assign(value=table["mean"], ci_low=low, ci_high=high, num_seeds=table["size"])[
        [*keys, "value", "ci_low", "ci_high", "num_seeds"]
    ]


def _chosen_layers(measures: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    """One number per checkpoint, measure, stack and choice of layers: a column each, named by all three."""
    parts = []
    unit = [*_KEYS, "stack", "measure"]
    ordered = measures.sort_values("layer_depth", kind="stable")
    groups = ordered.groupby(unit, sort=False, dropna=False)["value"]
    for layer in layers:
        if layer in LAYERS:
            parts.append(getattr(groups, layer)().reset_index().assign(layer=layer))
        elif layer.isdecimal():
            rows = measures["layer_depth"] == int(layer)
            parts.append(measures.loc[rows, [*unit, "value"]].assign(layer=layer))
        else:
            raise ValueError(f"layers are {', '.join(LAYERS)} or numbers, got {layer!r}")
    whole: pd.DataFrame = pd.concat(parts, ignore_index=True)
    if whole.empty:
        raise DataError(f"no checkpoint has a layer depth {' or '.join(layers)}")
    return whole


def _join(measures: pd.DataFrame, scores: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Checkpoints that have both, and what was left out."""
    notes = []
    for one, other, words in ((measures, scores, "measures"), (scores, measures, "scores")):
        if one["epoch"].isna().all() and other["epoch"].notna().all():
            notes.append(f"the {words} have no epochs: those of the last epoch of each run are taken")
    if measures["epoch"].isna().all() and scores["epoch"].notna().all():
        scores = scores.loc[scores.groupby(["method", "seed"])["epoch"].idxmax()].assign(epoch=np.nan)
    elif scores["epoch"].isna().all() and measures["epoch"].notna().all():
        last = measures.groupby(["method", "seed"])["epoch"].transform("max")
        measures = measures[measures["epoch"] == last].assign(epoch=np.nan)
    if scores["seed"].eq("").all() and measures["seed"].ne("").any():
        notes.append("the scores have no seeds: measures are averaged over theirs")
        rest = [column for column in measures if column not in ("seed", "value")]
        measures = measures.groupby(rest, sort=False, dropna=False)["value"].mean().reset_index().assign(seed="")
    joined = measures.merge(scores, on=_KEYS, how="inner")
    if joined.empty:
        there = [f"{', '.join(map(str, each['method'].unique()[:4]))}" for each in (measures, scores)]
        raise DataError(f"no checkpoint has both measures ({there[0]} ...) and a score ({there[1]} ...): names differ")
    for one, words in ((measures, "measures but no score"), (scores, "a score but no measures")):
        units = one[_KEYS].drop_duplicates()
        left = len(units) - len(units.merge(joined[_KEYS].drop_duplicates(), on=_KEYS))
        if left:
            notes.append(f"{left} of {len(units)} checkpoints have {words} and are left out")
    return joined, notes


# ---- relating


@dataclass(frozen=True)
class Relations:
    """What was found.

    Attributes:
        table: A row per level, measure, stack and layer: ``level measure stack layer given rho low high p p_holm number
            verdict``.
        checkpoints: What was joined: ``method seed epoch stack measure layer value score``.
        seeds: Measures over seeds, :func:`over_seeds`; empty where no method has several.
        sentence: What can be said, in plain words.
        notes: What was left out or averaged.
    """

    table: pd.DataFrame
    checkpoints: pd.DataFrame
    seeds: pd.DataFrame
    sentence: str
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite are null."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {"sentence": self.sentence, "relations": rows, "notes": self.notes}


#: Levels, and what their unit is called.
LEVELS: Mapping[str, str] = {
    "across methods": "methods",
    "within runs": "runs",
    "within runs, given the epoch": "runs",
}


def relate(
    measures: pd.DataFrame,
    scores: pd.DataFrame,
    *,
    layers: Sequence[str] = LAYERS,
    given: Collection[str] | None = None,
    confidence: float = 0.95,
) -> Relations:
    """Rank correlations of measures with accuracy, and of H given the other measures.

    All of them are one family for Holm's correction.

    Args:
        measures: From :func:`read_measures`.
        scores: From :func:`read_scores`.
        layers: Which layer depths stand for a checkpoint: ``first``, ``last``, ``mean``, or numbers.
        given: Measures that H is considered given; by default all others.
        confidence: Of the intervals.
    """
    if unknown := set(given or ()) - set(measures["measure"]):
        raise ValueError(f"measures are {', '.join(measures['measure'].unique())}; got {', '.join(sorted(unknown))}")
    joined, notes = _join(_chosen_layers(measures, layers), scores)
    notes += _incomplete(joined)
    rows = [
        {"level": level, "measure": measure, "stack": stack, "layer": layer, "given": others, **vars(found)}
        for (stack, layer), frame in joined.groupby(["stack", "layer"], sort=False)
        for level, measure, others, found in _correlations(frame, given, confidence)
    ]
    if not rows:
        raise DataError(f"no measure is there for all checkpoints; {'; '.join(notes)}")
    table = pd.DataFrame(rows).rename(columns={"value": "rho"})
    enough = np.array([_is_enough(row) for row in table.to_dict("records")], dtype=bool)
    table["p_holm"] = holm(table["p"].where(enough))
    table["verdict"] = [
        _verdict(row, there_are, 1 - confidence)
        for row, there_are in zip(table.to_dict("records"), enough, strict=True)
    ]
    seeds = over_seeds(measures, confidence)
    if seeds["num_seeds"].max() < 2:
        seeds = seeds.iloc[:0]
    columns = ["level", "measure", "stack", "layer", "given", "rho", "low", "high", "p", "p_holm", "number", "verdict"]
    return Relations(table[columns], joined, seeds, _sentence(table, confidence), notes)


def _incomplete(joined: pd.DataFrame) -> list[str]:
    """Which measures are left out, as some checkpoint lacks them."""
    notes = []
    for (stack, layer), frame in joined.groupby(["stack", "layer"], sort=False):
        wide = frame.pivot(index=_KEYS, columns="measure", values="value").isna()
        for measure in wide.columns[wide.any()]:
            place = f"{layer} layer depth{f' of {stack}' if stack else ''}"
            first = wide.index[wide[measure]][0][0]
            notes.append(f"{measure} ({place}) is left out: not all checkpoints have it, such as {first}")
    return notes


def _wide(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per checkpoint: its score and a column per measure; measures that not all have are left out."""
    wide = frame.pivot(index=_KEYS, columns="measure", values="value").dropna(axis=1)
    scores = frame.drop_duplicates(_KEYS).set_index(_KEYS)["score"]
    return wide.assign(score=scores).reset_index()


def _correlations(
    frame: pd.DataFrame, given: Collection[str] | None, confidence: float
) -> Iterator[tuple[str, str, str, Correlation]]:
    """Level, measure, what is held constant, and the correlation."""
    checkpoints = _wide(frame)
    names = [str(name) for name in checkpoints if name not in (*_KEYS, "score")]
    last = checkpoints["epoch"].isna() | (
        checkpoints["epoch"] == checkpoints.groupby("method")["epoch"].transform("max")
    )
    methods = checkpoints[last].groupby("method", sort=False)[[*names, "score"]].mean()
    for name in names:
        yield "across methods", name, "", rank_correlation(methods[name], methods["score"], confidence)
    others = [name for name in names if name != "heterogeneity" and (given is None or name in given)]
    if "heterogeneity" in names and others:
        found = partial_rank_correlation(methods["heterogeneity"], methods["score"], methods[others], confidence)
        yield "across methods", "heterogeneity", ", ".join(others), found
    runs = [run for _, run in checkpoints.groupby(["method", "seed"], sort=False) if len(run) >= FEWEST_EPOCHS]
    for name in names if runs else ():
        plain = [rank_correlation(run[name], run["score"]).value for run in runs]
        timed = [
            partial_rank_correlation(run[name], run["score"], run[["epoch"]]).value
            for run in runs
            if len(run) >= FEWEST_EPOCHS_GIVEN_TIME
        ]
        for level, values in zip(list(LEVELS)[1:], (plain, timed), strict=True):
            yield level, name, "", _mean_over_runs([value for value in values if not math.isnan(value)], confidence)


def _is_enough(row: Mapping[Any, Any]) -> bool:
    if row["level"] == "across methods":
        return bool(row["number"] >= FEWEST_METHODS + len(list(filter(None, row["given"].split(", ")))))
    return bool(row["number"] >= FEWEST_RUNS)


def _verdict(row: Mapping[Any, Any], enough: bool, level: float) -> str:
    if not enough:
        return "nothing can be concluded"
    if math.isnan(row["rho"]):
        return "undefined"
    if not row["p_holm"] <= level:
        return "not shown"
    return "rises with accuracy" if row["rho"] > 0 else "falls with accuracy"


def _sentence(table: pd.DataFrame, confidence: float) -> str:
    """One sentence per level, of H where it was measured, at the layer where it is shown most clearly."""
    comparisons = int(table["p_holm"].notna().sum())
    parts = []
    for level in dict.fromkeys(table["level"]):
        rows = table[table["level"] == level]
        if level.endswith("given the epoch"):
            continue  # said with the level before
        mine = rows[(rows["measure"] == "heterogeneity") & (rows["given"] == "")]
        words = "H" if len(mine) else str(rows["measure"].iloc[0])
        row = _clearest(mine if len(mine) else rows)
        unit, number = LEVELS[level], int(row["number"])
        if row["verdict"] == "nothing can be concluded":
            fewest = FEWEST_METHODS if unit == "methods" else FEWEST_RUNS
            parts.append(f"With {number} {unit} nothing can be concluded {level} ({fewest} are needed)")
            continue
        parts.append(f"{level.capitalize()} {words} {_said(row, unit, comparisons, confidence)}")
        timed = table[(table["level"] == f"{level}, given the epoch") & (table["measure"] == row["measure"])]
        for more, condition in (
            (rows[(rows["given"] != "") & (rows["layer"] == row["layer"]) & (rows["stack"] == row["stack"])], "others"),
            (timed[(timed["layer"] == row["layer"]) & (timed["stack"] == row["stack"])], "epoch"),
        ):
            if len(more):
                parts.append(_given(more.iloc[0], condition, unit, row["verdict"]))
    return ". ".join(parts) + "."


def _clearest(rows: pd.DataFrame) -> pd.Series[Any]:
    order = rows["p"].fillna(2).argsort(kind="stable")
    return rows.iloc[order.iloc[0]]


def _numbers(row: pd.Series[Any]) -> str:
    interval = "" if math.isnan(row["low"]) else f", {row['low']:.2f} to {row['high']:.2f}"
    return f"rho {row['rho']:.2f}{interval}"


def _said(row: pd.Series[Any], unit: str, comparisons: int, confidence: float) -> str:
    place = f"{row['layer']} layer depth" if row["layer"] != "mean" else "mean over layer depths"
    if row["verdict"] in ("not shown", "undefined"):
        verb = f"is not shown to go with accuracy ({place}, where it is clearest: {_numbers(row)}"
    else:
        verb = f"{row['verdict']} ({place}: {_numbers(row)}"
    p = "" if math.isnan(row["p_holm"]) else f", p = {row['p_holm']:.2g} after Holm over {comparisons} comparisons"
    return f"{verb} at {confidence:.0%} over {int(row['number'])} {unit}{p})"


def _given(row: pd.Series[Any], condition: str, unit: str, before: str) -> str:
    held = "the epoch" if condition == "epoch" else f"the other measures ({row['given']})"
    if row["verdict"] == "nothing can be concluded":
        return f"Given {held}, {int(row['number'])} {unit} are too few to conclude anything"
    verdict = row["verdict"]
    still = "it still does" if verdict == before else f"it {verdict}"
    if verdict in ("not shown", "undefined"):
        still = "it adds nothing that is shown"
    return f"Given {held} {still} ({_numbers(row)})"
