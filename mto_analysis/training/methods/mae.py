"""MAE's loss: squared error on masked patches, of pixels or of patches that are normalised one by one."""

from __future__ import annotations

from torch import Tensor

from mto_analysis.models import MAE
from mto_analysis.models.targets import patch_loss, target_patches
from mto_analysis.training.methods.method import Method

__all__ = ["MAEMethod"]


class MAEMethod(Method):
    """Masked autoencoder.

    The loss is Eq. (1) with a mean in the place of the sum over a patch's values:
    :func:`~mto_analysis.models.targets.patch_loss` with ``l2``.

    Source:
        He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); facebookresearch/mae.
    """

    student: MAE

    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """One term, ``pixels``."""
        goal = target_patches(images.float(), self.recipe.patch_size, self.recipe.pixel_target)
        prediction = self.student.predict_patches(images, mask)
        return {"pixels": patch_loss(prediction.float(), goal, mask).mean()}
