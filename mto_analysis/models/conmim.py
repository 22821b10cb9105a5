"""ConMIM: the inpainting-style encoder and a projector that maps patch tokens to where they are contrasted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mto_analysis.models.inpainting import InpaintingConfig, InpaintingViT
from mto_analysis.models.interface import ModelInfo
from mto_analysis.taps.tokens import last_depth


@dataclass(frozen=True)
class ConMIMConfig(InpaintingConfig):
    """Architecture of a :class:`ConMIM`; the original's ViT-B by default.

    ``projector_dim`` is the width of the projector's two hidden layers, ``projection_dim`` of its output.
    """

    projector_dim: int = 4096
    projection_dim: int = 256


class ConMIM(InpaintingViT):
    """ConMIM's ViT with its projector, as it is trained. Read from a file, the encoder alone is an InpaintingViT.

    Source:
        Yi et al., "Masked Image Modeling with Denoising Contrast" (ICLR 2023); TencentARC/ConMIM.
    """

    def __init__(self, config: ConMIMConfig, info: ModelInfo) -> None:
        super().__init__(config, info)
        hidden, out = config.projector_dim, config.projection_dim
        self.projectors = nn.Sequential(
            nn.Linear(config.dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out, bias=False),
            nn.BatchNorm1d(out, affine=False),
        )

    def project(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Projections of all patches, without any check: for training.

        The class token goes through the projector too: in training mode its batch norms count it.

        Shapes:
            images: batch channels height width
            mask: batch num_patches, or ``None`` for no masked patch
            returns: batch num_patches projection_dim
        """
        x = last_depth(self._hidden(images, mask))
        x = self.norm(x)
        return self.projectors(x.flatten(0, 1)).unflatten(0, x.shape[:2])[:, 1:]  # type: ignore[no-any-return]
