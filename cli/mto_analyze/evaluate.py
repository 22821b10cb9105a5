"""``mto-analyze evaluate``: what encoders are worth, by kNN, linear probes and fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mto_analysis.runtime.processes import Processes, this_process
from mto_analyze import measuring
from mto_analyze.console import Command, CommandGroup, launchable, note, progress, settings_of
from mto_analyze.options import (
    ADVANCED,
    INPUT,
    Accumulation,
    DeviceName,
    DrawingOptions,
    Group,
    LoadingOptions,
    OutputOptions,
    Strict,
    ValueRange,
    WeightsOption,
    Workers,
    takes,
)
from mto_analyze.repeating import write_record

if TYPE_CHECKING:
    from mto_analysis.images import Images
    from mto_analysis.models import MaskedImageModel
    from mto_analysis.training.evaluation import Evaluator, Score
    from mto_analysis.training.evaluation.checkpoint_scores import CurveFile, Encoder, RunCheckpoint
    from mto_analysis.training.evaluation.classifier_settings import ClassifierSettings
    from mto_analysis.training.evaluation.features import LabelledImages

evaluate = typer.Typer(
    cls=CommandGroup,
    help="Score encoders on labelled images: kNN, linear probe, fine-tuning.",
)


class PoolingOption(StrEnum):
    """What becomes of tokens."""

    class_ = "class"
    patches = "patches"
    concat = "concat"
    attentive = "attentive"


class LayersOption(StrEnum):
    """Which layers."""

    all = "all"


class NormOption(StrEnum):
    """What normalizes features."""

    encoder = "encoder"
    fresh = "fresh"
    off = "off"


class EncoderPrecision(StrEnum):
    """Number formats of an encoder's forward pass."""

    fp32 = "fp32"
    bf16 = "bf16"


class Labelled(Group):
    """Labelled images."""

    panel = INPUT
    train: Annotated[
        str, typer.Option(metavar="PATH", help="Labelled training images: folder of classes, Parquet or tar.")
    ]
    test: Annotated[str, typer.Option(metavar="PATH", help="Labelled test images.")]
    train_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only N training images, evenly spaced.")
    ] = None
    test_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use only N test images, evenly spaced.")
    ] = None
    value_range: ValueRange = None
    strict: Strict = False


class Encoders(LoadingOptions):
    """Checkpoints, how they are loaded, and which of their weights are scored."""

    ckpt: Annotated[
        list[str],
        typer.Option(
            "--ckpt", metavar="CKPT", help="Checkpoint, or folder of a run with its checkpoint-*.pth; repeatable."
        ),
    ]
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of each --ckpt; by default the run's own.")
    ] = None
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", metavar="N", help="Seed of each --ckpt, or of all; by default the run's own, else 0."),
    ] = None
    weights: Annotated[
        WeightsOption | None,
        typer.Option(metavar="NAME", help="model or model_ema (momentum teacher); by default as published."),
    ] = None
    random_baseline: Annotated[
        bool, typer.Option("--random-baseline", help="Also score the architecture with random weights.")
    ] = False


class Features(Group):
    """What of the encoder is scored."""

    panel = ADVANCED
    layer: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Block whose tokens are read, from 1; by default as published."),
    ] = None
    layers: Annotated[
        LayersOption | None,
        typer.Option(metavar="all", help="Score all layer depths; choose the best on half of the test images."),
    ] = None
    norm: Annotated[
        NormOption | None,
        typer.Option(metavar="NAME", help="encoder (its own final norm), fresh or off; by default as published."),
    ] = None


class Scoring(Group):
    """How encoders are scored."""

    panel = ADVANCED
    pooling: Annotated[
        PoolingOption | None,
        typer.Option(
            metavar="NAME",
            help="class (token), patches (their mean), concat (both) or attentive (weighted mean); by default as "
            "published.",
        ),
    ] = None
    crop_pct: Annotated[
        float | None,
        typer.Option(
            "--crop-pct",
            metavar="SHARE",
            help="Centre crop of test images, of their resized shorter side; by default as published (1 up to 64 px).",
        ),
    ] = None
    device: DeviceName = "auto"
    precision: Annotated[EncoderPrecision, typer.Option(metavar="FORMAT", help="Autocast: fp32 or bf16.")] = (
        EncoderPrecision.fp32
    )
    num_workers: Workers = 0


class Trained(Group):
    """Training of a classifier."""

    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the protocol; repeatable."),
    ] = None
    accumulation: Accumulation = 1


Cached = Annotated[
    bool, typer.Option("--cached", help="Logistic regression on features, without augmentation: seconds, not hours.")
]


