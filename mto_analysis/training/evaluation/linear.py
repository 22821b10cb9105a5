"""A linear classifier on features that were computed once: seconds instead of MAE's 90 augmented epochs."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: Logits held at once.
_MOST_VALUES = 2**24
_EPS = 1e-6  # as MAE's BatchNorm
#: Values of all features up to which the CPU fits: each conjugate gradient step asks its device for numbers, and each
#: time waits for whatever else the device does.
_FOR_CPU = 2**24
_SUFFICIENT_DECREASE = 1e-4  # of Armijo's rule
_SMALLEST_STEP = 2.0**-30
_MOST_PRODUCTS = 200  # of a Newton step


class LinearFit(NamedTuple):
    """Scores of the test images, and how near the classifier is to the best one.

    Attributes:
        scores: Logits, ``num_test num_classes``.
        iterations: Newton steps taken.
        gap: How far the objective lies above its minimum, at most.
    """

    scores: Tensor
    iterations: int
    gap: float


def linear_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    *,
    penalty: float = 1e-5,
    tolerance: float = 1e-8,
    iterations: int = 100,
) -> LinearFit:
    r"""Logits of test images from multinomial logistic regression on standardized features.

    BatchNorm without affine parameters, as in MAE's head, with the statistics of all training images; then one linear
    layer with bias. The objective,

    .. math:: \frac{1}{n} \sum_i -\log p_{y_i}(x_i) + \frac{\lambda}{2} \lVert W \rVert^2,

    is convex, so there is one best classifier, no learning rate and no seed. It is found in float64 to within
    ``tolerance``, whatever the features: nearly singular ones too, for which a fixed number of gradient steps would be
    a hidden hyperparameter. Without augmentation scores are some points below MAE's protocol.

    Shapes:
        train: num_train dim
        labels: num_train
        test: num_test dim

    Args:
        train: Features of training images.
        labels: Their classes.
        test: Features of test images.
        num_classes: Classes in all.
        penalty: :math:`\lambda`, on the weights and not on the biases.
        tolerance: Largest distance (nats) of the objective from its minimum; 1e-8 moves no score by more than a few
            thousandths of a point.
        iterations: Most Newton steps; ten or so are needed. If they do not suffice, a warning says so.

    Example:
        >>> train = torch.tensor([[-1.0], [-2.0], [1.0], [3.0]])
        >>> fit = linear_scores(train, torch.tensor([0, 0, 1, 1]), torch.tensor([[-9.0], [9.0]]), 2)
        >>> fit.scores.argmax(dim=1), fit.gap < 1e-8
        (tensor([0, 1]), True)
    """
    device = train.device
    if train.numel() <= _FOR_CPU or device.type == "mps":  # MPS has no float64
        train, labels, test = train.cpu(), labels.cpu(), test.cpu()
    variance, mean = torch.var_mean(train.double(), dim=0, correction=0)
    scale = (variance + _EPS).rsqrt()
    problem = LogisticRegression((train - mean) * scale, labels, num_classes, penalty)
    weight, steps, gap = problem.solve(tolerance, iterations)
    if gap > tolerance:
        warnings.warn(
            f"the linear classifier is not converged after {steps} iterations: its objective may lie {gap:.1e} above "
            f"the minimum, more than {tolerance:.1e}; allow more iterations or raise the tolerance or the penalty",
            stacklevel=2,
        )
    return LinearFit((_with_ones((test - mean) * scale) @ weight.T).to(device), steps, gap)


class LogisticRegression:
    r"""Multinomial logistic regression with an L2 penalty, solved by Newton steps without any Hessian in memory.

    Weights are ``num_classes dim+1`` with the biases in the last column, all in float64. A Newton step is found by
    conjugate gradients; their preconditioner is :math:`(\bar P \otimes C + \lambda)^{-1}` in the eigenbases of
    the features' second moments :math:`C` and of the mean covariance of the predicted classes :math:`\bar P`, for
    which the Hessian is exact where predictions do not depend on features. So the number of products hardly depends on
    how singular the features are.

    Shapes:
        features: num_images dim
        labels: num_images

    Args:
        features: Centred, so that biases are nearly independent of weights.
        labels: Classes.
        num_classes: Classes in all.
        penalty: On half the squared norm of the weights; positive, or separable features have no best classifier.

    Source:
        Nocedal and Wright, "Numerical Optimization" (2nd edition), Algorithm 7.1.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> None:
        design = _with_ones(features.double())
        self._penalty = design.new_full((design.shape[1],), penalty)
        self._penalty[-1] = 0.0
        self._smallest_penalty = penalty
        self._num_images, self._num_classes = len(design), num_classes
        size = max(1, _MOST_VALUES // num_classes)
        self._chunks = list(zip(torch.split(design, size), torch.split(labels[:, None], size), strict=True))
        self._variances, self._axes = torch.linalg.eigh(design.T @ design / len(design))

    def value(self, weight: Tensor) -> Tensor:
        """The objective."""
        total = weight.new_zeros(())
        for rows, labels in self._chunks:
            total -= (rows @ weight.T).log_softmax(dim=1).gather(1, labels).sum()
        return total / self._num_images + 0.5 * (self._penalty * weight.square()).sum()

    def gradient(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, and the mean covariance of predicted classes.

        Shapes:
            weight: num_classes dim+1
            returns: num_classes dim+1; num_classes num_classes
        """
        gradient = self._penalty * weight
        covariance = weight.new_zeros(self._num_classes, self._num_classes)
        for rows, labels in self._chunks:
            predicted = (rows @ weight.T).softmax(dim=1)
            covariance += (predicted.sum(dim=0).diag() - predicted.T @ predicted) / self._num_images
            predicted.scatter_add_(1, labels, predicted.new_full((1, 1), -1.0).expand_as(labels))
            gradient.addmm_(predicted.T, rows, alpha=1 / self._num_images)
        return gradient, covariance

    def curvature(self, weight: Tensor, direction: Tensor) -> Tensor:
        """The Hessian at ``weight`` times ``direction``; all of the shape of the weights."""
        product = self._penalty * direction
        for rows, _ in self._chunks:
            predicted, change = (rows @ weight.T).softmax(dim=1), rows @ direction.T
            change = predicted * (change - (predicted * change).sum(dim=1, keepdim=True))
            product.addmm_(change.T, rows, alpha=1 / self._num_images)
        return product

    def gap(self, gradient: Tensor) -> float:
        r"""How far the objective may lie above its minimum: :math:`\lVert g \rVert^2 / 2 \lambda`.

        It is the duality gap of the residuals, as the objective is strongly convex in the weights; the biases'
        gradient, which vanishes there, is counted alike.
        """
        return float(gradient.square().sum()) / (2 * self._smallest_penalty)

    def solve(self, tolerance: float, iterations: int) -> tuple[Tensor, int, float]:
        """Weights from zero, the number of Newton steps, and the last :meth:`gap`."""
        weight = self._axes.new_zeros(self._num_classes, len(self._axes))
        value = self.value(weight)
        for taken in range(iterations + 1):
            gradient, covariance = self.gradient(weight)
            gap = self.gap(gradient)
            if gap <= tolerance or taken == iterations:
                break
            step = self._newton_step(weight, gradient, covariance)
            slope, size = (gradient * step).sum(), 1.0
            while (after := self.value(weight + size * step)) > value + _SUFFICIENT_DECREASE * size * slope:
                size /= 2
                if size < _SMALLEST_STEP:  # rounding: no step makes it smaller
                    return weight, taken, gap
            weight, value = weight + size * step, after
        return weight, taken, gap

    def _newton_step(self, weight: Tensor, gradient: Tensor, covariance: Tensor) -> Tensor:
        """Conjugate gradients on the Hessian, the more exact the nearer the minimum is."""
        spread, classes = torch.linalg.eigh(covariance)
        stretch = spread.clamp(min=0)[:, None] * self._variances.clamp(min=0) + self._smallest_penalty

        def preconditioned(residual: Tensor) -> Tensor:
            found: Tensor = classes @ ((classes.T @ residual @ self._axes) / stretch) @ self._axes.T
            return found

        step, residual = torch.zeros_like(weight), -gradient
        direction = preconditioned(residual)
        size = first = (residual * direction).sum()
        enough = first * first.clamp(1e-6, 1e-2)
        for _ in range(_MOST_PRODUCTS):
            product = self.curvature(weight, direction)
            length = size / (direction * product).sum()
            step += length * direction
            residual -= length * product
            near = preconditioned(residual)
            before, size = size, (residual * near).sum()
            if size <= enough:
                break
            direction = near + size / before * direction
        return step


def _with_ones(features: Tensor) -> Tensor:
    """Features with a last column for the biases."""
    return F.pad(features, (0, 1), value=1.0)
