"""Products of half-precision tokens as on CUDA: numbers by a stand-in for its kernel, operators on fake tensors."""

from types import SimpleNamespace

import pytest
import torch
from cuda_operators import Operators, fake_cuda
from torch._dynamo.testing import CompileCounterWithBackend
from training_models import draw_mask

from mto_analysis.affinity import (
    TokenSplit,
    affinity_matrix,
    entropies,
    heterogeneity,
    products,
    quadrant_mass,
    row_entropy,
    split,
)
from mto_analysis.masks import MaskRule
from mto_analysis.models import ModelInfo, SimMIM, SimMIMConfig, interface
from mto_analysis.mto import MTOConfig, mto_loss, sparsity_loss
from mto_analysis.mto.losses import combine_terms, layer_products
from mto_analysis.probe import engine
from mto_analysis.probe.quadrants import AffinityMaps, quadrant_statistics
from mto_analysis.taps.tokens import LayerTokens

HALF = (torch.bfloat16, torch.float16)
MASKS = {"one number": (20, 20, 20), "several numbers": (12, 20, 25)}


@pytest.fixture
def half_products(monkeypatch):
    """On a CPU tokens stay in half precision, and what only CUDA has a kernel for has one."""

    def bmm(left, right, out_dtype, *, out):
        assert left.dtype == right.dtype
        assert left.dtype in HALF
        return torch.bmm(left.to(out_dtype), right.to(out_dtype), out=out)  # each product is exact in float32

    for module in (products, split, entropies):
        monkeypatch.setattr(module, "product_dtype", lambda tokens: tokens.dtype)
    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.dtype_out", bmm, "CPU")
    yield
    library._destroy()