@evaluate.command(cls=Command)
@launchable
@takes(Labelled, Encoders, OutputOptions, DrawingOptions, Features, Scoring, out=Path("evaluation-knn"))
def knn(
    context: typer.Context,
    neighbours: Annotated[
        int, typer.Option("-k", "--neighbours", min=1, metavar="K", help="Number of neighbours.")
    ] = 20,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Temperature: a neighbour weighs exp(cosine / T).")
    ] = 0.07,
) -> None:
    """Score frozen encoders by weighted kNN.

    Similarity is the cosine of features, with k = 20 and temperature 0.07, as in DINO.

    Writes curves.csv (method epoch score seed ...), settings.json and run.json to --out; with several epochs also
    curves.png and .pdf, with --random-baseline also random.csv. The same command resumes an unfinished curve.
    --layers all writes layers.csv, heterogeneity.csv, layers.png and .pdf, and run.json instead.

    Example:
      mto-analyze evaluate knn --ckpt run --train train.parquet --test test.parquet
    """
    on_features(context, "knn", {"neighbours": neighbours, "temperature": temperature})


@evaluate.command(cls=Command)
@launchable
@takes(Labelled, Encoders, Trained, OutputOptions, DrawingOptions, Features, Scoring, out=Path("evaluation-linear"))
def linear(
    context: typer.Context, setting: list[str] | None, layers: LayersOption | None, cached: Cached = False
) -> None:
    """Train linear probes on frozen encoders.

    The protocol is MAE's (BatchNorm, LARS, 90 epochs with crops and flips); --cached fits one in seconds, and so does
    --layers all for every layer depth.

    Writes what knn writes, and for each checkpoint a folder with metrics.csv and classifier.pth (not with --cached).
    With --cached, --set takes penalty, tolerance and iterations.

    Example:
      mto-analyze evaluate linear --cached --ckpt run --train train --test test
    """
    if cached or layers:
        from mto_analysis.runtime.settings import Options, Reader, field_types
        from mto_analysis.training.evaluation import Evaluation

        reader = Reader("--cached", {}, Options(settings_of(setting or [])))
        own = reader.given({name: field_types(Evaluation)[name] for name in ("penalty", "tolerance", "iterations")})
        if context.params["accumulation"] != 1:
            raise ValueError("--accumulation is for classifiers that are trained, not for --cached or --layers")
        reader.end()
        return on_features(context, "linear_cached", own)
    from mto_analysis.training.evaluation.classifier_settings import linear_settings

    return trained(context, "linear_mae", linear_settings)


@evaluate.command(cls=Command)
@launchable
@takes(Labelled, Encoders, Trained, OutputOptions, DrawingOptions, Scoring, out=Path("evaluation-finetune"))
def finetune(context: typer.Context) -> None:
    """Fine-tune encoders as classifiers.

    With layer-wise learning rates, mixup, RandAugment ..., as in the paper's supplementary Tables 3-6. Writes what knn
    writes, and for each checkpoint a folder with metrics.csv and classifier.pth. The same command resumes a killed run
    exactly, from last.pth, which is saved after every epoch.

    Example:
      mto-analyze evaluate finetune --ckpt run --train train --test test
    """
    from mto_analysis.training.evaluation.classifier_settings import finetune_settings

    trained(context, "finetune", finetune_settings)


def on_features(context: typer.Context, protocol: str, own: dict[str, Any]) -> None:
    """Score by an :class:`Evaluator`, whose images are decoded once."""
    from mto_analysis.training.evaluation import Evaluation, Evaluator

    given = context.params
    here = this_process(given["device"])
    chosen = {name: _text(given[name]) for name in ("pooling", "norm", "precision")}
    chosen |= {name: given[name] for name in ("layer", "crop_pct", "test_limit", "value_range")}
    chosen |= {"limit": given["train_limit"]}
    evaluation = Evaluation(protocol, given["train"], given["test"], **chosen, **own)  # type: ignore[arg-type]
    evaluator = Evaluator(evaluation, num_workers=given["num_workers"])
    _say_skipped(given, evaluator.train, evaluator.test)
    if given["layers"]:
        return _score_layers(context, protocol, evaluator, here)

    def score(model: MaskedImageModel, checkpoint: RunCheckpoint) -> Score:
        return evaluator.evaluate(model, processes=here)

    with _curve(given, evaluation.settings(), here) as curve:
        _score_all(context, protocol, curve, score, here, (evaluator.train, evaluator.test))


