"""Counts of masked patches that are assumed instead of waiting for a device; here a CPU is said to be such a device."""

import copy
from dataclasses import replace

import pytest
import torch
from cuda_operators import Operators
from test_mto_attach import CASES, CONFIG, assert_same, attached_way, build, keep_tokens, slow_way
from torch._subclasses.fake_tensor import FakeTensorMode
from training_models import NUM, draw_mask, make_images

from mto_analysis.errors import StackError
from mto_analysis.mto import attach_mto, mto_loss
from mto_analysis.taps import forward, rows

# Of the others the number of masked patches differs between the images of a batch.
UNIFORM = sorted(CASES.keys() - {"conmim", "ours mae", "ours simmim"})


class Far:
    """What stands for a mask on its way; counts how many were asked for."""

    asked = 0

    def __init__(self, mask):
        self.mask = mask.clone()

    def wait(self):
        Far.asked += 1
        return self.mask


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setattr(rows, "is_far", lambda tokens: True)
    monkeypatch.setattr(forward, "_Coming", Far)
    monkeypatch.setattr(Far, "asked", 0)
    return Far


def conmim(masked):
    """ConMIM, and how many patches of each of three images are masked in each forward."""

    def run(model, seed):
        mask = draw_mask(seed, masked=masked[seed])
        return model(make_images(seed), bool_masked_pos=mask).square().mean(), mask

    return replace(CASES["conmim"], run=run)


@pytest.mark.parametrize("name", UNIFORM)
def test_assumed_counts__loss_and_gradients_equal_the_slow_way(name, far):
    case = CASES[name]
    model = build(case)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG, check_every=0)
    for seed in range(3):
        assert_same(attached_way(case, model, mto, seed), slow_way(case, twin, seed), rtol=1e-4, atol=1e-6)
    assert far.asked == 2 * len(case.stacks(model))  # all but the first forward


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("second", [(9, 9, 9), (10, 4, 10), (0, 10, NUM), (10, 10, 0)])
def test_assumed_counts__wrong_ones_are_measured_again(second, checkpointed, far):
    case = conmim([(10, 10, 10), second, (7, 7, 7), (7, 7, 7)])
    model = build(case)
    if checkpointed:
        for block in model.blocks:
            run = block.forward
            block.forward = lambda x, rel_pos_bias, run=run: torch.utils.checkpoint.checkpoint(
                run, x, rel_pos_bias, use_reentrant=False
            )
    mto = attach_mto(model, CONFIG, check_every=0)
    for seed in range(4):
        kept, handles = keep_tokens(case.stacks(model))
        _, mask = case.run(model, seed)
        for handle in handles:
            handle.remove()
        some = mask.any(dim=1) & ~mask.all(dim=1)
        expected = mto_loss([kept[0, depth][some, 1:] for depth in range(len(kept))], mask[some], CONFIG).loss
        names, parameters = zip(*model.named_parameters(), strict=True)
        wanted = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
        loss = mto.loss()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name, found, gradient in zip(
            names, torch.autograd.grad(loss, parameters, allow_unused=True), wanted, strict=True
        ):
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert far.asked == 1  # once wrong, nothing is assumed again


def test_assumed_counts__a_forward_without_any_mask_is_not_counted(far):
    case = conmim([(10, 10, 10), (0, 0, 0), (NUM, NUM, NUM)])
    model = build(case)
    mto = attach_mto(model, check_every=0)
    case.run(model, 0)
    mto.loss()
    for seed in (1, 2):
        case.run(model, seed)
        with pytest.raises(RuntimeError, match="no patch was masked"):
            mto.loss()
    assert far.asked == 1


def test_assumed_counts__of_another_grid_are_not_taken(far):
    model = build(CASES["simmim swin"])
    mto = attach_mto(model)
    CASES["simmim swin"].run(model, 0)
    mto.loss()
    mto._stacks[0].usual = (16, 8)  # of a forward of 16 patches, where this model has 64
    CASES["simmim swin"].run(model, 1)
    assert mto.loss().isfinite()
    assert far.asked == 0


def test_assumed_counts__swins_mask_units_smaller_than_a_cell_are_refused(far):
    case = CASES["simmim swin"]
    model = build(case)
    mto = attach_mto(model)
    _, mask = case.run(model, 0)
    mto.loss()
    scattered = draw_mask(0, masked=(int(mask[0].sum()),) * 3, grid=8)
    model(make_images(), scattered.view(3, 8, 8).long())
    with pytest.raises(RuntimeError, match="cuts through merged tokens"):
        mto.loss()
    assert far.asked == 1


def test_assumed_counts__of_several_forwards_are_settled_each(far):
    case = CASES["mae"]
    model = build(case)
    twin = copy.deepcopy(model)
    mto = attach_mto(model, CONFIG, check_every=0)
    for seed in range(3):
        case.run(model, seed)
    wanted = torch.stack([slow_way(case, twin, seed)[0] for seed in range(3)]).mean()
    torch.testing.assert_close(mto.loss(), wanted, rtol=1e-5, atol=1e-6)
    assert far.asked == 2


@pytest.mark.parametrize("name", ["simmim vit", "simmim swin"])
def test_cuda__only_the_first_forward_waits(name, monkeypatch):
    """Of tensors that have no values and say that they are on CUDA, none can be asked for its value."""
    real = build(CASES[name])
    known = attach_mto(real)
    _, mask = CASES[name].run(real, 0)
    side = int(mask.shape[1] ** 0.5)
    coming = Far(torch.stack([mask, mask, mask, torch.zeros_like(mask)]))
    monkeypatch.setattr(forward, "_Coming", lambda _: coming)
    with FakeTensorMode() as mode, torch.device("cuda"):
        model = build(CASES[name])
        mto = attach_mto(model, check_every=0)
        images, masks = torch.empty(make_images().shape), torch.empty(len(mask), side, side, dtype=torch.long)
        model(images, masks)
        with pytest.raises(StackError, match="DataDependentOutputException"):
            mto.loss()
        (stack,), (like,) = mto._stacks, known._stacks
        stack.layout, stack.usual = like.layout, like.usual  # as after a first forward
        with Operators() as operators:
            model(images, masks)
    assert stack.forwards[0].settle()  # of the mask on the CPU, which has values
    with mode, operators:
        assert mto.loss().is_cuda
    assert not operators.waiting
