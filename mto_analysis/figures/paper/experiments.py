"""Fig. 4 and supplementary Figs. 1-2 from an experiment's folder: curves that were measured here, over seeds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from mto_analysis.errors import DataError, DataNotFoundError
from mto_analysis.figures.paper.inputs import Drawn, table_texts
from mto_analysis.figures.paper.tables import printed
from mto_analysis.figures.plots.evaluation import PROTOCOL_LABELS
from mto_analysis.figures.plots.means_over_seeds import draw_runs
from mto_analysis.rauc import Points
from mto_analysis.rauc.comparison import common_window, compare_methods, mean_curve
from mto_analysis.rauc.curves import CurveTable, read_curves
from mto_analysis.rauc.intervals import mean_interval
from mto_analysis.rauc.records import as_frame, ratio_in_words
from mto_analysis.runtime.tables import read_table

_PLUS = " + "  # between what an experiment calls a recipe and an arm that is not its baseline
_AT = " at "  # between the losses of an arm and their weight
_DEPTH = re.compile(r"(?:decoder|depth)[ =_-]*(\d+)", re.IGNORECASE)
_LOSSES = ("L_spa", "L_e", "L_r")
_BANDS = "bands: Student's 95 % interval of the mean over seeds"
_BARS = _BANDS.replace("bands", "bars")
_SCORE = "top-1 accuracy (%)"


def accuracy_curves(name: str, folder: Path) -> Drawn:
    """Accuracy over epochs, a panel per baseline and its method with MTO, with RAUC and its interval."""
    table, compared = _curves(folder), _compared(folder)
    pairs = _pairs(compared, table)
    # Runs of one seed of an experiment share weights, order, augmentation and masks.
    comparisons = compare_methods(table, pairs, [_window(compared, table, pairs)], pairing="seed")
    parts = []
    remarks: dict[str, str] = {}
    several = len({comparison.baseline for comparison in comparisons}) < len(pairs)
    for comparison in comparisons:
        first = comparison.target if several else comparison.baseline
        panel = ", ".join([first, *comparison.group.values()])
        for method in (comparison.baseline, comparison.target):
            shown = "baseline" if method == comparison.baseline else "with MTO"
            parts.append(_summary(table.runs(method, comparison.group)).assign(panel=panel, method=shown))
        remarks[panel] = f"RAUC {ratio_in_words(comparison)}".replace(" [", "\n[")
    rows = _ordered(pd.concat(parts))
    figure = draw_runs(rows, place="pre-training epochs", score=_SCORE, remarks=remarks)
    caption = (
        "Measured here, at a small size, not the paper's curves: accuracy of runs with and without MTO at equal"
        f" epochs. {_seeds_in_words(rows)}; {_BANDS}. RAUC is Eq. 6 from {comparisons[0].start:g} to"
        f" {comparisons[0].end:g} epochs, in brackets its 95 % interval over seeds; 1 is no gain."
    )
    stem = f"{name}-measured"
    return Drawn(
        {stem: figure}, {stem: rows, f"{stem}-rauc": as_frame(comparisons)}, caption, {"experiment": str(folder)}
    )


def style_curves(name: str, folder: Path) -> Drawn:
    """Both styles with and without MTO: accuracy, and what MTO adds, over epochs."""
    table = _curves(folder)
    pairs = _pairs(_compared(folder), table)
    # The first of several protocols: the panels are accuracy and gain.
    group = {column: str(table.frame[column].iloc[0]) for column in table.groups if column == "protocol"}
    accuracy, gain = "accuracy", "gain by MTO"
    parts = []
    for baseline, target in pairs:
        for method in (baseline, target):
            parts.append(_summary(table.runs(method, group)).assign(panel=accuracy, method=method))
        one, two = table.runs(baseline, group), table.runs(target, group)
        both = [seed for seed in one if seed in two]
        if not both:
            raise DataError(f"{folder}: {baseline} and {target} have no seed in common, so no gain can be paired")
        differences = {seed: _difference(one[seed], two[seed]) for seed in both}
        parts.append(_summary(differences).assign(panel=gain, method=target))
    rows = _ordered(pd.concat(parts))
    labels = {accuracy: _SCORE, gain: "difference (points)"}
    figure = draw_runs(rows, place="pre-training epochs", score=labels, zero=[gain])
    caption = (
        "Measured here, at a small size, not the paper's curves: SimMIM (inpainting style) and MAE (decoder style) with"
        f" and without MTO. Left: accuracy; right: accuracy with MTO minus that without, of the same seed."
        f" {_seeds_in_words(rows)}; {_BANDS}."
    )
    stem = f"{name}-measured"
    return Drawn({stem: figure}, {stem: rows}, caption, {"experiment": str(folder)})


def depth_curves(name: str, folder: Path) -> Drawn:
    """Accuracy at the end of pre-training over the number of decoder blocks, with and without MTO."""
    table = _curves(folder)
    frame = table.frame
    protocols = frame["protocol"] if "protocol" in frame else pd.Series("", index=frame.index)
    parts = []
    for protocol in dict.fromkeys(protocols):
        rows = frame[protocols == protocol]
        last = rows.loc[rows.groupby(["method", "seed"], observed=True)["epoch"].idxmax()].copy()
        last["depth"] = [_depth_of(row, folder) for row in last.to_dict("records")]
        last["with_mto"] = last["method"].str.contains(_PLUS, regex=False)
        if (last.groupby(["depth", "with_mto"])["method"].nunique() > 1).any():
            raise DataError(f"{folder}: a decoder depth has several arms with MTO; this figure is of one")
        for with_mto, group in last.groupby("with_mto"):
            points = [{"place": depth, **_mean(each["score"].to_numpy())} for depth, each in group.groupby("depth")]
            method = "with MTO" if with_mto else "baseline"
            panel = PROTOCOL_LABELS.get(protocol, protocol or "accuracy").removesuffix(" (%)")
            parts.append(pd.DataFrame(points).assign(panel=panel, method=method))
    rows = _ordered(pd.concat(parts))
    figure = draw_runs(rows, place="decoder depth (blocks)", score=_SCORE, whole_places=True)
    end = frame["epoch"].max()
    caption = (
        f"Measured here, at a small size, not the paper's numbers: accuracy after {end:g} pre-training"
        f" epoch{'s' if end != 1 else ''} over the number of decoder blocks, with and without MTO."
        f" {_seeds_in_words(rows)}; {_BARS}."
    )
    stem = f"{name}-measured"
    return Drawn({stem: figure}, {stem: rows}, caption, {"experiment": str(folder)})


def ablation_table(name: str, folder: Path) -> Drawn:
    """Final accuracy of each combination of losses, and its difference of the same seed to none; beside the printed.

    Arms are named after their losses, and after other weights than the paper's: ``L_spa, L_e at 0.001``.
    """
    table = _curves(folder)
    pairs = _pairs(_compared(folder), table)
    baselines = list(dict.fromkeys(baseline for baseline, _ in pairs))
    if len(baselines) > 1:
        raise DataError(f"{folder}: an ablation has one baseline, here are {', '.join(baselines)}")
    published = printed("table3_loss_ablation").set_index(["l_spa", "l_e", "l_r"])["top1"].to_dict()
    group = {column: str(table.frame[column].iloc[0]) for column in table.groups}
    ends = {method: _ends(table.runs(method, group)) for method in (baselines[0], *(target for _, target in pairs))}
    rows = []
    for method, scores in ends.items():
        losses, _, weights = method.partition(_PLUS)[2].partition(_AT)
        used = _losses_of(losses, folder)
        row: dict[str, object] = {loss: "x" if on else "" for loss, on in zip(_LOSSES, used, strict=True)}
        row |= {"weights": weights, "printed": "" if weights else published.get(tuple(str(int(on)) for on in used), "")}
        row |= _mean(np.array(list(scores.values())))
        both = [seed for seed in scores if seed in ends[baselines[0]]]
        if method != baselines[0] and both:
            gain = _mean(np.array([scores[seed] - ends[baselines[0]][seed] for seed in both]))
            row |= {"difference": gain["score"], "difference_low": gain["low"], "difference_high": gain["high"]}
        rows.append(row)
    frame = pd.DataFrame(rows)
    if not frame["weights"].any():
        frame = frame.drop(columns="weights")
    first = [column for column in (*_LOSSES, "weights", "printed") if column in frame]
    shown = frame[first].assign(measured=[f"{score:.2f}" for score in frame["score"]])
    shown["against none"] = [
        _signed(*ends) for ends in frame[["difference", "difference_low", "difference_high"]].itertuples(index=False)
    ]
    seeds = " or ".join(map(str, sorted(set(frame["num_seeds"]))))
    words = f"n = {seeds} seeds; in brackets Student's 95 % interval of the mean difference of the same seed"
    stem = f"{name}-measured"
    texts = table_texts(
        stem,
        shown,
        title=f"Table 3, measured at a small size: {baselines[0]}",
        notes=(f"Measured: final accuracy in percent, {words}.", "Printed: SimMIM ViT-B at 400 epochs on ImageNet."),
    )
    caption = (
        "Measured here, at a small size, beside the paper's numbers, which are of another model, data set and measure:"
        f" accuracy at the end of pre-training with each combination of losses, and without any; {words}."
    )
    return Drawn({}, {stem: frame}, caption, {"experiment": str(folder)}, texts)


def _ends(runs: Mapping[str, Points]) -> dict[str, float]:
    return {seed: float(run.scores[-1]) for seed, run in runs.items()}


def _losses_of(arm: str, folder: Path) -> tuple[bool, ...]:
    """Which losses an arm's name says that it has; the baseline has none."""
    words = [word.strip() for word in arm.split(",") if word.strip()]
    if unknown := [word for word in words if word not in _LOSSES]:
        raise DataError(f"{folder}: arm {unknown[0]!r} must be named after its losses, such as 'L_spa, L_e'")
    return tuple(loss in words for loss in _LOSSES)


