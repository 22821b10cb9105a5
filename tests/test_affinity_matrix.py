"""Eq. (2), the affinity matrix and its quadrants: by hand, against slow loops, properties, gradients."""

from __future__ import annotations

import gc
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import some_masks
from torch import Tensor

from mto_analysis import affinity_matrix, heterogeneity, row_entropy, split_quadrants
from mto_analysis.affinity import TokenSplit, masked_first_order, quadrant_mass
from mto_analysis.runtime.memory import Scratch, lasting_memory

DTYPE = torch.float64


def some_tokens(generator: torch.Generator, batch: int, num_patches: int = 16, dim: int = 5) -> Tensor:
    return torch.randn(batch, num_patches, dim, generator=generator, dtype=DTYPE)


def reference_values(tokens: Tensor, mask: Tensor) -> Tensor:
    rows = zip(tokens.tolist(), mask.tolist(), strict=True)
    return torch.tensor([reference.heterogeneity(*row) for row in rows], dtype=DTYPE)


# By hand.


def test_heterogeneity__of_equal_tokens_is_log_num_visible() -> None:
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    assert torch.allclose(
        heterogeneity(torch.ones(2, 5, 3, dtype=DTYPE), mask), torch.tensor([2.0, 4.0]).log().double()
    )


def test_heterogeneity__is_zero_when_one_visible_token_dominates() -> None:
    tokens = torch.tensor([[[100.0, 0.0], [50.0, 0.0], [0.0, 1.0]]])
    assert heterogeneity(tokens, torch.tensor([[True, False, False]])).item() == 0.0


def test_heterogeneity__on_paper() -> None:
    # One masked token; dot products with the two visible ones are log 3 and 0: weights 3/4 and 1/4, in nats, although
    # the width is 4 (so a division by its root would show).
    tokens = torch.tensor([[[1.0, 0, 0, 0], [math.log(3), 5, 0, 0], [0, 0, 7, 0]]], dtype=DTYPE)
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert heterogeneity(tokens, torch.tensor([[True, False, False]])).item() == pytest.approx(by_hand, abs=1e-15)


def test_heterogeneity__has_masked_rows_and_visible_columns() -> None:
    # Masked and visible exchanged give another value: two queries over one key are certain.
    tokens = torch.tensor([[[1.0], [math.log(3)], [0.0]]], dtype=DTYPE)
    mask = torch.tensor([[True, False, False]])
    assert heterogeneity(tokens, mask).item() > 0.5
    assert heterogeneity(tokens, ~mask).item() == 0.0


def test_heterogeneity__is_the_mean_over_masked_rows_not_the_sum() -> None:
    mask = torch.tensor([[True, True, True, False, False]])
    assert heterogeneity(torch.zeros(1, 5, 2, dtype=DTYPE), mask).item() == pytest.approx(math.log(2))


def test_row_entropy__by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, math.log(2), -1000.0], [5.0, 5.0, -1e6, -1e6]], dtype=DTYPE)
    expected = [math.log(4), 0.5 * math.log(4) + 0.5 * math.log(2), math.log(2)]
    assert row_entropy(logits).tolist() == pytest.approx(expected, abs=1e-15)


def test_affinity_matrix__on_paper() -> None:
    tokens = torch.tensor([[[0.0, 0.0], [math.sqrt(math.log(3)), 0.0]]], dtype=DTYPE)
    assert torch.allclose(affinity_matrix(tokens), torch.tensor([[[0.5, 0.5], [0.25, 0.75]]], dtype=DTYPE))


def test_split_quadrants__is_numbered_in_reading_order() -> None:
    first, second, third, fourth = split_quadrants(torch.arange(16).reshape(4, 4), num_masked=1)
    assert first.tolist() == [[0]]
    assert second.tolist() == [[1, 2, 3]]
    assert third.tolist() == [[4], [8], [12]]
    assert fourth.tolist() == [[5, 6, 7], [9, 10, 11], [13, 14, 15]]


# Against the slow loops.


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 35])
def test_heterogeneity__agrees_with_the_reference(generator: torch.Generator, batch: int, ragged: bool) -> None:
    tokens, mask = some_tokens(generator, batch), some_masks(generator, batch, ragged=ragged)
    values = heterogeneity(tokens, mask)
    assert values.dtype == DTYPE
    assert values.shape == (batch,)
    assert torch.allclose(values, reference_values(tokens, mask), atol=1e-12, rtol=0)
    assert len(values.unique()) > 0.9 * batch  # so a value that belongs to another image shows


