"""``mto-analyze evaluate``: what encoders are worth, by kNN, linear probes and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analysis.runtime.processes import Processes, this_process
from mto_analyze.console import launchable, note, progress, settings_of
from mto_analyze.options import DeviceName, Heads, Offline, Overwrite, Quiet, WeightsOption

if TYPE_CHECKING:
    from mto_analysis.models import MaskedImageModel
    from mto_analysis.training.evaluation import Score
    from mto_analysis.training.evaluation.checkpoint_scores import CurveFile, Encoder, RunCheckpoint
    from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
    from mto_analysis.training.evaluation.features import LabelledImages

evaluate = typer.Typer(
    no_args_is_help=True,
    help="Score encoders with labelled images: kNN, linear probe or fine-tuning; one checkpoint or a whole run.",
)

Sources = Annotated[
    list[str],
    typer.Option("--ckpt", help="Checkpoint, or folder of a run (all its checkpoint-*.pth); repeat to compare."),
]
Train = Annotated[str, typer.Option(help="Labelled training images: folder of classes, Parquet, tar shards.")]
Test = Annotated[str, typer.Option(help="Labelled test images.")]
Out = Annotated[Path, typer.Option(help="Folder for results; an unfinished curve there is continued.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="Name of each --ckpt in the curve; by default the run's own.")
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", help="Seed of each --ckpt, or one for all; by default the run's own, else 0."),
]
Random = Annotated[
    bool, typer.Option("--random-baseline", help="Also score the same architecture with random weights.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use so many training images, spread evenly.")]
TestLimit = Annotated[int | None, typer.Option(min=1, help="Use so many test images, spread evenly.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting; repeat.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Images per process and forward; the rest accumulates.")]


class PoolingOption(StrEnum):
    """What becomes of tokens."""

    class_ = "class"
    patches = "patches"
    concat = "concat"


class NormOption(StrEnum):
    """What normalizes features."""

    encoder = "encoder"
    fresh = "fresh"
    off = "off"


class Precision(StrEnum):
    """Number format of the encoder's products."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Pooled = Annotated[
    PoolingOption | None,
    typer.Option(help="Class token, mean of patches, or both concatenated; by default as the family's authors do."),
]
Layer = Annotated[
    int | None, typer.Option(min=1, help="Block whose tokens are read, from 1; by default as the family's authors do.")
]
Norm = Annotated[
    NormOption | None,
    typer.Option(help="The encoder's final norm, a fresh one, or none; by default as the family's authors do."),
]
Crop = Annotated[
    float | None,
    typer.Option(
        "--crop-pct",
        help="Side of the test images' centre crop over their resized shorter side; by default as in the original: "
        "0.875 (224 of 256), and 1 up to 64 px.",
    ),
]
Weights = Annotated[
    WeightsOption | None,
    typer.Option(help="Trained weights or their momentum teacher; by default as the family's authors evaluate."),
]
Precise = Annotated[Precision, typer.Option(help="Of the encoder; bfloat16 by autocast.")]


