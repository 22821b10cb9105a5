"""Eq. (1) as each method has it: what a model should predict for a masked patch, and the error over masked patches."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mto_analysis.models.vit import patchify, unpatchify

Target = Literal["pixels", "normalized_pixels", "normalized_channels", "locally_normalized_pixels"]

#: Side in pixels of the neighbourhood of a locally normalized pixel.
NEIGHBOURHOOD = 47

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


def normalize_locally(images: Tensor) -> Tensor:
    """Centre each pixel and divide by the standard deviation, both of its neighbourhood, as SwinV2's SimMIM does.

    Shapes:
        images: batch channels height width
        returns: batch channels height width

    Source:
        microsoft/Swin-Transformer, ``models/simmim.py`` (``norm_targets``).

    Example:
        >>> normalize_locally(torch.tensor([[[[1.0, 3.0]]]])).round(decimals=3)
        tensor([[[[-0.7070,  0.7070]]]])
    """
    pool = partial(F.avg_pool2d, kernel_size=NEIGHBOURHOOD, stride=1, padding=NEIGHBOURHOOD // 2)
    mean = pool(images, count_include_pad=False)
    count = pool(torch.ones_like(images), count_include_pad=True) * NEIGHBOURHOOD**2
    variance = (pool(images.square(), count_include_pad=False) - mean.square()) * (count / (count - 1))
    return (images - mean) / (variance.clamp(min=0) + _VARIANCE_EPS).sqrt()


def target_patches(images: Tensor, patch_size: int, target: Target) -> Tensor:
    """What a model of this target should predict for every patch.

    Shapes:
        images: batch channels height width
        returns: batch num_patches values (row, column, channel)
    """
    if target == "locally_normalized_pixels":
        return patchify(normalize_locally(images), patch_size)
    patches = patchify(images, patch_size)
    if target == "normalized_pixels":
        return normalize_patches(patches)
    return normalize_channels(patches, images.shape[1]) if target == "normalized_channels" else patches


def restore_patches(patches: Tensor, like: Tensor, *, channels: int | None = None) -> Tensor:
    """Undo :func:`normalize_patches`: the mean and deviation of each patch of ``like`` are put back.

    A model that predicts normalized patches says nothing of a patch's brightness and contrast. To show its prediction
    they are taken from the original, which such an image must say.

    Shapes:
        patches: batch num_patches values
        like: batch num_patches values
        returns: batch num_patches values

    Args:
        patches: Normalized.
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
    """The trivial prediction: each image's mean visible colour, or zero where patches are normalized.

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
