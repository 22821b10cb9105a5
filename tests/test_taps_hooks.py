"""Hooks on compiled modules, and what they leave behind."""

import copy

import pytest
import torch
from model_kinds import Inpainting, features, random_mask
from test_mto_attach import CONFIG, traces
from torch import nn
from torch._dynamo.utils import counters

from mto_analysis.mto import attach_mto

# torch's own, when it goes on after a hook
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

MASK = random_mask(3, (9,))


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def blocks_compiled(way):
    model = Inpainting(cls=1).train()
    if way == "in place":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    else:
        model.blocks = nn.ModuleList(torch.compile(block, backend="aot_eager") for block in model.blocks)
    return model


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_compile__block_by_block_breaks_no_graph(way, compiler):
    torch.manual_seed(0)
    model = blocks_compiled(way)
    torch.manual_seed(0)
    plain = Inpainting(cls=1).train()
    plain.load_state_dict({key.replace("._orig_mod", ""): value for key, value in model.state_dict().items()})
    before = traces(model)
    mto, expected = attach_mto(model, CONFIG), attach_mto(plain, CONFIG)
    for _ in range(2):
        for each in (model, plain):
            each(features(3), MASK)
        torch.testing.assert_close(mto.loss(), expected.loss(), rtol=1e-5, atol=1e-6)
    assert not compiler["graph_break"]
    mto.detach()
    assert traces(model) == before
    model(features(3), MASK)
    assert mto._stacks[0].forwards == []


def test_compile__a_block_that_fails_leaves_nothing_running(compiler):
    model = blocks_compiled("in place")
    mto = attach_mto(model, CONFIG)
    with pytest.raises(RuntimeError):
        model.blocks[0](torch.zeros(3, 17, 12), src_mask=torch.zeros(2, 2))
    twin = copy.deepcopy(model)
    model(features(3), MASK)
    twin(features(3), MASK)  # a copy is compiled no more, and has nothing attached
    assert mto.loss().isfinite()
