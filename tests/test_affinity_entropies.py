import pytest
import reference_mto as reference
import torch

from mto_analysis import heterogeneity
from mto_analysis.affinity import TokenSplit
from mto_analysis.affinity.entropies import masked_rows_entropy, token_products, visible_rows_entropy

EQUAL = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]]).bool()
RAGGED = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 0, 1]]).bool()
MASKS = pytest.mark.parametrize("mask", [EQUAL, RAGGED], ids=["equal", "ragged"])
INCLUDE_SELF = pytest.mark.parametrize("include_self", [True, False])


def tokens_for(mask, *, dim=4, scale=1.0, dtype=torch.float64, prefix=0):
    generator = torch.Generator().manual_seed(3)
    tokens = scale * torch.randn(len(mask), prefix + mask.shape[1], dim, generator=generator, dtype=torch.float64)
    return tokens.to(dtype).requires_grad_()


def weighted(*values):
    """A sum in which every image and value has another weight, so that no gradient hides behind another."""
    return sum((value * torch.arange(1.0, len(value) + 1)).sum() * (k + 1) for k, value in enumerate(values))


def masked_entropy(tokens, split):
    return masked_rows_entropy(token_products(tokens, split), split)[0]


def both_entropies(tokens, split, *, include_self=True):
    masked, visible = token_products(tokens, split, with_visible=True)
    rows = visible_rows_entropy(masked, visible, split, include_self=include_self)
    return masked_rows_entropy([masked], split)[0], rows


@MASKS
def test_masked_rows_entropy__equals_slow_reference_with_gradient(mask):
    tokens, slow = tokens_for(mask), tokens_for(mask)
    value = masked_entropy(tokens, TokenSplit(mask))
    expected = torch.stack([reference.heterogeneity(each, row) for each, row in zip(slow, mask, strict=True)])
    torch.testing.assert_close(value, expected)
    weighted(value).backward()
    weighted(expected).backward()
    torch.testing.assert_close(tokens.grad, slow.grad)


@MASKS
@INCLUDE_SELF
def test_visible_rows_entropy__equals_slow_reference_with_gradient(mask, include_self):
    tokens, slow = tokens_for(mask), tokens_for(mask)
    values = both_entropies(tokens, TokenSplit(mask), include_self=include_self)
    pairs = list(zip(slow, mask, strict=True))
    expected = (
        torch.stack([reference.heterogeneity(*pair) for pair in pairs]),
        torch.stack([reference.sparsity(*pair, include_self=include_self) for pair in pairs]),
    )
    torch.testing.assert_close(values, expected)
    weighted(*values).backward()
    weighted(*expected).backward()
    torch.testing.assert_close(tokens.grad, slow.grad)


@MASKS
def test_masked_rows_entropy__layers_do_not_mix(mask):
    layers = [tokens_for(mask, scale=scale) for scale in (0.3, 1.0, 2.0)]
    alone = [each.detach().clone().requires_grad_() for each in layers]
    split = TokenSplit(mask)
    products = [token_products(each, split)[0] for each in layers]
    together = masked_rows_entropy([products[0], products[1].detach(), products[2]], split)
    expected = torch.stack([masked_entropy(each, split) for each in alone])
    torch.testing.assert_close(together, expected)
    weights = torch.arange(1.0, 4.0)[:, None] * torch.arange(1.0, len(mask) + 1)
    (together * weights).sum().backward()
    (expected * weights).sum().backward()
    assert layers[1].grad is None
    for k in (0, 2):
        torch.testing.assert_close(layers[k].grad, alone[k].grad)


@MASKS
@INCLUDE_SELF
def test_entropies__pass_gradcheck(mask, include_self):
    split = TokenSplit(mask)
    assert torch.autograd.gradcheck(lambda x: masked_entropy(x, split), tokens_for(mask))
    assert torch.autograd.gradcheck(lambda x: both_entropies(x, split, include_self=include_self), tokens_for(mask))


def test_entropies__refuse_a_second_derivative():
    tokens = tokens_for(EQUAL)
    value = masked_entropy(tokens, TokenSplit(EQUAL)).square().sum()
    (gradient,) = torch.autograd.grad(value, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@MASKS
def test_entropies__prefix_tokens_neither_count_nor_get_gradients(mask):
    tokens = tokens_for(mask, prefix=2)
    split = TokenSplit(mask, prefix_tokens=2)
    bare = tokens.detach()[:, 2:].clone().requires_grad_()
    for function in (masked_entropy, both_entropies):
        tokens.grad = bare.grad = None
        values, expected = function(tokens, split), function(bare, TokenSplit(mask))
        torch.testing.assert_close(values, expected)
        weighted(*(values if isinstance(values, tuple) else [values])).backward()
        weighted(*(expected if isinstance(expected, tuple) else [expected])).backward()
        torch.testing.assert_close(tokens.grad[:, 2:], bare.grad)
        assert not tokens.grad[:, :2].any()


@MASKS
def test_masked_rows_entropy__equals_the_measure(mask):
    tokens = tokens_for(mask, dtype=torch.float32).detach()
    torch.testing.assert_close(masked_entropy(tokens, TokenSplit(mask)), heterogeneity(tokens, mask))


def test_entropies__unchanged_when_patches_are_reordered_with_the_mask():
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    tokens = tokens_for(RAGGED).detach()
    for function in (masked_entropy, both_entropies):
        there, here = (
            function(tokens[:, order], TokenSplit(RAGGED[:, order])),
            function(tokens, TokenSplit(RAGGED)),
        )
        torch.testing.assert_close(there, here)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@MASKS
def test_entropies__finite_where_p_log_p_is_not(mask, dtype):
    tokens = tokens_for(mask, dim=16, scale=30.0, dtype=dtype)  # squared norms near 14,000
    products = tokens.float() @ tokens.float().mT
    p = products.softmax(-1)
    assert (p * p.log()).isnan().any()  # what the plain form would give
    split = TokenSplit(mask)
    h, rows = both_entropies(tokens, split, include_self=False)
    total = h.sum() + rows.sum() + masked_entropy(tokens, split).sum()
    total.backward()
    assert h.dtype == rows.dtype == torch.float32
    assert tokens.grad.dtype == dtype
    assert total.isfinite()
    assert tokens.grad.isfinite().all()


@MASKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_entropies__full_precision_inside_autocast(dtype, mask):
    tokens = tokens_for(mask, dim=64, dtype=torch.float32)
    plain = tokens_for(mask, dim=64, dtype=torch.float32)
    split = TokenSplit(mask)
    with torch.autocast("cpu", dtype):
        values = *both_entropies(tokens, split), masked_entropy(tokens, split)
        weighted(*values).backward()  # some scripts call it inside, too
    expected = *both_entropies(plain, split), masked_entropy(plain, split)
    weighted(*expected).backward()
    assert torch.equal(torch.stack(values), torch.stack(expected))
    assert torch.equal(tokens.grad, plain.grad)


def test_entropies__name_tokens_that_do_not_fit():
    split = TokenSplit(EQUAL)
    for bad in (torch.zeros(2, 7, 4), torch.zeros(3, 6, 4), torch.zeros(6, 4)):
        with pytest.raises(ValueError, match="tokens must be"):
            masked_entropy(bad, split)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4).bool(), "leave a patch visible"),
        (torch.zeros(1, 4).bool(), "mask a patch"),
        (torch.ones(1, 4), "must be bool"),
        (torch.ones(4).bool(), "must be bool"),
    ],
)
def test_token_split__names_the_rule(mask, message):
    with pytest.raises(ValueError, match=message):
        TokenSplit(mask)
