"""A linear classifier on features that were computed once: seconds instead of MAE's 90 augmented epochs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_linear", "linear_scores"]

#: Logits held at once.
_MOST_VALUES = 2**25
_EPS = 1e-6  # as MAE's BatchNorm
#: Values of all features up to which the CPU fits: L-BFGS asks its device for numbers several times a step, and each
#: time waits for whatever else the device does.
_FOR_CPU = 2**24


def linear_scores(
    train: Tensor, labels: Tensor, test: Tensor, num_classes: int, *, penalty: float = 1e-5, iterations: int = 200
) -> Tensor:
    """Logits of test images from multinomial logistic regression on standardised features.

    BatchNorm without affine parameters, as in MAE's head, with the statistics of all training images; then one linear
    layer with bias. The loss, mean cross-entropy plus ``penalty`` times half the squared norm of the weights, is
    convex, so there is one best classifier, no learning rate and no seed; L-BFGS from zero comes near it in the given
    steps (for CIFAR-10's 50,000 images and 128 channels 3 s on one core, where 100 more steps give 0.2 points).
    Without augmentation scores are some points below MAE's protocol, in the same order.

    Shapes:
        train: num_train dim
        labels: num_train
        test: num_test dim
        returns: num_test num_classes

    Args:
        train: Features of training images.
        labels: Their classes.
        test: Features of test images.
        num_classes: Classes in all.
        penalty: On the weights.
        iterations: Most steps of L-BFGS.

    Example:
        >>> train = torch.tensor([[-1.0], [-2.0], [1.0], [3.0]])
        >>> linear_scores(train, torch.tensor([0, 0, 1, 1]), torch.tensor([[-9.0], [9.0]]), 2).argmax(dim=1)
        tensor([0, 1])
    """
    device = train.device
    if train.numel() <= _FOR_CPU:
        train, labels, test = train.cpu(), labels.cpu(), test.cpu()
    variance, mean = torch.var_mean(train, dim=0, correction=0)
    scale = (variance + _EPS).rsqrt()
    weight, bias = fit_linear((train - mean) * scale, labels, num_classes, penalty=penalty, iterations=iterations)
    return (((test - mean) * scale) @ weight.T + bias).to(device)


def fit_linear(
    features: Tensor, labels: Tensor, num_classes: int, *, penalty: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Weights and biases of multinomial logistic regression by L-BFGS, from zero.

    Shapes:
        features: num_images dim
        labels: num_images
        returns: num_classes dim, num_classes
    """
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_zeros(num_classes)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    chunk = max(1, _MOST_VALUES // num_classes)

    def closure() -> Tensor:
        # The gradient by hand: two products a pass, without a graph.
        loss = features.new_zeros(())
        gradient, bias_gradient = penalty * weight, torch.zeros_like(bias)
        for start in range(0, len(features), chunk):
            rows, classes = features[start : start + chunk], labels[start : start + chunk, None]
            logp = torch.addmm(bias, rows, weight.T).log_softmax(dim=1)
            loss -= logp.gather(1, classes).sum() / len(features)
            residual = logp.exp_().scatter_add_(1, classes, logp.new_full((1, 1), -1.0).expand_as(classes))
            residual /= len(features)
            gradient.addmm_(residual.T, rows)
            bias_gradient += residual.sum(dim=0)
        weight.grad, bias.grad = gradient, bias_gradient
        return loss + 0.5 * penalty * weight.square().sum()

    with torch.no_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight, bias
