"""A loaded model's own loss on masked patches, beside that of predicting the mean.

A checkpoint loaded wrongly (another head count, swapped layers) raises no error, but its own loss shows it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.live import LiveModel
from mto_analysis.models.targets import Target, mean_prediction, reconstruction_loss

# Predicting the mean is as good as this for images of one colour, but for rounding.
_NO_DETAIL = 1e-6


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
        return not (self.predict_the_mean <= _NO_DETAIL or self.loss < self.predict_the_mean)

    def in_words(self) -> str:
        """Both losses in a sentence, and what it means if the model's own is no better."""
        target = f"{self.target.replace('_', ' ')}{', inferred from the loss' if self.judged else ''}"
        text = (
            f"reconstruction loss {self.loss:.4g} vs {self.predict_the_mean:.4g} for predicting the mean "
            f"(target: {target}; {self.num_images} image{'s' * (self.num_images > 1)})"
        )
        if self.predict_the_mean <= _NO_DETAIL:
            return f"{text}: the images are of one colour, so it tells nothing"
        doubt = ": no better than the mean, so it is untrained or loaded wrongly (head counts?)"
        return text + doubt * self.suspicious


def predicts_pixels(model: MaskedImageModel) -> bool:
    """Whether a model has a loss on images."""
    return model.info.criterion is not None and model.info.target != "features"


def without_pixels(model: MaskedImageModel) -> str:
    """What is to be said of a model that has no loss on images."""
    return "does not say how its output becomes pixels" if isinstance(model, LiveModel) else "predicts no pixels"


@torch.no_grad()
def own_loss(model: MaskedImageModel, images: Tensor, mask: Tensor) -> OwnLoss | None:
    """Self-check of a loaded model on a few images; ``None`` for families that predict no pixels.

    Shapes:
        images: batch channels height width
        mask: batch num_patches
    """
    found = []
    for target, (losses, means) in _losses(model, images, mask).items():
        judged = model.info.target is None
        found.append(OwnLoss(losses.mean().item(), means.mean().item(), target, judged, num_images=len(images)))
    return min(found, key=lambda each: each.loss / (each.predict_the_mean or math.inf), default=None)


@torch.no_grad()
def relative_losses(model: MaskedImageModel, images: Tensor, mask: Tensor) -> Tensor:
    """The loss of each image over the mean loss of predicting the mean.

    Shapes:
        images: batch channels height width
        mask: batch num_patches
        returns: batch
    """
    found = [losses / means.mean() for losses, means in _losses(model, images, mask).values()]
    if not found:
        raise ValueError(f"a {model.info.family} model {without_pixels(model)}, so it has no loss on images")
    return min(found, key=lambda each: each.mean().item())


def _losses(model: MaskedImageModel, images: Tensor, mask: Tensor) -> dict[Target, tuple[Tensor, Tensor]]:
    """The losses of each image and those of predicting the mean, for each target that the model may have."""
    info = model.info
    if not predicts_pixels(model):
        return {}
    prediction = model.reconstruct(images, mask)
    stated = None if info.target == "features" else info.target
    targets: tuple[Target, ...] = ("pixels", "normalized_pixels") if stated is None else (stated,)
    return {target: losses_of(prediction, images, mask, info, target) for target in targets}


def losses_of(
    prediction: Tensor, images: Tensor, mask: Tensor, info: ModelInfo, target: Target
) -> tuple[Tensor, Tensor]:
    """The loss of each image, and that of predicting the mean, of a model that predicts pixels.

    Shapes:
        prediction: batch channels height width (from ``model.reconstruct``)
        images: batch channels height width
        mask: batch num_patches
        returns: batch; batch
    """
    assert info.criterion is not None
    prediction, images = prediction.float(), images.float()
    loss, mean = (
        reconstruction_loss(guess, images, mask, info.patch_size, target=target, criterion=info.criterion)
        for guess in (prediction, mean_prediction(images, mask, info.patch_size, target=target))
    )
    return loss, mean
