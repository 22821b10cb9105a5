"""``mto-analyze pretrain``: from images to a trained model, with or without MTO, on one process or many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analysis.runtime.processes import this_process
from mto_analyze.console import bars, launchable, note, settings_of
from mto_analyze.options import (
    ADVANCED,
    EVALUATION,
    INPUT,
    MODEL,
    OUTPUT,
    RUNS,
    DrawingOptions,
    Group,
    OutputOptions,
    Strict,
    ValueRange,
    takes,
)
from mto_analyze.repeating import write_methods, write_run_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mto_analysis.training import EpochRecord, Recipe, RunSettings, StepRecord


#: Of a run whose epochs take longer, where no bar shows that it goes on.
SECONDS_BETWEEN_LINES = 60.0


class NumberFormat(StrEnum):
    """Number formats of the forward pass under autocast."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class AlongRun(StrEnum):
    """Evaluations that are cheap enough to be repeated along a run."""

    knn = "knn"
    linear = "linear"


class Images(Group):
    """What is trained on."""

    panel = INPUT
    images: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Folder, list, Parquet file or shards, or tar shards.")
    ] = None
    value_range: ValueRange = None
    verify_data: Annotated[
        bool | None,
        typer.Option(
            "--verify-data/--no-verify-data",
            help="Hash all images; --resume then finds replaced ones.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    in_memory: Annotated[
        bool | None,
        typer.Option(
            "--in-memory/--not-in-memory",
            help="Keep decoded images in memory; by default small ones.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    strict: Strict = False


class Training(Group):
    """What is trained, and how."""

    panel = MODEL
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Recipe or TOML file; --dry-run prints its settings."),
    ] = None
    mto: Annotated[bool, typer.Option("--mto", help="Add masked token optimization.")] = False
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the recipe, model.KEY or mto.KEY; repeatable."),
    ] = None
    init: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="Start from this checkpoint's weights."),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seed of everything random; by default 0."),
    ] = None
    ema: Annotated[float | None, typer.Option(metavar="DECAY", help="Also average the weights, with this decay.")] = (
        None
    )


class Compute(Group):
    """Where and how steps are computed."""

    panel = ADVANCED
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps; by default auto."),
    ] = None
    precision: Annotated[
        NumberFormat | None, typer.Option(metavar="FORMAT", help="Autocast: fp32, bf16 or fp16; by default fp32.")
    ] = None
    accumulation: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Micro-batches per step; by default 1.")
    ] = None
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks (torch.compile).")
    ] = None
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time."),
    ] = None
    fsdp: Annotated[
        bool | None,
        typer.Option("--fsdp/--no-fsdp", help="Shard parameters, gradients and optimizer state (FSDP)."),
    ] = None
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic/--no-deterministic", help="Exact resume on a GPU too; slower."),
    ] = None
    num_workers: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Processes that decode images; by default 0.")
    ] = None


class Scoring(Group):
    """Evaluation along the run."""

    panel = EVALUATION
    eval_test: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Labelled test images; enables evaluation.")
    ] = None
    eval_train: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Labelled training images; by default --images.")
    ] = None
    eval_train_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Use only N images of --eval-train."),
    ] = None
    eval_test_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only N images of --eval-test.")
    ] = None
    eval_protocol: Annotated[AlongRun | None, typer.Option(metavar="NAME", help="knn or linear; by default knn.")] = (
        None
    )
    eval_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Evaluate every N epochs; by default 10.")
    ] = None
    eval_start: Annotated[
        bool | None, typer.Option("--eval-start/--no-eval-start", help="Also evaluate at epoch 0.")
    ] = None


class Writing(Group):
    """What is written along the run."""

    panel = OUTPUT
    save_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Save last.pth every N epochs; by default 1.")
    ] = None
    save_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also save last.pth every N steps.", rich_help_panel=ADVANCED),
    ] = None
    keep_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Keep a numbered checkpoint every N epochs."),
    ] = None
    log_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Write to metrics.csv every N steps; by default 20.")
    ] = None
    show_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Draw measures and reconstructions every N epochs."),
    ] = None
    show_measures: Annotated[
        str | None,
        typer.Option(metavar="h,NAME,...", help="Measures of --show-every; by default all.", rich_help_panel=ADVANCED),
    ] = None
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Also write TensorBoard event files.")
    ] = None
    wandb: Annotated[
        str | None, typer.Option(metavar="PROJECT", help="Also log to this project of Weights & Biases.")
    ] = None


Resume = Annotated[
    bool,
    typer.Option("--resume", help="Resume from last.pth; other options may be left out.", rich_help_panel=RUNS),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print settings, memory and time; write nothing.", rich_help_panel=RUNS),
]


