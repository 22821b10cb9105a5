"""What a method is: its student, its loss terms (in the place of Eq. 1), its momentum teacher and its facts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from mto_analysis.checkpoints.publishing import published_facts, published_state
from mto_analysis.models import MaskedImageModel
from mto_analysis.training.objective import Objective
from mto_analysis.training.recipes import Recipe

__all__ = ["Method", "half_cosine", "warmup_then_cosine"]


class Method(Objective):
    """A pre-training method; a new one is a subclass with these facts, named in ``methods/__init__.py``.

    Args:
        student: The model that is trained.
        recipe: Settings.
    """

    #: The model class of the student, and its name as a family.
    model: ClassVar[type[MaskedImageModel]]
    family: ClassVar[str]
    style: ClassVar[Literal["inpainting", "decoder"]]
    #: Error of the loss on pixels; ``None`` for methods that predict none.
    criterion: ClassVar[Literal["l1", "l2"] | None] = None
    #: Parameters of the student without weight decay, besides biases and what has one axis: the original's
    #: ``no_weight_decay``. Mask tokens decay in all of them.
    no_weight_decay: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")
    #: Whether the original has no bias of keys, which never changes an attention map but would be trained.
    fixed_key_biases: ClassVar[bool] = True

    #: Families that its authors fine-tune and probe in the same way.
    relatives: ClassVar[tuple[str, ...]] = ()
    #: What its authors probe: the class token, or the mean of the patch tokens.
    probe_pooling: ClassVar[Literal["class", "patches"]] = "patches"
    #: Its own values of :class:`~mto_analysis.training.evaluation.classifier_settings.ClassifierSettings` when it is
    #: fine-tuned, and what differs for encoders of 1024 channels or more.
    finetuning: ClassVar[Mapping[str, Any]]
    wide_finetuning: ClassVar[Mapping[str, Any]] = {}
    student: MaskedImageModel

    def __init__(self, student: MaskedImageModel, recipe: Recipe) -> None:
        super().__init__(student)
        self.recipe = recipe

    @abstractmethod
    def forward(self, images: Tensor, mask: Tensor, second_images: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; their sum is the model's own loss, a mean over images.

        Shapes:
            images: batch channels height width
            mask: batch num_patches
            second_images: batch channels height width (of methods with ``second_view``)
            returns: scalars
        """

    @staticmethod
    def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, peak: float, start: float, end: float) -> float:
        """The original's rate of an optimizer step; by default that of the BEiT code base (BootMAE, ConMIM).

        The last warm-up step already has the peak, and the cosine starts after it.

        Args:
            recipe: Settings.
            step: Optimizer steps done before this one.
            steps_per_epoch: Optimizer steps of an epoch.
            peak: Rate after the warm-up.
            start: Rate where the warm-up starts.
            end: Rate where the cosine ends.
        """
        warmup, total = int(recipe.warmup_epochs * steps_per_epoch), recipe.epochs * steps_per_epoch
        if step < warmup:
            return start + (peak - start) * (step / (warmup - 1) if warmup > 1 else 0.0)
        return half_cosine(peak, end, (step - warmup) / (total - warmup))

    def teacher_state(self) -> dict[str, Tensor] | None:
        """The momentum teacher's weights in the original's layout, for methods that have one."""
        return None

    def published(self, average: MaskedImageModel | None = None) -> dict[str, Any]:
        """The student in the layout of the original method, with ``model_ema`` for the momentum teacher."""
        content: dict[str, Any] = {"model": published_state(self.student), **published_facts(self.student)}
        teacher = self.teacher_state()
        if teacher is not None:
            content["model_ema"] = teacher  # the originals' name for it
        if average is not None:
            content["model_average"] = published_state(average)
        return content


def half_cosine(start: float, end: float, fraction: float) -> float:
    """From ``start`` at 0 to ``end`` at 1.

    Example:
        >>> half_cosine(1.0, 0.0, 0.5)
        0.5
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def warmup_then_cosine(
    done: float, total: float, *, warmup: float, peak: float, start: float = 0.0, end: float = 0.0
) -> float:
    """MAE's schedule, of pre-training as of classifiers: a linear warm-up, and a half cosine over what is left.

    Args:
        done: What is done of the run, in any unit.
        total: The whole run.
        warmup: The warm-up.
        peak: Rate after the warm-up.
        start: Rate at the beginning.
        end: Rate at the end.

    Source:
        facebookresearch/mae ``util/lr_sched.py``.

    Example:
        >>> [warmup_then_cosine(epoch, 10, warmup=5, peak=1.0) for epoch in (1, 5, 7.5)]
        [0.2, 1.0, 0.5]
    """
    if done < warmup:
        return start + (peak - start) * done / warmup
    return half_cosine(peak, end, (done - warmup) / max(total - warmup, 1e-9))
