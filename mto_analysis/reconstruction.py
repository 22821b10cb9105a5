"""Eq. (1) as each method has it: the model's own loss on masked patches, beside that of predicting the mean.

A checkpoint loaded wrongly (another head count, swapped layers) raises no error, but its own loss shows it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mto_analysis.models import MaskedImageModel
from mto_analysis.models.vit import patchify, unpatchify

__all__ = [
    "OwnLoss",
    "mean_prediction",
    "normalize_channels",
    "normalize_patches",
    "own_loss",
    "patch_loss",
    "reconstruction_loss",
    "restore_patches",
    "target_patches",
]

Target = Literal["pixels", "normalized_pixels", "normalized_channels"]

# The originals' own constants in the denominator: MAE's, and BootMAE's.
_VARIANCE_EPS = 1e-6
_CHANNEL_EPS = 1e-5


def normalize_patches(patches: Tensor) -> Tensor:
    """Centre each patch and divide by its standard deviation, as MAE's ``norm_pix_loss`` does.

    Shapes:
        patches: batch num_patches values
        returns: batch num_patches values

    Example:
        >>> normalize_patches(torch.tensor([[[1.0, 3.0]]])).round(decimals=3)
        tensor([[[-0.7070,  0.7070]]])
    """
    centred = patches - patches.mean(dim=-1, keepdim=True)
    return centred / (patches.var(dim=-1, keepdim=True) + _VARIANCE_EPS).sqrt()


def normalize_channels(patches: Tensor, channels: int) -> Tensor:
    """Centre each channel of each patch and divide by its standard deviation (not that of a sample), as BootMAE does.

    Shapes:
        patches: batch num_patches values (row, column, channel)
        returns: batch num_patches values

    Example:
        >>> normalize_channels(torch.tensor([[[1.0, 5.0, 3.0, 5.0]]]), channels=2).round(decimals=3)
        tensor([[[-1.,  0.,  1.,  0.]]])
    """
    mean, deviation = _channel_statistics(patches, channels)
    return (patches - mean) / deviation


def _channel_statistics(patches: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each value's channel in its patch."""
    pixels = patches.reshape(*patches.shape[:-1], -1, channels)
    variance, mean = torch.var_mean(pixels, dim=-2, keepdim=True, correction=0)
    return mean.expand_as(pixels).flatten(-2), (variance + _CHANNEL_EPS).sqrt().expand_as(pixels).flatten(-2)


def target_patches(images: Tensor, patch_size: int, target: Target) -> Tensor:
    """What a model of this target should predict for every patch.

    Shapes:
        images: batch channels height width
        returns: batch num_patches values (row, column, channel)
    """
    patches = patchify(images, patch_size)
    if target == "normalized_pixels":
        return normalize_patches(patches)
    return normalize_channels(patches, images.shape[1]) if target == "normalized_channels" else patches


def restore_patches(patches: Tensor, like: Tensor, *, channels: int | None = None) -> Tensor:
    """Undo :func:`normalize_patches`: the mean and deviation of each patch of ``like`` are put back.

    A model that predicts normalised patches says nothing of a patch's brightness and contrast. To show its prediction
    they are taken from the original, which such a picture must say.

    Shapes:
        patches: batch num_patches values
        like: batch num_patches values
        returns: batch num_patches values

    Args:
        patches: Normalised.
        like: With the statistics.
        channels: Undo :func:`normalize_channels` of so many instead.

    Example:
        >>> patches = torch.tensor([[[1.0, 3.0]]])
        >>> restore_patches(normalize_patches(patches), like=patches)
        tensor([[[1., 3.]]])
    """
    if channels is not None:
        mean, deviation = _channel_statistics(like, channels)
        return patches * deviation + mean
    return patches * (like.var(dim=-1, keepdim=True) + _VARIANCE_EPS).sqrt() + like.mean(dim=-1, keepdim=True)


