"""How a method's weights are updated: parameter groups, and the learning rate of every step."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Any

from mto_analysis.training.methods.method import Method
from mto_analysis.training.recipes import Recipe

__all__ = ["learning_rate", "parameter_groups", "peak_learning_rate"]

# What the originals name in `no_weight_decay`; MAE names nothing, so its class token decays. Mask tokens decay in all.
_BEIT_CODE = ("cls_token", "pos_embed")
_NO_DECAY = {"mae": (), "simmim": _BEIT_CODE, "bootmae": _BEIT_CODE, "conmim": _BEIT_CODE}


def parameter_groups(method: Method, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW: weights that decay, then biases, norms and layer scales (and class tokens) that do not.

    As each original does it: what has one axis or is a bias does not decay, nor does what the model names. Mask tokens
    and tables of relative positions do, and in MAE the class token does too.

    Args:
        method: Of which only the student is trained.
        recipe: Its settings.

    Returns:
        Two groups with ``name``, ``params``, ``param_names`` and ``weight_decay``.

    Source:
        facebookresearch/mae (timm's ``add_weight_decay``), microsoft/SimMIM, LightDXY/BootMAE, TencentARC/ConMIM.
    """
    decay: list[tuple[str, Any]] = []
    no_decay: list[tuple[str, Any]] = []
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        own = name.removeprefix("student.")
        spared = parameter.ndim <= 1 or name.endswith(".bias") or own in _NO_DECAY[recipe.method]
        (no_decay if spared else decay).append((name, parameter))
    return [
        {
            "name": label,
            "params": [parameter for _, parameter in members],
            "param_names": [name for name, _ in members],
            "weight_decay": rate,
        }
        for label, members, rate in (("decay", decay, recipe.weight_decay), ("no_decay", no_decay, 0.0))
    ]


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
    least, first = recipe.min_lr * scale, recipe.warmup_lr * scale
    warmup = recipe.warmup_epochs * steps_per_epoch
    if recipe.method == "simmim":
        step, warmup = max(0, step - 1), int(warmup)
        if step < warmup:
            return first + (peak - first) * step / warmup
        if recipe.schedule == "multistep":
            return peak * recipe.decay_factor ** bisect_right(recipe.milestones, step / steps_per_epoch)
        return _half_cosine(peak, least, step / total)
    if recipe.method == "mae":
        if step < warmup:
            return first + (peak - first) * step / warmup
        return _half_cosine(peak, least, (step - warmup) / (total - warmup))
    warmup = int(warmup)
    if step < warmup:
        return first + (peak - first) * (step / (warmup - 1) if warmup > 1 else 0.0)
    return _half_cosine(peak, least, (step - warmup) / (total - warmup))


def _half_cosine(start: float, end: float, fraction: float) -> float:
    """From ``start`` at 0 to ``end`` at 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))


def _scale(recipe: Recipe, global_batch: int) -> float:
    return 1.0 if recipe.lr_batch is None else global_batch / recipe.lr_batch
