"""How a method's weights are updated: parameter groups, and the learning rate of every step."""

from __future__ import annotations

from typing import Any

from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]

from mto_analysis.training.methods import METHODS, Method
from mto_analysis.training.recipes import Recipe

__all__ = ["learning_rate", "parameter_groups", "peak_learning_rate"]


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
    return recipe.base_lr * _scale(recipe, global_batch)


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
    total = recipe.epochs * steps_per_epoch
    if not 0 <= step < total:
        raise ValueError(f"step must lie between 0 and {total - 1}, got {step}")
    peak = peak_learning_rate(recipe, global_batch)
    scale = _scale(recipe, global_batch) if recipe.scale_all_lr else 1.0
    method = METHODS[recipe.method]
    return method.learning_rate(recipe, step, steps_per_epoch, peak, recipe.warmup_lr * scale, recipe.min_lr * scale)


def _scale(recipe: Recipe, global_batch: int) -> float:
    return 1.0 if recipe.lr_batch is None else global_batch / recipe.lr_batch
