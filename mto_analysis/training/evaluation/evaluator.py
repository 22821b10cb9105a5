"""Scores of a frozen encoder by kNN or a linear classifier on its features, again and again along a run."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mto_analysis.errors import DataError
from mto_analysis.models import MaskedImageModel
from mto_analysis.probe.knn import knn_scores
from mto_analysis.runtime.precision import fast_float32
from mto_analysis.runtime.processes import Processes
from mto_analysis.training.evaluation.features import Features, LabelledImages, check_classes, extract_features
from mto_analysis.training.evaluation.linear import linear_scores
from mto_analysis.training.evaluation.protocols import Evaluation, Feature, crop_pct_of, feature_of


class Score(NamedTuple):
    """Accuracy on the test images in percent; ``top5`` where there are more than five classes.

    Attributes:
        top1: Images whose class has the highest score.
        top5: Images whose class is among the five highest.
        feature: What was read of the encoder, as chosen or as the model's family is probed.
        num_classes: Classes in all.
        seconds: For everything.
        crop_pct: Side of the test images' centre crop over their resized shorter side.
        iterations: Of the solver of ``linear_cached``.
        weights: Which of a checkpoint's weights the model has.
    """

    top1: float
    top5: float | None
    feature: Feature
    num_classes: int
    seconds: float
    crop_pct: float
    iterations: int | None = None
    weights: str = "model"


def accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of images whose class is among the ``k`` with the highest scores.

    Shapes:
        scores: num_images num_classes
        labels: num_images

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        50.0
    """
    found = scores.topk(k, dim=1).indices == labels[:, None]
    return 100.0 * int(found.any(dim=1).sum()) / len(labels)


class Evaluator:
    """Keeps the decoded images of an :class:`Evaluation` and scores any number of models with them.

    The model is used where it is (its device and number format), in eval mode, and left as it was found: training mode,
    gradients and random state. The score depends on the model and the evaluation alone, not on the number of workers or
    processes; nothing in it is random.

    Args:
        evaluation: Protocol, images and settings.
        num_workers: Processes that decode, at first use.

    Raises:
        DataError: If images are missing, have no labels, or training and test differ in their classes.
    """

    def __init__(self, evaluation: Evaluation, *, num_workers: int = 0) -> None:
        self.evaluation = evaluation
        options: dict[str, Any] = {
            "batch_size": evaluation.batch_size,
            "num_workers": num_workers,
            "value_range": evaluation.value_range,
        }
        self.train = LabelledImages(str(evaluation.train), limit=evaluation.limit, **options)
        self.test = LabelledImages(str(evaluation.test), limit=evaluation.test_limit, **options)
        self.num_classes = check_classes(self.train, self.test)

    def evaluate(self, model: MaskedImageModel, *, processes: Processes | None = None) -> Score:
        """Score a model.

        Args:
            model: With an encoder that sees whole images.
            processes: All of them call this at once; each encodes its share of the images and all return the same
                score. Without them the caller does everything alone.

        Warns:
            UserWarning: If the linear classifier did not reach its tolerance.
        """
        start = time.perf_counter()
        chosen = self.evaluation
        try:
            model.encoder_blocks()
        except ValueError as error:
            raise DataError(str(error)) from None
        feature = feature_of(model, chosen.pooling, chosen.layer, chosen.norm)
        crop_pct = chosen.crop_pct or crop_pct_of(model)
        (train,), (test,) = (
            extract_features(model, images, feature, crop_pct=crop_pct, precision=chosen.precision, processes=processes)
            for images in (self.train, self.test)
        )
        scores, iterations = self.scores(train, test)
        top5 = accuracy(scores, test.labels, 5) if self.num_classes > 5 else None
        seconds = time.perf_counter() - start
        return Score(accuracy(scores, test.labels), top5, feature, self.num_classes, seconds, crop_pct, iterations)

    @torch.no_grad()
    def scores(self, train: Features, test: Features) -> tuple[Tensor, int | None]:
        """Scores of the test images for each class by the protocol's classifier, and the steps of its solver.

        Args:
            train: Features of the training images.
            test: The same feature of the test images.
        """
        chosen = self.evaluation
        with fast_float32(test.vectors.device.type):
            if chosen.protocol == "knn":
                votes = knn_scores(
                    *train,
                    test.vectors,
                    self.num_classes,
                    neighbours=chosen.neighbours,
                    temperature=chosen.temperature,
                )
                return votes, None
            fit = linear_scores(
                *train,
                test.vectors,
                self.num_classes,
                penalty=chosen.penalty,
                tolerance=chosen.tolerance,
                iterations=chosen.iterations,
            )
            return fit.scores, fit.iterations

    def score(self, model: MaskedImageModel, *, processes: Processes | None = None) -> float:
        """Top-1 accuracy in percent; arguments as for :meth:`evaluate`."""
        return self.evaluate(model, processes=processes).top1


def score(model: MaskedImageModel, evaluation: Evaluation) -> float:
    """Top-1 accuracy of one model in percent; for several, keep an :class:`Evaluator`."""
    return Evaluator(evaluation).score(model)
