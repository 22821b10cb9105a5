"""Sharded parameters: the mask token is whole while the model runs, so the losses are those of the plain model."""

import copy

import pytest
import torch
from test_mto_attach import CONFIG, build
from training_models import CASES

from mto_analysis.mto import attach_mto

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch's own, of a single process and of gloo
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model, case):
    from torch.distributed.fsdp import fully_shard

    for blocks in case.stacks(model):
        for block in blocks:
            fully_shard(block)
    return fully_shard(model)


def flat(model, *, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["mae", "simmim vit"])
@pytest.mark.parametrize("way", ["fully_shard", "FullyShardedDataParallel"])
def test_fsdp__losses_and_gradients_equal_the_plain_model(name, way):
    case = CASES[name]
    model = build(case)
    plain = copy.deepcopy(model)
    wrapped = sharded(model, case) if way == "fully_shard" else flat(model, use_orig_params=True)
    mto, expected = attach_mto(wrapped, CONFIG), attach_mto(plain, CONFIG)
    for step in range(2):
        wrapped.zero_grad()  # before the forward: after it fully_shard shows other parameters
        plain.zero_grad()
        loss, _ = case.run(wrapped, step)
        extra = mto.loss()
        (loss + extra).backward()
        loss, _ = case.run(plain, step)
        plain_extra = expected.loss()
        (loss + plain_extra).backward()
        torch.testing.assert_close(extra, plain_extra)
    found = dict(model.named_parameters())
    for parameter_name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            gradient = found[parameter_name].grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient.view_as(parameter), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("group")
def test_fsdp__joined_parameters_are_refused():
    with pytest.raises(ValueError, match="use_orig_params=True"):
        attach_mto(flat(build(CASES["simmim vit"]), use_orig_params=False))