@launchable
@takes(Images, Training, Scoring, OutputOptions, DrawingOptions, Writing, Compute)
def pretrain(
    context: typer.Context,
    overwrite: bool,
    quiet: bool,
    strict: bool,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Pre-train a masked image model.

    Writes run.json, recipe.toml, metrics.csv, last.pth, kept checkpoints, curves.csv if it evaluates, and the figure
    run; --show-every also writes shown/ and measures.csv. On several GPUs start it with torchrun or accelerate launch:
    `torchrun --nproc-per-node N -m mto_analyze pretrain ...`. Flags have an opposite (--no-compile), for --resume.

    Example:
      mto-analyze pretrain --recipe mae_cifar10 --images IMAGES --out run
    """
    given = {name: value for name, value in context.params.items() if value is not None}
    values = {name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()}
    _run(values, resume=resume, overwrite=overwrite, strict=strict, dry_run=dry_run, quiet=quiet)


def _run(values: dict[str, Any], *, resume: bool, overwrite: bool, strict: bool, dry_run: bool, quiet: bool) -> None:
    """Train, or say what training would do."""
    from mto_analysis.errors import DataError
    from mto_analysis.figures.epoch_figures import EpochFigures
    from mto_analysis.figures.run_folder import draw_run_folder
    from mto_analysis.images import open_images
    from mto_analysis.training import RunFolder, plan, pretrain

    out = values["out"]
    chosen, source, settings = _choose(values)
    images = open_images(source, value_range=settings.value_range)
    if images.skipped and strict:
        raise DataError(f"skipped {images.skipped_in_words} beside the images; move them away, or leave --strict out")
    if images.skipped:
        note(f"skipped {images.skipped_in_words}", quiet=quiet)
    with _interrupted(out), _bar(quiet) as on_step:
        if dry_run:
            planned = plan(chosen, images, settings).as_text()
            if this_process().main:
                typer.echo(planned)
            return
        for record in pretrain(
            chosen,
            images,
            out,
            settings,
            resume=resume,
            overwrite=overwrite,
            on_begin=lambda: note(_summary(chosen, len(images.names), settings, out), quiet=quiet),
            on_step=on_step if resume or not this_process().main else _recording(out, on_step),
            on_note=lambda line: note(line, quiet=quiet),
            on_broken=lambda broken: note(f"another image takes the place of {broken.name} ({broken.reason})"),
            show=None if settings.show_every is None else EpochFigures(images, measures=settings.show_measures),
            strict=strict,
            source=str(source),
        ):
            note(_line(record, chosen.epochs), quiet=quiet)
        if this_process().main:
            drawn = [path.name for path in draw_run_folder(out)]
            drawn += write_methods(out, RunFolder(out).stored_metadata())
            note(f"wrote {', '.join(drawn)} to {out}", quiet=quiet)


def _recording(out: Path, on_step: Callable[[StepRecord], None] | None) -> Callable[[StepRecord], None]:
    """Writes the file that repeats the run at its first step, when the folder is the run's."""
    written = False

    def step(record: StepRecord) -> None:
        nonlocal written
        if not written:
            write_run_file(out)
        written = True
        if on_step is not None:
            on_step(record)

    return step


@contextmanager
def _interrupted(out: Path) -> Iterator[None]:
    """Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from mto_analysis.training import RunFolder

        kept = RunFolder(out).last.exists()
        raise KeyboardInterrupt("--resume continues from last.pth" if kept else "") from None


def _choose(values: Mapping[str, Any]) -> tuple[Recipe, Path, RunSettings]:
    """Recipe, images and settings: what was given, else what the resumed run had, else the defaults."""
    from mto_analysis.mto import MTOConfig
    from mto_analysis.training import RunFolder, RunSettings, load_recipe, mto_config
    from mto_analysis.training.metrics import check_boards

    if values["resume"] and values["overwrite"]:
        raise ValueError("--resume continues a run and --overwrite replaces it: give one of them")
    folder = RunFolder(values["out"])
    stored: dict[str, Any] = folder.stored_metadata() if values["resume"] and folder.holds_run() else {}
    options = settings_of(values.get("set_") or [])
    mto_options = {key.removeprefix("mto."): text for key, text in options.items() if key.startswith("mto.")}
    recipe_options = {key: text for key, text in options.items() if not key.startswith("mto.")}
    if "recipe" in values:
        own = folder.recipe.exists() and Path(values["recipe"]).resolve() == folder.recipe.resolve()
        if own and not folder.holds_run():
            raise ValueError(f"{folder.recipe} would be replaced by the run's own copy; choose another --out")
        recipe = load_recipe(values["recipe"])
    elif stored:
        if not folder.recipe.exists():
            raise ValueError(f"{folder.recipe} is gone; give the recipe of the run with --recipe")
        recipe = load_recipe(folder.recipe)
    elif values["resume"]:
        raise ValueError(f"{values['out']} holds no run to resume")
    else:
        raise ValueError("give a recipe with --recipe, for instance mae_cifar10")
    recipe = recipe.with_options(recipe_options)
    source = values.get("images") or stored.get("images")
    if source is None:
        raise ValueError("give images with --images")
    settings = RunSettings.from_metadata(stored.get("settings", {}))
    changes = {
        name: values[name]
        for name in RunSettings.__dataclass_fields__
        if values.get(name) is not None and name != "mto"
    }
    settings = replace(settings, **changes)
    if values["mto"]:
        settings = replace(settings, mto=settings.mto or MTOConfig())
    if mto_options:
        if settings.mto is None:
            raise ValueError(f"--set mto.{next(iter(mto_options))} needs --mto")
        settings = replace(settings, mto=mto_config(mto_options, settings.mto))
    check_boards(tensorboard=settings.tensorboard, wandb=settings.wandb is not None)
    return recipe, Path(source), _with_evaluation(settings, values, source)


def _with_evaluation(settings: RunSettings, values: Mapping[str, Any], source: Path | str) -> RunSettings:
    from mto_analysis.training.evaluation import Evaluation

    given = {
        name: values[option]
        for name, option in (
            ("every", "eval_every"),
            ("train", "eval_train"),
            ("test", "eval_test"),
            ("protocol", "eval_protocol"),
            ("limit", "eval_train_limit"),
            ("test_limit", "eval_test_limit"),
        )
        if values.get(option) is not None
    }
    if values.get("show_measures") is not None and settings.show_every is None:
        raise ValueError("--show-measures is for --show-every N")
    if values.get("eval_start") is not None:
        if settings.evaluation is None and "test" not in given:
            raise ValueError("--eval-start is for --eval-test IMAGES")
        settings = replace(settings, evaluate_start=values["eval_start"])
    if settings.evaluation is not None:
        return replace(settings, evaluation=replace(settings.evaluation, **given))
    if "test" not in given:
        if given:
            raise ValueError("evaluating along the run needs labelled test images: --eval-test")
        return settings
    return replace(settings, evaluation=Evaluation(**{"protocol": "knn", "train": str(source), **given}))


def _summary(recipe: Recipe, count: int, settings: RunSettings, out: Path) -> str:
    """What is about to run, in a few lines."""
    from mto_analysis.images import steps_in_epoch

    here = this_process(settings.device)
    steps, scored = steps_in_epoch(count, recipe.batch_size), settings.evaluation
    scoring = f"{scored.protocol} every {_epochs(scored.every)} on {scored.test}" if scored else "none"
    rows = {
        "recipe": f"{recipe.name} ({recipe.method}), seed {settings.seed}{', with MTO' if settings.mto else ''}",
        "images": f"{count} of {recipe.image_size} px",
        "masks": f"{recipe.mask_ratio:g} of the patches ({recipe.mask_kind})",
        "training": f"{recipe.epochs} epochs x {steps} steps of {recipe.batch_size} images, base learning rate "
        f"{recipe.base_lr:g}, weight decay {recipe.weight_decay:g}",
        "computed": f"{settings.precision} on {here.device_name}, {here.count} process{'es' * (here.count > 1)}",
        "evaluation": scoring,
        "output": f"{out} (last.pth every {_epochs(settings.save_every)}); --dry-run estimates memory and time",
    }
    return "\n".join(f"{name + ':':<12}{words}" for name, words in rows.items())


def _epochs(count: int) -> str:
    return "epoch" if count == 1 else f"{count} epochs"


def _line(record: EpochRecord, epochs: int) -> str:
    terms = " ".join(f"{name} {value:.4g}" for name, value in record.terms.items()) if len(record.terms) > 1 else ""
    score = "" if record.score is None else f"  score {record.score:.2f} %"
    return (
        f"epoch {record.epoch}/{epochs}  loss {record.loss:.5g}{f' ({terms})' if terms else ''}"
        f"  {record.images_per_second:.0f} images/s, waiting {record.data_wait:.0%}{score}"
    )


@contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[StepRecord], None] | None]:
    """A bar over all steps with the time left; where stderr is no terminal, a line now and then."""
    from mto_analysis.runtime.listener import duration

    with bars(quiet=quiet) as shown:
        task = None if shown is None else shown.add_task("pre-training", total=None)
        began = last = time.monotonic()
        first = 0

        def show(record: StepRecord) -> None:
            nonlocal last, first
            words = f"epoch {record.epoch + 1} loss {record.loss:.4g}"
            if shown is not None:
                shown.update(task, total=record.total_steps, completed=record.step, description=words)
                return
            first, now = first or record.step, time.monotonic()
            if record.step > first and now - last >= SECONDS_BETWEEN_LINES:
                left = (now - began) / (record.step - first) * (record.total_steps - record.step)
                note(f"step {record.step}/{record.total_steps}  {words}  {duration(left)} left", quiet=quiet)
                last = now

        yield show
