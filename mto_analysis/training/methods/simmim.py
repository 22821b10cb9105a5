"""SimMIM's loss: absolute error on masked pixels."""

from __future__ import annotations

from torch import Tensor

from mto_analysis.models import SimMIM
from mto_analysis.models.targets import reconstruction_loss
from mto_analysis.training.methods.method import Method

__all__ = ["SimMIMMethod"]


class SimMIMMethod(Method):
    """SimMIM with a ViT.

    The original divides the batch's sum of absolute errors by its number of masked values (plus 1e-5); as every
    image has the same number, that is the mean over images of each one's mean.

    Source:
        Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022); microsoft/SimMIM.
    """

    student: SimMIM

    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """One term, ``pixels``."""
        prediction = self.student.predict_pixels(images, mask).float()
        patch_size, target = self.recipe.patch_size, self.recipe.pixel_target
        loss = reconstruction_loss(prediction, images.float(), mask, patch_size, target=target, criterion="l1")
        return {"pixels": loss.mean()}
