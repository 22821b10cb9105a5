from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import make_mae, make_simmim, make_two_stacks, some_images, some_masks

from mto_analysis.models.adapting import fix_key_biases, set_drop_path
from mto_analysis.models.initialization import random_weights
from mto_analysis.training.blocks import choose_attention


def batch():
    generator = torch.Generator().manual_seed(0)
    return some_images(generator, 3), some_masks(generator, 3)


@pytest.mark.parametrize("make", [make_mae, make_simmim])
def test_adapting__changes_neither_weights_nor_numbers(make):
    model = random_weights(make(), seed=0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        reference = model.reconstruct(*batch())
        fix_key_biases(model)
        fix_key_biases(model)  # again does nothing
        set_drop_path(model, 0.3)
        assert torch.equal(model.reconstruct(*batch()), reference)
        assert torch.equal(copy.deepcopy(model).reconstruct(*batch()), reference)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fix_key_biases__a_bias_that_is_there_has_no_effect():
    model = random_weights(make_simmim(), seed=0)
    fix_key_biases(model)
    before = model.reconstruct(*batch())
    with torch.no_grad():
        third = model.config.dim
        model.blocks[0].attn.qkv.bias[third : 2 * third] = 5.0
    loss = model.reconstruct(*batch()).square().mean()
    assert torch.equal(model.reconstruct(*batch()), before)
    loss.backward()
    gradient = model.blocks[0].attn.qkv.bias.grad
    assert gradient[third : 2 * third].count_nonzero() == 0
    assert gradient[:third].count_nonzero() > 0


@pytest.mark.parametrize("ragged", [False, True])
def test_cross_attention__plain_form_agrees_with_masked_out_tokens_too(ragged):
    from mto_analysis.models import BootMAE, BootMAEConfig, ModelInfo

    sizes = {"image_size": 16, "patch_size": 4}
    info = ModelInfo("bootmae", "decoder", mask_rule=make_mae().info.mask_rule, **sizes)
    config = BootMAEConfig(
        **sizes, dim=24, depth=2, num_heads=3, mlp_dim=20, decoder_dim=16, decoder_mlp_dim=20, feature_mlp_dim=20
    )
    model = random_weights(BootMAE(config, info), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    images, mask = some_images(generator, 4).double(), some_masks(generator, 4, ragged=ragged)
    with torch.no_grad():
        fused = model.predict(images, mask)
        choose_attention(model, torch.device("cpu"), "bf16")
        for one, other in zip(fused, model.predict(images, mask), strict=True):
            torch.testing.assert_close(one, other)


def test_set_drop_path__refuses_a_model_without_blocks():
    with pytest.raises((ValueError, AttributeError)):
        set_drop_path(make_two_stacks(), 0.1)
