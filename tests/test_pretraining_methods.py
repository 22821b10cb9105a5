from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import some_images, some_masks

from mto_analysis.mto import attach_mto
from mto_analysis.training import build_method, load_recipe, parameter_groups
from mto_analysis.training.blocks import choose_attention

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
    "bootmae": {"model.decoder_dim": "16", "model.decoder_mlp_dim": "20", "model.feature_mlp_dim": "28"},
    "conmim": {"model.projector_dim": "20", "model.projection_dim": "8"},
}
TERMS = {"mae": ["pixels"], "simmim": ["pixels"], "bootmae": ["pixels", "features"], "conmim": ["contrast"]}


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
        assert parameter.requires_grad or key.endswith(("pos_embed", ".k.bias")) or key.startswith("teacher."), key
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key


def test_method__only_conmim_depends_on_the_batch():
    """Its batch norms see the micro-batch, as the original's see a process's share."""
    assert [name for name in TERMS if build_method(tiny_recipe(name), seed=0).depends_on_batch] == ["conmim"]


@pytest.mark.parametrize("name", ["mae", "simmim", "bootmae"])
def test_method__micro_batches_average_exactly(name):
    method = build_method(tiny_recipe(name), seed=0).double()
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
    separate = [value for key, value in method.student.state_dict().items() if key.endswith(".k.bias")]
    assert len(separate) == (8 if name == "bootmae" else 0)
    assert not any(value.count_nonzero() for value in separate)


