"""A loaded model's own loss on masked patches, beside that of predicting the mean.

A checkpoint loaded wrongly (another head count, swapped layers) raises no error, but its own loss shows it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mto_analysis.models import MaskedImageModel
from mto_analysis.models.targets import Target, mean_prediction, reconstruction_loss

__all__ = ["OwnLoss", "own_loss"]


class OwnLoss(NamedTuple):
    """The model's own loss and that of predicting the mean, averaged over images."""

    loss: float
    predict_the_mean: float
    target: Target
    #: The file does not say what the target was; it is the one that the model fits better.
    judged: bool
    num_images: int

    @property
    def suspicious(self) -> bool:
        """Whether the model does no better than predicting the mean: untrained, or loaded wrongly."""
        return not self.loss < self.predict_the_mean

    def in_words(self) -> str:
        """Both losses in a sentence, and what it means if the model's own is no better."""
        target = f"{self.target.replace('_', ' ')}{', judged from the loss' if self.judged else ''}"
        text = (
            f"own loss {self.loss:.4g}, predicting the mean {self.predict_the_mean:.4g} "
            f"({target}; {self.num_images} image{'s' * (self.num_images > 1)})"
        )
        doubt = ": no better than the mean, so it is untrained or loaded wrongly (head counts?)"
        return text + doubt * self.suspicious


@torch.no_grad()
def own_loss(model: MaskedImageModel, images: Tensor, mask: Tensor) -> OwnLoss | None:
    """Self-check of a loaded model on a few images; ``None`` for families that predict no pixels.

    Shapes:
        images: batch channels height width
        mask: batch num_patches
    """
    info = model.info
    if info.criterion is None or info.target == "features":
        return None
    prediction = model.reconstruct(images, mask).float()
    images = images.float()
    targets: tuple[Target, ...] = ("pixels", "normalized_pixels") if info.target is None else (info.target,)
    found = []
    for target in targets:
        losses = [
            reconstruction_loss(guess, images, mask, info.patch_size, target=target, criterion=info.criterion)
            for guess in (prediction, mean_prediction(images, mask, info.patch_size, target=target))
        ]
        loss, mean = (each.mean().item() for each in losses)
        found.append(OwnLoss(loss, mean, target, judged=len(targets) > 1, num_images=len(images)))
    return min(found, key=lambda each: each.loss / each.predict_the_mean)
