"""``mto-analyze experiment``: many runs, with and without MTO, and what they show."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analysis.errors import OutputExistsError
from mto_analyze.console import bars, note, settings_of
from mto_analyze.options import (
    ADVANCED,
    INPUT,
    OUTPUT,
    RUNS,
    DrawingOptions,
    EngineName,
    EngineOptions,
    Quiet,
    ValueRange,
    takes,
)
from mto_analyze.repeating import write_record

if TYPE_CHECKING:
    from mto_analysis.experiments import Experiment, ExperimentRuns, Progress, Results, Run
    from mto_analysis.experiments.running import Engine
    from mto_analysis.images import Images
    from mto_analysis.runtime.outputs import OutputFolder

FIGURES = ("curves", "rauc", "time", "heterogeneity")
FILES = (
    *("curves.csv", "rauc.csv", "heterogeneity.csv", "choice.csv", "terms.csv", "summary.md", "run.json"),
    *FIGURES,
)


File = Annotated[
    str, typer.Argument(metavar="FILE", help="Experiment file (TOML), or the name of one that comes with the package.")
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the experiment; the same command resumes it.",
        rich_help_panel=OUTPUT,
    ),
]
ImagesFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder with train.parquet and test.parquet, unless the file names the images.",
        rich_help_panel=INPUT,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the file (seeds, ...) or of all recipes (epochs, ...); repeatable.",
        rich_help_panel=INPUT,
    ),
]
VerifyData = Annotated[
    bool,
    typer.Option(
        "--verify-data", help="Hash all images, so that resumed runs notice replaced ones.", rich_help_panel=ADVANCED
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print runs, epochs and the estimated time, and stop.", rich_help_panel=RUNS)
]
List = Annotated[
    bool, typer.Option("--list", help="Print all runs by number, with their progress.", rich_help_panel=RUNS)
]
Only = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Only the run with this number of --list.", rich_help_panel=RUNS)
]
Shard = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Only the I-th of N parts, with the runs it needs.", rich_help_panel=RUNS),
]
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="When a run fails, continue with the others.", rich_help_panel=RUNS)
]


@takes(DrawingOptions, EngineOptions)
def experiment(
    context: typer.Context,
    file: File,
    out: Out,
    jobs: int,
    images: ImagesFolder = None,
    set_: Set = None,
    verify_data: VerifyData = False,
    value_range: ValueRange = None,
    dry_run: DryRun = False,
    list_: List = False,
    only: Only = None,
    shard: Shard = None,
    keep_going: KeepGoing = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole experiment: arms x seeds, evaluation, RAUC, figures.

    When it was stopped or killed, the same command resumes every run at its last epoch. Writes
    summary.md, curves.csv, rauc.csv, heterogeneity.csv, terms.csv, choice.csv, run.json and the figures curves, rauc,
    time and heterogeneity to --out; runs are in its folders runs and choose. With --only or --shard these files are
    written once all runs are finished.

    Example:
      mto-analyze experiment mae_cifar10 --images CIFAR10 --out mae-cifar10 --jobs 2
    """
    from mto_analysis.experiments import ExperimentRuns, do_runs, load_experiment
    from mto_analysis.figures.files import file_names
    from mto_analysis.images import open_images
    from mto_analysis.runtime.outputs import OutputFolder

    keys = {"verify_data": "true"} if verify_data else {}
    keys |= {"value_range": "{},{}".format(*value_range)} if value_range else {}
    chosen = load_experiment(file, settings_of(set_ or []) | keys)
    found = chosen.images.resolved(images)
    runs = ExperimentRuns(chosen, found, out.absolute())
    runs.check()
    if list_:
        typer.echo(runs.listing())
        return
    part = _part(runs, only, shard)
    files = file_names(FILES)
    _check_own(out, files, chosen.name, runs)
    folder = OutputFolder(out, files, overwrite=True)
    train = open_images(found.train, value_range=chosen.value_range)
    count = len(train.names)
    if dry_run:
        typer.echo(_plan(runs, jobs, train))
        return
    began = time.time()
    with _board(runs, count, quiet) as tell:
        do_runs(runs, num_images=count, engine=engine_of(context.params), part=part, keep_going=keep_going, tell=tell)
    if left := [run for run in runs.all if not run.finished()]:
        note(f"{len(left)} of {len(runs.all)} runs are still to be done: tables and figures follow", quiet=quiet)
        return
    _write(folder, chosen, runs, jobs=jobs, count=count, began=began)
    note(f"wrote {', '.join(name for name in files if (out / name).exists())} to {out}", quiet=quiet)