def trained(context: typer.Context, protocol: str, defaults: Callable[[MaskedImageModel], ClassifierSettings]) -> None:
    """Score by training a classifier for each checkpoint, in a folder of its own."""
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
        precision=given["precision"].value,
        accumulation=given["accumulation"],
        num_workers=workers,
        device=given["device"],
    )
    train, test = (
        LabelledImages(given[name], limit=given[f"{name}_limit"], num_workers=workers, value_range=given["value_range"])
        for name in ("train", "test")
    )
    _say_skipped(given, train, test)
    classes = check_classes(train, test)
    told = {name: given[name] for name in ("train", "test", "train_limit", "test_limit", "value_range")}
    told |= {"protocol": protocol, "set": options, "precision": run.precision, "accumulation": run.accumulation}

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
            overwrite=given["overwrite"],
            on_note=partial(note, quiet=given["quiet"]),
        )
        label = f"{checkpoint.method} {'' if checkpoint.epoch is None else checkpoint.epoch}"
        for _ in progress(epochs, settings.epochs, label, quiet=given["quiet"]):
            pass
        top1, top5, seconds = classifier_score(folder)
        return Score(top1, top5, settings.feature(model), classes, seconds, settings.crop_pct)

    with _curve(given, told, here) as curve:
        _score_all(context, protocol, curve, score, here, (train, test))


@contextmanager
def _curve(given: Mapping[str, Any], settings: Mapping[str, Any], here: Processes) -> Iterator[CurveFile]:
    """The curve in ``--out``, while no other process may work on it; with all that its scores depend on."""
    from mto_analysis.runtime.outputs import locked_folder
    from mto_analysis.training.evaluation.checkpoint_scores import CurveFile

    told = {**settings, **measuring.loading(given), "weights": _text(given["weights"])}
    told.pop("offline")
    with locked_folder(given["out"]) if here.main else nullcontext():
        yield CurveFile(given["out"], told, overwrite=given["overwrite"], writes=here.main)


def _say_skipped(given: Mapping[str, Any], *sources: LabelledImages) -> None:
    """Which files beside the images are none.

    Raises:
        DataError: If there are any, under ``--strict``.
    """
    from mto_analysis.errors import DataError

    for each in sources:
        if each.images.skipped:
            words = f"{each.source}: skipped {each.images.skipped_in_words}"
            if given["strict"]:
                raise DataError(f"{words} beside the images; move them away, or leave --strict out")
            note(words, quiet=given["quiet"])


def _load(given: Mapping[str, Any], here: Processes, images: Images, checkpoint: RunCheckpoint) -> Encoder:
    """A checkpoint on this process's device."""
    from mto_analysis.checkpoints import LoadOptions
    from mto_analysis.probe.request import Settings
    from mto_analysis.training.evaluation.checkpoint_scores import load_encoder

    encoder = load_encoder(
        checkpoint.source,
        images,
        weights=given["weights"] and given["weights"].value,
        loading=LoadOptions(**{**measuring.loading(given), "weights": "model"}),
        settings=Settings(limit=given["train_limit"], device=str(here.device)),
        listener=measuring.listener(given),
        processes=here,
    )
    if encoder.note:
        note(encoder.note, quiet=given["quiet"])
    return encoder


def _score_layers(context: typer.Context, protocol: str, evaluator: Evaluator, here: Processes) -> None:
    """Accuracy and H of every layer depth; the best layer is chosen and scored on different images."""
    import pandas as pd

    from mto_analysis.figures.files import file_names
    from mto_analysis.figures.plots.layers import draw_layers
    from mto_analysis.models.initialization import random_weights
    from mto_analysis.runtime.outputs import OutputFolder
    from mto_analysis.training.evaluation.checkpoint_scores import named_checkpoints, verdicts
    from mto_analysis.training.evaluation.layers import evaluate_layers, heterogeneity_by_depth, layer_sentences

    given = context.params
    if given["layer"] or given["pooling"]:
        raise ValueError("--layers all scores every layer and pooling; leave --layer and --pooling out")
    files = file_names(["layers.csv", "heterogeneity.csv", "layers", "run.json"])
    here.on_main(partial(OutputFolder, given["out"], files, overwrite=given["overwrite"]))
    scores, curves = [], []
    checkpoints = named_checkpoints(given["ckpt"], given["label"], given["seed"], offline=given["offline"])
    runs = {(each.method, each.seed) for each in checkpoints}
    for checkpoint in checkpoints:
        encoder = _load(given, here, evaluator.train.images, checkpoint)
        seed = f", seed {checkpoint.seed}" if sum(method == checkpoint.method for method, _ in runs) > 1 else ""
        name = checkpoint.method + seed + ("" if checkpoint.epoch is None else f", epoch {checkpoint.epoch}")
        models = {name: encoder.model}
        if given["random_baseline"]:
            models[f"{name}, random weights"] = random_weights(encoder.model.cpu(), checkpoint.seed).to(here.device)
            encoder.model.to(here.device)
        for label, model in models.items():
            scores.append(evaluate_layers(evaluator, model, processes=here).assign(model=label, seed=checkpoint.seed))
            unknown = {*encoder.unknown, *(option for option in model.info.unsettled_heads if given[option] is None)}
            if unknown:
                advice = "".join(f"; give --{each.replace('_', '-')}" for each in sorted(unknown) if "heads" in each)
                words = f"no H, as the file does not say {', '.join(sorted(unknown))}{advice}"
                note(f"{label}: {words}", quiet=given["quiet"])
            elif here.main:
                curves.append(heterogeneity_by_depth(evaluator, model).assign(model=label))
    if not here.main:
        return
    table = pd.concat(scores, ignore_index=True)
    table.insert(0, "model", table.pop("model"))
    heterogeneity = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame(columns=["model", "layer_depth"])
    outputs = {"layers.csv": table, "heterogeneity.csv": heterogeneity}
    figure = partial(draw_layers, table, heterogeneity, protocol)
    told = {"settings": evaluator.evaluation.settings(), "protocol": protocol, "random": given["random_baseline"]}
    measuring.write(given, files, {**outputs, "layers": figure}, **told)
    shown = table[["model", "pooling", "layer", "selection", "score", "ci_low", "ci_high", "chosen"]]
    typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    best = table[table["chosen"]].assign(epoch=float("nan")).rename(columns={"model": "method"})
    score = best.set_index("method")["score"]
    random = {name: score[f"{name}, random weights"] for name in score.index if f"{name}, random weights" in score}
    typer.echo("\n".join([*layer_sentences(table), *verdicts(best, random, best["num_images"].max())]))