def reconstruction_loss(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    target: Target = "pixels",
    criterion: Literal["l1", "l2"] = "l2",
) -> Tensor:
    r"""Mean error over the values of masked patches, the form of Eq. (1) that pixel methods use.

    .. math:: L = \frac{1}{|\delta_M|} \sum_{i \in \delta_M} \mathrm{mean}(|\hat I_i - I_i|^k)

    with k = 2 for MAE and k = 1 for SimMIM.

    Shapes:
        prediction: batch channels height width
        images: batch channels height width
        mask: batch num_patches
        returns: batch

    Example:
        >>> images = torch.ones(1, 3, 4, 4)
        >>> mask = torch.tensor([[True, False, False, False]])
        >>> reconstruction_loss(0 * images, images, mask, patch_size=2)
        tensor([1.])
    """
    goal = target_patches(images, patch_size, target)
    return patch_loss(patchify(prediction, patch_size), goal, mask, criterion=criterion)


def patch_loss(
    prediction: Tensor,
    goal: Tensor,
    mask: Tensor,
    *,
    criterion: Literal["l1", "l2"] = "l2",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean error over the values of masked patches, for patches that are cut out already.

    Shapes:
        prediction: batch num_patches values
        goal: batch num_patches values
        mask: batch num_patches
        weight: batch num_patches
        returns: batch

    Args:
        prediction: Of every patch.
        goal: What it should be.
        mask: True where masked.
        criterion: Absolute (``l1``) or squared error.
        weight: Of each masked patch; the sum is still divided by the number of masked patches.

    Example:
        >>> goal = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]])
        >>> patch_loss(0 * goal, goal, torch.tensor([[True, False]]))
        tensor([5.])
    """
    error = prediction - goal
    per_patch = (error.abs() if criterion == "l1" else error.square()).mean(dim=-1)
    counted = mask if weight is None else mask * weight
    return (per_patch * counted).sum(dim=1) / mask.sum(dim=1)


def mean_prediction(images: Tensor, mask: Tensor, patch_size: int, *, target: Target = "pixels") -> Tensor:
    """The trivial prediction: each picture's mean visible colour, or zero where patches are normalised.

    Shapes:
        images: batch channels height width
        mask: batch num_patches
        returns: batch channels height width
    """
    if target != "pixels":
        return torch.zeros_like(images)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    visible = (~mask).unsqueeze(-1)
    patches = patchify(images, patch_size)
    pixels = patches.reshape(*patches.shape[:2], -1, images.shape[1])
    colour = (pixels.mean(dim=2) * visible).sum(dim=1) / visible.sum(dim=1)
    return unpatchify(colour[:, None, None].expand_as(pixels).flatten(2), patch_size, grid)


class OwnLoss(NamedTuple):
    """The model's own loss and that of predicting the mean, averaged over pictures."""

    loss: float
    predict_the_mean: float
    target: Target
    #: The file does not say what the target was; it is the one that the model fits better.
    judged: bool

    @property
    def suspicious(self) -> bool:
        """Whether the model does no better than predicting the mean: untrained, or loaded wrongly."""
        return not self.loss < self.predict_the_mean

    def in_words(self, num_pictures: int) -> str:
        """Both losses in a sentence, and what it means if the model's own is no better."""
        target = f"{self.target.replace('_', ' ')}{', judged from the loss' if self.judged else ''}"
        text = (
            f"own loss {self.loss:.4g}, predicting the mean {self.predict_the_mean:.4g} "
            f"({target}; {num_pictures} picture{'s' * (num_pictures > 1)})"
        )
        doubt = ": no better than the mean, so it is untrained or loaded wrongly (head counts?)"
        return text + doubt * self.suspicious


@torch.no_grad()
def own_loss(model: MaskedImageModel, images: Tensor, mask: Tensor) -> OwnLoss | None:
    """Self-check of a loaded model on a few pictures; ``None`` for families that predict no pixels.

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
        found.append(OwnLoss(losses[0].mean().item(), losses[1].mean().item(), target, judged=len(targets) > 1))
    return min(found, key=lambda each: each.loss / each.predict_the_mean)
