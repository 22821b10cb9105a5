import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_mto as reference
import torch

from mto_analysis import heterogeneity
from mto_analysis.affinity import quadrant_mass
from mto_analysis.mto import MTOConfig, embedding_loss, mto_loss, ranking_loss, sparsity_loss

GOLDEN = sorted((Path(__file__).parent / "golden" / "mto").glob("*.npz"))
EQUAL = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]]).bool()
RAGGED = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]).bool()
MASKS = pytest.mark.parametrize("mask", [EQUAL, RAGGED], ids=["equal", "ragged"])


def layers_for(mask, *, count=4, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(*mask.shape, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(count)
    ]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_losses__equal_those_of_the_original_codes_tokens(path):
    with np.load(path) as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files}
    depth = len(found["heterogeneity"])
    if "tokens_0" in found:  # Swin: tokens and masks per layer depth
        layers = [found[f"tokens_{each}"] for each in range(depth)]
        masks = [found[f"mask_{each}"] for each in range(depth)]
    else:
        layers, masks = list(found["tokens"]), [found["mask"]] * depth
    terms = mto_loss(layers, masks, replace(MTOConfig.paper(), ranking_direction="as_printed"))
    h = found["heterogeneity"].float()
    torch.testing.assert_close(terms.heterogeneity, h, rtol=1e-4, atol=1e-7)
    for value, name in ((terms.sparsity, "l_spa"), (terms.embedding, "l_e"), (terms.ranking, "l_r")):
        torch.testing.assert_close(value, found[name].mean().float(), rtol=1e-4, atol=0)
    for image in range(h.shape[1]):  # and each image by itself
        one = slice(image, image + 1)
        values = {
            "l_spa": sparsity_loss(layers[0][one], masks[0][one]),
            "l_e": embedding_loss(terms.heterogeneity[0, one]),
            "l_r": ranking_loss(terms.heterogeneity[:, one], direction="as_printed"),
        }
        for name, value in values.items():
            torch.testing.assert_close(value, found[name][image].float(), rtol=1e-4, atol=0)


CONFIGS = {
    "default": MTOConfig(),
    "paper": MTOConfig.paper(),
    "as printed": replace(MTOConfig.paper(), ranking_direction="as_printed"),
    "without self": MTOConfig(sparsity_weight=1, include_self=False),
    "scaled_dot": replace(MTOConfig.paper(), similarity="scaled_dot"),
    "cosine": replace(MTOConfig.paper(), similarity="cosine"),
    "layers": MTOConfig(ranking_weight=1, layers=(1, 3)),
    "L_r alone": MTOConfig(sparsity_weight=0, embedding_weight=0, ranking_weight=1),
}


@pytest.mark.parametrize("name", CONFIGS)
@MASKS
def test_mto_loss__equals_slow_reference_with_gradients(mask, name):
    config = CONFIGS[name]
    layers, slow = layers_for(mask), layers_for(mask)
    terms = mto_loss(layers, mask, config)
    expected, parts = reference.mto(slow, mask, config)
    torch.testing.assert_close(terms.loss, expected)
    weights = (config.sparsity_weight, config.embedding_weight, config.ranking_weight)
    for value, part, weight in zip(terms[1:4], parts, weights, strict=True):
        torch.testing.assert_close(value, part if weight else torch.zeros_like(part))
    terms.loss.backward()
    expected.backward()
    for ours, theirs in zip(layers, slow, strict=True):
        if theirs.grad is None:  # a layer depth that is not ranked
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["default", "paper", "without self", "cosine"])
@MASKS
def test_mto_loss__passes_gradcheck(mask, name):
    layers = layers_for(mask, count=3, dim=3)
    # One image sees a single patch, so its H is 0: at a small eps differences in L_e drown in rounding.
    config = replace(CONFIGS[name], eps=0.5)
    assert torch.autograd.gradcheck(lambda *each: mto_loss(each, mask, config).loss, layers)


@pytest.mark.parametrize("function", [sparsity_loss, lambda *each: sparsity_loss(*each, reduction="mean")])
def test_sparsity_loss__passes_gradcheck(function):
    assert torch.autograd.gradcheck(lambda x: function(x, RAGGED), layers_for(RAGGED, count=1))


