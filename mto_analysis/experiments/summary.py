"""The page of an experiment: what was run and what it shows, in plain sentences and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from mto_analysis.experiments.results import Results
from mto_analysis.experiments.spec import Experiment
from mto_analysis.mto import MTOConfig
from mto_analysis.rauc.comparison import Comparison
from mto_analysis.rauc.intervals import Interval, mean_interval
from mto_analysis.runtime.render import render


def summary_page(experiment: Experiment, results: Results, *, device: str, jobs: int, num_images: int) -> str:
    """The page as Markdown.

    Args:
        experiment: What was run.
        results: What came out.
        device: What it ran on, in words.
        jobs: Runs at once, on which wall times depend.
        num_images: That were trained on.
    """
    parts = [f"# {experiment.name}", experiment.summary]
    parts.append(_what_ran(experiment, results, device=device, jobs=jobs, num_images=num_images))
    parts.append("## Scores\n\n" + _scores(results))
    if results.comparisons:
        parts.append("## What it shows\n\n" + "\n".join(f"- {_finding(each)}" for each in results.comparisons))
        parts.append("## RAUC\n\n" + _rauc_table(results))
    if results.timed:
        parts.append(_time(results, jobs))
    parts.append(_terms(results))
    if experiment.choice is not None:
        parts.append(_choice(experiment, results))
    parts.append(
        "## Files\n\n`curves.csv` (all scores), `rauc.csv`, `heterogeneity.csv`, `terms.csv`, `choice.csv` where "
        "settings were chosen; `curves`, `rauc`, `time`, `heterogeneity` as `.png` and `.pdf`; `run.json`; every "
        "run with its checkpoint in `runs/`."
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def _what_ran(experiment: Experiment, results: Results, *, device: str, jobs: int, num_images: int) -> str:
    lines = []
    for variant in experiment.variants:
        recipe = variant.recipe
        lines.append(
            f"- {variant.label}: recipe `{recipe.name}`, {recipe.epochs} epochs of {num_images} images, batch "
            f"{recipe.batch_size} ({num_images // recipe.batch_size} steps an epoch)"
        )
    seeds = ", ".join(map(str, experiment.seeds))
    evaluation = experiment.evaluation
    lines.append(f"- seeds {seeds}; runs of the same seed share weights, order, augmentation and masks, and are paired")
    protocols = " and ".join(sorted(set(results.curves["protocol"])))
    limit = f" on {evaluation.limit} training images" if evaluation.limit else ""
    lines.append(f"- scores: `{protocols}`{limit}, top-1 accuracy on the test images in percent")
    lines += [f"- {arm.name}: {_mto_words(experiment, results, arm.mto)}" for arm in experiment.arms if not arm.plain]
    lines.append(f"- {device}, {experiment.precision}, {jobs} run{'s' if jobs > 1 else ''} at once")
    return "\n".join(lines)


def _mto_words(experiment: Experiment, results: Results, mto: MTOConfig | None) -> str:
    if mto is not None:
        return config_words(mto)
    choice = experiment.choice
    settings = {each.name: each.mto for each in choice.candidates} if choice else {}
    return "; ".join(
        f"for {variant} `{name}` was chosen ({config_words(settings[name])})"
        for variant, name in results.chosen.items()
    )


def config_words(mto: MTOConfig) -> str:
    """Settings of MTO in a line: the three weights, and what differs from the default.

    Example:
        >>> config_words(MTOConfig(ranking_weight=0, include_self=False))
        'weights 0.01 L_spa, 0.01 L_e, 0 L_r; include_self False'
    """
    weights = f"weights {mto.sparsity_weight:g} L_spa, {mto.embedding_weight:g} L_e, {mto.ranking_weight:g} L_r"
    default = asdict(MTOConfig())
    other = [
        f"{name} {value}"
        for name, value in asdict(mto).items()
        if not name.endswith("_weight") and value != default[name]
    ]
    return "; ".join([weights, *other])


def _scores(results: Results) -> str:
    """Final scores with the interval over seeds, the random encoder, and the speed of training."""
    rows = [("method", "final score", "95 % interval", "random encoder", "seconds a step")]
    speed = results.speed.groupby("method")["step_seconds"].median()
    for method, runs in results.curves.groupby("method", sort=False):
        last = runs[runs["epoch"] == runs["epoch"].max()].sort_values("seed")["score"].to_numpy()
        first = runs.loc[runs["epoch"] == 0, "score"].to_numpy()
        rows.append(
            (
                str(method),
                f"{last.mean():.2f}",
                _interval(last),
                f"{first.mean():.2f}" if len(first) else "not evaluated",
                f"{speed[method]:.4f}",
            )
        )
    return _table(rows)


def _interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return "one seed"
    low, high = mean_interval(values, 0.95)
    return str(Interval.between("Student", low, high, 0.95, len(values)))


def verdict(comparison: Comparison) -> str:
    """Whether the target gained, as far as the interval says.

    A ratio without an interval, or one whose interval contains 1, is no finding.
    """
    if comparison.rauc is None:
        return f"RAUC is undefined ({comparison.reason})."
    interval = comparison.interval
    if interval.kind != "bounded" or interval.low is None or interval.high is None:
        return f"RAUC {comparison.rauc:.3f} without an interval ({interval.reason or interval}): no finding."
    words = f"RAUC {interval.around(comparison.rauc)}, 95 % interval {interval}"
    if interval.low > 1:
        return f"{words}: **it learned faster** than the baseline."
    if interval.high < 1:
        return f"{words}: **it learned more slowly** than the baseline."
    return f"{words}, which contains 1: **no difference is shown**."


def _finding(comparison: Comparison) -> str:
    gap, share = comparison.final_gap_interval, comparison.share_saved_interval
    final = f" Score at the end {gap.around(comparison.final_gap, sign='+')} points (95 % interval {gap})."
    if comparison.share_saved is None or comparison.epochs_to_final is None:
        saved = " It does not reach the baseline's final score in this window."
    elif comparison.share_saved <= 0:
        saved = " It reaches the baseline's final score at the end only: nothing is saved."
    else:
        saved = (
            f" It has the baseline's final score after {comparison.epochs_to_final:.1f} epochs, which would save "
            f"{share.around(comparison.share_saved, scale=100, default='.0f')} % (95 % interval {share.words(100)})."
        )
    notes = "".join(f" Note: {note}." for note in comparison.notes)
    return (
        f"{comparison.target} against {comparison.baseline}, epochs {comparison.start:g} to {comparison.end:g}: "
        f"{verdict(comparison)}{final}{saved}{notes}"
    )


def _rauc_table(results: Results) -> str:
    rows = [("baseline", "target", "axis", "window", "RAUC", "95 % interval", "bootstrap", "saved")]
    for axis, comparisons in (("epochs", results.comparisons), ("training seconds", results.timed)):
        for each in comparisons:
            rows.append(
                (
                    each.baseline,
                    each.target,
                    axis,
                    f"{each.start:.4g} to {each.end:.4g}",
                    "undefined" if each.rauc is None else each.interval.around(each.rauc),
                    str(each.interval),
                    str(each.bootstrap),
                    "-" if each.share_saved is None else f"{100 * max(0.0, each.share_saved):.0f} %",
                )
            )
    return _table(rows)


def _time(results: Results, jobs: int) -> str:
    """Equal time beside equal epochs: MTO's own cost is counted here."""
    speed = results.speed.groupby("method")["step_seconds"].median()
    lines = []
    for each in results.timed:
        ratio = speed[each.target] / speed[each.baseline]
        lines.append(
            f"- {each.target}: a step takes {ratio:.2f} times as long as {each.baseline}'s "
            f"({speed[each.target]:.4f} s and {speed[each.baseline]:.4f} s). At equal training time: {verdict(each)}"
        )
    caution = (
        f"\n\nTimes are those of {jobs} runs at once on one machine, so they hold for it and for this load."
        if jobs > 1
        else ""
    )
    return "## Equal time\n\n" + "\n".join(lines) + caution


