"""The pre-training methods: what each one trains and minimizes, with its metadata on its class."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mto_analysis.models import MaskedImageModel, ModelInfo
from mto_analysis.models.adapting import fix_key_biases, set_drop_path
from mto_analysis.models.initialization import initialize
from mto_analysis.training.initial import InitialWeights
from mto_analysis.training.methods.bootmae import BootMAEMethod
from mto_analysis.training.methods.conmim import ConMIMMethod
from mto_analysis.training.methods.mae import MAEMethod
from mto_analysis.training.methods.method import Method
from mto_analysis.training.methods.recipe import Recipe
from mto_analysis.training.methods.simmim import SimMIMMethod

__all__ = ["METHODS", "Method", "build_method", "build_student", "learning_rate", "method_of"]

#: By the name that recipes give them.
METHODS: Mapping[str, type[Method]] = {
    "mae": MAEMethod,
    "simmim": SimMIMMethod,
    "bootmae": BootMAEMethod,
    "conmim": ConMIMMethod,
}


def method_of(model: MaskedImageModel) -> type[Method]:
    """The method whose authors' evaluation applies to a model: that of its family, or of the family it is built on.

    BEiT and its relatives, which hold masked tokens in their encoder, are fine-tuned as ConMIM; all others as MAE.
    """
    for method in METHODS.values():
        if model.info.family in (method.family, *method.relatives):
            return method
    return ConMIMMethod if model.info.style == "inpainting" else MAEMethod


def build_student(recipe: Recipe, *, seed: int, start: InitialWeights | None = None) -> MaskedImageModel:
    """The model of a recipe with the weights that its method starts from, ready to be trained.

    Args:
        recipe: Settings.
        seed: Of the weights; the global random state stays as it is.
        start: Weights to begin with instead, as far as there are any.
    """
    method = METHODS[recipe.method]
    info = ModelInfo(
        family=method.family,
        style=method.style,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
        mask_rule=recipe.mask_rule,
        mean=recipe.mean,
        std=recipe.std,
        channels=len(recipe.mean),
        target=recipe.target,
        criterion=method.criterion,
        mask_rule_source=f"recipe {recipe.name}",
    )
    with torch.random.fork_rng(devices=[]):  # PyTorch's layers sample weights when they are made
        model = method.model(recipe.model_config(), info)
    initialize(model, seed)
    if start is not None:
        start.give_to(model)
    if method.fixed_key_biases:
        fix_key_biases(model)
    if recipe.drop_path:
        set_drop_path(model, recipe.drop_path)
    return model


def build_method(recipe: Recipe, *, seed: int, start: InitialWeights | None = None) -> Method:
    """The method of a recipe, on the CPU, in training mode, before its first step.

    Args:
        recipe: Settings.
        seed: Of the weights; the global random state stays as it is.
        start: Weights to begin with instead, as far as there are any.

    Raises:
        CheckpointError: If these are of another architecture.

    Example:
        >>> from mto_analysis.training import load_recipe
        >>> method = build_method(load_recipe("mae_cifar10"), seed=0)
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> list(method(images, torch.arange(64)[None] >= 16))
        ['pixels']
    """
    return METHODS[recipe.method](build_student(recipe, seed=seed, start=start), recipe).train()


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int, global_batch: int) -> float:
    r"""The learning rate of an optimizer step, as the method's original sets it.

    A linear warm-up over w epochs to the peak p, then a half cosine to ``min_lr`` m at the end of E epochs, where the
    originals differ in details that are kept:

    - MAE: at epoch :math:`e` (with its fraction) :math:`m + (p - m) (1 + \cos \pi (e - w) / (E - w)) / 2`.
    - BootMAE, ConMIM: the same, but the last warm-up step already has the peak, and the cosine starts after it.
    - SimMIM: the cosine of :math:`e / E`, not counted from the end of the warm-up (so the peak is never quite
      reached), or a factor at each milestone; and every step has the rate meant for the one before, as the original
      sets it after the update.

    Args:
        recipe: Settings.
        step: Optimizer steps done before this one.
        steps_per_epoch: Optimizer steps of an epoch.
        global_batch: Images of a step, over all processes and micro-batches.

    Source:
        facebookresearch/mae ``util/lr_sched.py``; microsoft/SimMIM ``lr_scheduler.py``, ``main_simmim.py``, with
        timm 0.4's ``CosineLRScheduler``; LightDXY/BootMAE and TencentARC/ConMIM ``utils.py``.

    Raises:
        ValueError: If the step is not one of the run.
    """
    return METHODS[recipe.method].rate_of(recipe, step, steps_per_epoch, global_batch)