def test_embedding_and_ranking_loss__pass_gradcheck():
    h = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(embedding_loss, h)
    assert torch.autograd.gradcheck(ranking_loss, h)
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, direction="as_printed"), h)


def test_sparsity_loss__by_hand():
    mask = torch.tensor([[True, True, False, False]])
    tokens = torch.zeros(1, 4, 2)
    assert sparsity_loss(tokens, mask).item() == pytest.approx(2 * math.log(4))
    assert sparsity_loss(tokens, mask, reduction="mean").item() == pytest.approx(math.log(4))
    assert sparsity_loss(tokens, mask, include_self=False).item() == pytest.approx(2 * math.log(3))


def test_ranking_loss__directions_mirror_each_other():
    h = torch.tensor([[3.0, 1.0], [2.0, 2.0], [0.5, 4.0]])
    torch.testing.assert_close(ranking_loss(h), ranking_loss(h.flip(0), direction="as_printed"))
    falling, rising = h[:, :1], h[:, 1:]
    assert ranking_loss(falling) < 2 * math.log(2) < ranking_loss(rising)
    assert ranking_loss(rising, direction="as_printed") < 2 * math.log(2)


@pytest.mark.parametrize("direction", ["descending", "as_printed"])
def test_ranking_loss__derivatives_sum_to_zero(direction):
    h = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(h, direction=direction)
    loss.backward()
    torch.testing.assert_close(h.grad.sum(dim=0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(ranking_loss(h + 5, direction=direction), loss)
    first, last = h.grad[0], h.grad[-1]
    assert bool((first < 0).all() and (last > 0).all()) is (direction == "descending")


def one_step(tokens, loss, lr=0.05):
    """Tokens after one gradient descent step on a loss of theirs."""
    optimizer = torch.optim.SGD([tokens], lr=lr)
    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before
    return tokens.detach()


def test_sparsity_loss__a_step_sharpens_visible_rows():
    tokens = torch.nn.Parameter(layers_for(EQUAL, count=1)[0].detach())
    start = tokens.detach().clone()
    after = one_step(tokens, lambda: sparsity_loss(tokens, EQUAL))
    peak = [(x @ x.mT).softmax(-1).amax(-1)[~EQUAL].mean() for x in (start, after)]
    assert peak[1] > peak[0]


def test_sparsity_loss__equal_masked_tokens_lose_weight_to_visible_ones():
    tokens = layers_for(EQUAL, count=1, dim=8)[0].detach()
    tokens[EQUAL] = 0.1  # one vector for all, as in SimMIM without absolute positions
    tokens = torch.nn.Parameter(tokens)
    start = quadrant_mass(tokens.detach(), EQUAL)
    after = quadrant_mass(one_step(tokens, lambda: sparsity_loss(tokens, EQUAL)), EQUAL)
    assert bool((after[:, 3] > start[:, 3]).all())  # visible-visible


def test_embedding_loss__a_step_raises_h_0():
    tokens = torch.nn.Parameter(layers_for(RAGGED, count=1)[0].detach())
    start = heterogeneity(tokens.detach(), RAGGED).mean()
    after = one_step(tokens, lambda: mto_loss([tokens, tokens], RAGGED, L_E).loss)
    assert heterogeneity(after, RAGGED).mean() > start


L_E = MTOConfig(sparsity_weight=0, embedding_weight=1, ranking_weight=0)


@pytest.mark.parametrize("direction", ["descending", "as_printed"])
def test_ranking_loss__a_step_turns_the_slope_of_h(direction):
    config = MTOConfig(sparsity_weight=0, embedding_weight=0, ranking_weight=1, ranking_direction=direction)
    layers = torch.nn.Parameter(torch.stack([each.detach() for each in layers_for(EQUAL)]))
    slopes = []
    for tokens in (layers.detach().clone(), one_step(layers, lambda: mto_loss(list(layers), EQUAL, config).loss)):
        h = [heterogeneity(each, EQUAL).mean() for each in tokens]
        slopes.append(h[-1] - h[0])
    assert bool(slopes[1] < slopes[0]) is (direction == "descending")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", "paper"])
def test_mto_loss__finite_at_norms_that_saturate_the_softmax(name, dtype):
    layers = [(40 * each.detach()).to(dtype).requires_grad_() for each in layers_for(RAGGED)]
    terms = mto_loss(layers, RAGGED, CONFIGS[name])
    terms.loss.backward()
    assert all(bool(value.isfinite().all()) for value in terms)
    assert terms.loss.dtype == torch.float32
    assert all(bool(each.grad.isfinite().all()) for each in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mto_loss__same_inside_autocast(dtype):
    layers, plain = (layers_for(EQUAL, dtype=torch.float32) for _ in range(2))
    with torch.autocast("cpu", dtype):
        terms = mto_loss(layers, EQUAL, MTOConfig.paper())
    terms.loss.backward()
    expected = mto_loss(plain, EQUAL, MTOConfig.paper())
    expected.loss.backward()
    assert torch.equal(terms.loss, expected.loss)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(layers, plain, strict=True))


def test_mto_loss__half_precision_tokens_are_measured_in_float32():
    half = layers_for(EQUAL, dtype=torch.bfloat16)
    full = [each.detach().float() for each in half]
    torch.testing.assert_close(mto_loss(half, EQUAL).heterogeneity, mto_loss(full, EQUAL).heterogeneity)


def test_embedding_loss__bounded_by_eps():
    h = torch.zeros(1, requires_grad=True)
    loss = embedding_loss(h, eps=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(10)
    assert h.grad.item() == pytest.approx(-100)


def test_config__presets():
    paper = MTOConfig.paper()
    assert (paper.sparsity_weight, paper.embedding_weight, paper.ranking_weight) == (1, 1, 1)
    assert (paper.sparsity_reduction, paper.eps, paper.include_self) == ("sum", 1e-6, True)
    assert paper.ranking_direction == MTOConfig().ranking_direction == "descending"
    assert MTOConfig().sparsity_reduction == "mean"


def test_config__warmup_rises_to_one():
    config = MTOConfig(warmup_steps=4)
    assert [config.warmup(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    layers = [each.detach() for each in layers_for(EQUAL)]
    first, full = (mto_loss(layers, EQUAL, config, step=step).loss for step in (0, 9))
    torch.testing.assert_close(4 * first, full)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity_weight": -1}, "sparsity_weight must be at least 0, got -1"),
        ({"embedding_weight": math.nan}, "embedding_weight must be finite"),
        ({"ranking_weight": math.inf}, "ranking_weight must be finite"),
        ({"sparsity_reduction": "max"}, "sparsity_reduction must be"),
        ({"ranking_direction": "up"}, "ranking_direction must be"),
        ({"similarity": "l2"}, "similarity must be"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"eps": math.inf}, "eps must be finite"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"layers": (1,)}, "layers must be at least two"),
        ({"layers": (2, 1)}, "layers must rise"),
        ({"layers": (-1, 2)}, "layers must be at least 0, got -1"),
    ],
)
def test_config__names_the_bad_value(settings, message):
    with pytest.raises(ValueError, match=message):
        MTOConfig(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mto_loss([torch.zeros(2, 6, 4)], EQUAL), "at least one more"),
        (lambda: mto_loss([torch.zeros(2, 5, 4)] * 2, EQUAL), "tokens must be"),
        (lambda: mto_loss([torch.zeros(2, 6, 4)] * 2, ~(EQUAL | ~EQUAL)), "mask must mask a patch"),
        (
            lambda: mto_loss([torch.zeros(2, 6, 4)] * 2, EQUAL, MTOConfig(layers=(0, 2))),
            r"config.layers must be 0 to 1",
        ),
        (lambda: mto_loss([torch.zeros(2, 6, 4)] * 2, [EQUAL]), "zip"),
        (lambda: sparsity_loss(torch.zeros(2, 6, 4), EQUAL | ~EQUAL), "leave a patch visible"),
        (lambda: sparsity_loss(torch.zeros(2, 6, 4), EQUAL, reduction="max"), "reduction must be"),
        (lambda: sparsity_loss(torch.zeros(2, 6, 4), EQUAL, similarity="l2"), "similarity must be"),
        (lambda: ranking_loss(torch.zeros(2, 2), direction="up"), "direction must be"),
    ],
)
def test_losses__name_the_broken_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
