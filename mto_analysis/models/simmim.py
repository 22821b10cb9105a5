"""SimMIM with a ViT: the inpainting-style encoder and a linear head that predicts pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mto_analysis.models.inpainting import InpaintingConfig, InpaintingViT
from mto_analysis.models.interface import ModelInfo
from mto_analysis.taps.tokens import last_depth


@dataclass(frozen=True)
class SimMIMConfig(InpaintingConfig):
    """Architecture of a :class:`SimMIM`; the published ViT-B by default."""


class SimMIM(InpaintingViT):
    """SimMIM's ViT. Layer 0 is the input of block 0: without absolute positions all masked tokens are one vector there.

    Source:
        Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022); microsoft/SimMIM.
    """

    def __init__(self, config: SimMIMConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        self.decoder = nn.Conv2d(config.dim, config.patch_size**2 * config.channels, kernel_size=1)

    def predict_pixels(self, images: Tensor, mask: Tensor) -> Tensor:
        """What the head predicts, without any check: for training.

        Shapes:
            images: batch channels height width
            mask: batch num_patches
            returns: batch channels height width
        """
        x = last_depth(self._hidden(images, mask))
        x = self.norm(x)[:, 1:].mT.reshape(len(images), -1, *self.info.grid)
        return nn.functional.pixel_shuffle(self.decoder(x), self.config.patch_size)

    def _reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.predict_pixels(images, mask)
