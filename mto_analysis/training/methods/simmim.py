"""SimMIM's loss: absolute error on masked pixels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from torch import Tensor

from mto_analysis.models import MaskedImageModel, SimMIM, SimMIMConfig, SimMIMSwin
from mto_analysis.models.targets import reconstruction_loss
from mto_analysis.runtime.settings import Rising
from mto_analysis.training.methods.method import Method, half_cosine
from mto_analysis.training.methods.recipe import PixelRecipe


@dataclass(frozen=True, kw_only=True)
class SimMIMRecipe(PixelRecipe):
    """Pre-training by SimMIM.

    Args:
        milestones: Epochs at which a multi-step schedule decays.
        decay_factor: What it multiplies the rate by.
    """

    config = SimMIMConfig
    milestones: Annotated[tuple[int, ...], Rising()] = ()
    decay_factor: float = 0.1

    @property
    def turns(self) -> tuple[int, ...]:
        """The milestones."""
        return self.milestones

    def shortened(self, share: float) -> SimMIMRecipe:
        """With milestones at the same shares of the run."""
        milestones = {max(1, round(share * each)) for each in self.milestones}
        return replace(super().shortened(share), milestones=tuple(sorted(milestones)))


class SimMIMMethod(Method):
    """SimMIM with a ViT.

    The original divides the batch's sum of absolute errors by its number of masked values (plus 1e-5); as every
    image has the same number, that is the mean over images of each one's mean.

    Source:
        Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022); microsoft/SimMIM.
    """

    settings_class = SimMIMRecipe
    model = SimMIM
    family = "simmim_vit"
    style = "inpainting"
    criterion = "l1"
    relatives = ("simmim_swin",)
    uncropped_from = None
    finetuning: ClassVar[Mapping[str, Any]] = {
        "batch_size": 2048,
        "base_lr": 5e-3,
        "lr_batch": 2048,
        "layer_decay": 0.9,
        "warmup_epochs": 10,
        "clip_grad": 5.0,
        "clip_micro_batches": True,
        "schedule": "simmim",
        "warmup_lr": 1e-6,
    }
    student: SimMIM
    recipe: SimMIMRecipe

    @staticmethod
    def undecayed(model: MaskedImageModel) -> tuple[str, ...]:
        """In Swin also what relative positions are made of: tables, or a network and the scale of attention."""
        inherited = Method.undecayed(model)
        if not isinstance(model, SimMIMSwin):
            return inherited
        return (*inherited, "relative_position_bias_table", "position_bias.mlp", "logit_scale")

    @staticmethod
    def learning_rate(recipe: Any, step: int, steps_per_epoch: int, peak: float, start: float, end: float) -> float:
        """A cosine that counts from the start of the run (so the peak is never quite reached), or milestones.

        Every step has the rate meant for the one before, as the original sets it after the update.
        """
        step, warmup = max(0, step - 1), int(recipe.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return start + (peak - start) * step / warmup
        if recipe.schedule == "multistep":
            decays = bisect_right(recipe.milestones, step / steps_per_epoch)
            return float(peak * recipe.decay_factor**decays)
        return half_cosine(peak, end, step / (recipe.epochs * steps_per_epoch))

    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """One term, ``pixels``."""
        prediction = self.student.predict_pixels(images, mask).float()
        patch_size, target = self.recipe.patch_size, self.recipe.target
        loss = reconstruction_loss(prediction, images.float(), mask, patch_size, target=target, criterion="l1")
        return {"pixels": loss.mean()}