@evaluate.command()
@launchable
def knn(
    context: typer.Context,
    ckpt: Sources,
    train: Train,
    test: Test,
    out: Out = Path("evaluation-knn"),
    neighbours: Annotated[int, typer.Option("-k", "--neighbours", min=1, help="How many vote.")] = 20,
    temperature: Annotated[float, typer.Option(help="Weight of a neighbour: exp(cosine / temperature).")] = 0.07,
    pooling: Pooled = None,
    layer: Layer = None,
    norm: Norm = None,
    crop_pct: Crop = None,
    weights: Weights = None,
    limit: Limit = None,
    test_limit: TestLimit = None,
    method: Methods = None,
    seed: Seeds = None,
    random_baseline: Random = False,
    precision: Precise = Precision.float32,
    device: DeviceName = "auto",
    num_workers: Workers = 0,
    num_heads: Heads = None,
    offline: Offline = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Weighted kNN on features of the frozen encoder (cosine, k = 20, temperature 0.07, as DINO).

    Writes curves.csv (method epoch score seed ...), settings.json and run.json to --out; with several epochs also
    curves.png and .pdf, with --random-baseline also random.csv. A second call goes on where the first one stopped.
    """
    on_features(context, "knn", {"neighbours": neighbours, "temperature": temperature})


@evaluate.command()
@launchable
def linear(
    context: typer.Context,
    ckpt: Sources,
    train: Train,
    test: Test,
    out: Out = Path("evaluation-linear"),
    cached: Annotated[
        bool, typer.Option("--cached", help="In seconds: logistic regression on features, without augmentation.")
    ] = False,
    setting: Settings = None,
    pooling: Pooled = None,
    layer: Layer = None,
    norm: Norm = None,
    crop_pct: Crop = None,
    weights: Weights = None,
    limit: Limit = None,
    test_limit: TestLimit = None,
    method: Methods = None,
    seed: Seeds = None,
    random_baseline: Random = False,
    precision: Precise = Precision.float32,
    micro_batch: MicroBatch = None,
    device: DeviceName = "auto",
    num_workers: Workers = 0,
    num_heads: Heads = None,
    offline: Offline = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """MAE's linear probe (BatchNorm, LARS, 90 epochs with crops and flips), or --cached for one in seconds.

    Writes what knn writes, and for each checkpoint a folder with metrics.csv and classifier.pth (not with --cached).
    With --cached, --set takes penalty, tolerance and iterations.
    """
    if cached:
        from mto_analysis.runtime.settings import Options, Reader, field_types
        from mto_analysis.training.evaluation import Evaluation

        reader = Reader("--cached", {}, Options(settings_of(setting or [])))
        own = reader.given({name: field_types(Evaluation)[name] for name in ("penalty", "tolerance", "iterations")})
        reader.end()
        return on_features(context, "linear_cached", own)
    from mto_analysis.training.evaluation.classifier_settings import linear_settings

    return trained(context, "linear_mae", linear_settings)


@evaluate.command()
@launchable
def finetune(
    context: typer.Context,
    ckpt: Sources,
    train: Train,
    test: Test,
    out: Out = Path("evaluation-finetune"),
    setting: Settings = None,
    pooling: Pooled = None,
    crop_pct: Crop = None,
    weights: Weights = None,
    limit: Limit = None,
    test_limit: TestLimit = None,
    method: Methods = None,
    seed: Seeds = None,
    random_baseline: Random = False,
    precision: Precise = Precision.float32,
    micro_batch: MicroBatch = None,
    device: DeviceName = "auto",
    num_workers: Workers = 0,
    num_heads: Heads = None,
    offline: Offline = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune all of the encoder (layer-wise rates, mixup, RandAugment ...; the paper's supplementary Tables 3-6).

    Writes what knn writes, and for each checkpoint a folder with metrics.csv and classifier.pth. A killed run goes on
    exactly: after every epoch all that it needs is in last.pth.
    """
    from mto_analysis.training.evaluation.classifier_settings import finetune_settings

    trained(context, "finetune", finetune_settings)


def on_features(context: typer.Context, protocol: str, own: dict[str, Any]) -> None:
    """Score by an :class:`Evaluator`, whose images are decoded once."""
    from mto_analysis.training.evaluation import Evaluation, Evaluator
    from mto_analysis.training.evaluation.checkpoint_scores import CurveFile

    given = context.params
    here = this_process(given["device"])
    chosen = {name: _text(given[name]) for name in ("pooling", "norm", "precision")}
    chosen |= {name: given[name] for name in ("layer", "crop_pct", "limit", "test_limit")}
    evaluation = Evaluation(protocol, given["train"], given["test"], **chosen, **own)  # type: ignore[arg-type]
    evaluator = Evaluator(evaluation, num_workers=given["num_workers"])
    _say_skipped(evaluator.train, evaluator.test, quiet=given["quiet"])
    told = {**evaluation.settings(), "weights": _text(given["weights"])}
    curve = CurveFile(given["out"], told, overwrite=given["overwrite"], writes=here.main)

    def score(model: MaskedImageModel, checkpoint: RunCheckpoint) -> Score:
        return evaluator.evaluate(model, processes=here)

    _score_all(context, protocol, curve, score, here)


def trained(context: typer.Context, protocol: str, defaults: Callable[[MaskedImageModel], ClassifierSettings]) -> None:
    """Score by training a classifier for each checkpoint, in a folder of its own."""
    from mto_analysis.training.evaluation.checkpoint_scores import CurveFile
    from mto_analysis.training.evaluation.classifier_training import classifier_score, train_classifier
    from mto_analysis.training.evaluation.evaluator import Score
    from mto_analysis.training.evaluation.features import LabelledImages, check_classes
    from mto_analysis.training.settings import RunSettings

    given = context.params
    here = this_process(given["device"])
    options = settings_of(given["setting"] or [])
    own = {name: _text(given.get(name)) for name in ("pooling", "norm")}
    own |= {name: given.get(name) for name in ("layer", "crop_pct")}
    options |= {name: str(value) for name, value in own.items() if value is not None}
    workers = given["num_workers"]
    run = RunSettings(
        precision="bf16" if given["precision"] is Precision.bfloat16 else "no",
        num_workers=workers,
        device=given["device"],
    )
    train = LabelledImages(given["train"], limit=given["limit"], num_workers=workers)
    test = LabelledImages(given["test"], limit=given["test_limit"], num_workers=workers)
    _say_skipped(train, test, quiet=given["quiet"])
    classes = check_classes(train, test)
    told = {name: given[name] for name in ("train", "test", "limit", "test_limit")} | {
        "weights": _text(given["weights"])
    }
    curve = CurveFile(
        given["out"], {"protocol": protocol, **told, "set": options}, overwrite=given["overwrite"], writes=here.main
    )

    def score(model: MaskedImageModel, checkpoint: RunCheckpoint) -> Score:
        settings = defaults(model).with_options(options)
        folder = given["out"] / checkpoint.stem
        epochs = train_classifier(
            model,
            train,
            test,
            settings,
            folder,
            replace(run, seed=checkpoint.seed),
            micro_batch=given["micro_batch"],
            overwrite=given["overwrite"],
            on_note=partial(note, quiet=given["quiet"]),
        )
        label = f"{checkpoint.method} {'' if checkpoint.epoch is None else checkpoint.epoch}"
        for _ in progress(epochs, settings.epochs, label, quiet=given["quiet"]):
            pass
        top1, top5, seconds = classifier_score(folder)
        return Score(top1, top5, settings.feature(model), classes, seconds, settings.crop_pct)

    _score_all(context, protocol, curve, score, here)


def _say_skipped(*sources: LabelledImages, quiet: bool) -> None:
    """Which files beside the images are none."""
    for each in sources:
        if each.images.skipped:
            note(f"{each.source}: skipped {each.images.skipped_in_words}", quiet=quiet)


def _score_all(
    context: typer.Context,
    protocol: str,
    curve: CurveFile,
    score: Callable[[MaskedImageModel, RunCheckpoint], Score],
    here: Processes,
) -> None:
    """Score what the curve lacks, and the random encoders; then write the rest."""
    from mto_analysis.training.evaluation.checkpoint_scores import (
        load_encoder,
        named_checkpoints,
        score_checkpoints,
        score_random,
    )

    given = context.params
    say = partial(note, quiet=given["quiet"])
    checkpoints = named_checkpoints(given["ckpt"], given["method"], given["seed"])

    def load(checkpoint: RunCheckpoint) -> Encoder:
        encoder = load_encoder(
            checkpoint.source,
            weights=given["weights"] and given["weights"].value,
            num_heads=given["num_heads"],
            offline=given["offline"],
        )
        return encoder._replace(model=encoder.model.to(here.device))

    def scored(checkpoint: RunCheckpoint) -> Score:
        encoder = load(checkpoint)
        if encoder.note:
            say(encoder.note)
        return score(encoder.model, checkpoint)._replace(weights=encoder.weights)

    todo = [checkpoint for checkpoint in checkpoints if not curve.holds(checkpoint)]
    if there := len(checkpoints) - len(todo):
        say(f"{there} of {len(checkpoints)} checkpoints are in {curve.path} already")
    for row in score_checkpoints(checkpoints, curve, scored, protocol):
        say(f"{row['method']} epoch {row['epoch']} seed {row['seed']}: {row['score']:.2f} % ({row['seconds']:.0f} s)")
    random: dict[str, float] = {}
    if given["random_baseline"]:
        random = score_random(checkpoints, curve, lambda one: load(one).model, score, protocol)
        for name, value in random.items():
            say(f"{name}, random weights: {value:.2f} %")
    if here.main:
        _write(context, protocol, curve, random, len(todo))


def _write(context: typer.Context, protocol: str, curve: CurveFile, random: dict[str, float], scored: int) -> None:
    """What was run, and the figure, beside the curve; then the table on the screen."""
    from mto_analysis.runtime.outputs import json_bytes, run_metadata, write_atomically

    table = curve.table()
    metadata = run_metadata(context.params, protocol=protocol, scored=scored, random=random)
    write_atomically(curve.path.parent / "run.json", json_bytes(metadata))
    names = ["curves.csv", "run.json", *(["random.csv"] if random else [])]
    if table["epoch"].nunique() > 1:
        from mto_analysis.figures.plots.evaluation import draw_accuracy
        from mto_analysis.figures.plots.style import figure_bytes

        figure = draw_accuracy(table, random)
        for kind in ("png", "pdf"):
            write_atomically(curve.path.parent / f"curves.{kind}", figure_bytes(figure, kind))
        names += ["curves.png", "curves.pdf"]
    shown = table.drop(columns=["protocol", "checkpoint", "seconds"]).dropna(axis="columns", how="all")
    typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.2f}", na_rep="-"))
    note(f"wrote {', '.join(names)} to {curve.path.parent}", quiet=context.params["quiet"])


def _text(value: StrEnum | None) -> str | None:
    return None if value is None else value.value
