"""Which layer of an encoder to use: accuracy at every layer depth from one pass, beside heterogeneity.

The best layer of many looks better than it is on the images that chose it. So one half of the test images chooses it,
and the other half says what it is worth.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from mto_analysis.errors import DataError
from mto_analysis.images import ImageBatch
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe import probe
from mto_analysis.runtime.processes import Processes
from mto_analysis.runtime.randomness import keyed_uniform, name_keys
from mto_analysis.runtime.statistics import reach_of_mean
from mto_analysis.training.evaluation.evaluator import Evaluator
from mto_analysis.training.evaluation.features import extract_features, normalized
from mto_analysis.training.evaluation.protocols import Feature, crop_pct_of, feature_of
from mto_analysis.training.methods.method import Norm, Pooling

#: How tokens are pooled at every layer depth, and what that is called in figures.
LAYER_POOLINGS: dict[Pooling, str] = {
    "patches": "mean of patches",
    "class": "class token",
    "attentive": "attentive pooling",
}


def layer_features(model: MaskedImageModel, norm: Norm | None = None) -> list[Feature]:
    """The features of every layer depth, from the input of the first block on, whose class token is not the image's."""
    chosen = feature_of(model, norm=norm).norm
    depths = range(len(model.encoder_blocks()) + 1)
    poolings: list[Pooling] = [each for each in LAYER_POOLINGS if each != "class" or model.encoder_prefix_tokens]
    return [Feature(pooling, layer, chosen) for pooling in poolings for layer in depths if layer or pooling != "class"]


def evaluate_layers(
    evaluator: Evaluator, model: MaskedImageModel, *, processes: Processes | None = None
) -> pd.DataFrame:
    """Accuracy at every layer depth, and which one is best; images are decoded and encoded once.

    One half of the test images, by a hash of their names, chooses the layer and pooling with the highest accuracy;
    ``score`` is the accuracy on the other half. Memory grows by 4 bytes x width for each image and feature.

    Returns:
        A row per pooling and layer: ``pooling layer norm selection score ci_low ci_high difference difference_ci_low
        difference_ci_high chosen num_selection num_images``; accuracies in percent. ``selection`` is that on the half
        that chooses; the interval of ``score`` is Wilson's, that of the ``difference`` to the last block of the same
        pooling Student's t of the images' differences; both 95 %.
    """
    from scipy.stats import binomtest

    features, chosen = _features(evaluator, model), evaluator.evaluation
    selecting = _selection([evaluator.test.images.names[row] for row in evaluator.test.rows])
    train, test = (
        extract_features(
            model,
            images,
            *features,
            crop_pct=chosen.crop_pct or crop_pct_of(model),
            precision=chosen.precision,
            processes=processes,
        )
        for images in (evaluator.train, evaluator.test)
    )
    right = {}
    for feature, known, unknown in zip(features, train, test, strict=True):
        scores, _ = evaluator.scores(known, unknown)
        right[feature] = (scores.argmax(dim=1) == unknown.labels).cpu().numpy()
    best = max(features, key=lambda feature: right[feature][selecting].mean())  # the first of several
    rows = []
    for feature in features:
        mine = right[feature][~selecting]
        interval = binomtest(int(mine.sum()), len(mine)).proportion_ci(method="wilson")
        last = right[feature._replace(layer=features[-1].layer)][~selecting]
        difference = 100.0 * (mine.astype(float) - last)
        half = float(difference.std(ddof=1) * reach_of_mean(len(mine)))
        rows.append(
            {
                **feature._asdict(),
                "selection": 100.0 * right[feature][selecting].mean(),
                "score": 100.0 * mine.mean(),
                "ci_low": 100.0 * interval.low,
                "ci_high": 100.0 * interval.high,
                "difference": difference.mean(),
                "difference_ci_low": difference.mean() - half,
                "difference_ci_high": difference.mean() + half,
                "chosen": feature == best,
                "num_selection": int(selecting.sum()),
                "num_images": len(mine),
            }
        )
    return pd.DataFrame(rows)


def _features(evaluator: Evaluator, model: MaskedImageModel) -> list[Feature]:
    try:
        return layer_features(model, evaluator.evaluation.norm)
    except ValueError as error:
        raise DataError(str(error)) from None


def _selection(names: list[str]) -> np.ndarray:
    """Which half of the images chooses; a function of their names alone."""
    if len(names) < 4:
        raise DataError(f"{len(names)} test images are too few to choose a layer on one half and score it on the other")
    order = keyed_uniform(name_keys(names), 1, seed=0, epoch=0, purpose="choice of a layer")[:, 0].argsort(
        kind="stable"
    )
    selecting = np.zeros(len(names), dtype=bool)
    selecting[order[: len(names) // 2]] = True
    return selecting


def heterogeneity_by_depth(evaluator: Evaluator, model: MaskedImageModel) -> pd.DataFrame:
    """H of the same model on the test images, under its own kind of mask (seed 0).

    Returns:
        Rows of :meth:`~mto_analysis.probe.engine.ProbeResult.summary`.
    """
    return probe(model, _batches(evaluator, model)).summary()


def _batches(evaluator: Evaluator, model: MaskedImageModel) -> Iterator[ImageBatch]:
    test, device = evaluator.test, next(model.parameters()).device
    names = [test.images.names[row] for row in test.rows]
    crop_pct = evaluator.evaluation.crop_pct or crop_pct_of(model)
    for number, images in test.batches(model.info, crop_pct=crop_pct):
        start = number * test.batch_size
        with torch.no_grad():
            yield ImageBatch(tuple(names[start : start + len(images)]), normalized(images.to(device), model.info))


def layer_sentences(table: pd.DataFrame) -> list[str]:
    """Which layer is best and what it is worth on images that did not choose it, a sentence per model.

    Args:
        table: Rows of :func:`evaluate_layers`, with a column ``model``.
    """
    sentences = []
    last = table.groupby("model")["layer"].max()
    for row in table[table["chosen"]].to_dict("records"):
        low, high = row["difference_ci_low"], row["difference_ci_high"]
        gain, place = f", {row['difference']:+.2f} points ({low:+.2f} to {high:+.2f}) against the last block", ""
        if row["layer"] == last[row["model"]]:
            gain, place = "", ", the last,"
        sentences.append(
            f"{row['model']}: {LAYER_POOLINGS[row['pooling']]} at layer depth {row['layer']}{place} is best on "
            f"{row['num_selection']} images; on {row['num_images']} others it has {row['score']:.2f} % "
            f"({row['ci_low']:.2f} to {row['ci_high']:.2f}){gain}."
        )
    return sentences