@pytest.mark.parametrize("name", TERMS)
def test_method__plain_attention_gives_the_same_loss(name):
    method = build_method(tiny_recipe(name), seed=0).double()
    batch = [x.double() if x.is_floating_point() else x for x in a_batch()]
    fused = sum(method(*batch).values())
    choose_attention(method, torch.device("cpu"), "bf16")
    assert not any(getattr(module, "fused_attn", False) for module in method.modules())
    assert sum(method(*batch).values()).item() == pytest.approx(fused.item(), rel=1e-9)


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
    per_image = []
    for image, guess, masked in zip(images, predicted, mask, strict=True):
        errors = []
        for patch in masked.nonzero().flatten().tolist():
            y, x = 4 * (patch // 4), 4 * (patch % 4)
            here = (slice(None), slice(y, y + 4), slice(x, x + 4))
            errors += [(a - b) ** 2 for a, b in zip(image[here].flatten(), guess[here].flatten(), strict=True)]
        per_image.append(sum(errors) / len(errors))
    assert loss == pytest.approx(float(sum(per_image) / len(per_image)), rel=1e-5)


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
    for image in range(len(images)):
        for y in range(16):
            for x in range(16):
                if mask[image, (y // 4) * 4 + x // 4]:
                    total, count = total + float(error[image, :, y, x].sum()), count + 3
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


def loop_layer_norm(values):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / (variance + 1e-6) ** 0.5 for value in values]


def test_bootmae__losses_by_loops():
    """From the paper and the original's script: weights of masked neighbours, targets per channel, features of the
    teacher's last block for the whole image."""
    method = build_method(tiny_recipe("bootmae"), seed=0)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)  # so that it is not the student
    images, mask, _ = a_batch(count=2)
    with torch.no_grad():
        pixels, features = method.student.predict(images, mask)
        assert torch.equal(pixels, method.student.reconstruct(images, mask))
        x = method.teacher.patch_embed(images) + method.teacher.pos_embed[:, 1:]
        first = (method.teacher.cls_token + method.teacher.pos_embed[:, :1]).expand(2, -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in method.teacher.blocks:
            x = block(x)
        target = x[:, 1:]
        terms = method(images, mask)
    sums = {"pixels": 0.0, "features": 0.0}
    for n in range(2):
        masked = mask[n].reshape(4, 4)
        for row in range(4):
            for column in range(4):
                if not masked[row, column]:
                    continue
                around = [
                    float(masked[y, x])
                    for y in range(max(0, row - 1), min(4, row + 2))
                    for x in range(max(0, column - 1), min(4, column + 2))
                ]
                weight = 1 + sum(around) / 9
                errors = []
                for channel in range(3):
                    here = (n, channel, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
                    values, guess = images[here].flatten().tolist(), pixels[here].flatten().tolist()
                    mean = sum(values) / 16
                    deviation = (sum((value - mean) ** 2 for value in values) / 16 + 1e-5) ** 0.5
                    errors += [((v - mean) / deviation - g) ** 2 for v, g in zip(values, guess, strict=True)]
                sums["pixels"] += weight * sum(errors) / len(errors)
                patch = 4 * row + column
                pair = (loop_layer_norm(each[n, patch].tolist()) for each in (features, target))
                errors = [(a - b) ** 2 for a, b in zip(*pair, strict=True)]
                sums["features"] += weight * sum(errors) / len(errors)
    # The first of 20 epochs: a quarter of the run raises the weight to 1.
    assert terms["pixels"].item() == pytest.approx(sums["pixels"] / int(mask.sum()), rel=1e-4)
    assert terms["features"].item() == pytest.approx(sums["features"] / int(mask.sum()) / 5, rel=1e-4)


def test_bootmae__feature_weight_and_momentum_follow_the_epochs():
    options = {"epochs": "8", "momentum": "0.5,0.75,1", "momentum_epochs": "0,2,4"}
    method = build_method(tiny_recipe("bootmae", **options), seed=0)
    weights, movements = [], []
    for number in range(16):  # two steps an epoch
        weights.append(float(method.feature_weight))
        with torch.no_grad():
            method.student.cls_token.fill_(1.0)
            method.teacher.cls_token.zero_()
        method.after_step((number + 1) / 16)
        movements.append(1 - float(method.teacher.cls_token[0, 0, 0]))
    assert weights == pytest.approx([0.5, 0.5] + [1.0] * 14)
    expected = [0.5, 0.625, 0.75, 0.875, 1, 1, 1, 1]
    assert movements == pytest.approx([value for value in expected for _ in range(2)])


def test_bootmae__teacher_is_in_eval_mode_and_no_part_of_the_optimizer():
    method = build_method(tiny_recipe("bootmae"), seed=0)
    assert method.student.training
    assert not method.teacher.training
    names = [name for group in parameter_groups(method, method.recipe) for name in group["param_names"]]
    assert not any(name.startswith("teacher") for name in names)


def test_conmim__loss_by_loops():
    method = build_method(tiny_recipe("conmim"), seed=0)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.mul_(1.1)
    images, mask, second = a_batch(count=3)
    with torch.no_grad():
        queries = method.student.project(images, mask)
        keys = method.teacher.project(second, torch.zeros_like(mask))
        assert torch.equal(keys, method.teacher.project(second, None))
        loss = method(images, mask, second)["contrast"].item()
    total, count = 0.0, 0
    for n in range(3):
        for patch in mask[n].nonzero().flatten().tolist():
            query = queries[n, patch] / queries[n, patch].norm()
            logits = [float(query @ (key / key.norm())) / 0.1 for key in keys[n]]
            total -= logits[patch] - math.log(sum(math.exp(each) for each in logits))
            count += 1
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_conmim__batch_norms_count_the_class_token_and_both_branches_use_the_batch():
    method = build_method(tiny_recipe("conmim"), seed=0)
    assert method.teacher.training
    images, mask, second = a_batch()
    seen = []
    handle = method.student.projectors[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    method(images, mask, second)
    handle.remove()
    assert seen == [torch.Size([4 * 17, 20])]
    assert method.teacher.projectors[1].num_batches_tracked == 1


def test_conmim__teacher_follows_on_a_cosine_to_a_standstill():
    method = build_method(tiny_recipe("conmim", momentum="0.5"), seed=0)
    movements = []
    for number in range(4):
        with torch.no_grad():
            method.student.cls_token.fill_(1.0)
            method.teacher.cls_token.zero_()
        method.after_step((number + 1) / 4)
        movements.append(1 - float(method.teacher.cls_token[0, 0, 0]))
    # Step `it` of `total` has 1 - (1 - 0.5) (1 + cos(pi it / total)) / 2.
    assert movements == pytest.approx([1 - 0.25 * (1 + math.cos(math.pi * it / 4)) for it in range(4)])


@pytest.mark.parametrize("name", ["bootmae", "conmim"])
def test_method__mto_on_the_student_ignores_the_teacher(name):
    method = build_method(tiny_recipe(name), seed=0)
    mto = attach_mto(method.student)
    images, mask, second = a_batch()
    method(images, mask, second)
    loss = mto.loss()
    for parameter in method.teacher.parameters():
        parameter.data.mul_(2)
    method(images, mask, second)
    assert torch.equal(loss, mto.loss())


@pytest.mark.parametrize("name", TERMS)
def test_method__half_precision_loses_little_and_mto_still_sees_the_mask(name):
    method = build_method(tiny_recipe(name), seed=0)
    whole = {key: value.item() for key, value in method(*a_batch()).items()}
    mto = attach_mto(method.student)
    choose_attention(method, torch.device("cpu"), "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        terms = method(*a_batch())
        loss = sum(terms.values()) + mto.loss()
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert {key: value.item() for key, value in terms.items()} == pytest.approx(whole, rel=0.03)
    loss.backward()
    gradients = [each.grad for each in method.parameters() if each.grad is not None]
    assert all(torch.isfinite(each).all() for each in gradients)