@pytest.mark.parametrize("num_masked", [1, 4, 15])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_heterogeneity__agrees_with_the_reference_for_all_ratios_and_norms(
    generator: torch.Generator, num_masked: int, scale: float
) -> None:
    tokens, mask = some_tokens(generator, 2) * scale, torch.zeros(2, 16, dtype=torch.bool)
    mask[:, torch.randperm(16, generator=generator)[:num_masked]] = True
    assert torch.allclose(heterogeneity(tokens, mask), reference_values(tokens, mask), atol=1e-11, rtol=0)


def test_heterogeneity__in_float32_is_near_float64(generator: torch.Generator) -> None:
    tokens, mask = some_tokens(generator, 4, 64, 32), some_masks(generator, 4, 64)
    assert heterogeneity(tokens.float(), mask).dtype == torch.float32
    assert torch.allclose(heterogeneity(tokens.float(), mask).double(), heterogeneity(tokens, mask), atol=2e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_heterogeneity__raises_half_precision_before_the_product(generator: torch.Generator, half: torch.dtype) -> None:
    tokens, mask = some_tokens(generator, 3).to(half), some_masks(generator, 3)
    values = heterogeneity(tokens, mask)
    assert values.dtype == torch.float32
    assert torch.equal(values, heterogeneity(tokens.float(), mask))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heterogeneity(tokens.float(), mask), values)


@pytest.mark.parametrize("kind", ["softmax", "dot", "cosine"])
@pytest.mark.parametrize("ragged", [False, True])
def test_affinity_matrix__agrees_with_the_reference(generator: torch.Generator, kind, ragged: bool) -> None:
    tokens, mask = some_tokens(generator, 11), some_masks(generator, 11, ragged=ragged)
    matrix = affinity_matrix(tokens, mask, kind=kind)
    expected = [reference.affinity(*row, kind) for row in zip(tokens.tolist(), mask.tolist(), strict=True)]
    assert torch.allclose(matrix, torch.tensor(expected, dtype=DTYPE), atol=1e-12)


def test_split_quadrants__agrees_with_the_reference(generator: torch.Generator) -> None:
    tokens, mask = some_tokens(generator, 2), some_masks(generator, 2)
    matrix = affinity_matrix(tokens, mask)
    for image in range(2):
        expected = reference.quadrants(matrix[image].tolist(), 10)
        assert [quadrant[image].tolist() for quadrant in split_quadrants(matrix, 10)] == expected


def test_affinity_matrix__gives_the_originals_visible_row_entropies(golden) -> None:
    # l_spa of the golden files (Eq. 3): sum over visible rows of the entropy over all tokens, at layer depth 0.
    tokens = torch.from_numpy(golden.expected["tokens"][0]).double()
    dots = affinity_matrix(tokens, golden.mask, kind="dot")
    num_masked = int(golden.mask[0].sum())
    quadrants = split_quadrants(dots, num_masked)
    values = row_entropy(torch.cat([quadrants.third, quadrants.fourth], dim=2)).sum(dim=1)
    assert values.tolist() == pytest.approx(golden.expected["l_spa"].tolist(), abs=1e-9)


def test_heterogeneity__of_the_originals_tokens_is_the_originals(golden) -> None:
    for tokens, expected in zip(golden.expected["tokens"], golden.expected["heterogeneity"], strict=True):
        values = heterogeneity(torch.from_numpy(tokens).double(), golden.mask)
        assert values.tolist() == pytest.approx(expected.tolist(), abs=1e-11)


@pytest.mark.parametrize("ragged", [False, True])
def test_quadrant_mass__agrees_with_the_reference(generator: torch.Generator, ragged: bool) -> None:
    tokens, mask = some_tokens(generator, 9), some_masks(generator, 9, ragged=ragged)
    masses = quadrant_mass(tokens, mask)
    for image, row in enumerate(mask.tolist()):
        four = reference.quadrants(reference.affinity(tokens[image].tolist(), row), sum(row))
        expected = [sum(sum(line) for line in quadrant) / len(quadrant) for quadrant in four]
        assert masses[image].tolist() == pytest.approx(expected, abs=1e-12)
        assert sum(expected) == pytest.approx(2)


