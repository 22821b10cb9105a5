"""ConMIM's loss: each masked patch must find itself among the patches of its image as a slow branch sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mto_analysis.checkpoints.publishing import published_state
from mto_analysis.images import CONMIM_TEACHER, Augmentation
from mto_analysis.models import ConMIM, ConMIMConfig
from mto_analysis.runtime.settings import Fraction, Positive
from mto_analysis.training.methods.method import Method, half_cosine
from mto_analysis.training.methods.recipe import Recipe
from mto_analysis.training.momentum import follow, slow_copy


@dataclass(frozen=True, kw_only=True)
class ConMIMRecipe(Recipe):
    """Pre-training by ConMIM.

    Args:
        momentum: Of the momentum teacher: the value from which a cosine rises to 1.
        temperature: Of the contrastive loss.
        second_view: Whether the teacher sees the same crop with other colours.
    """

    config = ConMIMConfig
    target: Literal["features"]
    momentum: tuple[Fraction]
    temperature: Positive = 0.1
    second_view: bool = False

    def augmentation(self) -> Augmentation:
        """With the colours of the second view."""
        return replace(super().augmentation(), second_view=CONMIM_TEACHER if self.second_view else None)


class ConMIMMethod(Method):
    """Masked image modelling with denoising contrast.

    The student sees the masked image, the slow branch the whole one in other colours; both are projected, and
    :func:`contrastive_loss` compares them. Batch norms in the projectors use the statistics of the micro-batch on each
    process, in both branches, as in the original: so micro-batches do not average to exactly the loss of one batch.

    Source:
        Yi et al., "Masked Image Modeling with Denoising Contrast" (ICLR 2023); TencentARC/ConMIM,
        ``engine_for_pretraining.py``.
    """

    settings_class = ConMIMRecipe
    model = ConMIM
    family = "conmim"
    style = "inpainting"
    depends_on_batch = True
    probe_pooling = "concat"
    probe_norm = "off"
    probe_weights = "model_ema"
    finetuning: ClassVar[Mapping[str, Any]] = {
        "batch_size": 1024,
        "base_lr": 4e-3,
        "lr_batch": 1024,
        "layer_decay": 0.65,
        "warmup_epochs": 20,
        "schedule": "conmim",
    }
    student: ConMIM
    recipe: ConMIMRecipe

    def __init__(self, student: ConMIM, recipe: ConMIMRecipe) -> None:
        super().__init__(student, recipe)
        self.teacher = slow_copy(student)

    @property
    def probed(self) -> ConMIM:
        """The slow branch, which its authors fine-tune."""
        return self.teacher

    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """One term, ``contrast``; without a second view the slow branch sees the same image."""
        with torch.no_grad():
            keys = self.teacher.project(images if second_images is None else second_images, None)
        queries = self.student.project(images, mask)
        with torch.autocast(images.device.type, enabled=False):
            loss = contrastive_loss(queries.float(), keys.float(), mask, self.recipe.temperature)
        return {"contrast": loss.mean()}

    def after_step(self, progress: float) -> None:
        """The slow branch follows, more slowly towards the end of the run."""
        follow(self.teacher, self.student, half_cosine(self.recipe.momentum[0], 1.0, self.progress))
        super().after_step(progress)

    def teacher_state(self) -> dict[str, Tensor]:
        """The slow branch, which the original saves as ``checkpoint_copy-N.pth`` and fine-tunes."""
        return published_state(self.teacher)


def contrastive_loss(queries: Tensor, keys: Tensor, mask: Tensor, temperature: float) -> Tensor:
    r"""Cross-entropy of finding a masked patch's own place among all patches of its image.

    .. math:: L = -\frac{1}{|\delta_M|} \sum_{i \in \delta_M}
              \log \frac{\exp(\cos(q_i, k_i) / \tau)}{\sum_j \exp(\cos(q_i, k_j) / \tau)}

    Shapes:
        queries: batch num_patches dim (of the masked image)
        keys: batch num_patches dim (of the whole image)
        mask: batch num_patches
        returns: batch

    Example:
        >>> same = torch.eye(2)[None]
        >>> contrastive_loss(same, same, torch.tensor([[True, False]]), temperature=1.0)  # log(1 + exp(-1))
        tensor([0.3133])
    """
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).mT / temperature
    own = logits.diagonal(dim1=1, dim2=2)
    return ((logits.logsumexp(dim=-1) - own) * mask).sum(dim=1) / mask.sum(dim=1)