def _score_all(
    context: typer.Context,
    protocol: str,
    curve: CurveFile,
    score: Callable[[MaskedImageModel, RunCheckpoint], Score],
    here: Processes,
    images: tuple[LabelledImages, LabelledImages],
) -> None:
    """Score what the curve lacks, and the random encoders; then write the rest."""
    from mto_analysis.training.evaluation.checkpoint_scores import named_checkpoints, score_checkpoints, score_random

    given = context.params
    say = partial(note, quiet=given["quiet"])
    checkpoints = named_checkpoints(given["ckpt"], given["label"], given["seed"], offline=given["offline"])
    load = partial(_load, given, here, images[0].images)

    def scored(checkpoint: RunCheckpoint) -> Score:
        encoder = load(checkpoint)
        return score(encoder.model, checkpoint)._replace(weights=encoder.weights)

    todo = [checkpoint for checkpoint in checkpoints if not curve.holds(checkpoint)]
    if there := len(checkpoints) - len(todo):
        say(f"{there} of {len(checkpoints)} checkpoints are in {curve.path} already")
    for row in score_checkpoints(checkpoints, curve, scored, protocol):
        epoch = "" if row["epoch"] is None else f" epoch {row['epoch']}"
        say(f"{row['method']}{epoch} seed {row['seed']}: {row['score']:.2f} % ({row['seconds']:.0f} s)")
    random: dict[str, float] = {}
    if given["random_baseline"]:
        random = score_random(checkpoints, curve, lambda one: load(one).model, score, protocol)
        for name, value in random.items():
            say(f"{name}, random weights: {value:.2f} %")
    if here.main:
        skipped = {name: dict(each.images.skipped) for name, each in zip(("train", "test"), images, strict=True)}
        told = {"protocol": protocol, "scored": len(todo), "skipped": skipped, "device": here.device_name}
        told["test_images"] = len(images[1].rows)
        _write(context, curve, random, told)


def _write(context: typer.Context, curve: CurveFile, random: dict[str, float], told: dict[str, Any]) -> None:
    """What was run, and the figure, beside the curve; then the table on the screen."""
    from mto_analysis.runtime.outputs import json_bytes, run_metadata, write_atomically
    from mto_analysis.training.evaluation.checkpoint_scores import verdicts

    table = curve.table()
    metadata = run_metadata(context.params, random=random, settings=curve.settings, **told)
    write_atomically(curve.path.parent / "run.json", json_bytes(metadata))
    names = [
        "curves.csv",
        "settings.json",
        "run.json",
        *(["random.csv"] if random else []),
        *write_record(curve.path.parent, metadata),
    ]
    if table["epoch"].nunique() > 1:
        from mto_analysis.figures.files import write_figure
        from mto_analysis.figures.plots.evaluation import draw_accuracy

        names += [path.name for path in write_figure(curve.path.parent, "curves", draw_accuracy(table, random))]
    shown = table.drop(columns=["protocol", "checkpoint", "sha256", "seconds"]).dropna(axis="columns", how="all")
    typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.2f}", na_rep="-"))
    typer.echo("\n".join(verdicts(table, random, told["test_images"])))
    note(f"wrote {', '.join(names)} to {curve.path.parent}", quiet=context.params["quiet"])


def _text(value: StrEnum | None) -> str | None:
    return None if value is None else value.value