def _signed(difference: float, low: float, high: float) -> str:
    if difference != difference:
        return ""
    return f"{difference:+.2f}" + ("" if low != low else f" [{low:+.2f}, {high:+.2f}]")


def _curves(folder: Path) -> CurveTable:
    path = folder / "curves.csv"
    if not path.is_file():
        raise DataNotFoundError(f"{folder} holds no curves.csv; give a folder in which an experiment has finished runs")
    columns = pd.read_csv(path, nrows=0).columns
    groups = [column for column in ("protocol", "decoder_depth") if column in columns]
    return read_curves([path], groups=groups)


def _compared(folder: Path) -> pd.DataFrame:
    """The experiment's rauc.csv over epochs; empty without one."""
    path = folder / "rauc.csv"
    columns = ["baseline", "target", "start", "end"]
    if not path.is_file():
        return pd.DataFrame(columns=columns)
    table = read_table(path, names=columns[:2])
    if missing := [column for column in columns if column not in table]:
        raise DataError(f"{path} is no table of an experiment: it lacks {', '.join(missing)}")
    return table[table["axis"] == "epoch"] if "axis" in table else table


def _pairs(compared: pd.DataFrame, table: CurveTable) -> list[tuple[str, str]]:
    """Each method and its baseline, whose name it begins with: ``MAE`` and ``MAE + MTO``.

    The experiment's own table tells that ``MAE + aug`` is a baseline too; without it the longest name counts.
    """
    found = list(zip(compared["baseline"], compared["target"], strict=True))
    found = found or [(one, two) for two in table.methods for one in sorted(table.methods, key=len)]
    pairs = {two: one for one, two in found if two.startswith(one + _PLUS)}
    if not pairs:
        raise DataError(f"no method is another's name and more after ' + '; there are {', '.join(table.methods)}")
    return [(one, two) for two, one in pairs.items()]


