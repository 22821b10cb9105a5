from __future__ import annotations

import math

import pytest
from test_pretraining_methods import tiny_recipe

from mto_analysis.training import build_method, learning_rate, load_recipe, parameter_groups, peak_learning_rate


def small(name, **options):
    """10 epochs of 5 steps, 2 of them warm-up; the peak is 1 for a batch of 8."""
    settings = {"epochs": "10", "warmup_epochs": "2", "base_lr": "1", "lr_batch": "8", "min_lr": "0.1"}
    return load_recipe(name).with_options(settings | options)


def test_learning_rate__mae_by_hand():
    recipe = small("mae_cifar10")
    rates = [learning_rate(recipe, step, 5, 8) for step in range(50)]
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[30] == pytest.approx(0.1 + 0.9 / 2)  # half of the 40 steps after the warm-up
    assert rates[49] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 39 / 40)))


def test_learning_rate__simmim_cosine_by_hand():
    recipe = small("simmim_cifar10", warmup_lr="0.5", scale_all_lr="true")
    rates = [learning_rate(recipe, step, 5, 16) for step in range(50)]  # twice the batch: all rates doubled
    assert rates[:3] == pytest.approx([1.0, 1.0, 1.1])  # the scheduler moves after the update
    assert rates[10] == pytest.approx(1.0 + 9 * 0.1)
    # The cosine counts from the run's start, so that it is below the peak when the warm-up ends.
    assert rates[11] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi * 10 / 50)))
    assert rates[26] == pytest.approx(0.2 + 0.9)


def test_learning_rate__simmim_is_that_of_the_scheduler_of_timm():
    import torch
    from timm.scheduler import CosineLRScheduler

    recipe = small("simmim_cifar10", warmup_lr="0.5")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=50, lr_min=0.1, warmup_t=10, warmup_lr_init=0.5, cycle_limit=1, t_in_epochs=False
    )
    for step in range(50):  # as the original's loop: update, then set the next rate
        assert learning_rate(recipe, step, 5, 8) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step_update(step)


def test_learning_rate__multistep_by_hand():
    recipe = small("simmim_cifar10", schedule="multistep", milestones="4,8", decay_factor="0.1")
    rates = [learning_rate(recipe, step, 5, 8) for step in range(50)]
    assert rates[11:21] == pytest.approx([1.0] * 10)
    assert rates[21:41] == pytest.approx([0.1] * 20)
    assert rates[41:] == pytest.approx([0.01] * 9)


@pytest.mark.parametrize("name", ["bootmae_cifar10", "conmim_cifar10"])
def test_learning_rate__bootmae_and_conmim_by_hand(name):
    recipe = small(name)
    rates = [learning_rate(recipe, step, 5, 8) for step in range(50)]
    assert rates[:10] == pytest.approx([step / 9 for step in range(10)])  # the last warm-up step has the peak already
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[49] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 39 / 40)))


def test_learning_rate__runs_of_one_warmup_step_and_of_none():
    for name in ("mae_cifar10", "simmim_cifar10", "bootmae_cifar10", "conmim_cifar10"):
        assert learning_rate(small(name, warmup_epochs="0"), 0, 5, 8) == pytest.approx(1.0)
        assert learning_rate(small(name, warmup_epochs="0.2"), 0, 5, 8) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="step must lie between 0 and 49"):
        learning_rate(small("mae_cifar10"), 50, 5, 8)


def test_peak_learning_rate__scales_with_the_batch():
    recipe = small("mae_cifar10")
    assert peak_learning_rate(recipe, 32) == 4.0
    assert peak_learning_rate(small("mae_cifar10", lr_batch="none"), 32) == 1.0
    published = {"mae_vit_base": 2.4e-3, "simmim_vit_base": 4e-4, "bootmae_vit_base": 2.4e-3, "conmim_vit_base": 5e-4}
    for name, rate in published.items():
        recipe = load_recipe(name)
        assert peak_learning_rate(recipe, recipe.batch_size) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "spared", "decaying"),
    [
        ("mae", [], ["cls_token", "mask_token", "patch_embed.proj.weight"]),
        ("simmim", ["cls_token"], ["mask_token", "position_biases.0.relative_position_bias_table", "decoder.weight"]),
        ("bootmae", ["cls_token", "pixel_blocks.0.attn.q.bias"], ["pixel_mask_token", "feature_mask_token"]),
        ("conmim", ["cls_token", "projectors.1.weight"], ["mask_token", "projectors.0.weight"]),
    ],
)
def test_parameter_groups__decay_as_the_original(name, spared, decaying):
    method = build_method(tiny_recipe(name), seed=0)
    decay, no_decay = parameter_groups(method, method.recipe)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.05, 0.0)
    assert {f"student.{each}" for each in decaying} <= set(decay["param_names"])
    assert {f"student.{each}" for each in (*spared, "norm.weight", "blocks.0.attn.qkv.bias")} <= set(
        no_decay["param_names"]
    )
    assert not any(each.endswith("pos_embed") for each in decay["param_names"] + no_decay["param_names"])
    trained = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
    assert len(decay["params"]) + len(no_decay["params"]) == len(trained)
