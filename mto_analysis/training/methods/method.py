"""What a method is: its student, its loss terms (in the place of Eq. 1), its momentum teacher and its metadata."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import Tensor

from mto_analysis.checkpoints.publishing import published_metadata, published_state
from mto_analysis.checkpoints.reading import Weights
from mto_analysis.images import TrainBatch
from mto_analysis.models import MaskedImageModel
from mto_analysis.training.methods.recipe import Recipe
from mto_analysis.training.objective import Objective
from mto_analysis.training.randomness import noise_batch
from mto_analysis.training.sharding import is_sharded

#: See :class:`mto_analysis.training.evaluation.protocols.Feature`.
Pooling = Literal["class", "patches", "concat", "attentive"]
Norm = Literal["encoder", "fresh", "off"]


class Method(Objective):
    """A pre-training method; a new one is a subclass with these metadata, named in ``methods/__init__.py``.

    Args:
        student: The model that is trained.
        recipe: Settings.
    """

    #: The class of its recipes, with its own settings.
    settings_class: ClassVar[type[Recipe]]
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
    #: What its authors probe (:class:`~mto_analysis.training.evaluation.protocols.Feature`), and of which weights: the
    #: trained ones or those of the momentum teacher.
    probe_pooling: ClassVar[Pooling] = "patches"
    probe_norm: ClassVar[Norm] = "encoder"
    probe_weights: ClassVar[Weights] = "model"
    #: Side in pixels from which on its authors do not crop test images, or ``None`` if they always do.
    uncropped_from: ClassVar[int | None] = 384
    #: Its own values of :class:`~mto_analysis.training.evaluation.classifier_settings.ClassifierSettings` when it is
    #: fine-tuned, and what differs in fine-tuning and in the linear probe for encoders of 1024 channels or more.
    finetuning: ClassVar[Mapping[str, Any]]
    wide_finetuning: ClassVar[Mapping[str, Any]] = {}
    wide_probing: ClassVar[Mapping[str, Any]] = {}
    student: MaskedImageModel

    def __init__(self, student: MaskedImageModel, recipe: Recipe) -> None:
        super().__init__(student, recipe, recipe.name)
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
    def undecayed(model: MaskedImageModel) -> tuple[str, ...]:
        """Parts of the names of parameters without weight decay in fine-tuning, besides biases and what has one axis.

        Tables of relative positions in a ViT are not among them, so they decay.
        """
        return ("cls_token", "pos_embed")

    @staticmethod
    def probe_layer(depth: int) -> int:
        """The block, counted from 1, whose tokens its authors probe.

        Args:
            depth: Number of blocks of the encoder.
        """
        return depth

    @staticmethod
    def learning_rate(recipe: Any, step: int, steps_per_epoch: int, peak: float, start: float, end: float) -> float:
        """The original's rate of an optimizer step; by default that of the BEiT code base (BootMAE, ConMIM).

        The last warm-up step already has the peak, and the cosine starts after it. Fine-tuning has the same schedule.

        Args:
            recipe: Settings, of pre-training or of a classifier.
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

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW on :func:`parameter_groups`, fused into one kernel where torch has it."""
        devices = {each.device.type for each in self.parameters()}
        fused = devices <= {"cpu", "cuda"} and not any(is_sharded(each) for each in self.parameters())
        groups = parameter_groups(self, self.recipe)
        return torch.optim.AdamW(groups, lr=self.recipe.base_lr, betas=self.recipe.betas, fused=fused)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """As :func:`~mto_analysis.training.learning_rate`."""
        return self.rate_of(self.recipe, step, steps_per_epoch, self.recipe.batch_size)

    @classmethod
    def rate_of(cls, recipe: Recipe, step: int, steps_per_epoch: int, global_batch: int) -> float:
        """As :func:`~mto_analysis.training.learning_rate`.

        Raises:
            ValueError: If the step is not one of the run.
        """
        total = recipe.epochs * steps_per_epoch
        if not 0 <= step < total:
            raise ValueError(f"step must lie between 0 and {total - 1}, got {step}")
        peak = peak_learning_rate(recipe, global_batch)
        scale = recipe.lr_scale(global_batch) if recipe.scale_all_lr else 1.0
        return cls.learning_rate(recipe, step, steps_per_epoch, peak, recipe.warmup_lr * scale, recipe.min_lr * scale)

    def noise(self, count: int, device: torch.device) -> TrainBatch:
        """Noise, with masks as the recipe samples them."""
        return noise_batch(self.recipe, count, device)

    def files(self) -> Mapping[str, str]:
        """The recipe."""
        return {"recipe.toml": self.recipe.to_toml()}

    def teacher_state(self) -> dict[str, Tensor] | None:
        """The momentum teacher's weights in the original's layout, for methods that have one."""
        return None

    def published(self, average: MaskedImageModel | None = None) -> dict[str, Any]:
        """The student in the layout of the original method, with ``model_ema`` for the momentum teacher."""
        content: dict[str, Any] = {"model": published_state(self.student), **published_metadata(self.student)}
        teacher = self.teacher_state()
        if teacher is not None:
            content["model_ema"] = teacher  # the originals' name for it
        if average is not None:
            content["model_average"] = published_state(average)
        return content


def parameter_groups(method: Method, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW: weights that decay, then biases, norms and layer scales (and class tokens) that do not.

    As each original does it: what has one axis or is a bias does not decay, nor does what the model names. Mask tokens
    and tables of relative positions do, and in MAE the class token does too.

    Args:
        method: Of which only the student is trained.
        recipe: Its settings.

    Returns:
        Two groups (one where nothing decays) with ``name``, ``params``, ``param_names`` and ``weight_decay``.

    Source:
        facebookresearch/mae (timm's ``add_weight_decay``), microsoft/SimMIM, LightDXY/BootMAE, TencentARC/ConMIM.
    """
    student = method.student
    names = {parameter: name for name, parameter in method.named_parameters()}
    groups = param_groups_weight_decay(student, recipe.weight_decay, no_weight_decay_list=method.no_weight_decay)
    for group in groups:
        group["name"] = "decay" if group["weight_decay"] else "no_decay"
        group["param_names"] = [names[parameter] for parameter in group["params"]]
    # timm names the groups without decay first; the order stays that of the states that were saved.
    return sorted(groups, key=lambda group: group["name"])


def peak_learning_rate(recipe: Recipe, global_batch: int) -> float:
    """The rate after the warm-up, scaled with the batch as the recipe says.

    Example:
        >>> from mto_analysis.training import load_recipe
        >>> peak_learning_rate(load_recipe("mae_vit_base"), 4096)  # 1.5e-4 * 4096 / 256
        0.0024
    """
    return recipe.base_lr * recipe.lr_scale(global_batch)


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

    Source:
        facebookresearch/mae ``util/lr_sched.py``.

    Example:
        >>> [warmup_then_cosine(epoch, 10, warmup=5, peak=1.0) for epoch in (1, 5, 7.5)]
        [0.2, 1.0, 0.5]
    """
    if done < warmup:
        return start + (peak - start) * done / warmup
    return half_cosine(peak, end, (done - warmup) / max(total - warmup, 1e-9))
