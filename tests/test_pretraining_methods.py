from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import some_images, some_masks

from mto_analysis.models.adapting import set_attention
from mto_analysis.pretraining import build_method, load_recipe, parameter_groups
from mto_analysis.training import attach_mto

SMALL = {
    "image_size": "16",
    "mask_unit": "4",
    "model.dim": "24",
    "model.depth": "2",
    "model.num_heads": "3",
    "model.mlp_dim": "40",
}
OWN = {
    "mae": {"model.decoder_dim": "16", "model.decoder_depth": "2", "model.decoder_num_heads": "2"},
    "simmim": {},
}
TERMS = {"mae": ["pixels"], "simmim": ["pixels"]}


def tiny_recipe(method, **options):
    return load_recipe(f"{method}_cifar10").with_options(SMALL | OWN[method] | options)


def a_batch(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return some_images(generator, count), some_masks(generator, count), some_images(generator, count)


def step(method, groups, batch):
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    sum(method(*batch).values()).backward()
    optimizer.step()
    method.after_step(0.1)


@pytest.mark.parametrize("name", TERMS)
def test_method__same_seed_same_loss_and_global_random_state_kept(name):
    before = torch.random.get_rng_state()
    first, again = (build_method(tiny_recipe(name), seed=3) for _ in range(2))
    other = build_method(tiny_recipe(name), seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    losses = [method(*a_batch()) for method in (first, again, other)]
    assert list(losses[0]) == TERMS[name]
    assert all(torch.equal(losses[0][term], losses[1][term]) for term in TERMS[name])
    assert sum(losses[0].values()) != sum(losses[2].values())


@pytest.mark.parametrize("name", TERMS)
def test_method__every_trained_weight_has_a_finite_gradient(name):
    method = build_method(tiny_recipe(name), seed=0)
    sum(method(*a_batch()).values()).backward()
    for key, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", TERMS)
def test_method__micro_batches_average_exactly(name):
    method = build_method(tiny_recipe(name), seed=0).double()
    if method.depends_on_batch:
        pytest.skip("its batch norms see the micro-batch, as the original's see a process's share")
    images, mask, second = (x.double() if x.is_floating_point() else x for x in a_batch(count=6))
    whole = sum(method(images, mask, second).values())
    parts = [sum(method(images[i : i + 2], mask[i : i + 2], second[i : i + 2]).values()) for i in (0, 2, 4)]
    assert whole.item() == pytest.approx(sum(parts).item() / 3, rel=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_method__mto_sees_each_stack_once(name):
    method = build_method(tiny_recipe(name), seed=0)
    mto = attach_mto(method.student)
    loss = sum(method(*a_batch()).values()) + mto.loss()
    loss.backward()
    assert torch.isfinite(loss)
    with pytest.raises(RuntimeError, match="no forward"):
        mto.loss()


@pytest.mark.parametrize("name", [name for name in TERMS if name != "mae"])
def test_method__key_biases_stay_exactly_zero(name):
    method = build_method(tiny_recipe(name), seed=0)
    for number in range(3):
        step(method, parameter_groups(method, method.recipe), a_batch(number))
    biases = {key: value for key, value in method.student.state_dict().items() if key.endswith("qkv.bias")}
    assert biases
    for value in biases.values():
        query, key, last = value.chunk(3)
        assert key.count_nonzero() == 0
        assert query.count_nonzero() > 0
        assert last.count_nonzero() > 0


@pytest.mark.parametrize("name", TERMS)
def test_method__plain_attention_gives_the_same_loss(name):
    method = build_method(tiny_recipe(name), seed=0).double()
    batch = [x.double() if x.is_floating_point() else x for x in a_batch()]
    fused = sum(method(*batch).values())
    set_attention(method, "cpu", torch.bfloat16)
    assert not any(getattr(module, "fused_attn", False) for module in method.modules())
    assert sum(method(*batch).values()).item() == pytest.approx(fused.item(), rel=1e-9)
    set_attention(method, "cpu", torch.float32)
    assert all(getattr(module, "fused_attn", True) for module in method.modules())


@pytest.mark.parametrize("name", TERMS)
def test_method__resumes_from_its_state(name):
    method = build_method(tiny_recipe(name), seed=0)
    groups = parameter_groups(method, method.recipe)
    step(method, groups, a_batch())
    other = build_method(tiny_recipe(name), seed=1)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert other.progress == method.progress
    with torch.no_grad():
        for first, second in zip(method(*a_batch(5)).values(), other(*a_batch(5)).values(), strict=True):
            assert torch.equal(first, second)


def test_mae__loss_is_the_squared_error_of_masked_patches():
    method = build_method(tiny_recipe("mae"), seed=0)
    images, mask, _ = a_batch()
    with torch.no_grad():
        predicted = method.student.reconstruct(images, mask)
        loss = method(images, mask)["pixels"].item()
    per_picture = []
    for picture, guess, masked in zip(images, predicted, mask, strict=True):
        errors = []
        for patch in masked.nonzero().flatten().tolist():
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            here = (slice(None), slice(y, y + 4), slice(x, x + 4))
            errors += [(a - b) ** 2 for a, b in zip(picture[here].flatten(), guess[here].flatten(), strict=True)]
        per_picture.append(sum(errors) / len(errors))
    assert loss == pytest.approx(float(sum(per_picture) / len(per_picture)), rel=1e-5)


def test_mae__normalized_target_has_mean_zero_and_sample_deviation_one():
    method = build_method(tiny_recipe("mae", target="normalized_pixels"), seed=0)
    images, mask, _ = a_batch(count=1)
    with torch.no_grad():
        predicted = method.student.predict_patches(images, mask)
        loss = method(images, mask)["pixels"].item()
    errors = []
    for patch in mask[0].nonzero().flatten().tolist():
        y, x = 4 * (patch // 4), 4 * (patch % 4)
        values = [images[0, c, y + i, x + j].item() for i in range(4) for j in range(4) for c in range(3)]
        mean = sum(values) / 48
        deviation = (sum((value - mean) ** 2 for value in values) / 47 + 1e-6) ** 0.5
        errors += [((v - mean) / deviation - g) ** 2 for v, g in zip(values, predicted[0, patch].tolist(), strict=True)]
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_simmim__loss_is_the_absolute_error_of_masked_pixels():
    method = build_method(tiny_recipe("simmim"), seed=0)
    images, mask, _ = a_batch()
    with torch.no_grad():
        error = (method.student.reconstruct(images, mask) - images).abs()
        loss = method(images, mask)["pixels"].item()
    total, count = 0.0, 0
    for picture in range(len(images)):
        for y in range(16):
            for x in range(16):
                if mask[picture, (y // 4) * 4 + x // 4]:
                    total, count = total + float(error[picture, :, y, x].sum()), count + 3
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_simmim__drop_path_grows_with_the_block_and_acts_in_training_only():
    method = build_method(tiny_recipe("simmim", drop_path="0.5", **{"model.depth": "3"}), seed=0)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in method.student.blocks]
    assert rates == pytest.approx([0, 0.25, 0.5])
    batch = a_batch()
    torch.manual_seed(0)
    first, second = (method(*batch)["pixels"] for _ in range(2))
    assert first != second
    torch.manual_seed(0)
    assert torch.equal(first, method(*batch)["pixels"])
    method.eval()
    assert torch.equal(method(*batch)["pixels"], method(*batch)["pixels"])
