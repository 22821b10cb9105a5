"""MAE's loss: squared error on masked patches, of pixels or of patches that are normalized one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mto_analysis.models import MAE, MAEConfig
from mto_analysis.models.targets import patch_loss, target_patches
from mto_analysis.training.methods.method import Method, warmup_then_cosine
from mto_analysis.training.methods.recipe import PixelRecipe


@dataclass(frozen=True, kw_only=True)
class MAERecipe(PixelRecipe):
    """Pre-training by MAE."""

    config = MAEConfig


class MAEMethod(Method):
    """Masked autoencoder.

    The loss is Eq. (1) with a mean in the place of the sum over a patch's values:
    :func:`~mto_analysis.models.targets.patch_loss` with ``l2``.

    Source:
        He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); facebookresearch/mae.
    """

    settings_class = MAERecipe
    model = MAE
    family = "mae"
    style = "decoder"
    criterion = "l2"
    no_weight_decay = ()  # so the class token decays
    fixed_key_biases = False
    probe_pooling = "class"
    uncropped_from = 225
    finetuning: ClassVar[Mapping[str, Any]] = {
        "batch_size": 1024,
        "base_lr": 1e-3,
        "layer_decay": 0.75,
        "warmup_epochs": 5,
        "schedule": "mae",
    }
    wide_finetuning: ClassVar[Mapping[str, Any]] = {"epochs": 50, "drop_path": 0.2}
    wide_probing: ClassVar[Mapping[str, Any]] = {"epochs": 50}
    student: MAE
    recipe: MAERecipe

    @staticmethod
    def learning_rate(recipe: Any, step: int, steps_per_epoch: int, peak: float, start: float, end: float) -> float:
        """A half cosine after the warm-up, both by the fraction of an epoch."""
        warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
        return warmup_then_cosine(step, total, warmup=warmup, peak=peak, start=start, end=end)

    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """One term, ``pixels``."""
        goal = target_patches(images.float(), self.recipe.patch_size, self.recipe.target)
        prediction = self.student.predict_patches(images, mask)
        return {"pixels": patch_loss(prediction.float(), goal, mask).mean()}