def _window(compared: pd.DataFrame, table: CurveTable, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """The experiment's own window, the longest of its rauc.csv; without one, all that the curves have in common."""
    if len(compared):
        longest = int((compared["end"] - compared["start"]).to_numpy().argmax())
        return float(compared["start"].iloc[longest]), float(compared["end"].iloc[longest])
    return common_window(table, dict.fromkeys(name for pair in pairs for name in pair))


def _summary(runs: Mapping[str, Points]) -> pd.DataFrame:
    """Mean over seeds and its interval at each epoch that all runs cover."""
    middle = mean_curve(runs)
    rows = []
    for epoch in middle.epochs:
        rows.append({"place": epoch, **_mean(np.array([np.interp(epoch, *run) for run in runs.values()]))})
    return pd.DataFrame(rows)


def _mean(scores: np.ndarray) -> dict[str, float]:
    low, high = mean_interval(scores, 0.95) if len(scores) > 1 else (np.nan, np.nan)
    return {"score": float(scores.mean()), "low": float(low), "high": float(high), "num_seeds": len(scores)}


def _difference(one: Points, two: Points) -> Points:
    epochs = np.intersect1d(one.epochs, two.epochs)
    return Points(epochs, np.interp(epochs, *two) - np.interp(epochs, *one))


def _depth_of(row: Mapping[object, object], folder: Path) -> int:
    if "decoder_depth" in row:
        return int(float(str(row["decoder_depth"])))
    if found := _DEPTH.search(str(row["method"])):
        return int(found[1])
    raise DataError(f"{folder}: {row['method']!r} does not say its decoder depth; name recipes like 'decoder 4'")


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[["panel", "method", "place", "score", "low", "high", "num_seeds"]].reset_index(drop=True)


def _seeds_in_words(rows: pd.DataFrame) -> str:
    counts = sorted({int(count) for count in rows["num_seeds"]})
    return f"Mean over n = {' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}"