def _part(runs: ExperimentRuns, only: int | None, shard: str | None) -> Sequence[Run] | None:
    """The runs of ``--only`` or ``--shard``."""
    if only is not None and shard is not None:
        raise ValueError("--only and --shard both choose runs: give one of them")
    if only is not None:
        return runs.only(only)
    if shard is None:
        return None
    index, slash, count = shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard takes I/N, for instance 1/4, got {shard!r}")
    return runs.shard(int(index), int(count))


def engine_of(given: Mapping[str, Any]) -> Engine:
    """The engine that the options ask for."""
    address, gpus = given["address"], given["gpus"]
    shared = {name: given[name] for name in ("jobs", "threads", "retries")}
    if given["engine"] is EngineName.ray:
        from mto_analysis.experiments.cluster import RayEngine

        return RayEngine(address, gpus=gpus, **shared)
    from mto_analysis.experiments import LocalEngine

    for option, value in (("--address", address), ("--gpus", gpus)):
        if value is not None:
            raise ValueError(f"{option} is of a cluster: add --engine ray")
    return LocalEngine(**shared)


def _check_own(out: Path, files: Sequence[str], name: str, runs: ExperimentRuns) -> None:
    """Refuse to replace files that are not this experiment's; its runs are checked one by one."""
    try:
        own = json.loads((out / "run.json").read_text(encoding="utf-8"))["experiment"]["name"] == name
    except FileNotFoundError:
        own = any(run.folder.is_dir() for run in runs.all)
    except (ValueError, KeyError, TypeError, OSError):
        own = False
    if not own and (there := [file for file in files if (out / file).exists()]):
        raise OutputExistsError(f"{out} already holds {', '.join(there)} of something else; choose another --out")


def _write(
    folder: OutputFolder, chosen: Experiment, runs: ExperimentRuns, *, jobs: int, count: int, began: float
) -> None:
    from mto_analysis.experiments import collect, summary_page
    from mto_analysis.runtime.outputs import run_metadata

    results = collect(runs)
    folder.write_table("curves.csv", results.curves)
    folder.write_table("rauc.csv", results.rauc_table())
    folder.write_table("heterogeneity.csv", results.heterogeneity)
    folder.write_table("terms.csv", results.terms)
    if len(results.choice):
        folder.write_table("choice.csv", results.choice)
    page = summary_page(chosen, results, device=_device(chosen), jobs=jobs, num_images=count)
    folder.write_bytes("summary.md", page.encode())
    metadata = {"experiment": chosen.metadata(), "chosen": results.chosen, "jobs": jobs, "seconds": time.time() - began}
    recorded = run_metadata({"data": vars(runs.images)}, **metadata)
    folder.write_json("run.json", recorded)
    write_record(folder.path, recorded)
    _draw(folder, results)  # last: what was measured is on disk
    typer.echo(page)


def _draw(folder: OutputFolder, results: Results) -> None:
    from mto_analysis.experiments.results import TIME
    from mto_analysis.figures.files import write_figure
    from mto_analysis.figures.plots.experiment import draw_experiment_curves, draw_trajectories
    from mto_analysis.figures.plots.rauc import rauc_figure
    from mto_analysis.figures.plots.style import shown_together

    score = "top-1 accuracy (%)"
    with shown_together(results.curves["method"].astype(str)):
        write_figure(folder, "curves", draw_experiment_curves(results.curves, score=score))
        for stem, comparisons, axis, label in (
            ("rauc", results.comparisons, "epoch", "epoch"),
            ("time", results.timed, TIME, "training time (s)"),
        ):
            if comparisons:
                pairs = [(results.runs(each.baseline, axis), results.runs(each.target, axis)) for each in comparisons]
                write_figure(folder, stem, rauc_figure(comparisons, pairs, axis=label, score=score))
        if len(results.heterogeneity):
            write_figure(folder, "heterogeneity", draw_trajectories(results.heterogeneity))


def _device(chosen: Experiment) -> str:
    import platform

    import torch

    cuda = torch.cuda.is_available() and chosen.device in ("auto", "cuda")
    return torch.cuda.get_device_name() if cuda or chosen.device.startswith("cuda:") else f"CPU ({platform.machine()})"