# Properties.


@given(seed=st.integers(0, 2**31), batch=st.integers(1, 12), scale=st.floats(0, 30))
def test_heterogeneity__lies_between_0_and_its_bound(seed: int, batch: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = some_tokens(generator, batch) * scale, some_masks(generator, batch, ragged=True)
    values = heterogeneity(tokens, mask)
    assert bool((values >= 0).all())
    assert bool((values <= (~mask).sum(dim=1).double().log() + 1e-12).all())


@given(seed=st.integers(0, 2**31))
def test_heterogeneity__does_not_change_when_patches_are_reordered_with_the_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = some_tokens(generator, 4), some_masks(generator, 4, ragged=True)
    order = torch.randperm(16, generator=generator)
    assert torch.allclose(heterogeneity(tokens, mask), heterogeneity(tokens[:, order], mask[:, order]), atol=1e-12)


@given(seed=st.integers(0, 2**31), batch=st.integers(2, 20))
def test_heterogeneity__of_an_image_does_not_depend_on_the_others(seed: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = some_tokens(generator, batch), some_masks(generator, batch, ragged=True)
    alone = torch.cat([heterogeneity(tokens[i : i + 1], mask[i : i + 1]) for i in range(batch)])
    assert torch.allclose(heterogeneity(tokens, mask), alone, atol=1e-13)


def test_heterogeneity__ignores_masked_masked_and_visible_visible_products(generator: torch.Generator) -> None:
    # One rotation of all tokens keeps H; a masked token changes its own row only.
    tokens, mask = some_tokens(generator, 1), some_masks(generator, 1)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=DTYPE)).Q
    assert torch.allclose(heterogeneity(tokens @ rotation, mask), heterogeneity(tokens, mask), atol=1e-12)
    first = int(mask[0].nonzero()[0])
    other = tokens.clone()
    other[0, first] = 0  # uniform over the 6 visible tokens
    own = heterogeneity(tokens, mask)
    rows = row_entropy(tokens[0][mask[0]] @ tokens[0][~mask[0]].T)
    change = (math.log(6) - rows[0]) / 10
    assert torch.allclose(heterogeneity(other, mask) - own, change, atol=1e-12)


