"""The weighted k-nearest-neighbour classifier on features, as DINO and its followers score frozen encoders."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

#: Cosines held at once.
_MOST_VALUES = 2**24


def knn_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    num_classes: int,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    leave_one_out: bool = False,
) -> Tensor:
    """Votes for each class: the nearest training vectors by cosine, each weighted by exp(cosine / temperature).

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
        neighbours: Number of neighbours; all, where there are fewer.
        temperature: How fast the weight falls with the cosine.
        leave_one_out: ``test`` are the training vectors in the same order, and none votes for itself.

    Source:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018);
        facebookresearch/dino ``eval_knn.py``.

    Example:
        >>> import torch
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_scores(train, torch.tensor([0, 1]), torch.tensor([[3.0, 0.1]]), 2, neighbours=1).argmax(dim=1)
        tensor([0])
    """
    neighbours = min(neighbours, len(train) - leave_one_out)
    keys = F.normalize(train, dim=1)
    votes = test.new_zeros(len(test), num_classes)
    chunk = max(1, _MOST_VALUES // len(train))
    for start in range(0, len(test), chunk):
        cosines = F.normalize(test[start : start + chunk], dim=1) @ keys.T
        if leave_one_out:
            cosines.diagonal(offset=start).fill_(float("-inf"))
        nearest, index = cosines.topk(neighbours, dim=1)
        # Divided by the nearest one's weight: only ratios matter, and exp(1 / temperature) may overflow.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes[start : start + chunk].scatter_add_(1, labels[index], weights)
    return votes