def _terms(results: Results) -> str:
    """Whether the losses of MTO moved, and whether the model's own loss paid for it."""
    means = results.terms.drop(columns=["seed", "recipe", "arm"]).groupby("method", sort=False).mean()
    epochs = results.heterogeneity.groupby("method")["epoch"]
    ends = results.heterogeneity[results.heterogeneity["epoch"] == epochs.transform("max")]
    own = [name for name in map(str, means) if name not in ("loss", "mto") and not name.startswith("mto_")]
    rows: list[tuple[str, ...]] = [("method", *own, "L_spa", "L_e", "L_r", "H_0", "H at the last layer depth")]
    for method, row in means.iterrows():
        stacks = ends[ends["method"] == method].groupby("stack", sort=False, dropna=False)
        layers = [stack.groupby("layer_depth")["heterogeneity"].mean() for _, stack in stacks]
        names = (*own, "mto_sparsity", "mto_embedding", "mto_ranking")
        values = [row.get(name, np.nan) for name in names]
        depths = [" and ".join(f"{stack.iloc[at]:.4g}" for stack in layers) or "-" for at in (0, -1)]
        rows.append((str(method), *("-" if np.isnan(value) else f"{value:.4g}" for value in values), *depths))
    words = (
        "Means over seeds: losses of the last logged step, without their weights; H of each stack over each method's "
        "last epoch."
    )
    return f"## Losses at the end\n\n{words}\n\n{_table(rows)}"


def _choice(experiment: Experiment, results: Results) -> str:
    choice = experiment.choice
    if choice is None:
        return ""
    settings = {each.name: config_words(each.mto) for each in choice.candidates}
    epochs = sorted({max(1, round(choice.share * variant.recipe.epochs)) for variant in experiment.variants})
    words = (
        f"Chosen by the {choice.by} score, mean over the seeds {', '.join(map(str, choice.seeds))} (none of them is a "
        f"seed of the comparison), in runs of {' or '.join(map(str, epochs))} epochs. Best first:"
    )
    rows = [("recipe", "candidate", "final score", "mean score", "settings")]
    for variant, table in results.choice.groupby("variant", sort=False):
        means = table.groupby("candidate", sort=False)[["final", "mean"]].mean()
        for name, row in means.sort_values(choice.by, ascending=False, kind="stable").iterrows():
            mark = " (chosen)" if results.chosen[str(variant)] == name else ""
            rows.append(
                (
                    str(variant),
                    f"{name}{mark}",
                    f"{row['final']:.2f}",
                    f"{row['mean']:.2f}",
                    settings.get(str(name), "the baseline, no candidate"),
                )
            )
    return f"## The choice\n\n{words}\n\n{_table(rows)}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    return render(pd.DataFrame(body, columns=list(head)), "markdown")