@given(logits=st.lists(st.floats(-300, 300), min_size=1, max_size=9), shift=st.floats(-1000, 1000))
def test_row_entropy__does_not_change_with_a_shift_and_stays_in_bounds(logits: list[float], shift: float) -> None:
    row = torch.tensor(logits, dtype=DTYPE)
    value = row_entropy(row).item()
    assert value == pytest.approx(row_entropy(row + shift).item(), abs=1e-10)
    assert -1e-15 <= value <= math.log(len(logits)) + 1e-12
    assert value == pytest.approx(reference.entropy(reference.softmax(logits)), abs=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
def test_affinity_matrix__rows_sum_to_one_and_quadrants_reassemble(generator: torch.Generator, ragged: bool) -> None:
    tokens, mask = some_tokens(generator, 10), some_masks(generator, 10, ragged=ragged)
    matrix = affinity_matrix(tokens, mask)
    assert torch.allclose(matrix.sum(dim=-1), torch.ones(10, 16, dtype=DTYPE))
    for image, count in enumerate(mask.sum(dim=1).tolist()):
        first, second, third, fourth = split_quadrants(matrix[image], count)
        whole = torch.cat([torch.cat([first, second], dim=1), torch.cat([third, fourth], dim=1)])
        assert torch.equal(whole, matrix[image])
        assert second.shape == (count, 16 - count)


def test_affinity_matrix__with_a_mask_is_the_plain_one_reordered(generator: torch.Generator) -> None:
    tokens, mask = some_tokens(generator, 3), some_masks(generator, 3)
    plain, order = affinity_matrix(tokens), masked_first_order(mask)
    for image in range(3):
        rows = order[image]
        assert torch.allclose(affinity_matrix(tokens, mask)[image], plain[image][rows][:, rows], atol=1e-14)


def test_affinity_matrix__of_cosines_is_symmetric_with_ones(generator: torch.Generator) -> None:
    matrix = affinity_matrix(some_tokens(generator, 2) * 9, kind="cosine")
    assert torch.allclose(matrix, matrix.mT)
    assert torch.allclose(matrix.diagonal(dim1=1, dim2=2), torch.ones(2, 16, dtype=DTYPE))


def test_token_split__can_be_shared_between_layer_depths(generator: torch.Generator) -> None:
    mask = some_masks(generator, 12, ragged=True)
    split = TokenSplit(mask)
    for dim in (3, 7):
        tokens = some_tokens(generator, 12, dim=dim)
        assert torch.equal(heterogeneity(tokens, split), heterogeneity(tokens, mask))
        assert torch.equal(affinity_matrix(tokens, split), affinity_matrix(tokens, mask))


def test_scratch__is_the_same_memory_for_a_use_until_more_is_needed() -> None:
    scratch, like = Scratch(), torch.zeros(1, dtype=torch.bfloat16)
    first = scratch("product", like, 3, 4).fill_(1)
    assert first.dtype == torch.float32
    assert scratch("product", like, 2, 5).data_ptr() == first.data_ptr()
    assert scratch("other", like, 3, 4).data_ptr() != first.data_ptr()
    more = scratch("product", like, 5, 5).fill_(2)
    assert scratch("product", like, 3, 4).eq(2).all()
    assert first.eq(1).all()  # who still holds the old memory keeps it
    assert more.shape == (5, 5)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_lasting_memory__can_be_written_and_outlives_its_maker(shape: tuple[int, ...]) -> None:
    dtypes = [torch.float32, torch.float64, torch.int64]
    kept = [lasting_memory(*shape, dtype=dtype) for dtype in dtypes]
    gc.collect()
    assert [each.dtype for each in kept] == dtypes
    assert all(each.fill_(7).shape == shape and each.eq(7).all() for each in kept)


# Gradients.


def test_heterogeneity__has_right_gradients(generator: torch.Generator) -> None:
    tokens = some_tokens(generator, 3, 6, 3).requires_grad_()
    mask = torch.tensor([[True, True, False, False, True, False], [True] * 5 + [False], [False] * 4 + [True] * 2])
    assert torch.autograd.gradcheck(lambda x: heterogeneity(x, mask), (tokens,))


@pytest.mark.parametrize("kind", ["softmax", "dot", "cosine"])
def test_affinity_matrix__has_right_gradients(generator: torch.Generator, kind) -> None:
    tokens = some_tokens(generator, 2, 4, 3).requires_grad_()
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    assert torch.autograd.gradcheck(lambda x: affinity_matrix(x, mask, kind=kind), (tokens,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e2, 1e5, 1e8])
def test_heterogeneity__has_finite_gradients_for_saturated_rows(
    generator: torch.Generator, dtype: torch.dtype, scale: float
) -> None:
    tokens = (some_tokens(generator, 4) * scale).to(dtype).requires_grad_()
    values = heterogeneity(tokens, some_masks(generator, 4))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("row", [[0.0, -1e30], [1e30, -1e30], [3.0], [0.0, 0.0]])
def test_row_entropy__has_finite_gradients_at_the_extremes(row: list[float]) -> None:
    logits = torch.tensor(row).requires_grad_()
    row_entropy(logits).backward()
    assert torch.isfinite(logits.grad).all()


# Rules broken.


def test_heterogeneity__names_the_rule_that_is_broken(generator: torch.Generator) -> None:
    tokens, mask = some_tokens(generator, 2), some_masks(generator, 2)
    for bad in (tokens[:, :8], tokens[:1], tokens[0]):
        with pytest.raises(ValueError, match=r"tokens must be \[batch, num_patches, dim\]"):
            heterogeneity(bad, mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        heterogeneity(tokens, mask.float())
    with pytest.raises(ValueError, match="mask must leave a patch visible in every row, row 0 does not"):
        heterogeneity(tokens, torch.ones_like(mask))
    with pytest.raises(ValueError, match="mask must mask a patch in every row, row 0 does not"):
        heterogeneity(tokens, torch.zeros_like(mask))


def test_affinity_matrix__refuses_unknown_kinds(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="kind must be softmax, dot or cosine, got 'l2'"):
        affinity_matrix(some_tokens(generator, 1), kind="l2")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_masked", [0, 4])
def test_split_quadrants__refuses_empty_quadrants(num_masked: int) -> None:
    with pytest.raises(ValueError, match="num_masked must lie between 0 and 4"):
        split_quadrants(torch.zeros(4, 4), num_masked)
