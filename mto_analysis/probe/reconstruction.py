"""Reconstructions as images: original, masked input, prediction, prediction with the visible patches pasted in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mto_analysis.errors import CheckpointError
from mto_analysis.models import ModelInfo
from mto_analysis.models.targets import Target, restore_patches
from mto_analysis.models.vit import patchify, unpatchify
from mto_analysis.probe.engine import undisturbed
from mto_analysis.probe.own_loss import losses_of, without_pixels
from mto_analysis.probe.shown import ShownModel
from mto_analysis.runtime.listener import Listener

#: Colour of masked patches, in pixels from 0 to 1.
MASK_GREY = 0.5


class Views(NamedTuple):
    """Images of a reconstruction, as pixels from 0 to 1 (predictions may lie outside).

    Shapes:
        original, masked, reconstruction, pasted: batch channels height width
    """

    original: Tensor
    masked: Tensor  #: masked patches grey
    reconstruction: Tensor  #: what the model predicts, for every patch
    pasted: Tensor  #: the prediction where patches are masked, the original elsewhere


def to_pixels(images: Tensor, info: ModelInfo) -> Tensor:
    """Undo a model's input normalization.

    Shapes:
        images: batch channels height width
        returns: batch channels height width (pixels from 0 to 1)

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
        >>> from mto_analysis.checkpoints import load_checkpoint
        >>> info = load_checkpoint(DEMO_CHECKPOINTS["MAE"]).info
        >>> pixels = to_pixels(next(demo_batches(info, limit=2)).images, info)
        >>> bool(0 <= pixels.min() + 1e-6 and pixels.max() <= 1 + 1e-6)
        True
    """
    mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (info.mean, info.std))
    return images * std + mean


def in_colour(pixels: Tensor) -> Tensor:
    """Three channels that can be shown: the first three, or, of one or two, the first as grey.

    Shapes:
        pixels: batch channels height width
        returns: batch 3 height width

    Example:
        >>> in_colour(torch.zeros(1, 13, 2, 2)).shape, in_colour(torch.zeros(1, 1, 2, 2)).shape
        (torch.Size([1, 3, 2, 2]), torch.Size([1, 3, 2, 2]))
    """
    return pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def reconstruction_views(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor,
    info: ModelInfo,
    *,
    target: Target,
) -> Views:
    """A model's prediction beside what it saw, in the space of pixels.

    Shapes:
        prediction: batch channels height width (from ``model.reconstruct``)
        images: batch channels height width (normalized for the model)
        mask: batch num_patches

    Args:
        prediction: What the model predicts for every patch.
        images: What it predicts.
        mask: True where masked.
        info: Of the model.
        target: Space of the prediction. If it is normalized, each predicted patch is given the mean and deviation of
            the original patch (of each of its channels), which the model does not predict.
    """
    size = info.patch_size
    prediction, images = prediction.float(), images.float()
    if target != "pixels":
        channels = images.shape[1] if target == "normalized_channels" else None
        restored = restore_patches(patchify(prediction, size), like=patchify(images, size), channels=channels)
        prediction = unpatchify(restored, size, info.grid)
    original, reconstruction = to_pixels(images, info), to_pixels(prediction, info)
    is_masked = unpatchify(mask[..., None].expand(-1, -1, size**2), size, info.grid)
    grey = torch.full_like(original, MASK_GREY)
    return Views(
        original,
        torch.where(is_masked, grey, original),
        reconstruction,
        torch.where(is_masked, reconstruction, original),
    )


@dataclass(frozen=True)
class Reconstruction:
    """One image through one model. Losses are the model's own (Eq. 1), over masked patches of this image.

    Shapes:
        original, masked, reconstruction, pasted: height width 3 (from 0 to 1)
    """

    model: str
    image: str
    target: str
    criterion: str
    loss: float
    predict_the_mean: float
    num_masked: int
    original: np.ndarray
    masked: np.ndarray
    reconstruction: np.ndarray
    pasted: np.ndarray
    num_channels: int = 3  #: of the model's input, of which three are shown


@dataclass
class ReconstructionStudy:
    """Reconstructions of each model and image, and metadata for ``run.json``."""

    reconstructions: list[Reconstruction] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """A row per model and image.

        Columns: ``model image target criterion loss predict_the_mean num_masked``.
        """
        columns = ("model", "image", "target", "criterion", "loss", "predict_the_mean", "num_masked")
        return pd.DataFrame([{name: getattr(row, name) for name in columns} for row in self.reconstructions])


def reconstruct_models(models: Iterable[ShownModel], listener: Listener | None = None) -> ReconstructionStudy:
    """Reconstruct the chosen images with each model; one that predicts no pixels is left out with a warning."""
    study, without = ReconstructionStudy(), []
    for shown in models:
        if shown.own_loss is None:
            family = shown.model.info.family
            without.append(
                f"{shown.label} ({family}) {without_pixels(shown.model)}, so there is nothing to reconstruct"
            )
            continue
        study.models.append(shown.metadata)
        study.reconstructions += reconstruct_shown(shown)
    if not study.reconstructions:
        raise CheckpointError("; ".join(without))
    for message in without:
        (listener or Listener()).warn(message)
    return study


def reconstruct_shown(shown: ShownModel) -> list[Reconstruction]:
    """The chosen images of one model, which must predict pixels."""
    info, images, mask = shown.model.info, shown.images, shown.mask
    if shown.own_loss is None or info.criterion is None:
        raise ValueError(f"{shown.label} ({info.family}) {without_pixels(shown.model)}")
    target = shown.own_loss.target
    with undisturbed(shown.model):
        prediction = shown.model.reconstruct(images, mask)
    losses, means = (each.tolist() for each in losses_of(prediction, images, mask, info, target))
    views = reconstruction_views(prediction, images, mask, info, target=target)
    arrays = [in_colour(view).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy() for view in views]
    counts = mask.sum(dim=1).tolist()
    return [
        Reconstruction(
            shown.label,
            name,
            target,
            info.criterion,
            losses[row],
            means[row],
            counts[row],
            arrays[0][row],
            arrays[1][row],
            arrays[2][row],
            arrays[3][row],
            info.channels,
        )
        for row, name in enumerate(shown.names)
    ]