def make_tokens(dtype, prefix=1):
    """Tokens of which all share a direction, as those of trained models do."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, prefix + 36, 48, generator=generator) / 48**0.5 * 2 + torch.randn(48, generator=generator)
    return x.to(dtype)


def relative(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_products__values_are_those_of_float32(dtype, masked, half_products):
    tokens, mask = make_tokens(dtype), draw_mask(0, masked=MASKS[masked], grid=6)
    exact = heterogeneity(tokens[:, 1:].double(), mask)
    assert relative(heterogeneity(tokens[:, 1:], mask), exact) < 1e-6
    found, wanted = (quadrant_statistics(x[:, 1:], mask) for x in (tokens, tokens.double()))
    assert all(relative(found[name], wanted[name]) < 5e-6 for name in wanted)
    for autocast in (False, True):  # which may be to another dtype, and must not touch the products
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine, both = TokenSplit(mask, 1), entropies.token_products(tokens, TokenSplit(mask, 1), with_visible=True)
            assert both[0].dtype == torch.float32
            assert relative(entropies.masked_rows_entropy([both[0]], mine)[0], exact) < 1e-6
    plain = both[1].transpose(0, 1) if masked == "one number" else None
    if plain is not None:
        visible = tokens.double()[:, 1:][~mask].view(3, -1, 48)
        assert relative(plain, visible @ visible.mT) < 1e-6


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_products__gradients_are_those_of_float64_rounded(dtype, masked, half_products):
    tokens, mask = make_tokens(dtype), draw_mask(0, masked=MASKS[masked], grid=6)
    config = MTOConfig.paper()

    def gradient(x):
        x = x.clone().requires_grad_()
        mine = TokenSplit(mask, 1)
        layers = [layer_products(x * factor, mine, depth, config) for depth, factor in enumerate((1, 0.5, 0.25))]
        combine_terms(layers, config).loss.backward()
        return x.grad

    def plain_gradient(x):
        x = x.clone().requires_grad_()
        total = 0.0
        h = []
        for image, kind in enumerate(mask):
            some = x[image, 1:]
            z = torch.cat([some[kind], some[~kind]])
            total = total + row_entropy(some[~kind] @ z.T).sum()
            h.append(torch.stack([row_entropy((f * some[kind]) @ (f * some[~kind]).T).mean() for f in (1, 0.5, 0.25)]))
        h = torch.stack(h, dim=1)
        loss = total / len(mask) + (1 / (h[0] + config.eps)).mean()
        (loss + torch.nn.functional.softplus(h[1:] - h[:-1]).sum(dim=0).mean()).backward()
        return x.grad

    exact = plain_gradient(tokens.double())
    rounding = relative(exact.to(dtype), exact)
    found = gradient(tokens)
    assert found.dtype == dtype
    assert (found[:, 0] == 0).all()
    # Each layer depth's gradient is rounded once, and so is their sum.
    assert relative(found, exact) < 3 * rounding
    assert relative(gradient(tokens.double()), exact) < 1e-12


def test_half_products__a_single_rounding_of_the_factor_would_not_do():
    """Rows that add to 0, times tokens that share a direction: what rounding leaves over is a multiple of it."""
    left = torch.randn(2, 6, 30, generator=torch.Generator().manual_seed(0))
    left -= left.mean(dim=2, keepdim=True)
    right = 8 + torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(1))
    right = right.bfloat16()
    exact = left.double() @ right.double()
    out = torch.empty(2, 6, 5, dtype=torch.bfloat16)
    products.multiply_sum(products.summands(left, right.dtype), right, out)
    assert relative(out, exact) < 1.5 * relative(exact.bfloat16(), exact)
    assert relative(left.bfloat16() @ right, exact) > 5 * relative(out, exact)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_cuda__a_layer_depth_of_a_probe_is_few_operators_and_waits_for_nothing(dtype):
    numbers = [118] * 8
    with fake_cuda():
        mask = torch.zeros(8, 196, dtype=torch.bool)
        tokens = torch.empty(8, 197, 64, dtype=dtype)[:, 1:]
        layer = LayerTokens(0, tokens, mask)
        some, ragged, maps = (
            TokenSplit(mask, numbers=numbers),
            TokenSplit(mask, numbers=range(100, 108)),
            AffinityMaps(),
        )
        for each in (some, ragged):
            heterogeneity(tokens, each)
        maps("encoder", layer, some, [""] * 8)
        with torch.inference_mode(), Operators() as of_h:
            heterogeneity(tokens, some)
        with torch.inference_mode(), Operators() as of_all:
            maps("encoder", layer, some, [""] * 8)
        with torch.inference_mode(), Operators() as of_ragged:
            heterogeneity(tokens, ragged)
    # One that gathers, one that multiplies.
    assert of_h.started[:2] == ["aten::index_select", "aten::bmm" if dtype in HALF else "aten::matmul"]
    assert len(of_h.started) <= 8, of_h.started
    assert len(of_all.started) <= 40, of_all.started
    assert of_all.started.count("aten::bmm") == 1
    assert not of_h.waiting + of_all.waiting + of_ragged.waiting
    assert "aten::_to_copy" not in of_h.started + of_all.started  # half precision is never copied to float32


def test_cuda__the_losses_are_few_operators_and_wait_for_nothing():
    config, depths = MTOConfig(), 13
    with fake_cuda():
        mine = TokenSplit(torch.zeros(8, 196, dtype=torch.bool), 1, numbers=[118] * 8)
        layers = [torch.empty(8, 197, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(depths)]
        layer_products(layers[0], mine, 0, config)
        with Operators() as forward:
            made = [layer_products(tokens, mine, depth, config) for depth, tokens in enumerate(layers)]
        with Operators() as terms:
            combine_terms(made, config)
        context = SimpleNamespace(saved_tensors=(layers[1],), split=mine, dtype=torch.bfloat16)
        for _ in range(2):  # the first finds out where tokens come from
            with Operators() as backward:
                entropies._Products.backward(context, torch.empty_like(made[1].masked))
    assert forward.started.count("aten::bmm") == depths + 1  # one each, and visible tokens with each other
    assert len(forward.started) == 2 * depths + 1, forward.started
    assert len(terms.started) <= 60, terms.started
    assert len(backward.started) <= 9, backward.started
    assert not forward.waiting + terms.waiting + backward.waiting


def test_cuda__a_probe_waits_for_the_values_of_a_batch_only(monkeypatch):
    monkeypatch.setattr(interface, "check_mask", lambda *_: None)  # asked before the device has anything to do
    monkeypatch.setattr(engine, "lasting_memory", lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="cpu"))
    info = ModelInfo("simmim_vit", "inpainting", 32, 8, MaskRule("random", 0.5, 8))

    def of_h(stack, layer, mine, names):
        return {"heterogeneity": heterogeneity(layer.tokens, mine)}

    with fake_cuda(), torch.no_grad(), Operators() as operators:
        model = SimMIM(SimMIMConfig(image_size=32, patch_size=8, dim=16, depth=3, num_heads=2, mlp_dim=16), info).eval()
        mine = TokenSplit(torch.zeros(2, 16, dtype=torch.bool), numbers=[8, 9])
        operators.waiting.clear()
        with pytest.raises(RuntimeError, match="numpy"):  # values that there are none of here
            engine._measure(model, torch.empty(2, 3, 32, 32), mine, "encoder", ("a", "b"), 0, [of_h])
    assert operators.waiting == ["aten::copy_"]


# Functions of tokens and split.
COMPILED = {
    "H": heterogeneity,
    "mass": quadrant_mass,
    "affinity": affinity_matrix,
    "quadrants": quadrant_statistics,
    "sparsity loss": sparsity_loss,
    "mto_loss": lambda tokens, mine: mto_loss([tokens, tokens.tanh(), tokens], mine).loss,
}


@pytest.mark.slow
@pytest.mark.parametrize("masked", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled__is_one_graph_that_can_be_fused(name, masked):
    tokens, mask = make_tokens(torch.float32)[:, 1:], draw_mask(0, masked=masked, grid=6)
    tokens.requires_grad_("loss" in name)
    mine, graphs = TokenSplit(mask), CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend=graphs)
    expected = COMPILED[name](tokens, TokenSplit(mask))
    for _ in range(2):
        found = compiled(tokens, mine)
        torch.testing.assert_close(found, expected)
    assert graphs.frame_count == 1  # also where the split had yet to find out where its tokens are
    if tokens.requires_grad:
        gradients = [torch.autograd.grad(value, tokens) for value in (found, expected)]
        torch.testing.assert_close(*gradients)
