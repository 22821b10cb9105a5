"""``mto-analyze rauc``: Eq. (6) with error bars, from trainers' logs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analyze.console import frozen_imports, note
from mto_analyze.options import ADVANCED, INPUT, OUTPUT, AsJson, Confidence, DrawingOptions, Group, OutputOptions, takes
from mto_analyze.repeating import write_record
from mto_analyze.tables import Format

if TYPE_CHECKING:
    from mto_analysis.rauc.aggregates import Aggregates
    from mto_analysis.rauc.comparison import Comparison
    from mto_analysis.rauc.curves import CurveTable

TABLES_OF_TASKS = ("scores", "estimates", "profiles", "efficiency")
FILES = ("rauc.csv", "rauc.json", "curves.csv", "rauc")
AGGREGATE_FILES = ("tasks", *(f"tasks_{name}.csv" for name in TABLES_OF_TASKS))
WINDOW_FILES = ("rauc_windows.csv", "rauc_windows")

#: Options that reading takes as they are.
AS_GIVEN = (
    "run", "steps_per_epoch", "lower_is_better", "score_column", "epoch_column", "method_column", "seed_column",
)  # fmt: skip


class Axis(StrEnum):
    """What the curves run over."""

    EPOCH = "epoch"
    IMAGES = "images"
    HOURS = "hours"


class UnitOption(StrEnum):
    """What scores are."""

    AUTO = "auto"
    PERCENT = "percent"
    FRACTION = "fraction"
    RAW = "raw"


class EpochOption(StrEnum):
    """How epochs are counted."""

    AS_WRITTEN = "as-written"
    COMPLETED = "completed"


class PairingOption(StrEnum):
    """How runs of the two methods belong together."""

    AUTO = "auto"
    SEED = "seed"
    NONE = "none"


Form = Annotated[
    Format, typer.Option("--format", metavar="NAME", help="text, csv, markdown or latex.", rich_help_panel=OUTPUT)
]


class Logs(Group):
    """Logs, and what in them is compared."""

    panel = INPUT
    log: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME[@SEED]=]FILE",
            help="Log, or TOML list of logs; repeatable. Options of one log follow it, as in FILE[score=...]: score, "
            "epoch, run, unit, steps-per-epoch, first-epoch.",
        ),
    ]
    baseline: Annotated[list[str], typer.Option(metavar="NAME", help="Baseline method S1; repeat for more pairs.")]
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Target method S2; by default every other method.")
    ] = None


class Window(Group):
    """Eq. 6 and its interval."""

    start: Annotated[
        list[float] | None, typer.Option(metavar="E1", help="Start of the window; repeat for more windows.")
    ] = None
    end: Annotated[
        list[float] | None, typer.Option(metavar="E2", help="End of the window; by default the longest in common.")
    ] = None
    reference: Annotated[float | None, typer.Option(metavar="SCORE", help="Score to subtract, instead of S1(E1).")] = (
        None
    )
    interpolate: Annotated[bool, typer.Option("--interpolate", help="Allow E1 and E2 between logged epochs.")] = False
    axis: Annotated[Axis, typer.Option(metavar="NAME", help="Axis of the curves: epoch, images or hours.")] = Axis.EPOCH
    unit: Annotated[UnitOption, typer.Option(metavar="NAME", help="auto, percent (0-100), fraction (0-1) or raw.")] = (
        UnitOption.AUTO
    )
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="Scores are errors or losses: compare 100 - error, or -loss.")
    ] = False
    confidence: Confidence = 0.95
    pairing: Annotated[
        PairingOption, typer.Option(metavar="NAME", help="Pair runs by equal first score (auto), by seed, or none.")
    ] = PairingOption.AUTO


class Reading(Group):
    """How logs are read that leave a choice."""

    panel = ADVANCED
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Compare within each value of this column, and over all of them."),
    ] = None
    per_epoch: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]VALUE", help="Images or hours per epoch, for --axis.")
    ] = None
    noise: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="POINTS", help="A mean gain of the baseline up to this counts as none, in points."
        ),
    ] = 0.01
    epochs: Annotated[EpochOption, typer.Option(metavar="NAME", help="as-written, or completed: counted from 1.")] = (
        EpochOption.AS_WRITTEN
    )
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Run of a file that holds several: its position (-1 is the last) or name."),
    ] = None
    steps_per_epoch: Annotated[
        float | None, typer.Option(metavar="N", help="Steps per epoch, for logs that count steps.")
    ] = None
    score_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column, key or tag of the score.")] = None
    epoch_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column or key of the epoch.")] = None
    method_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of the method.")] = None
    seed_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of the seed.")] = None


@takes(Logs, Window, OutputOptions, DrawingOptions, Reading, out=None)
def rauc(
    context: typer.Context,
    out: Path | None,
    overwrite: bool,
    quiet: bool,
    as_json: AsJson = False,
    form: Form = Format.TEXT,
) -> None:
    """Compute RAUC (Eq. 6) from training logs, with intervals over seeds.

    RAUC is the relative area under the curve of a target method over its baseline. The table is printed; --out also
    writes it with the curves, a figure, and RAUC over all windows.

    Example:
      mto-analyze rauc --log curves.csv --baseline MAE --start 100 --end 400
    """
    with frozen_imports():
        from mto_analysis.figures.files import file_names
        from mto_analysis.rauc.records import aggregate_record, as_record
        from mto_analysis.runtime.outputs import OutputFolder, run_metadata

    given = context.params
    files = file_names([*FILES, *WINDOW_FILES, *AGGREGATE_FILES, "run.json"])
    folder = None if out is None else OutputFolder(out, files, overwrite=overwrite)
    table, comparisons, tasks = compare(given)
    found = [str(finding) for finding in table.findings]
    logs = [one.record() for one in table.provenance]
    content = [as_record(one, table.axis, logs, found) for one in comparisons]
    content += [aggregate_record(one, table.axis) for one in tasks]
    if as_json:
        typer.echo(json.dumps(content, indent=2))
    else:
        typer.echo(as_text(comparisons, tasks, form, table.axis))
        for one in () if quiet else table.provenance:  # a part of the text; other formats stay readable by machines
            typer.echo(f"read {one}", err=form is not Format.TEXT)
        own = [one.notes for one in comparisons] + [one.notes for one in tasks]
        for text in dict.fromkeys([*found, *(text for notes in own for text in notes)]):
            note(f"note: {text}", quiet=quiet)
    if folder is not None:
        write(folder, table, comparisons, tasks, content, noise_of(given, table))
        metadata = run_metadata(given, logs=logs, notes=found)
        folder.write_json("run.json", metadata)
        written = file_names([*FILES, *WINDOW_FILES, *(AGGREGATE_FILES if tasks else ()), "run.json"])
        written += write_record(folder.path, {**metadata, "comparisons": content})
        note(f"wrote {', '.join(written)} to {folder.path}", quiet=quiet or as_json)


def compare(given: Mapping[str, Any]) -> tuple[CurveTable, list[Comparison], list[Aggregates]]:
    """The curves of all logs, the comparisons of every pair in every window, and aggregates over several groups."""
    from mto_analysis.rauc.comparison import common_window, compare_methods
    from mto_analysis.rauc.curves import on_axis, read_curves

    confidence, reference, axis = given["confidence"], given["reference"], given["axis"]
    if reference is not None and not math.isfinite(reference):
        raise typer.BadParameter("must be a finite number", param_hint="--reference")
    baseline, target = given["baseline"], given["target"]
    ends = given["end"] or []
    windows = windows_given(given["start"] or [-math.inf] * bool(ends), ends)
    table = read_curves(
        sources_of(given["log"]),
        methods={*baseline, *target} if target else None,
        wanted=baseline,
        groups=given["group"] or (),
        axis_column=None if axis is Axis.EPOCH else axis.value,
        unit=given["unit"].value,
        epochs=given["epochs"].value,
        **{name: given[name] for name in AS_GIVEN},
    )
    if axis is not Axis.EPOCH:
        table = on_axis(table, axis.value, costs(given["per_epoch"] or []))
    pairs = pairs_of(baseline, target or [name for name in table.methods if name not in baseline])
    if not windows or windows[0][0] == -math.inf:
        first, last = common_window(table, dict.fromkeys(name for pair in pairs for name in pair))
        windows = [(first, end) for _, end in windows] or [(first, last)]
    comparisons = compare_methods(
        table,
        pairs,
        windows,
        reference=None if reference is None else table.as_score(reference),
        interpolate=given["interpolate"],
        confidence=confidence,
        pairing=given["pairing"].value,
        noise=noise_of(given, table),
    )
    if not given["group"]:
        return table, comparisons, []
    from mto_analysis.rauc.aggregates import aggregate

    return table, comparisons, aggregate(table, comparisons)


def noise_of(given: Mapping[str, Any], table: CurveTable) -> float:
    """A mean gain that counts as none: points of accuracy, which raw scores are not."""
    return 0.0 if any(one.unit == "raw" for one in table.provenance) else float(given["noise"])


def sources_of(texts: list[str]) -> list[Any]:
    """Logs as the command line names them; a TOML file is a list of logs."""
    from mto_analysis.rauc.curves import Source, listed_sources

    return [
        source
        for text in texts
        for source in (listed_sources(Path(text)) if text.endswith(".toml") else [Source.parse(text)])
    ]


def windows_given(starts: list[float], ends: list[float]) -> list[tuple[float, float]]:
    """Windows from repeated options; one start serves several ends and the other way round; -inf is the first epoch."""
    if starts and not ends:
        raise typer.BadParameter("needs --end; --end alone starts at the first common epoch", param_hint="--start")
    if len(starts) != len(ends) and min(len(starts), len(ends)) != 1:
        raise typer.BadParameter(f"{len(starts)} starts and {len(ends)} ends do not pair", param_hint="--start, --end")
    count = max(len(starts), len(ends))
    windows = list(
        zip(starts * (count if len(starts) == 1 else 1), ends * (count if len(ends) == 1 else 1), strict=True)
    )
    for first, last in windows:
        given = first == -math.inf or math.isfinite(first)
        if not (given and math.isfinite(last) and first < last):
            if first == -math.inf:
                raise typer.BadParameter(f"must be finite, got {last:g}", param_hint="--end")
            raise typer.BadParameter(f"{first:g} must be below {last:g}, both finite", param_hint="--start, --end")
    return windows


def pairs_of(baselines: list[str], targets: list[str]) -> list[tuple[str, str]]:
    """Pairs from repeated options; one baseline serves several targets."""
    if not targets:
        raise typer.BadParameter("the logs hold no method beside the baseline", param_hint="--target")
    if len(baselines) != len(targets) and len(baselines) != 1:
        raise typer.BadParameter(
            f"{len(baselines)} baselines and {len(targets)} targets do not pair", param_hint="--baseline, --target"
        )
    return list(zip(baselines * (len(targets) if len(baselines) == 1 else 1), targets, strict=True))


def costs(texts: list[str]) -> dict[str, float] | float | None:
    """What an epoch takes: one number for all methods, or one by name."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return float(texts[0])
        return {name: float(value) for name, _, value in (text.rpartition("=") for text in texts)} or None
    except ValueError:
        raise typer.BadParameter("must be VALUE or NAME=VALUE with a number", param_hint="--per-epoch") from None