def _plan(runs: ExperimentRuns, jobs: int, train: Images) -> str:
    """What ``--dry-run`` prints: a line per run, and how long all of it would take."""
    from mto_analysis.experiments.running import total_steps
    from mto_analysis.training import build_method, plan
    from mto_analysis.training.evaluation import Evaluator

    lines, training, scoring, left = [], 0.0, 0.0, 0
    seconds: dict[tuple[str, bool], float] = {}
    seconds_a_score: dict[str, float] = {}
    evaluator: Evaluator | None = None
    for run in runs.all:
        key = (run.variant, run.settings.mto is not None or run.waits)
        if key not in seconds:  # timed once for each, per step; an arm that waits comes after its candidates
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what noise does to a loss says nothing about the runs
                seconds[key] = plan(run.recipe, train, run.settings).seconds / run.recipe.epochs
        finished, evaluation = run.finished(), run.settings.evaluation
        if not finished:
            left += 1
            training += seconds[key] * run.recipe.epochs
        if not finished and evaluation is not None:
            if run.variant not in seconds_a_score:
                evaluator = evaluator or Evaluator(evaluation)  # reads the images once
                began = time.perf_counter()
                evaluator.score(build_method(run.recipe, seed=run.seed).student)
                seconds_a_score[run.variant] = time.perf_counter() - began
            # Of the untrained model, along the run, and at its end.
            scoring += (1 + math.ceil(run.recipe.epochs / evaluation.every)) * seconds_a_score[run.variant]
        state = "finished" if finished else f"{run.recipe.epochs} epochs, {total_steps(run, len(train.names))} steps"
        lines.append(f"{run.name}: {state}")
    lines.append(f"{len(runs.all)} runs, {left} to do. {estimate(training, scoring, jobs)}")
    return "\n".join(lines)


def estimate(training: float, scoring: float, jobs: int) -> str:
    """How long runs take that are left, from the seconds of all of them one after the other."""
    from mto_analysis.runtime.listener import duration

    whole = duration((training + scoring) / jobs)
    together = ", if runs do not slow each other" if jobs > 1 else ""
    return (
        f"Estimate: {duration(training)} of training (from a few timed steps) + {duration(scoring)} of evaluation "
        f"(from one of an untrained model); {whole} in all with --jobs {jobs}{together}."
    )


@contextmanager
def _board(runs: ExperimentRuns, count: int, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A line per run that is going on and a bar for all; without a terminal, a line per finished run."""
    from mto_analysis.experiments.running import total_steps

    finished: set[Any] = set()
    said: set[Any] = set()
    total = len(runs.all)

    def line(progress: Progress) -> None:
        if progress.state in ("found", "done"):
            finished.add(progress.run.folder)
        if progress.state == "note" and (progress.run.folder, progress.words) not in said:
            said.add((progress.run.folder, progress.words))
            note(f"{progress.run.name}: {progress.words}", quiet=quiet)
        if progress.state == "failed":
            note(f"{progress.run.name} failed: {progress.words}", quiet=quiet)
        if progress.state == "done":
            score = _last_score(progress)
            note(f"[{len(finished)}/{total}] {progress.run.name}: {score}", quiet=quiet)

    with bars(*_columns(quiet), quiet=quiet) as shown:
        if shown is None:
            yield line
            return
        whole = shown.add_task("all runs", total=sum(total_steps(run, count) for run in runs.all), words="")
        tasks: dict[Any, Any] = {}
        steps: dict[Any, int] = {}

        def show(progress: Progress) -> None:
            run = progress.run
            line(progress)
            if progress.state == "going" and run.folder not in tasks:
                tasks[run.folder] = shown.add_task(run.name, total=progress.total_steps, words="")
            if progress.state in ("found", "going", "done"):
                steps[run.folder] = progress.step
                words = f"epoch {progress.epoch}/{run.recipe.epochs}"
                words += f", {progress.score:.1f} %" if progress.score is not None else ""
                if run.folder in tasks:
                    shown.update(tasks[run.folder], completed=progress.step, words=words)
            if progress.state in ("done", "failed") and run.folder in tasks:
                shown.remove_task(tasks.pop(run.folder))
            shown.update(whole, completed=sum(steps.values()), words=f"{len(finished)}/{total}")

        yield show


def _columns(quiet: bool) -> tuple[Any, ...]:
    """Of the board's bars; none are made where there are no bars, for which rich is not imported."""
    if quiet or not sys.stderr.isatty():
        return ()
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    return (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())


def _last_score(progress: Progress) -> str:
    from mto_analysis.experiments.runs import read_curve

    curve = read_curve(progress.run)
    if curve.empty:
        return "no score"
    return f"{curve['score'].iloc[-1]:.2f} % after {progress.epoch} epochs"
