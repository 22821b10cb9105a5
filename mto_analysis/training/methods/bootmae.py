"""BootMAE's losses: normalized pixels, and features of a slow copy of the encoder that sees the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mto_analysis.checkpoints.publishing import published_state
from mto_analysis.models import BootMAE, BootMAEConfig
from mto_analysis.models.targets import patch_loss, target_patches
from mto_analysis.models.vit import patchify
from mto_analysis.runtime.settings import Fraction
from mto_analysis.training.methods.method import Method
from mto_analysis.training.methods.recipe import PixelRecipe
from mto_analysis.training.momentum import follow, slow_copy

# Of the original's layer norm on features.
_FEATURE_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class BootMAERecipe(PixelRecipe):
    """Pre-training by BootMAE.

    Args:
        momentum: Of the momentum teacher, at each of ``momentum_epochs``.
        momentum_epochs: Epochs between which the momentum is linear.
        feature_weight: Of the feature loss.
        feature_ramp: Fraction of the run over which that weight rises.
        neighbour_weight: Whether a masked patch counts more, the more of its neighbours are masked.
    """

    config = BootMAEConfig
    momentum: tuple[Fraction, ...]
    momentum_epochs: tuple[int, ...]
    feature_weight: float = 1.0
    feature_ramp: Fraction = 0.25
    neighbour_weight: bool = False

    def __post_init__(self) -> None:
        """Check what belongs together, too."""
        super().__post_init__()
        unequal = len(self.momentum) != len(self.momentum_epochs)
        self._refuse(("momentum needs one value for each of momentum_epochs", unequal or not self.momentum))

    def model_config(self) -> BootMAEConfig:
        """With features as wide as its own encoder."""
        config: BootMAEConfig = super().model_config()
        return replace(config, feature_dim=config.dim)

    def shortened(self, share: float) -> BootMAERecipe:
        """With the momentum's epochs at the same shares of the run."""
        epochs = tuple(round(share * each) for each in self.momentum_epochs)
        return replace(super().shortened(share), momentum_epochs=epochs)


class BootMAEMethod(Method):
    """Bootstrapped masked autoencoder.

    Two terms on masked patches, means over values, from one pass through the student's encoder:

    - ``pixels``: squared error of pixels that are centred and scaled in each patch and channel
      (:func:`~mto_analysis.models.targets.normalize_channels`);
    - ``features``: squared error between predicted features and patch tokens of the slow copy's last block, before its
      norm, of the whole image; both are layer-normalized without weights. Its weight rises over the first
      ``feature_ramp`` of the run, epoch by epoch.

    The slow copy follows all weights after each step, with a momentum that rises from epoch to epoch.

    Source:
        Dong et al., "Bootstrapped Masked Autoencoders for Vision BERT Pretraining" (ECCV 2022); LightDXY/BootMAE,
        ``run_pretraining.py``.
    """

    settings_class = BootMAERecipe
    model = BootMAE
    family = "bootmae"
    style = "decoder"
    criterion = "l2"
    probe_norm = "fresh"
    finetuning: ClassVar[Mapping[str, Any]] = {
        "batch_size": 1024,
        "base_lr": 5e-3,
        "lr_batch": 1024,
        "layer_decay": 0.75,
        "warmup_epochs": 20,
        "schedule": "bootmae",
        "freeze_positions": True,
        "ema": 0.9998,
    }
    wide_probing: ClassVar[Mapping[str, Any]] = {"epochs": 50, "base_lr": 0.07}
    student: BootMAE
    recipe: BootMAERecipe
    feature_weight: Tensor

    def __init__(self, student: BootMAE, recipe: BootMAERecipe) -> None:
        super().__init__(student, recipe)
        self.teacher = slow_copy(student)
        # A tensor, so that compiled code is not made again when it changes.
        self.register_buffer("feature_weight", torch.tensor(self._feature_weight()), persistent=False)

    @staticmethod
    def probe_layer(depth: int) -> int:
        """The 10th of ViT-B's 12 blocks, the 18th of ViT-L's 24; for other depths the share of ViT-B."""
        return {24: 18}.get(depth, round(depth * 10 / 12))

    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """The terms ``pixels`` and ``features``."""
        patch_size = self.recipe.patch_size
        pixels, features = self.student.predict(images, mask)
        with torch.no_grad():
            target = self.teacher.whole_features(images).float()
        weight = neighbour_weights(mask, self.student.info.grid) if self.recipe.neighbour_weight else None
        goal = target_patches(images.float(), patch_size, self.recipe.target)
        pixel_loss = patch_loss(patchify(pixels.float(), patch_size), goal, mask, weight=weight)
        feature_loss = patch_loss(_normalized(features.float()), _normalized(target), mask, weight=weight)
        return {"pixels": pixel_loss.mean(), "features": self.feature_weight * feature_loss.mean()}

    def train(self, mode: bool = True) -> BootMAEMethod:
        """Set the training mode of all but the slow copy, which never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    def after_step(self, progress: float) -> None:
        """The slow copy follows, as the epoch of the step says."""
        epoch = self._epoch()
        super().after_step(progress)
        momentum = float(np.interp(epoch, self.recipe.momentum_epochs, self.recipe.momentum))
        follow(self.teacher, self.student, momentum)
        self.feature_weight.fill_(self._feature_weight())

    def teacher_state(self) -> dict[str, Tensor]:
        """The slow copy, which the original saves as ``model_ema``."""
        return published_state(self.teacher)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The opposite of ``get_extra_state``."""
        super().set_extra_state(state)
        self.feature_weight.fill_(self._feature_weight())

    def _epoch(self) -> int:
        """Epoch of the next step, from 0."""
        return int(self.progress * self.recipe.epochs + 1e-6)

    def _feature_weight(self) -> float:
        ramp = self.recipe.feature_ramp * self.recipe.epochs
        return self.recipe.feature_weight * (min(1.0, (1 + self._epoch()) / ramp) if ramp else 1.0)


def neighbour_weights(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """1 plus the fraction of masked ones among the 3 x 3 patches around each; beyond the border none is masked.

    Shapes:
        mask: batch num_patches
        returns: batch num_patches

    Example:
        >>> neighbour_weights(torch.tensor([[True, True, False, False]]), (2, 2))[0, 0].item()  # 1 + 2 / 9
        1.2222222089767456
    """
    masked = mask.float().reshape(-1, 1, *grid)
    return 1 + F.avg_pool2d(masked, 3, stride=1, padding=1).flatten(1)


def _normalized(features: Tensor) -> Tensor:
    return F.layer_norm(features, features.shape[-1:], eps=_FEATURE_EPS)