def as_text(comparisons: list[Comparison], tasks: list[Aggregates], form: Format, axis: str) -> str:
    """The table like Table 1, what stands beside it, why a ratio is undefined, and a table over all tasks."""
    from mto_analysis.rauc.records import aggregate_table, as_frame, details, table1
    from mto_analysis.runtime.render import render

    if form is Format.CSV:
        return render(as_frame(comparisons, axis), "csv")
    undefined = [
        f"undefined ({one.target} / {one.baseline}, {one.start:g} to {one.end:g}): {one.reason}"
        for one in comparisons
        if one.reason
    ]
    parts = [render(table1(comparisons), form.value, title="RAUC (S1, S2; E1, E2)", notes=undefined)]
    if len(comparisons) <= 3:
        parts.append(render(details(comparisons, axis), form.value))
    for one in tasks:
        title = f"Over {len(one.tasks)} tasks, {axis} {one.start:g} to {one.end:g}"
        parts.append(render(aggregate_table(one), form.value, title=title))
    return "\n\n".join(parts)


def write(
    folder: Any, table: CurveTable, comparisons: list[Comparison], tasks: list[Aggregates], content: Any, noise: float
) -> None:
    """Tables and figures, each figure beside the table that it was drawn from."""
    import pandas as pd

    from mto_analysis.figures.files import write_figure
    from mto_analysis.figures.plots.aggregates import draw_aggregates
    from mto_analysis.figures.plots.rauc import rauc_figure, rauc_windows_figure
    from mto_analysis.rauc.comparison import window_grid
    from mto_analysis.rauc.records import as_frame

    folder.write_table("rauc.csv", as_frame(comparisons, table.axis))
    folder.write_bytes("rauc.json", (json.dumps(content, indent=2) + "\n").encode())
    folder.write_table("curves.csv", table.frame)
    runs = [(table.runs(one.baseline, one.group), table.runs(one.target, one.group)) for one in comparisons]
    grids = {}
    for one, (first, second) in zip(comparisons, runs, strict=True):
        name = ", ".join([f"{one.target} / {one.baseline}", *one.group.values()])
        if name not in grids:
            grids[name] = window_grid(
                {seed: first[seed] for seed in one.seeds_baseline},
                {seed: second[seed] for seed in one.seeds_target},
                reference=one.reference if one.reference_given else None,
                paired=one.paired,
                confidence=one.interval.confidence,
                noise=noise,
            )
    write_figure(folder, "rauc", rauc_figure(comparisons, runs, axis=table.axis, score=table.score_label))
    chosen = dict.fromkeys((one.start, one.end) for one in comparisons)
    write_figure(folder, "rauc_windows", rauc_windows_figure(grids, chosen=chosen, axis=table.axis))
    for name in TABLES_OF_TASKS if tasks else ():
        frames = [getattr(one, name).assign(start=one.start, end=one.end) for one in tasks]
        folder.write_table(f"tasks_{name}.csv", pd.concat(frames, ignore_index=True))
    if tasks:  # the longest window; the tables have all
        longest = max(tasks, key=lambda one: one.end - one.start)
        write_figure(folder, "tasks", draw_aggregates(longest, axis=table.axis, score=table.score_label))
    folder.write_table(
        "rauc_windows.csv", pd.concat([grid.assign(comparison=name) for name, grid in grids.items()], ignore_index=True)
    )
